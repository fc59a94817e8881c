"""A NIC and its contexts: what each design does with a transfer, and what the oracle says about it."""
import gc
import itertools
import mmap
import sys
import threading
import time
import weakref

import pytest

import ioproc
from ioproc import DESIGNS, AddressSpace, Nic, Ops, PhysicalMemory, RemoteAccessError
from ioproc._core import check_memory, check_space, schedule

P, HUGE, BASE = 4096, 2 << 20, 0x10000000
RO, RW, NONE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE, 0
PRIVATE, SHARED, HUGETLB = 0x22, mmap.MAP_SHARED, 0x40000
UNSAFE = {"pin-cache", "mm+fault/posted"}
SAFE = [design for design in DESIGNS if design not in UNSAFE]
HOOKED = [design for design in SAFE if "+" in design]           # somebody tells the driver
FAULTING = [design for design in HOOKED if "pin" not in design]
alive = []
PINNING = ["pin", "pin-cache"] + [design for design in HOOKED if "pin" in design]


def process(pages=8, frames=512, swap_slots=64, prot=RW, **options):
    mm = AddressSpace(PhysicalMemory(frames, swap_slots, 8), **options)
    mm.mmap(pages * P, prot, addr=BASE)
    alive.append(mm)            # a context does not keep its process
    return mm


def attach(mm, design, nic=None, **options):
    return (nic or Nic()).attach(mm, **dict(DESIGNS[design], **options))


def refused(call, *arguments):
    """The completion's error: page and offset from BASE, cause, bytes before."""
    with pytest.raises(RemoteAccessError) as caught:
        call(*arguments)
    return caught.value.address - BASE, caught.value.cause, caught.value.completed


def whole(ctx):
    """Nothing is wrong with what the context did and holds."""
    stats = ctx.stats
    assert stats["violations"] == 0 and ctx.violations() == []
    assert stats["hits"] + stats["misses"] == stats["lookups"]
    assert stats["registrations"] >= stats["deregistrations"] and stats["registered_pages"] >= stats["deregistered_pages"]
    if ctx.mm is not None:
        check_space(ctx.mm)


@pytest.fixture(autouse=True)
def no_schedule():
    yield
    schedule("establish", None)
    alive.clear()


# ---- transfers

@pytest.mark.parametrize("design", DESIGNS)
def test_bytes_go_both_ways(design):
    mm = process()
    ctx = attach(mm, design)
    data = bytes(range(256)) * 48                       # three pages, over four
    ctx.rdma_write(BASE + 1000, data)
    assert mm.read(BASE + 1000, len(data)) == data
    mm.write(BASE + 5000, b"from the processor")
    assert ctx.rdma_read(BASE + 4990, 30) == mm.read(BASE + 4990, 30)
    assert ctx.rdma_read(BASE + 6 * P, P) == bytes(P)       # never touched
    ctx.access(BASE, 8 * P, write=True)
    stats = ctx.stats
    assert stats["transfers"] == 4 and stats["bytes"] == len(data) + 30 + P + 8 * P and stats["errors"] == 0
    whole(ctx)
    assert ctx.design == design


@pytest.mark.parametrize("design", SAFE)
def test_nothing_is_a_transfer_of_nothing(design):
    ctx = attach(process(), design)
    ctx.rdma_write(BASE, b"")
    assert ctx.rdma_read(BASE, 0) == b""
    ctx.access(1 << 40, 0)
    assert ctx.stats["transfers"] == ctx.stats["lookups"] == 0


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("prot", "write", "cause"), [
    (RO, True, "permission"), (NONE, True, "permission"), (NONE, False, "permission"), (None, False, "unmapped"),
    (None, True, "unmapped")])
def test_a_page_that_may_not_be_accessed_so_is_not(design, prot, write, cause):
    """The completion tells address and cause; bytes before it have gone if the design does not register first."""
    mm = process()
    mm.write(BASE, b"-" * 8 * P)
    ctx = attach(mm, design)
    if prot is None:
        mm.munmap(BASE + 2 * P, P)
    else:
        mm.mprotect(BASE + 2 * P, P, prot)
    address, why, completed = refused(ctx.rdma_write if write else ctx.rdma_read, BASE + 100, b"+" * 3 * P if write else 3 * P)
    assert (address, why) == (2 * P, cause)
    assert completed == (2 * P - 100 if design in FAULTING + ["mm+fault/posted", "bounce"] and "registered" not in design else 0)
    if prot == RO:
        assert ctx.rdma_read(BASE, 4 * P) == mm.read(BASE, 4 * P)
        assert mm.read(BASE + 2 * P, P) == b"-" * P
    assert mm.read(BASE + 100, completed) == (b"+" if write else b"-") * completed
    assert ctx.stats["errors"] == 1
    whole(ctx)


@pytest.mark.parametrize("design", SAFE)
def test_a_translation_loses_what_the_mapping_loses(design):
    """...whatever the device has done before."""
    mm = process()
    ctx = attach(mm, design)
    ctx.rdma_write(BASE, b"1" * 8 * P)
    mm.mprotect(BASE, P, RO)
    assert refused(ctx.rdma_write, BASE, b"2")[:2] == (0, "permission")
    assert ctx.rdma_read(BASE, 1) == b"1"
    mm.mprotect(BASE, P, NONE)
    assert refused(ctx.rdma_read, BASE, 1)[:2] == (0, "permission")
    mm.mprotect(BASE, P, RW)
    ctx.rdma_write(BASE, b"3")
    mm.munmap(BASE + P, P)
    assert refused(ctx.rdma_read, BASE + P, 1)[:2] == (P, "unmapped")
    mm.mmap(P, addr=BASE + P)
    assert ctx.rdma_read(BASE, 8 * P) == b"3" + b"1" * (P - 1) + bytes(P) + b"1" * 6 * P
    mm.madvise(BASE + 2 * P, P, mmap.MADV_DONTNEED)
    assert ctx.rdma_read(BASE + 2 * P, P) == bytes(P)
    mm.mremap(BASE + 4 * P, 2 * P, 2 * P, ioproc.MREMAP_MAYMOVE | ioproc.MREMAP_FIXED, BASE + 64 * P)
    assert refused(ctx.rdma_read, BASE + 4 * P, 1)[:2] == (4 * P, "unmapped")
    assert ctx.rdma_read(BASE + 64 * P, 2 * P) == b"1" * 2 * P
    whole(ctx)


@pytest.mark.parametrize("design", SAFE)
def test_beyond_the_end_of_a_file(design):
    mm = process()
    file = ioproc.File(mm.mem, 2 * P)
    mm.mmap(4 * P, RW, SHARED, file=file, addr=BASE + 16 * P)
    ctx = attach(mm, design)
    ctx.rdma_write(BASE + 16 * P, b"f" * 2 * P)
    assert refused(ctx.rdma_read, BASE + 18 * P, 1)[1] == "beyond the file"
    file.truncate(P)
    assert refused(ctx.rdma_read, BASE + 17 * P, 1)[1] == "beyond the file"
    assert ctx.rdma_read(BASE + 16 * P, P) == b"f" * P
    whole(ctx)


@pytest.mark.parametrize("design", DESIGNS)
def test_out_of_memory(design):
    """Nothing is held by a transfer that found no frame, and the next one works."""
    mm = process(pages=40, frames=20, swap_slots=0)
    ctx = attach(mm, design, bounce_bytes=4 * P)
    assert refused(ctx.rdma_write, BASE, b"x" * 40 * P)[1] == "out of memory"
    mm.madvise(BASE, 40 * P, mmap.MADV_DONTNEED)
    ctx.rdma_write(BASE, b"x" * 8 * P)
    mm.exit()
    ctx.detach()
    assert mm.mem.stats["frames_used"] == 0


@pytest.mark.parametrize("design", SAFE)
@pytest.mark.parametrize("kind", ["file", "shared", "private"])
def test_what_the_device_writes_is_never_lost(design, kind):
    """A page that only the device wrote to is not taken for clean: neither by reclaim nor by an unmap."""
    mm = process(frames=64)
    file = ioproc.File(mm.mem, 8 * P, memfd=kind == "shared")
    if kind == "private":
        mm.mmap(8 * P, RW, PRIVATE, addr=BASE + 64 * P)
    else:
        mm.mmap(8 * P, RW, SHARED, file=file, addr=BASE + 64 * P)
    ctx = attach(mm, design, bounce_bytes=4 * P)
    for turn in range(4):
        data = bytes([65 + turn]) * 8 * P
        mm.read(BASE + 64 * P, 8 * P)                       # clean entries
        assert ctx.rdma_read(BASE + 64 * P, 8 * P) == (bytes([64 + turn]) if turn else bytes(1)) * 8 * P
        ctx.rdma_write(BASE + 64 * P, data)
        mm.mem.reclaim(64)
        if kind != "private" and turn & 1:
            mm.munmap(BASE + 64 * P, 8 * P)
            mm.mem.reclaim(64)
            assert file.read(0, 8 * P) == data
            mm.mmap(8 * P, RW, SHARED, file=file, addr=BASE + 64 * P)
        assert mm.read(BASE + 64 * P, 8 * P) == data
        assert ctx.rdma_read(BASE + 64 * P, 8 * P) == data
    whole(ctx)


@pytest.mark.parametrize("design", SAFE)
def test_more_memory_than_frames(design):
    mm = process(pages=64, frames=24, swap_slots=256)
    ctx = attach(mm, design, bounce_bytes=2 * P)
    for page in range(64):
        ctx.rdma_write(BASE + page * P, bytes([page]) * P)
        if design.endswith("pin-cache+hooks"):              # what is pinned stays: give it up
            mm.mprotect(BASE, 64 * P, RO), mm.mprotect(BASE, 64 * P, RW)
    for page in range(64):
        assert ctx.rdma_read(BASE + page * P, 10) == bytes([page]) * 10
        if design.endswith("pin-cache+hooks"):
            mm.mprotect(BASE, 64 * P, RO), mm.mprotect(BASE, 64 * P, RW)
    assert mm.read(BASE, 64 * P) == b"".join(bytes([page]) * P for page in range(64))
    assert mm.mem.stats["swapped_out"] > 0
    whole(ctx)


@pytest.mark.parametrize("design", FAULTING)
def test_a_batch_larger_than_memory(design):
    """The pages that a fault loads ahead take the frame of the one that was asked for: the transfer ends all the same."""
    mm = process(pages=32, frames=4, swap_slots=64)
    ctx = attach(mm, design, prefault=16)
    ctx.rdma_write(BASE, b"y" * 32 * P)
    assert ctx.rdma_read(BASE, 32 * P) == b"y" * 32 * P
    whole(ctx)


@pytest.mark.parametrize("design", SAFE)
def test_device_memory(design):
    """One NIC reaches another device's memory by faults; it cannot be pinned."""
    mm = process()
    at = mm.mmap_device(2 * P, 0x100000, addr=BASE + 32 * P)
    mm.write(at, b"d" * 2 * P)
    ctx = attach(mm, design)
    if design in PINNING:
        assert refused(ctx.rdma_read, at, P)[1] == "permission"
    else:
        assert ctx.rdma_read(at, 2 * P) == b"d" * 2 * P
        ctx.rdma_write(at + P, b"e")
        assert mm.read(at + P, 2) == b"ed"
        mm.munmap(at, P)
        assert refused(ctx.rdma_read, at, 1)[1] == "unmapped"
    whole(ctx)


# ---- what a design costs

def test_a_fault_loads_and_what_is_loaded_is_found():
    ctx = attach(process(), "mm+fault", Nic(entries=4, ways=4))
    ctx.access(BASE, 8 * P)
    ctx.access(BASE, 8 * P)                                 # 8 of 4: never in the cache, always in NIC memory
    ctx.access(BASE + 7 * P, 1)
    stats = ctx.stats
    assert (stats["lookups"], stats["hits"], stats["misses"], stats["walks"]) == (17, 1, 16, 8)
    assert (stats["faults"], stats["loaded"], stats["prefaulted"]) == (8, 8, 0)


@pytest.mark.parametrize("design", ["mm+fault", "interval+fault"])
def test_a_fault_loads_a_batch(design):
    """Of pages that follow, as far as the mapping goes and, with interval notifiers, the buffer."""
    ctx = attach(process(pages=10), design, prefault=4)
    ctx.access(BASE, 10 * P)
    stats = ctx.stats
    assert (stats["faults"], stats["loaded"], stats["prefaulted"]) == (3, 10, 7)
    whole(ctx)


@pytest.mark.parametrize("design", ["mm+preload", "vma+preload"])
def test_update_hooks_load_before_the_first_transfer(design):
    mm = process()
    ctx = attach(mm, design)
    ctx.access(BASE, 8 * P, write=True)                     # the VMA takes part from now on
    mm.madvise(BASE, 8 * P, mmap.MADV_DONTNEED)
    before = ctx.stats
    mm.write(BASE, b"x" * 8 * P)
    ctx.access(BASE, 8 * P, write=True)
    after = ctx.stats
    assert after["faults"] == before["faults"] and after["preloaded"] - before["preloaded"] == 8
    assert after["useful"] - before["useful"] == 8          # each was used
    ctx.access(BASE, 8 * P)
    assert ctx.stats["useful"] == after["useful"]           # once
    whole(ctx)


@pytest.mark.parametrize("design", ["mm+preload-registered", "pin-cache", "mm+pin-cache+hooks"])
def test_a_registered_buffer_never_faults(design):
    ctx = attach(process(), design)
    for _ in range(3):
        ctx.access(BASE, 8 * P, write=True)
    stats = ctx.stats
    assert (stats["faults"], stats["registrations"], stats["registered_pages"], stats["preloaded"]) == (0, 1, 8, 8)
    assert (stats["regcache_misses"], stats["regcache_hits"]) == (1, 2)
    assert stats["pinned"] == stats["pinned_peak"] == (8 if "pin" in design else 0)


def test_pin_registers_each_transfer():
    ctx = attach(process(), "pin")
    for _ in range(3):
        ctx.access(BASE, 2 * P)
    stats = ctx.stats
    assert (stats["registrations"], stats["deregistrations"], stats["registered_pages"]) == (3, 3, 6)
    assert (stats["pinned"], stats["pinned_peak"], stats["faults"]) == (0, 2, 0)


def test_bounce_copies():
    mm = process()
    ctx = attach(mm, "bounce", bounce_bytes=2 * P)
    ctx.rdma_write(BASE + 10, b"b" * 5 * P)
    stats = ctx.stats
    assert stats["copied_bytes"] == 5 * P and stats["pinned"] == 2 and stats["registrations"] == 1 and stats["callbacks"] == 0
    assert mm.read(BASE + 10, 5 * P) == b"b" * 5 * P
    ctx.detach()
    assert ctx.stats["pinned"] == 0


def test_the_limits_of_the_registration_cache():
    for limit in ({"max_regions": 2}, {"max_bytes": 2 * P}):
        ctx = attach(process(pages=32), "mm+pin-cache+hooks", **limit)
        for page in range(0, 16, 2):                        # apart: nothing merges
            ctx.access(BASE + page * P, P)
        assert ctx.stats["pinned"] == ctx.stats["pinned_peak"] - 1 == 2
        assert ctx.stats["deregistrations"] == 6


def test_the_limit_of_nic_memory():
    nic = Nic(table_entries=5)
    first, second = attach(process(), "mm+fault", nic), attach(process(), "pin-cache", nic)
    for _ in range(3):
        first.access(BASE, 8 * P, write=True)
        second.access(BASE, 8 * P, write=True)
    assert repr(nic).startswith("<ioproc.Nic: 5 translations of 2 processes")
    assert first.stats["evicted"] + second.stats["evicted"] == nic.stats["evicted"] > 30
    whole(first), whole(second)


@pytest.mark.parametrize("design", SAFE)
@pytest.mark.parametrize("shift", [12, 21])
def test_huge_pages(design, shift):
    mm = process(frames=2048)
    at = mm.mmap(2 * HUGE, RW, PRIVATE | HUGETLB)
    ctx = attach(mm, design, Nic(page_shift=shift))
    data = bytes(range(256)) * 32
    ctx.rdma_write(at + HUGE - 3000, data)
    assert mm.read(at + HUGE - 3000, len(data)) == ctx.rdma_read(at + HUGE - 3000, len(data)) == data
    mm.mprotect(at, HUGE, RO)
    with pytest.raises(RemoteAccessError, match="permission"):
        ctx.rdma_write(at, b"no")
    assert ctx.rdma_read(at + HUGE - 3000, len(data)) == data
    mm.mprotect(at, HUGE, RW)
    ctx.rdma_write(at + 5, b"parent")
    child = mm.fork()
    mm.write(at + 5, b"copied")
    assert ctx.rdma_read(at + 5, 6) == b"copied" and child.read(at + 5, 6) == b"parent"
    ctx.rdma_write(at + 5, b"device")
    assert mm.read(at + 5, 6) == b"device" and child.read(at + 5, 6) == b"parent"
    mm.munmap(at, HUGE)
    with pytest.raises(RemoteAccessError, match="unmapped"):
        ctx.rdma_read(at, 1)
    assert ctx.rdma_read(at + HUGE, 5) == data[3000:3005]
    whole(ctx)
    child.exit(), mm.exit()
    assert mm.mem.stats["huge_pages_free"] == 8


@pytest.mark.parametrize("design", HOOKED)
@pytest.mark.parametrize("shift", [12, 21])
def test_huge_pages_are_read_only_after_any_mprotect(design, shift):
    """Also after one that leaves them writable: entries of private ones wait for a write fault, and fork has none to tell of."""
    mm = process()
    mm.mmap(HUGE, RW, PRIVATE | HUGETLB, addr=8 * HUGE)
    mm.write(8 * HUGE, b"old")
    ctx = attach(mm, design, Nic(page_shift=shift))
    ctx.access(8 * HUGE, P, write=True)
    mm.mprotect(8 * HUGE, HUGE, RW | mmap.PROT_EXEC)
    child = mm.fork()
    ctx.rdma_write(8 * HUGE, b"new")
    assert child.read(8 * HUGE, 3) == b"old" and mm.read(8 * HUGE, 3) == b"new"
    whole(ctx)


@pytest.mark.parametrize("design", ["mm+pin-cache+hooks", "vma+preload-registered"])
def test_a_hook_that_raises_while_a_child_inherits(design):
    """What the child registers takes pages of another process, whose hook raises: fork tells, and nobody after it."""
    mem = PhysicalMemory(40, 64)
    other, mm = AddressSpace(mem), AddressSpace(mem)
    for space, pages in (other, 24), (mm, 16):
        space.mmap(pages * P, addr=BASE)
        space.touch(BASE, pages * P, write=True)
    attach(mm, design, fork="inherit").register(BASE, 16 * P)

    def refuse(*_):
        raise ValueError("refused")

    other.register_ops(Ops(invalidate_page=refuse))
    with pytest.raises(ValueError, match="refused"):
        mm.fork()
    AddressSpace(mem).mmap(P)


def test_memory_that_another_process_has_taken_over():
    """After vfork and exec of the parent."""
    mm = process()
    ctx = attach(mm, "mm+fault")
    child = mm.vfork()
    assert ctx.mm is mm
    mm.exec()
    assert ctx.mm is child is not mm and ctx.nic.context(child) is ctx and ctx.attached
    ctx.rdma_write(BASE, b"x")
    assert child.read(BASE, 1) == b"x"
    gone = weakref.ref(ctx)
    ctx.detach()
    del ctx
    assert gone() is None and child.read(BASE, 1) == b"x"
    child.exit()


def test_one_entry_for_a_huge_page():
    for shift, misses in (12, 512), (21, 1):
        mm = process(frames=2048)
        at = mm.mmap(HUGE, RW, PRIVATE | HUGETLB)
        ctx = attach(mm, "mm+fault", Nic(page_shift=shift))
        ctx.access(at, HUGE, write=True)
        assert ctx.stats["misses"] == ctx.stats["faults"] == misses
        ctx.access(BASE, P)                                 # beside it, small ones
        assert ctx.stats["misses"] == misses + 1
        mm.munmap(at, HUGE)
        assert ctx.stats["invalidated"] == misses


@pytest.mark.parametrize("translation", ["fault", "preload-registered", "pin-cache+hooks"])
def test_with_a_chain_on_vmas_only_what_communicates_is_told_of(translation):
    mm = process(pages=16)
    ctx = attach(mm, "vma+" + translation)
    mm.munmap(BASE + 15 * P, P)
    assert ctx.stats["callbacks"] == ctx.stats["attachments"] == 0
    ctx.access(BASE + 4 * P + 100, 2 * P)                   # three pages
    assert [(vma.start - BASE, vma.end - BASE) for vma in mm.vmas()] == [(0, 4 * P), (4 * P, 7 * P), (7 * P, 15 * P)]
    assert ctx.stats["attachments"] == 1
    mm.munmap(BASE + 14 * P, P)
    assert ctx.stats["callbacks"] == 0
    mm.munmap(BASE + 5 * P, P)
    assert ctx.stats["callbacks"] == ctx.stats["shootdowns"] == 1
    ctx.detach()
    assert [(vma.start - BASE, vma.end - BASE) for vma in mm.vmas()] == [(0, 5 * P), (6 * P, 14 * P)]


# ---- registrations

@pytest.mark.parametrize("design", [design for design in DESIGNS if design != "bounce"])
def test_a_registration(design):
    mm = process()
    ctx = attach(mm, design)
    with ctx.register(BASE + 100, 2 * P) as registration:
        assert (registration.start, registration.end) == (BASE, BASE + 3 * P)
        assert ctx.stats["registrations"] == 1 and ctx.stats["registered_pages"] == 3
        assert ctx.stats["pinned"] == (3 if design in PINNING else 0)
        ctx.rdma_write(BASE, b"r" * 3 * P)
    with pytest.raises(ValueError, match="not registered"):
        registration.deregister()
    mm.mprotect(BASE, P, RO)
    if design != "pin-cache" and "preload-registered" not in design:        # whose cache nobody tells, or that does not pin
        assert refused(ctx.register, BASE, 2 * P)[:2] == (0, "permission")
    ctx.register(BASE, 2 * P, "r").deregister()
    mm.munmap(BASE + 7 * P, P)
    before = ctx.stats
    assert refused(ctx.register, BASE + 6 * P, 2 * P) == (7 * P, "unmapped", 0)
    after = ctx.stats
    for count in "registrations", "registered_pages", "deregistrations", "pinned", "transfers":
        assert after[count] == before[count]
    ctx.detach()
    assert ctx.stats["pinned"] == 0 and ctx.stats["registrations"] == ctx.stats["deregistrations"]


@pytest.mark.parametrize("design", ["mm+fault", "pin", "pin-cache", "interval+pin-cache+hooks", "mm+preload-registered"])
def test_a_registration_outlives_what_it_is_of(design):
    """The context may be detached, the process may end, in between: what was pinned is let go of all the same."""
    for end in "detach", "exit", "close":
        mm = process()
        nic = Nic()
        ctx = attach(mm, design, nic)
        registration = ctx.register(BASE, 4 * P)
        {"detach": ctx.detach, "exit": mm.exit, "close": nic.close}[end]()
        assert refused(ctx.register, BASE, P)[1] == "detached" and refused(ctx.rdma_read, BASE, P)[1] == "detached"
        registration.deregister()
        assert nic.stats["pinned"] == 0
        mm.exit()
        assert mm.mem.stats["frames_used"] == 0


def test_registrations_that_are_none():
    ctx = attach(process(), "pin")
    for arguments in [(BASE, 0), (BASE, P, "w"), (1 << 47, P), (BASE, 1 << 47), (-1, P), (BASE, -1)]:
        with pytest.raises((ValueError, OverflowError)):
            ctx.register(*arguments)
    with pytest.raises(ValueError, match="bounce"):
        attach(process(), "bounce").register(BASE, P)
    with pytest.raises(TypeError):
        ioproc.Registration()
    assert ctx.stats["registrations"] == 0


# ---- RDMA between processes

@pytest.mark.parametrize("design", SAFE)
@pytest.mark.parametrize("nics", [1, 2])
def test_from_one_process_to_another(design, nics):
    """Of one memory or of two, by one NIC or two; more than a packet."""
    a, b = process(pages=64), process(pages=64)
    nic = Nic()
    here, there = attach(a, design, nic), attach(b, "mm+fault", nic if nics == 1 else None)
    data = bytes(range(251)) * 700
    a.write(BASE + 77, data)
    here.rdma_write_to(BASE + 77, len(data), there, BASE + 3 * P + 5)
    assert b.read(BASE + 3 * P + 5, len(data)) == data
    b.write(BASE, b"back")
    here.rdma_read_from(BASE + 9, 4, there, BASE)
    assert a.read(BASE + 9, 4) == b"back"
    here.rdma_write_to(BASE + 9, 4, here, BASE + 60 * P)    # to itself
    assert a.read(BASE + 60 * P, 4) == b"back"
    whole(here), whole(there)


@pytest.mark.parametrize("out", [True, False])
def test_the_side_that_fails_is_told_of(out):
    a, b = process(), process(pages=4)
    here, there = attach(a, "mm+fault"), attach(b, "mm+fault")
    move = here.rdma_write_to if out else here.rdma_read_from
    assert refused(move, BASE, 6 * P, there, BASE) == (4 * P, "unmapped", 4 * P)        # theirs
    a.munmap(BASE + 2 * P, P)
    assert refused(move, BASE, 4 * P, there, BASE) == (2 * P, "unmapped", 2 * P)        # ours
    there.detach()
    assert refused(move, BASE, P, there, BASE) == (0, "detached", 0)
    with pytest.raises(TypeError):
        move(BASE, P, None, BASE)


# ---- fork

@pytest.mark.parametrize(("design", "way"), [(design, way) for design in SAFE for way in ("revised", "inherit", "precopy")
                                             if way != "precopy" or not design.startswith("interval")])
def test_after_fork_the_device_is_of_the_parent(design, way):
    mm = process()
    if design.startswith("interval") and way == "precopy":
        with pytest.raises(ValueError, match="nothing is left to copy"):
            attach(mm, design, fork=way)
        return
    ctx = attach(mm, design, fork=way, bounce_bytes=2 * P)
    ctx.rdma_write(BASE, b"1" * 4 * P)
    child = mm.fork()
    ctx.rdma_write(BASE, b"2")
    mm.write(BASE + P, b"3")
    child.write(BASE + 2 * P, b"4")
    assert ctx.rdma_read(BASE, 4 * P) == mm.read(BASE, 4 * P) == b"2" + b"1" * (P - 1) + b"3" + b"1" * (3 * P - 1)
    assert child.read(BASE, 4 * P) == b"1" * 2 * P + b"4" + b"1" * (2 * P - 1)
    whole(ctx)
    check_memory(mm.mem, [mm, child])


@pytest.mark.parametrize("design", SAFE)
def test_a_child_inherits(design):
    """Attached the same way, with its parent's registrations, to memory of its own."""
    mm, nic = process(), Nic()
    ctx = attach(mm, design, nic, fork="inherit", bounce_bytes=2 * P)
    ctx.rdma_write(BASE, b"p" * 4 * P)
    child = mm.fork()
    heir = nic.context(child)
    assert heir.design == ctx.design and heir is not ctx and heir.mm is child
    stats = heir.stats
    cached = "pin-cache" in design or "registered" in design
    assert stats["registered_pages"] - stats["deregistered_pages"] == (4 if cached else 2 if design == "bounce" else 0)
    heir.rdma_write(BASE, b"c")
    assert mm.read(BASE, 2) == b"pp" and child.read(BASE, 2) == b"cp"
    grandchild = child.fork()
    assert nic.context(grandchild).rdma_read(BASE, 2) == b"cp"
    whole(ctx), whole(heir)
    for each in child, mm, grandchild:
        each.exit()
    assert mm.mem.stats["frames_used"] == 0 and nic.stats["pinned"] == 0


def test_inherited_vmas_that_merge_where_the_parents_do_not():
    """The parent's neighbours differ in another device's chain."""
    mm, nic, other = process(), Nic(), Ops()
    ctx = attach(mm, "vma+fault", nic, fork="inherit")
    mm.register_ops(other, BASE + 2 * P, 2 * P)
    ctx.access(BASE, 6 * P)
    assert len(mm.vmas()) == 4
    child = mm.fork()
    assert [(vma.start - BASE, vma.end - BASE) for vma in child.vmas()] == [(0, 6 * P), (6 * P, 8 * P)]
    nic.context(child).access(BASE, 6 * P, write=True)
    assert nic.context(child).stats["attachments"] == 0     # by fork, not by a fault
    check_space(child)


@pytest.mark.parametrize("design", ["mm+fault", "pin-cache", "mm+pin-cache+hooks", "mm+preload-registered"])
def test_precopied_pages_stay_the_parents(design):
    mm = process()
    ctx = attach(mm, design, fork="precopy")
    ctx.rdma_write(BASE, b"1" * 4 * P)
    mm.write(BASE + 4 * P, b"2" * 4 * P)                    # which the device has not
    before, rows = ctx.stats, mm.pagemap(BASE, 8 * P)
    child = mm.fork()
    assert ctx.stats["precopied"] == 4
    assert mm.pagemap(BASE, 4 * P)["pfn"].tolist() == rows["pfn"][:4].tolist()
    assert mm.pagemap(BASE, 8 * P)["writable"].tolist() == [True] * 4 + [False] * 4
    assert child.pagemap(BASE, 8 * P)["shared"].tolist() == [False] * 4 + [True] * 4
    ctx.rdma_write(BASE, b"3" * 4 * P)
    assert ctx.stats["faults"] == before["faults"] and ctx.stats["registrations"] == before["registrations"]
    assert child.read(BASE, 8 * P) == b"1" * 4 * P + b"2" * 4 * P
    whole(ctx)
    check_memory(mm.mem, [mm, child])


@pytest.mark.parametrize("shift", [12, 21])
@pytest.mark.parametrize("design", ["mm+fault", "pin-cache", "mm+pin-cache+hooks"])
def test_precopied_huge_pages(design, shift):
    mm = process(swap_slots=0)
    mm.mmap(2 * HUGE, flags=PRIVATE | HUGETLB, addr=8 * HUGE)
    ctx = attach(mm, design, Nic(page_shift=shift), fork="precopy")
    ctx.rdma_write(8 * HUGE + 5 * P, b"1" * P)              # of the second the device has nothing
    mm.write(9 * HUGE, b"2")
    child = mm.fork()
    assert ctx.stats["precopied"] == 512 and child.stats["rss_pages"] == 0
    assert [mm.pagemap(at, P)["writable"][0] for at in (8 * HUGE, 9 * HUGE)] == [True, False]
    assert [child.pagemap(at, P)["shared"][0] for at in (8 * HUGE, 9 * HUGE)] == [False, True]
    ctx.rdma_write(8 * HUGE + 5 * P, b"3" * P)
    assert child.read(8 * HUGE + 5 * P, P) == b"1" * P and mm.read(8 * HUGE + 5 * P, P) == b"3" * P
    child.write(8 * HUGE, b"c")                             # its own
    assert child.stats["faults_cow"] == 0 and mm.read(8 * HUGE, 1) == b"\0"
    whole(ctx)
    check_memory(mm.mem, [mm, child])


def test_a_fork_that_finds_no_huge_page_for_the_copies():
    mm = process(swap_slots=0)
    mm.mmap(6 * HUGE, flags=PRIVATE | HUGETLB, addr=8 * HUGE)
    ctx = attach(mm, "mm+fault", fork="precopy")
    ctx.rdma_write(8 * HUGE, b"1" * 6 * HUGE)
    free = mm.mem.stats["huge_pages_free"]
    with pytest.raises(MemoryError):
        mm.fork()
    assert mm.mem.stats["huge_pages_free"] == free == 2
    ctx.rdma_write(8 * HUGE, b"2" * 6 * HUGE)
    whole(ctx)
    check_memory(mm.mem, [mm])


@pytest.mark.parametrize(("design", "limit"), [("mm+fault", {}), ("mm+pin-cache+hooks", {"max_regions": 4})])
def test_a_fork_that_makes_room_for_the_copies(design, limit):
    """What is pinned stays; of the rest, also a page that was to be copied itself may go to swap."""
    mm = process(pages=16, frames=20)
    ctx = attach(mm, design, fork="precopy", **limit)
    for page in range(16):
        ctx.rdma_write(BASE + page * P, bytes([page + 1]) * P)
    ctx.rdma_write(BASE, b"r" * 4 * P)
    before = mm.mem.stats["swapped_out"]
    child = mm.fork()
    assert mm.mem.stats["swapped_out"] > before and ctx.stats["precopied"] >= 4
    for page in range(16):
        assert child.read(BASE + page * P, P) == (b"r" if page < 4 else bytes([page + 1])) * P
    for page in range(16):
        ctx.rdma_write(BASE + page * P, b"w" * P)
    assert mm.read(BASE, 16 * P) == b"w" * 16 * P and child.read(BASE, 4 * P) == b"r" * 4 * P
    whole(ctx)
    check_memory(mm.mem, [mm, child])


def test_a_fork_that_finds_no_frame_for_the_copies():
    mm = process(frames=20, swap_slots=0)
    ctx = attach(mm, "mm+fault", fork="precopy")
    ctx.rdma_write(BASE, b"1" * 8 * P)
    mm.mmap(8 * P, addr=BASE + 16 * P)
    mm.write(BASE + 16 * P, b"2" * 6 * P)
    used = mm.mem.stats["frames_used"]
    with pytest.raises(MemoryError):
        mm.fork()
    assert mm.mem.stats["frames_used"] == used
    ctx.rdma_write(BASE, b"3" * 8 * P)
    assert mm.read(BASE, 8 * P) == b"3" * 8 * P
    whole(ctx)
    check_memory(mm.mem, [mm])


# ---- the oracle

def test_pin_cache_is_caught_when_memory_is_mapped_again():
    mm = process()
    ctx = attach(mm, "pin-cache")
    ctx.rdma_write(BASE, b"1")
    mm.munmap(BASE, P), mm.mmap(P, addr=BASE)
    mm.write(BASE, b"2")
    assert ctx.rdma_read(BASE, 1) == b"1"                   # of the page that is no more
    ctx.rdma_write(BASE, b"3")
    assert mm.read(BASE, 1) == b"2"
    assert ctx.stats["violations"] == ctx.stats["violations_frame"] == 2
    read, write = ctx.violations()
    assert (read.address, read.write, read.kind, read.design) == (BASE, False, "frame", "pin-cache") and write.write


def test_pin_cache_is_caught_after_fork_and_write():
    mm = process()
    ctx = attach(mm, "pin-cache")
    ctx.rdma_write(BASE, b"1")
    child = mm.fork()
    mm.write(BASE, b"2")                                    # pinned and shared: the parent gets a copy
    ctx.rdma_write(BASE, b"3")
    assert mm.read(BASE, 1) == b"2" and child.read(BASE, 1) == b"3"
    assert ctx.stats["violations_frame"] == 1


def test_pin_cache_is_caught_on_mprotect_cycles():
    mm = process()
    ctx = attach(mm, "pin-cache")
    ctx.rdma_write(BASE, b"1")
    mm.mprotect(BASE, P, RO)
    ctx.rdma_write(BASE, b"2")                              # into memory that the process protects
    assert ctx.stats["violations"] == ctx.stats["violations_permission"] == 1
    mm.mprotect(BASE, P, NONE)
    ctx.rdma_read(BASE, 1)
    assert ctx.stats["violations_permission"] == 2
    mm.mprotect(BASE, P, RW)
    ctx.rdma_write(BASE, b"3")
    assert ctx.stats["violations"] == 2 and mm.read(BASE, 1) == b"3"


@pytest.mark.parametrize("placement", ["mm", "vma"])
@pytest.mark.parametrize("translation", ["fault", "preload", "preload-registered"])
def test_the_posted_patch_is_caught_on_fork(placement, translation):
    mm = process()
    ctx = attach(mm, f"{placement}+{translation}", fork="posted")
    ctx.rdma_write(BASE, b"1")
    child = mm.fork()
    assert ctx.rdma_read(BASE, 1) == b"1" and ctx.stats["violations"] == 0
    ctx.rdma_write(BASE, b"2")
    assert child.read(BASE, 1) == b"2"                      # the child's memory, too
    assert ctx.stats["violations"] == ctx.stats["violations_permission"] == 1
    assert ctx.violations()[0].design == f"{placement}+{translation}/posted"


def test_a_nic_notes_the_first_and_counts_all():
    mm, nic = process(), Nic()
    ctx = attach(mm, "pin-cache", nic)
    ctx.access(BASE, 8 * P)
    mm.munmap(BASE, 8 * P)
    for _ in range(50):
        ctx.access(BASE, 8 * P)
    assert ctx.stats["violations"] == nic.stats["violations"] == 400
    assert len(ctx.violations()) == len(nic.violations()) == 256


# ---- attaching and detaching

@pytest.mark.parametrize("design", DESIGNS)
def test_close_in_any_order(design):
    steps = {"detach": lambda world: world["ctx"].detach(), "close": lambda world: world["nic"].close(),
             "exit": lambda world: world["mm"].exit(), "child": lambda world: world["child"].exit(),
             "deregister": lambda world: world["registration"] and world["registration"].deregister(),
             "drop": lambda world: world.update(ctx=world["ctx"] if "exit" in world else world["ctx"], held=None)}
    for order in itertools.permutations([step for step in steps if step != "drop"]):
        mm, nic = process(frames=64), Nic()
        ctx = attach(mm, design, nic, fork="inherit", bounce_bytes=P)
        ctx.rdma_write(BASE, b"x" * 3 * P)
        world = {"mm": mm, "nic": nic, "ctx": ctx, "child": mm.fork(),
                 "registration": None if design == "bounce" else ctx.register(BASE, P)}
        for step in order:
            steps[step](world)
        assert nic.stats["pinned"] == 0 and mm.mem.stats["frames_used"] == 0 and "0 translations of 0 " in repr(nic)


@pytest.mark.parametrize("design", DESIGNS)
def test_objects_may_go_in_any_order(design):
    for order in itertools.permutations(["mm", "nic", "ctx", "registration"]):
        mm, nic = process(frames=64), Nic()
        ctx = attach(mm, design, nic, bounce_bytes=P)
        ctx.rdma_write(BASE, b"x" * 3 * P)
        held = {"mm": mm, "nic": nic, "ctx": ctx, "registration": None if design == "bounce" else ctx.register(BASE, P)}
        mem = mm.mem
        del mm, nic, ctx
        alive.clear()
        for name in order:
            del held[name]
        gc.collect()
        assert mem.stats["frames_used"] == 0


def test_one_context_of_a_process_on_a_nic():
    mm, nic = process(), Nic()
    first = attach(mm, "mm+fault", nic)
    with pytest.raises(ValueError, match="attached to this NIC already"):
        attach(mm, "pin", nic)
    assert nic.context(mm) is first and first.attached and first.nic is nic and first.mm is mm
    first.detach()
    assert not first.attached
    with pytest.raises(KeyError):
        nic.context(mm)
    second = attach(mm, "pin", nic)
    first.detach()                                          # again: nothing to do with the second
    assert nic.context(mm) is second and second.attached
    nic.close()
    assert not second.attached


def test_two_nics_on_a_process():
    mm = process()
    one, two = attach(mm, "mm+fault"), attach(mm, "interval+pin-cache+hooks")
    one.rdma_write(BASE, b"1" * 4 * P)
    assert two.rdma_read(BASE, 4 * P) == b"1" * 4 * P
    mm.munmap(BASE, 2 * P)
    assert one.stats["shootdowns"] == two.stats["shootdowns"] == 1
    two.detach()
    assert one.rdma_read(BASE + 2 * P, P) == b"1" * P
    whole(one), whole(two)


def test_what_a_nic_must_be():
    for options in [{"entries": 0}, {"entries": -1}, {"entries": 10, "ways": 3}, {"ways": 0}, {"page_shift": 13},
                    {"table_entries": 0}, {"policy": "mru"}, {"table_entries": 1 << 32}, {"entries": 1 << 60}]:
        with pytest.raises((ValueError, OverflowError, MemoryError)) as caught:
            Nic(**options)
        assert str(caught.value)


@pytest.mark.parametrize("options", [{"placement": "nowhere"}, {"translation": "magic"}, {"fork": "spoon"}, {"prefault": 0},
                                     {"prefault": 2049}, {"bounce_bytes": 0}, {"bounce_bytes": 1 << 40}, {"max_regions": -1}])
def test_what_an_attachment_must_be(options):
    mm, nic = process(), Nic()
    with pytest.raises((ValueError, OverflowError)) as caught:
        nic.attach(mm, **options)
    assert next(iter(options)) in str(caught.value)
    assert nic.attach(mm).attached


def test_combinations_that_make_no_sense_are_refused_with_the_reason():
    allowed = {tuple(sorted(design.items())) for design in DESIGNS.values() if "fork" not in design}
    assert len(allowed) == 14
    for placement in "none", "mm", "vma", "interval":
        for translation in "fault", "preload", "preload-registered", "pin", "pin-cache", "pin-cache+hooks", "bounce":
            if (("placement", placement), ("translation", translation)) in allowed:
                Nic().attach(process(), placement, translation)
            else:
                with pytest.raises(ValueError, match=f"placement = '{placement}' with translation = .*: .{{20}}"):
                    Nic().attach(process(), placement, translation)


@pytest.mark.parametrize("fork", ["posted", "precopy"])
def test_interval_notifiers_know_no_other_fork(fork):
    with pytest.raises(ValueError, match=f"fork = '{fork}' with placement = 'interval': .{{20}}"):
        Nic().attach(process(), "interval", fork=fork)


@pytest.mark.parametrize("design", SAFE)
def test_ranges_that_are_none(design):
    ctx = attach(process(), design)
    for addr, length in [(-1, 1), (0, -1), (1 << 47, 1), (0, (1 << 47) + 1), (1 << 64, 1), ((1 << 64) - 1, 1)]:
        for call in ctx.access, ctx.rdma_read:
            with pytest.raises((ValueError, OverflowError)):
                call(addr, length)
    assert refused(ctx.access, 1 << 40, 1 << 46)[1] == "unmapped"
    assert ctx.stats["transfers"] == 1 and ctx.stats["pinned"] == (256 if design == "bounce" else 0)


def test_a_bounce_buffer_makes_room_for_itself():
    mm = process(pages=30, frames=32)
    mm.write(BASE, b"x" * 30 * P)
    ctx = attach(mm, "bounce", bounce_bytes=16 * P)
    assert mm.mem.stats["swapped_out"] >= 14 and ctx.stats["pinned"] == 16
    assert ctx.rdma_read(BASE, 30 * P) == b"x" * 30 * P
    whole(ctx)
    check_memory(mm.mem, [mm])


def test_no_memory_for_a_bounce_buffer():
    """Nothing is left of it: no frame, no translation."""
    mm, nic = process(frames=16), Nic(table_entries=32)
    for _ in range(3):
        with pytest.raises(MemoryError):
            nic.attach(mm, "none", "bounce")
    assert mm.mem.stats["frames_used"] == 0 and "0 translations" in repr(nic)
    assert nic.stats["registrations"] == nic.stats["pinned"] == 0
    other = attach(process(pages=64), "mm+fault", nic)
    other.access(BASE, 64 * P)                              # takes every place in NIC memory
    assert other.stats["evicted"] == 32


@pytest.mark.parametrize("design", ["interval+fault", "interval+preload-registered"])
def test_detached_while_its_driver_loads(design):
    """What is loaded for a context that is no more would stay in NIC memory for ever."""
    mm, nic = process(), Nic(table_entries=4)
    ctx = attach(mm, design, nic)

    schedule("establish", ctx.detach)
    assert refused(ctx.rdma_read, BASE, P)[1] == "detached"
    assert "0 translations" in repr(nic)
    del ctx
    gc.collect()
    attach(mm, "mm+fault", nic).access(BASE, 8 * P)


@pytest.mark.parametrize("design", SAFE)
def test_detached_during_a_transfer(design):
    mm, nic = process(pages=64), Nic()
    failed = []
    for _ in range(20):
        ctx = attach(mm, design, nic, bounce_bytes=P)
        started = threading.Event()

        def transfers(ctx=ctx, started=started):
            try:
                while True:
                    ctx.rdma_write(BASE, b"t" * 64 * P)
                    started.set()
            except RemoteAccessError as error:
                failed.append(error.cause)

        thread = threading.Thread(target=transfers)
        thread.start()
        started.wait(60)
        ctx.detach()
        thread.join(60)
        assert not thread.is_alive()
    assert failed == ["detached"] * 20 and nic.stats["pinned"] == 0 and nic.stats["violations"] == 0


def test_nothing_of_it_in_a_callback():
    mm, nic = process(), Nic()
    ctx = attach(mm, "mm+fault", nic)
    other = process()
    errors = []

    def call(*_):
        for each in (lambda: nic.attach(other), ctx.detach, nic.close, lambda: ctx.rdma_read(BASE, 1),
                     lambda: ctx.register(BASE, P), lambda: ctx.rdma_write_to(BASE, 1, ctx, BASE), lambda: ctx.access(BASE, 1)):
            try:
                each()
            except RuntimeError as error:
                errors.append(error)

    mm.register_ops(Ops(invalidate_range=call))
    mm.munmap(BASE, P)
    assert len(errors) == 7 and ctx.attached and ctx.stats["transfers"] == 0


@pytest.mark.parametrize("design", DESIGNS)
def test_exec_ends_the_attachment(design):
    mm, nic = process(), Nic()
    ctx = attach(mm, design, nic, bounce_bytes=P)
    ctx.rdma_write(BASE, b"x" * 4 * P)
    mm.exec()
    assert not ctx.attached and refused(ctx.rdma_read, BASE, 1)[1] == "detached"
    assert mm.mem.stats["frames_used"] == nic.stats["pinned"] == 0
    again = attach(mm, design, nic)
    mm.mmap(P, addr=BASE)
    again.rdma_write(BASE, b"new")
    assert mm.read(BASE, 3) == b"new"


@pytest.mark.parametrize("design", SAFE)
def test_a_child_of_vfork_shares_the_attachment(design):
    mm, nic = process(), Nic()
    ctx = attach(mm, design, nic)
    child = mm.vfork()
    assert nic.context(child) is ctx
    with pytest.raises(ValueError, match="already"):
        nic.attach(child)
    child.write(BASE, b"both")
    assert ctx.rdma_read(BASE, 4) == b"both"
    child.exec()
    assert ctx.attached and ctx.rdma_read(BASE, 4) == b"both"
    assert nic.attach(child).attached
    mm.exit()
    assert not ctx.attached
    assert nic.stats["violations"] == 0


def test_a_process_that_has_ended():
    mm = process()
    mm.exit()
    with pytest.raises(OSError):
        Nic().attach(mm)
    with pytest.raises(TypeError):
        ioproc.Context()
    with pytest.raises(TypeError):
        Nic().attach(None)


# ---- with threads

def test_a_page_that_the_device_reads_while_fork_counts_its_mappings():
    """One count may not swallow the other: frames would be lost, or given to two."""
    mm = process(pages=256, frames=2048)
    mm.write(BASE, b"x" * 256 * P)
    ctx = attach(mm, "mm+fault")
    stop = threading.Event()

    def read():
        while not stop.is_set():
            ctx.rdma_read(BASE, 256 * P)

    thread = threading.Thread(target=read)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for _ in range(50):
                mm.fork().exit()
            mm.write(BASE, b"y")
    finally:
        stop.set()
        thread.join(60)
        sys.setswitchinterval(interval)
    check_memory(mm.mem, [mm])
    whole(ctx)
    mm.exit()
    assert mm.mem.stats["frames_used"] == 0


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("design", SAFE)
def test_a_device_beside_a_process_that_does_everything(design, batch):
    """Short here; tests/test_device_stress.py goes on for longer."""
    if batch and not design.startswith(("interval", "pin", "bounce")) and "hooks" not in design:
        pytest.skip("unsafe: see test_device_races.py")
    mm = process(pages=32, frames=256, swap_slots=256, teardown_batch=batch)
    ctx = attach(mm, design, fork="revised", bounce_bytes=4 * P)
    stop = threading.Event()
    surprises = []

    def device():
        turn = 0
        while not stop.is_set():
            turn += 1
            at = BASE + turn * 7 % 29 * P + turn * 131 % P
            try:
                if turn % 3:
                    ctx.rdma_write(at, b"d" * (turn * 17 % (2 * P)))
                else:
                    ctx.rdma_read(at, 2 * P)
            except RemoteAccessError as error:
                if error.cause not in ("unmapped", "permission"):
                    surprises.append(error)

    thread = threading.Thread(target=device)
    thread.start()
    end = time.monotonic() + 0.4
    turn = 0
    try:
        while time.monotonic() < end:
            turn += 1
            at = BASE + turn * 11 % 25 * P
            mm.munmap(at, 5 * P)
            mm.mmap(5 * P, addr=at)
            mm.write(at, b"c" * 5 * P)
            child = mm.fork()
            mm.write(at + P, b"w" * P)
            child.write(at, b"k" * 2 * P)
            mm.mprotect(at, 4 * P, (RO, NONE)[turn & 1])
            mm.mem.reclaim(8)
            mm.madvise(at, 3 * P, mmap.MADV_DONTNEED)
            mm.mprotect(at, 4 * P, RW)
            child.exit()
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive() and surprises == []
    if design == "pin":                                     # a transfer that has begun goes on where it was
        assert ctx.stats["lookups"] == ctx.stats["hits"] + ctx.stats["misses"]
    else:
        whole(ctx)
    check_memory(mm.mem, [mm])
    ctx.detach()
    mm.exit()
    assert mm.mem.stats["frames_used"] == ctx.stats["pinned"] == 0


@pytest.mark.parametrize("design", DESIGNS)
def test_the_garbage_collector_may_end_another_in_a_callback(design):
    """The operation that is going on stays the thread's: it ends as if nothing had been."""
    mm, other = process(), AddressSpace(PhysicalMemory(300))
    other.mmap(P, addr=BASE)
    ctx = attach(other, design, bounce_bytes=P)
    ctx.access(BASE, P, write=True)
    cycle = [other, ctx]
    cycle.append(cycle)
    del other, cycle
    mm.register_ops(Ops(invalidate_range=lambda vma, start, end: gc.collect()))
    mm.touch(BASE, P, write=True)
    mm.munmap(BASE, P)
    assert not ctx.attached
    mm.mmap(P, addr=BASE)


@pytest.mark.parametrize("design", HOOKED)
def test_a_ranged_invalidation_costs_by_what_it_touches(design):
    """64 TiB with three pages in use: going over the range page by page would not end in this test's time."""
    mm = AddressSpace(PhysicalMemory(16))
    size = 1 << 46
    addr = mm.mmap(size)
    ctx = attach(mm, design)
    for at in addr, addr + size // 2, addr + size - P:
        ctx.access(at, 1, write=True)
    before = ctx.stats["invalidated"]
    mm.munmap(addr, size)
    assert ctx.stats["invalidated"] == before + 3 - 3 * ("pin-cache" in design)    # those a deregistration takes away itself
    assert ctx.stats["violations"] == ctx.stats["pinned"] == 0
