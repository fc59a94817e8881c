"""References that a device takes (get_user_pages), on the model and on ioproc: what they keep, and what they do not."""
# ruff: noqa: F403, F405
import numpy as np
import pytest

import ioproc
import model
from world import *


@pytest.fixture(params=[model, ioproc], ids=["model", "ioproc"])
def world(request):
    world = World(request.param)
    yield world
    world.check()


def pfns(world, *pages):
    return [int(world.page(page)["pfn"]) for page in pages]


def used(world):
    return world.mem.stats["frames_used"]


def test_pages_are_faulted_in(world):
    world.map(0, 4), world.write(1), world.faults()
    pins = world.mem.pin(world.mm, BASE + 5, 3 * PAGE)              # every page that is touched
    assert isinstance(pins, np.ndarray) and pins.dtype == np.uint64
    assert pins.tolist() == pfns(world, 0, 1, 2, 3) and world.faults() == {"anon": 3}
    world.mem.unpin(pins)


def test_for_reading(world):
    """The zero page serves; and the shared page after fork."""
    world.map(0, 2), world.write(1), world.fork(), world.faults()
    pins = world.pin(0, 2, write=False)
    assert world.says(0) == "zero" and world.says(1) == "dirty shared" and world.faults() == {"zero": 1}
    world.mem.unpin(pins)


def test_for_writing_after_fork(world):
    """The pinned page is not the child's any more."""
    world.map(0, 1), world.write(0), world.fork()
    pins = world.pin(0)
    assert pfns(world, 0) == pins.tolist() and world.page(0, world.child)["pfn"] != pins[0]
    world.mem.unpin(pins)


def test_nothing(world):
    assert len(world.mem.pin(world.mm, BASE, 0)) == 0
    world.mem.unpin([])


@pytest.mark.parametrize("prepare, write", [
    (lambda w: w.munmap(2, 1), False), (lambda w: w.mprotect(2, 1, "---"), False), (lambda w: w.mprotect(2, 1, "r--"), True),
    (lambda w: w.map_file(2, 1, first=8), False), (lambda w: w.map_device(8, 1) and w.mremap(8, 1, 1, 2), False)],
    ids=["hole", "PROT_NONE", "read-only", "beyond the end", "device memory"])
def test_all_or_nothing(world, prepare, write):
    """EFAULT; pages before the bad one are faulted in, and not pinned."""
    world.map(0, 4)
    prepare(world)
    fails("EFAULT", world.pin, 0, 4, write)
    assert world.says(1) == ("writable dirty" if write else "zero")
    world.munmap(0, 2)
    assert used(world) == 0


def test_out_of_frames(world):
    world = world.again(frames=4)
    world.map(0, 8), world.mlock(0, 1)
    with pytest.raises(MemoryError):
        world.pin(0, 8)
    world.munlock(0, 1), world.munmap(0, 8)
    assert used(world) == 0


@pytest.mark.parametrize("end", [lambda w: w.munmap(0, 1), lambda w: w.madvise(0, 1, DONTNEED), lambda w: w.mm.exec(),
                                 lambda w: w.map(0, 1)], ids=["munmap", "DONTNEED", "exec", "MAP_FIXED"])
def test_a_reference_keeps_the_frame(world, end):
    """Of what was mapped there before; not the address."""
    world.map(0, 1)
    pins = world.pin(0)
    end(world)
    assert used(world) == 1
    world.map(0, 1), world.write(0)
    assert pfns(world, 0) != pins.tolist() and used(world) == 2
    world.mem.unpin(pins)
    assert used(world) == 1


def test_a_reference_goes_along(world):
    world.map(0, 1)
    pins = world.pin(0)
    world.mremap(0, 1, 1, 8)
    assert pfns(world, 8) == pins.tolist()
    world.mem.unpin(pins)


def test_alone_nothing_changes(world):
    """A page that is this address space's alone stays writable, and becomes so again after r-- -> rw-."""
    world.map(0, 1), world.write(0)
    pins = world.pin(0)
    world.faults(), world.write(0)
    world.mprotect(0, 1, "r--"), world.mprotect(0, 1, "rw-"), world.write(0)
    assert world.faults() == {} and pfns(world, 0) == pins.tolist()
    world.mem.unpin(pins)


def test_after_fork_address_and_frame_part_ways(world):
    """Pinning alone is not coherence: whoever writes gets a copy, the device goes on with the old frame."""
    world.map(0, 1), world.write(0, data=b"old")
    pins = world.pin(0)
    world.fork()
    world.faults(), world.write(0, data=b"new")
    assert world.faults() == {"cow": 1} and pfns(world, 0) != pins.tolist()
    world.write(0, world.child, b"its")                 # the last to map it: still a copy
    assert world.faults(world.child) == {"cow": 1} and used(world) == 3
    world.mem.unpin(pins)
    assert used(world) == 2


def test_even_when_the_child_is_gone(world):
    world.map(0, 1), world.write(0)
    first, second = world.pin(0), world.pin(0)
    world.fork(), world.child.exit(), world.others.clear(), world.faults()
    world.mem.unpin(first)
    world.write(0)
    assert world.faults() == {"cow": 1} and pfns(world, 0) != second.tolist()
    world.mem.unpin(second)


def test_when_the_reference_is_dropped_in_time(world):
    world.map(0, 1), world.write(0)
    pins = world.pin(0)
    world.fork(), world.child.exit(), world.others.clear(), world.mem.unpin(pins), world.faults()
    world.write(0)
    assert world.faults() == {"reuse": 1} and pfns(world, 0) == pins.tolist()


def test_out_of_swap(world):
    world.map(0, 2), world.mm.touch(BASE, 2 * PAGE, True), world.swap_out(0, 2), world.faults()
    pins = world.pin(0, write=False), world.pin(1)
    assert [world.says(page) for page in (0, 1)] == ["writable", "writable dirty"] and world.faults() == {"swap": 2}
    for some in pins:
        world.mem.unpin(some)


def test_pages_of_a_file(world):
    world.map_file(0, 1, flags=SHARED), world.map_file(1, 1)
    shared, private = world.pin(0), world.pin(1, write=False)
    assert shared.tolist() == private.tolist() and world.mem.reclaim(ALL) == 0
    world.write(1)
    assert pfns(world, 1) != private.tolist()
    world.mem.unpin(shared), world.mem.unpin(private)


def test_hooks_are_the_faults_hooks(world):
    world.map(0, 3), world.read(1), world.register(world.ops())
    world.mem.unpin(world.pin(0, 3)), world.mem.unpin(world.pin(0, 3))
    assert world.fired == ["u 0 of 0-3", "i 1 of 0-3", "u 1 of 0-3", "u 2 of 0-3"]


def test_what_is_not_pinned(world):
    world.map(0, 2)
    pins = world.pin(0, 2)
    for wrong in [12345], [-1], [pins[0], pins[0]], [*pins, 200], [1 << 64]:
        with pytest.raises((ValueError, OverflowError)):
            world.mem.unpin(wrong)
    world.mem.unpin(pins.tolist())                      # nothing had been dropped
    with pytest.raises(ValueError):
        world.mem.unpin(pins)


def test_another_memory(world):
    other = World(world.impl)
    with pytest.raises(ValueError):
        world.mem.pin(other.mm, BASE, PAGE)
