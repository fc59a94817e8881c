"""Huge pages: the pool and its reservations, faults, fork, files; rules as tried on the running kernel."""
import errno
import gc
import mmap

import pytest

import ioproc
from ioproc import _core
from recording import BASE, PAGE, PRIVATE, RO, RW, SHARED, device

M = 2 << 20
BASE = BASE + 8 * M
HUGE = ioproc.MAP_HUGETLB
NORESERVE, POPULATE, FIXED = ioproc.MAP_NORESERVE, ioproc.MAP_POPULATE, ioproc.MAP_FIXED


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(100, huge_pages=4)


@pytest.fixture
def mm(mem):
    with ioproc.AddressSpace(mem) as space:
        yield space
        _core.check_space(space)
    assert pool(mem)[1] <= pool(mem)[0]


def pool(mem):
    """Free, and of those reserved."""
    return mem.stats["huge_pages_free"], mem.stats["huge_pages_reserved"]


def huge(mm, page, pages=1, prot=RW, flags=PRIVATE, **more):
    return mm.mmap(pages * M, prot, flags | HUGE | FIXED, addr=BASE + page * M, **more)


def of_file(mm, page, file, pages=1, prot=RW, flags=mmap.MAP_SHARED, offset=0):
    return mm.mmap(pages * M, prot, flags | FIXED, addr=BASE + page * M, file=file, offset=offset * M)


def pieces(mm):
    return [((vma.start - BASE) / M, (vma.end - BASE) / M) for vma in mm.vmas()]


def checked(mem, *spaces):
    for space in spaces:
        _core.check_space(space)
    _core.check_memory(mem, spaces)


def refused(code, call, *args, **kwargs):
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    assert caught.value.errno == code


def test_contents_pagemap_and_the_reverse_map(mem, mm):
    addr = mm.mmap(PAGE, flags=PRIVATE | HUGE)
    assert addr % M == 0 and mm.vmas()[0].end - addr == M and mm.vmas()[0].flags == PRIVATE | HUGE
    assert pool(mem) == (4, 1) and not mm.pagemap(addr, M)["present"].any()
    assert mm.read(addr + M - 10, 10) == bytes(10)
    assert pool(mem) == (3, 0) and not mm.pagemap(addr, M)["writable"].any()
    mm.write(addr + PAGE - 3, b"abcdef")
    assert mm.read(addr + PAGE - 3, 6) == b"abcdef" and mm.read(addr + M - 10, 10) == bytes(10)
    rows = mm.pagemap(addr, M)
    assert len(rows) == 512 and rows["present"].all() and rows["writable"].all() and not rows["zero"].any()
    assert list(rows["pfn"]) == list(range(512, 1024))      # the first multiple of 512 above the frames
    assert list(mm.pagemap(addr + 511 * PAGE, PAGE)["pfn"]) == [1023]
    assert mem.mappings(512 + 7) == [(mm, addr + 7 * PAGE)]
    assert mm.stats["faults"] == 2 and mm.stats["faults_anon"] == 1 == mm.stats["faults_reuse"]
    assert mm.stats["rss_pages"] == 0 == mem.stats["frames_used"]
    with pytest.raises(ValueError):
        mem.mappings(512 + 4 * 512)
    with pytest.raises(ValueError):
        mm.mmap_device(PAGE, 600)
    checked(mem, mm)
    mm.munmap(addr, M)
    assert pool(mem) == (4, 0)


def test_touch_counts_a_fault_for_each_huge_page(mm):
    small = mm.mmap(4 * PAGE, flags=PRIVATE | FIXED, addr=BASE - 4 * PAGE)
    huge(mm, 0, 2)
    mm.mmap(4 * PAGE, flags=PRIVATE | FIXED, addr=BASE + 2 * M)
    assert mm.touch(small, 8 * PAGE + 2 * M, write=True) == 10
    assert mm.touch(small, 8 * PAGE + 2 * M, write=True) == 0
    assert mm.touch(BASE + M + 5 * PAGE, PAGE) == 0
    mm.munmap(BASE - 2 * PAGE, 4 * PAGE + 2 * M)
    assert mm.stats["rss_pages"] == 4


def test_reservations(mem, mm):
    refused(errno.ENOMEM, huge, mm, 0, 5)
    huge(mm, 0, 3)
    assert pool(mem) == (4, 3)
    refused(errno.ENOMEM, huge, mm, 4, 2)
    huge(mm, 4, 4, flags=PRIVATE | NORESERVE)
    mm.write(BASE + 4 * M, b"x")
    with pytest.raises(ioproc.BusError) as caught:
        mm.touch(BASE + 4 * M, 4 * M, write=True)
    assert caught.value.address == BASE + 5 * M and caught.value.completed == 512
    assert mm.touch(BASE, 3 * M, write=True) == 3 and pool(mem) == (0, 0)
    mm.madvise(BASE, M, mmap.MADV_DONTNEED)                 # reserved again
    assert pool(mem) == (1, 1)
    mm.munmap(BASE + M, M)
    assert pool(mem) == (2, 1)
    checked(mem, mm)


def test_a_failed_mapping_leaves_a_hole(mm):
    mm.mmap(8 * M, flags=PRIVATE | FIXED, addr=BASE)
    refused(errno.ENOMEM, huge, mm, 0, 5)
    assert pieces(mm) == [(5, 8)]


def test_alignment(mm):
    refused(errno.EINVAL, mm.mmap, M, flags=PRIVATE | HUGE | FIXED, addr=BASE + PAGE)
    assert mm.mmap(M, flags=PRIVATE | HUGE, addr=BASE + PAGE) == BASE + M
    mm.munmap(BASE + M, M)
    refused(errno.EINVAL, mm.mmap, 2**64 - PAGE, flags=PRIVATE | HUGE)
    refused(errno.EINVAL, mm.mmap, M, flags=PRIVATE | HUGE | 30 << 26)
    refused(errno.EINVAL, mm.mmap, M, flags=PRIVATE | HUGE, offset=PAGE)
    mm.munmap(mm.mmap(M, flags=PRIVATE | HUGE | 21 << 26), M)
    huge(mm, 0, 2)
    for args in [(BASE, PAGE), (BASE, M + PAGE), (BASE + PAGE, M), (BASE + M, PAGE)]:
        refused(errno.EINVAL, mm.munmap, *args)
        refused(errno.EINVAL, mm.mprotect, *args, RO)
        refused(errno.EINVAL, mm.madvise, *args, mmap.MADV_DONTFORK)
    assert pieces(mm) == [(0, 1), (1, 2)]                   # split where it could be, and special: never merged
    refused(errno.EINVAL, mm.madvise, BASE + PAGE, M, mmap.MADV_DONTNEED)
    mm.madvise(BASE, PAGE, mmap.MADV_DONTNEED)
    for advice in (mmap.MADV_FREE, 18):
        refused(errno.EINVAL, mm.madvise, BASE, M, advice)
    refused(errno.EACCES, mm.madvise, BASE, M, mmap.MADV_REMOVE)
    for advice in (mmap.MADV_DOFORK, mmap.MADV_DODUMP, mmap.MADV_HUGEPAGE, mmap.MADV_WILLNEED):
        mm.madvise(BASE, M, advice)


def test_mremap(mem, mm):
    huge(mm, 0, 2)
    mm.write(BASE + M, b"second")
    to = BASE + 8 * M
    for args in [(2 * M, 3 * M), (M, M + PAGE), (0, M), (2 * M, 2 * M, 5), (2 * M, 2 * M, 7, to), (2 * M, 2 * M, 3, to + PAGE)]:
        refused(errno.EINVAL, mm.mremap, BASE, *args)
    refused(errno.EINVAL, mm.mremap, BASE + PAGE, M, M)
    assert mm.mremap(BASE, PAGE, 2 * PAGE) == BASE == mm.mremap(BASE, 2 * M, M + PAGE)
    log = []
    mm.register_ops(device(log, "d", "invalidate_range", "update_page"))
    assert mm.mremap(BASE, 2 * M, 2 * M, 3, to) == to
    assert log == [("d", "invalidate_range", at, at + 2 * M) for at in (BASE, to, BASE)]
    assert mm.read(to + M, 6) == b"second" and pool(mem) == (3, 1)
    checked(mem, mm)
    assert mm.mremap(to + M, PAGE, PAGE, 3, BASE) == BASE and pieces(mm) == [(0, 1), (8, 9)]
    assert mm.read(BASE, 6) == b"second"
    mm.mremap(BASE, M, M, 3, to)
    assert pool(mem) == (3, 0) and mm.read(to, 6) == b"second"


def test_hooks(mem, mm):
    log = []
    mm.register_ops(device(log, "d"))
    huge(mm, 0, 2, flags=PRIVATE | POPULATE)
    huge(mm, 2, 1, RO)
    mm.read(BASE + 2 * M, 1)
    assert log == []                                        # as the prefault of old
    mm.mprotect(BASE + 2 * M, M, RW)
    mm.write(BASE + 2 * M + PAGE, b"x")
    assert log == [("d", "change_protection", BASE + 2 * M, BASE + 3 * M, RW), ("d", "update_page", BASE + 2 * M)]
    log.clear()
    with mm.fork() as child:
        assert log == [("d", "wrprotect_page", BASE + page * M) for page in range(3)]
        log.clear()
        mm.write(BASE + 5 * PAGE, b"x")
        assert log == [("d", "invalidate_page", BASE), ("d", "update_page", BASE)]
        log.clear()
        checked(mem, mm, child)
    mm.write(BASE + M, b"x")
    assert log == [("d", "update_page", BASE + M)]
    log.clear()
    mm.madvise(BASE, M + PAGE, mmap.MADV_DONTNEED)
    mm.madvise(BASE, PAGE, mmap.MADV_DONTNEED)
    mm.munmap(BASE, 3 * M)
    assert log == [("d", "invalidate_range", BASE, BASE + M), ("d", "invalidate_range", BASE, BASE + 3 * M)]


def test_fork(mem, mm):
    huge(mm, 0, 1)
    shared = huge(mm, 4, 1, flags=SHARED)
    mm.write(BASE, b"parent")
    mm.write(shared, b"both")
    with mm.fork() as child:
        assert child.pagemap(BASE, PAGE)["shared"][0] and not child.pagemap(shared, PAGE)["present"][0]
        assert child.read(BASE, 6) == b"parent" and child.read(shared, 4) == b"both"
        child.write(BASE, b"child!")
        child.write(shared, b"BOTH")
        assert mm.read(BASE, 6) == b"parent" and mm.read(shared, 4) == b"BOTH"
        assert child.stats["faults_cow"] == 1 and pool(mem) == (1, 0)
        mm.write(BASE, b"x")
        assert mm.stats["faults_reuse"] == 1
        checked(mem, mm, child)
    assert pool(mem) == (2, 0)


def test_the_owner_takes_his_page_back(mem, mm):
    huge(mm, 0, 1)
    mm.write(BASE, b"parent")
    huge(mm, 2, 3, flags=PRIVATE | NORESERVE | POPULATE)
    with mm.fork() as child:
        with child.fork() as grandchild:
            for space in (child, grandchild):
                with pytest.raises(ioproc.BusError):
                    space.write(BASE, b"x")
                assert space.read(BASE, 6) == b"parent"
            log = []
            child.register_ops(device(log, "child"))
            mm.write(BASE, b"PARENT")
            assert log == [("child", "invalidate_page", BASE)]
            for space in (child, grandchild):
                with pytest.raises(ioproc.BusError):
                    space.read(BASE, 1)
            checked(mem, mm, child, grandchild)
        with pytest.raises(ioproc.BusError):                # no owner: its copy of what is still shared with the child
            mm.write(BASE + 2 * M, b"x")
        checked(mem, mm, child)


def test_reservation_spent_on_a_page_the_child_still_has(mem, mm):
    huge(mm, 0, 1)
    mm.write(BASE, b"x")
    with mm.fork() as child:
        mm.madvise(BASE, M, mmap.MADV_DONTNEED)
        assert pool(mem) == (3, 0)
        checked(mem, mm, child)
        assert mm.read(BASE, 1) == b"\0" and child.read(BASE, 1) == b"x"
        mm.madvise(BASE, M, mmap.MADV_DONTNEED)
        assert pool(mem) == (3, 1)
    assert pool(mem) == (4, 1)


def test_a_spent_reservation_shows_the_page_cache(mem, mm):
    file = ioproc.File(mem, M, huge=True)
    of_file(mm, 4, file)
    mm.write(BASE + 4 * M, b"file")
    of_file(mm, 0, file, flags=mmap.MAP_PRIVATE)
    mm.write(BASE, b"mine")
    with mm.fork() as child:
        mm.madvise(BASE, M, mmap.MADV_DONTNEED)             # the child has what the reservation was for
        assert mm.read(BASE, 4) == b"file" and child.read(BASE, 4) == b"mine" and pool(mem) == (2, 0)
        checked(mem, mm, child)
        mm.madvise(BASE, M, mmap.MADV_DONTNEED)
        mm.write(BASE, b"MINE")
        assert child.read(BASE, 4) == b"mine" and pool(mem) == (1, 0)
        checked(mem, mm, child)


def test_files(mem, mm):
    file = ioproc.File(mem, 2 * M, huge=True)
    with pytest.raises(ValueError):
        ioproc.File(mem, PAGE, huge=True)
    refused(errno.EINVAL, file.write, 0, b"x")
    refused(errno.EINVAL, file.truncate, PAGE)
    refused(errno.EINVAL, mm.mmap, M, file=ioproc.File(mem, M), flags=mmap.MAP_SHARED | HUGE)
    refused(errno.EINVAL, mm.mmap, M, file=file, flags=mmap.MAP_SHARED, offset=PAGE)
    of_file(mm, 0, file, 2)
    assert pool(mem) == (4, 2)
    of_file(mm, 2, file, 2)                                 # the same pages: reserved once
    assert pool(mem) == (4, 2)
    mm.write(BASE + M + 5, b"hello")
    assert mm.read(BASE + 3 * M + 5, 5) == b"hello" == file.read(M + 5, 5) and pool(mem) == (3, 1)
    mm.munmap(BASE, 4 * M)
    assert pool(mem) == (3, 1) and file.read(M + 5, 5) == b"hello"
    of_file(mm, 0, file, 3, RO)
    assert file.size == 2 * M
    with pytest.raises(ioproc.BusError):
        mm.read(BASE + 2 * M, 1)
    of_file(mm, 4, file, 1, offset=2)                       # a writable mapping makes it longer
    assert file.size == 3 * M and mm.read(BASE + 2 * M, 1) == b"\0"
    assert mm.vmas()[0].file is file and mm.vmas()[0].flags == mmap.MAP_SHARED | HUGE
    checked(mem, mm)
    mm.munmap(BASE, 8 * M)
    del file
    gc.collect()                                            # tracebacks above refer to it
    assert pool(mem) == (4, 0)


def test_private_mappings_of_files(mem, mm):
    file = ioproc.File(mem, 2 * M, huge=True)
    of_file(mm, 0, file, 2, flags=mmap.MAP_PRIVATE)
    of_file(mm, 4, file)
    mm.write(BASE + 4 * M, b"file")
    assert mm.read(BASE, 4) == b"file" and not mm.pagemap(BASE, PAGE)["writable"][0]
    assert mm.read(BASE + M, 1) == b"\0" and pool(mem) == (2, 1)    # not in the page cache: a page of its own
    with mm.fork() as child:
        assert child.pagemap(BASE, PAGE)["present"][0]
    mm.write(BASE, b"mine")
    assert file.read(0, 4) == b"file" and pool(mem) == (1, 0)
    checked(mem, mm)
    mm.madvise(BASE, M, mmap.MADV_DONTNEED)
    assert mm.read(BASE, 4) == b"file" and pool(mem) == (2, 1)
    mm.madvise(BASE, 2 * M, mmap.MADV_DONTNEED)
    mm.write(BASE, b"mine")                                 # copied early
    assert mm.stats["faults_cow"] == 1 and mm.read(BASE + 4 * M, 4) == b"file"
    checked(mem, mm)


def test_truncation_and_holes(mem, mm):
    file = ioproc.File(mem, 2 * M, huge=True)
    of_file(mm, 0, file, 2)
    of_file(mm, 4, file, 2, flags=mmap.MAP_PRIVATE)
    mm.write(BASE, b"a")
    mm.write(BASE + M, b"b")
    mm.write(BASE + 5 * M, b"c")
    log = []
    mm.register_ops(device(log, "d"))
    assert pool(mem) == (1, 1)
    file.truncate(M)
    assert sorted(log) == [("d", "invalidate_range", BASE + page * M, BASE + (page + 1) * M) for page in (1, 5)]
    for page in (1, 5):
        with pytest.raises(ioproc.BusError):
            mm.read(BASE + page * M, 1)
    checked(mem, mm)
    file.truncate(2 * M)
    assert mm.read(BASE + M, 1) == b"\0" == mm.read(BASE + 5 * M, 1)
    mm.write(BASE + 4 * M, b"copy")
    mm.write(BASE + M - 4, b"tail")
    log.clear()
    file.punch_hole(M - 2, 2)
    assert file.read(M - 4, 4) == b"ta\0\0" and log == []
    file.punch_hole(0, M + 5)                               # private copies go too
    assert file.read(0, 1) == b"\0" == mm.read(BASE + 4 * M, 1) and len(log) == 2
    checked(mem, mm)
    mm.madvise(BASE, M, mmap.MADV_REMOVE)
    checked(mem, mm)


def test_pins(mem, mm):
    huge(mm, 0, 1)
    pfns = mem.pin(mm, BASE + 3 * PAGE, 2 * PAGE)
    assert list(pfns) == [512 + 3, 512 + 4]
    mm.munmap(BASE, M)
    assert pool(mem) == (3, 0)
    mem.unpin(pfns[:1])
    assert pool(mem) == (3, 0)
    mem.unpin(pfns[1:])
    assert pool(mem) == (4, 0)
    with pytest.raises(ValueError):
        mem.unpin(pfns)


def test_limits_and_exit(mem):
    with ioproc.AddressSpace(mem, rlimits={"AS": 3 * M, "DATA": M}) as mm:
        refused(errno.ENOMEM, huge, mm, 0, 4, flags=SHARED | NORESERVE)
        refused(errno.ENOMEM, huge, mm, 0, 2)
        huge(mm, 0, 1)
        huge(mm, 1, 2, flags=SHARED | POPULATE)
        assert pool(mem) == (2, 1)
    assert pool(mem) == (4, 0)
    checked(mem)


def test_remap_file_pages(mem, mm):
    file = ioproc.File(mem, 4 * M, huge=True)
    of_file(mm, 0, file, 2)
    mm.write(BASE, b"0")
    mm.remap_file_pages(BASE + M, M, 0)
    assert mm.read(BASE + M, 1) == b"0" and len(mm.vmas()) == 2
    refused(errno.EINVAL, mm.remap_file_pages, BASE, PAGE, 0)
    assert len(mm.vmas()) == 2
    refused(errno.EINVAL, mm.remap_file_pages, BASE, M, 1)
    assert pieces(mm) == [(1, 2)]


def test_arguments(mem, mm):
    with pytest.raises(ValueError):
        ioproc.PhysicalMemory(10, huge_pages=-1)
    with pytest.raises(NotImplementedError):
        mm.shmat(ioproc.File(mem, M, huge=True))
    with ioproc.AddressSpace(ioproc.PhysicalMemory(10)) as space:
        refused(errno.ENOMEM, huge, space, 0)
