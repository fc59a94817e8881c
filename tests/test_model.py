"""The reference model by itself: small cases worked out by hand, and its invariants under random calls."""
import errno

import pytest

import model
from model import PAGE, AddressSpace, BusError, File, PhysicalMemory, SegmentationFault, check
from sequences import Run, failure, smallest

BASE = 0x10000000
ANON = model.MAP_PRIVATE | model.MAP_ANONYMOUS | model.MAP_FIXED


@pytest.fixture
def mem():
    return PhysicalMemory(frames=64)


@pytest.fixture
def mm(mem):
    return AddressSpace(mem)


def bounds(mm):
    return [((vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE) for vma in mm.vmas()]


def fill(mm, page, n, prot=3):
    return mm.mmap(n * PAGE, prot, ANON, addr=BASE + page * PAGE)


def test_top_down(mm):
    first, second = mm.mmap(PAGE), mm.mmap(2 * PAGE)
    assert (first, second) == (model.MMAP_BASE - PAGE, model.MMAP_BASE - 3 * PAGE)
    mm.munmap(first, PAGE)
    assert mm.mmap(PAGE) == first and mm.mmap(PAGE, addr=BASE + 1) == BASE


def test_contents_are_copied_on_write(mem, mm):
    fill(mm, 0, 2), mm.write(BASE, b"parent")
    child = mm.fork()
    child.write(BASE, b"child.")
    assert mm.read(BASE, 6) == b"parent" and child.read(BASE, 6) == b"child."
    assert mem.stats["frames_used"] == 2
    child.exit()
    assert mem.stats["frames_used"] == 1
    check(mem, mm)


def test_shared_memory_is_shared(mem, mm):
    mm.mmap(PAGE, 3, model.MAP_SHARED | model.MAP_ANONYMOUS | model.MAP_FIXED, addr=BASE)
    child = mm.fork()
    child.write(BASE, b"both")
    assert mm.read(BASE, 4) == b"both"
    mm.exit(), child.exit()
    assert mem.stats["frames_used"] == 0


def test_file_pages(mem, mm):
    file = File(mem, PAGE + 10)
    file.write(PAGE, b"end")
    mm.mmap(3 * PAGE, 3, model.MAP_PRIVATE | model.MAP_FIXED, addr=BASE, file=file)
    assert mm.read(BASE + PAGE, 4) == b"end\0"
    mm.write(BASE + PAGE, b"own")
    assert file.read(PAGE, 3) == b"end"
    with pytest.raises(BusError) as raised:
        mm.read(BASE + PAGE, PAGE + 1)
    assert (raised.value.address, raised.value.completed) == (BASE + 2 * PAGE, PAGE)
    check(mem, mm, files=[file])


def test_how_far_an_access_came(mm):
    fill(mm, 0, 1)
    with pytest.raises(SegmentationFault) as raised:
        mm.write(BASE + 10, bytes(PAGE))
    assert (raised.value.address, raised.value.completed) == (BASE + PAGE, PAGE - 10)


def test_out_of_frames(mem):
    mm = AddressSpace(mem)
    fill(mm, 0, 65)
    with pytest.raises(MemoryError):
        mm.write(BASE, bytes(65 * PAGE))
    assert mm.stats["rss_pages"] == 64
    child = mm.fork()
    with pytest.raises(MemoryError):
        child.write(BASE, b"x")
    assert child.read(BASE, 1) == b"\0"
    check(mem, mm, child)
    child.exit()
    mm.write(BASE, b"x")
    check(mem, mm)


def test_merging_mends_a_split(mm):
    fill(mm, 0, 4)
    mm.mprotect(BASE + PAGE, PAGE, 1)
    assert bounds(mm) == [(0, 1), (1, 2), (2, 4)]
    mm.mprotect(BASE + PAGE, PAGE, 3)
    assert bounds(mm) == [(0, 4)]


def test_neighbours_share_an_anon_vma(mm):
    """Pages first written while a neighbour has one: its anon_vma is taken, so that merging stays possible."""
    fill(mm, 0, 2)
    mm.mprotect(BASE, PAGE, 5 | 2)      # differs by an access flag only
    mm.write(BASE, b"x"), mm.write(BASE + PAGE, b"x")
    mm.mprotect(BASE, PAGE, 3)
    assert bounds(mm) == [(0, 2)]


def test_what_was_mapped_apart_and_written_does_not_merge(mm):
    fill(mm, 0, 1), fill(mm, 2, 1)
    mm.write(BASE, b"x"), mm.write(BASE + 2 * PAGE, b"x")
    fill(mm, 1, 1)                      # fits both, and can join only one
    assert bounds(mm) == [(0, 2), (2, 3)]


def test_a_forked_vma_gives_its_pages_to_nobody(mm):
    fill(mm, 0, 1), mm.write(BASE, b"x")
    child = mm.fork()
    for space in mm, child:
        fill(space, 1, 1)
    assert bounds(mm) == [(0, 2)] and bounds(child) == [(0, 1), (1, 2)]


def test_nor_by_advice_or_by_moving(mm):
    fill(mm, 0, 4), mm.write(BASE, bytes(4 * PAGE))
    child = mm.fork()
    fill(child, 4, 1)
    child.madvise(BASE + 4 * PAGE, PAGE, model.MADV_RANDOM), child.madvise(BASE + 3 * PAGE, PAGE, model.MADV_RANDOM)
    assert bounds(child) == [(0, 3), (3, 4), (4, 5)]        # 3 and 4 differ only in their past
    child.mremap(BASE + PAGE, 2 * PAGE, 2 * PAGE, 3, BASE + 8 * PAGE)
    fill(child, 2, 1)
    child.mremap(BASE + 8 * PAGE, PAGE, PAGE, 3, BASE + PAGE)
    assert bounds(child) == [(0, 2), (2, 3), (3, 4), (4, 5), (9, 10)]


def test_an_abandoned_anon_vma_is_used_again(mm):
    fill(mm, 0, 1), mm.write(BASE, b"x")
    child = mm.fork()
    grandchild = child.fork()
    child_anon = child.list[0].anon_vma
    child.exit()
    assert grandchild.fork().list[0].anon_vma is child_anon
    assert grandchild.fork().list[0].anon_vma is not child_anon


def test_a_moved_vma_keeps_its_page_numbers(mm):
    fill(mm, 0, 2), mm.write(BASE, b"x")
    mm.mremap(BASE + PAGE, PAGE, PAGE, 3, BASE + 4 * PAGE)
    fill(mm, 5, 1)
    assert bounds(mm) == [(0, 1), (4, 5), (5, 6)]           # page 1 of old beside page 5
    mm.mremap(BASE + 4 * PAGE, PAGE, PAGE, 3, BASE + PAGE)
    assert bounds(mm) == [(0, 2), (5, 6)]


def test_brk_extends_only_its_predecessor(mm):
    start = mm.brk()
    mm.brk(start + PAGE)
    mm.mmap(PAGE, 3, ANON, addr=start + 3 * PAGE)
    assert mm.brk(start + 3 * PAGE) == start + PAGE         # a page of distance is kept
    assert mm.brk(start + 2 * PAGE - 1) == start + 2 * PAGE - 1
    assert [(v.start - start) // PAGE for v in mm.vmas()] == [0, 3]


def test_limits(mem):
    mm = AddressSpace(mem, max_map_count=3, rlimits={"AS": 8 * PAGE})
    fill(mm, 0, 5)
    with pytest.raises(OSError) as raised:
        fill(mm, 5, 4)
    assert raised.value.errno == errno.ENOMEM
    mm.mprotect(BASE, PAGE, 1)
    with pytest.raises(OSError):
        mm.mprotect(BASE + 2 * PAGE, PAGE, 1)               # needs two more VMAs, has one: the first split stays
    assert bounds(mm) == [(0, 1), (1, 2), (2, 5)]
    with pytest.raises(OSError):
        mm.munmap(BASE + 3 * PAGE, PAGE)                    # a hole needs one more
    mm.munmap(BASE + 4 * PAGE, PAGE)


@pytest.mark.parametrize("limits", [{}, {"frames": 10, "swap_slots": 60}, {"frames": 8, "swap_slots": 4}], ids=str)
def test_invariants_hold_under_random_calls(limits):
    assert failure((model,), limits, 15, 1) is None


def test_a_failing_program_is_cut_down():
    """The driver itself: it finds a difference, and reports the smallest program that shows it."""
    class Forgetful:        # another model, which takes MADV_DONTNEED for MADV_NORMAL
        def __getattr__(self, name):
            return getattr(model, name)

        class AddressSpace(model.AddressSpace):
            def madvise(self, addr, length, advice):
                super().madvise(addr, length, 0)

    calls = [(0, name, args, {}) for name, *args in [
        ("mmap", PAGE), ("brk", BASE + 20 * PAGE), ("touch", model.MMAP_BASE - PAGE), ("fork",), ("munmap", BASE, PAGE),
        ("madvise", model.MMAP_BASE - PAGE, PAGE, 4), ("exit",)]]
    with pytest.raises(AssertionError):
        run = Run((model, Forgetful()))
        for call in calls:
            run.call(*call)
    lines = smallest((model, Forgetful()), {}, calls).splitlines()
    assert [line.split("(")[0] for line in lines if line.startswith("mm0")] == ["mm0.mmap", "mm0.touch", "mm0.madvise"]
    assert lines[-1].startswith("AssertionError: pages")
