"""Beginnings and ends of address spaces: vfork, exec, and what fork leaves out; on the model and on ioproc."""
# ruff: noqa: F403, F405
import pytest

import ioproc
import model
from world import *


@pytest.fixture(params=[model, ioproc], ids=["model", "ioproc"])
def world(request):
    world = World(request.param)
    yield world
    world.check()


# --- vfork --------------------------------------------------------------------------------------------


def test_a_vfork_child_is_in_its_parent_s_memory(world):
    world.map(0, 2), world.write(0, data=b"mine")
    child = world.vfork()
    child.write(BASE, b"ours"), child.mprotect(BASE + PAGE, PAGE, 1)
    assert world.mm.read(BASE, 4) == b"ours" and world.vmas() == [(0, 1), (1, 2)] and child.vmas() == world.mm.vmas()
    assert world.mem.stats["frames_used"] == 1 and not world.page(0)["shared"]
    assert child.stats == world.mm.stats


@pytest.mark.parametrize("leave", ["exec", "exit"])
def test_until_it_leaves(world, leave):
    world.map(0, 1), world.write(0)
    world.register(world.ops())
    child = world.vfork()
    getattr(child, leave)()
    assert world.fired == [] and world.read(0) == b"x"
    if leave == "exec":
        assert child.vmas() == []
        child.mmap(PAGE, addr=BASE), child.write(BASE, b"c")
        assert world.read(0) == b"x" and world.mem.stats["frames_used"] == 2
    else:
        world.others.clear()


def test_ops_are_shared(world):
    world.map(0, 2)
    child = world.vfork()
    ops = world.ops()
    child.register_ops(ops)
    fails("EEXIST", world.register, ops)
    world.write(0), child.write(BASE + PAGE, b"x")
    child.exit(), world.others.clear()
    world.mm.exec()
    assert world.fired == ["u 0 of 0-2", "u 1 of 0-2", "R"]


def test_the_parent_may_leave_first(world):
    """As when it is killed: the memory is the child's then, and goes with it."""
    world.map(0, 1), world.write(0), world.register(world.ops())
    child = world.vfork()
    world.mm.exit()
    assert child.read(BASE, 1) == b"x" and world.fired == []
    child.exec()
    assert world.fired == ["R"] and world.mem.stats["frames_used"] == 0
    world.mm, world.others = child, []


def test_a_vfork_child_may_fork(world):
    world.map(0, 1), world.write(0)
    child = world.vfork()
    grandchild, another = child.fork(), child.vfork()
    world.others += [grandchild, another]
    assert world.page(0)["shared"] and another.read(BASE, 1) == b"x" == grandchild.read(BASE, 1)
    grandchild.write(BASE, b"g")
    assert world.read(0) == b"x"


# --- exec ---------------------------------------------------------------------------------------------


def test_exec_begins_anew(world):
    world = world.again(rlimits={"AS": 20 * PAGE}, max_map_count=5)
    world.map(0, 4), world.write(0), world.brk(HEAP + 4), world.mlock(0, 1), world.register(world.ops())
    world.mm.exec()
    assert world.fired == ["R"]                         # and no I
    stats = world.mm.stats
    assert world.mm.vmas() == [] and stats["faults"] == stats["locked_pages"] == 0 == world.mem.stats["frames_used"]
    assert world.mm.brk() == BASE + HEAP * PAGE
    fails("ENOMEM", world.mm.mmap, 21 * PAGE)           # limits stay
    world.map(0, 4), world.write(0)
    assert world.fired == ["R"]                         # ops are not inherited


def test_release_order_at_exec(world):
    world.map(0, 2)
    for name in "abc":
        world.register(world.ops(name))
    world.register(world.ops("vma"), 0, 1)
    world.mm.exec()
    assert world.fired == ["c R", "b R", "a R", "vma R"]


def test_what_exec_gives_up_others_keep(world):
    world.map(0, 1), world.write(0), world.fork(), world.swap_out(0)
    world.mm.exec()
    assert world.read(0, world.child) == b"x"
    world.mem.reclaim(ALL), world.child.exec()
    assert world.mem.stats["swap_used"] == 0


# --- fork ---------------------------------------------------------------------------------------------


def test_wiped_on_fork(world):
    """The child finds zeros; the parent's pages stay its own, and nothing fires."""
    world.map(0, 4), world.write(0), world.write(1), world.madvise(1, 1, WIPEONFORK)
    world.register(world.ops())
    world.fork()
    assert world.fired == ["w 0 of 0-1"]
    assert world.child.read(BASE, 1) == b"x" and world.child.read(BASE + PAGE, 1) == b"\0"
    assert world.says(1) == "writable dirty" and world.mm.read(BASE + PAGE, 1) == b"x"
    assert len(world.child.vmas()) == 3
    world.write(1, world.child)
    grandchild = world.child.fork()                     # the mark is inherited
    world.others.append(grandchild)
    assert grandchild.read(BASE + PAGE, 1) == b"\0"
    world.madvise(1, 1, KEEPONFORK)
    assert world.vmas() == [(0, 4)]


def test_what_cannot_be_wiped(world):
    world.map(0, 1), world.map(1, 1, flags=SHARED | ANONYMOUS), world.map_file(2, 1)
    fails("EINVAL", world.madvise, 0, 2, WIPEONFORK)
    fails("EINVAL", world.madvise, 2, 1, WIPEONFORK)
    world.madvise(1, 2, KEEPONFORK)
    world.write(0), world.fork()
    assert world.read(0, world.child) == b"\0"          # the VMA before the refusal is marked


def test_what_comes_after_a_wipe_is_as_never_written(world):
    """The child's memory has no past, so that it merges with new memory where the parent's does not."""
    world.map(0, 2), world.write(0), world.write(1), world.madvise(0, 2, WIPEONFORK)
    world.fork(), world.map(2, 1, mm=world.child), world.madvise(2, 1, WIPEONFORK, world.child)
    assert len(world.child.vmas()) == 1


# --- mremap's DONTUNMAP ---------------------------------------------------------------------------------


def test_dontunmap_leaves_an_empty_place(world):
    world.map(0, 2), world.write(0, data=b"moved"), world.write(1), world.swap_out(1)
    world.mremap(0, 2, 2, 8, flags=7)
    assert world.vmas() == [(0, 2), (8, 10)] and world.mm.read(BASE + 8 * PAGE, 5) == b"moved"
    assert [world.says(page) for page in (0, 1, 8, 9)] == ["absent", "absent", "writable dirty", "swapped"]
    assert world.read(0) == b"\0" and world.read(9) == b"x"


def test_dontunmap_of_a_file(world):
    world.memfd.write(0, b"file"), world.map_file(0, 1, flags=SHARED, file=world.memfd)
    world.mremap(0, 1, 1, 8, flags=7)
    assert world.mm.read(BASE, 4) == b"file" == world.mm.read(BASE + 8 * PAGE, 4) and world.page(0)["shared"]


def test_dontunmap_anywhere(world):
    world.map(0, 1), world.write(0)
    at = world.mremap(0, 1, 1, flags=5)
    assert at > BASE and world.mm.read(at, 1) == b"x" and world.mremap(0, 1, 1, 4, flags=5) == BASE + 4 * PAGE   # a hint


def test_dontunmap_moves_and_does_not_resize(world):
    world.map(0, 4)
    for old, new, to, flags in (2, 1, 8, 7), (1, 2, 8, 7), (0, 0, 8, 7), (2, 2, 1, 7), (2, 2, 8, 6), (2, 2, 1, 5):
        fails("EINVAL", world.mremap, 0, old, new, to, flags)
    fails("EFAULT", world.mremap, 6, 1, 1, 8, 7)
    assert world.vmas() == [(0, 4)]


def test_the_limit_counts_both_places(world):
    world = world.again(rlimits={"AS": 5 * PAGE})
    world.map(0, 3), world.write(0)
    fails("ENOMEM", world.mremap, 0, 3, 3, 8, 7)
    world.mremap(0, 3, 3, 8), world.mremap(8, 2, 2, 0, 7)
    assert world.mm.stats["total_pages"] == 5
