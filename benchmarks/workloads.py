"""The model's side of each pair: what the C programs of the same names do, through the Python interface.

``python benchmarks/workloads.py NAME [UNITS [REPETITIONS | -]]`` prints what the C program prints: the
minimum and the median in ns per unit, or with ``-`` the ns per unit of a turn for each line of standard
input.
"""
from __future__ import annotations

import ctypes
import mmap
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ioproc
from ioproc import _core
from ioproc.trace import EVENT, Access, Op, Trace

PAGE = 4096
PAGES = 16384                   # the touched memory's frames and tables fit the second-level cache
HUGE_PAGES = 2048
HISTORY_EVENTS = 200_000
RECORDED = "hpcc.ioproc.xz"     # of the histories shipped with the package
TURN = 5                        # repetitions, of which the median counts: the first find cold caches
M_TRIM_THRESHOLD = -1


@dataclass(frozen=True)
class Workload:
    """One repetition: ``prepare()`` makes the arguments of ``run`` (measured), then of ``finish``."""

    name: str                   # also the C program's
    units: int
    prepare: Callable
    run: Callable
    finish: Callable

    def once(self) -> float:
        """Return the CPU time of one repetition in ns per unit."""
        arguments = self.prepare()
        begin = time.thread_time_ns()
        self.run(*arguments)
        spent = time.thread_time_ns() - begin
        self.finish(*arguments)
        return spent / self.units


def keep_heap():
    """Let the heap keep its pages between repetitions, as the C programs do."""
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _mapped(mem, pages):
    mm = ioproc.AddressSpace(mem)
    return mm, mm.mmap(pages * PAGE)


def _written(mem, pages):
    mm, addr = _mapped(mem, pages)
    mm.touch(addr, pages * PAGE, write=True)
    return mm, addr


def touch(pages=PAGES):
    """First touch, for writing."""
    mem = ioproc.PhysicalMemory(frames=pages + 64)
    length = pages * PAGE

    def run(mm, addr):
        mm.touch(addr, length, write=True)

    return Workload("touch", pages, lambda: _mapped(mem, pages), run, lambda mm, addr: mm.exit())


def unmap(pages=PAGES):
    """Unmap written pages."""
    mem = ioproc.PhysicalMemory(frames=pages + 64)
    length = pages * PAGE

    return Workload("unmap", pages, lambda: _written(mem, pages),
                    lambda mm, addr: mm.munmap(addr, length), lambda mm, addr: mm.exit())


def fork(pages=PAGES):
    """Fork an address space of written private pages."""
    mem = ioproc.PhysicalMemory(frames=pages + 64)
    children = []

    def prepare():
        mm, addr = _written(mem, pages)
        return (mm,)

    def finish(mm):
        children.pop().exit()
        mm.exit()

    return Workload("fork", pages, prepare, lambda mm: children.append(mm.fork()), finish)


def cow(pages=PAGES, contents=False):
    """Write to each page after a fork."""
    mem = ioproc.PhysicalMemory(frames=2 * pages + 128)
    length = pages * PAGE
    data = b"\1" * length if contents else b""

    def prepare():
        mm, addr = _mapped(mem, pages)
        if contents:
            mm.write(addr, data)
        else:
            mm.touch(addr, length, write=True)
        return mm, mm.fork(), addr

    def run(mm, child, addr):
        mm.touch(addr, length, write=True)

    def finish(mm, child, addr):
        child.exit()
        mm.exit()

    return Workload("cow_contents" if contents else "cow", pages, prepare, run, finish)


def cow_contents(pages=PAGES):
    """Write to each page after a fork, with contents to copy."""
    return cow(pages, contents=True)


def fault_reclaim(pages=PAGES):
    """Write to twice `pages` pages, around and around, in a memory of `pages` frames: each fault swaps in, a batch reclaims."""
    mem = ioproc.PhysicalMemory(frames=pages, swap_slots=2 * pages)
    length = 2 * pages * PAGE

    return Workload("fault_reclaim", 2 * pages, lambda: _written(mem, 2 * pages),
                    lambda mm, addr: mm.touch(addr, length, write=True), lambda mm, addr: mm.exit())


def swapin_write(pages=PAGES, write=True):
    """Write to swapped-out pages."""
    mem = ioproc.PhysicalMemory(frames=pages + 64, swap_slots=pages)
    length = pages * PAGE

    def prepare():
        mm, addr = _written(mem, pages)
        mem.reclaim(pages)
        return mm, addr

    return Workload("swapin_write" if write else "swapin_read", pages, prepare,
                    lambda mm, addr: mm.touch(addr, length, write=write), lambda mm, addr: mm.exit())


def swapin_read(pages=PAGES):
    """Read swapped-out pages."""
    return swapin_write(pages, write=False)


def reclaim(pages=PAGES, mappers=1):
    """Reclaim pages that have just been used: the clock's first turn passes them over, the second takes them."""
    mem = ioproc.PhysicalMemory(frames=pages + 64, swap_slots=pages)

    def prepare():
        mm, addr = _written(mem, pages)
        return mm, *(mm.fork() for _ in range(mappers - 1))

    def finish(*spaces):
        for mm in spaces:
            mm.exit()

    return Workload("reclaim" if mappers == 1 else f"reclaim_{mappers}", pages, prepare,
                    lambda *spaces: mem.reclaim(pages), finish)


def reclaim_16(pages=PAGES):
    """Reclaim pages that a process and its 15 children map."""
    return reclaim(pages, mappers=16)


def truncate(pages=PAGES, mappers=16, punch=False):
    """Truncate a file that 16 address spaces map to nothing, or make all of it a hole; `pages` are of all of them together."""
    each = pages // mappers
    length = each * PAGE
    mem = ioproc.PhysicalMemory(frames=each + 64)
    file = ioproc.File(mem, length)
    spaces = [ioproc.AddressSpace(mem) for _ in range(mappers)]
    addrs = [mm.mmap(length, flags=mmap.MAP_SHARED, file=file) for mm in spaces]

    def prepare():
        file.truncate(length)
        for mm, addr in zip(spaces, addrs, strict=True):
            mm.touch(addr, length, write=True)
        return ()

    return Workload("punch" if punch else "truncate", pages, prepare,
                    (lambda: file.punch_hole(0, length)) if punch else (lambda: file.truncate(0)), lambda: None)


def punch(pages=PAGES):
    """Punch a hole as long as the file."""
    return truncate(pages, punch=True)


def mlock(pages=PAGES):
    """Lock untouched memory: its pages are faulted in."""
    mem = ioproc.PhysicalMemory(frames=pages + 64)
    return Workload("mlock", pages, lambda: _mapped(mem, pages),
                    lambda mm, addr: mm.mlock(addr, pages * PAGE), lambda mm, addr: mm.exit())


def pin(pages=PAGES):
    """Pin written pages and unpin them."""
    mem = ioproc.PhysicalMemory(frames=pages + 64)
    length = pages * PAGE

    return Workload("pin", pages, lambda: _written(mem, pages),
                    lambda mm, addr: mem.unpin(mem.pin(mm, addr, length)), lambda mm, addr: mm.exit())


def hugetlb(pages=HUGE_PAGES):
    """Map huge pages, write to each, unmap them."""
    mem = ioproc.PhysicalMemory(frames=64, huge_pages=pages)
    length = pages << 21

    def run(mm):
        addr = mm.mmap(length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | ioproc.MAP_HUGETLB)
        mm.touch(addr, length, write=True)
        mm.munmap(addr, length)

    return Workload("hugetlb", pages, lambda: (ioproc.AddressSpace(mem),), run, lambda mm: mm.exit())


def pageout(pages=PAGES):
    """MADV_PAGEOUT of written pages."""
    mem = ioproc.PhysicalMemory(frames=pages + 64, swap_slots=pages)
    length = pages * PAGE

    return Workload("pageout", pages, lambda: _written(mem, pages),
                    lambda mm, addr: mm.madvise(addr, length, ioproc.MADV_PAGEOUT), lambda mm, addr: mm.exit())


def hooksite(pages=PAGES):
    """Pass three hook sites for each page with nothing registered, and those of fork and munmap.

    For each page the update of the touch, the invalidate and the update of the copy-on-write break; fork tests
    once for a page table, munmap once.
    """
    mem = ioproc.PhysicalMemory(frames=2 * pages + 128)
    length = pages * PAGE
    children = []

    def run(mm):
        addr = mm.mmap(length)
        mm.touch(addr, length, write=True)
        children.append(mm.fork())
        mm.touch(addr, length, write=True)
        mm.munmap(addr, length)

    def finish(mm):
        children.pop().exit()
        mm.exit()

    return Workload("hooksite", pages, lambda: (ioproc.AddressSpace(mem),), run, finish)


def dispatch(calls=PAGES):
    """Call update_page through a chain of one native ops, where nothing else happens."""
    mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64))
    addr = mm.mmap(PAGE)
    mm.register_ops(ioproc.CountingOps())
    return Workload("dispatch", calls,
                    lambda: (), lambda: _core._fire_update_page(mm, addr, calls), lambda: None)


def generated_history(events=HISTORY_EVENTS, buffer_pages=512):
    """Make the history of a program that maps a buffer, writes to its pages and unmaps it, over and over.

    Parameters
    ----------
    events : int
        How many events, rounded down to whole buffers.
    buffer_pages : int
        Faults for each mmap and munmap.

    Returns
    -------
    ioproc.Trace
    """
    rounds = max(1, events // (buffer_pages + 2))
    length = buffer_pages * PAGE
    addr = 0x7FFF00123000 + np.arange(rounds, dtype=np.uint64) % 64 * np.uint64(2 * length)
    rows = np.zeros((rounds, buffer_pages + 2), EVENT)
    rows["pid"] = rows["tid"] = 1000
    rows["file"] = -1
    first, faults, last = rows[:, 0], rows[:, 1:-1], rows[:, -1]
    first["op"], first["length"], first["ret"] = Op.MMAP, length, addr
    first["prot"], first["flags"] = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    faults["op"], faults["access"] = Op.FAULT, Access.WRITE
    faults["addr"] = addr[:, None] + np.arange(buffer_pages, dtype=np.uint64) * np.uint64(PAGE)
    last["op"], last["addr"], last["length"] = Op.MUNMAP, addr, length
    events = rows.reshape(-1)
    events["t"] = np.arange(len(events), dtype=np.uint64) * np.uint64(1000)
    return Trace(events, {"command": "generated"})


def save_events(trace: Trace) -> Path:
    """Write a history's bare events to a temporary file, for the C program; the caller removes it."""
    handle, path = tempfile.mkstemp(suffix=".events")
    with os.fdopen(handle, "wb") as f:
        f.write(trace.events.tobytes())
    return Path(path)


def _replay(name, trace):
    return Workload(name, len(trace), lambda: (), lambda: ioproc.replay(trace), lambda: None)


def replay(events=HISTORY_EVENTS):
    """Replay the generated history, with no device."""
    return _replay("replay", generated_history(events))


def replay_recorded(history=RECORDED):
    """Replay a recorded history, with no device: one that the package ships, or a file."""
    shipped = Path(ioproc.__file__).parent / "histories" / history
    return _replay("replay_recorded", Trace.load(shipped if shipped.exists() else history))


VMA_PAGES = 4
READ_ONLY, WRITABLE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE


class _ManyVmas:
    """An address space of so many VMAs of written pages, each differing from its neighbours; calls on random ones.

    A turn's calls are on more VMAs than the caches hold, but not on so many that their arguments fill the caches.
    """

    def __init__(self, vmas):
        self.mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=VMA_PAGES * vmas + 64), max_map_count=4 * vmas + 64)
        self.vmas, self.pick = vmas, min(5000, vmas // 2)
        self.rng = np.random.default_rng(1)
        length = VMA_PAGES * PAGE
        self.base = self.mm.mmap(vmas * length)
        self.mm.touch(self.base, vmas * length, write=True)
        for addr in range(self.base, self.base + vmas * length, 2 * length):
            self.mm.mprotect(addr, length, READ_ONLY)

    def choose(self):
        """The second pages of random VMAs: addresses, what the VMA allows, and what it does not."""
        return self.protections(self.rng.choice(self.vmas, self.pick, replace=False))

    def protections(self, chosen):
        odd = chosen % 2 == 1
        return ((self.base + (VMA_PAGES * chosen + 1) * PAGE).tolist(), np.where(odd, WRITABLE, READ_ONLY).tolist(),
                np.where(odd, READ_ONLY, WRITABLE).tolist())

    def shuffled(self, addresses):
        return self.protections(self.rng.permutation((np.array(addresses) - self.base) // PAGE // VMA_PAGES))

    def find(self, addresses, *_):
        touch = self.mm.touch
        for addr in addresses:
            touch(addr)

    def forget(self, addresses, *_):
        for addr in addresses:
            self.mm.madvise(addr, PAGE, mmap.MADV_DONTNEED)

    def split(self, addresses, _, others):
        mprotect = self.mm.mprotect
        for addr, prot in zip(addresses, others):
            mprotect(addr, PAGE, prot)

    def merge(self, addresses, prots, _):
        mprotect = self.mm.mprotect
        for addr, prot in zip(addresses, prots):
            mprotect(addr, PAGE, prot)

    def unmap(self, addresses, *_):
        munmap = self.mm.munmap
        for addr in addresses:
            munmap(addr, PAGE)

    def map(self, addresses, prots, _):
        mm_mmap, flags = self.mm.mmap, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | ioproc.MAP_FIXED
        for addr, prot in zip(addresses, prots):
            mm_mmap(PAGE, prot, flags, addr=addr)


def _changed(name, vmas, before, run, after):
    """Calls of one kind, each on another VMA, between what prepares and what undoes them."""
    many = _ManyVmas(vmas)
    before, run, after = (getattr(many, call, None) for call in (before, run, after))

    def prepare():
        calls = many.choose()
        if before:
            before(*calls)
            calls = many.shuffled(calls[0])
        return calls

    return Workload(name, many.pick, prepare, run, after or (lambda *calls: None))


def vma_find(vmas=1000):
    """A read fault: find the VMA of a page that is not there, map the zero page."""
    return _changed("vma_find", vmas, "forget", "find", "")


def vma_split(vmas=1000):
    """Change the protection of a page inside a VMA: one becomes three."""
    return _changed("vma_split", vmas, "", "split", "merge")


def vma_merge(vmas=1000):
    """Change it back: three become one."""
    return _changed("vma_merge", vmas, "split", "merge", "")


def vma_cut(vmas=1000):
    """Unmap a page inside a VMA: one becomes two."""
    return _changed("vma_cut", vmas, "", "unmap", "map")


def vma_fill(vmas=1000):
    """Map it again: what is left and right of it and the page become one."""
    return _changed("vma_fill", vmas, "unmap", "map", "")


def vma_lookup(vmas=1000, dependent=False):
    """Look random addresses up in the tree, nothing else; `dependent`: one waits for the result of the one before."""
    many = _ManyVmas(vmas)

    def prepare():
        return (np.array(many.choose()[0], np.uint64),)

    return Workload("vma_lookup", many.pick, prepare, lambda addresses: _core.find_vmas(many.mm, addresses, dependent),
                    lambda addresses: None)


def vma_lookup_dependent(vmas=1000):
    return vma_lookup(vmas, dependent=True)


WORKLOADS = {w.__name__: w for w in (
    touch, unmap, fork, cow, cow_contents, fault_reclaim, swapin_write, swapin_read, reclaim, reclaim_16, pageout, truncate,
    punch, mlock, pin, hugetlb, hooksite, dispatch, replay, replay_recorded,
    vma_find, vma_split, vma_merge, vma_cut, vma_fill, vma_lookup, vma_lookup_dependent)}


def _resident() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()        # exact, which statm is not
    return int(re.search(r"^Rss: +(\d+) kB", rollup, re.M)[1]) * 1024


def memory(pages=262144, children=4) -> dict:
    """Measure resident memory, in a fresh process: bytes per page, and per page of a further mapper."""
    length = pages * PAGE
    ctypes.CDLL(None).malloc_trim(0)                            # what the imports freed is not ours to use
    before = _resident()
    mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=pages + 64))
    mm.touch(mm.mmap(length), length, write=True)
    dense = _resident()
    forks = [mm.fork() for _ in range(children)]
    mapper = _resident()
    for child in forks:
        child.exit()
    return {"dense_bytes": (dense - before) / pages, "mapper_bytes": (mapper - dense) / pages / children}


def memory_shared(pages=1_000_000, spaces=64) -> dict:
    """Measure resident memory of so many mapped pages in a family of address spaces that shares half of its frames.

    A parent is forked, then each child writes to the first half of its pages.  Bytes per mapped page, and per page of a
    further mapper (the forks, before anybody writes).
    """
    each = pages // spaces
    length = each * PAGE
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident()
    mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=(each // 2 + 1) * (spaces + 1)))
    addr = mm.mmap(length)
    mm.touch(addr, length, write=True)
    alone = _resident()
    family = [mm] + [mm.fork() for _ in range(spaces - 1)]
    forked = _resident()
    for child in family[1:]:
        child.touch(addr, each // 2 * PAGE, write=True)
    after = _resident()
    mapped = sum(space.stats["rss_pages"] for space in family)
    for space in family:
        space.exit()
    return {"page_bytes": (after - before) / mapped, "mapper_bytes": (forked - alone) / each / (spaces - 1),
            "resident_bytes": after - before, "mapped": mapped}


MEMORY = {"memory": memory, "memory_shared": memory_shared}


def main(arguments) -> int:
    if not arguments or arguments[0] not in {*WORKLOADS, *MEMORY}:
        print("usage: workloads.py NAME [UNITS [REPETITIONS | -]]\nnames:", *WORKLOADS, *MEMORY, file=sys.stderr)
        return 2
    name, *rest = arguments
    units = [int(rest[0]) if rest[0].isdigit() else rest[0]] if rest else []
    if name in MEMORY:
        print(f"name={name}", *(f"{key}={value:.3f}" for key, value in MEMORY[name](*units).items()))
        return 0
    keep_heap()
    workload = WORKLOADS[name](*units)
    workload.once()
    if rest[1:] == ["-"]:
        for _ in sys.stdin:
            print(f"{statistics.median(workload.once() for _ in range(TURN)):.5f}", flush=True)
        return 0
    repetitions = int(rest[1]) if rest[1:] else 20
    ns = [workload.once() for _ in range(repetitions)]
    print(f"name={name} units={workload.units} repetitions={repetitions} min_ns={min(ns):.4f} "
          f"median_ns={statistics.median(ns):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
