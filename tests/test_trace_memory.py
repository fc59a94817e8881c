"""Importing, loading and saving take memory for what is mapped, not for how long it went on."""
import tracemalloc

import pytest

from ioproc.trace import Trace, format, import_recording, perf, tracepoints


def write_points(directory, rounds):
    """One process that maps a page, touches it and unmaps it, over and over."""
    with open(directory / "points", "w") as out:
        out.write(" 1/1  1.000000000: PERF_RECORD_COMM exec: prog:1/1\n")
        for number in range(rounds):
            second, micro = divmod(2_000_000 + 100 * number, 1_000_000)
            for after, event in (
                    (0, "syscalls:sys_enter_mmap: a: 0x0, b: 0x1000, c: 0x3, d: 0x22, e: 0xffffffff, f: 0x0"),
                    (10, "syscalls:sys_exit_mmap: 0x7f0000000000"),
                    (20, "exceptions:page_fault_user: address=0x7f0000000000 ip=0x1000 error_code=0x4"),
                    (21, "exceptions:page_fault_user: address=0x7f0000000000 ip=0x1000 error_code=0x7"),
                    (50, "syscalls:sys_enter_munmap: a: 0x7f0000000000, b: 0x1000"), (60, "syscalls:sys_exit_munmap: 0x0")):
                out.write(f" 1/1  {second}.{micro + after:06d}000:  {event}\n")
    return {"tracepoints": directory / "points"}


def write_recording(directory, rounds):
    """The same, by strace and perf."""
    with open(directory / "strace", "w") as calls, open(directory / "perf", "w") as faults:
        calls.write('1 1.000000 execve("/bin/prog", ["prog"], 0x7ff) = 0 <0.000010>\n')
        for number in range(rounds):
            second, micro = divmod(2_000_000 + 100 * number, 1_000_000)
            calls.write(f"1 {second}.{micro:06d} mmap(NULL, 4096, 0x3, 0x22, -1, 0) = 0x7f0000000000 <0.000010>\n"
                        f"1 {second}.{micro + 50:06d} munmap(0x7f0000000000, 4096) = 0 <0.000010>\n")
            for fault in range(2):
                faults.write(f" 1/1  {second}.{micro + 20 + fault:06d}000:  7f0000000000  1000\n")
    return {"strace": directory / "strace", "perf": directory / "perf"}


def peak(function, *arguments, **options):
    tracemalloc.start()
    try:
        result = function(*arguments, **options)
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module", params=[(write_recording, 3_000, 12_000), (write_points, 6_000, 9_000)],
                ids=["strace and perf", "tracepoints"])
def measured(request, tmp_path_factory):
    """Peaks of a history that fills every buffer, and of a much longer one."""
    peaks = []
    write, *lengths = request.param
    patch = pytest.MonkeyPatch()
    patch.setattr(format, "BLOCK", 1 << 10)
    patch.setattr(perf, "WINDOW", 1 << 10)
    patch.setattr(tracepoints, "WINDOW", 1 << 10)
    for rounds in lengths:
        directory = tmp_path_factory.mktemp("long")
        imported, trace = peak(import_recording, **write(directory, rounds))
        saved, _ = peak(trace.save, directory / "history.gz")
        loaded, again = peak(Trace.load, directory / "history.gz")
        assert len(again) == len(trace) == 4 * rounds + 1
        assert trace.summary()["faults"] == {"unknown": 0, "read": rounds, "write": rounds, "kernel": 0}
        peaks.append({"import": imported, "save": saved, "load": loaded})
    patch.undo()
    return peaks


@pytest.mark.parametrize("step", ["import", "save", "load"])
def test_a_longer_history_takes_no_more_memory(measured, step):
    short, long = measured
    # The longer one has 0.8 MB of events more at least, and many times that as Python objects.
    assert long[step] - short[step] < 250_000
