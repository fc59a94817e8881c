"""Where a page goes when it is reclaimed, and how it comes back, on the model and on ioproc.

Anonymous memory goes to swap slots, which fork shares; file pages to the file; shared memory to swap, as a file.
"""
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


def used(world):
    stats = world.mem.stats
    return stats["frames_used"], stats["swap_used"]


def counted(world, *names):
    return tuple(world.mem.stats[name] for name in names)


# --- anonymous memory ---------------------------------------------------------------------------------


def test_a_page_in_swap(world):
    world.map(0, 2), world.write(0, data=b"kept"), world.write(1)
    world.swap_out(0)
    row = world.page(0)
    assert row["swapped"] and not any(row[name] for name in row.dtype.names if name != "swapped")
    assert used(world) == (1, 1) and world.mm.stats["swap_pages"] == 1 == world.mm.stats["rss_pages"]
    assert world.mm.read(BASE, 4) == b"kept"
    assert used(world) == (2, 0) and world.mm.stats["swap_pages"] == 0
    assert counted(world, "swapped_out", "swapped_in", "reclaimed") == (1, 1, 1)


def test_read_in_it_is_writable_at_once(world):
    world.map(0, 1), world.write(0), world.swap_out(0), world.faults()
    world.read(0)
    assert world.says(0) == "writable"          # and not dirty
    world.write(0)
    assert world.says(0) == "writable dirty" and world.faults() == {"swap": 1}


def test_written_in(world):
    world.map(0, 1), world.write(0, data=b"old"), world.swap_out(0), world.faults()
    world.write(0, data=b"n")
    assert world.says(0) == "writable dirty" and world.faults() == {"swap": 1} and world.mm.read(BASE, 3) == b"nld"


def test_in_memory_that_may_not_be_written(world):
    """The page is still this address space's alone, so that mprotect makes it writable at once."""
    world.map(0, 1), world.write(0), world.mprotect(0, 1, "r--"), world.swap_out(0), world.faults()
    world.read(0)
    assert world.says(0) == "read-only"
    world.mprotect(0, 1, "rw-"), world.write(0)
    assert world.faults() == {"swap": 1}


def test_protection_changes_while_in_swap(world):
    world.map(0, 1), world.write(0), world.swap_out(0)
    world.mprotect(0, 1, "---"), world.mprotect(0, 1, "rw-")
    assert world.says(0) == "swapped"
    world.read(0)
    assert world.says(0) == "writable"


def test_a_move_takes_the_entry_along(world):
    world.map(0, 1), world.write(0, data=b"kept"), world.swap_out(0)
    world.mremap(0, 1, 1, 8)
    assert world.says(8) == "swapped" and world.mm.read(BASE + 8 * PAGE, 4) == b"kept" and used(world) == (1, 0)


@pytest.mark.parametrize("end", [lambda w: w.munmap(0, 1), lambda w: w.madvise(0, 1, DONTNEED), lambda w: w.madvise(0, 1, FREE),
                                 lambda w: w.map(0, 1), lambda w: w.mm.exec()],
                         ids=["munmap", "DONTNEED", "FREE", "MAP_FIXED", "exec"])
def test_what_frees_a_slot(world, end):
    world.map(0, 1), world.write(0), world.swap_out(0)
    end(world)
    assert used(world) == (0, 0) and world.says(0) == "absent"


def test_only_pages_that_one_entry_maps_are_paged_out(world):
    """MADV_PAGEOUT leaves shared pages; reclaim takes them from all."""
    world.map(0, 1), world.write(0), world.fork()
    world.swap_out(0)
    assert world.says(0) == "dirty shared"
    world.mem.reclaim(ALL)
    assert world.says(0) == world.says(0, world.child) == "swapped"


def test_advice_is_not_for_locked_memory(world):
    world.map(0, 2), world.mlock(1, 1), world.write(0)
    fails("EINVAL", world.madvise, 0, 2, PAGEOUT)
    fails("EINVAL", world.madvise, 1, 1, COLD)
    assert world.says(0) == "swapped" and world.says(1) == "writable dirty"


def test_no_free_slot(world):
    world = world.again(swap_slots=2)
    world.map(0, 3), world.mm.touch(BASE, 3 * PAGE, True)
    assert world.mem.reclaim(ALL) == 2 and used(world) == (1, 2)
    assert world.mem.reclaim(ALL) == 0
    resident = next(page for page in range(3) if world.says(page) != "swapped")
    world.swap_out(resident)
    assert world.says(resident) == "writable dirty"
    world.munmap((resident + 1) % 3, 1)
    assert world.mem.reclaim(ALL) == 1 and used(world) == (0, 2)


# --- swap and fork ------------------------------------------------------------------------------------


def swapped_in_both(world, data=b"both"):
    world.map(0, 1), world.write(0, data=data), world.fork(), world.mem.reclaim(ALL)
    world.faults(), world.faults(world.child)


def test_fork_shares_the_slot(world):
    world.map(0, 1), world.write(0, data=b"both"), world.swap_out(0)
    world.fork()
    assert used(world) == (0, 1) and world.says(0, world.child) == "swapped"
    world.write(0, data=b"mine")
    assert used(world) == (1, 1) and world.child.read(BASE, 4) == b"both"
    assert used(world) == (2, 0)


def test_readers_get_the_same_frame(world):
    swapped_in_both(world)
    world.read(0)
    assert world.says(0) == "read-only" and used(world) == (1, 1)       # the child's entry still needs the slot
    world.read(0, world.child)
    assert world.says(0) == "shared" == world.says(0, world.child) and used(world) == (1, 0)
    assert world.page(0)["pfn"] == world.page(0, world.child)["pfn"]
    assert world.faults() == {"swap": 1} == world.faults(world.child)
    assert counted(world, "swapped_in") == (1,)
    world.write(0, world.child, b"own")
    assert world.faults(world.child) == {"cow": 1} and world.mm.read(BASE, 4) == b"both"


def test_a_page_that_is_also_in_swap_is_copied(world):
    swapped_in_both(world)
    world.read(0), world.write(0, data=b"mine")
    assert world.faults() == {"swap": 1, "cow": 1}
    assert used(world) == (1, 1) and world.child.read(BASE, 4) == b"both"


def test_write_to_a_shared_entry(world):
    """One fault: a new frame at once."""
    swapped_in_both(world)
    world.write(0, data=b"mine")
    assert world.says(0) == "writable dirty" and world.faults() == {"swap": 1} and used(world) == (1, 1)
    assert world.child.read(BASE, 4) == b"both" and used(world) == (2, 0)


def test_the_last_user_writes_without_a_copy(world):
    swapped_in_both(world)
    world.child.exit(), world.others.clear()
    assert used(world) == (0, 1)
    world.write(0)
    assert world.says(0) == "writable dirty" and world.faults() == {"swap": 1} and used(world) == (1, 0)


def test_the_last_user_reads_first(world):
    """Nobody looks whether it is the last: it finds out at the write."""
    swapped_in_both(world)
    world.child.exit(), world.others.clear()
    world.read(0)
    assert world.says(0) == "read-only"
    world.write(0)
    assert world.faults() == {"swap": 1, "reuse": 1}


def test_back_to_the_same_slot(world):
    swapped_in_both(world)
    world.read(0), world.swap_out(0)
    assert used(world) == (0, 1) and world.says(0) == "swapped" == world.says(0, world.child)
    assert world.mm.read(BASE, 4) == b"both" == world.child.read(BASE, 4)


def test_generations(world):
    """A slot with three users: each writes, nobody sees another's."""
    world.map(0, 1), world.write(0, data=b"0"), world.fork()
    grandchild = world.child.fork()
    world.others.append(grandchild)
    world.mem.reclaim(ALL)
    assert used(world) == (0, 1)
    for mm, data in (world.child, b"1"), (grandchild, b"2"):
        world.write(0, mm, data)
    assert [mm.read(BASE, 1) for mm in (world.mm, world.child, grandchild)] == [b"0", b"1", b"2"] and used(world) == (3, 0)


# --- pages that may vanish ------------------------------------------------------------------------------


def test_freed_and_not_written(world):
    """They vanish even if they were read since, and need no slot."""
    world = world.again(swap_slots=0)
    world.map(0, 3), world.mm.touch(BASE, 3 * PAGE, True), world.write(1)
    world.madvise(0, 2, FREE), world.read(0)
    assert world.mem.reclaim(ALL) == 2 and counted(world, "discarded", "swapped_out") == (2, 0)
    assert [world.says(page) for page in range(3)] == ["absent", "absent", "writable dirty"]
    assert world.read(1) == b"\0" and world.says(1) == "zero"


def test_freed_and_written_since(world):
    world.map(0, 1), world.write(0, data=b"old"), world.madvise(0, 1, FREE), world.write(0, data=b"n")
    world.mem.reclaim(ALL)
    assert world.says(0) == "swapped" and world.mm.read(BASE, 3) == b"nld"


def test_freed_here_kept_there(world):
    """Of a page shared after fork, the parent's entry says that it was written."""
    world.map(0, 1), world.write(0, data=b"kept"), world.fork()
    world.madvise(0, 1, FREE, world.child)
    world.mem.reclaim(ALL)
    assert world.mm.read(BASE, 4) == b"kept"


def test_freed_here_kept_there_after_swap(world):
    """The parent's entry says nothing any more: only the frame knows that it is not a copy of anything."""
    world.map(0, 1), world.write(0, data=b"kept"), world.swap_out(0), world.read(0), world.fork()
    world.madvise(0, 1, FREE, world.child)
    world.mem.reclaim(ALL)
    assert world.mm.read(BASE, 4) == b"kept"


# --- files ----------------------------------------------------------------------------------------------


def test_a_written_page_goes_to_the_file(world):
    world.map_file(0, 2, flags=SHARED), world.write(0, data=b"new"), world.read(1)
    assert world.mem.reclaim(ALL) == 2
    assert world.says(0) == "absent" == world.says(1)
    assert counted(world, "written_back", "discarded", "swapped_out") == (1, 1, 0) and used(world) == (0, 0)
    assert world.file.read(0, 3) == b"new" and used(world) == (0, 0)        # looking takes no frame
    world.faults()
    assert world.mm.read(BASE, 3) == b"new" and world.faults() == {"file": 1}


def test_written_through_a_mapping_that_is_gone(world):
    world.map_file(0, 1, flags=SHARED), world.write(0, data=b"new"), world.munmap(0, 1)
    world.mem.reclaim(ALL)
    assert counted(world, "written_back") == (1,) and world.file.read(0, 3) == b"new"


def test_written_by_a_call(world):
    world.file.write(PAGE, b"call")
    assert world.mem.reclaim(ALL) == 1 and counted(world, "written_back") == (1,)
    world.file.write(PAGE + 1, b"A")
    assert world.file.read(PAGE, 4) == b"cAll"


def test_a_page_read_again_is_clean(world):
    world.file.write(0, b"once"), world.mem.reclaim(ALL)
    world.map_file(0, 1), world.read(0), world.mem.reclaim(ALL)
    assert counted(world, "written_back", "discarded") == (1, 1) and world.mm.read(BASE, 4) == b"once"


def test_a_private_copy_is_anonymous(world):
    world.file.write(0, b"file"), world.map_file(0, 1), world.write(0, data=b"mine")
    world.mem.reclaim(ALL)
    assert world.says(0) == "swapped" and used(world) == (0, 1)
    assert world.mm.read(BASE, 4) == b"mine" and world.file.read(0, 4) == b"file"


@pytest.mark.parametrize("kind", ["memfd", "anonymous"])
def test_shared_memory_goes_to_swap(world, kind):
    world.map(0, 1, flags=SHARED | ANONYMOUS) if kind == "anonymous" else world.map_file(0, 1, flags=SHARED, file=world.memfd)
    world.write(0, data=b"kept"), world.fork(), world.read(0, world.child)
    assert world.mem.reclaim(ALL) == 1 and used(world) == (0, 1)
    assert world.says(0) == "absent" == world.says(0, world.child)          # the file knows the slot, not the entries
    assert kind == "anonymous" or world.memfd.read(0, 4) == b"kept"
    world.faults()
    assert world.mm.read(BASE, 4) == b"kept" and used(world) == (1, 0) and world.faults() == {"file": 1}
    world.mem.reclaim(ALL), world.mm.exit(), world.child.exit()
    assert used(world) == (0, 0 if kind == "anonymous" else 1)
    world.restart(), world.others.clear()


def test_shared_memory_without_swap_stays(world):
    world = world.again(swap_slots=0)
    world.memfd.write(0, b"x"), world.file.write(0, b"x")
    assert world.mem.reclaim(ALL) == 1 and used(world) == (1, 0)
