"""remap_file_pages: today's, as tried on the running kernel, and that of 2.6.12."""
import errno
import mmap

import pytest

import ioproc
from ioproc import _core
from recording import BASE, PAGE, RO, RW, device
from world import PAGEOUT

PAGES = 8


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(64)


@pytest.fixture
def file(mem):
    file = ioproc.File(mem, PAGES * PAGE)
    for page in range(PAGES):
        file.write(page * PAGE, b"%d" % page)
    return file


@pytest.fixture(params=[False, True], ids=["today", "2.6.12"])
def mm(request, mem):
    yield from space(mem, request.param)


@pytest.fixture
def today(mem):
    yield from space(mem, False)


@pytest.fixture
def nonlinear(mem):
    yield from space(mem, True)


def space(mem, nonlinear):
    with ioproc.AddressSpace(mem, nonlinear=nonlinear) as mm:
        yield mm
        _core.check_space(mm)
        _core.check_memory(mem, [mm])


def map_file(mm, file, prot=RW, flags=mmap.MAP_SHARED, at=BASE, **kwargs):
    return mm.mmap(PAGES * PAGE, prot, flags | ioproc.MAP_FIXED, addr=at, file=file, **kwargs)


def shown(mm, addr=BASE, pages=PAGES):
    return bytes(mm.read(addr + page * PAGE, 1)[0] for page in range(pages))


def pieces(mm):
    return [((vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE, vma.offset // PAGE) for vma in mm.vmas()]


def refused(code, call, *args):
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == code


def test_arguments(mm, file):
    map_file(mm, file)
    for args in [(BASE, 0, 0), (BASE, 100, 0), (BASE, 2**64 - PAGE, 3), (BASE, PAGE, 2**64 - 1), (BASE - PAGE, PAGE, 0),
                 (BASE + 7 * PAGE, 2 * PAGE, 0)]:
        refused(errno.EINVAL, mm.remap_file_pages, *args)
    mm.remap_file_pages(BASE + 1, PAGE + 100, 3)                # rounded down
    assert shown(mm) == b"31234567"
    private = map_file(mm, file, flags=mmap.MAP_PRIVATE, at=BASE + 16 * PAGE)
    refused(errno.EINVAL, mm.remap_file_pages, private, PAGE, 1)
    readonly = mm.shmat(file, readonly=True)
    refused(errno.EINVAL, mm.remap_file_pages, readonly, PAGE, 1)
    refused(errno.EINVAL, mm.remap_file_pages, mm.mmap_device(PAGE, 0x1000), PAGE, 1)


def test_today_it_is_a_new_mapping(today, file):
    log = []
    today.register_ops(device(log, "d"))
    map_file(today, file)
    today.remap_file_pages(BASE + 2 * PAGE, PAGE, 5)
    assert pieces(today) == [(0, 2, 0), (2, 3, 5), (3, 8, 3)]
    at = BASE + 2 * PAGE
    assert log == [("d", "invalidate_range", at, at + PAGE), ("d", "update_page", at)]
    assert shown(today) == b"01534567"
    today.remap_file_pages(BASE + 2 * PAGE, PAGE, 2)
    assert pieces(today) == [(0, 8, 0)]
    today.remap_file_pages(BASE, PAGE, 3)
    today.remap_file_pages(BASE, 3 * PAGE, 1)                   # over several VMAs of the same file
    assert pieces(today) == [(0, 3, 1), (3, 8, 3)]
    today.remap_file_pages(BASE, PAGE, 100)                     # beyond the file's end
    refused(errno.EOVERFLOW, today.remap_file_pages, BASE, PAGE, 2**52 - 1)
    refused(errno.EOVERFLOW, today.remap_file_pages, BASE, PAGE, 2**51 - 1)
    today.mprotect(BASE + 4 * PAGE, PAGE, RO)
    refused(errno.EINVAL, today.remap_file_pages, BASE + 3 * PAGE, 2 * PAGE, 0)


def test_today_advice_is_lost(today, file):
    map_file(today, file)
    today.madvise(BASE, PAGES * PAGE, mmap.MADV_RANDOM)
    today.madvise(BASE, PAGES * PAGE, mmap.MADV_DONTFORK)
    today.remap_file_pages(BASE + 2 * PAGE, PAGE, 5)
    with today.fork() as child:
        assert pieces(child) == [(2, 3, 5)]
    today.remap_file_pages(BASE + 2 * PAGE, PAGE, 2)
    assert len(today.vmas()) == 3


def test_today_a_segment_remains_one(today, file):
    today.shmat(file, BASE)
    today.remap_file_pages(BASE + PAGE, PAGE, 2)
    assert pieces(today) == [(0, 1, 0), (1, 2, 2), (2, 8, 2)]
    today.remap_file_pages(BASE + PAGE, PAGE, 1)
    assert pieces(today) == [(0, 2, 0), (2, 8, 2)]              # a segment's VMA is never merged away
    today.remap_file_pages(BASE + 4 * PAGE, 2 * PAGE, 2)
    today.shmdt(BASE)
    assert pieces(today) == [(4, 6, 2)]


def test_nonlinear_pages_of_one_vma(nonlinear, file):
    log = []
    map_file(nonlinear, file)
    nonlinear.read(BASE, 1)
    nonlinear.register_ops(device(log, "d"))
    faults = nonlinear.stats["faults"]
    nonlinear.remap_file_pages(BASE, 3 * PAGE, 4)
    assert log == [("d", "invalidate_page", BASE), *[("d", "update_page", BASE + page * PAGE) for page in range(3)]]
    assert pieces(nonlinear) == [(0, 8, 0)] and nonlinear.stats["faults"] == faults
    assert shown(nonlinear) == b"45634567"
    nonlinear.write(BASE, b"x")
    assert file.read(4 * PAGE, 1) == b"x" == nonlinear.read(BASE + 4 * PAGE, 1)
    refused(errno.EINVAL, nonlinear.remap_file_pages, BASE, 2 * PAGE, 7)        # beyond the file's end: nothing changes
    refused(errno.EINVAL, nonlinear.remap_file_pages, BASE, PAGE, 8)
    assert shown(nonlinear) == b"x563x567"


def test_a_page_put_where_it_is(nonlinear, file):
    """As any other: what was there goes first.  It is mapped once all the time."""
    map_file(nonlinear, file)
    nonlinear.read(BASE, 1)
    shared = []
    nonlinear.register_ops(ioproc.Ops(invalidate_page=lambda vma, addr: shared.append(nonlinear.pagemap(addr, 1)["shared"][0])))
    nonlinear.remap_file_pages(BASE, PAGE, 0)
    assert shared == [False] and shown(nonlinear)[:1] == b"0"


def test_nonlinear_pages_are_remembered(mem, nonlinear, file):
    map_file(nonlinear, file)
    nonlinear.remap_file_pages(BASE, 4 * PAGE, 4)
    nonlinear.remap_file_pages(BASE + 4 * PAGE, 4 * PAGE, 0)
    pfns = nonlinear.pagemap(BASE, PAGES * PAGE)["pfn"]
    for page in range(PAGES):
        assert mem.mappings(pfns[page]) == [(nonlinear, BASE + page * PAGE)]
    nonlinear.madvise(BASE, PAGES * PAGE, mmap.MADV_DONTNEED)
    rows = nonlinear.pagemap(BASE, PAGES * PAGE)
    assert not rows["present"].any() and not rows["pfn"].any() and nonlinear.stats["rss_pages"] == 0
    _core.check_space(nonlinear)
    moved = nonlinear.mremap(BASE + PAGE, 6 * PAGE, 6 * PAGE, 3, BASE + 0x200000 + 3 * PAGE)
    with nonlinear.fork() as child:
        nonlinear.munmap(BASE, PAGE)
        assert shown(nonlinear, moved, 6) == b"567012"
        child.mprotect(moved, PAGE, RO)
        assert shown(child, moved, 6) == b"567012" and shown(child, BASE, 1) == b"4"
        with child.fork() as grandchild:
            assert grandchild.stats["rss_pages"] == 7
            _core.check_memory(mem, [nonlinear, child, grandchild])
        _core.check_space(child)


def test_nonlinear_without_frames():
    mem = ioproc.PhysicalMemory(2)
    file = ioproc.File(mem, PAGES * PAGE)
    with ioproc.AddressSpace(mem, nonlinear=True) as mm:
        map_file(mm, file)
        refused(errno.ENOMEM, mm.remap_file_pages, BASE, 3 * PAGE, 4)
        assert list(mm.pagemap(BASE, 3 * PAGE)["present"]) == [True, True, False]
        _core.check_memory(mem, [mm])


def test_linear_again_is_an_ordinary_page(nonlinear, file):
    map_file(nonlinear, file)
    nonlinear.remap_file_pages(BASE, PAGE, 3)
    nonlinear.remap_file_pages(BASE, PAGE, 0)
    nonlinear.madvise(BASE, PAGE, mmap.MADV_DONTNEED)
    assert shown(nonlinear, BASE, 1) == b"0"


def test_truncation_finds_non_linear_pages(mem, nonlinear, file):
    map_file(nonlinear, file)
    nonlinear.remap_file_pages(BASE, 4 * PAGE, 4)
    nonlinear.remap_file_pages(BASE + 4 * PAGE, 4 * PAGE, 0)
    log = []
    nonlinear.register_ops(device(log, "d"))
    with nonlinear.fork() as child:
        child.remap_file_pages(BASE + PAGE, PAGE, 0)
        file.truncate(5 * PAGE)                                 # shows 4567 0123, the child 4067 0123
        assert log == [("d", "invalidate_range", BASE, BASE + PAGES * PAGE)]
        assert list(nonlinear.pagemap(BASE, PAGES * PAGE)["present"]) == [1, 0, 0, 0, 1, 1, 1, 1]
        assert list(child.pagemap(BASE, PAGES * PAGE)["present"]) == [1, 1, 0, 0, 1, 1, 1, 1]
        _core.check_memory(mem, [nonlinear, child])
        with pytest.raises(ioproc.BusError):
            nonlinear.read(BASE + PAGE, 1)
        file.write(6 * PAGE, b"new")
        assert child.read(BASE + 2 * PAGE, 3) == b"new" and nonlinear.read(BASE + PAGE, 1) == b"\0"
    file.punch_hole(PAGE, PAGE)
    assert shown(nonlinear, BASE + 4 * PAGE, 4) == b"0\x0023"
    refused(errno.EINVAL, nonlinear.madvise, BASE, PAGE, mmap.MADV_REMOVE)


@pytest.mark.parametrize("go", [lambda mm: mm.remap_file_pages(BASE, 2 * PAGE, 2),
                                lambda mm: mm.madvise(BASE, PAGE, mmap.MADV_DONTNEED)], ids=["shown elsewhere", "zapped"])
def test_what_was_written_is_not_forgotten(go):
    """The entry's dirty bit goes with the entry; the page stays dirty."""
    mem = ioproc.PhysicalMemory(64)                         # no swap: what is dirty stays, what is not may go
    with ioproc.AddressSpace(mem, nonlinear=True) as mm:
        file = ioproc.File(mem, PAGES * PAGE, memfd=True)
        map_file(mm, file)
        mm.write(BASE, b"x")
        mm.remap_file_pages(BASE + 4 * PAGE, PAGE, 1)       # the VMA is non-linear now
        go(mm)
        mem.reclaim(64)
        assert file.read(0, 1) == b"x"


def test_reclaim_leaves_what_is_shown_out_of_order(nonlinear, file):
    """It looks for a page in one place per VMA: where the file's pages in order would have it."""
    map_file(nonlinear, file)
    nonlinear.remap_file_pages(BASE, PAGE, 4)
    nonlinear.read(BASE + PAGE, PAGE)
    nonlinear.madvise(BASE, PAGES * PAGE, PAGEOUT)
    assert nonlinear.pagemap(BASE, 2 * PAGE)["present"].tolist() == [True, False]
    assert shown(nonlinear)[:2] == b"41"
