"""The README's examples print what the README says, and its two commands are what CI runs."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("code", "expected"), EXAMPLES)
def test_examples_print_what_they_say(code, expected):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (expected, "")


def test_examples_are_short():
    assert len(EXAMPLES) == 3
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 25 for code, _ in EXAMPLES)


def test_two_commands():
    commands = re.findall(r"^ {4}(python3 -m venv .*)$", README, re.MULTILINE)
    assert ["ioproc.bench" in commands[0], "pytest" in commands[1], len(commands)] == [True, True, 2]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert "<!--" not in README
