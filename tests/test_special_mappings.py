"""Device memory and zeromap: what the specification in test_device_memory.py and the property test do not look at."""
import errno
import mmap

import pytest

import ioproc
from ioproc import _core

PAGE = 4096
R, RW = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
DEVICE = 0x100000       # a page frame number of the device


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(64)


@pytest.fixture
def mm(mem):
    with ioproc.AddressSpace(mem) as space:
        yield space
        _core.check_space(space)


def refused(code, call, *args):
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == code


def test_device_memory_is_the_device_s(mem, mm):
    first = mm.mmap_device(4 * PAGE, DEVICE)
    second = mm.mmap_device(2 * PAGE, DEVICE + 1, R)
    mm.write(first + 2 * PAGE - 2, b"abcd")
    with mm.fork() as child, ioproc.AddressSpace(mem) as other:
        assert mm.read(second + PAGE - 2, 4) == b"abcd" == child.read(first + 2 * PAGE - 2, 4)
        assert other.read(other.mmap_device(PAGE, DEVICE + 2), 3) == b"cd\0"
        child.write(first, b"child")
        assert mm.read(first, 5) == b"child"
        _core.check_space(child)
    assert mem.stats["frames_used"] == 0 == mm.stats["rss_pages"] == mm.stats["faults"]
    with pytest.raises(ioproc.SegmentationFault):
        mm.write(second, b"x")


def test_a_device_mapping_stays_as_it_was_made(mm):
    addr = mm.mmap_device(4 * PAGE, DEVICE)
    for advice in (mmap.MADV_DONTNEED, mmap.MADV_FREE, mmap.MADV_DOFORK, mmap.MADV_DODUMP):
        refused(errno.EINVAL, mm.madvise, addr, 4 * PAGE, advice)
    for old in (0, 4 * PAGE, 8 * PAGE):
        refused(errno.EFAULT, mm.mremap, addr, old, 12 * PAGE)
    mm.mprotect(addr, PAGE, R)
    mm.mprotect(addr, PAGE, RW)
    assert [vma.end - vma.start for vma in mm.vmas()] == [PAGE, 3 * PAGE]       # special: never merges
    assert list(mm.pagemap(addr, 4 * PAGE)["writable"]) == [True] * 4
    moved = mm.mremap(addr + PAGE, 3 * PAGE, 2 * PAGE, 3, addr - 100 * PAGE)
    assert list(mm.pagemap(moved, 2 * PAGE)["pfn"]) == [DEVICE + 1, DEVICE + 2]


def test_no_child_of_dontfork_device_memory(mm):
    addr = mm.mmap_device(PAGE, DEVICE)
    mm.madvise(addr, PAGE, mmap.MADV_DONTFORK)
    with mm.fork() as child:
        assert child.vmas() == []


@pytest.mark.parametrize("pfn, length", [(64, PAGE), (0, PAGE), (2**36, PAGE), (2**36 - 1, 2 * PAGE), (DEVICE, 2**64 - 1)])
def test_page_frame_numbers_that_are_no_device(mm, pfn, length):
    with pytest.raises(ValueError, match="pfn"):
        mm.mmap_device(length, pfn)


def test_zeromap_is_anonymous_memory(mem, mm):
    addr = mm.zeromap(3 * PAGE)
    assert mm.pagemap(addr, 3 * PAGE)["zero"].all() and mem.stats["frames_used"] == 0
    mm.write(addr + PAGE, b"x")
    assert mm.read(addr, 3 * PAGE).count(0) == 3 * PAGE - 1 and mm.stats["faults_cow"] == 1 == mm.stats["faults"]
    assert mm.mmap(PAGE, addr=addr + 3 * PAGE) == addr + 3 * PAGE and len(mm.vmas()) == 1
    none = mm.zeromap(PAGE, 0)
    with pytest.raises(ioproc.SegmentationFault):
        mm.read(none, 1)
    refused(errno.EINVAL, mm.zeromap, 0)
