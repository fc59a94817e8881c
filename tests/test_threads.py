"""Several threads on the same objects: no callback after unregistering, no deadlock, nothing lost."""
import threading
import time

import pytest

import ioproc
from ioproc import _core
from recording import BASE, PAGE, PRIVATE, RO, RW, pages
from threads import SECONDS, no_deadlock, together  # noqa: F401  (a fixture)


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=4096)


def act(mm, chance, area=64):
    """One random operation in a fixed area; another thread may have unmapped what it wants."""
    addr = BASE + chance.randrange(area) * PAGE
    length = chance.randrange(1, 9) * PAGE
    try:
        match chance.randrange(8):
            case 0 | 1:
                mm.mmap(length, chance.choice([RO, RW]), chance.choice([0x21, 0x22]) | ioproc.MAP_FIXED, addr=addr)
            case 2:
                mm.munmap(addr, length)
            case 3:
                mm.mprotect(addr, length, chance.choice([0, RO, RW]))
            case 4:
                mm.write(addr, b"z" * length)
            case 5:
                mm.touch(addr, length)
            case 6:
                mm.madvise(addr, length, 4)
            case 7:
                with mm.fork() as child:
                    child.touch(addr, length, write=True)
    except (OSError, ioproc.AccessError, MemoryError):
        pass


def test_one_address_space_many_threads(mem):
    mm = ioproc.AddressSpace(mem)
    counting = ioproc.CountingOps()
    mm.register_ops(counting)

    def work(chance, going):
        while going():
            act(mm, chance)

    def look(chance, going):
        while going():
            vmas = mm.vmas()
            assert all(a.end <= b.start for a, b in zip(vmas, vmas[1:], strict=False))
            for pfn in mm.pagemap(BASE, 64 * PAGE)["pfn"]:
                for space, addr in mem.mappings(pfn) if pfn else ():
                    assert space.mem is mem and addr % PAGE == 0
            assert mem.stats["frames_used"] <= 4096

    together(work, work, work, look)
    assert mm.stats["callbacks"] == counting.counts
    mm.exit()
    assert mem.stats["frames_used"] == 0


def test_many_address_spaces_one_memory(mem):
    file = ioproc.File(mem, 32 * PAGE)
    other = 0x20000000

    def work(chance, going):
        mm = ioproc.AddressSpace(mem)
        mm.register_ops(ioproc.CountingOps())
        while going():
            act(mm, chance)
            if chance.randrange(20) == 0:
                mm.mmap(32 * PAGE, RW, chance.choice([1, 2]) | ioproc.MAP_FIXED, addr=other, file=file)
                mm.write(other + chance.randrange(32) * PAGE, bytes([chance.randrange(256)]))
                file.write(chance.randrange(32 * PAGE), b"f")
                file.read(0, 32 * PAGE)
            if chance.randrange(50) == 0:
                child = mm.fork()
                mm.exit()
                mm = child
        mm.exit()

    together(work, work, work, work)
    used = mem.stats["frames_used"]
    assert used <= 32                   # the file's page cache, and nothing else
    file = None
    assert mem.stats["frames_used"] == 0


def test_out_of_frames_under_contention():
    mem = ioproc.PhysicalMemory(frames=100)

    def work(chance, going):
        while going():
            with ioproc.AddressSpace(mem) as mm:
                addr = mm.mmap(80 * PAGE)
                try:
                    mm.touch(addr, 80 * PAGE, write=True)
                except MemoryError:
                    present = mm.pagemap(addr, 80 * PAGE)["present"]
                    assert not present[int(present.sum()):].any()       # a prefix
                child = mm.fork()
                try:
                    child.write(addr, b"c" * 20 * PAGE)
                except MemoryError:
                    pass
                child.exit()

    together(work, work, work)
    assert mem.stats["frames_used"] == 0


@pytest.mark.parametrize("placement", ["mm", "vma"])
def test_no_callback_after_unregister_returned(mem, placement):
    """Registered and unregistered from one thread while others make the chain be walked, with slow callbacks."""
    mm = ioproc.AddressSpace(mem)
    pages(mm, 64)
    where = () if placement == "mm" else (BASE, 64 * PAGE)
    late, calls = [], []

    class Device:
        def __init__(self):
            self.registered = True

        def called(self, *arguments):
            time.sleep(0.0005)          # lets go of the GIL in the middle of the walk
            calls.append(self)
            if not self.registered:
                late.append(self)

    def register(chance, going):
        while going():
            device = Device()
            ops = ioproc.Ops(update_page=device.called, invalidate_range=device.called, wrprotect_page=device.called)
            mm.register_ops(ops, *where)
            time.sleep(0.002)
            mm.unregister_ops(ops, *where)
            device.registered = False

    def walk(chance, going):
        while going():
            addr = BASE + chance.randrange(60) * PAGE
            mm.touch(addr, 4 * PAGE, write=True)
            mm.madvise(addr, 4 * PAGE, 4)
            if chance.randrange(10) == 0:
                mm.fork().exit()

    together(register, register, walk, walk)
    assert len(calls) > 50
    assert late == []
    assert mm.stats["hooks"]["update_page"] > 0
    mm.exit()
    assert mem.stats["frames_used"] == 0


def test_register_waits_for_the_walk_and_the_order_is_that_of_the_lock(mem):
    """A device registered during a walk hears of the next operation, not of the rest of this one."""
    mm = ioproc.AddressSpace(mem)
    pages(mm, 2)
    log = []
    inside, registering = threading.Event(), threading.Event()

    def slow(vma, addr):
        log.append(("first", addr))
        inside.set()
        registering.wait(60)
        time.sleep(0.05)

    def register():
        inside.wait(60)
        registering.set()
        mm.register_ops(ioproc.Ops(update_page=lambda vma, addr: log.append(("second", addr))))

    mm.register_ops(ioproc.Ops(update_page=slow))
    thread = threading.Thread(target=register)
    thread.start()
    mm.touch(BASE, 2 * PAGE)
    thread.join(60)
    assert log == [("first", BASE), ("first", BASE + PAGE)]
    mm.touch(BASE, write=True)
    assert log[2:] == [("second", BASE), ("first", BASE)]


def test_python_callbacks_on_several_address_spaces(mem):
    """Each holds its lock and wants the GIL; none may hold the GIL and want a lock."""
    log = []

    def callback(vma, *where):
        mem.stats["frames_used"]
        log.append(where)

    ops = ioproc.Ops(**dict.fromkeys(ioproc.HOOK_NAMES, callback))
    spaces = [ioproc.AddressSpace(mem) for _ in range(3)]
    for mm in spaces:
        mm.register_ops(ops)

    def work(chance, going):
        while going():
            act(chance.choice(spaces), chance, area=16)

    def look(chance, going):
        while going():
            mm = chance.choice(spaces)
            for pfn in mm.pagemap(BASE, 16 * PAGE)["pfn"]:
                if pfn:
                    mem.mappings(pfn)

    together(work, work, work, look)
    for mm in spaces:
        mm.exit()
    assert mem.stats["frames_used"] == 0 and len(log) > 100


def test_exit_while_others_use_it(mem):
    for seed in range(30):
        mm = ioproc.AddressSpace(mem)
        released = []
        mm.register_ops(ioproc.Ops(release=released.append))
        pages(mm, 64)

        def work(chance, going, mm=mm):
            for _ in range(30):
                act(mm, chance)             # ESRCH once it is gone

        def leave(chance, going, mm=mm, seed=seed):
            time.sleep(seed * 0.0001)
            mm.exit()

        together(work, work, leave, leave)
        assert released == [mm]
    assert mem.stats["frames_used"] == 0


def test_threads_grow_one_stack(mem):
    mm = ioproc.AddressSpace(mem)
    top = BASE + 1024 * PAGE
    pages(mm, 1, top, flags=PRIVATE | ioproc.MAP_GROWSDOWN)

    def use(chance, going):
        while going():
            mm.write(top - chance.randrange(512) * PAGE, b"x")
            if chance.randrange(8) == 0:
                mm.munmap(top - 512 * PAGE, chance.randrange(1, 513) * PAGE)

    together(use, use, use, use, seconds=SECONDS / 3)
    _core.check_space(mm)
    _core.check_memory(mem, [mm])
