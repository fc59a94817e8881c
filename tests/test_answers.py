"""examples/answers.py runs, and what docs/answers.md says of its tables is so: on fewer histories, and on smaller programs."""
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "answers.py"
DOCS = (ROOT / "docs" / "answers.md").read_text()


def load():
    spec = importlib.util.spec_from_file_location("answers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


answers = load()


@pytest.fixture(scope="module")
def tables():
    """The rows of each section, made when they are asked for."""
    class Tables(dict):
        def __missing__(self, name):
            self[name] = list(answers.SECTIONS[name](True))
            return self[name]
    return Tables()


def by(rows, *columns):
    return {tuple(row[column] for column in columns) if len(columns) > 1 else row[columns[0]]: row for row in rows}


# ---- whole or per VMA

def test_per_vma_leaves_out_useless_calls(tables):
    for row in tables["placement"]:
        if row["share"] == 0.01:
            assert row["calls, per VMA"] < row["calls, whole"] / 50
            assert row["useful, per VMA"] > row["useful"]


def test_without_update_hooks_there_is_little_to_leave_out(tables):
    rows = by(tables["placement"], "history", "share", "hooks")
    for share in (0.01, 1.0):
        assert rows["hpcc", share, "invalidate"]["calls, whole"] < rows["hpcc", share, "and update"]["calls, whole"] / 50
        assert rows["hpcc", share, "invalidate"]["modelled, per VMA ns"] > rows["hpcc", share, "invalidate"]["modelled, whole ns"]
    assert rows["redis", 0.01, "invalidate"]["modelled, per VMA ns"] < rows["redis", 0.01, "invalidate"]["modelled, whole ns"]


def test_with_update_hooks_per_vma_costs_less_while_little_communicates(tables):
    for (_, share, hooks), row in by(tables["placement"], "history", "share", "hooks").items():
        if hooks == "and update":
            assert (row["modelled, per VMA ns"] < row["modelled, whole ns"]) == (share == 0.01)


def test_a_driver_ignores_most_calls_and_is_not_told_more_often_per_vma(tables):
    for row in tables["placement"]:
        if row["hooks"] == "invalidate":
            assert row["useful"] < 0.05
            assert row["useful"] * row["calls, whole"] <= row["useful, per VMA"] * row["calls, per VMA"] + 0.5


def test_an_interval_is_called_for_by_itself(tables):
    row = by(tables["placement"], "history", "share", "hooks")["hpcc", 1.0, "invalidate"]
    assert row["calls, interval"] > row["calls, whole"] and row["calls, interval"] > row["calls, per VMA"]


def test_what_a_call_has_to_cost(tables):
    rows = by(tables["break_even"], "history")
    for row in rows.values():
        assert row["and update: a call ns"] < row["invalidate: a call ns"]
    for name in ("hpcc", "redis"):
        assert rows[f"{name}, 1%"]["and update: a call ns"] < 1 < rows[f"{name}, 100%"]["and update: a call ns"]
    assert rows["hpcc, 100%"]["invalidate: a call ns"] == math.inf
    # a program that returns no memory fires nothing that per VMA could save
    for name in ("static", "malloc_churn, arena, 5%", "malloc_churn, arena, 100%"):
        assert rows[name]["invalidate: calls saved"] == 0


def test_where_per_vma_stops_paying(tables):
    rows = by(tables["stops"], "history", "hooks")
    assert rows["hpcc", "invalidate"]["at 4.1 ns a call"] == "always more"
    assert rows["redis", "invalidate"]["at 4.1 ns a call"] == "1% to 50%"
    for name in ("hpcc", "redis"):
        assert rows[name, "and update"]["at 500 ns a call"] == "always less"
        assert rows[name, "and update"]["at 4.1 ns a call"] not in ("always less", "always more")


def test_small_buffers_run_out_of_vmas(tables):
    rows = by(tables["too_many"], "design")
    limit = rows["vma+fault"]["limit"]
    assert (rows["vma+fault"]["buffers"], rows["vma+fault"]["then"]) == (limit // 2, "out of memory")
    for design in ("mm+fault", "interval+fault"):
        assert (rows[design]["buffers"], rows[design]["VMAs"], rows[design]["then"]) == (limit, 1, "-")


def test_what_is_measured_is_only_reported(tables):
    rows = tables["measured"]
    assert {row["design"] for row in rows} == {"mm+fault", "vma+fault", "interval+fault", "mm+preload"}
    assert all(row["low ns"] <= row["an event ns"] <= row["high ns"] for row in rows)


# ---- update hooks

def test_the_first_message(tables):
    rows = by(tables["first"], "design")
    assert [row["first: NIC faults"] for row in rows.values()] == [64, 4, 0, 0, 0]
    cost = {design: row["first, modern ns"] for design, row in rows.items()}
    assert cost["mm+preload"] < cost["mm+preload-registered"] < cost["mm+fault:prefault=16"] < cost["mm+fault"] / 10
    assert [row["other pages: calls"] for row in rows.values()] == [0, 0, 64, 0, 0]


def test_update_hooks_pay_where_most_of_the_memory_communicates(tables):
    rows = by(tables["update"], "history", "share")
    for (_, share), row in rows.items():
        assert row["faults, preload"] <= row["faults, fault"] / 100
        assert row["used"] < (0.01 if share == 0.01 else 0.2)
    assert rows["hpcc", 0.01]["modelled, preload ns"] > rows["hpcc", 0.01]["modelled, fault ns"]
    assert rows["hpcc", 1.0]["modelled, preload ns"] < rows["hpcc", 1.0]["modelled, fault ns"]
    # what is preloaded, fork takes away again page by page
    assert rows["redis", 1.0]["modelled, preload ns"] > rows["redis", 1.0]["modelled, fault ns"]


def test_the_middle_way_costs_less_than_faulting(tables):
    for row in tables["update"]:
        assert row["faults, registered"] < row["faults, fault"] / 5 and row["modelled, registered ns"] < row["modelled, fault ns"]


def test_per_vma_update_hooks_come_too_late(tables):
    for row in tables["update"]:
        assert row["faults, vma+preload"] > 0.85 * row["faults, fault"]


def test_small_nic_memory_undoes_preloading(tables):
    for row in tables["small"]:
        if row["NIC memory"] == 4096:
            assert row["evicted, fault"] == 0 < row["evicted, preload"] and row["faults, preload"] > 1


# ---- ranged callbacks

def test_a_range_at_a_time(tables):
    rows = by(tables["ranged"], "history", "design")
    assert rows["hpcc", "mm+fault"]["pages a shootdown"] > 100
    assert rows["malloc_churn, mmap", "mm+preload"]["pages a shootdown"] > 10
    assert rows["redis", "mm+fault"]["pages a shootdown"] < 1.5            # fork and copy-on-write are page by page
    for row in rows.values():
        assert row["modelled, ranged ns"] <= row["modelled, by page ns"]


# ---- fork

def test_only_the_posted_patch_and_a_cache_nobody_tells_are_unsafe(tables):
    for row in tables["fork"] + tables["child"]:
        unsafe = row["fork"] == "posted" or (row["design"], row["fork"]) == ("pin-cache", "-")
        assert (row["violations"] > 0) == unsafe, row


def test_what_fork_costs(tables):
    rows = by(tables["fork"], "design", "fork")
    for design in ("mm+fault", "vma+fault", "mm+preload", "mm+preload-registered", "mm+pin-cache+hooks"):
        ns = {way: rows[design, way]["modelled ns"] for way in answers.FORKS}
        assert ns["posted"] < ns["revised"] and ns["precopy"] < ns["revised"]
        assert rows[design, "precopy"]["copied at fork"] > 0 == rows[design, "revised"]["copied at fork"]
    assert rows["vma+fault", "revised"]["calls"] < rows["mm+fault", "revised"]["calls"]
    assert rows["vma+fault", "revised"]["NIC faults"] == rows["mm+fault", "revised"]["NIC faults"]
    assert rows["interval+fault", "revised"]["calls"] < rows["vma+fault", "revised"]["calls"]
    assert rows["interval+fault", "revised"]["NIC faults"] > rows["mm+fault", "revised"]["NIC faults"]
    assert rows["mm+pin-cache+hooks", "revised"]["modelled ns"] < rows["mm+fault", "revised"]["modelled ns"] / 5


def test_what_a_child_inherits(tables):
    rows = by(tables["child"], "design", "fork")
    for design in ("mm+preload-registered", "mm+pin-cache+hooks"):
        early, late = (rows[design, way] for way in ("inherit", "revised"))
        assert early["first messages ns"] < late["first messages ns"] / 10 and early["at fork ns"] > late["at fork ns"]
        assert early["first messages: registrations"] == 0 < early["at fork: registrations"]
        total = [row["at fork ns"] + row["first messages ns"] for row in (early, late)]
        assert 0.9 < total[0] / total[1] < 1.1
    assert {**rows["mm+fault", "inherit"], "fork": "-"} == {**rows["mm+fault", "revised"], "fork": "-"}


# ---- static images

def test_the_image_is_not_static(tables):
    for row in tables["static"]:
        shares = [value for column, value in row.items() if column.startswith("by ")]
        assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] < 0.95


# ---- the script and the page

def told(*arguments):
    return subprocess.run([sys.executable, "-P", SCRIPT, *arguments], capture_output=True, text=True, timeout=100)


def test_it_prints_the_tables():
    done = told("--quick", "first", "too_many")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^(\w+): ", done.stdout, re.MULTILINE) == ["first", "too_many"]
    assert "| mm+fault:prefault=16 | 4 | " in done.stdout


def test_an_unknown_section_is_refused():
    done = told("third")
    assert done.returncode == 2 and "third: not one of placement" in done.stderr


def test_the_page_has_every_section_with_its_command():
    assert re.findall(r"python -P examples/answers.py (\w+)$", DOCS, re.MULTILINE) == list(answers.SECTIONS)


def test_the_small_tables_of_the_page_are_what_the_script_prints(tables):
    for row in tables["first"] + tables["child"]:
        assert f"| {' | '.join(answers.cell(column, value) for column, value in row.items())} |" in DOCS
