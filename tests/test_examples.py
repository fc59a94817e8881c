"""The examples, as a user builds and runs them."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

POINTERS = """\
after writing four pages: 4 loads, 0 invalidations
after fork and one write: 5 loads, 1 invalidations
after munmap: 5 loads, 2 invalidations, entry 0
"""

EXPECTED = {
    "c": """\
after writing four pages: {'loads': 4, 'drops': 0}
after fork: {'loads': 4, 'drops': 4} None
after one write: {'loads': 5, 'drops': 4}
after munmap: {'loads': 5, 'drops': 5} None
""",
    "cython": """\
sixteen pages written, calls: 1
after fork writable: False
after the copy the frame is another: True and writable: True
after munmap: None
""",
    "python": """\
not told         : 499 hits, 1 registrations, 0 dropped, 495 transfers with wrong frames
told by the hooks: 400 hits, 100 registrations, 100 dropped, 0 transfers with wrong frames
""",
    "cffi": POINTERS,
    "ctypes": POINTERS,
    "numba": POINTERS,
}


def run(directory, *arguments):
    """A program in `directory`, from where it can import what was built there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(directory), os.environ["PYTHONPATH"]))}
    done = subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("name", ["c", "cython"])
def test_compiled(name, tmp_path):
    directory = shutil.copytree(EXAMPLES / name, tmp_path / name)
    built = run(directory, "setup.py", "build_ext", "--inplace")
    assert not re.search(r"warning: device|device\.\w+:.*warning|performance hint", built.stdout + built.stderr)
    assert run(directory, "demo.py").stdout == EXPECTED[name]


def test_python():
    assert run(EXAMPLES / "python", "registration_cache.py").stdout == EXPECTED["python"]


@pytest.mark.parametrize("name", ["cffi", "ctypes", "numba"])
def test_pointers(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    assert run(EXAMPLES / name, "demo.py").stdout == EXPECTED[name]


def test_cost():
    """What it measures is not tested, but that it measures each way."""
    heading, line, *rows = run(EXAMPLES, "cost.py", "3").stdout.splitlines()
    assert heading.startswith("| callback | ns a call | times C |") and rows[0].startswith("| C, in a capsule |")
    ways = [("Cython", True), ("ctypes |", True), ("CFUNCTYPE", True), ("Python callable", True),
            ("numba", importlib.util.find_spec("numba")), *[(way, importlib.util.find_spec("cffi"))
                                                            for way in ("ABI", "API", "ffi.callback")]]
    for way, installed in ways:
        assert bool(installed) == any(way in row for row in rows)


def test_there_is_a_test_for_each():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(EXPECTED)
