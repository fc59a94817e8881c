"""A registration cache's hit, get and put, beside UCX's: rows for the table, and the program that takes turns with UCX's.

``python benchmarks/registration.py``: the rows; ``hit | hit_limited | hit_threaded | hit_python REGIONS [REPETITIONS | -]``:
one way, as workloads.py.  UCX's cache (`c/rcache_ucx.c`) needs the package libucx-cu12.
"""
from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

import ioproc
import paired
import workloads
from ioproc import _core

GETS = 200_000                  # as in c/rcache_ucx.c
GETS_PYTHON = 20_000
BASE, LENGTH, STRIDE = 0x7f0000000000, 16384, 32768
REGIONS = (1, 1000, 100_000)


def _cache(regions, **options):
    cache = ioproc.RegistrationCache(lambda start, length, access: None, lambda start, length, handle: None, **options)
    _core.get_and_put(cache, BASE + STRIDE * np.arange(regions, dtype=np.uint64), LENGTH)
    rng = np.random.default_rng(1)
    return cache, lambda n: BASE + STRIDE * rng.integers(regions, size=n, dtype=np.uint64)


def hit(regions=1000, **options):
    """Get and put a random one of so many registered buffers, by the C interface."""
    cache, choose = _cache(regions, **options)

    def run(addresses):
        assert _core.get_and_put(cache, addresses, LENGTH) == GETS

    return workloads.Workload("hit", GETS, lambda: (choose(GETS),), run, lambda addresses: None)


def hit_limited(regions=1000):
    """The same with a limit, which is not reached: the order of use is kept, as UCX always does."""
    return hit(regions, max_regions=regions)


def hit_threaded(regions=1000):
    """The same in a process that has another thread: its mutexes cost more."""
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return hit(regions)


def hit_python(regions=1000):
    """The same by calls from Python."""
    cache, choose = _cache(regions)

    def run(addresses):
        get, put = cache.get, cache.put
        for addr in addresses:
            put(get(addr, LENGTH))

    return workloads.Workload("hit_python", GETS_PYTHON, lambda: (choose(GETS_PYTHON).tolist(),), run, lambda addresses: None)


WAYS = {w.__name__: w for w in (hit, hit_limited, hit_threaded, hit_python)}
workloads.WORKLOADS |= WAYS


def ucx() -> Path | None:
    """Compile the program with UCX's cache; None: the package is not there."""
    package = importlib.util.find_spec("libucx")
    if package is None:
        return None
    folder, program = Path(package.origin).parent, paired.scratch() / "rcache_ucx"
    if not program.exists():
        subprocess.run(["cc", "-std=gnu11", "-O3", "-pthread", "-isystem", folder / "include", "-o", program,
                        paired.HERE / "c" / "rcache_ucx.c", "-L", folder / "lib", "-lucs", f"-Wl,-rpath,{folder / 'lib'}"],
                       check=True)
    return program


def measure(regions, **turns) -> dict[str, np.ndarray]:
    """Sample each way and, if it is there, UCX's cache, in turns."""
    commands = {name: ([sys.executable, __file__, name, regions],) for name in WAYS}
    if ucx() is not None:
        commands["ucx"] = ([ucx(), regions],)
    return paired.take_turns(commands, **turns)


def rows(row, **turns):
    """Add the rows to the table."""
    for regions in REGIONS:
        samples = measure(regions, **turns)
        what = f"registration cache, {regions:,} region{'s' * (regions > 1)}: hit (get and put)"
        ns = {name: float(np.median(samples[name])) for name in samples}
        others = (f"with a limit {ns['hit_limited']:.1f} ns, with another thread about {ns['hit_threaded']:.1f} ns, "
                  f"from Python {ns['hit_python']:.0f} ns")
        if "ucx" not in samples:
            row(what, "at most 1.3x UCX", f"{ns['hit']:.1f} ns; {others}; libucx-cu12 is not installed", **ns)
            continue
        r = paired.compare(samples["hit"], samples["ucx"])
        row(what, "at most 1.3x UCX",
            f"{r.a:.1f} ns, UCX {r.b:.1f} ns: {r.ratio:.2f}x [{r.low:.2f}, {r.high:.2f}]; {others}", r.ratio <= 1.3,
            **ns, **r._asdict())


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(workloads.main(sys.argv[1:]))
    rows(lambda what, target, measured, ok=None, **figures: print(f"{what}: {measured}", flush=True))
