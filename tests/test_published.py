"""Published results beside ours: what counts as reproduced, what each row was given, and that docs/published.md shows them."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ioproc import Cost, published
from ioproc.published import FACTOR, Result, results, table, transfer

DOCS = Path(__file__).parents[1] / "docs" / "published.md"
MB = 1 << 20


@pytest.fixture(scope="module")
def rows():
    return results()


@pytest.mark.parametrize("ours, independent, verdict", [
    (10, True, "reproduced"), (10 * FACTOR, True, "reproduced"), (10 / FACTOR, True, "reproduced"),
    (10.1 * FACTOR, True, "not reproduced"), (9.9 / FACTOR, True, "not reproduced"), (0, True, "not reproduced"),
    (10, False, "consistency check"), (100, False, "inconsistent"),
    (None, True, "not reproducible from the data given"), (None, False, "not reproducible from the data given"),
])
def test_only_independent_inputs_reproduce(ours, independent, verdict):
    assert Result("a result", "a paper", "x", 10, ours, "inputs", independent).verdict == verdict


def test_every_row_tells_source_and_inputs(rows):
    assert all(row.result and row.source and row.inputs and row.unit for row in rows)


def test_inputs_of_the_same_paper_are_never_called_independent(rows):
    for row in rows:
        same = "of the same paper" in row.inputs or "derived from these" in row.inputs
        assert not (same and row.verdict == "reproduced"), row


def test_the_verdicts(rows):
    assert [(row.source.split(",")[0], row.verdict) for row in rows if "io_uring" not in row.result] == [
        ("VFIO I/O page fault RFC v2 (2021)", "consistency check"), ("VFIO I/O page fault RFC v2 (2021)", "reproduced"),
        ("Lesokhin et al.", "consistency check"), ("Lesokhin et al.", "not reproduced"),
        ("Tezuka et al.", "consistency check"), ("Tezuka et al.", "not reproduced"),
        ("Vesely et al.", "consistency check"), ("NP-RDMA", "not reproduced"),
        ("Li et al.", "not reproducible from the data given")]


def test_premapping_is_structural():
    """A fault for each page of two buffers; with a premap of 512 pages one for each 512."""
    assert transfer(MB, 1, buffers=2)["faults"] == 2 * 256
    assert transfer(10 * MB, 512, buffers=2)["faults"] == 2 * 5
    assert transfer(4 * MB, 1024).items() >= {"faults": 1, "prefaulted": 1023, "loaded": 1024}.items()
    assert transfer(MB, 1, buffers=2, translation="preload")["faults"] == 0


def test_without_io_uring_its_row_says_so(monkeypatch):
    def refused(cost):
        raise PermissionError(1, "forbidden here")

    monkeypatch.setattr(Cost, "of", refused)
    row, = published.pinning_here()
    assert row.verdict == "not reproducible from the data given" and "forbidden here" in row.inputs


def test_the_docs_show_what_the_command_prints(rows):
    """But for the row that is measured."""
    shown = DOCS.read_text().splitlines()
    for line in table(rows).splitlines():
        assert line in shown or "io_uring" in line, line


def test_json_and_table(rows, capsys, monkeypatch):
    monkeypatch.setattr(published, "results", lambda: rows)
    assert published.main(["--json"]) == 0
    assert [row["verdict"] for row in json.loads(capsys.readouterr().out)] == [row.verdict for row in rows]
    assert published.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


@pytest.mark.parametrize("command, status, told", [
    ("| head -c 1", 0, ""), ("> /dev/full", 2, "ioproc.published: standard output: No space left on device\n")])
def test_output_that_nobody_takes(command, status, told):
    shell = f"set -o pipefail; '{sys.executable}' -m ioproc.published {command}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, told)
