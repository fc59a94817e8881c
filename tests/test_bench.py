"""``python -m ioproc.bench``, as its user sees it, and the sentences it ends with."""
import contextlib
import csv
import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import ioproc
from history import History
from ioproc import bench
from ioproc.trace import Trace, choose, replay

REDIS = Path(ioproc.__file__).parent / "histories" / "redis.ioproc.xz"
KINDS = [name for name in ioproc.HOOK_NAMES if name != "release"]


def run_bench(*arguments):
    """In this process; what a process of its own adds is tested apart."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = bench.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def report(*arguments):
    run = run_bench("--quick", "--json", *arguments)
    assert (run.returncode, run.stderr) == (0, "")
    return json.loads(run.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def shipped():
    return report()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A history with communication of its own, whose metadata means to be a nuisance."""
    trace = History().mmap(0, 64).comm(8, 8).faults(0, 64).fork(2).faults(0, 16, pid=2).munmap(0, 64).trace()
    trace.metadata |= {"command": "NaN\x1b[2J", "character": "\x1b[2Jtricky"}
    path = tmp_path_factory.mktemp("bench") / "small.ioproc"
    trace.save(path)
    return path


def test_each_history_and_placement_has_its_row(shipped):
    for name in ("hpcc", "nodejs", "redis"):
        assert shipped["histories"][name]["untraced_s"] > 0
        rows = [row for row in shipped["rows"] if row["history"] == name]
        assert [row["placement"] for row in rows] == ["none", "mm", "vma"]
    assert len(shipped["rows"]) == 9


def test_the_rows_agree_with_themselves_and_each_other(shipped):
    rows = {(row["history"], row["placement"]): row for row in shipped["rows"]}
    for (name, placement), row in rows.items():
        nothing, whole, vma = (rows[name, other] for other in ("none", "mm", "vma"))
        assert row["calls"] == sum(row[kind] for kind in KINDS)
        assert all(row["useful"][kind] <= row[kind] for kind in KINDS)
        if placement != "none":
            assert row["useful_share"] == pytest.approx(sum(row["useful"].values()) / row["calls"])
        assert row["chain_nodes"] == row["calls"] + row["release"]     # one device
        assert row["added"] == row["vmas_peak"] - row["vmas_none"]
        assert row["vmas_none"] == nothing["vmas_peak"]
        assert row["events"] == nothing["events"]
        assert row["disagreement"] < 0.001
        assert row["ns_per_event"] > 0
        assert row["register_failures"] == 0
        assert nothing["calls"] == nothing["registrations"] == nothing["added"] == whole["added"] == 0
        assert 0 < vma["calls"] <= whole["calls"]
        assert all(vma[kind] <= whole[kind] for kind in ("update_page", "invalidate_page", "wrprotect_page"))
        assert vma["useful_share"] > 0.99 > 0.3 > whole["useful_share"]
        # what concerns a page concerns registered memory or not, wherever the device is
        assert all(vma["useful"][kind] == whole["useful"][kind] for kind in ("update_page", "invalidate_page", "wrprotect_page"))
        assert 0.09 < vma["achieved_share"] <= 0.1


def test_the_micro_figures(shipped):
    figures = {figure["what"]: figure["value"] for figure in shipped["micro"]}
    assert 0 < figures["page fault, nothing registered"] < figures["+ 1 Python op"]
    assert 0 < figures["+ 8 native ops"] < figures["+ 1 Python op"]
    # interleaved, the least of many turns: a chain without the callback is not dearer than one with it, save for noise
    assert figures["+ 1 ops without the callback"] < figures["+ 1 native op"] + 3
    assert shipped["call_ns"] == max(figures["+ 1 native op"], 0.1)
    assert shipped["register_ns"] == {"mappings": figures["register a whole VMA"],
                                      "buffers": figures["register a buffer in its middle"]}
    assert 0 < shipped["register_ns"]["mappings"] < 0.9 * shipped["register_ns"]["buffers"]
    assert {"unregister a whole VMA", "unregister a buffer in its middle"} < set(figures)


def test_the_answers(shipped):
    rows = {(row["history"], row["placement"]): row for row in shipped["rows"]}
    for name, answer in zip(("hpcc", "nodejs", "redis"), shipped["answers"], strict=True):
        assert answer.startswith(f"{name}: ")
        assert f"{rows[name, 'mm']['calls']:,} times" in answer
        assert f"{rows[name, 'vma']['calls']:,} calls" in answer
        assert f"{rows[name, 'vma']['registrations']:,} registrations" in answer
        assert "costs less as soon as a call costs more than " in answer


def test_a_seed_makes_the_same_choice():
    def counted(*arguments):
        return [{key: row[key] for key in ("calls", *KINDS, "registrations", "vmas_peak")}
                for row in report("--trace", REDIS, *arguments)["rows"]]
    assert counted() == counted("--seed", 0, "--seeds", 3) != counted("--seed", 1)


@pytest.mark.parametrize("seeds", [1, 4, 5])
def test_the_row_is_the_median_of_the_seeds(seeds):
    trace = Trace.load(REDIS)
    tried = []
    for seed in range(7, 7 + seeds):
        plan = choose(trace, 0.1, "buffers", seed)
        tried.append((*(replay(trace, placement=placement, communication=plan) for placement in ("vma", "mm")), plan))
    tried.sort(key=lambda one: one[0].calls)
    vma, whole, plan = tried[(seeds - 1) // 2]
    told = report("--trace", REDIS, "--seed", 7, "--seeds", seeds)
    nothing, mm, median = told["rows"]
    assert (told["seed"], told["seeds"], nothing["seeds"], mm["seeds"], median["seeds"]) == (7, seeds, None, seeds, seeds)
    assert (median["calls"], median["registrations"], median["useful"]) == (vma.calls, vma.registrations, vma.useful)
    assert (median["calls_min"], median["calls_max"]) == (tried[0][0].calls, tried[-1][0].calls)
    assert (mm["useful"], mm["achieved_share"]) == (whole.useful, plan.bytes / plan.candidate_bytes)
    assert mm["calls"] == mm["calls_min"] == mm["calls_max"]
    assert f"per VMA makes {vma.calls:,} calls" in told["answers"][0]


def test_how_many_seeds(shipped):
    assert {row["seeds"] for row in shipped["rows"]} == {None, 3}
    assert all(row["calls_min"] < row["calls_max"] for row in shipped["rows"] if row["placement"] == "vma")
    run = run_bench("--quick", "--trace", REDIS)
    assert "3 choices, from seed 0 on" in run.stdout
    row = next(row for row in shipped["rows"] if (row["history"], row["placement"]) == ("redis", "vma"))
    assert f" {row['calls_min']:,}..{row['calls_max']:,} " in run.stdout
    assert "1 choice, from seed 2 on" in run_bench("--quick", "--trace", REDIS, "--seeds", 1, "--seed", 2).stdout


def test_a_history_with_communication_of_its_own(small):
    told = report("--trace", small, "--call-ns", "100")
    assert [row["communicates"] for row in told["rows"]] == ["-", "as recorded", "as recorded"]
    assert [row["update_page"] for row in told["rows"]] == [0, 80, 8]
    assert [row["share"] for row in told["rows"]] == [0, None, None]
    assert told["call_ns"] == 100
    assert "recorded messages" in told["answers"][0]
    assert "nan" not in told["answers"][0].lower()
    assert told["histories"]["small"]["command"] == "NaN\x1b[2J"


def test_two_histories_of_one_name(small, tmp_path):
    twin = tmp_path / small.name
    twin.write_bytes(small.read_bytes())
    assert list(report("--trace", small, "--trace", twin)["histories"]) == [str(small), str(twin)]


def test_one_history_twice(small):
    told = report("--trace", small, "--trace", small)
    assert list(told["histories"]) == [str(small), f"{small} (2)"]
    assert [row["history"] for row in told["rows"]] == [name for name in told["histories"] for _ in range(3)]
    table = run_bench("--quick", "--trace", small, "--trace", small).stdout
    assert sum(line.startswith("as recorded") for line in table.splitlines()) == 4


def test_a_history_without_events(tmp_path):
    History().trace().save(tmp_path / "empty.ioproc")
    assert report("--trace", tmp_path / "empty.ioproc")["rows"][0]["events"] == 0
    assert run_bench("--quick", "--trace", tmp_path / "empty.ioproc").returncode == 0


def test_as_a_table(small):
    run = run_bench("--quick", "--trace", small)
    assert (run.returncode, run.stderr) == (0, "")
    assert "\x1b" not in run.stdout
    assert "inferred: 0 events" in run.stdout
    header = next(line for line in run.stdout.splitlines() if line.startswith("communicates"))
    assert [header.count(title) for title in ("hooks", "calls min..max", "useful", "nodes", "VMAs", "ns/event")] == [1] * 6
    assert "of all processes together, at the peak" in run.stdout
    assert "differences below about 30 % say nothing" in run.stdout
    assert "Unregistering is measured and not charged" in run.stdout
    assert "benchmarks/bench_hooksite.py" in run.stdout
    assert "The answer, for a callback that does nothing (" in run.stdout
    assert "--call-ns NS for yours" in run.stdout
    given = run_bench("--quick", "--trace", small, "--call-ns", 240)
    assert "The answer, for a callback of 240 ns (--call-ns),\n" in given.stdout
    assert max(map(len, run.stdout.splitlines())) <= 150


def test_as_csv(small):
    run = run_bench("--quick", "--csv", "--trace", small)
    assert run.returncode == 0
    rows = list(csv.DictReader(io.StringIO(run.stdout)))
    assert [row["placement"] for row in rows] == ["none", "mm", "vma"]
    assert [row["share"] for row in rows] == ["0.0", "", ""]
    assert [row["seeds"] for row in rows] == ["", "", ""]       # a recorded choice has none
    assert [row["calls_min"] for row in rows] == [row["calls_max"] for row in rows] == [row["calls"] for row in rows]
    assert int(rows[1]["calls"]) == sum(int(rows[1][kind]) for kind in KINDS)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--json", "--csv"], "not allowed"), (["--trace"], "expected one argument"), (["fast"], "fast"),
    (["--seed", "x"], "--seed x: must be a whole number\n"), (["--seed", "-1"], "--seed -1: must be a whole number, at least 0"),
    (["--seeds", "1.5"], "--seeds 1.5: must be a whole number\n"),
    (["--seeds", "0"], "--seeds 0: must be a whole number, at least"),
    *(([f"--call-ns={value}"], "must be a finite number") for value in ("-1", "nan", "inf", "-inf")),
])
def test_bad_arguments(arguments, message):
    run = run_bench(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert "usage" in run.stderr
    assert message in run.stderr


@pytest.mark.parametrize(("path", "message"), [("none", "No such file"), (".", "directory"), (__file__, "not an ioproc history"),
                                               ("short", "truncated")])
def test_unreadable_histories(path, message, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short").write_bytes(small.read_bytes()[:-1])
    run = run_bench("--quick", "--trace", small, "--trace", path)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.count("\n") == 1
    assert message in run.stderr


def test_as_a_program():
    run = subprocess.run([sys.executable, "-m", "ioproc.bench", "--quick"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert all(f"\n{name}: on the whole address space" in run.stdout for name in ("hpcc", "nodejs", "redis"))


def test_out_of_memory(small, monkeypatch):
    def replay(*arguments, **options):
        raise MemoryError("replay stopped in event 3: out of frames or memory")
    monkeypatch.setattr(bench, "replay", replay)
    run = run_bench("--quick", "--trace", small)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr == "ioproc.bench: replay stopped in event 3: out of frames or memory\n"


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_closed_pipe_is_no_error(small, buffered):
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "ioproc.bench", "--quick", "--trace", small], stdout=write, text=True,
                         stderr=subprocess.PIPE, check=False, env=os.environ | {"PYTHONUNBUFFERED": buffered})
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk(small, form, buffered):
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "ioproc.bench", "--quick", "--trace", small, *form], stdout=full, text=True,
                             stderr=subprocess.PIPE, check=False, env=os.environ | {"PYTHONUNBUFFERED": buffered})
    assert (run.returncode, run.stderr) == (2, "ioproc.bench: standard output: No space left on device\n")


def test_interrupted():
    """Its progress on a terminal says when to press Ctrl-C."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-m", "ioproc.bench"], stdout=subprocess.PIPE, stderr=theirs,
                          preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL)) as process:
        os.close(theirs)
        told = b""
        while b"micro-figures" not in told:
            told += os.read(ours, 1000)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    told += os.read(ours, 1000)
    os.close(ours)
    assert (process.returncode, output) == (130, b"")
    assert b"Traceback" not in told


# ---- the designs

def test_each_history_and_design_has_its_row(shipped):
    for name in ("hpcc", "nodejs", "redis"):
        rows = [row for row in shipped["designs"] if row["history"] == name]
        assert {row["design"] for row in rows} == set(ioproc.DESIGNS)
        safe = [row for row in rows if row["safe"] and row["sound"]]
        assert rows[:len(safe)] == safe and not any(row["sound"] for row in rows[len(safe):])
        assert [row["rank"] for row in rows] == [*range(1, len(safe) + 1)] + [None] * (len(rows) - len(safe))
        assert [row["modelled_ns"] for row in safe] == sorted(row["modelled_ns"] for row in safe)
        assert len({row["transfers"] for row in rows}) == 1
        for row in rows:
            assert row["safe"] or row["design"] in ("pin-cache", "mm+fault/posted")
            assert row["disagreement"] < (0.003 if "pin" in row["design"] or "registered" in row["design"] else 0.0001)
    assert shipped["nic"] == {}
    assert shipped["cost"]["name"] == "modern"
    assert all(parameter["source"] for parameter in shipped["cost"]["parameters"])


def test_the_designs_are_those_of_compare():
    told = report("--trace", REDIS, "--seed", 5, "--designs", "mm+fault,bounce", "--nic", "entries=8,ways=2", "--cost", "qsnet")
    trace = ioproc.workload.communicate(Trace.load(REDIS), 0.1, "buffers", 5, 4)
    compared = ioproc.compare(trace, ["mm+fault", "bounce"], {"entries": 8, "ways": 2}, "qsnet")
    assert told["nic"] == {"entries": 8, "ways": 2}
    for row, expected in zip(told["designs"], compared.ranked(), strict=True):
        counts = {key: value for key, value in expected.figures().items() if key not in ("measured_ns", "noise_ns")}
        assert bench.plain(counts).items() <= row.items()


def test_a_workload_in_place_of_a_history(small):
    text = "static:arrays=2,messages=50"
    told = report("--workload", text, "--workload", "ranks:n=2,messages=20", "--trace", small, "--designs", "pin")
    assert list(told["histories"]) == ["small", text, "ranks:n=2,messages=20"]
    assert told["histories"][text]["workload"]["arrays"] == 2
    assert [(row["history"], row["transfers"]) for row in told["designs"]] == \
        [("small", 1), (text, 50), ("ranks:n=2,messages=20", 20)]
    assert [row["communicates"] for row in told["rows"][3:6]] == ["-", "as recorded", "as recorded"]


def test_the_designs_as_a_table(small):
    out = run_bench("--quick", "--trace", small).stdout
    assert out.index("The answer, for a callback") < out.index("Every design, replayed")
    assert "10% of the memory,\nin buffers, 4 messages each" in out
    assert "\nsmall: " in out[out.index("Every design"):]
    assert all(f" {name} " in out for name in ioproc.DESIGNS)
    assert "\x1b" not in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--designs", "x"], "design 'x': not one of"), (["--designs", "pin,pin"], "'pin' is there twice"),
    (["--nic", "entries"], "'entries': not NAME=VALUE"), (["--nic", "ways=3"], "ways = 3"), (["--cost", "x"], "no preset 'x'"),
    (["--workload", "x"], "workload 'x': not one of static"), (["--workload", "static:seed=-1"], "seed = -1"),
    (["--plot", "x.gif"], "must end in .png or .svg"),
])
def test_bad_designs(arguments, message, monkeypatch):
    monkeypatch.setattr(bench, "micro", lambda quick: pytest.fail("measured before the check"))
    run = run_bench(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert message in run.stderr


def test_pictures(small, tmp_path):
    pytest.importorskip("matplotlib")
    one = ["--designs", "pin,mm+fault", "--workload", "static:arrays=4,messages=9"]
    assert run_bench("--quick", *one, "--plot", tmp_path / "a.svg").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.svg", "a-hits.svg", "a-share.svg"}
    assert run_bench("--quick", *one, "--trace", small, "--plot", tmp_path / "b.svg").returncode == 0
    assert {"b-small.svg", "b-small-share.svg", "b-static:arrays=4,messages=9.svg"} < {path.name for path in tmp_path.iterdir()}
    run = run_bench("--quick", *one, "--plot", tmp_path / "none" / "a.svg")
    assert (run.returncode, run.stdout) == (2, "")
    assert "no such directory" in run.stderr


# ---- the sentences

def rows_for(costs, kind="buffers"):
    """One line for each placement and share: calls of the whole address space are 100."""
    rows = []
    for share, calls in costs.items():
        for placement, number in (("mm", 100), ("vma", calls)):
            rows.append({"kind": kind, "share": share, "achieved_share": share, "placement": placement, "calls": number,
                         "registrations": 2, "events": 50, "useful_share": 0.25, "added": 3,
                         "communicates": f"{share:.0%} in {kind}"})
    return rows


@pytest.mark.parametrize(("costs", "expected"), [
    ({0.1: 10, 0.5: 50, 1.0: 90}, None),
    ({0.1: 10, 0.5: 99, 1.0: 100}, (10, 50)),
    ({0.1: 99, 0.5: 99}, (0, 10)),
])
def test_where_per_vma_stops_paying(costs, expected):
    assert bench.crossover(rows_for(costs), "buffers", 1, {"buffers": 1}) == expected


def test_each_kind_pays_its_registrations():
    prices = {"mappings": 10, "buffers": 20}
    for kind, cost in (("mappings", 20), ("buffers", 40), ("recorded", 40)):
        mm, vma = rows_for({0.1: 10}, kind)
        assert (bench.cost_ns(mm, 1, prices), bench.cost_ns(vma, 1, prices)) == (100, 10 + cost)


@pytest.mark.parametrize(("calls", "registrations", "words"), [
    (10, 9, "as soon as a call costs more than 0.5 ns"), (99, 9, "as soon as a call costs more than 45 ns"),
    (10, 0, "at any cost of a call"), (100, 9, "at no cost of a call"), (101, 0, "at no cost of a call")])
def test_break_even(calls, registrations, words):
    mm, vma = rows_for({0.1: calls})
    vma["registrations"] = registrations
    assert bench.break_even(mm, vma, {"mappings": 1000, "buffers": 5}) == f"per VMA costs less {words}"


def test_an_answer_in_words():
    trace = History().trace()
    trace.metadata["untraced_s"] = 2.0
    rows = rows_for({0.1: 10, 1.0: 100})
    rows[-1] |= {"registrations": 1, "added": 0}
    text = bench.answer("x", trace, rows, 1000, {"buffers": 9})
    assert text == (
        "x: on the whole address space a device is called 100 times, 2 per event; "
        "that costs 100 us or 0.005% of the run's 2.0 s. "
        "With 10% in buffers communicating, 25% of these calls are useful; per VMA makes 10 calls and 2 registrations, "
        "has at most 3 VMAs more, and costs 10 us or 0.0005%: less than on the whole address space (100 us); "
        "per VMA costs less as soon as a call costs more than 0.2 ns. "
        "With 100% in buffers communicating, 25% of these calls are useful; per VMA makes 100 calls and 1 registration, "
        "has no VMAs more, and costs 100 us or 0.005%: not less than on the whole address space (100 us); "
        "per VMA costs less at no cost of a call. "
        "Share from which per VMA does not pay at 1 us a call: in buffers, between 10% and 100%.")
    assert "none in range" in bench.answer("x", trace, rows_for({0.1: 10, 1.0: 50}), 1, {"buffers": 1})


@pytest.mark.parametrize(("number", "words"), [(0, "no VMAs"), (1, "1 VMA"), (2, "2 VMAs"), (1234, "1,234 VMAs")])
def test_counted(number, words):
    assert bench.counted(number, "VMA", "no") == words


@pytest.mark.parametrize(("value", "text"), [(0, "0%"), (0.00001234, "0.000012%"), (0.5, "0.5%"), (9.94, "9.9%"), (9.96, "10%"),
                                             (99.4, "99%"), (100, "100%"), (1234.5, "1234%")])
def test_percent(value, text):
    assert bench.percent(value) == text


@pytest.mark.parametrize(("ns", "text"), [(0, "0 ns"), (12.34, "12.3 ns"), (1234, "1.23 us"), (5e6, "5 ms"), (2.5e9, "2.5 s")])
def test_duration(ns, text):
    assert bench.duration(ns) == text


def test_what_json_cannot_say():
    assert bench.plain({"a": [math.nan, 1.0, "NaN"], "b": (math.inf)}) == {"a": [None, 1.0, "NaN"], "b": None}
