"""Whatever a file holds, a reader gives a trace or a TraceError, and a lenient one never minds a line."""
import lzma
import random
from pathlib import Path

import pytest

from ioproc.trace import Op, Trace, TraceError, annotate, import_recording, read_perf, read_strace

DATA = Path(__file__).parent / "data"
SEED = 20250426


def sample(name, count):
    lines = lzma.open(DATA / name).read().splitlines(keepends=True)
    return b"".join(lines[begin] for begin in range(0, len(lines), max(len(lines) // count, 1)))


STRACE = sample("halo2.user.strace.xz", 300) + b"""\
1 1.000000 mremap(0x7f0000000000, 4096, 8192, 0x3, 0x7f0000200000) = 0x7f0000200000 <0.000001>
1 1.000000 mmap(NULL, 9, 0x1, 0x2, 3</lib/a, (b).so>, 0) = 0x1000 <0.000005>
"""
PERF = sample("halo2.user.pf.txt.xz", 300) + b"""\
 1/1  1795352599.0: PERF_RECORD_MMAP2 1/1: [0x7f0f1fc17000(0x3000) @ 0x7f0f1fc17000 00:00 0 0]: rw-p //anon
 1/1  1795352599.000000000: PERF_RECORD_MMAP2 1/1: [0x7f0f1fc17000(0x3000) @ 0 00:00 0 0]: r--p /lib
"""
COMM = b"""\
1795352565.1,4240,0x1000,16,send
{"time": 1795352566, "tid": 4240, "address": 1, "length": 2, "direction": "recv"}
"""
PIECES = [b"0", b"-1", b"99999999999999999999999", b"0x", b"NULL", b"(", b")", b"<", b">", b"...", b" = ", b", ", b"\n",
          b"\0", b"\xff\xfe", b"unfinished", b" resumed>", b"+++ ", b"--- ", b"\\", b'"', b":",
          b"/", b"@", b"[", b"]", b"=", b"{", b"1e999"]


def mutations(text, count):
    chance = random.Random(SEED)
    yield b"", "nothing"
    for number in range(count):
        data = bytearray(text)
        for _ in range(chance.choice((1, 1, 3, 30))):
            at = chance.randrange(len(data))
            end = min(at + chance.choice((0, 1, 4, 40)), len(data))
            how = chance.randrange(4)
            if how == 0:
                data[at:end] = chance.randbytes(end - at)
            elif how == 1:
                del data[at:end]
            elif how == 2:
                data[at:end] = chance.choice(PIECES)
            else:
                source = chance.randrange(len(data))
                data[at:at] = data[source:source + chance.choice((1, 20, 200))]
        yield bytes(data), f"mutation {number} of seed {SEED}"
    for number in range(count // 4):
        yield chance.randbytes(chance.randrange(400)), f"random bytes {number} of seed {SEED}"


def attempt(function, *arguments, **options):
    """What it returns, or the TraceError; anything else fails the test."""
    try:
        return function(*arguments, **options)
    except TraceError as error:
        return error


@pytest.mark.parametrize(("read", "text"), [(read_strace, STRACE), (read_perf, PERF)], ids=["strace", "perf"])
def test_readers_of_texts(tmp_path, read, text):
    path = tmp_path / "text"
    refused = 0
    for data, name in mutations(text, 120):
        path.write_bytes(data)
        outcome = attempt(read, path)
        if isinstance(outcome, TraceError):
            refused += 1
            assert outcome.line is None or 1 <= outcome.line <= data.count(b"\n") + 1, name
        outcome = attempt(read, path, lenient=True)
        if isinstance(outcome, TraceError):
            assert outcome.line is None, name
        else:
            assert set(outcome.events["op"].tolist()) <= set(Op), name
    assert refused > 50


def test_whole_imports(tmp_path):
    (tmp_path / "good").write_bytes(PERF)
    imported = 0
    for data, name in mutations(STRACE, 80):
        (tmp_path / "strace").write_bytes(data)
        trace = attempt(import_recording, tmp_path / "strace", tmp_path / "good", lenient=True)
        if isinstance(trace, TraceError):
            assert trace.line is None, name
            continue
        imported += 1
        trace.save(tmp_path / "history")
        assert len(Trace.load(tmp_path / "history")) == len(trace), name
    assert imported > 50


def test_communication(tmp_path):
    (tmp_path / "strace").write_bytes(lzma.open(DATA / "halo2.user.strace.xz").read())
    trace = import_recording(tmp_path / "strace")
    (tmp_path / "comm").write_bytes(COMM)
    assert annotate(trace, tmp_path / "comm").metadata["comm"]["lines"] == 2
    for data, name in mutations(COMM, 60):
        (tmp_path / "comm").write_bytes(data)
        outcome = attempt(annotate, trace, tmp_path / "comm")
        assert not isinstance(outcome, TraceError) or outcome.line is not None, name
        annotate(trace, tmp_path / "comm", lenient=True)


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_histories(tmp_path, suffix):
    (tmp_path / "strace").write_bytes(STRACE[:20_000])
    path = tmp_path / f"history{suffix}"
    import_recording(tmp_path / "strace", lenient=True).save(path)
    good = path.read_bytes()
    for data, _ in mutations(good, 80):
        path.write_bytes(data)
        outcome = attempt(Trace.load, path)
        assert isinstance(outcome, TraceError) or data == good or suffix
