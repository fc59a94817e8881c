"""The NIC's translation cache beside other simulators and a C program: rows for the table, and the program that takes turns.

``python benchmarks/translation.py SIMULATOR PAGES [REPETITIONS | -]``, as workloads.py: `PAGES` is a file of 64-bit page numbers.
pycachesim and libcachesim (the extra `simulators`) are compared with where they are installed.
"""
from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import ioproc
import paired
import workloads

PAGES = 10_000_000
ENTRIES, WAYS = 1024, 16        # as in c/translation_cache.c
STREAMS = ("uniform", "zipf", "sequential")


def stream(kind, pages=PAGES) -> np.ndarray:
    """Page numbers: any of 4096 pages alike, 65,536 with Zipf's law (exponent 0.99), or each once."""
    rng = np.random.default_rng(1)
    if kind == "uniform":
        return rng.integers(4 * ENTRIES, size=pages, dtype=np.uint64)
    if kind == "zipf":
        share = np.cumsum(np.arange(1, 65_537) ** -0.99)
        rank = np.searchsorted(share, rng.random(pages) * share[-1])
        return rng.permutation(65_536).astype(np.uint64)[rank]
    return np.arange(pages, dtype=np.uint64)


def save(pages) -> Path:
    """Write pages to a file, for the programs; it goes with this process."""
    path = Path(tempfile.mkdtemp(dir=paired.scratch())) / "pages"
    pages.tofile(path)
    return path


def model(path):
    """``TranslationCache.access``, the check of its argument included."""
    pages = np.fromfile(path, np.uint64)
    return workloads.Workload("model", len(pages), lambda: (ioproc.TranslationCache(ENTRIES, WAYS),),
                              lambda cache: cache.access(pages), lambda cache: None)


def _cachesim():
    import cachesim
    memory = cachesim.MainMemory()
    level = cachesim.Cache("translations", ENTRIES // WAYS, WAYS, 1, "LRU")
    memory.load_to(level)
    memory.store_from(level)
    return cachesim.CacheSimulator(level, memory)


def pycachesim(path):
    """pycachesim's loop in C over a list; the list is made beforehand."""
    addresses = np.fromfile(path, np.uint64).tolist()
    return workloads.Workload("pycachesim", len(addresses), lambda: (_cachesim(),),
                              lambda simulator: simulator.load(addresses), lambda simulator: None)


def pycachesim_range(path):
    """One load of the whole range, which is how pycachesim is fastest; the stream has to be the sequential one."""
    n = len(np.fromfile(path, np.uint64))
    return workloads.Workload("pycachesim_range", n, lambda: (_cachesim(),),
                              lambda simulator: simulator.load(0, length=n), lambda simulator: None)


def _libcachesim(path, entries):
    """An LRU cache and a reader of the pages, written beside them in a format that libcachesim reads."""
    import libcachesim
    records = path.with_suffix(".oracleGeneral.bin")
    if not records.exists():
        pages = np.fromfile(path, np.uint64)
        rows = np.zeros(len(pages), [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
        rows["id"], rows["size"], rows["next"] = pages + 1, 1, -2
        rows.tofile(records)
    return libcachesim.LRU(entries), libcachesim.TraceReader(str(records), libcachesim.TraceType.ORACLE_GENERAL_TRACE)


def model_one_set(path):
    """The model, fully associative."""
    pages = np.fromfile(path, np.uint64)
    return workloads.Workload("model_one_set", len(pages), lambda: (ioproc.TranslationCache(ENTRIES),),
                              lambda cache: cache.access(pages), lambda cache: None)


def libcachesim(path):
    """libcachesim's loop in C over a file of requests, fully associative."""
    path = Path(path)
    return workloads.Workload("libcachesim", path.stat().st_size // 8, lambda: _libcachesim(path, ENTRIES),
                              lambda cache, reader: cache.process_trace(reader), lambda cache, reader: None)


def hit_curve(path):
    """Hits of all sizes at once."""
    pages = np.fromfile(path, np.uint64)
    return workloads.Workload("hit_curve", len(pages), lambda: (), lambda: ioproc.hit_curve(pages), lambda: None)


SIMULATORS = (model, pycachesim, pycachesim_range, model_one_set, libcachesim, hit_curve)
workloads.WORKLOADS |= {w.__name__: w for w in SIMULATORS}


def installed(package) -> bool:
    return importlib.util.find_spec(package) is not None


def hits(path) -> dict[str, int]:
    """Return the hits of every simulator that is here: `model`, `c`, `pycachesim`; `model_one_set`, `libcachesim`."""
    pages = np.fromfile(path, np.uint64)
    found = {"model": ioproc.TranslationCache(ENTRIES, WAYS).access(pages),
             "model_one_set": ioproc.TranslationCache(ENTRIES).access(pages),
             "c": int(subprocess.check_output([*paired.c_command("translation_cache", path), "hits"]))}
    if installed("cachesim"):
        simulator = _cachesim()
        simulator.load(pages.tolist())
        found["pycachesim"] = simulator.first_level.backend.HIT_count
    if installed("libcachesim"):
        cache, reader = _libcachesim(path, ENTRIES)
        found["libcachesim"] = round((1 - cache.process_trace(reader)[0]) * len(pages))
    return found


def measure(path, *simulators, rounds=4, launches=2) -> dict[str, np.ndarray]:
    """Sample the simulators, of which `c` is the C program, in turns."""
    return paired.take_turns({name: (paired.c_command("translation_cache", path) if name == "c" else
                                     [sys.executable, __file__, name, path],) for name in simulators}, rounds, launches)


def _lookups(row, kind, path, turns):
    counted = hits(path)
    same = counted["model"] == counted["c"] == counted.get("pycachesim", counted["model"])
    what = f"translation cache, 16-way LRU, {PAGES:,} pages, {kind}"
    others = ["pycachesim"] * installed("cachesim") + ["pycachesim_range"] * (installed("cachesim") and kind == "sequential")
    samples = measure(path, "model", "c", *others, **turns)
    r = paired.compare(samples["model"], samples["c"])
    row(what, "at most 1.2x C", f"{r.a:.1f} ns, C {r.b:.1f} ns: {r.ratio:.2f}x [{r.low:.2f}, {r.high:.2f}]; "
        f"{counted['model']:,} hits, {'the same' if counted['model'] == counted['c'] else 'C another number'}",
        r.ratio <= 1.2 and counted["model"] == counted["c"], **r._asdict())
    for other in others:
        r = paired.compare(samples[other], samples["model"])
        row(f"{what}: against {other.replace('_range', ', one load of the range')}",
            "at least 2.5x faster, the same hits", f"{r.a:.1f} ns: {r.ratio:.2f}x [{r.low:.2f}, {r.high:.2f}]; "
            f"{'the same hits' if same else 'not the same hits'}", r.ratio >= 2.5 and same, **r._asdict())


def _one_set(row, kind, path, turns):
    counted = hits(path)
    same = counted["model_one_set"] == counted["libcachesim"]
    samples = measure(path, "model_one_set", "libcachesim", **turns)
    r = paired.compare(samples["libcachesim"], samples["model_one_set"])
    row(f"translation cache, one set, {kind}: against libcachesim's LRU", "the same hits",
        f"{counted['libcachesim']:,} hits, {'the same' if same else 'not the same'}; {r.b:.1f} ns, libcachesim {r.a:.0f} ns: "
        f"{r.ratio:.1f}x", same, **r._asdict())


def rows(row, **turns):
    """Add the rows to the table."""
    for kind in STREAMS:
        path = save(stream(kind))
        _lookups(row, kind, path, turns)
        if installed("libcachesim"):
            _one_set(row, kind, path, {"rounds": 1, "launches": 1})
        curve = measure(path, "hit_curve", rounds=1, launches=1)["hit_curve"]
        row(f"LRU hit curve of all sizes, {PAGES:,} pages, {kind}", "reported", f"{np.median(curve):.0f} ns a page")


if __name__ == "__main__":
    sys.exit(workloads.main(sys.argv[1:]))
