"""
Which ioproc the tests test: the one built in place if there is one, else the installed one, which the checkout's own
sources would hide (they lack the extension module).  Programs the tests start get the same one.
"""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent

if not list((ROOT / "ioproc").glob("_core*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
elif str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

try:
    import ioproc
except ImportError as error:
    pytest.exit(f"ioproc cannot be imported ({error}): first run `pip install '.[test]'`, "
                "or `python setup.py build_ext --inplace` to test this checkout in place", returncode=4)

PACKAGE = Path(ioproc.__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
os.environ["PYTHONSAFEPATH"] = "1"


def pytest_report_header():
    return f"ioproc: {ioproc.__version__} from {PACKAGE}"
