"""The examples, as a user builds and runs them."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

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


def test_there_is_a_test_for_each():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(EXPECTED)
