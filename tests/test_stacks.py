"""MAP_GROWSDOWN: what grows, when, and what the hooks are told."""
import mmap
import threading

import pytest

import ioproc
from ioproc import _core
from recording import BASE, PAGE, PRIVATE, RO, RW, device, layout, pages
from test_threads import together

GUARD = 256
TOP = 1024                          # pages above BASE: where the stack begins


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=4096)


def page(n):
    return BASE + n * PAGE


def stack(mem, n=1, prot=RW, **limits):
    mm = ioproc.AddressSpace(mem, rlimits=limits)
    pages(mm, n, page(TOP), prot, PRIVATE | ioproc.MAP_GROWSDOWN)
    return mm


def test_an_access_below_grows_it_and_fires_for_the_page_alone(mem):
    mm = stack(mem)
    log = []
    mm.register_ops(device(log, ""))
    mm.register_ops(device(log, "vma"), page(TOP), PAGE)
    mm.write(page(TOP - 40), b"frame")
    assert layout(mm) == [(TOP - 40, TOP + 1)]
    assert log == [("", "update_page", page(TOP - 40)), ("vma", "update_page", page(TOP - 40))]
    assert mm.read(page(TOP - 41) + 5, 1) == b"\0" and layout(mm) == [(TOP - 41, TOP + 1)]
    assert mm.touch(page(TOP - 43), 4 * PAGE) == 2      # one access to each page: grows, and goes on
    assert mm.stats["total_pages"] == 44
    _core.check_space(mm)


@pytest.mark.parametrize("prot", [0, RO])
def test_it_grows_even_if_the_access_is_then_refused(mem, prot):
    mm = stack(mem, prot=prot)
    with pytest.raises(ioproc.SegmentationFault) as raised:
        mm.write(page(TOP - 3), b"x")
    assert raised.value.address == page(TOP - 3)
    assert layout(mm) == [(TOP - 3, TOP + 1)] and mm.stats["faults"] == 0


def test_guard_gap(mem):
    mm = stack(mem)
    pages(mm, 1)
    with pytest.raises(ioproc.SegmentationFault):
        mm.read(page(GUARD), 1)
    mm.read(page(GUARD + 1), 1)
    assert layout(mm) == [(0, 1), (GUARD + 1, TOP + 1)]
    mm.mprotect(BASE, PAGE, 0)                          # what cannot be accessed needs no distance
    mm.read(page(1), 1)
    assert layout(mm) == [(0, 1), (1, TOP + 1)]
    _core.check_space(mm)


def test_mappings_keep_off(mem):
    mm = stack(mem)
    assert mm.mmap(PAGE, addr=page(TOP - GUARD - 1)) == page(TOP - GUARD - 1)       # a hint
    assert mm.mmap(PAGE, addr=page(TOP - GUARD)) != page(TOP - GUARD)
    assert mm.mmap(PAGE, addr=page(TOP - 1), flags=PRIVATE | ioproc.MAP_FIXED) == page(TOP - 1)
    high = ioproc.AddressSpace(mem)
    top = high.mmap(PAGE, flags=PRIVATE | ioproc.MAP_GROWSDOWN)
    assert high.mmap(PAGE) == top - (GUARD + 1) * PAGE
    heap = ioproc.AddressSpace(mem, start_brk=BASE)
    pages(heap, 1, page(GUARD + 4), flags=PRIVATE | ioproc.MAP_GROWSDOWN)
    assert heap.brk(page(3)) == page(3) and heap.brk(page(4)) == page(3)


def test_limits(mem):
    mm = stack(mem, STACK=4 * PAGE)
    mm.touch(page(TOP - 3))
    for limited, n in ((mm, TOP - 4), (stack(mem, AS=4 * PAGE), TOP - 4)):
        before = layout(limited)
        with pytest.raises(ioproc.SegmentationFault):
            limited.touch(page(n))
        assert layout(limited) == before
    stack(mem, DATA=0).touch(page(TOP - 4))             # a stack is no data
    with pytest.raises(ValueError):
        ioproc.AddressSpace(mem, rlimits={"STACK": -1})
    child = mm.fork()
    with pytest.raises(ioproc.SegmentationFault):
        child.touch(page(TOP - 4))


def test_what_cannot_grow(mem):
    mm = ioproc.AddressSpace(mem)
    for flags, file in ((mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, None), (mmap.MAP_SHARED, ioproc.File(mem, PAGE)),
                        (mmap.MAP_PRIVATE, ioproc.File(mem, PAGE))):
        with pytest.raises(OSError):
            mm.mmap(PAGE, flags=flags | ioproc.MAP_GROWSDOWN, file=file)
    pages(mm, 1, page(TOP))
    with pytest.raises(ioproc.SegmentationFault):
        mm.read(page(TOP - 1), 1)
    low = ioproc.AddressSpace(mem)
    pages(low, 1, 0x20000, flags=PRIVATE | ioproc.MAP_GROWSDOWN)
    low.touch(0x10000)
    with pytest.raises(ioproc.SegmentationFault):
        low.touch(0xf000)


def test_populating_does_not_grow_it(mem):
    mm = stack(mem)
    for advice in (ioproc.MADV_POPULATE_READ, ioproc.MADV_POPULATE_WRITE):
        with pytest.raises(OSError):
            mm.madvise(page(TOP - 1), 2 * PAGE, advice)
    assert layout(mm) == [(TOP, TOP + 1)]


def test_mprotect_from_its_start(mem):
    mm = stack(mem, 4)
    mm.touch(page(TOP - 4))
    mm.mprotect(page(TOP + 2), PAGE, RO | ioproc.PROT_GROWSDOWN)
    assert [(vma.prot, (vma.start - BASE) // PAGE) for vma in mm.vmas()] == [(RO, TOP - 4), (RW, TOP + 3)]


def test_halves_grow_each_and_forks_apart(mem):
    mm = stack(mem, 8)
    mm.munmap(page(TOP + 2), 4 * PAGE)
    mm.touch(page(TOP + 4)), mm.touch(page(TOP - 1))
    assert layout(mm) == [(TOP - 1, TOP + 2), (TOP + 4, TOP + 8)]
    child = mm.fork()
    child.touch(page(TOP - 9))
    assert layout(mm)[0] == (TOP - 1, TOP + 2) and layout(child)[0] == (TOP - 9, TOP + 2)
    mm.touch(page(TOP + 2))             # up to its neighbour: a stack below needs no distance
    assert layout(mm)[1] == (TOP + 2, TOP + 8)


def test_threads_on_one_stack(mem):
    mm = stack(mem)
    started = threading.Barrier(4)

    def use(chance, going):
        started.wait(60)
        while going():
            mm.write(page(TOP - chance.randrange(512)), b"x")
            if chance.randrange(8) == 0:
                mm.munmap(page(TOP - 512), chance.randrange(512) * PAGE + PAGE)

    together(use, use, use, use, seconds=0.5)
    _core.check_space(mm)
    _core.check_memory(mem, [mm])
