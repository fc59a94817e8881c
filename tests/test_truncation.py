"""Truncation, hole punching and MADV_REMOVE reach into every address space that maps the file, whoever uses it meanwhile."""
import errno
import gc
import mmap
import threading
import time

import numpy as np
import pytest

import ioproc
from ioproc import _core
from recording import BASE, PAGE, RO, RW, device
from threads import no_deadlock, together  # noqa: F401  (a fixture)

SHARED, PRIVATE, FIXED = 1, 2, 0x10
ELSEWHERE = 0x40000000


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=4096)


@pytest.fixture
def file(mem):
    return ioproc.File(mem, 8 * PAGE)


def mapped(mem, file, flags=SHARED, addr=BASE, n=8, prot=RW):
    mm = ioproc.AddressSpace(mem)
    mm.mmap(n * PAGE, prot, flags | FIXED, addr=addr, file=file)
    return mm


def listen(mm, name=""):
    """What the address space is told from now on."""
    log = []
    mm.register_ops(device(log, name))
    return log


def present(mm, addr=BASE, n=8):
    return list(np.flatnonzero(mm.pagemap(addr, n * PAGE)["present"]))


def test_every_address_space_hears_of_its_part(mem, file):
    spaces = [mapped(mem, file), mapped(mem, file, PRIVATE), mapped(mem, file, SHARED, ELSEWHERE)]
    spaces[2].munmap(ELSEWHERE, 5 * PAGE)
    spaces[0].write(BASE, b"a" * 8 * PAGE)
    spaces[1].write(BASE + 6 * PAGE, b"copied")
    logs = [listen(mm) for mm in spaces]
    file.truncate(4 * PAGE + 100)
    assert logs[0] == [("", "invalidate_range", BASE + 5 * PAGE, BASE + 8 * PAGE)]
    assert logs[1] == [("", "invalidate_range", BASE + 5 * PAGE, BASE + 8 * PAGE)]
    assert logs[2] == [("", "invalidate_range", ELSEWHERE + 5 * PAGE, ELSEWHERE + 8 * PAGE)]
    assert present(spaces[0]) == [0, 1, 2, 3, 4] and present(spaces[1]) == []
    assert spaces[0].read(BASE + 4 * PAGE, 200) == b"a" * 100 + bytes(100)
    assert file.size == 4 * PAGE + 100
    assert mem.stats["frames_used"] == 5
    for mm in spaces:
        _core.check_space(mm)
    _core.check_memory(mem, spaces)


def test_beyond_the_new_end_is_a_bus_error_until_the_file_grows_again(mem, file):
    mm = mapped(mem, file)
    mm.write(BASE, b"a" * 8 * PAGE)
    file.truncate(2 * PAGE + 1)
    for access in (lambda: mm.read(BASE + PAGE, 4 * PAGE), lambda: mm.write(BASE + PAGE, bytes(4 * PAGE))):
        with pytest.raises(ioproc.BusError) as raised:
            access()
        assert (raised.value.address, raised.value.completed) == (BASE + 3 * PAGE, 2 * PAGE)
    with pytest.raises(ioproc.BusError) as raised:
        mm.touch(BASE, 8 * PAGE, write=True)
    assert (raised.value.address, raised.value.completed) == (BASE + 3 * PAGE, 3)
    file.truncate(8 * PAGE)
    assert mm.read(BASE + 3 * PAGE, 5 * PAGE) == bytes(5 * PAGE)


def test_arguments(mem, file):
    for call, code in ((lambda: file.punch_hole(0, 0), errno.EINVAL), (lambda: file.punch_hole((1 << 63) - 1, 1), errno.EFBIG),
                       (lambda: file.punch_hole(-1, 1), errno.EINVAL), (lambda: file.punch_hole(1, -1), errno.EINVAL),
                       (lambda: file.truncate(-1), errno.EINVAL)):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == code
    for call in (lambda: file.truncate((1 << 46) + 1), lambda: file.truncate(1 << 64), lambda: file.punch_hole(1 << 63, 1)):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(TypeError):
        file.truncate("1")


def test_callbacks_look_and_do_not_touch_and_what_they_raise_arrives(mem, file):
    spaces = [mapped(mem, file), mapped(mem, file)]
    file.write(0, b"a" * 8 * PAGE)
    seen = []

    def callback(vma, start, end):
        seen.append((spaces[0].pagemap(start, PAGE)["present"][0], file.size))
        for touch in (lambda: file.truncate(0), lambda: file.punch_hole(0, PAGE), lambda: spaces[1].read(BASE, 1)):
            with pytest.raises(RuntimeError):
                touch()
        raise KeyError("from the callback")

    spaces[0].touch(BASE, 8 * PAGE)
    spaces[1].touch(BASE, 8 * PAGE)
    spaces[0].register_ops(ioproc.Ops(invalidate_range=callback))
    with pytest.raises(KeyError):
        file.truncate(PAGE)
    assert seen == [(True, PAGE)]                       # before the pages go, after the size changed
    assert [present(mm) for mm in spaces] == [[0], [0]]


def test_an_address_space_that_ends_in_its_own_callback(mem, file):
    """By its last reference, and by garbage collection: neither waits for the lock its thread holds."""
    released = []
    for collect in (False, True):
        spaces = [mapped(mem, file)]
        spaces[0].touch(BASE, 8 * PAGE)

        def callback(vma, start, end, spaces=spaces):
            spaces.clear()
            gc.collect()

        ops = ioproc.Ops(invalidate_range=callback, release=lambda mm, collect=collect: released.append(collect))
        spaces[0].register_ops(ops)
        if collect:
            ring = [spaces.pop(), ops]
            ring.append(ring)
            del ring
            gc.disable()
        del ops
        file.truncate(PAGE)
        gc.enable()
        gc.collect()
        file.truncate(8 * PAGE)
        assert mem.stats["frames_used"] == 1
    assert released == [False, True]


def test_a_busy_address_space_is_waited_for_without_holding_up_others(mem, file):
    busy, other = mapped(mem, file), mapped(mem, file)
    busy.touch(BASE, 8 * PAGE), other.touch(BASE, 8 * PAGE)
    inside, go_on = threading.Event(), threading.Event()

    def slow(vma, addr):
        inside.set()
        go_on.wait(60)

    busy.register_ops(ioproc.Ops(update_page=slow))
    user = threading.Thread(target=lambda: busy.touch(busy.mmap(PAGE)))
    user.start()
    inside.wait(60)
    truncating = threading.Thread(target=file.truncate, args=(PAGE,))
    truncating.start()
    while file.size != PAGE:
        time.sleep(0.001)
    other.touch(other.mmap(16 * PAGE), 16 * PAGE, write=True)
    with pytest.raises(ioproc.BusError):
        other.touch(other.mmap(8 * PAGE, RW, SHARED, file=file), 8 * PAGE)
    assert truncating.is_alive()
    go_on.set()
    user.join(60), truncating.join(60)
    assert present(busy) == present(other) == [0]


def test_truncation_against_everything(mem, file):
    """Faults, forks, copies, moves and exits race with it: nothing beyond the end survives, no frame is lost."""
    def use(chance, going):
        mm = mapped(mem, file, chance.choice([SHARED, PRIVATE]))
        mm.register_ops(ioproc.CountingOps())
        while going():
            page = chance.randrange(8)
            try:
                match chance.randrange(8):
                    case 0 | 1 | 2:
                        mm.touch(BASE + page * PAGE, (8 - page) * PAGE, write=chance.randrange(2) == 1)
                    case 3:
                        mm.write(BASE + page * PAGE, b"w")
                    case 4:
                        mm.mmap(8 * PAGE, RW, chance.choice([SHARED, PRIVATE]) | FIXED, addr=BASE, file=file)
                    case 5:
                        mm, old = mm.fork(), mm
                        old.exit()
                    case 6:
                        mm.mprotect(BASE + page * PAGE, PAGE, chance.choice([RO, RW]))
                    case 7:
                        mm.madvise(BASE + page * PAGE, PAGE, chance.choice([mmap.MADV_REMOVE, 4]))
            except (ioproc.AccessError, OSError):
                pass
            _core.check_space(mm)
        spaces.append(mm)

    def cut(chance, going):
        while going():
            file.truncate(chance.randrange(8 * PAGE))
            file.punch_hole(chance.randrange(8 * PAGE), chance.randrange(1, 4 * PAGE))
            file.write(chance.randrange(8 * PAGE), b"w")
            file.read(0, 8 * PAGE)

    spaces = []
    together(use, use, use, cut, cut)
    file.truncate(PAGE)
    for mm in spaces:
        assert set(present(mm)) <= {0}
    _core.check_memory(mem, spaces)
    for mm in spaces:
        mm.exit()
    file.truncate(0)
    assert mem.stats["frames_used"] == 0


def test_a_fork_during_truncation_keeps_nothing(mem):
    """The child copies entries that its parent is about to lose."""
    file = ioproc.File(mem, 512 * PAGE)
    for _ in range(40):
        mm = mapped(mem, file, PRIVATE, n=512)
        mm.touch(BASE, 512 * PAGE, write=True)
        children = []
        start = threading.Barrier(2)

        def fork(mm=mm, children=children, start=start):
            start.wait()
            for _ in range(4):
                children.append(mm.fork())

        thread = threading.Thread(target=fork)
        thread.start()
        start.wait()
        file.truncate(PAGE)
        thread.join()
        assert all(set(present(child, n=512)) <= {0} for child in [mm, *children])
        for child in [mm, *children]:
            child.exit()
        file.truncate(512 * PAGE)
    file.truncate(0)
    assert mem.stats["frames_used"] == 0
