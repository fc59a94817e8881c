"""``python -m ioproc``: what goes where, and how a user's mistakes end."""
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ioproc import __version__ as version
from ioproc.trace import Op, Trace

DATA = Path(__file__).parent / "data"
STRACE, PERF = DATA / "halo2.user.strace.xz", DATA / "halo2.user.pf.txt.xz"
POINTS = DATA / "ways.tracepoints.xz"


def ioproc(*arguments, **options):
    run = subprocess.run([sys.executable, "-m", "ioproc", *map(str, arguments)], capture_output=True, text=True,
                         timeout=300, check=False, **options)
    assert "Traceback" not in run.stderr
    return run


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "halo.ioproc.gz"
    run = ioproc("import", "--strace", STRACE, "--perf", PERF, "-o", path, "--set", "command=mpirun halo", "--set",
                 "untraced_s=0.5")
    assert (run.returncode, run.stdout) == (0, "")
    assert "37153 events" in run.stderr
    return path


def test_info_as_text(history):
    run = ioproc("info", history)
    assert (run.returncode, run.stderr) == (0, "")
    assert "mpirun halo" in run.stdout
    assert "events         37153" in run.stdout


def test_info_says_what_is_known_and_what_was_guessed(tmp_path, history):
    shown = ioproc("info", history).stdout.splitlines()
    assert "read from      strace, perf of page faults" in shown
    assert any(row.startswith("clock          realtime, from 20") for row in shown)
    assert any(row.startswith("their access   0 recorded, ") for row in shown)
    assert ioproc("import", POINTS, "-o", tmp_path / "points").returncode == 0
    run = ioproc("info", tmp_path / "points")
    assert (run.returncode, run.stderr) == (0, "")
    shown = run.stdout.splitlines()
    assert "read from      tracepoints" in shown
    assert any(row.startswith("clock          monotonic, from 20") for row in shown)
    assert "faults         91 reads, 306 writes, 0 of unknown access, 21 of them by the kernel" in shown
    assert "their access   397 recorded, 0 proved, 0 assumed" in shown
    assert "files          7, 1 segments, 2.3 MiB" in shown
    assert [row.split()[-1] for row in shown[-3:]] == ["/usr/bin/ways", "/bin/true", "/usr/bin/ways"]
    information = json.loads(ioproc("info", "--json", tmp_path / "points").stdout)
    assert (information["formats"], information["clock"], information["faults"]["kernel"]) == (["tracepoints"], "monotonic", 21)
    assert [program["program"] for program in information["programs"]] == ["/usr/bin/ways", "/bin/true", "/usr/bin/ways"]


def test_import_recognises_what_it_is_given(tmp_path, history):
    run = ioproc("import", PERF, STRACE, "-o", tmp_path / "x")
    assert run.returncode == 0
    assert "37153 events" in run.stderr


def test_info_as_json(history):
    information = json.loads(ioproc("info", "--json", history).stdout)
    assert information["operations"]["fault"] == 35454
    assert information["metadata"]["untraced_s"] == 0.5
    assert information["metadata"]["import"]["excluded_faults"] == 277


def test_replay_as_text(history):
    run = ioproc("replay", history, "--placement", "vma", "--share", "0.1", "--kind", "buffers")
    assert (run.returncode, run.stderr) == (0, "")
    lines = [line.split() for line in run.stdout.splitlines()]
    assert ["fault", "35454", "35454", "2", "present"] in lines     # events, inferred (access), and what differs
    assert ["exec", "3", "0"] in lines
    assert ["all", "37153"] == next(line for line in lines if line[:1] == ["all"])[:2]
    assert sum(line[:1] == ["event"] for line in lines) == 2
    assert {"update_page", "release", "useful", "registrations", "vmas", "ns"} <= {line[0] for line in lines if line}


def test_replay_as_json(history):
    nothing, whole, vma = (json.loads(ioproc("replay", "--json", history, *more).stdout) for more in (
        [], ["--placement", "mm"], ["--placement", "vma", "--share", "0.1", "--seed", 1]))
    assert (nothing["placement"], nothing["calls"], nothing["useful_share"]) == ("none", 0, None)
    assert whole["calls"] >= whole["operations"]["fault"] - 2
    assert whole["useful_share"] == 0               # it has no comm events and nothing was chosen
    assert 0 < vma["calls"] < whole["calls"]
    assert 0 < vma["communication"]["bytes"] <= 0.1 * vma["communication"]["candidate_bytes"]
    assert vma["registrations"] + vma["register_failures"] == vma["communication"]["registrations"]
    assert nothing["differences"] == whole["differences"] == vma["differences"] == {"fault": {"present": 2}}


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["info", "replay"])
def test_a_closed_pipe_is_no_error(history, command, buffered):
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "ioproc", command, history], stdout=write, stderr=subprocess.PIPE,
                         text=True, check=False, env=os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"})
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "")


def test_lenient_import_and_communication(tmp_path):
    (tmp_path / "strace").write_text("1 1.000000 brk(NULL) = 0x9000 <0.000001>\nwhat?\n")
    (tmp_path / "comm").write_text("1.5,1,0x1000,16,send\nwhat?\n")
    run = ioproc("import", "--strace", "strace", "--comm", "comm", "-o", "a", cwd=tmp_path)
    assert run.returncode == 3
    assert run.stderr == "ioproc: strace:2: not a line of strace -f -ttt -T\n"
    assert not (tmp_path / "a").exists()
    run = ioproc("import", "--strace", "strace", "--comm", "comm", "--lenient", "-o", "a", cwd=tmp_path)
    assert run.returncode == 0
    assert "2 broken lines skipped" in run.stderr
    assert Trace.load(tmp_path / "a").events["op"].tolist() == [Op.BRK, Op.COMM]


@pytest.mark.parametrize(("arguments", "status", "message"), [
    ([], 2, "usage"),
    (["replicate"], 2, "invalid choice"),
    (["info"], 2, "required"),
    (["info", "none"], 3, "No such file"),
    (["info", "."], 3, "directory"),
    (["info", __file__], 3, "not an ioproc history"),
    (["info", STRACE], 3, "not an ioproc history"),
    (["replay", "none"], 3, "No such file"),
    (["replay", STRACE], 3, "not an ioproc history"),
    (["replay", STRACE, "--share", "1.5"], 2, "0 to 1"),
    (["replay", STRACE, "--share", "all"], 2, "0 to 1"),
    (["replay", STRACE, "--seed", "-1"], 2, "negative"),
    (["replay", STRACE, "--seed", "1"], 2, "give --share"),
    (["replay", STRACE, "--kind", "buffers"], 2, "give --share"),
    (["import", "-o", "x"], 2, "give what strace and perf wrote"),
    (["import", PERF, "-o", "x"], 2, "page faults alone"),
    (["import", "--perf", PERF, "-o", "x"], 2, "page faults alone"),
    (["import", POINTS, PERF, "-o", "x"], 2, "give it alone"),
    (["import", POINTS, POINTS, "-o", "x"], 2, "both a recording by tracepoints"),
    (["import", STRACE, "--strace", STRACE, "-o", "x"], 2, "both a recording by strace"),
    (["import", "none", "-o", "x"], 3, "No such file"),
    (["import", __file__, "-o", "x"], 3, "neither strace's nor perf script's output"),
    (["import", "--tracepoints", PERF, "-o", "x"], 3, ":1: not a line of perf script --ns -F trace"),
    (["import", "--strace", "none", "-o", "x"], 3, "No such file"),
    (["import", "--strace", STRACE, "--perf", STRACE, "-o", "x"], 3, ":1: not a line of perf"),
    (["import", "--strace", PERF, "-o", "x"], 3, ":1: not a line of strace"),
    (["import", "--strace", STRACE, "-o", "no/where"], 2, "cannot write"),
    (["import", "--strace", STRACE, "-o", "."], 2, "cannot write"),
    (["import", "--strace", STRACE, "-o", "x", "--set", "files=3"], 2, "NAME=VALUE"),
    (["import", "--strace", STRACE, "-o", "x", "--set", "untraced_s=soon"], 2, "number of seconds"),
    (["record", "-o", "x"], 2, "no command"),
    (["record", "-o", "x", "--", "no-such-command-here"], 2, "no such command"),
    (["record", "-o", "x", "--untraced-runs", "-1", "--", "true"], 2, "must not be negative"),
    (["record", "-o", "x", "--untraced-runs", "x", "--", "true"], 2, "must be a whole number"),
    (["record", "-o", "x", "--with", "bpf", "--", "true"], 2, "invalid choice"),
    (["record", "-o", "x", "--comm", "/", "--", "touch", "started"], 2, "cannot read /"),
    (["record", "-o", "x", "--keep", __file__, "--", "touch", "started"], 2, "cannot keep anything in"),
    (["record", "-o", "x", "--keep", f"{__file__}/deeper", "--", "touch", "started"], 2, "cannot keep anything in"),
])
def test_mistakes(tmp_path, arguments, status, message):
    run = ioproc(*arguments, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (status, "")
    assert message in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_version():
    run = ioproc("--version")
    assert (run.returncode, run.stdout) == (0, f"ioproc {version}\n")


def test_replay_without_communication_says_so(history):
    run = ioproc("replay", history, "--placement", "mm")
    assert (run.returncode, run.stderr) == (0, "ioproc: this history tells of no communication: give --share\n")
    assert ioproc("replay", history).stderr == ""


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "strace").write_text("1 1.000000 brk(NULL) = 0x9000 <0.000001>\n")
    ioproc("import", "--strace", "strace", "-o", "a", cwd=tmp_path)
    run = subprocess.run([sys.executable, "-m", "ioproc", "info", tmp_path / "a"], stdout=open(tmp_path / "out", "w"),
                         stderr=subprocess.PIPE, text=True, check=False,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert (run.returncode, run.stderr) == (2, "ioproc: standard output: File too large\n")


@pytest.mark.parametrize("name", ["fifo", "link"])
@pytest.mark.parametrize("command", [["record", "--", "touch", "started"], ["import", "--strace", "strace"]])
def test_only_a_regular_file_is_replaced(tmp_path, name, command):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "strace").write_text("1 1.000000 brk(NULL) = 0x9000 <0.000001>\n")
    run = ioproc(command[0], "-o", name, *command[1:], cwd=tmp_path)
    assert (run.returncode, run.stderr) == (2, f"ioproc: cannot write {name}: not a regular file\n")
    assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link", "strace"]


@pytest.mark.parametrize("command", [["record", "--", "touch", "started"], ["import", "--strace", "none"]])
def test_a_missing_compressor_is_noticed_first(tmp_path, command):
    (tmp_path / "zstandard.py").write_text("raise ImportError")
    run = ioproc(command[0], "-o", "a.zst", *command[1:], cwd=tmp_path,
                 env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert run.returncode == 2
    assert run.stderr == "ioproc: cannot write a.zst: reading and writing .zst needs the package zstandard\n"
    assert not (tmp_path / "started").exists()


def test_import_without_faults_says_so(tmp_path):
    (tmp_path / "strace").write_text("1 1.000000 brk(NULL) = 0x9000 <0.000001>\n")
    run = ioproc("import", "--strace", "strace", "-o", "a", "--character", "static", "--set", "command=a\nb", cwd=tmp_path)
    assert run.returncode == 0
    assert run.stderr.startswith("ioproc: no page faults: only mappings are replayed\n")
    assert Trace.load(tmp_path / "a").metadata["character"] == "static"
    shown = ioproc("info", "a", cwd=tmp_path).stdout
    assert "a\\nb" in shown
    assert "static" in shown


def test_a_history_cannot_steer_the_terminal(tmp_path):
    (tmp_path / "strace").write_text("1 1.000000 brk(NULL) = 0x9000 <0.000001>\n")
    ioproc("import", "--strace", "strace", "-o", "a", "--set", "command=\x1b[2Jhello", cwd=tmp_path)
    assert "?[2Jhello" in ioproc("info", "a", cwd=tmp_path).stdout


@pytest.mark.parametrize("missing", ["strace", "perf"])
def test_record_without_its_tools(tmp_path, missing):
    """A PATH that has everything but one tool."""
    for tool in {"strace", "perf", "true"} - {missing}:
        (tmp_path / tool).symlink_to("/bin/true")
    run = ioproc("record", "-o", tmp_path / "x", "--", "true", env={**os.environ, "PATH": str(tmp_path)})
    assert (run.returncode, run.stderr) == (2, f"ioproc: {missing} is not installed\n")


def test_record_where_tracing_is_forbidden(tmp_path):
    for tool in ("strace", "perf"):
        (tmp_path / tool).symlink_to("/bin/true")
    run = ioproc("record", "-o", tmp_path / "x", "--untraced-runs", "0", "--", "true",
                 env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert run.returncode == 2
    assert "may not trace here" in run.stderr


def can_record():
    try:
        return subprocess.run(["perf", "record", "-q", "-o", "/dev/null", "-e", "page-faults:u", "-c", "1", "-d", "strace", "-f",
                               "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_record(), reason="strace or perf is missing or may not trace")
def test_record(tmp_path):
    run = ioproc("record", "-o", "a.xz", "--untraced-runs", "1", "--keep", "kept", "--", "sh", "-c", "echo out; ls | wc",
                 cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("out\n")
    assert run.stdout.count("out\n") == 1
    trace = Trace.load(tmp_path / "a.xz")
    assert trace.metadata["command"] == "sh -c 'echo out; ls | wc'"
    assert trace.metadata["untraced_s"] > 0
    summary = trace.summary()
    assert summary["operations"]["exec"] >= 2
    assert summary["operations"]["exit"] == summary["processes"]
    assert trace.metadata["import"]["unmapped"] == 0
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["perf", "strace"]


@pytest.mark.skipif(not can_record(), reason="strace or perf is missing or may not trace")
def test_record_of_a_command_that_fails(tmp_path):
    run = ioproc("record", "-o", tmp_path / "x", "--untraced-runs", "1", "--character", "short", "--", "sh", "-c", "exit 3",
                 "not UTF-8: \udcff")
    assert run.returncode == 0
    assert run.stderr.startswith("ioproc: the command ended with status 3\n")
    trace = Trace.load(tmp_path / "x")
    assert (trace.metadata["status"], trace.metadata["character"]) == (3, "short")
    assert trace.summary()["operations"]["exit"] == 1


@pytest.mark.skipif(not can_record(), reason="strace or perf is missing or may not trace")
def test_record_of_a_command_that_is_killed(tmp_path):
    run = ioproc("record", "-o", tmp_path / "x", "--untraced-runs", "0", "--", "sh", "-c", "kill -9 $$")
    assert run.returncode == 0
    assert run.stderr.startswith("ioproc: the command ended with signal 9\n")


@pytest.mark.skipif(not can_record(), reason="strace or perf is missing or may not trace")
def test_record_runs_what_path_finds_first(tmp_path):
    """perf puts /usr/bin first on the PATH of what it starts; both the command and what it calls are the user's."""
    path = f"{tmp_path}:{os.environ['PATH']}"
    (tmp_path / "env").write_text(f'#!/bin/sh\necho "$PATH" >> "{tmp_path}/log"\nexec id\n')
    (tmp_path / "id").write_text(f'#!/bin/sh\necho id >> "{tmp_path}/log"\n')
    for name in ("env", "id"):
        (tmp_path / name).chmod(0o755)
    run = ioproc("record", "-o", tmp_path / "x", "--untraced-runs", "1", "--", "env", env=os.environ | {"PATH": path})
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "log").read_text().split() == [path, "id", path, "id"]
    assert Trace.load(tmp_path / "x").metadata["command"] == "env"


def test_communication_that_cannot_be_read_costs_no_recording(tmp_path):
    if not can_record():
        pytest.skip("strace or perf is missing or may not trace")
    run = ioproc("record", "-o", "x", "--untraced-runs", "0", "--comm", "comm", "--", "true", cwd=tmp_path)
    assert run.returncode == 3
    assert "comm: No such file" in run.stderr
    assert Trace.load(tmp_path / "x").summary()["operations"]["exec"] == 1


WITH_TRACEFS = ["unshare", "--mount", "sh", "-c", 'mount -t tracefs nodev /sys/kernel/tracing 2>/dev/null; exec "$@"', "sh"]


def by_perf(directory, *command, **options):
    """Record with perf alone, tracefs mounted for this only."""
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        run = subprocess.run([*WITH_TRACEFS, sys.executable, "-P", "-m", "ioproc", "record", "--with", "perf", "-o", "x",
                              "--untraced-runs", "0", *map(str, command)], capture_output=True, text=True, check=False,
                             cwd=directory, **({"env": path} | options))
    except OSError as error:
        pytest.skip(f"unshare: {error.strerror}")
    assert "Traceback" not in run.stderr
    if any(text in run.stderr for text in ("tracepoints cannot be read", "perf may not", "perf is not installed", "unshare:")):
        pytest.skip(run.stderr.strip())
    return run


def test_record_with_perf_alone(tmp_path):
    run = by_perf(tmp_path, "--keep", "kept", "--", "sh", "-c", "echo out; ls | wc; exit 3")
    assert (run.returncode, run.stdout.splitlines()[0]) == (0, "out")
    assert "status 3" in run.stderr
    trace = Trace.load(tmp_path / "x")
    summary, counts = trace.summary(), trace.metadata["import"]
    assert (summary["operations"]["exec"], summary["operations"]["exit"]) == (3, 3)
    assert summary["inferred"] == {"events": 0, "access": 0, "file": 0, "size": 0}
    assert summary["faults"]["unknown"] == counts["unmapped"] == counts["tracepoints"]["lost"] == 0
    assert summary["faults"]["kernel"] > 0
    assert trace.metadata["recorded"].startswith("perf ")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["tracepoints"]
    again = ioproc("import", tmp_path / "kept" / "tracepoints", "-o", tmp_path / "y")
    assert again.returncode == 0
    assert (Trace.load(tmp_path / "y").events == trace.events).all()


def test_record_with_perf_alone_runs_what_path_finds_first(tmp_path):
    path = f"{tmp_path}:{os.environ['PATH']}"
    (tmp_path / "id").write_text(f'#!/bin/sh\necho "$PATH" > "{tmp_path}/log"\n')
    (tmp_path / "id").chmod(0o755)
    run = by_perf(tmp_path, "--", "sh", "-c", "id", env=os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.returncode == 0
    assert (tmp_path / "log").read_text().strip() == path


def test_record_with_perf_alone_where_there_are_no_tracepoints(tmp_path):
    (tmp_path / "perf").symlink_to("/bin/true")
    run = subprocess.run([sys.executable, "-P", "-c", "import sys, pathlib, ioproc.trace.record as r, ioproc.__main__ as m\n"
                          f"r.TRACEFS = [pathlib.Path({str(tmp_path)!r})]\nsys.exit(m.main(sys.argv[1:]))",
                          "record", "--with", "perf", "-o", tmp_path / "x", "--", "true"], capture_output=True, text=True,
                         check=False, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}",
                                                        "PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.returncode == 2
    assert run.stderr == ("ioproc: tracepoints cannot be read here: that needs root, and a mounted tracefs "
                          "(mount -t tracefs nodev /sys/kernel/tracing)\n")
