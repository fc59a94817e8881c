"""Importing, loading and saving take memory for what is mapped, not for how long it went on."""
import tracemalloc

import pytest

from ioproc.trace import Trace, format, import_recording, perf


def write_recording(directory, rounds):
    """One process that maps a page, touches it and unmaps it, over and over."""
    with open(directory / "strace", "w") as calls, open(directory / "perf", "w") as faults:
        calls.write('1 1.000000 execve("/bin/prog", ["prog"], 0x7ff) = 0 <0.000010>\n')
        for number in range(rounds):
            second, micro = divmod(2_000_000 + 100 * number, 1_000_000)
            calls.write(f"1 {second}.{micro:06d} mmap(NULL, 4096, 0x3, 0x22, -1, 0) = 0x7f0000000000 <0.000010>\n"
                        f"1 {second}.{micro + 50:06d} munmap(0x7f0000000000, 4096) = 0 <0.000010>\n")
            for fault in range(2):
                faults.write(f" 1/1  {second}.{micro + 20 + fault:06d}000:  7f0000000000  1000\n")


def peak(function, *arguments):
    tracemalloc.start()
    try:
        result = function(*arguments)
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Peaks of a history that fills every buffer, and of one four times as long."""
    peaks = []
    patch = pytest.MonkeyPatch()
    patch.setattr(format, "BLOCK", 1 << 10)
    patch.setattr(perf, "WINDOW", 1 << 10)
    for rounds in (3_000, 12_000):
        directory = tmp_path_factory.mktemp("long")
        write_recording(directory, rounds)
        imported, trace = peak(import_recording, directory / "strace", directory / "perf")
        saved, _ = peak(trace.save, directory / "history.gz")
        loaded, again = peak(Trace.load, directory / "history.gz")
        assert len(again) == len(trace) == 4 * rounds + 1
        assert trace.metadata["import"]["proved_reads"] == rounds
        peaks.append({"import": imported, "save": saved, "load": loaded})
    patch.undo()
    return peaks


@pytest.mark.parametrize("step", ["import", "save", "load"])
def test_four_times_the_length_takes_no_more_memory(measured, step):
    short, long = measured
    # The longer one has 2.3 MB of events more, and many times that as Python objects.
    assert long[step] - short[step] < 250_000
