"""Files that shrink and get holes while they are mapped, on the model and on ioproc."""
# ruff: noqa: F403, F405
import pytest

import ioproc
import model
from world import *


@pytest.fixture(params=[model, ioproc], ids=["model", "ioproc"])
def world(request):
    world = World(request.param)
    for page in range(8):
        for file in world.file, world.memfd:
            file.write(page * PAGE, b"%d" % page * PAGE)
    yield world
    world.check()


@pytest.fixture(params=["file", "memfd"])
def file(request, world):
    return getattr(world, request.param)


def mapped_twice(world, file):
    """All of it shared at 0, and privately at 8, there with a copy of page 5 and page 2 only read."""
    world.map_file(0, 8, flags=SHARED, file=file), world.map_file(8, 8, file=file)
    world.mm.touch(BASE, 8 * PAGE), world.read(10), world.write(13)


def beyond_the_end(world, page, write=False):
    with pytest.raises(world.impl.BusError) as raised:
        world.write(page) if write else world.read(page)
    assert raised.value.address == BASE + page * PAGE


# --- truncate -----------------------------------------------------------------------------------------


def test_shrinking(world, file):
    mapped_twice(world, file)
    file.truncate(3 * PAGE)
    assert file.size == 3 * PAGE and len(file.read(0, 8 * PAGE)) == 3 * PAGE
    assert [world.says(page) != "absent" for page in range(8)] == [True] * 3 + [False] * 5
    assert world.says(13) == "absent"                   # private copies too
    assert world.read(10) == b"2"
    for page in 3, 7, 11, 13:
        beyond_the_end(world, page), beyond_the_end(world, page, write=True)
    assert world.vmas() == [(0, 8), (8, 16)]            # they still map it


def test_growing_back(world, file):
    mapped_twice(world, file)
    file.truncate(3 * PAGE), file.truncate(8 * PAGE)
    assert world.read(2) == b"2" and world.read(3) == b"\0" == world.read(13) and file.read(5 * PAGE, 2) == b"\0\0"


def test_the_tail_of_the_last_page(world, file):
    """It reads as zeros, in mappings too; a private copy keeps what it has."""
    world.map_file(0, 8, flags=SHARED, file=file), world.map_file(8, 8, file=file)
    world.read(2), world.write(10, data=b"c")
    file.truncate(2 * PAGE + 10)
    assert world.mm.read(BASE + 2 * PAGE + 8, 4) == b"22\0\0" == world.mm.read(BASE + 3 * PAGE - 2, 2).rjust(4, b"2")
    assert world.mm.read(BASE + 10 * PAGE, 12) == b"c" + b"2" * 11
    file.truncate(3 * PAGE)
    assert file.read(2 * PAGE + 8, 4) == b"22\0\0"


def test_growing_zeroes_nothing(world, file):
    """What was written beyond the end in the last page shows when the file grows over it."""
    file.truncate(100)
    world.map_file(0, 1, flags=SHARED, file=file)
    world.mm.write(BASE + 150, b"x")
    file.truncate(200)
    assert file.read(149, 3) == b"\0x\0"


def test_nothing_fires_when_no_page_goes(world, file):
    world.register(world.ops())
    mapped_twice(world, file)
    world.fired.clear()
    file.truncate(8 * PAGE - 5), file.truncate(7 * PAGE + 1), file.truncate(9 * PAGE), file.truncate(9 * PAGE)
    assert world.fired == []


def test_to_nothing(world, file):
    mapped_twice(world, file)
    file.truncate(0)
    assert file.read(0, 10) == b"" and world.mm.stats["rss_pages"] == 0
    beyond_the_end(world, 0)


def test_pages_beyond_the_end_were_unmapped_before(world, file):
    """The VMA's part beyond the new end, though nothing was ever there beyond the old one."""
    world.register(world.ops())
    world.map_file(0, 12, flags=SHARED, file=file)
    file.truncate(8 * PAGE), file.truncate(6 * PAGE + 1)
    assert world.fired == ["I 7-12 of 0-12"]


def test_in_locked_memory(world, file):
    world.map_file(0, 8, flags=SHARED, file=file), world.mlock(0, 8)
    file.truncate(PAGE)
    assert world.mm.stats["rss_pages"] == 1


def test_swapped_and_written_back_pages_go(world, file):
    mapped_twice(world, file)
    world.mem.reclaim(ALL)
    file.truncate(2 * PAGE + 1)
    world.memfd.truncate(0), world.file.truncate(0)
    assert world.mem.stats["swap_used"] == 0 and world.mem.stats["frames_used"] == 0
    file.truncate(8 * PAGE)
    assert world.read(1) == b"\0" == world.read(13)


def test_a_swapped_tail(world, file):
    world.mem.reclaim(ALL)
    file.truncate(10)
    assert file.read(0, 20) == b"0" * 10
    file.truncate(20)
    assert file.read(0, 20) == b"0" * 10 + bytes(10)


def test_a_pinned_page_leaves_the_file(world, file):
    """The device keeps the frame; the file and its mappings get another."""
    world.map_file(0, 8, flags=SHARED, file=file)
    pins, used = world.pin(3), world.mem.stats["frames_used"]
    file.truncate(3 * PAGE), file.truncate(8 * PAGE)
    world.write(3, data=b"new")
    assert world.page(3)["pfn"] != pins[0]
    world.mem.unpin(pins)
    assert world.mem.stats["frames_used"] == used - 5 + 1


def test_no_size(world, file):
    with pytest.raises((ValueError, OSError)):
        file.truncate(-1)
    assert file.size == 8 * PAGE


# --- holes --------------------------------------------------------------------------------------------


def test_a_hole(world, file):
    """Whole pages go, from all who map them; private copies stay; parts of pages are zeroed."""
    mapped_twice(world, file)
    file.punch_hole(2 * PAGE - 4, 4 * PAGE + 8)
    assert file.size == 8 * PAGE
    assert file.read(2 * PAGE - 6, 4) == b"11\0\0" and file.read(6 * PAGE + 2, 4) == b"\0\0" + b"66"
    assert [world.says(page) for page in (1, 2, 5, 6)] == ["writable", "absent", "absent", "writable"]
    assert world.mm.read(BASE + 2 * PAGE - 6, 8) == b"11" + bytes(6)
    assert world.says(10) == "absent" and world.read(10) == b"\0"
    assert world.read(13) == b"x" and file.read(5 * PAGE, 1) == b"\0"


def test_a_hole_in_a_page(world, file):
    world.register(world.ops())
    mapped_twice(world, file)
    world.fired.clear()
    file.punch_hole(PAGE + 1, 2)
    assert world.fired == [] and file.read(PAGE, 4) == b"1\0\0" + b"1"


def test_a_hole_beyond_the_end(world, file):
    file.punch_hole(7 * PAGE, 100 * PAGE), file.punch_hole(50 * PAGE, PAGE)
    assert file.size == 8 * PAGE and file.read(7 * PAGE, PAGE) == bytes(PAGE) and file.read(6 * PAGE, 1) == b"6"


@pytest.mark.parametrize("offset, length", [(0, 0), (0, -1), (-1, 5)])
def test_bad_holes(world, file, offset, length):
    with pytest.raises((OSError, ValueError)):
        file.punch_hole(offset, length)


def test_swapped_copies_stay_where_a_hole_is(world, file):
    mapped_twice(world, file)
    world.mem.reclaim(ALL)
    file.punch_hole(0, 8 * PAGE)
    assert world.read(13) == b"x" and world.read(5) == b"\0"


def test_remove(world, file):
    """MADV_REMOVE: a hole where the range is mapped."""
    mapped_twice(world, file)
    world.madvise(2, 3, REMOVE)
    assert [file.read(page * PAGE, 1) for page in range(8)] == [b"0", b"1", b"\0", b"\0", b"\0", b"5", b"6", b"7"]


def test_remove_in_shared_anonymous_memory(world):
    world.map(0, 4, flags=SHARED | ANONYMOUS), world.mm.write(BASE, b"x" * 4 * PAGE), world.fork()
    world.read(1, world.child)
    world.madvise(1, 2, REMOVE)
    assert [world.read(page, world.child) for page in range(4)] == [b"x", b"\0", b"\0", b"x"]


@pytest.mark.parametrize("code, before", [
    ("EINVAL", lambda w: w.map(1, 2)), ("EINVAL", lambda w: w.mlock(1, 1)), ("EACCES", lambda w: w.map_file(1, 2)),
    ("ENOMEM", lambda w: w.munmap(1, 2))], ids=["anonymous", "locked", "private", "hole"])
def test_what_cannot_be_removed(world, code, before):
    """Stops at what cannot; what is before is done, and a hole is passed over."""
    world.map_file(0, 4, flags=SHARED, file=world.memfd)
    before(world)
    fails(code, world.madvise, 0, 4, REMOVE)
    assert world.memfd.read(0, 1) == b"\0"
    assert world.memfd.read(3 * PAGE, 1) == (b"\0" if code == "ENOMEM" else b"3")


def test_read_only_mappings_of_a_writable_file(world):
    """Writable or not at the moment does not matter; a segment attached for reading never is."""
    world.map_file(0, 1, "r--", SHARED, file=world.memfd)
    world.madvise(0, 1, REMOVE)
    assert world.memfd.read(0, 1) == b"\0"
    world.mm.shmat(world.memfd, BASE + 16 * PAGE, readonly=True)
    fails("EACCES", world.madvise, 16, 1, REMOVE)


# --- memory between processes that are not related -----------------------------------------------------


def test_a_memfd_between_strangers(world):
    other = world.new()
    world.others.append(other)
    world.map_file(0, 2, flags=SHARED, file=world.memfd), world.map_file(40, 2, flags=SHARED, file=world.memfd, mm=other)
    world.write(1, data=b"hello")
    assert other.read(BASE + 41 * PAGE, 5) == b"hello" and world.page(1)["shared"]
    other.write(BASE + 41 * PAGE, b"j")
    world.mem.reclaim(ALL)
    assert world.mm.read(BASE + PAGE, 5) == b"jello" == world.memfd.read(PAGE, 5)


def test_private_mappings_hear_of_it_too(world):
    """Even one that has its own copies of all."""
    other = world.new()
    world.others.append(other)
    world.map_file(0, 4, file=world.memfd, mm=other), other.write(BASE, b"x" * 4 * PAGE)
    other.register_ops(world.ops("other"))
    world.memfd.truncate(PAGE)
    assert world.fired == ["other I 1-4 of 0-4"] and other.stats["rss_pages"] == 1
