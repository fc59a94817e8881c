"""Stacks (MAP_GROWSDOWN), on the model and on ioproc: a fault below one extends it."""
# ruff: noqa: F403, F405
import pytest

import ioproc
import model
from world import *

STACK = PRIVATE | ANONYMOUS | GROWSDOWN
GAP = 256           # pages that stay between a stack and what is mapped below it


@pytest.fixture(params=[model, ioproc], ids=["model", "ioproc"])
def world(request):
    world = World(request.param)
    yield world
    world.check()


def no_growth(world, page):
    before = world.vmas()
    with pytest.raises(world.impl.SegmentationFault):
        world.write(page)
    assert world.vmas() == before


@pytest.mark.parametrize("access", ["read", "write"])
def test_an_access_below_extends_it(world, access):
    world.map(50, 2, flags=STACK), world.register(world.ops())
    getattr(world, access)(40)
    assert world.vmas() == [(40, 52)] and world.fired == ["u 40 of 40-52"] and world.mm.stats["faults"] == 1
    assert world.says(45) == "absent" and world.mm.stats["total_pages"] == 12


def test_far_below(world):
    world.map(5000, 1, flags=STACK)
    world.write(0)
    assert world.vmas() == [(0, 5001)]


def test_then_the_access_is_checked(world):
    """The stack has grown when the fault finds that it may not write there."""
    world.map(50, 1, "r--", STACK)
    with pytest.raises(world.impl.SegmentationFault):
        world.write(48)
    assert world.vmas() == [(48, 51)]


def test_only_what_faults_extends_it(world):
    """Devices, mlock and advice do not."""
    world.map(50, 1, flags=STACK)
    fails("EFAULT", world.pin, 49)
    fails("ENOMEM", world.mlock, 49, 2)
    fails("ENOMEM", world.madvise, 49, 2, POPULATE_WRITE)
    assert world.vmas() == [(50, 51)]


def test_only_private_anonymous_memory(world):
    fails("EINVAL", world.map, 50, 1, "rw-", SHARED | ANONYMOUS | GROWSDOWN)
    for kind in SHARED, PRIVATE:
        fails("EINVAL", world.map_file, 50, 1, "rw-", kind | GROWSDOWN)


# --- the guard gap --------------------------------------------------------------------------------------


def test_the_gap_to_what_is_below(world):
    world.map(0, 1), world.map(GAP + 10, 1, flags=STACK)
    no_growth(world, GAP)
    world.write(GAP + 1)
    assert world.vmas() == [(0, 1), (GAP + 1, GAP + 11)]


@pytest.mark.parametrize("below", [lambda w: w.map(0, 1, "---"), lambda w: w.map(0, 1, flags=STACK)],
                         ids=["PROT_NONE", "another stack"])
def test_no_gap(world, below):
    below(world), world.map(10, 1, flags=STACK)
    world.write(1)
    assert [vma for vma in world.vmas() if vma[1] == 11] in ([(1, 11)], [(0, 11)])


def test_the_lower_of_two_stacks(world):
    """The first VMA above the access is the one that grows."""
    world.map(20, 1, flags=STACK), world.map(40, 1, flags=STACK)
    world.write(10), world.write(30)
    assert world.vmas() == [(10, 21), (30, 41)]


def test_what_is_above_is_no_stack(world):
    world.map(20, 1), world.map(40, 1, flags=STACK)
    no_growth(world, 10)


def test_new_mappings_keep_away(world):
    """By hint and by choice; not by MAP_FIXED."""
    world.map(600, 1, flags=STACK)
    hint = BASE + 599 * PAGE
    assert world.mm.mmap(PAGE, addr=hint) != hint
    near = BASE + (600 - GAP) * PAGE
    assert world.mm.mmap(PAGE, addr=near - PAGE) == near - PAGE and world.mm.mmap(PAGE, addr=near) != near
    top = world.mm.mmap(PAGE)
    world.mm.munmap(top, PAGE)
    assert world.mm.mmap(PAGE, 3, STACK) == top
    assert world.mm.mmap(PAGE) == top - (GAP + 1) * PAGE
    world.map(590, 1)
    no_growth(world, 595)


def test_the_heap_keeps_away(world):
    world.brk(HEAP + 1), world.map(HEAP + GAP + 3, 1, flags=STACK)
    world.brk(HEAP + 2)
    assert world.mm.brk() == BASE + (HEAP + 2) * PAGE
    world.brk(HEAP + 3)
    assert world.mm.brk() == BASE + (HEAP + 2) * PAGE


# --- limits -----------------------------------------------------------------------------------------------


def test_the_size_of_a_stack(world):
    world = world.again(rlimits={"STACK": 4 * PAGE})
    world.map(50, 6, flags=STACK), world.munmap(50, 4)          # making it is not limited
    world.write(52)
    assert world.vmas() == [(52, 56)]
    no_growth(world, 51)


def test_the_size_of_the_address_space(world):
    world = world.again(rlimits={"AS": 4 * PAGE, "DATA": PAGE})
    world.map(50, 2, flags=STACK)                               # a stack is no data
    world.write(48)
    no_growth(world, 47)


def test_locked_stacks(world):
    world = world.again(rlimits={"MEMLOCK": 4 * PAGE})
    world.map(50, 2, flags=STACK), world.mlock(50, 2)
    world.write(48)
    assert world.mm.stats["locked_pages"] == 4 and world.says(49) == "absent"
    no_growth(world, 47)


# --- as other memory --------------------------------------------------------------------------------------


def test_only_stacks_merge_with_stacks(world):
    world.map(50, 1, flags=STACK), world.map(51, 1), world.map(49, 1, flags=STACK)
    assert world.vmas() == [(49, 51), (51, 52)]


def test_parts_of_a_stack(world):
    world.map(50, 4, flags=STACK), world.munmap(51, 1), world.munmap(50, 1)
    world.write(48)
    assert world.vmas() == [(48, 54)]


def test_protection_of_all_of_a_stack(world):
    """PROT_GROWSDOWN: from where the stack begins."""
    down = 0x01000000
    world.map(50, 4, flags=STACK), world.map(60, 1), world.register(world.ops())
    world.mm.mprotect(BASE + 52 * PAGE, PAGE, 1 | down)
    assert world.fired == ["P 50-53 of 50-53 r--"]
    fails("EINVAL", world.mm.mprotect, BASE + 60 * PAGE, PAGE, 1 | down)
    fails("ENOMEM", world.mm.mprotect, BASE + 70 * PAGE, PAGE, 1 | down)
    fails("EINVAL", world.mm.mprotect, BASE + 52 * PAGE, PAGE, 1 | 0x02000000)


def test_moved_and_forked_stacks_grow(world):
    world.map(50, 2, flags=STACK), world.write(50), world.mremap(50, 2, 2, 80)
    world.fork(), world.write(79), world.write(78, world.child)
    assert world.vmas() == [(79, 82)] and [(v.start - BASE) // PAGE for v in world.child.vmas()] == [78]


def test_growth_goes_with_hooks_of_the_vma(world):
    world.map(50, 2, flags=STACK), world.register(world.ops(), 50, 2)
    world.write(45)
    assert world.fired == ["u 45 of 45-52"]
