"""
A device at work in memory that other threads change, for every design that is said to be safe: the oracle sees nothing.

    IOPROC_DEVICE_STRESS=10000000 IOPROC_SEED=7 python -m pytest tests/test_device_stress.py    # so many operations, another seed

The operations are shared out among the designs. A seed fixes what each thread does, not how the threads meet.
"""
# ruff: noqa: F403, F405
import os
import random
import threading
import time
from functools import partial

import pytest

import ioproc
from ioproc import _core
from threads import no_hang, together
from world import *

OPERATIONS = int(os.environ.get("IOPROC_DEVICE_STRESS", 200_000))
SEED = int(os.environ.get("IOPROC_SEED", 1))
FRAMES, SLOTS, STRIDE = 120, 200, 32
AREA, FILE = 48, 24                     # pages
REFUSED = (OSError, ioproc.AccessError, MemoryError, ioproc.RemoteAccessError)

POINTS = "teardown-gap", "establish", "read-begin"
UNSAFE = {"pin-cache", "mm+fault/posted", "pin"}       # "pin": an operation in the middle of a transfer, of which nobody tells it
SAFE = {name: design for name, design in ioproc.DESIGNS.items() if name not in UNSAFE}
SAFE["bounce"] = {**SAFE["bounce"], "bounce_bytes": 4 * PAGE}
CASES = {       # what the address space and the context are made with
    **{name: ({}, design) for name, design in SAFE.items()},
    **{f"{name}, batches": ({"teardown_batch": 3}, design) for name, design in SAFE.items() if name.startswith("interval")},
    **{f"mm+{name}, {fork}": ({}, {"placement": "mm", "translation": name, "fork": fork})
       for name in ("fault", "pin-cache+hooks") for fork in ("inherit", "precopy")},
    "mm+fault, prefault": ({}, {"placement": "mm", "translation": "fault", "prefault": 8}),
    "interval+fault, prefault, batches": (
        {"teardown_batch": 3}, {"placement": "interval", "translation": "fault", "prefault": 8}),
    "mm+pin-cache+hooks, limits": (
        {}, {"placement": "mm", "translation": "pin-cache+hooks", "max_regions": 4, "max_bytes": 32 * PAGE}),
}


class Race:
    """One process with a device in its memory, and a small one that the device exchanges data with."""

    def __init__(self, options, design):
        self.mem = ioproc.PhysicalMemory(FRAMES, SLOTS)
        self.nic = ioproc.Nic(entries=32, ways=4, table_entries=64)
        self.mm, self.peer = ioproc.AddressSpace(self.mem, **options), ioproc.AddressSpace(self.mem, **options)
        self.device = self.nic.attach(self.mm, **design)
        self.other = self.nic.attach(self.peer, **design)
        self.mm.mmap(AREA * PAGE, 3, PRIVATE | ANONYMOUS | FIXED, addr=BASE)
        self.peer.mmap(16 * PAGE, 3, PRIVATE | ANONYMOUS | FIXED, addr=BASE)
        self.files = [ioproc.File(self.mem, FILE * PAGE, memfd=memfd) for memfd in (False, True)]
        self.refused = self.done = 0
        self.children = []

    def change(self, chance):
        """One operation of the process, or of who shares memory with it."""
        mm, page = self.mm, chance.randrange(AREA)
        addr, length = BASE + page * PAGE, chance.randrange(1, 12) * PAGE
        file = chance.choice(self.files)
        match chance.randrange(20):
            case 0 | 1 | 2:
                kind = chance.choice([PRIVATE, PRIVATE, SHARED])
                mm.mmap(length, chance.choice([1, 3, 3, 3]), kind | ANONYMOUS | FIXED, addr=addr)
            case 3:
                mm.mmap(length, 3, chance.choice([PRIVATE, SHARED]) | FIXED, addr=addr, file=file)
            case 4 | 5:
                mm.munmap(addr, length)
                if chance.random() < 0.8:
                    mm.mmap(length, 3, PRIVATE | ANONYMOUS | FIXED, addr=addr)
            case 6 | 7:
                mm.mprotect(addr, length, chance.choice([0, 1, 1, 3, 3, 3, 3, 3]))
            case 8 | 9 | 10 | 11:
                mm.touch(addr, length, write=chance.random() < 0.7)
            case 12 | 13:
                mm.madvise(addr, length, chance.choice([DONTNEED, DONTNEED, FREE, PAGEOUT, PAGEOUT, REMOVE, POPULATE_WRITE]))
            case 14:
                to = BASE + chance.randrange(AREA) * PAGE
                mm.mremap(addr, length, length, chance.choice([3, 3, 7]), to)
            case 15:
                self.mem.reclaim(chance.randrange(1, 32))
            case 16:
                file.truncate(chance.randrange(FILE) * PAGE)
                file.truncate(FILE * PAGE)
            case 17:
                file.punch_hole(chance.randrange(FILE) * PAGE, 4 * PAGE)
            case 18 | 19:
                if len(self.children) == 2:
                    self.children.pop(chance.randrange(2)).exit()
                self.children.append(mm.fork())
                self.children[-1].touch(addr, length, write=True)

    def transfer(self, chance):
        device, page = self.device, chance.randrange(AREA)
        addr, length = BASE + page * PAGE + chance.randrange(PAGE), chance.randrange(1, 3 * PAGE)
        match chance.randrange(8):
            case 0 | 1 | 2:
                device.access(addr, length, write=chance.random() < 0.6)
            case 3 | 4:
                device.rdma_write(addr, b"d" * length)
            case 5:
                device.rdma_read(addr, length)
            case 6:
                device.rdma_write_to(addr, length, self.other, BASE + chance.randrange(8) * PAGE)
            case 7 if device.translation != "bounce":
                registration = device.register(addr, length)
                try:
                    device.access(addr, length, write=True)
                finally:
                    registration.deregister()

    def run(self, operations):
        abreast = threading.Barrier(3)              # nobody runs ahead

        def work(act, chance, going):
            for _ in range(operations // 3 // STRIDE):
                abreast.wait()
                for _ in range(STRIDE):
                    try:
                        act(chance)
                        self.done += 1
                    except REFUSED:
                        self.refused += 1

        together(*(partial(work, act) for act in (self.change, self.transfer, self.transfer)), seed=SEED, barrier=abreast)


@pytest.fixture(autouse=True)
def no_deadlock():
    with no_hang(120 + OPERATIONS // 1000):
        yield


@pytest.fixture(autouse=True)
def wide_gaps():
    """Now and then a thread waits where the races are: between two batches, and between looking at an entry and loading it."""
    chance = random.Random(SEED)

    def wait():
        if chance.random() < 0.1:
            time.sleep(1e-4)

    for point in POINTS:
        _core.schedule(point, wait)
    yield
    for point in POINTS:
        _core.schedule(point, None)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_stale(case):
    options, design = CASES[case]
    race = Race(options, design)
    operations = max(300, OPERATIONS // len(CASES))
    race.run(operations)
    stats = race.nic.stats
    assert race.device.violations() == [] and stats["violations"] == 0
    assert race.done > operations // 4 and stats["transfers"] > operations // 8
    spaces = [race.mm, race.peer, *race.children]
    _core.check_memory(race.mem, spaces)
    for mm in spaces:
        mm.exit()
    assert race.nic.stats["pinned"] == 0
    race.nic.close()
    race.files = None
    assert (race.mem.stats["frames_used"], race.mem.stats["swap_used"]) == (0, 0)
    _core.check_memory(race.mem, [])
