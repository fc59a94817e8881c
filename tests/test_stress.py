"""
Everything at once: threads, forks, files that shrink and reclaim, in less memory than they want; at the end nothing is left.

    IOPROC_STRESS=1000000 IOPROC_SEED=7 python -m pytest tests/test_stress.py       # so many operations, another seed

A seed fixes what each thread does, not how the threads meet.
"""
# ruff: noqa: F403, F405
import os
import threading

import pytest

import ioproc
from ioproc import _core
from threads import no_hang, together
from world import *

OPERATIONS = int(os.environ.get("IOPROC_STRESS", 20_000))
SEED = int(os.environ.get("IOPROC_SEED", 1))
THREADS, SPACES, PHASE = 4, 6, 4000     # operations from one look at everything to the next
FRAMES, SLOTS, HUGE_PAGES = 300, 200, 6
AREA, FILE = 192, 48                    # pages
HUGE = 512 * PAGE
HUGE_AREA = BASE + 16 * HUGE
STACK = BASE + 2048 * PAGE
REFUSED = (OSError, ioproc.AccessError, MemoryError)        # what another thread or the want of memory makes of an operation


class Member:
    """An address space, and all ops that were ever attached to it."""

    def __init__(self, mem, mm, ops=None):
        self.mem, self.mm = mem, mm
        self.attaching = threading.Lock()
        self.gone = False
        if ops is None:                 # else: one with another's page tables, after vfork
            self.calls = dict.fromkeys(ioproc.HOOK_NAMES, 0)
            ops = [ioproc.CountingOps(), ioproc.CountingOps(), ioproc.Ops(**{hook: self.callback(hook) for hook in self.calls})]
            self.counts = lambda: [ops[0].counts, ops[1].counts, self.calls]
        self.ops = ops

    def callback(self, hook):
        def called(*arguments):
            self.calls[hook] += 1
            if self.calls[hook] % 64 == 0 and hook != "release":
                self.mm.pagemap(BASE, 8 * PAGE), self.mem.stats, self.mm.vmas()
        return called

    def attach(self, chance):
        """One of the ops comes or goes, on a range or as a whole."""
        where = () if chance.random() < 0.5 else (BASE + chance.randrange(AREA) * PAGE, chance.randrange(1, 64) * PAGE)
        with self.attaching:            # not to an address space it has never been in
            if not self.gone:
                chance.choice([self.mm.register_ops, self.mm.unregister_ops])(chance.choice(self.ops), *where)

    def leave(self, how):
        with self.attaching:
            self.gone = True
            how()


class Stress:
    def __init__(self):
        self.mem = ioproc.PhysicalMemory(FRAMES, SLOTS, HUGE_PAGES)
        self.members = [self.member() for _ in range(SPACES)]
        self.files = [ioproc.File(self.mem, FILE * PAGE, memfd=bool(number & 1)) for number in range(4)]
        self.huge_file = ioproc.File(self.mem, 2 * HUGE, huge=True)
        self.pauses, self.refused = 0, 0

    def member(self, mm=None, **options):
        member = Member(self.mem, mm or ioproc.AddressSpace(self.mem, start_brk=BASE + 1024 * PAGE, **options))
        for ops in member.ops[:1]:
            member.mm.register_ops(ops)
        return member

    def replace(self, number, member):
        old, self.members[number] = self.members[number], member
        old.leave(old.mm.exit)

    # --- what a thread does -----------------------------------------------------------------------------

    def step(self, chance, pins):
        number = chance.randrange(SPACES)
        member = self.members[number]
        mm = member.mm
        page = chance.randrange(AREA)
        addr, length = BASE + page * PAGE, chance.randrange(1, 40) * PAGE
        prot = chance.choice([0, 1, 3, 3, 3])
        file, offset = chance.choice(self.files), chance.randrange(FILE) * PAGE
        match chance.randrange(40):
            case 0 | 1:
                mm.mmap(length, prot, chance.choice([PRIVATE, PRIVATE, SHARED]) | ANONYMOUS | FIXED
                        | chance.choice([0, 0, 0, POPULATE, LOCKED]), addr=addr)
            case 2 | 3:
                mm.mmap(length, prot, chance.choice([PRIVATE, SHARED]) | FIXED, addr=addr, file=file, offset=offset)
            case 4:
                mm.munmap(addr, length)
            case 5:
                mm.mprotect(addr, length, prot)
            case 6 | 7 | 8 | 9 | 10:
                mm.touch(addr, length, write=True)
            case 11 | 12:
                mm.touch(addr, length)
            case 13:
                mm.write(addr + 100, b"w" * length)
            case 14:
                mm.read(addr, length)
            case 15 | 16:
                mm.madvise(addr, length, chance.choice([DONTNEED, FREE, FREE, PAGEOUT, PAGEOUT, COLD, WILLNEED, REMOVE,
                                                        WIPEONFORK, KEEPONFORK, POPULATE_READ, POPULATE_WRITE]))
            case 17:
                chance.choice([mm.mlock, mm.munlock, mm.munlock])(addr, length)
            case 18:
                to = chance.choice([None, BASE + chance.randrange(AREA) * PAGE])
                mm.mremap(addr, length, chance.randrange(1, 40) * PAGE, 1 if to is None else chance.choice([3, 3, 7]), to)
            case 19 | 20:
                if len(pins) < 4:
                    pins.append(self.mem.pin(mm, addr, min(length, 6 * PAGE), write=chance.random() < 0.5))
                else:
                    self.mem.unpin(pins.pop(chance.randrange(4)))
            case 21 | 22:
                self.mem.reclaim(chance.randrange(1, 64))
            case 23:
                file.truncate(chance.randrange(FILE * PAGE))
                file.truncate(FILE * PAGE)
            case 24:
                file.punch_hole(chance.randrange(FILE * PAGE), chance.randrange(1, 16 * PAGE))
            case 25:
                file.write(offset + 10, b"f" * chance.randrange(1, 3 * PAGE)), file.read(0, FILE * PAGE)
            case 26 | 27 | 28:
                member.attach(chance)
            case 29:
                self.replace(number, self.member(mm.fork()))
            case 30:
                self.replace(chance.randrange(SPACES), self.member(mm.fork()))
            case 31:
                self.vfork(chance, number, member)
            case 32:
                child = self.member(mm.fork())
                try:
                    child.mm.touch(BASE, AREA * PAGE)
                finally:
                    child.leave(child.mm.exec)
                    self.replace(number, self.member(child.mm))
            case 33:
                if chance.random() < 0.3:
                    self.replace(number, self.member(nonlinear=chance.random() < 0.3))
            case 34:
                self.huge(chance, mm)
            case 35:
                if chance.random() < 0.5:
                    mm.mmap_device(length, DEVICE + page, prot, addr=addr)
                else:
                    mm.zeromap(length, prot, addr=addr)
            case 36:
                mm.mmap(PAGE, 3, PRIVATE | ANONYMOUS | FIXED | GROWSDOWN, addr=STACK)
                mm.touch(STACK - chance.randrange(48) * PAGE, write=True)
            case 37:
                chance.choice([mm.msync, lambda *where: mm.remap_file_pages(*where, offset // PAGE)])(addr, length)
            case 38:
                mm.brk(BASE + (1024 + chance.randrange(32)) * PAGE)
                mm.touch(BASE + 1024 * PAGE, 32 * PAGE, write=True)
            case 39:
                for pfn in mm.pagemap(addr, length)["pfn"][:4].tolist():
                    self.mem.mappings(pfn) if 0 < pfn <= FRAMES else mm.vmas()

    def vfork(self, chance, number, member):
        """The child uses its parent's page tables, beside the other threads, until it leaves."""
        child = Member(self.mem, member.mm.vfork(), member.ops)
        try:
            child.mm.touch(BASE, 32 * PAGE, write=True)
        finally:
            child.leave(chance.choice([child.mm.exec, child.mm.exit]))
            try:
                if child.mm.stats["map_count"] == 0:        # exec: it has room of its own now
                    child.mm.mmap(8 * PAGE, flags=PRIVATE | ANONYMOUS | POPULATE)
            finally:
                child.mm.exit()

    def huge(self, chance, mm):
        at = HUGE_AREA + chance.randrange(3) * HUGE
        match chance.randrange(6):
            case 0:
                mm.mmap(HUGE, 3, chance.choice([PRIVATE, SHARED]) | ANONYMOUS | HUGETLB | FIXED, addr=at)
            case 1:
                mm.mmap(HUGE, 3, chance.choice([PRIVATE, SHARED]) | FIXED, addr=at, file=self.huge_file)
            case 2:
                mm.touch(at, HUGE, write=True)
            case 3:
                mm.munmap(HUGE_AREA, 3 * HUGE)
            case 4:
                self.huge_file.truncate(chance.randrange(3) * HUGE)
            case 5:
                self.huge_file.punch_hole(0, HUGE)

    # --- and all together -------------------------------------------------------------------------------

    def check(self):
        """Nobody else runs."""
        self.pauses += 1
        spaces = [member.mm for member in self.members]
        for member in self.members:
            _core.check_space(member.mm)
            counts = member.counts()
            for hook, n in member.mm.stats["callbacks"].items():
                assert n == sum(count[hook] for count in counts), hook
        _core.check_memory(self.mem, spaces)

    def run(self, operations):
        pause = threading.Barrier(THREADS, self.check)

        def work(chance, going):
            pins = []
            try:
                for _ in range(max(1, operations // PHASE)):
                    for _ in range(PHASE // THREADS):
                        try:
                            self.step(chance, pins)
                        except REFUSED:
                            self.refused += 1
                    pause.wait()
            finally:
                for pfns in pins:
                    self.mem.unpin(pfns)

        together(*[work] * THREADS, seed=SEED, barrier=pause)


@pytest.fixture(autouse=True)
def no_deadlock():
    with no_hang(120 + OPERATIONS // 100):
        yield


def test_everything_at_once():
    stress = Stress()
    stress.run(OPERATIONS)
    mem = stress.mem
    assert mem.stats["reclaimed"] > OPERATIONS // 10 and mem.stats["swapped_in"] > OPERATIONS // 100
    for member in stress.members:
        member.mm.exit()
    stress.files = stress.huge_file = None
    stats = mem.stats
    assert (stats["frames_used"], stats["swap_used"], stats["huge_pages_reserved"]) == (0, 0, 0)
    assert stats["huge_pages_free"] == HUGE_PAGES
    _core.check_memory(mem, [])
