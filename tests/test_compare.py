"""Comparing designs: what the table says, that it is what the replays counted, and that no unsafe design is ever first."""
import csv
import dataclasses
import gc
import io
import json
import math
import os
import pty
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import ioproc
from history import BASE, PAGE, WRITE, History
from ioproc import DESIGNS, Cost, Nic, workload
from ioproc import compare as compare_
from ioproc.cost import COMPONENTS
from ioproc.trace import replay

compare = sys.modules["ioproc.compare"]
SAFE = ("mm+fault", "vma+fault", "interval+fault", "mm+preload", "vma+preload", "mm+preload-registered", "vma+preload-registered",
        "interval+preload-registered", "pin", "mm+pin-cache+hooks", "vma+pin-cache+hooks", "interval+pin-cache+hooks", "bounce")
NIC = {"entries": 64, "ways": 4}
FREE = Cost.of("modern,register_ns=0,register_page_ns=0,deregister_page_ns=0,regcache_ns=0,cache_hit_ns=0,walk_ns=0,load_ns=0,"
               "nic_fault_ns=0")


@pytest.fixture(scope="module")
def churn():
    return workload.malloc_churn("mmap", allocations=300, live=16, messages=600, object_largest=1 << 16)


@pytest.fixture(scope="module")
def fork():
    return workload.checkpoint(memory=1 << 20, buffers=4, messages=600)


@pytest.fixture(scope="module")
def compared(churn):
    return compare_(churn, nic=NIC)


# ---- what a row says

def test_one_row_for_each_design_in_the_order_asked_for(compared, churn):
    assert [row.design for row in compared] == list(DESIGNS)
    some = compare_(churn, ["pin", "bounce", "mm+fault"])
    assert [row.design for row in some] == ["pin", "bounce", "mm+fault"]
    assert len(some) == 3
    assert some[1] is some["bounce"] is list(some)[1]
    with pytest.raises(KeyError):
        some["vma+fault"]
    with pytest.raises(IndexError):
        some[3]


def test_the_counts_are_those_of_a_replay(compared, churn):
    nothing = replay(churn)
    for row in compared:
        with Nic(**NIC) as nic:
            result = replay(churn, nic=nic, attach=DESIGNS[row.design])
        assert row.stats == result.device
        assert row.attach == DESIGNS[row.design]
        assert row.vmas_added == result.vmas_peak - nothing.vmas_peak
        assert row.disagreement == result.disagreement == 0
        assert min(row.violations, 64) <= len(row.first_violations) <= row.violations
    assert compared["mm+fault"].vmas_added == 0 < compared["vma+fault"].vmas_added


def test_shares(compared):
    for row in compared:
        assert row.violations == row.stats["violations"]
        for share, part, whole in (("useful_share", "useful", "callbacks"), ("hit_share", "hits", "lookups")):
            if row.stats[whole]:
                assert getattr(row, share) == row.stats[part] / row.stats[whole]
            else:
                assert math.isnan(getattr(row, share))
    assert math.isnan(compared["bounce"].useful_share)
    assert 0 < compared["mm+fault"].useful_share < compared["vma+fault"].useful_share <= 1


def test_modelled_time_is_counts_times_parameters(compared, churn):
    dear = Cost.of("modern,nic_fault_ns=1e6")
    again = compare_(churn, nic=NIC, cost=dear)
    assert (compared.cost.name, again.cost) == ("modern", dear)
    for row, other in zip(compared, again, strict=True):
        assert row.modelled == Cost.of("modern").model(row.stats)
        assert row.modelled_ns == pytest.approx(sum(row.modelled[component] for component in COMPONENTS))
        assert other.modelled["NIC faults"] - row.modelled["NIC faults"] == pytest.approx(row.stats["faults"] * (1e6 - 10_500))


def test_measured_time_is_beyond_that_of_no_device(churn, monkeypatch):
    spent = iter([100, 107, 130, 1000, 1001, 1040, 50, 59, 90, 60])

    def replay_(*arguments, **options):
        return dataclasses.replace(replay(*arguments, **options), cpu_seconds=next(spent) / 1e9)
    monkeypatch.setattr(compare, "replay", replay_)
    rows = compare_(churn, ["mm+fault", "bounce"], turns=3)
    assert [row.measured_ns for row in rows] == pytest.approx([9, 40])
    assert [row.noise_ns for row in rows] == pytest.approx([30, 30])
    lines = {line.split()[1]: line for line in str(rows).split("modelled time")[0].splitlines() if line[:1].isdigit()}
    assert lines["mm+fault"].endswith(" < 30 ns")
    assert lines["bounce"].endswith("  40 ns")


def test_measured_time_is_real(churn):
    for row in compare_(churn, ["pin", "bounce"], turns=3):
        assert 0 <= row.measured_ns < 1e9 > row.noise_ns >= 0


def test_as_an_array(compared):
    array = compared.to_numpy()
    assert array.shape == (len(DESIGNS),)
    assert array["design"].tolist() == list(DESIGNS)
    for name in ("callbacks", "useful", "invalidations", "faults", "hits", "registrations", "pinned_peak", "violations"):
        assert array.dtype[name] == "<i8"
        assert array[name].tolist() == [row.stats[name] for row in compared]
    assert array["safe"].tolist() == [row.violations == 0 for row in compared]
    assert array["modelled_ns"].tolist() == [row.modelled_ns for row in compared]
    assert array["NIC_faults_ns"].tolist() == [row.modelled["NIC faults"] for row in compared]
    assert array["vmas_added"].tolist() == [row.vmas_added for row in compared]
    assert np.isfinite(array["measured_ns"]).all()
    assert set(Nic().stats) < set(array.dtype.names)


def test_as_a_table(compared):
    text = str(compared)
    assert max(map(len, text.splitlines())) <= 150
    header = next(line for line in text.splitlines() if "callbacks" in line)
    for title in ("useful", "inval.", "NIC faults", "hits", "regs", "pinned peak", "violations", "VMAs", "modelled", "measured"):
        assert header.count(title) == 1
    lines = [line for line in text.splitlines() if "mm+fault " in line]
    assert len(lines) == 2                          # counts; time by component
    assert f" {compared['mm+fault'].stats['callbacks']:,} " in lines[0]
    assert "NIC: entries=64, ways=4; modelled for: modern" in text
    assert "600 transfers" in text
    assert repr(compared).startswith(f"<Comparison of {len(DESIGNS)} designs: ioproc.workload.malloc_churn(")


# ---- safety

def test_what_is_safe_and_what_is_not(compared, fork):
    forked = compare_(fork, nic=NIC)
    for row in (*compared, *forked):
        if row.design in SAFE:
            assert (row.violations, row.safe) == (0, True), row.design
    assert not compared["pin-cache"].safe           # munmap and mmap at the same address
    assert not forked["pin-cache"].safe             # fork and write
    assert not forked["mm+fault/posted"].safe


def test_an_unsafe_design_is_never_first_and_says_so(churn):
    comparison = compare_(churn, ["mm+fault", "pin-cache", "bounce"], cost=FREE)
    cheapest = min(comparison, key=lambda row: row.modelled_ns)
    assert (cheapest.design, cheapest.modelled_ns) == ("pin-cache", 0)
    assert [row.design for row in comparison.ranked()][-1] == "pin-cache"
    assert [row.safe for row in comparison.ranked()] == [True, True, False]
    lines = [line.split()[:2] for line in str(comparison).splitlines() if line.startswith(("1 ", "2 ", "3 ", "UNSAFE"))]
    assert lines[2] == lines[5] == ["UNSAFE", "pin-cache"]


def test_who_was_only_lucky_comes_after_who_is_safe():
    """Nothing is unmapped here, and nobody forks."""
    still = History().mmap(0, 64).faults(0, 64).comm(0, 64).trace()
    comparison = compare_(still, ["mm+fault", "pin-cache", "mm+fault/posted", "pin", "pin-cache/precopy"], cost=FREE)
    assert all(row.safe for row in comparison)
    assert [row.sound for row in comparison.ranked()] == [True, True, False, False, False]
    assert comparison["mm+fault"].sound and comparison["pin"].sound
    assert str(comparison).count("\nsafe here  ") == 6 and "\nsafe here: no violation on this history" in str(comparison)


def test_the_safe_are_ranked_by_modelled_cost(compared):
    safe = [row.modelled_ns for row in compared.ranked() if row.safe and row.sound]
    unsafe = [row.modelled_ns for row in compared.ranked() if not row.safe]
    assert len(safe) >= 13 and unsafe
    assert safe == sorted(safe) and unsafe == sorted(unsafe)
    assert sorted(compared.ranked(), key=id) == sorted(compared, key=id)


def test_a_design_that_runs_out_of_memory(churn, monkeypatch):
    def replay_(trace, nic=None, attach=None, **memory):
        if attach == DESIGNS["pin-cache"]:
            raise MemoryError("replay stopped in event 7: out of frames")
        return replay(trace, nic=nic, attach=attach, **memory)
    monkeypatch.setattr(compare, "replay", replay_)
    comparison = compare_(churn, ["pin-cache", "pin"], turns=2)
    row = comparison["pin-cache"]
    assert (row.failed, row.safe, row.violations) == ("replay stopped in event 7: out of frames", False, 0)
    assert comparison.ranked() == [comparison["pin"], row]
    assert "\npin-cache: replay stopped in event 7: out of frames\n" in str(comparison)
    assert all(math.isnan(comparison.to_numpy()[field][0]) for field in ("modelled_ns", "registration_ns", "measured_ns"))


def test_a_nic_that_does_not_fit():
    """Its bounce buffer alone is larger than the memory."""
    trace = workload.pressure(memory=1 << 20, buffers=4, messages=50)
    comparison = compare_(trace, ["bounce", "pin"], turns=3)
    gc.collect()
    assert "out of frames" in comparison["bounce"].failed
    assert comparison["pin"].safe


def test_without_a_device_it_has_to_fit(churn):
    with pytest.raises(MemoryError, match="event"):
        compare_(churn, ["pin"], frames=64)


# ---- what it is asked

def test_a_workload_by_its_name():
    comparison = compare_("static:arrays=3,messages=5", ["pin"])
    assert comparison.trace.metadata["workload"]["arrays"] == 3
    assert comparison["pin"].stats["transfers"] == 5


def test_memory_pressure_as_the_history_asks_for_it():
    trace = workload.pressure(memory=4 << 20, buffers=4, messages=300, passes=2)
    pressed = compare_(trace, ["mm+fault", "bounce"])
    assert pressed["mm+fault"].stats["invalidations"] > 200         # swapped out
    enough = compare_(trace, ["mm+fault"], frames=10_000, swap_slots=0)
    assert enough["mm+fault"].stats["invalidations"] == 0
    assert all(row.safe for row in pressed)


@pytest.mark.parametrize("value", [0, -1, "many", 1.5, None, 1 << 60])
def test_what_metadata_may_not_ask_for(value):
    trace = History().mmap(0, 1).fault(0).comm(0, 1).trace()
    trace.metadata |= {"frames": value, "swap_slots": value}
    assert compare_(trace, ["pin"])["pin"].stats["transfers"] == 1


@pytest.mark.parametrize(("of", "name", "attach"), [
    ("mm+fault", "mm+fault", {"placement": "mm", "translation": "fault"}),
    ("mm+fault/posted", "mm+fault/posted", {"placement": "mm", "translation": "fault", "fork": "posted"}),
    ("vma+fault/inherit", "vma+fault/inherit", {"placement": "vma", "translation": "fault", "fork": "inherit"}),
    ("mm+fault:prefault=16", "mm+fault:prefault=16", {"placement": "mm", "translation": "fault", "prefault": 16}),
    ("pin-cache/precopy:max_regions=4:max_bytes=None", "pin-cache/precopy:max_regions=4:max_bytes=None",
     {"placement": "none", "translation": "pin-cache", "fork": "precopy", "max_regions": 4, "max_bytes": None}),
    ({}, "mm+fault", {}),
    ({"placement": "none", "translation": "pin", "bounce_bytes": 1}, "pin:bounce_bytes=1",
     {"placement": "none", "translation": "pin", "bounce_bytes": 1}),
    ({"placement": "vma", "fork": "posted"}, "vma+fault/posted", {"placement": "vma", "fork": "posted"}),
    ({"translation": "preload", "name": "mine"}, "mine", {"translation": "preload"}),
])
def test_a_design(of, name, attach):
    assert compare.design(of) == (name, attach)


def test_a_design_with_arguments(churn):
    comparison = compare_(churn, ["mm+fault", "mm+fault:prefault=8"])
    assert comparison[0].stats["faults"] > comparison[1].stats["faults"] > 0
    assert comparison[1].stats["prefaulted"] > 0


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"designs": ["fault"]}, ValueError, "design 'fault': not one of mm\\+fault, "),
    ({"designs": ["mm+fault/never"]}, ValueError, "fork = 'never'"), ({"designs": []}, ValueError, "designs: there are none"),
    ({"designs": ["mm+fault:prefault"]}, ValueError, "'prefault': not NAME=VALUE"),
    ({"designs": ["mm+fault:pages=1"]}, ValueError, "design 'mm\\+fault:pages=1': .*'pages'"),
    ({"designs": ["mm+fault:prefault=0"]}, ValueError, "prefault = 0"),
    ({"designs": ["pin", "pin"]}, ValueError, "designs: 'pin' is there twice"),
    ({"designs": [7]}, TypeError, "design 7: neither a name nor a dict"),
    ({"designs": [{"placement": "mm", "translation": "pin"}]}, ValueError, "placement = 'mm' with translation = 'pin'"),
    ({"nic": {"entries": 0}}, ValueError, "entries = 0"), ({"nic": {"size": 1}}, ValueError, "nic: .*'size'"),
    ({"nic": "entries=1"}, TypeError, "nic = 'entries=1'"), ({"nic": {"entries": "x"}}, (TypeError, ValueError), "entries|nic"),
    ({"cost": "cheap"}, ValueError, "cheap"),
    ({"turns": 0}, ValueError, "turns = 0"), ({"turns": "x"}, ValueError, "turns = 'x'"),
    ({"trace_or_workload": 5}, TypeError, "trace_or_workload = 5"),
    ({"trace_or_workload": "churn"}, ValueError, "'churn': neither a workload"),
])
def test_bad_arguments(arguments, error, message, churn, monkeypatch):
    monkeypatch.setattr(compare, "replay", lambda *arguments, **options: pytest.fail("replayed before the check"))
    with pytest.raises(error, match=message):
        compare_(**{"trace_or_workload": churn} | arguments)


def test_progress_on_a_terminal_only(churn, capsys, monkeypatch):
    compare_(churn, ["pin", "bounce"])
    assert capsys.readouterr() == ("", "")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    compare_(churn, ["pin", "bounce"], turns=2)
    assert [part.strip() for part in terminal.getvalue().split("\r\x1b[K")] == \
        ["", *["no device", "pin (1/4)", "bounce (2/4)", "no device", "pin (3/4)", "bounce (4/4)"], ""]


# ---- against the share that communicates; the stream of translations; pictures

def test_cost_by_share():
    trace = History().mmap(0, 2048).faults(0, 2048).trace()
    series = compare.by_share(trace, (0, 0.5, 1), ["pin", "mm+fault:prefault=4"], NIC)
    assert list(series) == ["pin", "mm+fault:prefault=4"]
    for line in series.values():
        assert [share for share, _ in line] == [0, 0.5, 1]
        assert line[0][1] < line[1][1] < line[2][1]
    talking = workload.communicate(trace, 0.5)
    row = compare_(talking, ["pin"], NIC)["pin"]
    assert series["pin"][1][1] == row.modelled_ns
    assert compare.by_share(trace, [0.5], ["pin"], NIC, component="registration")["pin"] == [(0.5, row.modelled["registration"])]
    with pytest.raises(ValueError, match="component = 'faults'"):
        compare.by_share(trace, component="faults")


def test_the_stream_of_translations():
    trace = (History().mmap(0, 9).comm(1, 2).comm(4, 1, pid=7).add(15, addr=BASE + PAGE - 1, length=2, access=WRITE)
             .add(15, addr=BASE, length=0).comm(5, 1).trace())
    asked = compare.translations(trace)         # of the first process pages 0, 1, 2 and 5, of the second page 4
    assert asked.dtype == np.uint64
    assert asked.tolist() == [1, 2, 4, 0, 1, 3]
    assert len(compare.translations(History().trace())) == 0


def test_the_stream_hits_as_the_device_does():
    static = workload.static(arrays=8, array_bytes=1 << 16, messages=500)
    row = compare_(static, ["mm+fault"], {"entries": 64, "ways": None})[0]
    asked = compare.translations(static)
    again = row.stats["lookups"] - len(asked)       # after a fault
    assert row.stats["hits"] - again == ioproc.TranslationCache(64).access(asked)


def test_pictures(churn, tmp_path):
    pytest.importorskip("matplotlib")
    small = compare_(churn, ["pin", "bounce", "pin-cache"])
    names = ["cost.png", "cost-hits.png", "cost-share.png"]
    assert [path.name for path in compare.pictures(small, tmp_path / "cost.png")] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


# ---- on the command line

def run(*arguments, **options):
    done = subprocess.run([sys.executable, "-m", "ioproc", "compare", *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, check=False, **options)
    assert "Traceback" not in done.stderr
    return done


CHURN = "malloc_churn:allocator=mmap,allocations=100,live=8,messages=200,object_largest=65536"


def test_as_a_command():
    done = run(CHURN, "--designs", "mm+fault,pin-cache", "--nic", "entries=32,ways=None", "--cost", "connectx-odp")
    assert (done.returncode, done.stderr) == (0, "")
    assert "NIC: entries=32, ways=None; modelled for: connectx-odp" in done.stdout
    assert "\nUNSAFE  pin-cache " in done.stdout
    assert run(CHURN, "--designs", "mm+fault,pin-cache", "--safe").returncode == 1
    assert run(CHURN, "--designs", "mm+fault", "--safe").returncode == 0


def test_a_command_for_machines():
    told = json.loads(run(CHURN, "--json", "--designs", "pin,pin-cache").stdout)
    assert [(row["design"], row["rank"], row["safe"]) for row in told["designs"]] == \
        [("pin", 1, True), ("pin-cache", None, False)]
    assert told["cost"]["name"] == "modern"
    assert {"register_ns"} < {parameter["name"] for parameter in told["cost"]["parameters"]}
    rows = list(csv.DictReader(io.StringIO(run(CHURN, "--csv", "--designs", "pin,pin-cache").stdout)))
    assert [row["design"] for row in rows] == ["pin", "pin-cache"]
    assert int(rows[0]["registrations"]) == 200 and rows[0]["failed"] == ""


def test_a_history_without_messages_gets_some(tmp_path):
    silent = History().mmap(0, 512).faults(0, 512).trace()
    silent.save(tmp_path / "silent.ioproc")
    told = [json.loads(run(tmp_path / "silent.ioproc", "--designs", "pin", "--json", *more).stdout)["designs"][0]["transfers"]
            for more in ((), ("--share", 1), ("--share", 1, "--messages", 9, "--seed", 3), ("--share", 0))]
    assert told[0] <= told[1] and told[1] % 4 == 0 < told[1] and told[2] % 9 == 0 < told[2] and told[3] == 0
    done = run(CHURN, "--share", 1)
    assert (done.returncode, "has messages of its own" in done.stderr) == (2, True)
    assert json.loads(run("redis", "--designs", "pin", "--json").stdout)["designs"][0]["transfers"] > 0


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["none"], 3, "none: No such file, nor a history (hpcc, nodejs, redis) nor a workload (static, "),
    (["churn:x=1"], 3, "No such file"), (["static:x=1"], 2, "'x': static has"),
    ([CHURN, "--designs", "x"], 2, "design 'x': not one of"), ([CHURN, "--nic", "x"], 2, "'x': not NAME=VALUE"),
    ([CHURN, "--nic", "entries=0"], 2, "entries = 0"), ([CHURN, "--cost", "x"], 2, "no preset 'x'"),
    ([CHURN, "--turns", "0"], 2, "turns = 0"), ([CHURN, "--plot", "x.gif"], 2, "must end in"), ([], 2, "required"),
    ([CHURN, "--designs", "pin", "--plot", "no/such.png"], 2, "no/such.png: no such directory" if find_spec("matplotlib") else
     "pictures need matplotlib"),
])
def test_mistakes(arguments, status, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr


def test_interrupted_progress_leaves_no_line():
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-m", "ioproc", "compare", CHURN, "--designs", "pin"], stdout=subprocess.PIPE,
                          stderr=theirs, text=True, check=False)
    os.close(theirs)
    told = os.read(ours, 10_000)
    os.close(ours)
    assert done.returncode == 0
    assert b"pin (1/3)" in told and told.endswith(b"\r\x1b[K")
