"""Nothing grows: cycles of create, use and drop, measured in references, in frames and in the process's memory."""
import ctypes
import gc
import itertools
import mmap
import sys
import tracemalloc

import pytest

import ioproc
from recording import BASE, PAGE, RO, RW, device, pages

SANITIZED = "asan" in open("/proc/self/maps").read()            # AddressSanitizer keeps what was freed for a while


def resident():
    """Bytes of this process's own memory, after what malloc holds back is given to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as statm:
        fields = statm.read().split()
    return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE


def use_memory():
    mem = ioproc.PhysicalMemory(frames=512)
    with ioproc.AddressSpace(mem) as mm:
        pages(mm, 300)
        mm.write(BASE, b"x" * 300 * PAGE)
        mm.mprotect(BASE + 10 * PAGE, PAGE, RO)
        mm.munmap(BASE + 20 * PAGE, PAGE)
        mm.mremap(BASE + 100 * PAGE, 100 * PAGE, 200 * PAGE)
    assert mem.stats["frames_used"] == 0


def use_without_exit():
    mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=512))
    pages(mm, 300)
    mm.write(BASE, b"x" * 300 * PAGE)


def use_forks():
    mem = ioproc.PhysicalMemory(frames=1024)
    mm = ioproc.AddressSpace(mem)
    pages(mm, 100)
    mm.write(BASE, b"p" * 100 * PAGE)
    for _ in range(3):                      # generations: the parent leaves first
        child = mm.fork()
        mm.touch(BASE, 50 * PAGE, write=True)
        mm.exit()
        child.write(BASE + 25 * PAGE, b"c" * 50 * PAGE)
        mm = child
    mm.exit()
    assert mem.stats["frames_used"] == 0


def use_files():
    mem = ioproc.PhysicalMemory(frames=512)
    file = ioproc.File(mem, 100 * PAGE)
    file.write(0, b"f" * 100 * PAGE)
    mm = ioproc.AddressSpace(mem)
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        addr = mm.mmap(100 * PAGE, RW, flags, file=file)
        mm.write(addr, b"w" * 100 * PAGE)
    addr = mm.shmat(ioproc.File(mem, 10 * PAGE))
    mm.touch(addr, 10 * PAGE, write=True)
    assert mm.vmas()
    mm.shmdt(addr)
    mm.mmap(10 * PAGE, RW, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | ioproc.MAP_POPULATE)


def use_ops():
    mem = ioproc.PhysicalMemory(frames=64)
    log = []
    mm = ioproc.AddressSpace(mem)
    pages(mm, 16)
    ops = [device(log, str(i), also=lambda *_, mm=mm: mm.pagemap(BASE, PAGE)) for i in range(4)]
    for each in ops:
        mm.register_ops(each)
        mm.register_ops(each, BASE + 4 * PAGE, 4 * PAGE)
    mm.touch(BASE, 16 * PAGE, write=True)
    mm.unregister_ops(ops[1])
    mm.unregister_ops(ops[2], BASE, 16 * PAGE)
    mm.munmap(BASE + 5 * PAGE, PAGE)
    # no exit, and the callbacks refer to the address space: garbage collection's


def use_exceptions():
    def fail(*arguments):
        raise ValueError("callback", arguments)
    mem = ioproc.PhysicalMemory(frames=8)
    mm = ioproc.AddressSpace(mem)
    mm.register_ops(ioproc.Ops(update_page=fail, invalidate_range=fail, release=fail))
    pages(mm, 16)
    for call in (lambda: mm.touch(BASE, 4 * PAGE), lambda: mm.write(BASE, b"x" * 16 * PAGE), lambda: mm.munmap(BASE, PAGE),
                 lambda: mm.read(BASE, 1), lambda: mm.mmap(-1), lambda: mm.mremap(BASE, PAGE, 0), mm.exit):
        with pytest.raises((ValueError, MemoryError, OSError, ioproc.AccessError)):
            call()


def use_counting():
    mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64))
    counting = ioproc.CountingOps()
    for _ in range(10):
        pages(mm, 16)
        mm.register_ops(counting, BASE, 8 * PAGE)
        mm.touch(BASE, 16 * PAGE)
    assert counting.counts["update_page"] == 80


def use_bad_arguments():
    mem = ioproc.PhysicalMemory(frames=8)
    for call in (lambda: ioproc.AddressSpace(mem, rlimits={"nonsense": 1}), lambda: ioproc.AddressSpace(mem, start_brk=1),
                 lambda: ioproc.PhysicalMemory(0), lambda: ioproc.File(mem, -1), lambda: ioproc.Ops(update_page=1),
                 lambda: ioproc.Ops("native")):
        with pytest.raises((ValueError, TypeError)):
            call()


def use_translation_cache():
    for ways in (16, None):
        cache = ioproc.TranslationCache(256, ways)
        cache.access(range(1000))
        cache.drop(range(900, 950))
        cache.clear()
        with pytest.raises(ValueError):
            cache.access([-1])
    with pytest.raises(ValueError):
        ioproc.TranslationCache(256, 7)
    ioproc.hit_curve(range(100))


def device_in_use(nic, mm, placement, translation, fork="revised"):
    """A context that has transferred, failed to, forked, and holds registrations; what holds all of that."""
    pages(mm, 16)
    ctx = nic.attach(mm, placement, translation, fork=fork, bounce_bytes=4 * PAGE, prefault=2)
    ctx.rdma_write(BASE + 100, b"d" * 6 * PAGE)
    held = [ctx, mm, nic]
    if translation != "bounce":
        held += [ctx.register(BASE + 2 * PAGE, 3 * PAGE), ctx.register(BASE + 4 * PAGE, 3 * PAGE, "r")]
        with pytest.raises(ioproc.RemoteAccessError):
            ctx.register(BASE + 14 * PAGE, 4 * PAGE)
    with pytest.raises(ioproc.RemoteAccessError):
        ctx.rdma_read(BASE + 14 * PAGE, 4 * PAGE)
    held.append(mm.fork())
    mm.write(BASE, b"p" * 4 * PAGE)
    ctx.rdma_write_to(BASE, 2 * PAGE, ctx, BASE + 8 * PAGE)
    mm.mprotect(BASE, PAGE, RO)
    mm.munmap(BASE + 6 * PAGE, PAGE)
    return held


DEVICES = [*(tuple(design.values()) for design in ioproc.DESIGNS.values()), ("mm", "fault", "inherit"),
           ("interval", "pin-cache+hooks", "inherit"), ("vma", "pin-cache+hooks", "precopy")]


def use_devices():
    """Ended by its process, its context, its NIC, its registrations, in every order."""
    for design, order in zip(itertools.cycle(DEVICES), itertools.permutations(range(4))):
        mem = ioproc.PhysicalMemory(frames=128)
        ctx, mm, nic, *registrations, child = device_in_use(ioproc.Nic(8, 2, table_entries=20), ioproc.AddressSpace(mem), *design)
        ends = [[mm.exit], [ctx.detach], [nic.close], [each.deregister for each in registrations]]
        for end in itertools.chain(*(ends[number] for number in order), [child.exit]):
            end()
        assert mem.stats["frames_used"] == 0


def use_devices_without_end():
    """Dropped, in every order; some of them with a reference from the address space's callbacks back to the device."""
    for design, order in zip(DEVICES, itertools.permutations(range(4))):
        mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=128))
        held = device_in_use(ioproc.Nic(8, None), mm, *design)
        if order[0] & 1:
            mm.register_ops(ioproc.Ops(update_page=lambda *_, ctx=held[0]: ctx.stats))
        mm = None
        for each in order:
            held[each] = None


def use_a_device_that_leaves_a_transfer():
    """A callback that would detach it is refused, in the middle of a transfer, which raises that."""
    mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64))
    pages(mm, 16)
    ctx = ioproc.Nic().attach(mm, "mm", "pin-cache+hooks")
    mm.register_ops(ioproc.Ops(update_page=lambda vma, addr: ctx.detach()))
    with pytest.raises(RuntimeError):
        ctx.rdma_write(BASE, b"d" * 3 * PAGE)
    ctx.detach()
    with pytest.raises(ioproc.RemoteAccessError):
        ctx.register(BASE, PAGE)


class Registrar:
    """A registration cache whose callables are its owner's, and raise now and then."""

    def __init__(self, fails=None, **options):
        self.cache = ioproc.RegistrationCache(self.register, self.deregister, **options)
        self.fails, self.calls = fails, 0

    def register(self, start, length, access):
        self.fail("register")
        return [start] * 100                # a handle that is worth keeping

    def deregister(self, start, length, handle):
        self.fail("deregister")

    def fail(self, what):
        self.calls += 1
        if what == self.fails and self.calls % 3 == 0:
            raise ConnectionError(what, self)


def use_registration_cache():
    for fails, defer in itertools.product((None, "register", "deregister"), (False, True)):
        owner = Registrar(fails, max_regions=3, defer=defer)
        cache, held = owner.cache, []
        for call, *where in ([(cache.get, page, 1) for page in range(0, 20, 2)] + [(cache.put,), (cache.put,), (cache.get, 0, 9)]
                             + [(cache.invalidate, 0, 5), (cache.flush,), (cache.invalidate, 9, 4)] + [(cache.close,)] * defer):
            arguments = [held.pop()] if call == cache.put else [number * PAGE for number in where]
            try:
                held.insert(0, call(*arguments))
            except ConnectionError:
                assert fails
        with pytest.raises(ValueError):
            cache.get(0, 0)
        owner.fails = None          # nobody is there to be told any more: the cache, its owner and regions in use are dropped


USES = [use_memory, use_without_exit, use_forks, use_files, use_ops, use_exceptions, use_counting, use_bad_arguments,
        use_translation_cache, use_devices, use_devices_without_end, use_a_device_that_leaves_a_transfer, use_registration_cache]


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def allocated():
    """Bytes that malloc has given out: all of the core's, none of Python's small objects."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


@pytest.mark.skipif(SANITIZED or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's malloc, 2.33 or later")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_the_core_gives_back_what_it_takes(use):
    for _ in range(5):
        use()
    grown = []
    for _ in range(3):              # Python's own tables grow now and then; a leak does every time
        gc.collect()
        before = allocated()
        for _ in range(50):
            use()
        gc.collect()
        grown.append(allocated() - before)
    assert min(grown) < 50 * 16     # less than one smallest allocation in each round


@pytest.mark.skipif(SANITIZED, reason="the sanitizer's quarantine grows")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_the_process_does_not_grow(use):
    for _ in range(20):
        use()
    gc.collect()
    before = resident()
    for _ in range(150):
        use()
    gc.collect()
    assert resident() - before < 256 * 1024         # half a page in each round


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_python_objects_do_not_pile_up(use):
    for _ in range(5):
        use()
    gc.collect()
    tracemalloc.start()
    try:
        use()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            use()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 4096


def test_references_are_given_back():
    mem = ioproc.PhysicalMemory(frames=64)
    file = ioproc.File(mem, 8 * PAGE)
    ops = ioproc.Ops(update_page=lambda vma, addr: None)
    watched = [mem, file, ops]
    counts = [sys.getrefcount(each) for each in watched]
    for _ in range(10):
        with ioproc.AddressSpace(mem) as mm:
            mm.mmap(8 * PAGE, RW, mmap.MAP_PRIVATE | ioproc.MAP_FIXED, addr=BASE, file=file)
            mm.register_ops(ops)
            mm.register_ops(ops, BASE, PAGE)
            mm.touch(BASE, 8 * PAGE, write=True)
            assert mm.vmas()[0].file is file
            with pytest.raises(OSError, match="exists"):
                mm.register_ops(ops)
            mm.fork().exit()
            mm.unregister_ops(ops)
        del mm
    gc.collect()
    assert [sys.getrefcount(each) for each in watched] == counts


@pytest.mark.parametrize("design", DEVICES, ids=lambda design: ioproc._core.design_name(*design))
def test_devices_give_references_back(design):
    mem, nic = ioproc.PhysicalMemory(frames=64), ioproc.Nic()
    mm = ioproc.AddressSpace(mem)
    watched = [mem, nic, mm]
    counts = [sys.getrefcount(each) for each in watched]
    for end in range(3):
        held = device_in_use(nic, mm, *design)
        held[-1].exit()
        if end == 1:
            held[0].detach()
        held = None
        if end == 0:
            nic.close()
        elif end == 2:
            mm.exit()
    gc.collect()
    assert [sys.getrefcount(each) for each in watched] == counts


def test_a_registration_cache_keeps_only_what_is_registered():
    """Handles and exceptions, as long as it lives."""
    handle, error = object(), ConnectionError()
    raising = []

    def register(start, length, access):
        if raising:
            raise error
        return handle

    def deregister(start, length, handle):
        register(start, length, None)

    cache = ioproc.RegistrationCache(register, deregister, max_regions=2)
    watched = [handle, error, register, deregister, cache]
    counts = [sys.getrefcount(each) for each in watched]
    for _ in range(10):
        regions = [cache.get(page * PAGE, PAGE) for page in (0, 2, 4)]
        raising.append(True)
        for call, *arguments in ((cache.get, 9 * PAGE, PAGE), (cache.put, regions.pop()), (cache.put, regions.pop()),
                                 (cache.invalidate, 0, 9 * PAGE)):
            try:
                call(*arguments)
            except ConnectionError:
                error.__traceback__ = error.__context__ = None
        raising.clear()
        call = arguments = regions = None
    assert [sys.getrefcount(each) for each in watched] == counts


def test_a_file_lives_as_long_as_it_is_mapped():
    mem = ioproc.PhysicalMemory(frames=64)
    mm = ioproc.AddressSpace(mem)
    file = ioproc.File(mem, PAGE)
    file.write(0, b"kept")
    addr = mm.mmap(PAGE, RW, mmap.MAP_SHARED, file=file)
    del file
    gc.collect()
    assert mm.read(addr, 4) == b"kept"
    again = mm.vmas()[0].file                       # a new face for the same file
    assert again.size == PAGE and again.read(0, 4) == b"kept"
    assert mm.vmas()[0].file is again
    mm.munmap(addr, PAGE)
    assert again.read(0, 4) == b"kept"
    del again
    gc.collect()
    assert mem.stats["frames_used"] == 0
