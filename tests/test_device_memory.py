"""Device memory (remap_pfn_range), zeromap and remap_file_pages, on the model and on ioproc."""
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


def letters(world, first, n):
    return b"".join(world.read(page) for page in range(first, first + n))


def refused(world, advice, page=0, n=1):
    try:
        world.madvise(page, n, advice)
    except OSError as error:
        return errno.errorcode[error.errno]
    return None


# --- device memory ------------------------------------------------------------------------------------


def test_it_is_there_at_once(world):
    world.map_device(0, 2), world.faults()
    rows = world.mm.pagemap(BASE, 2 * PAGE)
    assert rows["pfn"].tolist() == [DEVICE, DEVICE + 1] and rows["present"].all() and rows["writable"].all()
    world.write(0, data=b"device"), world.read(1)
    assert world.faults() == {} and world.mem.stats["frames_used"] == 0 == world.mm.stats["rss_pages"]
    assert world.mm.read(BASE, 6) == b"device"
    vma, = world.mm.vmas()
    assert (vma.file, vma.shared, vma.offset) == (None, True, DEVICE * PAGE)


def test_it_is_the_device_s(world):
    """Whoever maps it sees the same; also after everybody unmapped it."""
    world.map_device(0, 1), world.fork()
    world.write(0, world.child, b"kept")
    other = world.new()
    world.others.append(other)
    at = other.mmap_device(PAGE, DEVICE, 1)
    assert world.mm.read(BASE, 4) == other.read(at, 4) == b"kept"
    with pytest.raises(world.impl.SegmentationFault):
        other.write(at, b"x")
    world.munmap(0, 1), world.map_device(0, 1)
    assert world.mm.read(BASE, 4) == b"kept"


def test_its_entries_never_change(world):
    """No advice takes them away, reclaim leaves them, devices get no reference to them."""
    world.map_device(0, 2)
    assert [refused(world, advice) for advice in (DONTNEED, FREE, COLD, PAGEOUT, WIPEONFORK, POPULATE_READ, POPULATE_WRITE)] == \
        ["EINVAL"] * 7
    assert refused(world, REMOVE) == "ENODEV" and refused(world, WILLNEED) is None
    fails("EFAULT", world.pin, 0)
    world.mlock(0, 2)
    assert world.mm.stats["locked_pages"] == 0 and world.mem.reclaim(ALL) == 0
    assert world.mm.pagemap(BASE, 2 * PAGE)["present"].all()


def test_its_vmas_never_merge_and_never_grow(world):
    world.map_device(0, 4), world.mprotect(1, 1, "r--"), world.mprotect(1, 1, "rw-")
    assert world.vmas() == [(0, 1), (1, 2), (2, 4)]
    fails("EFAULT", world.mremap, 2, 2, 3)
    fails("EFAULT", world.mremap, 0, 0, 1, 8)
    fails("EINVAL", world.mremap, 0, 1, 1, 8, 7)
    world.mremap(2, 2, 1), world.mremap(0, 1, 1, 8)
    assert world.vmas() == [(1, 2), (2, 3), (8, 9)] and world.page(8)["pfn"] == DEVICE
    world.munmap(0, 9)
    assert world.vmas() == []


def test_protection(world):
    world.map_device(0, 1), world.mprotect(0, 1, "---")
    with pytest.raises(world.impl.SegmentationFault):
        world.read(0)
    world.mprotect(0, 1, "r--")
    assert world.says(0) == "read-only"
    world.mprotect(0, 1, "rw-"), world.faults(), world.write(0)
    assert world.says(0) == "writable dirty" and world.faults() == {}


def test_after_fork_both_write_to_the_device(world):
    world.register(world.ops())
    world.map_device(0, 1), world.write(0), world.fired.clear()
    world.fork(), world.write(0), world.write(0, world.child)
    assert world.fired == [] and world.says(0) == world.says(0, world.child) == "writable dirty"


@pytest.mark.parametrize("pfn", [1, 256, 1 << 36])
def test_page_frame_numbers(world, pfn):
    """Those of the model's own frames are no device's."""
    with pytest.raises(ValueError):
        world.mm.mmap_device(PAGE, pfn)


# --- zeromap --------------------------------------------------------------------------------------------


def test_zeros(world):
    world.zeromap(0, 3), world.faults()
    assert [world.says(page) for page in range(3)] == ["zero"] * 3
    assert world.mm.read(BASE, 3 * PAGE) == bytes(3 * PAGE) and world.faults() == {}
    world.write(1)
    assert world.faults() == {"cow": 1} and world.mem.stats["frames_used"] == 1
    world.madvise(0, 3, DONTNEED)
    assert world.says(0) == "absent" and world.read(1) == b"\0"


def test_it_is_private_anonymous_memory(world):
    world.map(0, 2), world.zeromap(2, 2), world.map(4, 1)
    assert world.vmas() == [(0, 5)]
    world.fork()
    assert world.says(2, world.child) == "absent"       # as with every page that was only read


# --- remap_file_pages -------------------------------------------------------------------------------------


@pytest.fixture
def numbered(world):
    """Each page of the memfd begins with its number."""
    for page in range(8):
        world.memfd.write(page * PAGE, b"%d" % page)
    return world


def test_today_it_maps_anew(numbered):
    numbered.map_file(0, 8, flags=SHARED, file=numbered.memfd)
    numbered.remap(2, 2, 6)
    assert letters(numbered, 0, 8) == b"01674567" and numbered.vmas() == [(0, 2), (2, 4), (4, 8)]
    numbered.remap(2, 2, 2)
    assert letters(numbered, 0, 8) == b"01234567" and numbered.vmas() == [(0, 8)]


def test_what_cannot_be_remapped(numbered):
    numbered.map_file(0, 2, flags=SHARED, file=numbered.memfd), numbered.map_file(3, 1, flags=SHARED, file=numbered.memfd)
    numbered.map_file(8, 2, file=numbered.memfd), numbered.map(10, 1), numbered.map_device(12, 1)
    for page, n in (2, 1), (0, 3), (1, 3), (8, 1), (10, 1), (12, 1), (0, 0):
        fails("EINVAL", numbered.remap, page, n, 0)


def test_over_two_mappings_of_the_file(numbered):
    numbered.map_file(0, 2, flags=SHARED, file=numbered.memfd)
    numbered.map_file(2, 2, flags=SHARED, first=5, file=numbered.memfd)
    numbered.remap(1, 2, 3)
    assert letters(numbered, 0, 4) == b"0346"
    numbered.mprotect(3, 1, "r--")
    fails("EINVAL", numbered.remap, 2, 2, 0)               # another protection


def test_beyond_the_end(numbered):
    numbered.map_file(0, 4, flags=SHARED, file=numbered.memfd)
    numbered.remap(0, 2, 7)
    assert numbered.read(0) == b"7" and numbered.says(1) == "absent"
    with pytest.raises(numbered.impl.BusError):
        numbered.read(1)


def nonlinear(world):
    world.restart(nonlinear=True)
    world.map_file(0, 8, flags=SHARED, file=world.memfd)
    world.remap(0, 4, 4)
    return world


def test_in_2_6_12_the_vma_stays_whole(numbered):
    nonlinear(numbered), numbered.faults()
    assert letters(numbered, 0, 8) == b"45674567" and numbered.vmas() == [(0, 8)] and numbered.faults() == {"file": 4}
    numbered.write(0, data=b"x")
    assert numbered.read(4) == b"x" == numbered.memfd.read(4 * PAGE, 1)


def test_and_remembers_what_it_shows(numbered):
    nonlinear(numbered)
    numbered.madvise(0, 8, DONTNEED)
    assert letters(numbered, 0, 8) == b"45674567"
    numbered.mremap(0, 2, 2, 20)
    assert letters(numbered, 20, 2) == b"45"
    numbered.fork(), numbered.madvise(2, 2, DONTNEED, numbered.child)
    assert numbered.read(2, numbered.child) == b"6" == numbered.read(2)
    numbered.munmap(2, 6), numbered.map_file(2, 1, flags=SHARED, file=numbered.memfd, first=2)
    assert numbered.read(2) == b"2"


def test_and_refuses_what_is_not_in_the_file(numbered):
    nonlinear(numbered)
    fails("EINVAL", numbered.remap, 0, 2, 7)
    fails("EINVAL", numbered.remap, 7, 2, 0)
    assert letters(numbered, 0, 4) == b"4567"
