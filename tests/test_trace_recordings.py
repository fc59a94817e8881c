"""Real recordings: what they hold, and how little of it had to be inferred."""
from pathlib import Path

import pytest

import ioproc.histories
from ioproc.trace import Op, Trace, import_recording

DATA = Path(__file__).parent / "data"
SHIPPED = sorted(Path(list(ioproc.histories.__path__)[0]).glob("*.ioproc.xz"))


@pytest.fixture(scope="module", params=["halo2", "lammps"])
def recording(request):
    return request.param, import_recording(DATA / f"{request.param}.user.strace.xz",
                                           DATA / f"{request.param}.user.pf.txt.xz")


def test_every_line_is_used(recording):
    name, trace = recording
    counts = trace.metadata["import"]
    lines = {"halo2": (2289, 35740), "lammps": (3502, 15010)}[name]
    assert (counts["strace"]["lines"], counts["perf"]["lines"]) == lines
    assert counts["strace"]["skipped_lines"] == counts["perf"]["skipped_lines"] == counts["strace"]["cut_short"] == 0
    faults = trace.summary()["operations"]["fault"]
    assert faults + counts["excluded_faults"] + counts["faults_before_start"] == lines[1]


def test_the_processes_are_mpirun_and_two_ranks(recording):
    _, trace = recording
    summary = trace.summary()
    assert (summary["processes"], summary["threads"]) == (3, 10)
    assert {name: summary["operations"][name] for name in ("fork", "exec", "exit", "shmat")} == {
        "fork": 2, "exec": 3, "exit": 3, "shmat": 3}
    assert trace.metadata["import"]["excluded_processes"] == 3     # perf and strace themselves


def test_every_fault_is_explained(recording):
    _, trace = recording
    counts = trace.metadata["import"]
    assert counts["unmapped"] == counts["repeated"] == counts["races"] == counts["not_accessible"] == 0
    assert counts["write_notified"] == 2


def test_less_than_one_percent_is_inferred_apart_from_access(recording):
    _, trace = recording
    inferred = trace.summary()["inferred"]
    assert inferred["events"] == 15
    assert inferred["events"] + inferred["file"] + inferred["size"] < 0.01 * len(trace)


def test_events_are_in_time_order(recording):
    _, trace = recording
    assert (trace.events["t"][1:] >= trace.events["t"][:-1]).all()


def test_the_shipped_histories_are_small_and_one_is_long():
    assert len(SHIPPED) == 3
    assert sum(path.stat().st_size for path in SHIPPED) < 1_000_000
    assert max(len(Trace.load(path)) for path in SHIPPED) >= 100_000
    assert {Trace.load(path).metadata["character"] for path in SHIPPED} == {"static", "allocation-heavy", "forking"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_history_says_where_it_comes_from_and_needs_no_excuse(path):
    trace = Trace.load(path)
    for name in ("command", "host", "kernel", "allocator", "untraced_s", "recorded"):
        assert name in trace.metadata
    assert trace.metadata["untraced_s"] > 0
    counts = trace.metadata["import"]
    assert counts["unmapped"] == counts["repeated"] == counts["perf"]["lost"] == 0
    assert trace.events["op"][0] == Op.EXEC
