"""What others do to a page while reclaim lets its hooks run: the locks it has do not cover all who know the page."""
import threading

import pytest

import ioproc
from ioproc import _core
from world import BASE, COLD, PAGE

ANONYMOUS, SHARED = 0x32, 0x11      # with MAP_FIXED


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=64, swap_slots=64)


def reclaim(mm, meanwhile):
    """One page of `mm`, while another thread does `meanwhile`; what waits for this address space ends afterwards."""
    threads = []

    def called(vma, addr):
        threads.append(threading.Thread(target=meanwhile))
        threads[0].start()
        threads[0].join(0.5)

    ops = ioproc.Ops(invalidate_page=called)
    mm.register_ops(ops)
    reclaimed = mm.mem.reclaim(1)
    threads[0].join()
    mm.unregister_ops(ops)
    return reclaimed


def gone(mem, *spaces):
    _core.check_memory(mem, spaces)
    for mm in spaces:
        mm.exit()
    assert mem.stats["frames_used"] == mem.stats["swap_used"] == 0
    _core.check_memory(mem, [])


@pytest.mark.parametrize("memfd", [False, True])
@pytest.mark.parametrize("cut", [lambda file: file.truncate(0), lambda file: file.punch_hole(0, PAGE)], ids=["short", "hole"])
def test_the_page_leaves_its_file(mem, memfd, cut):
    file = ioproc.File(mem, PAGE, memfd=memfd)
    mm = ioproc.AddressSpace(mem)
    mm.mmap(PAGE, 3, SHARED, addr=BASE, file=file)
    mm.write(BASE, b"x")
    assert reclaim(mm, lambda: cut(file)) == 1
    assert mem.stats["written_back"] == mem.stats["swapped_out"] == 0 and file.read(0, 1) in (b"", b"\0")
    gone(mem, mm)


@pytest.mark.parametrize("memfd", [False, True])
def test_the_page_is_written(mem, memfd):
    file = ioproc.File(mem, PAGE, memfd=memfd)
    mm = ioproc.AddressSpace(mem)
    mm.mmap(PAGE, 1, SHARED, addr=BASE, file=file)
    mm.read(BASE, 1)
    mm.madvise(BASE, PAGE, COLD)
    assert reclaim(mm, lambda: file.write(0, b"new")) == 1          # when it comes by again, and no entry is left
    assert (mem.stats["swapped_out"], mem.stats["written_back"]) == ((1, 0) if memfd else (0, 1))
    assert file.read(0, 3) == b"new" == mm.read(BASE, 3)
    file.truncate(0)
    gone(mem, mm)


@pytest.mark.parametrize("memfd", [False, True])
def test_the_page_is_mapped_by_another(mem, memfd):
    file = ioproc.File(mem, PAGE, memfd=memfd)
    mm, other = ioproc.AddressSpace(mem), ioproc.AddressSpace(mem)
    mm.mmap(PAGE, 3, SHARED, addr=BASE, file=file)
    mm.write(BASE, b"x")

    def meanwhile():
        other.mmap(PAGE, 3, SHARED, addr=BASE, file=file)
        other.write(BASE, b"y")

    assert reclaim(mm, meanwhile) == 0
    assert mm.read(BASE, 1) == b"y"
    file.truncate(0)
    gone(mem, mm, other)


@pytest.mark.parametrize("what", [lambda mm: mm.exit(), lambda mm: mm.read(BASE, 1), lambda mm: mm.write(BASE, b"z"),
                                  lambda mm: mm.fork().exit()], ids=["exit", "read", "write", "fork"])
def test_the_page_is_in_swap_too(mem, what):
    """And another address space has only an entry of the slot, of which reclaim knows nothing."""
    mm = ioproc.AddressSpace(mem)
    mm.mmap(PAGE, 3, ANONYMOUS, addr=BASE)
    mm.write(BASE, b"both")
    child = mm.fork()
    assert mem.reclaim(2) == 1
    child.read(BASE, 1)
    child.madvise(BASE, PAGE, COLD)
    assert reclaim(child, lambda: what(mm)) == 1
    _core.check_memory(mem, [mm, child])
    assert child.read(BASE, 4) == b"both"
    gone(mem, mm, child)
