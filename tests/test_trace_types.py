"""The annotations of `ioproc.trace`: its modules agree with them, and a strict user of them is served."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ioproc

pytest.importorskip("mypy")

USER = """\
from ioproc.trace import (
    EVENT, Access, Op, Origin, Trace, TraceError, TraceWriter, annotate, choose, import_recording, read_perf, read_strace,
    read_tracepoints, recognise, record, replay,
)

trace: Trace = import_recording("calls", "faults", lenient=True, metadata={"command": "ls"})
calls, faults = read_tracepoints("points")
count: int = len(trace) + len(calls) + trace.inferred()["file"]
kind: str = recognise("points")
result = replay(annotate(trace, "comm"), communication=choose(trace, 0.5))
ns: float = result.ns_per_event
record(["ls"], tracer="perf", keep="kept").save("history")
loaded: Trace = Trace.load("history")
try:
    print(loaded.summary()["events"], loaded.programs(), read_perf("faults"), read_strace("calls"))
except TraceError as error:
    line: int | None = error.line
writer = TraceWriter()
index: int = writer.append((1, 2))
print(EVENT, Access.READ, Op.MMAP, Origin.FILE, writer.finish())
by_kind: dict[str, int] = result.faults
"""


@pytest.mark.parametrize("strict", [False, True])
def test_mypy_is_content(tmp_path, strict):
    (tmp_path / "user.py").write_text(USER)
    what = ["--strict", "user.py"] if strict else ["--warn-unused-ignores", "-p", "ioproc.trace"]
    where = Path(list(ioproc.__path__)[0]).parent
    # An installed package has py.typed, and mypy refuses to be told where it is.
    found = {} if where.name == "site-packages" else {"MYPYPATH": str(where)}
    run = subprocess.run([sys.executable, "-P", "-m", "mypy", "--cache-dir", tmp_path / "cache", *what], cwd=tmp_path,
                         capture_output=True, text=True, check=False,
                         env=os.environ | found | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.returncode == 0, run.stdout + run.stderr
