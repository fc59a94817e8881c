"""Who is reclaimed: second chance over accessed bits, and who is passed over. What follows from it is in test_swap.py.

The choice is ioproc's alone, the model has none; what holds whatever is chosen runs on both.
"""
# ruff: noqa: F403, F405
import threading

import pytest

import ioproc
import model
from world import *


@pytest.fixture
def world():
    world = World(ioproc)
    yield world
    world.check()


@pytest.fixture(params=[model, ioproc], ids=["model", "ioproc"])
def both(request):
    world = World(request.param)
    yield world
    world.check()


def swapped(world, n, mm=None):
    """Which of pages 0 to n - 1 are in swap."""
    return [page for page in range(n) if world.page(page, mm)["swapped"]]


def age(world, page, n=1):
    world.madvise(page, n, COLD)


# --- second chance ------------------------------------------------------------------------------------


def test_a_page_that_was_used_is_passed_over(world):
    world.map(0, 4), world.mm.touch(BASE, 4 * PAGE, True)
    age(world, 2)
    assert world.mem.reclaim(1) == 1 and swapped(world, 4) == [2]


def test_and_has_had_its_chance(world):
    """What was passed over goes the next time, unless it was used again. Clearing an accessed bit fires nothing."""
    world.map(0, 4), world.mm.touch(BASE, 4 * PAGE, True)
    age(world, 0)
    world.register(world.ops())
    world.mem.reclaim(1)                # may have looked at all
    world.mem.reclaim(1)                # now it has
    assert 0 in swapped(world, 4) and len(swapped(world, 4)) == 2
    young = [page for page in range(4) if world.page(page)["young"]]
    assert not young and world.fired == [f"i {page} of 0-4" for page in [0, *[p for p in swapped(world, 4) if p]]]
    kept = next(page for page in range(4) if not world.page(page)["swapped"])
    world.mm.touch(BASE + kept * PAGE)
    world.mem.reclaim(1)
    assert kept not in swapped(world, 4)


def test_any_use_anywhere_counts(world):
    """The accessed bit of one of the entries is enough."""
    world.map(0, 2), world.mm.touch(BASE, 2 * PAGE, True), world.fork()
    age_all = [(world.mm, 1), (world.child, 1)]
    for mm, page in age_all:
        mm.madvise(BASE + page * PAGE, PAGE, COLD)          # shared: COLD leaves it
    assert world.page(1)["young"]
    world.madvise(1, 1, FREE), world.madvise(1, 1, FREE, world.child)      # this ages it
    assert not world.page(1)["young"] and not world.page(1, world.child)["young"]
    world.write(1, world.child)                             # copied: the parent's is the parent's alone now
    assert world.mem.reclaim(1) == 1
    assert world.says(1) == "absent" and not swapped(world, 2) and not swapped(world, 2, world.child)


def test_two_turns_without_a_victim_end_it(world):
    world.map(0, 8), world.mm.touch(BASE, 8 * PAGE, True)
    pins = world.pin(0, 8)
    before = world.mem.stats["scanned"]
    assert world.mem.reclaim(1) == 0
    assert world.mem.stats["scanned"] - before <= 2 * 256
    world.mem.unpin(pins)
    assert world.mem.reclaim(ALL) == 8


def test_as_many_as_asked_for(both):
    both.map(0, 8), both.mm.touch(BASE, 8 * PAGE, True)
    assert both.mem.reclaim(0) == 0 and both.mem.stats["reclaimed"] == 0
    assert both.mem.reclaim(3) == 3 and len(swapped(both, 8)) == 3
    assert both.mem.reclaim(ALL) == 5 and both.mem.reclaim(ALL) == 0
    assert both.mem.stats["reclaimed"] == 8


@pytest.mark.parametrize("n", [-1, 1.5, "1", None])
def test_how_many_must_be_a_number(world, n):
    with pytest.raises((ValueError, TypeError)):
        world.mem.reclaim(n)


# --- passed over --------------------------------------------------------------------------------------


def test_locked(both):
    both.map(0, 3), both.mm.touch(BASE, 3 * PAGE, True), both.mlock(1, 1)
    assert both.mem.reclaim(ALL) == 2 and both.says(1) == "writable dirty"
    both.munlock(1, 1)
    assert both.mem.reclaim(ALL) == 1


def test_locked_by_one_of_two(both):
    """The child's VMA is not locked; the frame stays all the same."""
    both.map(0, 1), both.write(0), both.mlock(0, 1), both.fork()
    assert both.mem.reclaim(ALL) == 0
    both.mm.exit()
    assert both.mem.reclaim(ALL) == 1 and both.says(0, both.child) == "swapped"
    both.restart()


def test_pinned(both):
    both.map(0, 2), both.mm.touch(BASE, 2 * PAGE, True)
    pins = both.pin(1), both.pin(1)
    assert both.mem.reclaim(ALL) == 1
    both.mem.unpin(pins[0])
    assert both.mem.reclaim(ALL) == 0
    both.mem.unpin(pins[1])
    assert both.mem.reclaim(ALL) == 1


def test_the_zero_page_and_device_memory(both):
    both.map(0, 1), both.read(0), both.map_device(4, 1)
    assert both.mem.reclaim(ALL) == 0


def test_without_swap_only_what_is_elsewhere(both):
    both = both.again(swap_slots=0)
    both.map(0, 1), both.write(0), both.map(4, 1, flags=SHARED | ANONYMOUS), both.write(4)
    both.map_file(8, 1), both.read(8), both.map_file(9, 1, first=1), both.write(9)
    assert both.mem.reclaim(ALL) == 2                   # the two page-cache pages; the private copy stays
    assert [both.says(page) for page in (0, 4, 8, 9)] == ["writable dirty", "writable dirty", "absent", "writable dirty"]


def test_taken_from_all(both):
    both.map(0, 1), both.write(0)
    processes = [both.fork() for _ in range(3)]
    assert both.mem.reclaim(ALL) == 1 and both.mem.stats["swap_used"] == 1
    assert [both.says(0, mm) for mm in (both.mm, *processes)] == ["swapped"] * 4


class Busy:
    """A thread that stays inside a callback of an address space."""

    def __init__(self, world, mm):
        self.entered, self.leave = threading.Event(), threading.Event()
        mm.register_ops(ioproc.Ops(update_page=lambda vma, addr: (self.entered.set(), self.leave.wait(20))))
        self.thread = threading.Thread(target=mm.touch, args=(BASE + 100 * PAGE,))
        world.map(100, 1, mm=mm)

    def __enter__(self):
        self.thread.start()
        assert self.entered.wait(20)

    def __exit__(self, *_):
        self.leave.set()
        self.thread.join()


def test_busy_address_spaces(world):
    """Nothing is taken from an address space in which a thread is; not even what another has too."""
    other = world.new()
    world.others.append(other)
    world.map(0, 2), world.mm.touch(BASE, 2 * PAGE, True)
    world.fork(), world.write(1, world.child)           # page 0 is shared, page 1 is not
    world.map(0, 1, mm=other), world.write(0, other)
    with Busy(world, world.child):
        assert world.mem.reclaim(ALL) == 2              # the parent's page 1, the other's page 0
        assert swapped(world, 2) == [1] and world.page(0)["present"] and world.page(0, other)["swapped"]
    assert swapped(world, 2, world.child) == []
    world.mem.reclaim(ALL)
    assert swapped(world, 2) == [0, 1] == swapped(world, 2, world.child)


def test_one_s_own_address_space_is_not_busy(world):
    """A fault that finds no frame takes one from the address space it is in."""
    world = world.again(frames=4)
    world.map(0, 8)
    assert world.mm.touch(BASE, 8 * PAGE, True) == 8
    assert len(swapped(world, 8)) >= 4


# --- when it happens ------------------------------------------------------------------------------------


def test_a_fault_without_a_frame(both):
    """A batch is reclaimed, so that the next faults find frames: 32, or a sixteenth of a small memory."""
    for frames, batch in (64, 4), (1024, 32), (8, 1):
        both = both.again(frames=frames, swap_slots=frames)
        both.map(0, frames + 1), both.mm.touch(BASE, frames * PAGE, True)
        both.write(frames)
        assert both.mem.stats["reclaimed"] == batch and both.mem.stats["frames_free"] == batch - 1


def test_more_memory_than_frames(both):
    both = both.again(frames=8, swap_slots=64)
    both.map(0, 40)
    for page in range(40):
        both.write(page, data=bytes([page]))
    both.fork(), both.write(7, both.child, b"c")
    assert [both.read(page) for page in range(40)] == [bytes([page]) for page in range(40)]
    assert both.read(7, both.child) == b"c" and both.read(8, both.child) == bytes([8])


@pytest.mark.parametrize("call", [
    lambda w: w.write(9), lambda w: w.file.write(0, b"x"), lambda w: w.madvise(8, 2, POPULATE_WRITE), lambda w: w.pin(9),
    lambda w: w.mlock(8, 2), lambda w: w.map(8, 2, flags=PRIVATE | ANONYMOUS | POPULATE) and None],
    ids=["write", "File.write", "MADV_POPULATE_WRITE", "pin", "mlock", "MAP_POPULATE"])
def test_whoever_needs_a_frame(both, call):
    both = both.again(frames=4, swap_slots=8)
    both.map(0, 10), both.mm.touch(BASE, 4 * PAGE, True)
    pins = call(both)
    assert both.mem.stats["reclaimed"] >= 1
    if pins is not None:
        both.mem.unpin(pins)


def test_nothing_can_be_reclaimed(both):
    """MemoryError, and everything as it was."""
    both = both.again(frames=4, swap_slots=8)
    both.map(0, 8), both.mlock(0, 3), both.write(4, data=b"kept")
    pins = both.pin(4)
    with pytest.raises(MemoryError):
        both.write(5)
    with pytest.raises(MemoryError):
        both.file.write(0, b"x")
    assert both.says(5) == "absent" and both.mm.read(BASE + 4 * PAGE, 4) == b"kept" and both.file.read(0, 1) == b"\0"
    both.check()
    both.mem.unpin(pins)
    both.write(5)
    assert both.says(4) == "swapped"


def test_swap_runs_full(both):
    both = both.again(frames=4, swap_slots=3)
    both.map(0, 8)
    with pytest.raises(MemoryError):
        both.mm.touch(BASE, 8 * PAGE, True)
    stats = both.mem.stats
    assert (stats["frames_free"], stats["swap_free"]) == (0, 0) and both.mm.stats["rss_pages"] == 4
    both.check()
    both.munmap(0, 2)
    both.mm.touch(BASE + 2 * PAGE, PAGE, True)


def test_a_page_is_not_lost_between_copy_and_reclaim(both):
    """The page to be copied may itself be reclaimed when the copy finds no frame: the fault starts anew."""
    both = both.again(frames=1, swap_slots=4)
    both.map(0, 1), both.write(0, data=b"both"), both.fork()
    both.write(0, data=b"m")
    assert both.mm.read(BASE, 4) == b"moth" and both.child.read(BASE, 4) == b"both"


# --- hooks ----------------------------------------------------------------------------------------------


def test_what_the_hook_sees(both):
    seen = []
    both.map(0, 1), both.write(0, data=b"x"), both.fork()
    for mm in both.mm, both.child:
        mm.register_ops(both.impl.Ops(invalidate_page=lambda vma, addr, mm=mm: seen.append(
            (mm is both.child, bool(mm.pagemap(addr, PAGE)[0]["present"])))))
    both.mem.reclaim(ALL)
    assert sorted(seen) == [(False, True), (True, True)]


def test_callbacks_of_another_address_space(both):
    """What one raises goes to the thread that needed a frame, and says where it comes from."""
    both = both.again(frames=4, swap_slots=8)
    other = both.new()
    both.others.append(other)
    both.map(0, 4, mm=other), other.touch(BASE, 4 * PAGE, True)

    def boom(vma, addr):
        raise ZeroDivisionError

    other.register_ops(both.impl.Ops(invalidate_page=boom))
    both.map(0, 1)
    with pytest.raises(ZeroDivisionError) as raised:
        both.write(0, data=b"done")
    assert "AddressSpace" in "".join(raised.value.__notes__)
    assert both.mm.read(BASE, 4) == b"done"             # the operation completes


def test_a_callback_does_not_reclaim(both):
    refused = []

    def callback(vma, addr):
        with pytest.raises(RuntimeError):
            both.mem.reclaim(1)
        with pytest.raises(RuntimeError):
            both.mem.pin(both.mm, BASE, PAGE)
        with pytest.raises(RuntimeError):
            both.mem.unpin([])
        refused.append(addr)

    both.map(0, 1), both.register(both.impl.Ops(update_page=callback)), both.write(0)
    assert refused


# --- advice ---------------------------------------------------------------------------------------------


def test_paged_out_at_once(both):
    both.map(0, 2), both.mm.touch(BASE, 2 * PAGE, True)
    both.swap_out(0)
    assert swapped(both, 2) == [0] and both.mem.stats["reclaimed"] == 1


def test_paged_out_or_not(both):
    """Not what is pinned, or mapped by more than one entry; page-cache pages that are mapped once are."""
    both.map(0, 3), both.mm.touch(BASE, 3 * PAGE, True)
    pins = both.pin(0)
    both.map_file(3, 2), both.read(3), both.write(4)
    both.map_file(5, 1), both.read(5), both.map_file(6, 1, first=2), both.read(6)
    both.swap_out(0, 7), both.mem.unpin(pins)
    says = [both.says(page) for page in range(7)]
    assert says == ["writable dirty", "swapped", "swapped", "shared", "swapped", "shared", "absent"]


def test_cold(both):
    both.map(0, 3), both.mm.touch(BASE, 3 * PAGE, True)
    both.register(both.ops())
    both.madvise(1, 1, COLD)
    assert [bool(both.page(page)["young"]) for page in range(3)] == [True, False, True] and both.fired == []


def test_a_frame_that_the_operation_itself_frees_is_there_for_it():
    """Also for the page cache: nothing is reclaimed while one write frees what it needs for its next page."""
    mem = ioproc.PhysicalMemory(frames=2, swap_slots=8)
    mm = ioproc.AddressSpace(mem)
    file = ioproc.File(mem, PAGE)
    mm.mmap(PAGE, addr=BASE)
    mm.mmap(PAGE, 3, 1, addr=BASE + PAGE, file=file)
    mm.write(BASE, b"x")
    child = mm.fork()
    mem.reclaim(2)
    child.read(BASE, 1)                                     # a frame of its contents, which are in swap as well
    before = mem.stats["swapped_out"]
    child.write(BASE, b"y" * 2 * PAGE)                      # a copy, which frees that frame; then a page of the file
    assert mem.stats["swapped_out"] == before and mem.stats["frames_used"] == 2
    assert mm.read(BASE, 1) == b"x"
