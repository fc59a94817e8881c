"""Each allocation of the core fails, alone or with all that follow in the same call: nothing is lost, the next call works."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    shim = tmp_path_factory.mktemp("shim") / "failing_malloc.so"
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", shim, TESTS / "native/failing_malloc.c"],
                   check=True)
    return shim


@pytest.mark.skipif(sys.platform != "linux" or any("san" in name for name in os.environ.get("LD_PRELOAD", "").split("/")),
                    reason="replaces the C library's malloc")
@pytest.mark.parametrize("what", ["vm", "device", "caches"])
def test_each_allocation_fails_once(shim, what):
    run = subprocess.run([sys.executable, TESTS / "out_of_memory.py", what], env={**os.environ, "LD_PRELOAD": str(shim)},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
