"""vfork: two processes in one address space; exec: one process in another."""
import errno
import gc
import threading

import pytest

import ioproc
from recording import BASE, PAGE, RW, device, pages
from test_threads import act
from threads import together


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=4096)


@pytest.fixture
def mm(mem):
    mm = ioproc.AddressSpace(mem, rlimits={"AS": 64 * PAGE}, max_map_count=100, start_brk=BASE - 64 * PAGE)
    pages(mm, 4)
    mm.write(BASE, b"parent")
    return mm


def gone(mm):
    with pytest.raises(OSError) as raised:
        mm.read(BASE, 1)
    return raised.value.errno == errno.ESRCH and mm.vmas() == [] and not mm.pagemap(BASE, PAGE)["present"].any()


def test_exec_of_the_last_user(mem, mm):
    log, present = [], []

    def release(space):
        assert space is mm and len(space.vmas()) == 1
        present.append(space.pagemap(BASE, PAGE)["present"][0])
        with pytest.raises(RuntimeError):
            space.exec()

    mm.register_ops(device(log, "1"))
    mm.register_ops(device(log, "2"))
    mm.register_ops(device(log, "vma"), BASE, PAGE)
    first, last = ioproc.Ops(release=release), device(log, "3")
    mm.munmap(BASE + PAGE, 3 * PAGE)
    log.clear()
    mm.register_ops(first)
    mm.register_ops(last)
    assert mm.exec() is None
    assert [(name, hook) for name, hook, *_ in log] == [(name, "release") for name in ("3", "2", "1", "vma")]
    assert present == [True]
    assert mm.vmas() == [] and mem.stats["frames_used"] == 0 and mm.stats["faults"] == 0
    log.clear()
    pages(mm, 1)
    mm.touch(BASE)
    mm.exit()
    assert log == []


def test_the_limits_stay(mm):
    child = mm.vfork()
    child.exec()
    for space in (mm, child):
        space.exec()
        assert space.brk() == BASE - 64 * PAGE
        with pytest.raises(OSError):
            space.mmap(65 * PAGE)
        with pytest.raises(OSError):
            for page in range(0, 300, 2):
                space.mmap(PAGE // 2, RW, 0x32, addr=BASE + page * PAGE)
    assert mm.fork().brk() == BASE - 64 * PAGE


def test_the_parent_may_go_first(mem, mm):
    released = []
    mm.register_ops(ioproc.Ops(release=released.append, name="kept alive by who uses it"))
    child = mm.vfork()
    grandchild = child.vfork()
    mm.exit()
    assert gone(mm) and child.read(BASE, 6) == b"parent"
    pfn = child.pagemap(BASE, PAGE)["pfn"][0]
    assert mem.mappings(pfn) == [(child, BASE)]
    child.exec()
    child.exec()
    assert mem.mappings(pfn) == [(grandchild, BASE)] and child.vmas() == []
    again = grandchild.vfork()
    del grandchild
    gc.collect()
    assert released == [] and mem.mappings(pfn) == [(again, BASE)]
    again.exec()
    assert released == [again] and mem.stats["frames_used"] == 0


def test_what_release_raises_arrives_and_exec_is_done(mem, mm):
    def release(space):
        raise KeyError("release")

    mm.register_ops(ioproc.Ops(release=release))
    with pytest.raises(KeyError):
        mm.exec()
    assert mm.vmas() == [] and mem.stats["frames_used"] == 0
    mm.exit()
    with pytest.raises(OSError):
        mm.exec()
    with pytest.raises(OSError):
        mm.vfork()


def test_not_in_callbacks(mm):
    raised = []

    def callback(vma, addr):
        for call in (mm.vfork, mm.exec):
            try:
                call()
            except RuntimeError as error:
                raised.append(error)

    mm.register_ops(ioproc.Ops(update_page=callback))
    mm.touch(BASE + PAGE)
    assert len(raised) == 2


def test_threads_while_it_execs(mem):
    """Who waits for the lock of what is gone takes the new one."""
    file = ioproc.File(mem, 8 * PAGE)
    mm = ioproc.AddressSpace(mem)

    def use(chance, going):
        while going():
            act(mm, chance)
            mm.vmas()
            try:
                mm.madvise(mm.mmap(8 * PAGE, RW, 1, file=file), 8 * PAGE, 9)
            except OSError:
                pass

    def execute(chance, going):
        while going():
            mm.register_ops(ioproc.CountingOps())
            mm.exec()

    def vfork(chance, going):
        while going():
            child = mm.vfork()
            act(child, chance)
            child.exec() if chance.randrange(2) else child.exit()
            child.exit()

    together(use, use, execute, execute, vfork)
    mm.exit()
    assert threading.active_count() == 1
    file.truncate(0)
    assert mem.stats["frames_used"] == 0
