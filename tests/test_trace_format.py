"""A history survives its file, and a file that is not one is refused with a reason."""
import json
import os
import zlib

import numpy as np
import pytest

from ioproc.trace import EVENT, Op, Trace, TraceError, TraceWriter
from ioproc.trace.format import HEADER, MAGIC, PACKED, ROWS, VERSION


def history(count, seed=1):
    random = np.random.default_rng(seed)
    events = np.zeros(count, EVENT)
    events["t"] = np.cumsum(random.integers(0, 5000, count), dtype=np.uint64)
    events["pid"] = random.integers(100, 104, count)
    events["tid"] = events["pid"]
    events["op"] = random.integers(1, max(Op) + 1, count)
    events["addr"] = random.integers(0, 1 << 47, count)
    events["ret"] = random.integers(0, 1 << 47, count)
    events["file"] = random.integers(-1, 1, count)
    return Trace(events, {"command": "true", "files": [{"path": "/lib/é", "size": 4096, "kind": "file"}]})


def file_of(events=b"", metadata=b'{"files":[]}', *, layout=ROWS, version=VERSION, count=None):
    """A file with right checksums, whatever it holds."""
    count = len(events) // EVENT.itemsize if count is None else count
    header = HEADER.pack(MAGIC, version, layout, count, len(metadata), len(events), zlib.crc32(metadata),
                         zlib.crc32(events), 1000, 0)
    at = HEADER.size - 12
    return header[:at] + zlib.crc32(header[:at]).to_bytes(4, "little") + header[at + 4:] + metadata + events


@pytest.mark.parametrize("name", ["a.ioproc", "a.ioproc.xz", "a.ioproc.gz"])
@pytest.mark.parametrize("count", [0, 1, 1000, 20_000])
def test_round_trip(tmp_path, name, count):
    trace = history(count)
    trace.save(tmp_path / name)
    again = Trace.load(tmp_path / name)
    assert np.array_equal(again.events, trace.events)
    assert again.metadata == trace.metadata
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_save_follows_links_and_replaces_files_only(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.gz").symlink_to("there/target")
    for count in (10, 20):      # makes it, then replaces it
        history(count).save(tmp_path / "link.gz")
        assert (tmp_path / "link.gz").is_symlink()
        assert len(Trace.load(tmp_path / "link.gz")) == count
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["target"]
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "loop", "there"):
        with pytest.raises(OSError, match="not a regular file") as caught:
            history(1).save(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    assert (tmp_path / "fifo").is_fifo()


def test_round_trip_zst(tmp_path):
    pytest.importorskip("zstandard")
    history(1000).save(tmp_path / "a.zst")
    assert np.array_equal(Trace.load(tmp_path / "a.zst").events, history(1000).events)
    (tmp_path / "a.zst").write_bytes((tmp_path / "a.zst").read_bytes()[:500])
    with pytest.raises(TraceError, match="truncated"):
        Trace.load(tmp_path / "a.zst")


@pytest.mark.parametrize("packed", [True, False])
def test_both_layouts_can_be_stored_plainly(tmp_path, packed):
    history(5000).save(tmp_path / "a", packed=packed)
    assert np.array_equal(Trace.load(tmp_path / "a").events, history(5000).events)


def test_plain_rows_are_mapped_not_read(tmp_path):
    history(1000).save(tmp_path / "a")
    assert isinstance(Trace.load(tmp_path / "a").events, np.memmap)


def test_packing_pays(tmp_path):
    history(8_000).save(tmp_path / "packed.xz")
    history(8_000).save(tmp_path / "rows.xz", packed=False)
    assert (tmp_path / "packed.xz").stat().st_size < 0.9 * (tmp_path / "rows.xz").stat().st_size


def test_one_flipped_bit_anywhere_is_noticed(tmp_path):
    history(20).save(tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    random = np.random.default_rng(2)
    for at in [*range(HEADER.size - 8), *random.integers(HEADER.size, len(good), 200)]:
        bad = bytearray(good)
        bad[at] ^= 1 << random.integers(8)
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(TraceError, match="bad: "):
            Trace.load(tmp_path / "bad")


@pytest.mark.parametrize("name", ["a", "a.xz", "a.gz"])
def test_a_truncated_file_is_refused_at_any_length(tmp_path, name):
    history(3000).save(tmp_path / name)
    good = (tmp_path / name).read_bytes()
    for length in [0, 1, 7, 8, 30, HEADER.size, HEADER.size + 3, len(good) // 2, len(good) - 1]:
        (tmp_path / name).write_bytes(good[:length])
        with pytest.raises(TraceError):
            Trace.load(tmp_path / name)


def test_something_after_the_end_is_refused(tmp_path):
    history(30).save(tmp_path / "a")
    with open(tmp_path / "a", "ab") as file:
        file.write(b"x")
    with pytest.raises(TraceError, match="after the last event"):
        Trace.load(tmp_path / "a")


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "not an ioproc history"),
    (b"#!/bin/sh\nrm -rf /\n" * 10, "not an ioproc history"),
    (b"\x80\x04\x95" + b"pickle" * 20, "not an ioproc history"),
    (MAGIC, "truncated in its header"),
    (file_of(version=2), "version 2; this program reads version 1"),
    (file_of(layout=7), "contradicts itself"),
    (file_of(count=1 << 60), "contradicts itself"),
    (file_of(metadata=b"[]"), "no table of files"),
    (file_of(metadata=b"{'files': []}"), "not JSON"),
    (file_of(metadata=b"[" * 100_000), "not JSON"),
    (file_of(metadata=b'{"files":[{"path":1,"size":0,"kind":"file"}]}'), "table of files"),
    (file_of(metadata=b'{"files":[{"path":"a","size":-1,"kind":"file"}]}'), "table of files"),
    (file_of(metadata=b'{"files":[], "untraced_s":"soon"}'), "not a number"),
])
def test_what_is_no_history_is_refused_with_a_reason(tmp_path, content, reason):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(TraceError, match=reason) as caught:
        Trace.load(tmp_path / "a")
    assert caught.value.path == str(tmp_path / "a")


@pytest.mark.parametrize("field", [{"op": 0}, {"op": 200}, {"access": 3}, {"file": 0}, {"file": -2},
                                   {"origin": 16}, {"t": 5}])
def test_events_that_mean_nothing_are_refused(tmp_path, field):
    events = np.zeros(3, EVENT)
    events["op"], events["file"], events["t"] = Op.FAULT, -1, (1, 9, 9)
    for name, value in field.items():
        events[name][2] = value
    (tmp_path / "a").write_bytes(file_of(events.tobytes()))
    with pytest.raises(TraceError, match="event 2 is malformed"):
        Trace.load(tmp_path / "a")


def test_a_header_that_lies_about_sizes_allocates_nothing_of_it(tmp_path):
    count = 1 << 50
    data = bytearray(file_of())
    header = HEADER.pack(MAGIC, VERSION, PACKED, count, 12, count * 64, zlib.crc32(b'{"files":[]}'), 0, 1 << 20, 0)
    at = HEADER.size - 12
    data[:HEADER.size] = header[:at] + zlib.crc32(header[:at]).to_bytes(4, "little") + header[at + 4:]
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(TraceError, match="truncated"):
        Trace.load(tmp_path / "a")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        Trace.load(tmp_path / "none")
    with pytest.raises(TraceError, match="directory"):
        Trace.load(tmp_path)


def test_only_events_make_a_trace():
    with pytest.raises(ValueError, match="EVENT"):
        Trace(np.zeros(3))


def test_writer_corrects_what_was_written_and_closes_up_what_was_reserved():
    writer = TraceWriter()
    for t in range(10_000):
        writer.append((t, 1, 1, 0 if t % 3 else Op.FAULT, 0, 0, 0, 0, 0, -1, t, 0, 0, 0))
    writer.assign(1, op=Op.EXIT)
    writer.assign(9_999, access=2)
    trace = writer.finish()
    assert trace.events["t"].tolist() == sorted({1, *range(0, 10_000, 3)})
    assert trace.events["op"][1] == Op.EXIT
    assert trace.events["access"][-1] == 2


def test_summary_counts_operations_and_what_was_inferred():
    events = np.zeros(4, EVENT)
    events["op"] = (Op.EXEC, Op.MAP, Op.FAULT, Op.FAULT)
    events["origin"] = (0, 1, 2, 2)
    events["t"] = (10, 10, 20, 1_000_000_010)
    summary = Trace(events).summary()
    assert summary["operations"] == {"exec": 1, "fault": 2, "map": 1}
    assert summary["inferred"] == {"events": 1, "access": 2, "file": 0, "size": 0}
    assert summary["seconds"] == 1.0
    json.dumps(summary)


def test_arguments_and_paths_need_not_be_utf8(tmp_path):
    files = [{"path": "/\udc80", "size": 0, "kind": "file"}]
    Trace(np.empty(0, EVENT), {"command": "ls \udcff", "files": files}).save(tmp_path / "a")
    metadata = Trace.load(tmp_path / "a").metadata
    assert (metadata["command"], metadata["files"][0]["path"]) == ("ls ?", "/?")


def test_summary_and_programs():
    writer = TraceWriter()
    for number, (pid, op, access, flags, file, arg) in enumerate((
            (1, Op.EXEC, 0, 0, 0, 0), (1, Op.FAULT, 1, 0, -1, 0), (1, Op.FORK, 0, 0, -1, 2), (2, Op.FAULT, 2, 1, -1, 0),
            (1, Op.VFORK, 0, 0, -1, 3), (3, Op.EXEC, 0, 0, 1, 0), (3, Op.FAULT, 0, 0, -1, 0), (4, Op.BRK, 0, 0, -1, 0))):
        writer.append((number, pid, pid, op, access, 0, 0, 0, flags, file, 0, 0, arg, 0))
    trace = writer.finish({"files": [{"path": path, "size": 0, "kind": "file"} for path in ("/a", "/b")]})
    assert trace.summary()["faults"] == {"read": 1, "write": 1, "unknown": 1, "kernel": 1}
    assert trace.summary()["failed"] == 0
    assert [tuple(row.values()) for row in trace.programs()] == [
        (1, 4, 1, "/a"), (2, 1, 1, "/a"), (3, 2, 1, "/b"), (4, 1, 0, None)]
