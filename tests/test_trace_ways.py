"""One run recorded in both ways at once: strace with perf's page faults of user mode, and perf's tracepoints.

What may differ is what only the second way tells: the kernel's own faults, and whether a fault wrote.
"""
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ioproc.trace import Access, Op, Origin, Trace, import_recording, replay
from ioproc.trace.record import tracepoints
from ioproc.trace.source import lines

DATA = Path(__file__).parent / "data"
KERNEL = 1
# Of the committed recording: guesses that were wrong; faults by kind in both ways, and the kernel's.  mlock finds four
# pages that the kernel wrote first: the strace way knows nothing of them, so that they are made then.
WRONG = 10
COUNTED = ({"zero": 12, "anon": 203, "file": 105, "reuse": 28, "cow": 32, "swap": 0},
           {"zero": 21, "anon": 199, "file": 107, "reuse": 36, "cow": 38, "swap": 0}, 21)
IN_PRIVATE = ["unshare", "--mount", "sh", "-c", 'mount -t tracefs nodev /sys/kernel/tracing && exec "$@"', "sh"]
STRACE = ["strace", "-f", "-y", "--seccomp-bpf", "-ttt", "-T", "-X", "raw", "-e", "trace=memory,process", "-o", "strace", "--"]
FAULTS = ["perf", "record", "-q", "-e", "page-faults:u", "-c", "1", "-d", "-k", "CLOCK_REALTIME", "-m", "512", "-o", "f", "--"]
POINTS = ["perf", "record", "-q", "-c", "1", "-d", "-k", "CLOCK_MONOTONIC", "-m", "512", "-o", "t"]
SCRIPT = ["perf", "script", "--ns", "--show-mmap-events", "--show-lost-events"]


def traced(pids, path):
    """The lines of these processes, of the first one only after it has executed the program."""
    begun = False
    for _, line in lines(path):
        pid = re.match(r"\s*(-?\d+)/", line)
        if line.startswith("# reference time"):
            yield line
        elif pid and int(pid[1]) in pids:
            begun = begun or (int(pid[1]) == pids[0] and "COMM exec" in line)
            if begun:
                yield line


def both(directory, command):
    """Record `command` in both ways at once; returns the three texts' paths."""
    if shutil.which("perf") is None or shutil.which("strace") is None:
        pytest.skip("perf or strace is not installed")
    private = []
    try:
        events = tracepoints()
    except Exception:
        private = IN_PRIVATE
        ask = "from ioproc.trace.record import tracepoints; print(*tracepoints())"
        answer = subprocess.run([*private, os.sys.executable, "-P", "-c", ask], capture_output=True, text=True, check=False,
                                env=os.environ | {"PYTHONPATH": os.pathsep.join(os.sys.path)})
        if answer.returncode:
            pytest.skip("tracepoints may not be read here")
        events = answer.stdout.split()
    points = [option for event in events for option in ("-e", event)]
    run = subprocess.run([*private, *POINTS, *points, "--", *FAULTS, *STRACE, *command], cwd=directory, capture_output=True,
                         text=True, check=False)
    if run.returncode or not (directory / "strace").exists():
        pytest.skip(f"perf or strace may not trace here: {run.stderr.strip()[-200:]}")
    for name, data, options in (("all", "t", ["--header", "-F", "trace:pid,tid,time,event,trace", "--show-task-events"]),
                                ("perf", "f", ["-F", "pid,tid,time,addr,ip"])):
        with open(directory / name, "wb") as out:
            subprocess.run([*SCRIPT, *options, "-i", data], stdout=out, stderr=subprocess.DEVNULL, check=True, cwd=directory)
    pids = list(dict.fromkeys(int(line.split()[0]) for _, line in lines(directory / "strace")))
    (directory / "tracepoints").write_text("".join(f"{line}\n" for line in traced(pids, directory / "all")))
    return directory / "strace", directory / "perf", directory / "tracepoints"


@pytest.fixture(scope="module", params=["committed", "recorded now"])
def ways(request, tmp_path_factory):
    if request.param == "committed":
        strace, perf, points = (DATA / f"ways.{name}.xz" for name in ("strace", "perf", "tracepoints"))
    else:
        if shutil.which("gcc") is None:
            pytest.skip("gcc is not installed")
        directory = tmp_path_factory.mktemp("ways")
        subprocess.run(["gcc", "-O1", "-pthread", "-w", "-o", directory / "ways", DATA / "ways.c"], check=True)
        strace, perf, points = both(directory, [directory / "ways", "/bin/true"])
    return request.param, import_recording(strace, perf), import_recording(tracepoints=points)


def without_kernel(trace):
    events = trace.events[(trace.events["op"] != Op.FAULT) | (trace.events["flags"] != KERNEL)]
    return Trace(events, trace.metadata)


def told(trace):
    """What each thread did, in order: all that the recording tells but time and access."""
    names = [file["path"] for file in trace.metadata["files"]]
    threads = {}
    for event in trace:
        row = tuple(int(event[name]) for name in ("op", "errno", "prot", "flags", "addr", "length", "arg", "ret"))
        file = names[event["file"]] if event["file"] >= 0 else None
        threads.setdefault((int(event["pid"]), int(event["tid"])), []).append((Op(event["op"]).name, *row[1:], file))
    return threads


def counted(trace):
    """All that a replay counts, with a device on every address space."""
    result = replay(trace, placement="mm")
    return {name: getattr(result, name) for name in (
        "events", "operations", "differences", "callbacks", "faults", "guessed", "vmas_peak",
        "address_spaces", "chain_nodes")}


def test_both_ways_tell_the_same(ways):
    _, strace, root = ways
    assert told(strace) == told(without_kernel(root))
    assert strace.summary()["threads"] == root.summary()["threads"]


def test_nothing_in_it_is_inferred_but_access_and_nothing_at_all_from_tracepoints(ways):
    _, strace, root = ways
    faults = strace.summary()["operations"]["fault"]
    assert strace.inferred() == {"events": 0, "access": faults, "file": 0, "size": 0}
    assert root.inferred() == {"events": 0, "access": 0, "file": 0, "size": 0}


def test_every_fault_is_explained(ways):
    for trace in ways[1:]:
        counts = trace.metadata["import"]
        assert not any(counts[name] for name in ("unmapped", "repeated", "races", "not_accessible", "write_notified",
                                                 "faults_before_start" if trace is ways[2] else "unmapped"))


def by_thread(trace):
    """Indices of the events, thread by thread: how threads interleave is for each clock to say."""
    return np.lexsort((trace.events["tid"], trace.events["pid"]))


def test_both_ways_replay_to_the_same_counts(ways):
    """With the accesses that the tracepoints tell, and without the kernel's faults, which they alone tell."""
    _, strace, root = ways
    root = without_kernel(root)
    events = strace.events.copy()
    events["access"][by_thread(strace)] = root.events["access"][by_thread(root)]
    one, other = counted(Trace(events, strace.metadata)), counted(root)
    assert one == other
    assert not one["differences"]


def test_accesses_differ_only_where_a_page_was_only_read(ways):
    which, strace, root = ways
    root = without_kernel(root)
    guessed, known = strace.events[by_thread(strace)], root.events[by_thread(root)]
    wrong = guessed["access"] != known["access"]
    assert (guessed["origin"][wrong] == Origin.ACCESS).all()
    assert (guessed["access"][wrong] == Access.WRITE).all()
    assert (known["access"][wrong] == Access.READ).all()
    if which == "committed":
        assert wrong.sum() == WRONG


def test_replayed_as_they_are_they_differ_by_what_only_root_is_told(ways):
    which, strace, root = ways
    kernel = len(root) - len(without_kernel(root))
    assert kernel
    one, other = counted(strace), counted(root)
    assert other["operations"] == one["operations"] | {"fault": one["operations"]["fault"] + kernel}
    assert sum(other["faults"].values()) == sum(one["faults"].values()) + kernel
    assert other["callbacks"]["update_page"] == one["callbacks"]["update_page"] + kernel
    assert other["differences"] == one["differences"]
    if which == "committed":
        assert (one["faults"], other["faults"], kernel) == COUNTED


@pytest.mark.parametrize(("without", "costs"), [
    ("task:", {}),
    ("sched_process_exec", {}),
    ("sched_process_exit", {}),
    ("PERF_RECORD_(COMM|FORK|EXIT)", {}),
    ("sched_process_exit|PERF_RECORD_(COMM|FORK|EXIT)", {}),
    ("PERF_RECORD_MMAP", {"events": 10, "size": 1}),
    ("sched|task:|PERF_RECORD", {"events": 11, "file": 2, "size": 1}),
])
def test_little_is_lost_with_what_a_recording_may_leave_out(tmp_path, without, costs):
    """One thing tells what the other does; only with next to nothing is a fault left that nothing explains."""
    kept = [line for _, line in lines(DATA / "ways.tracepoints.xz") if not re.search(without, line)]
    (tmp_path / "points").write_text("\n".join(kept))
    trace = import_recording(tracepoints=tmp_path / "points")
    assert {kind: count for kind, count in trace.inferred().items() if count} == costs
    whole = counted(import_recording(tracepoints=DATA / "ways.tracepoints.xz"))
    result = counted(trace)
    if costs:
        assert {name: result["operations"][name] for name in ("fork", "vfork", "exec", "exit", "mmap", "munmap")} == {
            name: whole["operations"][name] for name in ("fork", "vfork", "exec", "exit", "mmap", "munmap")}
        assert sum(result["differences"].get("fault", {}).values()) <= 2
    else:
        assert result == whole
