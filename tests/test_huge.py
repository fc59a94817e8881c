"""Huge pages: 2 MiB each, from a pool; on the model and on ioproc.

Addresses are in huge pages: 0 is BASE. Hooks count pages of 4 KiB, as everywhere: huge page 1 is pages 512 to 1023.
"""
# ruff: noqa: F403, F405
import pytest

import ioproc
import model
from world import *

HUGE = 512 * PAGE
PRIVATELY, SHARED_BY_FORK = PRIVATE | ANONYMOUS | HUGETLB, SHARED | ANONYMOUS | HUGETLB
NORESERVE = 0x4000


class HugeWorld(World):
    def __init__(self, impl, pages=4, **options):
        super().__init__(impl, huge_pages=pages, **options)
        self.huge = impl.File(self.mem, 4 * HUGE, huge=True)

    def map_huge(self, at, n, prot="rw-", flags=PRIVATELY, mm=None, **more):
        return (mm or self.mm).mmap(n * HUGE, PROTS[prot], flags | FIXED, addr=BASE + at * HUGE, **more)

    def map_file(self, at, n, prot="rw-", flags=SHARED, first=0, mm=None):
        return self.map_huge(at, n, prot, flags, mm, file=self.huge, offset=first * HUGE)

    def read(self, at, mm=None):
        return (mm or self.mm).read(BASE + at * HUGE + 5, 1)

    def write(self, at, mm=None, data=b"x"):
        (mm or self.mm).write(BASE + at * HUGE + 5, data)

    def says(self, at, mm=None):
        return super().says(at * 512 + 100, mm)

    def pool(self):
        """Free pages, and how many of these are reserved."""
        return self.mem.stats["huge_pages_free"], self.mem.stats["huge_pages_reserved"]

    def check(self):
        if hasattr(self.impl, "check"):
            self.impl.check(self.mem, self.mm, *self.others, files=[self.file, self.memfd, self.huge])
        else:
            super().check()


@pytest.fixture(params=[model, ioproc], ids=["model", "ioproc"])
def world(request):
    world = HugeWorld(request.param)
    yield world
    world.check()


def no_page(world, at, mm=None, write=True):
    with pytest.raises(world.impl.BusError):
        world.write(at, mm) if write else world.read(at, mm)


# --- faults -------------------------------------------------------------------------------------------


def test_one_fault_is_2_mib(world):
    world.map_huge(0, 2)
    world.write(1)
    rows = world.mm.pagemap(BASE, 2 * HUGE)
    assert not rows[:512]["present"].any() and rows[512:]["present"].all() and rows[512:]["writable"].all()
    pfn = int(rows[512]["pfn"])
    assert rows[512:]["pfn"].tolist() == list(range(pfn, pfn + 512)) and pfn % 512 == 0 and pfn > 256
    assert world.faults() == {"anon": 1} and world.mm.touch(BASE, 2 * HUGE, True) == 1
    assert world.mm.stats["rss_pages"] == 0 == world.mem.stats["frames_used"]


def test_contents(world):
    """An access may go over the border of two huge pages, and over that to ordinary memory."""
    world.map_huge(0, 2), world.map(1024, 1)
    world.mm.write(BASE + HUGE - 3, b"abcdef"), world.mm.write(BASE + 2 * HUGE - 3, b"ghijkl")
    assert world.mm.read(BASE + HUGE - 4, 8) == b"\0abcdef\0" and world.mm.read(BASE + 2 * HUGE - 4, 8) == b"\0ghijkl\0"


def test_a_read_first(world):
    """There is no huge zero page: the page is there, read-only, and the write finds it alone."""
    world.map_huge(0, 1)
    world.read(0)
    assert world.says(0) == "read-only" and world.pool() == (3, 0)
    world.write(0)
    assert world.faults() == {"anon": 1, "reuse": 1} and world.pool() == (3, 0)


def test_shared_memory_is_writable_at_once(world):
    world.map_huge(0, 1, flags=SHARED_BY_FORK)
    world.read(0), world.write(0)
    assert world.faults() == {"file": 1}


def test_protection(world):
    """Private pages wait for a write fault even when they are nobody else's."""
    world.map_huge(0, 1), world.write(0), world.map_huge(1, 1, flags=SHARED_BY_FORK), world.write(1)
    world.mprotect(0, 1024, "r--"), world.mprotect(0, 1024, "rw-"), world.faults()
    assert world.says(0) == "dirty" and world.says(1) == "writable dirty"
    world.write(0), world.write(1)
    assert world.faults() == {"reuse": 1}


@pytest.mark.parametrize("call", [lambda w: w.munmap(0, 1), lambda w: w.munmap(1, 512), lambda w: w.mprotect(0, 1, "r--"),
                                  lambda w: w.madvise(0, 513, 10), lambda w: w.madvise(1, 512, DONTNEED), lambda w: w.map(0, 1)],
                         ids=["munmap", "munmap start", "mprotect", "DONTFORK", "DONTNEED", "MAP_FIXED"])
def test_huge_pages_are_not_cut(world, call):
    world.map_huge(0, 2), world.write(0)
    with pytest.raises(OSError, match="Invalid argument"):
        call(world)
    assert world.vmas() == [(0, 1024)] and world.says(0) == "writable dirty"


def test_vmas_split_and_never_merge(world):
    world.map_huge(0, 3), world.map_huge(3, 1), world.mprotect(512, 512, "r--"), world.mprotect(512, 512, "rw-")
    assert world.vmas() == [(0, 512), (512, 1024), (1024, 1536), (1536, 2048)]


def test_lengths_and_addresses(world):
    """Lengths are rounded up, hints too; a fixed address must be aligned."""
    at = world.mm.mmap(PAGE, 3, PRIVATELY, addr=BASE + PAGE)
    assert at == BASE + HUGE and world.vmas() == [(512, 1024)]
    assert world.mm.mmap(HUGE, 3, PRIVATELY) % HUGE == 0
    fails("EINVAL", world.mm.mmap, 0, 3, PRIVATELY)
    with pytest.raises(OSError, match="Invalid argument"):
        world.mm.mmap(HUGE, 3, PRIVATELY | FIXED, addr=BASE + PAGE)
    with pytest.raises(OSError, match="Invalid argument"):
        world.map_huge(0, 1, flags=PRIVATE, file=world.file)            # only a huge file's pages are huge
        world.mm.mmap(HUGE, 3, PRIVATE | HUGETLB, file=world.file)
    fails("EINVAL", world.mm.mmap, HUGE, 3, PRIVATELY | 30 << 26)


# --- the pool -----------------------------------------------------------------------------------------


def test_mapping_reserves(world):
    world.map_huge(0, 3)
    assert world.pool() == (4, 3)
    with pytest.raises(OSError, match="allocate memory"):
        world.map_huge(4, 2)
    world.map_huge(4, 1, flags=SHARED_BY_FORK), world.write(0), world.write(4)
    assert world.pool() == (2, 2)
    world.munmap(0, 1536)
    assert world.pool() == (3, 0)


def test_without_a_reservation(world):
    """MAP_NORESERVE takes what is left when it faults; what others reserved is not."""
    world.map_huge(0, 3), world.map_huge(4, 2, flags=PRIVATELY | NORESERVE)
    world.write(4), no_page(world, 5)
    assert world.pool() == (3, 3) and world.says(5) == "absent"
    assert world.mm.touch(BASE, 3 * HUGE, True) == 3


def test_what_was_given_back_is_reserved_again(world):
    world.map_huge(0, 4), world.write(0), world.madvise(0, 512, DONTNEED)
    assert world.pool() == (4, 4) and world.read(0) == b"\0"


def test_populate(world):
    world.map_huge(0, 2, flags=PRIVATELY | POPULATE)
    assert world.pool() == (2, 0) and world.says(1) == "writable dirty"
    world.map_huge(4, 4, flags=PRIVATELY | POPULATE | NORESERVE)        # as far as it goes
    assert world.pool() == (0, 0) and [world.says(at) for at in (5, 6)] == ["writable dirty", "absent"]


def test_locked_without_being_marked(world):
    """Huge pages are never reclaimed; mlock only populates."""
    world.map_huge(0, 2), world.mlock(100, 500)
    assert world.pool() == (2, 0) and world.vmas() == [(0, 1024)] and world.mm.stats["locked_pages"] == 0
    world.munlock(0, 1024)
    for advice in FREE, COLD, PAGEOUT, WIPEONFORK:
        fails("EINVAL", world.madvise, 0, 512, advice)
    assert world.mem.reclaim(ALL) == 0


# --- fork ---------------------------------------------------------------------------------------------


def test_after_fork(world):
    world.map_huge(0, 1), world.write(0, data=b"both"), world.fork()
    assert world.says(0) == "dirty shared" == world.says(0, world.child) and world.pool() == (3, 0)
    world.write(0, data=b"m")
    assert world.pool() == (2, 0) and world.mm.read(BASE + 5, 4) == b"moth" and world.child.read(BASE + 5, 4) == b"both"
    world.faults(world.child), world.write(0, world.child)
    assert world.faults(world.child) == {"reuse": 1}


def test_shared_memory_after_fork(world):
    """The child faults in what it needs."""
    world.map_huge(0, 1, flags=SHARED_BY_FORK), world.write(0), world.fork()
    assert world.says(0, world.child) == "absent" and world.read(0, world.child) == b"x" and world.pool() == (3, 0)


def test_a_child_has_no_reservation(world):
    world.map_huge(0, 4), world.write(0), world.fork()
    no_page(world, 0, world.child), no_page(world, 1, world.child, write=False)
    assert world.says(0, world.child) == "dirty shared" and world.read(0, world.child) == b"x"
    assert world.mm.touch(BASE + HUGE, 3 * HUGE, True) == 3


def test_the_owner_takes_its_page_back(world):
    """The pool is empty and the parent writes: the child loses the page for good."""
    world.map_huge(0, 4), world.mm.touch(BASE, 4 * HUGE, True), world.fork()
    world.child.register_ops(world.ops("child")), world.register(world.ops())
    world.write(0)
    assert world.fired == ["child i 0 of 0-2048", "u 0 of 0-2048"]
    assert world.says(0) == "writable dirty" and world.says(0, world.child) == "absent" and world.pool() == (0, 0)
    world.munmap(512, 1536), world.child.munmap(BASE + HUGE, 3 * HUGE)
    assert world.pool() == (3, 0)
    no_page(world, 0, world.child, write=False)


def test_a_reference_does_not_matter(world):
    """Unlike an ordinary page, a huge one that one entry maps is written where it is."""
    world.map_huge(0, 1), world.write(0)
    pins = world.mem.pin(world.mm, BASE + PAGE, 2 * PAGE)
    assert pins.tolist() == world.mm.pagemap(BASE + PAGE, 2 * PAGE)["pfn"].tolist()
    world.fork(), world.child.exit(), world.others.clear(), world.faults()
    world.write(0)
    assert world.faults() == {"reuse": 1}
    world.munmap(0, 512)
    assert world.pool() == (3, 0)
    world.mem.unpin(pins)
    assert world.pool() == (4, 0)


# --- moves --------------------------------------------------------------------------------------------


def test_moves(world):
    world.map_huge(0, 2), world.write(0, data=b"moved")
    world.mremap(0, 1024, 1024, 2048)
    assert world.vmas() == [(2048, 3072)] and world.mm.read(BASE + 4 * HUGE + 5, 5) == b"moved" and world.pool() == (3, 1)
    world.mremap(2048, 1024, 512)
    assert world.vmas() == [(2048, 2560)] and world.pool() == (3, 0)
    fails("EINVAL", world.mremap, 2048, 512, 1024)
    fails("EINVAL", world.mremap, 2048, 512, 512, 1)
    fails("EINVAL", world.mremap, 2048, 512, 512, 0, 7)                 # DONTUNMAP


# --- files --------------------------------------------------------------------------------------------


def test_a_file_of_huge_pages(world):
    other = world.new()
    world.others.append(other)
    world.map_file(0, 2), world.map_file(2, 2, mm=other, first=0)
    assert world.pool() == (4, 2)                                       # the file's, whoever maps it
    world.write(1, data=b"file")
    assert other.read(BASE + 3 * HUGE + 5, 4) == b"file" == world.huge.read(HUGE + 5, 4) and world.pool() == (3, 1)
    world.munmap(0, 1024), other.munmap(BASE + 2 * HUGE, 2 * HUGE)
    assert world.pool() == (3, 1)                                       # with the file
    fails("EINVAL", world.huge.write, 0, b"x")


def test_private_mappings_of_a_file(world):
    world.map_file(0, 1), world.write(0, data=b"file")
    world.map_file(2, 2, flags=PRIVATE)
    world.faults(), world.read(2), world.read(3)
    assert [world.says(at) for at in (2, 3)] == ["shared", "read-only"] and world.faults() == {"file": 1, "anon": 1}
    world.write(2, data=b"m"), world.write(3)
    assert world.faults() == {"cow": 1, "reuse": 1} and world.read(0) == b"f" and world.mm.read(BASE + 2 * HUGE + 5, 4) == b"mile"


def test_writable_mappings_make_it_longer(world):
    world.huge.truncate(HUGE)
    world.map_file(0, 2, "r--")
    assert world.huge.size == HUGE
    no_page(world, 1, write=False)
    world.map_file(2, 3, flags=PRIVATE | NORESERVE)
    assert world.huge.size == 3 * HUGE and world.read(1) == b"\0"


def test_truncate(world):
    world.map_file(0, 3), world.mm.touch(BASE, 3 * HUGE, True), world.map_file(4, 1, flags=PRIVATE, first=1), world.write(4)
    fails("EINVAL", world.huge.truncate, HUGE + PAGE)
    world.register(world.ops())
    world.huge.truncate(HUGE)
    assert sorted(world.fired) == ["I 2048-2560 of 2048-2560", "I 512-1536 of 0-1536"]
    assert [world.says(at) for at in (0, 1, 2, 4)] == ["writable dirty", "absent", "absent", "absent"]
    no_page(world, 1), no_page(world, 4)
    world.huge.truncate(3 * HUGE)
    assert world.huge.read(HUGE + 5, 1) == b"\0"


def test_holes(world):
    """Whole huge pages go, even private copies; the rest is zeroed."""
    world.map_file(0, 3), world.mm.write(BASE, b"x" * 3 * HUGE), world.map_file(4, 1, flags=PRIVATE, first=1), world.write(4)
    world.huge.punch_hole(HUGE - 2, HUGE + 4)
    assert world.huge.read(HUGE - 4, 4) == b"xx\0\0" and world.huge.read(2 * HUGE, 4) == b"\0\0xx"
    assert [world.says(at) for at in (0, 1, 2, 4)] == ["writable dirty", "absent", "writable dirty", "absent"]
    world.madvise(1, 1100, REMOVE)                                      # as a hole of the same bytes
    assert world.says(0) == "writable dirty" and world.huge.read(0, 2 * PAGE) == b"x" * PAGE + bytes(PAGE)


# --- hooks: more of the table -----------------------------------------------------------------------------


def test_hooks(world):
    """Faults on nothing tell nobody; what changes an entry does, once, at the first address of the page."""
    world.register(world.ops())
    world.map_huge(0, 2, flags=PRIVATELY | POPULATE), world.map_huge(2, 1), world.read(2), world.madvise(0, 300, DONTNEED)
    assert world.fired == []
    world.write(2), world.fork(), world.write(0)
    assert world.fired == ["u 1024 of 1024-1536", "w 0 of 0-1024", "w 512 of 0-1024", "w 1024 of 1024-1536",
                           "i 0 of 0-1024", "u 0 of 0-1024"]
    world.fired.clear()
    world.madvise(0, 600, DONTNEED), world.munmap(512, 1024)
    assert world.fired == ["I 0-512 of 0-1024", "I 512-1536 of 512-1024"]
