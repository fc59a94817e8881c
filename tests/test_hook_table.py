"""The specification's table "operation -> ordered hooks", one case a row or part of a row, on the model and on ioproc.

The notation is explained in world.py.
"""
# ruff: noqa: F403, F405
from collections import namedtuple

import pytest

import ioproc
import model
from world import *


@pytest.fixture(params=[model, ioproc], ids=["model", "ioproc"])
def world(request):
    return World(request.param)


# --- the table ----------------------------------------------------------------------------------------

# What is done before ops are registered, what is done then, and the hooks (a set: in any order): with the ops on the
# address space, and with them on every VMA there is at that moment (the same, if not stated).
Case = namedtuple("Case", "row name before call hooks vma_hooks", defaults=[None])


def shared_with_child(w):
    w.map(0, 4), w.write(1), w.fork()


def child_gone(w):
    shared_with_child(w), w.child.exit()


def two_vmas_and_a_hole(w):
    w.map(0, 2), w.map(4, 2, "r--")


def swapped_in_both(w):
    w.map(0, 4), w.write(1), w.fork(), w.mem.reclaim(ALL)


def heard_in_the_child(w):
    w.child.register_ops(w.ops("child"))


def mapped_by_two(w):
    """The memfd, shared and private, in one address space, and shared in another, whose ops are called "child"."""
    w.map_file(0, 4, flags=SHARED, file=w.memfd), w.map_file(8, 2, file=w.memfd, first=2)
    w.child = w.new()
    w.map_file(0, 8, flags=SHARED, file=w.memfd, mm=w.child), heard_in_the_child(w)


SWAP_IN = "swap-in, read; or write to an unshared swap page"
SWAP_OUT = "swap-out (reclaim through the reverse map)"
HOLE = "madvise REMOVE, hole punch"
TRUNCATE = "truncate of a file; hugetlb truncate"
REMAP = "remap_file_pages (historical: non-linear; today it splits VMAs)"
SPECIAL = "remap_pfn_range (device memory); zeromap (private /dev/zero)"
EXIT = "exit, exec (the last user of the mm: a vfork child's is not)"
HUGE = "hugetlb: prefault / munmap"
PROTECTED = "write-protect fault, the frame is shared, or is the zero page"
OTHER = "other madvise, mlock, munlock"
MOVE = "mremap move"
TABLE = [
    Case("read of an absent anonymous page", "private", lambda w: w.map(0, 4), lambda w: w.read(1), ["u 1 of 0-4"]),
    Case("read of an absent anonymous page", "present: nothing", lambda w: (w.map(0, 4), w.read(1)), lambda w: w.read(1),
         []),
    Case("write to an absent anonymous page", "private", lambda w: w.map(0, 4), lambda w: w.write(1), ["u 1 of 0-4"]),
    Case("access to an absent file page", "read, private", lambda w: w.map_file(0, 4), lambda w: w.read(1), ["u 1 of 0-4"]),
    Case("access to an absent file page", "write, private: copied early", lambda w: w.map_file(0, 4), lambda w: w.write(1),
         ["u 1 of 0-4"]),
    Case("access to an absent file page", "read, shared: writable at once", lambda w: w.map_file(0, 4, flags=SHARED),
         lambda w: (w.read(1), w.write(1)), ["u 1 of 0-4"]),
    Case("access to an absent file page", "shared anonymous", lambda w: w.map(0, 4, flags=SHARED | ANONYMOUS),
         lambda w: w.write(1), ["u 1 of 0-4"]),
    Case("write-protect fault, the frame has one user", "the other process is gone", child_gone, lambda w: w.write(1),
         ["u 1 of 0-4"]),
    Case(PROTECTED, "shared with a child", shared_with_child,
         lambda w: w.write(1), ["i 1 of 0-4", "u 1 of 0-4"]),
    Case(PROTECTED, "the zero page", lambda w: (w.map(0, 4), w.read(1)),
         lambda w: w.write(1), ["i 1 of 0-4", "u 1 of 0-4"]),
    Case(PROTECTED, "a page of a file",
         lambda w: (w.map_file(0, 4), w.read(1)), lambda w: w.write(1), ["i 1 of 0-4", "u 1 of 0-4"]),

    Case(SWAP_IN, "read: writable at once",
         lambda w: (w.map(0, 4), w.write(1), w.swap_out(1)), lambda w: (w.read(1), w.write(1)), ["u 1 of 0-4"]),
    Case(SWAP_IN, "write", lambda w: (w.map(0, 4), w.write(1), w.swap_out(1)),
         lambda w: w.write(1), ["u 1 of 0-4"]),
    Case(SWAP_IN, "read of a shared one", swapped_in_both,
         lambda w: w.read(1), ["u 1 of 0-4"]),
    Case(SWAP_IN, "write, the other process is gone",
         lambda w: (swapped_in_both(w), w.child.exit()), lambda w: w.write(1), ["u 1 of 0-4"]),
    Case("swap-in, write to a shared one", "", swapped_in_both, lambda w: w.write(1), ["i 1 of 0-4", "u 1 of 0-4"]),
    Case(SWAP_OUT, "anonymous", lambda w: (w.map(0, 4), w.write(1), w.read(2), w.write(3)),
         lambda w: w.mem.reclaim(ALL), {"i 1 of 0-4", "i 3 of 0-4"}),
    Case(SWAP_OUT, "in every address space", lambda w: (shared_with_child(w), heard_in_the_child(w)),
         lambda w: w.mem.reclaim(ALL), {"i 1 of 0-4", "child i 1 of 0-4"}),
    Case(SWAP_OUT, "a page of a file, in every place", mapped_by_two,
         lambda w: (w.read(2), w.read(8), w.read(2, w.child), w.fired.clear(), w.mem.reclaim(ALL)),
         {"i 2 of 0-4", "i 8 of 8-10", "child i 2 of 0-8"}),
    Case(SWAP_OUT, "pinned: skipped", lambda w: (w.map(0, 4), w.write(1), w.pin(1)),
         lambda w: w.mem.reclaim(ALL), []),
    Case(SWAP_OUT, "locked: skipped", lambda w: (w.map(0, 4), w.mlock(0, 4)),
         lambda w: w.mem.reclaim(ALL), []),
    Case(SWAP_OUT, "MADV_PAGEOUT", lambda w: (w.map(0, 4), w.write(1), w.read(2)),
         lambda w: w.swap_out(0, 4), ["i 1 of 0-4"]),

    Case("munmap", "a whole VMA, nothing present", lambda w: w.map(0, 4), lambda w: w.munmap(0, 4), ["I 0-4 of 0-4"]),
    Case("munmap", "the middle: splits fire nothing", lambda w: w.map(0, 4), lambda w: w.munmap(1, 2), ["I 1-3 of 1-3"]),
    Case("munmap", "several VMAs and holes", two_vmas_and_a_hole, lambda w: w.munmap(1, 7),
         ["I 1-8 of 1-2"], ["I 1-2 of 1-2", "I 4-6 of 4-6"]),
    Case("munmap", "starts in a hole", two_vmas_and_a_hole, lambda w: w.munmap(2, 3), ["I 2-5 of 4-5"], ["I 4-5 of 4-5"]),
    Case("munmap", "nothing mapped", two_vmas_and_a_hole, lambda w: w.munmap(2, 2), []),
    Case("munmap", "a part of a page is a page", lambda w: w.map(0, 4), lambda w: w.mm.munmap(BASE, PAGE + 1),
         ["I 0-2 of 0-2"]),
    Case("munmap", "shmdt", lambda w: w.mm.shmat(w.file, BASE), lambda w: w.mm.shmdt(BASE), ["I 0-8 of 0-8"]),
    Case("brk shrink; mmap MAP_FIXED over a mapping", "brk", lambda w: w.brk(HEAP + 4), lambda w: w.brk(HEAP + 1),
         [f"I {HEAP + 1}-{HEAP + 4} of {HEAP + 1}-{HEAP + 4}"]),
    Case("brk shrink; mmap MAP_FIXED over a mapping", "MAP_FIXED", two_vmas_and_a_hole, lambda w: w.map(1, 4),
         ["I 1-5 of 1-2"], ["I 1-2 of 1-2", "I 4-5 of 4-5"]),

    Case("mmap; brk grow", "mmap", lambda w: None, lambda w: w.map(0, 4), []),
    Case("mmap; brk grow", "brk", lambda w: w.brk(HEAP + 1), lambda w: w.brk(HEAP + 4), []),
    Case("mmap; brk grow", "MAP_POPULATE", lambda w: None, lambda w: w.map(0, 2, flags=PRIVATE | ANONYMOUS | POPULATE),
         ["u 0 of 0-2", "u 1 of 0-2"], []),
    Case("mmap; brk grow", "MAP_LOCKED", lambda w: None, lambda w: w.map(0, 2, flags=PRIVATE | ANONYMOUS | LOCKED),
         ["u 0 of 0-2", "u 1 of 0-2"], []),
    Case("mmap; brk grow", "MAP_POPULATE, then a write: shared memory is only read in, and writable at once", lambda w: None,
         lambda w: (w.map(0, 1, flags=SHARED | ANONYMOUS | POPULATE), w.write(0)), ["u 0 of 0-1"], []),

    Case(SPECIAL, "device memory", lambda w: None,
         lambda w: (w.map_device(0, 4), w.read(1), w.write(2)), ["I 0-4 of 0-4", "U 0-4 of 0-4"], []),
    Case(SPECIAL, "zeromap, and a write to it", lambda w: None,
         lambda w: (w.zeromap(0, 4), w.read(1), w.write(2)),
         ["I 0-4 of 0-4", "U 0-4 of 0-4", "i 2 of 0-4", "u 2 of 0-4"], []),

    Case("mprotect", "a part", lambda w: w.map(0, 4), lambda w: w.mprotect(1, 2, "r--"), ["P 1-3 of 1-3 r--"]),
    Case("mprotect", "unchanged: nothing", lambda w: w.map(0, 4), lambda w: w.mprotect(1, 2, "rw-"), []),
    Case("mprotect", "only the VMAs that change", lambda w: (w.map(0, 2), w.map(2, 2, "r--"), w.map(4, 2)),
         lambda w: w.mprotect(1, 4, "r--"), ["P 1-2 of 1-4 r--", "P 4-5 of 1-5 r--"]),
    Case("mprotect", "the surviving VMA", lambda w: (w.map(0, 2, "r--"), w.map(2, 2, "r-x")),
         lambda w: w.mprotect(2, 2, "r--"), ["P 2-4 of 0-4 r--"]),
    Case("mprotect", "a hole: what is before it", lambda w: (w.map(0, 1), w.map(2, 1)),
         lambda w: fails("ENOMEM", w.mprotect, 0, 3, "r--"), ["P 0-1 of 0-1 r--"]),

    Case("madvise DONTNEED", "clipped, nothing present", lambda w: (w.map(0, 2), w.map(2, 2, "r--")),
         lambda w: w.madvise(1, 2, DONTNEED), ["I 1-2 of 0-2", "I 2-3 of 2-4"]),
    Case("madvise DONTNEED", "holes are skipped", two_vmas_and_a_hole, lambda w: fails("ENOMEM", w.madvise, 1, 7, DONTNEED),
         ["I 1-2 of 0-2", "I 4-6 of 4-6"]),
    Case("madvise DONTNEED", "locked", lambda w: w.map(0, 2, flags=PRIVATE | ANONYMOUS | LOCKED),
         lambda w: fails("EINVAL", w.madvise, 0, 2, DONTNEED), []),
    Case("madvise FREE", "clipped", lambda w: (w.map(0, 2), w.map(2, 2, "r--")), lambda w: w.madvise(1, 2, FREE),
         ["I 1-2 of 0-2", "I 2-3 of 2-4"]),
    Case(HOLE, "REMOVE", mapped_by_two, lambda w: w.madvise(1, 2, REMOVE),
         {"I 1-3 of 0-4", "I 8-9 of 8-10", "child I 1-3 of 0-8"}),
    Case(HOLE, "hole punch", mapped_by_two, lambda w: w.memfd.punch_hole(PAGE, 2 * PAGE),
         {"I 1-3 of 0-4", "I 8-9 of 8-10", "child I 1-3 of 0-8"}),
    Case(HOLE, "parts of pages: nothing", mapped_by_two, lambda w: w.memfd.punch_hole(1, 2 * PAGE - 2), []),
    Case(HOLE, "shared anonymous memory", lambda w: w.map(0, 4, flags=SHARED | ANONYMOUS),
         lambda w: w.madvise(1, 2, REMOVE), ["I 1-3 of 0-4"]),
    Case(TRUNCATE, "of a file", mapped_by_two, lambda w: w.memfd.truncate(2 * PAGE + 1),
         {"I 3-4 of 0-4", "I 9-10 of 8-10", "child I 3-8 of 0-8"}),
    Case(TRUNCATE, "only VMAs that map what goes", mapped_by_two, lambda w: w.memfd.truncate(4 * PAGE),
         ["child I 4-8 of 0-8"]),
    Case(TRUNCATE, "growing: nothing", mapped_by_two, lambda w: w.memfd.truncate(9 * PAGE), []),

    Case(TRUNCATE, "hugetlb", lambda w: (w.again(huge_pages=2), w.map_huge_file(0, 1024)),
         lambda w: w.huge.truncate(512 * PAGE), ["I 512-1024 of 0-1024"]),

    Case(OTHER, "mlock populates",
         lambda w: (w.map(0, 3), w.map(3, 1, "r--"), w.read(0), w.write(1)), lambda w: (w.mlock(0, 4), w.munlock(0, 4)),
         ["i 0 of 0-3", "u 0 of 0-3", "u 2 of 0-3", "u 3 of 3-4"]),
    Case(OTHER, "POPULATE", lambda w: w.map(0, 2),
         lambda w: (w.madvise(0, 1, POPULATE_READ), w.madvise(0, 2, POPULATE_WRITE)),
         ["u 0 of 0-2", "i 0 of 0-2", "u 0 of 0-2", "u 1 of 0-2"]),
    Case(OTHER, "flags, which split", lambda w: w.map(0, 4),
         lambda w: (w.madvise(1, 2, RANDOM), w.madvise(0, 4, DONTDUMP), w.madvise(0, 4, WILLNEED)), []),

    Case("mremap shrink", "", lambda w: w.map(0, 4), lambda w: w.mremap(0, 4, 1), ["I 1-4 of 1-4"]),
    Case("mremap grow in place", "", lambda w: w.map(0, 4), lambda w: w.mremap(0, 4, 6), []),
    Case(MOVE, "a whole VMA", lambda w: (w.map(0, 2), w.write(0)), lambda w: w.mremap(0, 2, 2, 8),
         ["I 0-2 of 0-2", "I 8-10 of 8-10", "I 0-2 of 0-2"]),
    Case(MOVE, "no update at the new address: that is the next fault's",
         lambda w: (w.map(0, 2), w.write(0)), lambda w: (w.mremap(0, 2, 2, 8), w.write(8), w.write(9)),
         ["I 0-2 of 0-2", "I 8-10 of 8-10", "I 0-2 of 0-2", "u 9 of 8-10"]),
    Case(MOVE, "a part, and onto something", lambda w: (w.map(0, 4, "r--"), w.map(7, 4)),
         lambda w: w.mremap(1, 2, 2, 8), ["I 8-10 of 8-10", "I 1-3 of 0-4", "I 8-10 of 8-10", "I 1-3 of 1-3"]),
    Case(MOVE, "longer: only what there was is invalidated", lambda w: (w.map(0, 2), w.map(2, 1, "r--")),
         lambda w: w.mremap(0, 2, 3, 8), ["I 0-2 of 0-2", "I 8-10 of 8-11", "I 0-2 of 0-2"]),
    Case(MOVE, "shorter: first the tail", lambda w: w.map(0, 4), lambda w: w.mremap(0, 4, 1, 8),
         ["I 1-4 of 1-4", "I 0-1 of 0-1", "I 8-9 of 8-9", "I 0-1 of 0-1"]),
    Case(MOVE, "several VMAs, one after the other", lambda w: (w.map(0, 2), w.map(3, 1, "r--")),
         lambda w: w.mremap(0, 4, 4, 8), ["I 0-2 of 0-2", "I 8-10 of 8-10", "I 0-2 of 0-2",
                                          "I 3-4 of 3-4", "I 11-12 of 11-12", "I 3-4 of 3-4"]),

    Case(MOVE, "DONTUNMAP: without the last", lambda w: (w.map(0, 2), w.write(0)),
         lambda w: (w.mremap(0, 2, 2, 8, flags=7), w.write(0)), ["I 0-2 of 0-2", "I 8-10 of 8-10", "u 0 of 0-2"]),
    Case(REMAP, "today", lambda w: (w.map_file(0, 4, flags=SHARED), w.read(1)),
         lambda w: w.remap(1, 2, 5), ["I 1-3 of 1-3", "u 1 of 1-3", "u 2 of 1-3"], ["I 1-3 of 1-3"]),
    Case(REMAP, "historical",
         lambda w: (w.restart(nonlinear=True), w.map_file(0, 4, flags=SHARED), w.read(1)), lambda w: w.remap(1, 2, 5),
         ["i 1 of 0-4", "u 1 of 0-4", "u 2 of 0-4"]),

    Case(HUGE, "prefault", lambda w: w.again(huge_pages=2),
         lambda w: w.map(0, 1024, flags=PRIVATE | ANONYMOUS | HUGETLB | POPULATE), []),
    Case(HUGE, "munmap", lambda w: (w.again(huge_pages=2), w.map(0, 1024, flags=PRIVATE | ANONYMOUS | HUGETLB)),
         lambda w: (w.write(0), w.munmap(512, 512)), ["I 512-1024 of 512-1024"]),

    Case("msync", "per shared VMA, clipped", lambda w: (w.map_file(0, 2, flags=SHARED), w.map(2, 2),
                                                        w.map_file(4, 4, flags=SHARED)),
         lambda w: w.msync(1, 5), ["S 1-2 of 0-2", "S 4-6 of 4-8"]),
    Case("msync", "MS_ASYNC", lambda w: w.map_file(0, 2, flags=SHARED), lambda w: w.msync(0, 2, 1), ["S 0-2 of 0-2"]),
    Case("msync", "private: nothing", lambda w: w.map_file(0, 2), lambda w: w.msync(0, 2), []),

    Case("fork", "each writable PTE of private memory", lambda w: (w.map(0, 4), w.write(0), w.write(2), w.read(3)),
         lambda w: w.fork(), ["w 0 of 0-4", "w 2 of 0-4"]),
    Case("fork", "a second time: they are read-only", lambda w: (w.map(0, 4), w.write(0), w.fork()), lambda w: w.fork(), []),
    Case("fork", "shared memory stays writable", lambda w: (w.map(0, 4, flags=SHARED | ANONYMOUS), w.write(0)),
         lambda w: w.fork(), []),
    Case("fork", "the child's calls fire nothing", lambda w: w.map(0, 4),
         lambda w: (w.fork(), w.write(0, w.child), w.child.munmap(BASE, PAGE), w.child.exit()), []),
    Case(EXIT, "no I", lambda w: (w.map(0, 4), w.write(0)),
         lambda w: w.mm.exit(), ["R"]),
    Case(EXIT, "exec", lambda w: (w.map(0, 4), w.write(0)),
         lambda w: (w.mm.exec(), w.map(0, 4), w.write(0)), ["R"]),
    Case(EXIT, "a vfork child execs, another exits",
         lambda w: (w.map(0, 4), w.write(0)), lambda w: (w.mm.vfork().exec(), w.mm.vfork().exit(), w.write(1)), ["u 1 of 0-4"]),
    Case(EXIT, "the parent leaves first: it is the child's now",
         lambda w: (w.map(0, 4), w.vfork()), lambda w: (w.mm.exit(), w.write(1, w.child), w.child.exec()), ["u 1 of 0-4", "R"]),
]

@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case.row}-{case.name}")
@pytest.mark.parametrize("placement", ["mm", "vma"])
def test_row(world, case, placement):
    case.before(world)
    if placement == "mm":
        world.register(world.ops())
    else:
        world.register_everywhere(world.ops())
    case.call(world)
    hooks = case.hooks if placement == "mm" or case.vma_hooks is None else case.vma_hooks
    assert sorted(world.fired) == sorted(hooks) if isinstance(hooks, set) else world.fired == hooks


def test_every_row_is_here():
    assert len({case.row for case in TABLE}) == 26


# --- points that are easy to get wrong ------------------------------------------------------------------


def test_newprot_is_not_writability(world):
    """What P announces may become writable; the PTE says what is."""
    world.map(0, 2), world.write(0), world.write(1), world.fork(), world.child.exit()
    world.write(1)                      # exclusive again; page 0 still waits for a write fault
    world.mprotect(0, 2, "r--")
    world.register(world.ops())
    world.mprotect(0, 2, "rw-")
    assert world.fired == ["P 0-2 of 0-2 rw-"]          # and no u, though page 1 became writable
    assert [bool(world.page(page)["writable"]) for page in (0, 1)] == [False, True]


def test_hooks_before_and_after_the_change(world):
    """I, i, P and w see the page table as it was, u as it is."""
    seen = []

    def look(kind):
        def callback(vma, start, *args):
            page = world.mm.pagemap(start, PAGE)[0]
            seen.append((kind, bool(page["present"]), bool(page["writable"])))
        return callback

    world.map(0, 2)
    kinds = ["invalidate_range", "invalidate_page", "update_page", "change_protection", "wrprotect_page"]
    world.register(world.impl.Ops(name="eye", **{kind: look(LETTERS[kind]) for kind in kinds}))
    world.read(0), world.write(0), world.fork(), world.mprotect(0, 2, "r--"), world.mprotect(0, 2, "rw-")
    world.write(0), world.mprotect(0, 2, "r--"), world.madvise(0, 1, DONTNEED)
    assert seen == [("u", True, False), ("i", True, False), ("u", True, True), ("w", True, True), ("P", True, False),
                    ("P", True, False), ("i", True, False), ("u", True, True), ("P", True, True), ("I", True, False)]


def test_a_move_shows_old_and_new_place(world):
    seen = []
    world.map(0, 1), world.write(0)
    world.register(world.impl.Ops(name="eye", invalidate_range=lambda vma, start, end: seen.append(
        (bool(world.page(0)["present"]), bool(world.page(8)["present"])))))
    world.mremap(0, 1, 1, 8)
    assert seen == [(True, False), (True, False), (False, True)]


# --- the chain ------------------------------------------------------------------------------------------


def test_last_registered_is_first_called(world):
    world.map(0, 1)
    a, b, c = (world.ops(name) for name in "abc")
    for ops in a, b, c:
        world.register(ops)
    fails("EEXIST", world.register, b)
    world.write(0)
    world.unregister(b)
    fails("EINVAL", world.unregister, b)
    world.munmap(0, 1)
    world.mm.exit()
    assert world.fired == ["c u 0 of 0-1", "b u 0 of 0-1", "a u 0 of 0-1", "c I 0-1 of 0-1", "a I 0-1 of 0-1", "c R", "a R"]


def test_any_callback_may_be_missing(world):
    world.map(0, 1)
    world.register(world.impl.Ops(name="none"))
    world.register(world.ops("all"), 0, 1)
    world.write(0), world.munmap(0, 1), world.mm.exit()
    assert world.fired == ["all u 0 of 0-1", "all I 0-1 of 0-1"]


def test_a_callback_may_look_and_not_touch(world):
    refused = []
    other = world.impl.AddressSpace(world.mem)

    def touch(vma, addr):
        assert world.mm.vmas() and len(world.mm.pagemap(addr, PAGE))
        for call in (lambda: world.write(1), lambda: world.munmap(0, 1), lambda: other.mmap(PAGE), world.mm.fork, other.exit,
                     lambda: world.unregister(ops), lambda: other.register_ops(ops)):
            with pytest.raises(RuntimeError):
                call()
            refused.append(call)

    ops = world.impl.Ops(name="touchy", update_page=touch)
    world.map(0, 2), world.register(ops), world.write(0)
    assert len(refused) == 7 and world.vmas() == [(0, 2)] and not world.page(1)["present"]


def test_what_a_callback_raises_comes_after_the_operation(world):
    def boom(vma, start, end):
        raise ZeroDivisionError("first")

    def bang(vma, start, end):
        raise KeyError("second")

    world.map(0, 2)
    world.register(world.ops("last")), world.register(world.impl.Ops(invalidate_range=bang))
    world.register(world.impl.Ops(invalidate_range=boom))
    with pytest.raises(ZeroDivisionError) as raised:
        world.munmap(0, 1)
    assert world.fired == ["last I 0-1 of 0-1"] and world.vmas() == [(1, 2)]
    assert any("second" in note for note in raised.value.__notes__)


# --- per VMA ----------------------------------------------------------------------------------------------


def test_attaching_splits_and_detaching_merges(world):
    world.map(0, 6)
    ops = world.ops()
    world.register(ops, 2, 2)
    assert world.vmas() == [(0, 2), (2, 4), (4, 6)]
    world.mm.touch(BASE, 6 * PAGE)
    assert world.fired == ["u 2 of 2-4", "u 3 of 2-4"]      # the pages outside fire nothing
    fails("EINVAL", world.unregister, ops, 4, 2)
    fails("EINVAL", world.unregister, ops)                  # it is not on the address space's chain
    world.unregister(ops, 0, 6)
    assert world.vmas() == [(0, 6)]


def test_pages_written_while_apart_stay_apart(world):
    """As with a memory policy: what got separate anon_vmas does not merge again."""
    world.map(0, 2)
    ops = world.ops()
    world.register(ops, 1, 1)
    world.write(0), world.write(1)
    world.unregister(ops, 1, 1)
    assert world.vmas() == [(0, 1), (1, 2)]


def test_the_same_ops_twice(world):
    world.map(0, 4)
    ops = world.ops()
    world.register(ops, 2, 1)
    fails("EEXIST", world.register, ops, 0, 4)
    assert world.vmas() == [(0, 2), (2, 3), (3, 4)]         # nothing changed
    world.register(ops, 0, 2)
    assert world.vmas() == [(0, 3), (3, 4)]                 # equal chains merge


def test_attaching_over_a_hole(world):
    two_vmas_and_a_hole(world)
    ops = world.ops()
    fails("ENOMEM", world.register, ops, 1, 4)
    assert world.vmas() == [(0, 1), (1, 2), (4, 6)]
    world.munmap(0, 6)
    assert world.fired == ["I 1-2 of 1-2"]
    fails("ENOMEM", world.register, ops, 8, 1)


@pytest.mark.parametrize("page, length, code", [(0.5, PAGE, "EINVAL"), (0, 0, "EINVAL")])
def test_bad_ranges(world, page, length, code):
    world.map(0, 4)
    fails(code, world.mm.register_ops, world.ops(), BASE + int(page * PAGE), length)


def test_lengths_are_rounded_up(world):
    world.map(0, 4)
    world.mm.register_ops(world.ops(), BASE, PAGE + 1)
    assert world.vmas() == [(0, 2), (2, 4)]


def test_order_within_a_vma(world):
    world.map(0, 2)
    for name in "ab":
        world.register(world.ops(name), 0, 2)
    world.write(0)
    assert world.fired == ["b u 0 of 0-2", "a u 0 of 0-2"]


def test_merging_needs_equal_chains(world):
    world.map(0, 4)
    a, b = world.ops("a"), world.ops("b")
    world.register(a, 0, 2), world.register(b, 0, 4)        # b a | b
    assert world.vmas() == [(0, 2), (2, 4)]
    world.register(a, 2, 2)                                 # b a | a b
    assert world.vmas() == [(0, 2), (2, 4)]
    world.unregister(b, 0, 4)                               # a | a
    assert world.vmas() == [(0, 4)]


def test_split_halves_carry_the_chain(world):
    world.map(0, 4), world.register(world.ops(), 0, 4)
    world.mprotect(1, 1, "r--"), world.munmap(2, 1)
    world.mm.touch(BASE, PAGE), world.mm.touch(BASE + 3 * PAGE, PAGE)
    assert world.fired == ["P 1-2 of 1-2 r--", "I 2-3 of 2-3", "u 0 of 0-1", "u 3 of 3-4"]


def test_new_mappings_do_not_take_part(world):
    world.map(0, 2), world.register(world.ops(), 0, 2)
    world.map(2, 2), world.map(1, 1)                        # beside it, and over a part of it
    assert world.vmas() == [(0, 1), (1, 4)]
    world.mm.touch(BASE, 4 * PAGE)
    assert world.fired == ["I 1-2 of 1-2", "u 0 of 0-1"]
    world.fired.clear()
    world.munmap(0, 1), world.map(0, 1), world.write(0), world.mm.exit()
    assert world.fired == ["I 0-1 of 0-1"]                  # gone with its last VMA: no release


def test_brk_does_not_take_the_chain_along(world):
    world.brk(HEAP + 1), world.register(world.ops(), HEAP, 1)
    world.brk(HEAP + 2)
    assert world.vmas() == [(HEAP, HEAP + 1), (HEAP + 1, HEAP + 2)]


def test_growing_in_place_takes_the_chain_along(world):
    world.map(0, 2), world.register(world.ops(), 0, 2)
    world.mremap(0, 2, 3), world.write(2)
    assert world.fired == ["u 2 of 0-3"]


def test_a_moved_vma_takes_its_chain_along(world):
    world.map(0, 4), world.register(world.ops(), 1, 2)
    world.mremap(0, 4, 4, 8)
    assert world.fired == ["I 1-3 of 1-3", "I 9-11 of 9-11", "I 1-3 of 1-3"]
    world.fired.clear()
    world.mm.touch(BASE + 8 * PAGE, 4 * PAGE), world.mm.exit()
    assert world.fired == ["u 9 of 9-11", "u 10 of 9-11", "R"]


def test_a_child_has_no_chain(world):
    world.map(0, 2), world.register(world.ops(), 0, 2), world.write(0)
    world.fired.clear()
    child = world.fork()
    assert world.fired == ["w 0 of 0-2"]
    world.write(0, child), child.mprotect(BASE, PAGE, 1), child.exit()
    assert world.fired == ["w 0 of 0-2"]


# --- both placements at once ------------------------------------------------------------------------------


def test_the_address_space_first_and_whole(world):
    two_vmas_and_a_hole(world)
    world.register_everywhere(world.ops("vma")), world.register(world.ops("mm"))
    world.write(0), world.munmap(0, 6)
    assert world.fired == ["mm u 0 of 0-2", "vma u 0 of 0-2",
                           "mm I 0-6 of 0-2", "vma I 0-2 of 0-2", "vma I 4-6 of 4-6"]


def test_ops_on_both_are_called_twice_and_released_once(world):
    world.map(0, 2)
    both, vma = world.ops("both"), world.ops("vma")
    world.register(both, 0, 1), world.register(vma, 1, 1), world.register(both)
    world.write(0), world.mm.exit()
    assert world.fired == ["both u 0 of 0-1", "both u 0 of 0-1", "both R", "vma R"]


def test_release_order(world):
    """The address space's chain, then what is only on VMAs, newest first."""
    world.map(0, 3)
    names = world.ops("old"), world.ops("new"), world.ops("mm"), world.ops("gone")
    world.register(names[3], 2, 1), world.register(names[0], 0, 2), world.register(names[1], 0, 1), world.register(names[2])
    world.munmap(2, 1)
    world.fired.clear()
    world.mm.exit()
    assert world.fired == ["mm R", "new R", "old R"]
