"""Threads that share one PhysicalMemory beside processes that each have their own: the same work, in turns.

``python benchmarks/threads.py WORK [TURNS]`` prints, for each turn, the seconds that WORKERS threads took and the seconds that
as many processes took.  Each worker has an address space of its own.
"""
from __future__ import annotations

import mmap
import multiprocessing
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import ioproc
import workloads
from ioproc import _core
from ioproc.trace import player

WORKERS = 2
PAGE, PAGES = workloads.PAGE, workloads.PAGES
FRAMES = 3 * WORKERS * PAGES        # also for the processes: the same work in every respect


def fault(mem, times=200):
    """First touch of 64 MiB and giving it back, over and over: calls of some 100 microseconds."""
    with ioproc.AddressSpace(mem) as mm:
        addr = mm.mmap(PAGES * PAGE)
        for _ in range(times):
            mm.touch(addr, PAGES * PAGE, write=True)
            mm.madvise(addr, PAGES * PAGE, mmap.MADV_DONTNEED)


def fork(mem, times=60):
    """fork of 64 MiB, a write to every page of the child, exit."""
    with ioproc.AddressSpace(mem) as mm:
        addr = mm.mmap(PAGES * PAGE)
        mm.touch(addr, PAGES * PAGE, write=True)
        for _ in range(times):
            with mm.fork() as child:
                child.touch(addr, PAGES * PAGE, write=True)


HISTORY = workloads.generated_history(100_000)


def replay(mem, times=8):
    """A history of 100,000 events in one call."""
    for _ in range(times):
        _core.Player(mem, [], None, 0).run(HISTORY.events, np.empty(0, player.REGISTRATION))


def small_calls(mem, times=10_000):
    """Calls of less than a microsecond: every one takes the interpreter's lock (GIL) again, which the threads share."""
    with ioproc.AddressSpace(mem) as mm:
        addr = mm.mmap(64 * PAGE)
        for _ in range(times):
            mm.mprotect(addr + PAGE, PAGE, mmap.PROT_READ)
            mm.mprotect(addr + PAGE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
            mm.touch(addr, PAGE, write=True)
            mm.madvise(addr, PAGE, mmap.MADV_DONTNEED)


WORK = {work.__name__: work for work in (fault, fork, replay, small_calls)}


def timed(work, mem, ready) -> tuple[float, float]:
    """When the work began and ended; `ready()` waits for the others."""
    work(mem, 2)                            # its pool and its heap are warm
    ready()
    begin = time.perf_counter()
    work(mem)
    return begin, time.perf_counter()


def spent(times) -> float:
    return max(end for _, end in times) - min(begin for begin, _ in times)


def threads(work) -> float:
    mem = ioproc.PhysicalMemory(frames=FRAMES)
    barrier = threading.Barrier(WORKERS)
    with ThreadPoolExecutor(WORKERS) as pool:
        return spent(list(pool.map(lambda _: timed(work, mem, barrier.wait), range(WORKERS))))


def processes(work) -> float:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(WORKERS), context.SimpleQueue()

    def worker():
        results.put(timed(work, ioproc.PhysicalMemory(frames=FRAMES), barrier.wait))

    started = [context.Process(target=worker) for _ in range(WORKERS)]
    for process in started:
        process.start()
    times = [results.get() for _ in started]
    for process in started:
        process.join()
    return spent(times)


def main(arguments) -> int:
    if not arguments or arguments[0] not in WORK:
        print("usage: threads.py WORK [TURNS]\nwork:", *WORK, file=sys.stderr)
        return 2
    work = WORK[arguments[0]]
    workloads.keep_heap()
    for _ in range(int(arguments[1]) if arguments[1:] else 15):
        print(f"{threads(work):.6f} {processes(work):.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
