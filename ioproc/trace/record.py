"""Recording a command: strace for the system calls and perf for the page faults, both on one clock; or perf for both."""
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
from collections.abc import Sequence
from pathlib import Path

from .format import Trace
from .infer import import_recording
from .source import FilePath

__all__ = ["RecordError", "record"]

# Variables that change what an allocator asks the kernel for.
ALLOCATOR = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_",
             "GLIBC_TUNABLES", "LD_PRELOAD", "PYTHONMALLOC", "OMP_NUM_THREADS")


class RecordError(Exception):
    """The command cannot be recorded here; the message says why, in one line."""


def record(command: Sequence[str], *, tracer: str = "strace", untraced_runs: int = 3, comm: FilePath | None = None,
           keep: FilePath | None = None, cwd: FilePath | None = None, quiet: bool = False) -> Trace:
    """Run a command under strace and perf, or perf alone, and import what they saw.

    Parameters
    ----------
    command : list of str
        The program and its arguments; found on PATH, and started by its absolute path.
    tracer : {"strace", "perf"}
        What records the system calls: strace, and perf the page faults of user mode, which anybody may do; or perf
        both of them as tracepoints, on one clock and with the kernel's faults, which only root may do.
    untraced_runs : int
        How often to run it without tracing first, for its wall time (the median); 0 for not at all.
    comm : path-like, optional
        Communication the command writes by itself, as `annotate` reads it.
    keep : path-like, optional
        A directory to keep the texts in, as ``strace`` and ``perf``, or ``tracepoints``.
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
        strace or perf is missing or may not trace, `keep` or `comm` cannot be used, or the command cannot be started.
    """
    if tracer not in TRACERS:
        raise ValueError(f"tracer = {tracer!r}: not one of {', '.join(TRACERS)}")
    run, needed = TRACERS[tracer]
    tools = {}
    for tool in needed:
        tools[tool] = shutil.which(tool)
        if tools[tool] is None:
            raise RecordError(f"{tool} is not installed")
    # What has no directory is looked for on PATH, everything else starts where the command will run.
    named = os.path.join(cwd or "", command[0]) if os.path.dirname(command[0]) else command[0]
    found = shutil.which(named)
    if found is None:
        raise RecordError(f"no such command: {command[0]}")
    program = [os.path.abspath(found), *command[1:]]
    if tracer == "perf":
        tracepoints()
    usable(keep, comm)
    output = subprocess.DEVNULL if quiet else None
    times = [_timed(program, cwd) for _ in range(untraced_runs)]
    with tempfile.TemporaryDirectory(prefix="ioproc-") as scratch:
        status, texts, options = run(tools, program, Path(scratch), cwd, output)
        if keep is not None:
            for name, text in texts.items():
                shutil.copy(text, Path(keep, name))
        failed = [number for number in (status, *(number for *_, number in times)) if number]
        return import_recording(**texts, comm=comm, metadata={
            "command": shlex.join(command),
            "host": _cpu(),
            "kernel": platform.release(),
            "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ},
            "untraced_s": _median(wall for wall, *_ in times),
            "untraced_cpu_s": _median(cpu for _, cpu, _ in times),
            "recorded": "; ".join(f"{_version(tools[tool])} {used}" for tool, used in options.items()),
            **({"status": failed[0]} if failed else {}),
        })


def usable(keep: FilePath | None, comm: FilePath | None) -> None:
    """Notice before the command runs, not after it, what could not be written or read; RecordError."""
    if comm is not None and os.path.lexists(comm) and not (os.path.isfile(comm) and os.access(comm, os.R_OK)):
        raise RecordError(f"cannot read {comm}")
    if keep is not None:
        try:
            Path(keep).mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise RecordError(f"cannot keep anything in {keep}: {getattr(error, 'strerror', None) or error}") from None
        if not os.access(keep, os.W_OK | os.X_OK):
            raise RecordError(f"cannot keep anything in {keep}: may not write there")
        for name in ("strace", "perf", "tracepoints"):
            if Path(keep, name).is_dir():
                raise RecordError(f"cannot keep anything in {keep}: its {name} is a directory")


def _strace(tools, program, scratch, cwd, output):
    """strace around the command, perf around strace; returns the status, the texts and the options."""
    calls, samples, faults = (scratch / name for name in ("strace", "perf.data", "perf"))
    tracing = ["-f", "-y", "--seccomp-bpf", "-ttt", "-T", "-X", "raw", "-e", "trace=memory,process"]
    sampling = ["-e", "page-faults:u", "-c", "1", "-d", "-k", "CLOCK_REALTIME"]
    # perf puts its own directory first on the PATH of what it starts; the command gets ours.
    path = ["-E", f"PATH={os.environ['PATH']}" if "PATH" in os.environ else "PATH"]
    status = _status([tools["perf"], "record", "-q", *sampling, *_buffer(), "-o", str(samples), "--",
                      tools["strace"], *tracing, *path, "-o", str(calls), "--", *program], cwd, output)
    if not calls.exists() or not calls.stat().st_size or not samples.exists():
        raise RecordError("strace or perf may not trace here (see kernel.perf_event_paranoid and "
                          "kernel.yama.ptrace_scope)")
    with open(faults, "wb") as out:
        _run([tools["perf"], "script", "--ns", "-F", "pid,tid,time,addr,ip", "--show-mmap-events", "--show-lost-events",
              "-i", str(samples)], cwd, out)
    return status, {"strace": calls, "perf": faults}, {"strace": " ".join(tracing), "perf": f"record {' '.join(sampling)}"}


def _perf(tools, program, scratch, cwd, output):
    """perf alone."""
    samples, text = scratch / "perf.data", scratch / "tracepoints"
    sampling = ["-c", "1", "-d", "-k", "CLOCK_MONOTONIC"]
    events = [option for event in tracepoints() for option in ("-e", event)]
    # perf puts the directory of its parts first on the PATH of what it starts; so the command gets ours.
    environment = dict(os.environ)
    first, _, rest = environment.get("PATH", "").partition(os.pathsep)
    if first and rest:
        environment |= {"PERF_EXEC_PATH": first, "PATH": rest}
    status = _status(["perf", "record", "-q", *events, *sampling, *_buffer(), "-o", str(samples), "--", *program],
                     cwd, output, executable=tools["perf"], env=environment)
    if not samples.exists() or not samples.stat().st_size:
        raise RecordError("perf may not trace here (see kernel.perf_event_paranoid)")
    with open(text, "wb") as out:
        _run([tools["perf"], "script", "--header", "--ns", "-F", "trace:pid,tid,time,event,trace", "--show-mmap-events",
              "--show-task-events", "--show-lost-events", "-i", str(samples)], cwd, out)
    return status, {"tracepoints": text}, {"perf": f"record -e {','.join(POINTS)} {' '.join(sampling)}"}


TRACERS = {"strace": (_strace, ("strace", "perf")), "perf": (_perf, ("perf",))}

CALLS = ("mmap", "munmap", "mprotect", "pkey_mprotect", "mremap", "brk", "madvise", "msync", "mlock", "mlock2", "munlock",
         "shmat", "shmdt", "clone", "clone3", "fork", "vfork", "execve", "execveat", "exit_group", "mlockall", "munlockall",
         "remap_file_pages", "process_madvise", "mseal")
POINTS = (f"syscalls:sys_{{enter,exit}}_{{{','.join(CALLS)}}}", "exceptions:page_fault_{user,kernel}",
          "task:task_newtask", "sched:sched_process_{exec,exit}")
TRACEFS = (Path("/sys/kernel/tracing/events"), Path("/sys/kernel/debug/tracing/events"))


def tracepoints() -> list[str]:
    """The tracepoints to record, of those that this kernel has; RecordError if they cannot be read."""
    for events in TRACEFS:
        if os.access(events / "exceptions/page_fault_user/id", os.R_OK):
            break
    else:
        raise RecordError("tracepoints cannot be read here: that needs root, and a mounted tracefs "
                          "(mount -t tracefs nodev /sys/kernel/tracing)")
    calls = [f"syscalls/sys_{end}_{name}" for name in CALLS for end in ("enter", "exit")]
    others = ["exceptions/page_fault_user", "exceptions/page_fault_kernel", "task/task_newtask",
              "sched/sched_process_exec", "sched/sched_process_exit"]
    return [name.replace("/", ":") for name in calls + others if (events / name).is_dir()]


def _buffer():
    """A larger buffer loses less, and only root may have it by default."""
    return ["-m", "1024"] if os.geteuid() == 0 else []


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


def _status(command, cwd, output, **options):
    try:
        return subprocess.run(command, cwd=cwd, stdout=output, check=False, **options).returncode
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
