"""
What test_out_of_memory.py runs: a scenario, again and again, in which another allocation of the core fails each time.

    LD_PRELOAD=failing_malloc.so python tests/out_of_memory.py vm|device|caches
"""
import ctypes
import errno
import sys

import ioproc
from ioproc import _core

PAGE, HUGE, BASE = 4096, 2 << 20, 0x10000000
FAR = BASE + (1 << 32)
PRIVATE, SHARED, ANONYMOUS, HUGETLB = 0x12, 0x11, 0x20, 0x40000         # with MAP_FIXED
NO_MEMORY = MemoryError, OSError, ioproc.AccessError, ioproc.RemoteAccessError

shim = ctypes.CDLL(None)
core = [line.split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(_core.__file__)]
shim.failing_from(*(ctypes.c_void_p(int(end.split()[0], 16)) for end in (core[0][0], core[-1][1])))
failures = 0


def failed():
    """Since the last look.  What comes next has memory again."""
    global failures
    count = shim.failing_failed()
    if count:
        shim.failing_at(0, 0)
        failures += 1
    return count


def attempt(call, *arguments, **options):
    """It may fail, or what it needs did."""
    try:
        return call(*arguments, **options)
    except NO_MEMORY:
        pass
    finally:
        failed()


def works(call, *arguments, **options):
    """At the second attempt, if the first had no memory and said so."""
    try:
        return call(*arguments, **options)
    except NO_MEMORY as error:
        assert isinstance(error, MemoryError) or getattr(error, "errno", getattr(error, "cause", 0)) in (
            errno.ENOMEM, "out of memory"), error
        assert failed(), error
        return call(*arguments, **options)
    finally:
        failed()


def vm(begin):
    begin()
    mem = attempt(ioproc.PhysicalMemory, 96, 64, 4) or ioproc.PhysicalMemory(96, 64, 4)
    mm = attempt(ioproc.AddressSpace, mem) or ioproc.AddressSpace(mem)
    files = [attempt(ioproc.File, mem, 16 * PAGE, memfd) or ioproc.File(mem, 16 * PAGE, memfd) for memfd in (False, True)]
    huge = attempt(ioproc.File, mem, 2 * HUGE, huge=True) or ioproc.File(mem, 2 * HUGE, huge=True)
    ops = [ioproc.CountingOps() for _ in range(3)]
    children, pins = [], []
    for counting in ops[:2]:
        attempt(mm.register_ops, counting)
    for at in BASE, FAR:
        attempt(mm.mmap, 40 * PAGE, 3, PRIVATE | ANONYMOUS, addr=at)
        attempt(mm.mmap, 16 * PAGE, 3, SHARED, addr=at + 40 * PAGE, file=files[0])
        attempt(mm.mmap, 16 * PAGE, 3, PRIVATE, addr=at + 56 * PAGE, file=files[1])
        attempt(mm.mmap, 8 * PAGE, 3, SHARED | ANONYMOUS, addr=at + 72 * PAGE)
        attempt(mm.mmap_device, 4 * PAGE, 0x100000, addr=at + 80 * PAGE)
        attempt(mm.zeromap, 4 * PAGE, addr=at + 84 * PAGE)
        attempt(mm.touch, at, 40 * PAGE), attempt(mm.write, at, b"w" * 20 * PAGE)
        attempt(mm.write, at + 50 * PAGE, b"w" * 25 * PAGE), attempt(mm.write, at + 80 * PAGE, b"w" * 8 * PAGE)
        for ops_ in ops[1:]:
            attempt(mm.register_ops, ops_, at + 3 * PAGE, 9 * PAGE)
        for page in range(0, 40, 3):
            attempt(mm.mprotect, at + page * PAGE, PAGE, 7)
        attempt(mm.mlock, at + 20 * PAGE, 5 * PAGE)
        children.append(attempt(mm.fork))
        attempt(mm.write, at, b"c" * 9 * PAGE)
        attempt(mem.reclaim, 40)
        for child in filter(None, children):
            attempt(child.write, at + 4 * PAGE, b"c" * 9 * PAGE), attempt(child.read, at, 30 * PAGE)
        attempt(mm.read, at, 75 * PAGE)
        pins.append(attempt(mem.pin, mm, at + 4 * PAGE, 4 * PAGE))
        attempt(mm.madvise, at, 30 * PAGE, 8), attempt(mm.madvise, at + 2 * PAGE, 7 * PAGE, 4)
        attempt(mm.mremap, at + 2 * PAGE, 6 * PAGE, 6 * PAGE, 3, at + 200 * PAGE)
        attempt(mm.mremap, at + 56 * PAGE, 10 * PAGE, 12 * PAGE, 1)
        attempt(files[0].write, 5 * PAGE, b"f" * 5 * PAGE), attempt(files[1].truncate, 3 * PAGE)
        attempt(files[0].punch_hole, 0, 6 * PAGE), attempt(files[1].truncate, 16 * PAGE)
        attempt(mm.remap_file_pages, at + 42 * PAGE, 3 * PAGE, 9)
        attempt(mm.mmap, HUGE, 3, PRIVATE | ANONYMOUS | HUGETLB, addr=at + 2 * HUGE)
        attempt(mm.mmap, HUGE, 3, SHARED, addr=at + 3 * HUGE, file=huge)
        attempt(mm.write, at + 2 * HUGE, b"h"), attempt(mm.write, at + 3 * HUGE, b"h")
        attempt(mm.brk, 0x555555756000 + 8 * PAGE), attempt(mm.msync, at + 40 * PAGE, 16 * PAGE)
        attempt(mm.shmat, files[1])
        attempt(mm.vmas), attempt(mm.pagemap, at, 90 * PAGE), attempt(mem.mappings, 3)
        attempt(mm.mmap, PAGE, 3, PRIVATE | ANONYMOUS | 0x100, addr=at + 4000 * PAGE)
        attempt(mm.touch, at + 3990 * PAGE, 3 * PAGE, True)
        child = attempt(mm.vfork)
        if child is not None:
            attempt(child.write, at, b"v"), attempt(child.exec), attempt(child.mmap, PAGE), child.exit()
        for ops_ in ops:
            attempt(mm.unregister_ops, ops_, at + 4 * PAGE, 3 * PAGE)
        attempt(mm.munmap, at + 3 * PAGE, 3 * PAGE)
    shim.failing_at(0, 0)
    spaces = [mm, *filter(None, children)]
    for space in spaces:
        _core.check_space(space)
    _core.check_memory(mem, spaces)
    for pfns in pins:
        if pfns is not None:
            mem.unpin(pfns)
    for space in spaces:
        space.exit()
    del files, huge, space, spaces, mm, children, child
    stats = mem.stats
    assert (stats["frames_used"], stats["swap_used"], stats["huge_pages_free"]) == (0, 0, 4), stats
    _core.check_memory(mem, [])


def device(begin, placement, translation, fork="revised"):
    """Transfers, registrations and what takes memory away from them, in two places; two processes, their children, two NICs."""
    mem = ioproc.PhysicalMemory(200, 64, 6)
    design = {"placement": placement, "translation": translation, "fork": fork, "prefault": 2, "bounce_bytes": 2 * PAGE}
    mm, peer = ioproc.AddressSpace(mem), ioproc.AddressSpace(mem)
    file, ops = ioproc.File(mem, 8 * PAGE), [ioproc.CountingOps() for _ in range(2)]
    for at in BASE, FAR:
        for space in mm, peer:
            space.mmap(8 * PAGE, 3, PRIVATE | ANONYMOUS, addr=at)
            space.mmap(8 * PAGE, 3, SHARED, addr=at + 8 * PAGE, file=file)
    for space in mm, peer:
        space.mmap(HUGE, 3, PRIVATE | ANONYMOUS | HUGETLB, addr=BASE + 2 * HUGE)
    begin()
    nics = [works(ioproc.Nic, 8, 2, page_shift=21, table_entries=70), works(ioproc.Nic, 32, None)]
    ctx, there = works(nics[0].attach, mm, **design), works(nics[1].attach, peer, **design)
    safe = translation != "pin-cache" and fork != "posted"
    spaces, registrations = [mm, peer], []

    def same(context, space, at):
        """The device finds what the process does."""
        for start, pages in (at, 5), (at + 6 * PAGE, 4):
            found, contents = works(context.rdma_read, start, pages * PAGE), works(space.read, start, pages * PAGE)
            assert not safe or found == contents

    def check():
        for space in spaces:
            works(_core.check_space, space)
        works(_core.check_memory, mem, spaces)
        for nic in nics:
            stats = nic.stats
            assert stats["hits"] + stats["misses"] == stats["lookups"]
            assert not safe or stats["violations"] == 0

    works(mm.register_ops, ops[0])                          # before the device's ops in the chain: to detach, it is made anew
    for context in ctx, there:
        works(context.access, BASE + 2 * HUGE, 100 * PAGE, write=True)
        if fork == "precopy":
            works(context.rdma_write, BASE + 2 * HUGE, b"copied")
    for at in BASE, FAR:
        works(ctx.rdma_write, at + 100, b"d" * 3 * PAGE)
        works(ctx.access, at + 5 * PAGE, 9 * PAGE, write=True)          # over two VMAs
        if translation != "bounce":
            registrations += [works(ctx.register, at + 2 * PAGE, 3 * PAGE), works(ctx.register, at + 4 * PAGE, 3 * PAGE, "r")]
        works(mm.register_ops, ops[1], at, 4 * PAGE)
        works(mm.mprotect, at + PAGE, 2 * PAGE, 1)
        same(ctx, mm, at)
        works(ctx.rdma_write_to, at, 3 * PAGE, there, BASE + PAGE), works(ctx.rdma_read_from, at + 4 * PAGE, PAGE, there, BASE)
        spaces.append(works(mm.fork))
        works(mm.write, at, b"p"), works(ctx.rdma_write, at + 4 * PAGE, b"e" * PAGE)
        works(mem.reclaim, 20)
        same(ctx, mm, at)
        works(mm.madvise, at + 7 * PAGE, PAGE, 4), works(file.punch_hole, 0, PAGE)
        works(mm.mremap, at + 3 * PAGE, PAGE, PAGE, 3, at + 40 * PAGE)
        works(mm.mmap, PAGE, 3, PRIVATE | ANONYMOUS, addr=at + 3 * PAGE)
        same(ctx, mm, at)
    for child in spaces[2:]:
        heir = nics[0].context(child) if fork == "inherit" else works(nics[0].attach, child, **design)
        works(heir.rdma_write, BASE + 4 * PAGE, b"h" * PAGE)
        same(heir, child, BASE), same(ctx, mm, BASE)
    check()
    child = works(mm.vfork)
    works(ctx.rdma_write, BASE, b"v"), works(child.exec)
    works(nics[0].attach, child, **design)
    child.exit()
    for registration in registrations[::2]:
        works(registration.deregister)
    works(ctx.detach)
    ctx = works(nics[0].attach, mm, **design)               # nothing of the first is left
    works(ctx.rdma_write, FAR + 3 * PAGE, b"again"), same(ctx, mm, FAR)
    check()
    shim.failing_at(0, 0)
    spaces.pop().exit()
    for nic in nics:
        nic.close()
    registrations = registration = None
    check()
    for nic in nics:
        stats = nic.stats
        assert stats["pinned"] == 0 and repr(nic) == "<ioproc.Nic: 0 translations of 0 processes>"
        assert stats["registrations"] - stats["deregistrations"] == stats["registrations"] * (translation == "bounce")
    for space in spaces:
        space.exit()
    file = None
    assert (mem.stats["frames_used"], mem.stats["swap_used"], mem.stats["huge_pages_free"]) == (0, 0, 6), mem.stats
    _core.check_memory(mem, [])


def caches(begin):
    """A translation cache and a registration cache on their own, and the hit curve."""
    begin()
    for ways in 4, None:
        cache = works(ioproc.TranslationCache, 64, ways)
        pages = [page * 7 % 50 for page in range(200)]
        works(cache.access, pages)
    works(ioproc.hit_curve, pages)
    registered = set()

    def register(start, length, access):
        registered.add((start, length))

    cache = ioproc.RegistrationCache(register, lambda start, length, handle: registered.remove((start, length)), max_regions=120)
    held = []
    for page in range(200):
        region = works(cache.get, BASE + page * 8 * PAGE, PAGE)
        held.append(region) if page % 10 == 0 else cache.put(region)
    works(cache.get, BASE, 400 * PAGE)
    works(cache.invalidate, BASE + 700 * PAGE, 300 * PAGE)
    assert {(start, length) for start, length, *_ in works(cache.regions)} <= registered
    assert len(registered) == cache.stats["registrations"] - cache.stats["deregistrations"]
    shim.failing_at(0, 0)
    for region in held:
        cache.put(region)
    cache.close()
    assert not registered


def each_allocation_fails(scenario, *arguments):
    scenario(lambda: None, *arguments)          # what is kept for good is there now
    for on in 0, 1:
        n, before = 0, -1
        while before != failures:
            n, before, live = n + 1, failures, shim.failing_live()
            scenario(lambda n=n, on=on: shim.failing_at(n, on), *arguments)
            shim.failing_at(0, 0)
            assert shim.failing_live() == live, f"leaked: {scenario.__name__}{arguments}, allocation {n}"


DESIGNS = [tuple(design.values()) for design in ioproc.DESIGNS.values()] + [
    ("mm", "fault", "inherit"), ("vma", "fault", "inherit"), ("interval", "fault", "inherit"), ("none", "bounce", "inherit"),
    ("mm", "preload-registered", "inherit"), ("vma", "pin-cache+hooks", "inherit"), ("interval", "pin-cache+hooks", "inherit"),
    ("mm", "fault", "precopy"), ("none", "pin-cache", "precopy"), ("vma", "pin-cache+hooks", "precopy")]

if __name__ == "__main__":
    match sys.argv[1]:
        case "vm":
            each_allocation_fails(vm)
        case "device":
            for design in DESIGNS:
                each_allocation_fails(device, *design)
        case "caches":
            each_allocation_fails(caches)
    assert failures > (40 if sys.argv[1] == "caches" else 1000), failures
