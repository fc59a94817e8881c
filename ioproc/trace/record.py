"""Recording a command: strace for the system calls, perf for the page faults, both on one clock."""
from __future__ import annotations

import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from .infer import import_recording

__all__ = ["RecordError", "record"]

# Variables that change what an allocator asks the kernel for.
ALLOCATOR = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_",
             "GLIBC_TUNABLES", "LD_PRELOAD", "PYTHONMALLOC", "OMP_NUM_THREADS")


class RecordError(Exception):
    """The command cannot be recorded here; the message says why, in one line."""


def record(command, *, untraced_runs=3, comm=None, keep=None, cwd=None, quiet=False):
    """Run a command under strace and perf, and import what they saw.

    Parameters
    ----------
    command : list of str
        The program and its arguments; found on PATH, and started by its absolute path.
    untraced_runs : int
        How often to run it without tracing first, for its wall time (the median); 0 for not at all.
    comm : path-like, optional
        Communication the command writes by itself, as `annotate` reads it.
    keep : path-like, optional
        A directory to keep the two texts in, as ``strace`` and ``perf``.
    cwd : path-like, optional
        Where to run the command.
    quiet : bool
        Discard the command's output, which otherwise appears once, from the traced run.

    Returns
    -------
    Trace
        Also of a command that fails: its status is ``metadata["status"]``, the traced run's or else an untraced one's.

    Raises
    ------
    RecordError
        strace or perf is missing or may not trace, or the command cannot be started.
    """
    tools = {}
    for tool in ("strace", "perf"):
        tools[tool] = shutil.which(tool)
        if tools[tool] is None:
            raise RecordError(f"{tool} is not installed")
    # What has no directory is looked for on PATH, everything else starts where the command will run.
    named = os.path.join(cwd or "", command[0]) if os.path.dirname(command[0]) else command[0]
    program = shutil.which(named)
    if program is None:
        raise RecordError(f"no such command: {command[0]}")
    program = [os.path.abspath(program), *command[1:]]
    output = subprocess.DEVNULL if quiet else None
    times = [_timed(program, cwd) for _ in range(untraced_runs)]
    with tempfile.TemporaryDirectory(prefix="ioproc-") as scratch:
        calls, samples, faults = (Path(scratch, name) for name in ("strace", "perf.data", "perf"))
        options = ["-f", "-y", "--seccomp-bpf", "-ttt", "-T", "-X", "raw", "-e", "trace=memory,process"]
        # A larger buffer loses less, and only root may have it by default.
        buffer = ["-m", "1024"] if os.geteuid() == 0 else []
        # perf puts its own directory first on the PATH of what it starts; the command gets ours.
        path = ["-E", f"PATH={os.environ['PATH']}" if "PATH" in os.environ else "PATH"]
        status = _status([tools["perf"], "record", "-q", "-e", "page-faults:u", "-c", "1", "-d", "-k", "CLOCK_REALTIME",
              *buffer, "-o", str(samples), "--",
              tools["strace"], *options, *path, "-o", str(calls), "--", *program], cwd, output)
        if not calls.exists() or not calls.stat().st_size or not samples.exists():
            raise RecordError("strace or perf may not trace here (see kernel.perf_event_paranoid and "
                              "kernel.yama.ptrace_scope)")
        with open(faults, "wb") as out:
            script = [tools["perf"], "script", "--ns", "-F", "pid,tid,time,addr,ip", "--show-mmap-events", "--show-lost-events",
                      "-i", str(samples)]
            _run(script, cwd, out)
        if keep is not None:
            Path(keep).mkdir(parents=True, exist_ok=True)
            shutil.copy(calls, Path(keep, "strace"))
            shutil.copy(faults, Path(keep, "perf"))
        failed = [number for number in (status, *(number for *_, number in times)) if number]
        return import_recording(calls, faults, comm=comm, metadata={
            "command": shlex.join(command),
            "host": _cpu(),
            "kernel": platform.release(),
            "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ},
            "untraced_s": _median(wall for wall, *_ in times),
            "untraced_cpu_s": _median(cpu for _, cpu, _ in times),
            "recorded": f"{_version(tools['strace'])} {' '.join(options)}; {_version(tools['perf'])} record "
                        "-e page-faults:u -c 1 -d -k CLOCK_REALTIME",
            **({"status": failed[0]} if failed else {}),
        })


def _timed(command, cwd):
    """Wall and processor time of a run without tracing, and its status."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    status = _status(command, cwd, subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, status


def _median(values):
    values = list(values)
    return round(statistics.median(values), 6) if values else None


def _run(command, cwd, output):
    status = _status(command, cwd, output)
    if status:
        raise RecordError(f"{Path(command[0]).name} {command[1]} ends with status {status}")


def _status(command, cwd, output):
    try:
        return subprocess.run(command, cwd=cwd, stdout=output, check=False).returncode
    except OSError as error:
        raise RecordError(f"{command[0]}: {error.strerror}") from None


def _version(tool):
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    return text.partition("\n")[0].replace(" -- version", "").replace(" version", "")


def _cpu():
    """The kind of machine, not its name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} CPUs"
