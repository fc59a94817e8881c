"""Whatever a file holds, a reader gives a trace or a TraceError, soon and in little memory; a lenient one never minds a line.

``IOPROC_FUZZ=n`` makes n mutations of each input instead of a few dozen; ``IOPROC_FUZZ_SEED`` makes other ones.
"""
import contextlib
import json
import lzma
import os
import random
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from ioproc.__main__ import main
from ioproc.trace import (
    EVENT,
    Op,
    Trace,
    TraceError,
    annotate,
    import_recording,
    read_perf,
    read_strace,
    read_tracepoints,
    recognise,
    replay,
)

DATA = Path(__file__).parent / "data"
COUNT = int(os.environ.get("IOPROC_FUZZ", "60"))
SEED = int(os.environ.get("IOPROC_FUZZ_SEED", "20250426"))
SECONDS, BYTES = 30, 400 << 20      # that one input may take on a busy machine, and that all of a test may add


def sample(name, count):
    lines = lzma.open(DATA / name).read().splitlines(keepends=True)
    return b"".join(lines[begin] for begin in range(0, len(lines), max(len(lines) // count, 1)))


STRACE = sample("halo2.user.strace.xz", 300) + b"""\
1 1.000000 mremap(0x7f0000000000, 4096, 8192, 0x3, 0x7f0000200000) = 0x7f0000200000 <0.000001>
1 1.000000 mmap(NULL, 9, 0x1, 0x2, 3</lib/a, (b).so>, 0) = 0x1000 <0.000005>
1 1.000000 clone3({flags=CLONE_VM, exit_signal=0}, 88) = -1 EINVAL (Invalid argument) <0.000005>
"""
PERF = sample("halo2.user.pf.txt.xz", 300) + b"""\
 1/1  1795352599.0: PERF_RECORD_MMAP2 1/1: [0x7f0f1fc17000(0x3000) @ 0x7f0f1fc17000 00:00 0 0]: rw-p //anon
 1/1  1795352599.000000000: PERF_RECORD_MMAP2 1/1: [0x7f0f1fc17000(0x3000) @ 0 00:00 0 0]: r--p /lib
 my prog 1/1 [001] 1795352599.000000000:  1 page-faults:u:  7fe242888028     5646adc24d81
"""
POINTS = lzma.open(DATA / "ways.tracepoints.xz").read()[:40_000].rpartition(b"\n")[0] + b"""
 prog 1/1 [001] 12600.000000:          1 syscalls:sys_enter_brk: brk: 0x00000000
 1/1  12600.000000001:   sched:sched_process_fork: comm=a pid=1 child_comm=a child_pid=7
 1/1  12600.000000002:   syscalls:sys_enter_clone3: uargs: 0x7ffd00000000, size: 0x00000058
 1/1  12600.000000003:   syscalls:sys_exit_clone3: 0x8
 1/1  12600.000000004:   syscalls:sys_enter_openat: dfd: 0xffffff9c, filename: 0x7f5566f5c0b1, flags: 0x00080000, mode: 0x00000000
 1/1  12600.000000005:   syscalls:sys_exit_openat: 0x3
 1/1  12600.000000006:   syscalls:sys_enter_dup2: oldfd: 0x00000003, newfd: 0x00000004
 1/1  12600.000000007:   syscalls:sys_exit_dup2: 0x4
 1/1  12600.000000008:   syscalls:sys_enter_close_range: fd: 0x00000003, max_fd: 0xffffffff, flags: 0x00000000
"""
NORMALISED = b"""\
100 1 1 execve 0 0 0 0
110 1 1 brk 0 9000
120 1 1 mmap 0 200000 3 22 ffffffff 0 7f0000000000
130 1 1 pf 7f0000000010 6 0
140 1 1 pfk 0x7f0000001000 2 0x400000 0
145 1 1 mremap 7f0000000000 200000 400000 1 0 7e0000000000
147 1 1 madvise 7e0000000000 2000 4 0
150 1 1 clone 1200011 0 0 0 0 2
160 2 2 pf 7e0000000000 7 0
170 2 2 munmap 7e0000000000 1000 0
180 2 2 munmap 1 1000 -16
181 2 2 memfd_create 0 0 3
182 2 2 shmat 3 0 0 7d0000000000
183 2 2 mmap 0 200000 3 1 3 0 7c0000000000
184 2 2 vfork 3
186 3 3 execve 1 2 3 0
190 2 2 exit_group 0 0
200 1 1 exit 0 0
""" * 3
COMM = b"""\
1795352565.1,4240,0x1000,16,send
{"time": 1795352566, "tid": 4240, "address": 1, "length": 2, "direction": "recv"}
"""
TEXTS = {"strace": (read_strace, STRACE), "perf": (read_perf, PERF), "tracepoints": (read_tracepoints, POINTS),
         "normalised": (read_tracepoints, NORMALISED)}
PIECES = [b"0", b"-1", b"99999999999999999999999", b"0x", b"NULL", b"(", b")", b"<", b">", b"...", b" = ", b", ", b"\n",
          b"\0", b"\xff\xfe", b"unfinished", b" resumed>", b"+++ ", b"--- ", b"\\", b'"', b":", b" ", b"1/1",
          b"/", b"@", b"[", b"]", b"=", b"{", b"1e999", b" (", b"> (", b"<> (", b" pid=1 comm=", b" child_comm=", b"1.000000"]
BITS = (0, 15, 16, 31, 32, 47, 48, 63, 64, 70)
NUMBERS = [form % (sign * ((1 << bits) + more)) for bits in BITS for more in (-1, 0, 1) for sign in (1, -1)
           for form in (b"%d", b"%x")] + [b"9" * 10_000, b"f" * 10_000, b"0" * 10_000]


def mutations(text, count=COUNT):
    chance = random.Random(SEED)
    yield b"", "nothing"
    for number in range(count):
        data = bytearray(text)
        for _ in range(chance.choice((1, 1, 3, 30))):
            MUTATE[chance.randrange(len(MUTATE))](data, chance)
        yield bytes(data), f"mutation {number} of seed {SEED}"
    for number in range(count // 4):
        yield chance.randbytes(chance.randrange(400)), f"random bytes {number} of seed {SEED}"


def place(data, chance):
    at = chance.randrange(len(data) + 1)
    return at, min(at + chance.choice((0, 1, 4, 40)), len(data))


def scramble(data, chance):
    at, end = place(data, chance)
    data[at:end] = chance.randbytes(end - at)


def delete(data, chance):
    at, end = place(data, chance)
    del data[at:end]


def replace(data, chance):
    at, end = place(data, chance)
    data[at:end] = chance.choice(PIECES)


def repeat(data, chance):
    at, source = place(data, chance)[0], place(data, chance)[0]
    data[at:at] = data[source:source + chance.choice((1, 20, 200))]


def truncate(data, chance):
    if not chance.randrange(4):
        del data[place(data, chance)[0]:]


def renumber(data, chance):
    """Numbers are where limits are."""
    found = list(re.finditer(rb"\d+", data[:4000] if chance.randrange(2) else data))
    if found:
        match = chance.choice(found)
        data[match.start():match.end()] = chance.choice(NUMBERS)


def lines(data, chance):
    """Lines twice, gone, or elsewhere."""
    rows = data.splitlines(keepends=True)
    if rows:
        at, count = chance.randrange(len(rows)), chance.choice((1, 2, 10))
        taken = rows[at:at + count]
        if chance.randrange(2):
            del rows[at:at + count]
        put = chance.randrange(len(rows) + 1)
        rows[put:put] = taken * chance.randrange(3)
        data[:] = b"".join(rows)


def lengthen(data, chance):
    """A line of any length is read in a time that grows with it, not with its square."""
    if not chance.randrange(10):
        at = place(data, chance)[0]
        data[at:at] = chance.choice(PIECES) * chance.choice((100, 100_000))


MUTATE = (scramble, delete, replace, repeat, truncate, renumber, lines, lengthen)


class Hang(BaseException):
    """Not to be taken for anything that a reader handles."""


@contextlib.contextmanager
def soon(name):
    def ring(*_):
        raise Hang(name)
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    except (TraceError, Hang):
        raise
    except Exception as error:
        error.add_note(name)
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < BYTES


def attempt(name, function, *arguments, **options):
    """What it returns, or the TraceError; anything else fails the test."""
    with soon(name):
        try:
            return function(*arguments, **options)
        except TraceError as error:
            return error


@pytest.mark.parametrize("kind", TEXTS)
def test_readers_of_texts(tmp_path, kind):
    read, text = TEXTS[kind]
    path = tmp_path / "text"
    refused = 0
    for data, name in mutations(text):
        path.write_bytes(data)
        outcome = attempt(name, read, path)
        if isinstance(outcome, TraceError):
            refused += 1
            assert outcome.line is None or 1 <= outcome.line <= data.count(b"\n") + 1, name
        outcome = attempt(name, read, path, lenient=True)
        if isinstance(outcome, TraceError):
            assert outcome.line is None or "no end" in outcome.reason, name
        else:
            for trace in outcome if isinstance(outcome, tuple) else [outcome]:
                assert set(trace.events["op"].tolist()) <= set(Op), name
        outcome = attempt(name, recognise, path)
        assert isinstance(outcome, TraceError) or outcome in ("strace", "perf", "tracepoints"), name
    assert refused > COUNT // 3


@pytest.mark.parametrize("kind", TEXTS)
def test_long_lines_take_no_longer_than_they_are(tmp_path, kind):
    """No pattern may look at a part of a line once for each of its other parts."""
    read, text = TEXTS[kind]
    chance = random.Random(SEED)
    rows = text.splitlines()
    rows = rows[-12:] + chance.sample(rows, min(COUNT // 15, len(rows)))
    for row in rows:
        long = []
        for piece in PIECES + [b"0x1, ", b"1 ", b"a", b"1", b"PERF_RECORD_LOST", b"1/1 1.000000: "]:
            if piece != b"\n":
                at = chance.randrange(len(row) + 1)
                long.append(row[:at] + piece * (50_000 // len(piece)) + row[at:] + b"\n")
        (tmp_path / "text").write_bytes(b"".join(long))
        attempt(row, read, tmp_path / "text", lenient=True)
        attempt(row, recognise, tmp_path / "text")


@pytest.mark.parametrize("kind", TEXTS)
def test_whole_imports(tmp_path, kind):
    """What could be read can be imported, kept, loaded and replayed."""
    (tmp_path / "good").write_bytes(PERF if kind == "strace" else STRACE)
    imported = 0
    for data, name in mutations(TEXTS[kind][1]):
        (tmp_path / "text").write_bytes(data)
        texts = {"tracepoints" if kind == "normalised" else kind: tmp_path / "text"}
        if kind in ("strace", "perf"):
            texts["perf" if kind == "strace" else "strace"] = tmp_path / "good"
        trace = attempt(name, import_recording, **texts, lenient=True)
        if isinstance(trace, TraceError):
            assert trace.line is None or "no end" in trace.reason, name
            continue
        imported += 1
        trace.save(tmp_path / "history")
        assert len(Trace.load(tmp_path / "history")) == len(trace), name
        play(trace, name)
    assert imported > COUNT // 3


def play(trace, name):
    with soon(name), contextlib.suppress(MemoryError):
        assert replay(trace, placement="mm", frames=1 << 12).events == len(trace), name


def test_communication(tmp_path):
    (tmp_path / "strace").write_bytes(lzma.open(DATA / "halo2.user.strace.xz").read())
    trace = import_recording(tmp_path / "strace")
    (tmp_path / "comm").write_bytes(COMM)
    assert annotate(trace, tmp_path / "comm").metadata["comm"]["lines"] == 2
    for data, name in mutations(COMM):
        (tmp_path / "comm").write_bytes(data)
        outcome = attempt(name, annotate, trace, tmp_path / "comm")
        assert not isinstance(outcome, TraceError) or outcome.line is not None, name
        outcome = attempt(name, annotate, trace, tmp_path / "comm", lenient=True)
        assert not isinstance(outcome, TraceError) or "no end" in outcome.reason, name


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_histories(tmp_path, suffix):
    if suffix == ".zst":
        pytest.importorskip("zstandard")
    (tmp_path / "strace").write_bytes(STRACE[:20_000])
    path = tmp_path / f"history{suffix}"
    import_recording(tmp_path / "strace", lenient=True).save(path)
    good = path.read_bytes()
    for data, name in mutations(good):
        path.write_bytes(data)
        outcome = attempt(name, Trace.load, path)
        assert isinstance(outcome, TraceError) or data == good or suffix, name


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_compressed_texts(tmp_path, suffix):
    """Damage that a decompressor notices, or does not."""
    if suffix == ".zst":
        pytest.importorskip("zstandard")
    path = tmp_path / f"text{suffix}"
    Trace(np.zeros(0, EVENT)).save(path)     # for its opener
    from ioproc.trace.source import open_output
    with open_output(path) as out:
        out.write(NORMALISED)
    for data, name in mutations(path.read_bytes()):
        path.write_bytes(data)
        attempt(name, read_tracepoints, path, lenient=True)


def test_histories_with_right_checksums_and_wrong_contents(tmp_path):
    """Anybody can write a file that is sound and makes no sense."""
    chance = np.random.default_rng(SEED)
    (tmp_path / "text").write_bytes(NORMALISED)
    good = import_recording(tracepoints=tmp_path / "text")
    odd = [-1, 1 << 70, 1e300, float("nan"), None, "x", [], {}, True, "\ud800", [[[]]]]
    refused = 0
    for number in range(COUNT):
        name = f"history {number} of seed {SEED}"
        events = good.events.copy()
        for _ in range(chance.integers(1, 6)):
            field = chance.choice(EVENT.names)
            kind = EVENT[field]
            bits = int(chance.integers(1, 8 * kind.itemsize + 1))
            value = int.from_bytes(chance.bytes(8), "little") >> (64 - bits)
            events[field][chance.integers(len(events))] = np.uint64(value).astype(kind)
        if chance.integers(2):
            events["t"].sort()
        metadata = json.loads(json.dumps(good.metadata))
        if chance.integers(2):
            where = chance.choice(["files", "untraced_s", "epoch_ns", "import", "command", "character", "size", "path", "kind"])
            value = odd[chance.integers(len(odd))]
            if where in ("size", "path", "kind"):
                metadata["files"][0][where] = value
            else:
                metadata[where] = value
        try:
            Trace(events, metadata).save(tmp_path / "history")
        except (ValueError, UnicodeEncodeError):    # not to be written as JSON
            continue
        trace = attempt(name, Trace.load, tmp_path / "history")
        if isinstance(trace, TraceError):
            refused += 1
            continue
        with soon(name):
            assert main(["info", str(tmp_path / "history")]) == main(["info", "--json", str(tmp_path / "history")]) == 0, name
        play(trace, name)
    assert refused
