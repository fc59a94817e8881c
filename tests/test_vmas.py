"""The tree over the VMAs: thousands of them, against a sorted list."""
import bisect
import mmap
import random

import numpy as np
import pytest

import ioproc
from ioproc import _core

PAGE = mmap.PAGESIZE
TOP, BOTTOM = 0x7ffff7fff000, 0x10000       # between them addresses are given out, the highest first
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS       # each mapping its own object: no two ever merge


class Ranges:
    """Disjoint ranges in order: what an address space does without merging."""

    def __init__(self):
        self.starts, self.ends = [], []

    def at(self, addr):
        """The first that ends above `addr`."""
        return bisect.bisect_right(self.ends, addr)

    def add(self, start, end):
        i = self.at(start)
        self.starts.insert(i, start)
        self.ends.insert(i, end)

    def remove(self, start, end):
        i = self.at(start)
        while i < len(self.starts) and self.starts[i] < end:
            low, high = self.starts.pop(i), self.ends.pop(i)
            for a, b in ((low, start), (end, high)):
                if a < b:
                    self.starts.insert(i, a)
                    self.ends.insert(i, b)
                    i += 1

    def highest_gap(self, length):
        top = TOP
        for start, end in zip(reversed(self.starts), reversed(self.ends)):
            if end <= top:
                if top - end >= length:
                    return top - length
            top = min(top, start)
        return top - length

    def check(self, mm):
        assert [(v.start, v.end) for v in mm.vmas()] == list(zip(self.starts, self.ends))
        _core.check_space(mm)


def looked_up(ranges, mm, addresses):
    found = sum(i < len(ranges.starts) and ranges.starts[i] <= a for a in addresses for i in [ranges.at(a)])
    assert _core.find_vmas(mm, np.array(addresses, np.uint64)) == found


@pytest.mark.parametrize("seed", range(6))
def test_random_mappings(seed):
    rng = random.Random(seed)
    ranges = Ranges()
    spread = rng.choice([1 << 14, 1 << 20])
    with ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64), max_map_count=1 << 20) as mm:
        for phase in range(8):              # it grows, it shrinks
            growing = phase % 2 == 0 and phase < 6
            for step in range(1500):
                length = rng.choice([1, 1, 2, 3, rng.randrange(1, 64)]) * PAGE
                addr = 0x7fff00000000 + rng.randrange(spread) * PAGE
                choice = rng.random()
                if growing and choice < 0.45:
                    assert mm.mmap(length, flags=SHARED) == (addr := ranges.highest_gap(length))
                    ranges.add(addr, addr + length)
                elif growing and choice < 0.9:
                    mm.mmap(length, flags=SHARED | ioproc.MAP_FIXED, addr=addr)
                    ranges.remove(addr, addr + length)
                    ranges.add(addr, addr + length)
                else:
                    if ranges.starts and choice < 0.8:
                        i = rng.randrange(len(ranges.starts))
                        addr = ranges.starts[i] + rng.choice([0, 0, PAGE])
                        length = rng.choice([PAGE, length, 16 * length, ranges.ends[min(i + 20, len(ranges.ends) - 1)] - addr])
                    mm.munmap(addr, max(length, PAGE))
                    ranges.remove(addr, addr + max(length, PAGE))
                if step % 150 == 0:
                    ranges.check(mm)
            some = rng.sample(ranges.starts, min(len(ranges.starts), 200))
            looked_up(ranges, mm, [a + d * PAGE for a in some for d in (-1, 0, 1)] + [0, TOP, 2**64 - 1])
            ranges.check(mm)


@pytest.mark.parametrize("order", ["up", "down", "inwards", "outwards", "random"])
def test_order_of_making_and_unmapping(order):
    """Nodes fill and empty at their ends and in the middle."""
    n = 3000
    places = {"up": range(n), "down": range(n - 1, -1, -1), "random": random.Random(1).sample(range(n), n),
              "inwards": [i // 2 if i % 2 else n - 1 - i // 2 for i in range(n)]}
    places["outwards"] = places["inwards"][::-1]
    addresses = [0x10000000 + i * 3 * PAGE for i in places[order]]
    for unmapped in (addresses, addresses[::-1], sorted(addresses)):
        with ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64)) as mm:
            for i, addr in enumerate(addresses):
                mm.mmap(PAGE, flags=SHARED | ioproc.MAP_FIXED, addr=addr)
                if i % 500 == 0:
                    _core.check_space(mm)
            assert [v.start for v in mm.vmas()] == sorted(addresses)
            _core.check_space(mm)
            for i, addr in enumerate(unmapped):
                mm.munmap(addr, PAGE)
                if i % 100 == 0 or i > n - 50:
                    _core.check_space(mm)
            assert mm.vmas() == []


def test_splits_and_merges_of_thousands():
    n = 4000
    with ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64)) as mm:
        base = mm.mmap(3 * n * PAGE)
        pages = [base + (3 * i + 1) * PAGE for i in range(n)]
        random.Random(1).shuffle(pages)
        for page in pages:
            mm.mprotect(page, PAGE, mmap.PROT_READ)
        _core.check_space(mm)
        assert mm.stats["map_count"] == 2 * n + 1
        child = mm.fork()
        _core.check_space(child)
        assert [(v.start, v.end, v.prot) for v in child.vmas()] == [(v.start, v.end, v.prot) for v in mm.vmas()]
        child.exit()
        random.Random(2).shuffle(pages)
        for page in pages:
            mm.mprotect(page, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        _core.check_space(mm)
        assert [(v.start, v.end) for v in mm.vmas()] == [(base, base + 3 * n * PAGE)]
