"""Programs measured in step: the model, its C counterpart and the kernel take turns.

What counts is their ratio.  Other load on the machine, its frequency and its caches change from one second to
the next; turns that are a few milliseconds apart see nearly the same machine, so the ratio of each turn is
compared, never figures of different runs.
"""
from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
ROUNDS = 8                      # for each launch of the programs
LAUNCHES = 6                    # where the heap lands differs from launch to launch: up to 15 % of the time


@functools.cache
def scratch() -> Path:
    """Return a temporary folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="ioproc-benchmarks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def c_programs() -> Path:
    """Compile the C programs; return their folder."""
    folder = scratch() / "c"
    subprocess.run(["make", "-s", "-C", HERE / "c", f"B={folder}"], check=True)
    return folder


def c_command(name, *arguments) -> list:
    return [c_programs() / name, *arguments]


def model_command(name, *arguments) -> list:
    return [sys.executable, HERE / "workloads.py", name, *arguments]


@functools.cache
def build(hooks: bool) -> Path:
    """Build this checkout, with the hooks or with the hooks compiled out; return the folder to import from.

    IOPROC_BENCHMARK_BUILDS names a folder where both are kept, and looked for, from one run to the next.
    """
    kept = os.environ.get("IOPROC_BENCHMARK_BUILDS")
    target = (Path(kept) if kept else scratch()) / ("hooks" if hooks else "no-hooks")
    if not (target / "ioproc").is_dir():
        source = scratch() / f"source-{target.name}"
        shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(
            ".git", "build", "*.so", "_core.c", "__pycache__", "tests", "docs", ".*cache"))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("IOPROC_")}
        if not hooks:
            environment["IOPROC_NO_HOOKS"] = "1"
        run = subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", target], cwd=source,
                             env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if run.returncode:
            raise RuntimeError(f"building the package failed:\n{run.stdout[-2000:]}")
        shutil.rmtree(source)
    return target


class Program:
    """A running benchmark program; each `sample` is one turn.

    Parameters
    ----------
    command : list
        From `c_command` or `model_command`, with the units.
    path : pathlib.Path, optional
        Where the model imports the package from, if not from where this process does.
    """

    def __init__(self, command: Iterable, path: Path | None = None):
        self.process = subprocess.Popen([str(c) for c in [*command, "-"]], env=environment(path), text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def sample(self) -> float:
        """Return the ns per unit of one turn."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            return float(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise RuntimeError(f"{' '.join(self.process.args)} failed") from None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def environment(path: Path | None = None) -> dict:
    """Return the environment of a program that imports the package from `path`, or as this process does."""
    paths = [str(path)] if path else [p for p in sys.path if p]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0",
            "OPENBLAS_NUM_THREADS": "1"}            # numpy's would spin on the other processor


class Ratio(NamedTuple):
    """The median of paired ratios and its 95 % interval, with the median of each side."""

    a: float
    b: float
    ratio: float
    low: float
    high: float


def compare(a, b, seed=1) -> Ratio:
    """Compare paired samples: the median of a/b and its bootstrap percentile interval."""
    a, b = np.asarray(a), np.asarray(b)
    ratios = a / b
    picks = np.random.default_rng(seed).integers(len(ratios), size=(4000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(a)), float(np.median(b)), float(np.median(ratios)), float(low), float(high))


def take_turns(commands: dict[str, tuple], rounds=ROUNDS, launches=LAUNCHES) -> dict[str, np.ndarray]:
    """Launch the programs side by side and sample each in turn, `rounds` times; all that `launches` times.

    `commands` has the arguments of each `Program`.  The order alternates, so that none is always the first.
    """
    samples = {side: [] for side in commands}
    for _ in range(launches):
        with ExitStack() as stack:
            programs = {side: stack.enter_context(Program(*command)) for side, command in commands.items()}
            for i in range(rounds):
                for side in programs if i % 2 else reversed(programs):
                    samples[side].append(programs[side].sample())
    return {side: np.array(values) for side, values in samples.items()}


def works(command) -> bool:
    """Does the program run here, with what the machine has?"""
    return subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def pair(name, units, kernel=False, **turns) -> dict[str, np.ndarray]:
    """Run the model's workload, the C program of the same name and, if asked, the kernel's, in turns.

    `units` is what both programs take, or a tuple of what the model's and the C program take.
    """
    model_units, c_units = units if isinstance(units, tuple) else (units, units)
    commands = {"model": (model_command(name, model_units),), "c": (c_command(name, c_units),)}
    if kernel:
        commands["kernel"] = (c_command("kernel_" + name.removesuffix("_contents"), c_units),)
    return take_turns(commands, **turns)


def few_and_many(name, few, many, rounds=4, launches=2) -> dict[str, float]:
    """Compare a workload on many VMAs with the same on few, and the C program of that name if there is one."""
    commands = {"few": (model_command(name, few),), "many": (model_command(name, many),)}
    if (c_programs() / name).exists():
        commands |= {"c_few": (c_command(name, few),), "c_many": (c_command(name, many),)}
    samples = take_turns(commands, rounds, launches)
    result = compare(samples["many"], samples["few"])
    figures = {"few_ns": result.b, "many_ns": result.a, "ratio": result.ratio, "low": result.low, "high": result.high}
    if "c_few" in samples:
        c = compare(samples["c_many"], samples["c_few"])
        figures |= {"c_few_ns": c.b, "c_many_ns": c.a, "c_ratio": c.ratio}
    return figures


def threads_and_processes(work, turns=15) -> Ratio:
    """Compare what threads and processes reach: the processes' time by the threads', so that 1 is as good."""
    lines = subprocess.run([str(x) for x in (sys.executable, HERE / "threads.py", work, turns)], env=environment(),
                           check=True, text=True, stdout=subprocess.PIPE).stdout.split("\n")
    pairs = [[float(x) for x in line.split()] for line in lines if line]
    return compare([processes for _, processes in pairs], [threads for threads, _ in pairs])


def replay_in_out(events, rounds=5, launches=4) -> Ratio:
    """Compare the replay of a history with the hooks compiled in and out, in turns (20 by default)."""
    samples = take_turns({"in": (model_command("replay", events), build(True)),
                          "out": (model_command("replay", events), build(False))}, rounds, launches)
    return compare(samples["in"], samples["out"])


def instructions(command, path: Path | None = None) -> int:
    """Return the instructions a command executes, as callgrind counts them."""
    with tempfile.NamedTemporaryFile(dir=scratch()) as out:
        subprocess.run(["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out.name}",
                        *map(str, command)], env=environment(path), stdout=subprocess.DEVNULL, check=True)
        return int(re.search(r"^(?:summary|totals): (\d+)", Path(out.name).read_text(), re.M)[1])


def hooksite_instructions(pages=16384, sites_per_page=3) -> dict[str, float]:
    """Count the instructions of a hook site where nothing is registered, in the model and in the C program.

    Each program runs over `pages` and over twice as many, so that what it does only once drops out.
    """
    def per_page(command, path=None):
        few, many = (instructions([*command, n, 1], path) for n in (pages, 2 * pages))
        return (many - few) / pages / 2                 # a program repeats its work twice: once to warm up

    model, c = model_command("hooksite"), c_command
    return {"model": (per_page(model, build(True)) - per_page(model, build(False))) / sites_per_page,
            "c": (per_page(c("hooksite")) - per_page(c("hooksite_out"))) / sites_per_page}


def resident(command) -> dict[str, float]:
    """Return what a memory program prints, in bytes per page."""
    line = subprocess.run(list(map(str, command)), env=environment(), check=True, text=True,
                          stdout=subprocess.PIPE).stdout
    return {key: float(value) for key, value in re.findall(r"(\w+_bytes)=([\d.]+)", line)}
