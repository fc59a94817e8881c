"""Locked memory, on the model and on ioproc."""
# ruff: noqa: F403, F405
import pytest

import ioproc
import model
from world import *


@pytest.fixture(params=[model, ioproc], ids=["model", "ioproc"])
def world(request):
    world = World(request.param)
    yield world
    world.check()


def locked(world):
    return world.mm.stats["locked_pages"]


def limited(world, pages):
    return world.again(rlimits={"MEMLOCK": pages * PAGE + 5})


def says(world, *pages):
    return [world.says(page) for page in pages]


def test_locked_memory_is_present(world):
    """Private memory that may be written gets pages of its own, all else what a read gets."""
    world.map(0, 2), world.read(0)
    world.map(2, 1, "r--"), world.map(3, 1, flags=SHARED | ANONYMOUS)
    world.map_file(4, 1), world.map_file(5, 1, "r--")
    world.mlock(0, 6)
    assert says(world, *range(6)) == ["writable dirty", "writable dirty", "zero", "writable", "writable dirty", "read-only"]
    assert locked(world) == 6 and world.mem.reclaim(ALL) == 0


def test_locking_splits_and_unlocking_merges(world):
    world.map(0, 6)
    world.mlock(2, 2)
    assert world.vmas() == [(0, 2), (2, 4), (4, 6)]
    world.mlock(0, 2)
    assert world.vmas() == [(0, 4), (4, 6)] and locked(world) == 4
    world.munlock(0, 6)
    assert world.vmas() == [(0, 6)] and locked(world) == 0 and world.says(0) == "writable dirty"


def test_parts_of_pages_are_pages(world):
    world.map(0, 4)
    world.mm.mlock(BASE + PAGE + 5, PAGE)
    assert locked(world) == 2
    world.mm.munlock(BASE + 2 * PAGE - 1, 1)
    assert locked(world) == 1
    world.mm.mlock(BASE + PAGE, 0), world.mm.mlock(BASE, (1 << 64) - 1)     # no page at all
    assert locked(world) == 1
    world.mm.mlock(BASE + 1, 0)
    assert locked(world) == 2


@pytest.mark.parametrize("call", ["mlock", "munlock"])
def test_holes(world, call):
    """What is before the hole is done, but not populated."""
    world.map(0, 2), world.map(3, 2)
    if call == "munlock":
        world.mlock(0, 2), world.mlock(3, 2)
    fails("ENOMEM", getattr(world, call), 0, 5)
    assert locked(world) == 2 and (call == "munlock" or world.says(0) == "absent")
    fails("ENOMEM", getattr(world, call), 2, 1)
    fails("EINVAL", getattr(world.mm, call), BASE, (1 << 64) - PAGE)


def test_populating_stops_where_nothing_can_be_had(world):
    """All VMAs are locked nevertheless."""
    world.map(0, 1), world.map(1, 1, "---"), world.map(2, 1)
    fails("ENOMEM", world.mlock, 0, 3)
    assert says(world, 0, 1, 2) == ["writable dirty", "absent", "absent"] and locked(world) == 3
    world.map_file(8, 2, first=7)
    fails("ENOMEM", world.mlock, 8, 2)
    assert says(world, 8, 9) == ["writable dirty", "absent"] and locked(world) == 5


def test_out_of_swap_and_shared_pages(world):
    world.map(0, 3), world.mm.touch(BASE, 2 * PAGE, True), world.swap_out(0), world.fork()
    world.mlock(0, 3)
    assert says(world, 0, 1, 2) == ["writable dirty"] * 3 and world.mm.stats["swap_pages"] == 0
    world.child.exit(), world.others.clear()


def test_children_are_not_locked(world):
    world.map(0, 2), world.mlock(0, 1), world.fork()
    assert world.child.stats["locked_pages"] == 0 and len(world.child.vmas()) == 2
    world.munlock(0, 1), world.mlock(1, 1)
    assert world.child.mmap(PAGE, addr=BASE + 2 * PAGE) == BASE + 2 * PAGE


def test_map_locked(world):
    world.map(0, 2, flags=PRIVATE | ANONYMOUS | LOCKED), world.map(2, 2)
    assert says(world, 0, 1, 2) == ["writable dirty"] * 2 + ["absent"] and locked(world) == 2
    assert world.vmas() == [(0, 2), (2, 4)]
    world.map(8, 2, "---", PRIVATE | ANONYMOUS | LOCKED), world.map_file(10, 9, flags=PRIVATE | LOCKED)     # as far as it goes
    assert locked(world) == 13 and world.says(17) == "writable dirty" and world.says(18) == "absent"


def test_growing_and_moving(world):
    world.map(0, 2, flags=PRIVATE | ANONYMOUS | LOCKED)
    world.mremap(0, 2, 3)
    assert locked(world) == 3 and world.says(2) == "writable dirty"
    world.mremap(0, 3, 4, 8)
    assert locked(world) == 4 and world.says(11) == "writable dirty"
    world.mremap(8, 4, 1)
    assert locked(world) == 1
    world.munmap(8, 1)
    assert locked(world) == 0


def test_what_was_moved_away_is_not_locked(world):
    world.map(0, 2, flags=PRIVATE | ANONYMOUS | LOCKED)
    world.mremap(0, 2, 2, 8, flags=7)
    assert locked(world) == 2 and world.mem.reclaim(ALL) == 0


def test_writable_again(world):
    """Locked private memory that becomes writable gets its own pages at once."""
    world.map(0, 1, "r--"), world.mlock(0, 1)
    assert world.says(0) == "zero"
    world.mprotect(0, 1, "rw-")
    assert world.says(0) == "writable dirty"


@pytest.mark.parametrize("advice", [DONTNEED, FREE, REMOVE, COLD, PAGEOUT])
def test_advice_that_takes_pages(world, advice):
    world.map(0, 1), world.mlock(0, 1)
    fails("EINVAL", world.madvise, 0, 1, advice)
    assert world.says(0) == "writable dirty"


# --- limits -------------------------------------------------------------------------------------------


def test_the_limit(world):
    world = limited(world, 3)
    world.map(0, 8)
    fails("ENOMEM", world.mlock, 0, 4)
    assert locked(world) == 0 and world.vmas() == [(0, 8)]
    world.mlock(0, 2), world.mlock(1, 2)            # page 1 is not counted twice
    assert locked(world) == 3
    fails("ENOMEM", world.mlock, 4, 1)
    world.mlock(0, 3)
    world.munlock(0, 8)
    world.mlock(5, 3)


def test_the_limit_of_mappings(world):
    world = limited(world, 3)
    locked_memory = PRIVATE | ANONYMOUS | LOCKED
    world.map(0, 2, flags=locked_memory)
    with pytest.raises(BlockingIOError):            # EAGAIN
        world.map(4, 2, flags=locked_memory)
    with pytest.raises(BlockingIOError):            # not even over what is locked already
        world.map(0, 2, flags=locked_memory)
    with pytest.raises(BlockingIOError):
        world.mremap(0, 2, 4)
    assert world.vmas() == [(0, 2)]
    world.mremap(0, 2, 3)


def test_no_locking_at_all(world):
    world = world.again(rlimits={"MEMLOCK": 0})
    world.map(0, 1)
    with pytest.raises(PermissionError):
        world.mlock(0, 1)
    with pytest.raises(PermissionError):
        world.map(0, 1, flags=PRIVATE | ANONYMOUS | LOCKED)
    world.munlock(0, 1)
