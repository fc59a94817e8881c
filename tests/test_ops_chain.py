"""The ops chain as a specification: order, errno, lifetimes, both placements."""
import errno
import gc
import mmap
import weakref

import pytest

import ioproc
from recording import BASE, FIXED, PAGE, PRIVATE, RO, RW, device, layout, pages


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=256)


@pytest.fixture
def mm(mem):
    with ioproc.AddressSpace(mem) as space:
        yield space


@pytest.fixture
def log():
    return []


def fails(code, call, *arguments):
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code


# ---- the chain of an address space


def test_there_are_nine_callbacks_in_the_order_of_the_structure():
    assert ioproc.HOOK_NAMES == (
        "release", "sync_range", "invalidate_range", "update_range", "change_protection",
        "sync_page", "invalidate_page", "update_page", "wrprotect_page")


def test_last_registered_is_called_first(mm, log):
    pages(mm, 1)
    for name in "abc":
        mm.register_ops(device(log, name, "update_page"))
    mm.touch(BASE)
    assert log == [(name, "update_page", BASE) for name in "cba"]


def test_registering_twice_is_eexist_and_changes_nothing(mm, log):
    pages(mm, 1)
    first, second = device(log, "first", "update_page"), device(log, "second", "update_page")
    mm.register_ops(first)
    mm.register_ops(second)
    fails(errno.EEXIST, mm.register_ops, first)
    mm.touch(BASE)
    assert [entry[0] for entry in log] == ["second", "first"]


def test_unregistering_what_is_not_there_is_einval(mm, log):
    ops = device(log, "a")
    fails(errno.EINVAL, mm.unregister_ops, ops)
    mm.register_ops(ops)
    mm.unregister_ops(ops)
    fails(errno.EINVAL, mm.unregister_ops, ops)
    assert log == []                # no release: that is for teardown


@pytest.mark.parametrize("gone", "abc")
def test_unregistering_keeps_the_order_of_the_others(mm, log, gone):
    pages(mm, 1)
    ops = {name: device(log, name, "update_page") for name in "abc"}
    for name in "abc":
        mm.register_ops(ops[name])
    mm.unregister_ops(ops[gone])
    mm.touch(BASE)
    assert [entry[0] for entry in log] == [name for name in "cba" if name != gone]
    mm.register_ops(ops[gone])      # comes back at the head
    mm.munmap(BASE, PAGE)
    del log[:]
    pages(mm, 1)
    mm.touch(BASE)
    assert log[0][0] == gone


def test_any_callback_may_be_missing(mm, log):
    mm.register_ops(ioproc.Ops(name="none at all"))
    mm.register_ops(device(log, "one", "invalidate_range"))
    mm.register_ops(ioproc.Ops(update_page=None))
    pages(mm, 2)
    mm.touch(BASE, PAGE, write=True)
    mm.mprotect(BASE, PAGE, RO)
    mm.munmap(BASE, 2 * PAGE)
    assert log == [("one", "invalidate_range", BASE, BASE + 2 * PAGE)]
    assert mm.stats["hooks"]["update_page"] == 1 and mm.stats["callbacks"]["update_page"] == 0
    assert mm.stats["chain_nodes"] == 3 * 3


def test_the_same_ops_on_several_address_spaces(mem, mm, log):
    other = ioproc.AddressSpace(mem)
    ops = device(log, "shared", "update_page", "release")
    mm.register_ops(ops)
    other.register_ops(ops)
    for space in (mm, other):
        pages(space, 1)
        space.touch(BASE)
    assert log == [("shared", "update_page", BASE)] * 2
    other.unregister_ops(ops)
    other.exit()
    assert len(log) == 2
    mm.exit()
    assert log[2:] == [("shared", "release")]


def test_the_child_of_fork_starts_empty(mm, log):
    pages(mm, 2)
    mm.touch(BASE, 2 * PAGE, write=True)
    mm.register_ops(device(log, "mm"))
    mm.register_ops(device(log, "vma"), BASE, PAGE)
    child = mm.fork()
    assert log == [("mm", "wrprotect_page", BASE), ("vma", "wrprotect_page", BASE), ("mm", "wrprotect_page", BASE + PAGE)]
    del log[:]
    child.touch(BASE, 2 * PAGE, write=True)
    child.munmap(BASE, PAGE)
    child.exit()
    assert log == []
    mm.touch(BASE, write=True)
    assert [entry[:2] for entry in log] == [("mm", "update_page"), ("vma", "update_page")]


# ---- release


def test_release_runs_newest_first_with_the_address_space(mm, log):
    seen = []
    for name in "abc":
        mm.register_ops(device(log, name, "release", also=seen.append))
    mm.exit()
    assert log == [(name, "release") for name in "cba"]
    assert seen == [mm] * 3


def test_release_unlinks_first(mm, log):
    """What is told is on no chain any more: each release is a walk of one cell."""
    pages(mm, 1)
    cells = []
    for name in "abc":
        ops = device(log, name, "release", also=lambda mm: cells.append(mm.stats["chain_nodes"]))
        mm.register_ops(ops)
        mm.register_ops(ops, BASE, PAGE)
    mm.exit()
    assert cells == [1, 2, 3]
    fails(errno.ESRCH, mm.unregister_ops, ops)


def test_teardown_fires_release_only(mm, log):
    pages(mm, 4)
    mm.touch(BASE, 4 * PAGE, write=True)
    mm.register_ops(device(log, "mm"))
    mm.register_ops(device(log, "vma"), BASE, 2 * PAGE)
    mm.exit()
    mm.exit()
    assert log == [("mm", "release"), ("vma", "release")]


def test_release_sees_the_pages_still_there(mm, log):
    pages(mm, 1)
    mm.touch(BASE, write=True)
    present = []
    mm.register_ops(ioproc.Ops(release=lambda mm: present.append((bool(mm.pagemap(BASE, 1)["present"][0]), len(mm.vmas())))))
    mm.exit()
    assert present == [(True, 1)]


def test_release_is_once_per_ops_and_address_space(mm, log):
    pages(mm, 6)
    both = device(log, "both", "release")
    mm.register_ops(both)
    mm.register_ops(both, BASE, PAGE)
    mm.register_ops(both, BASE + 3 * PAGE, 2 * PAGE)
    mm.exit()
    assert log == [("both", "release")]


def test_release_order_the_mm_chain_then_vma_only_ones_newest_first(mm, log):
    pages(mm, 6)
    ops = {name: device(log, name, "release") for name in ("v1", "m1", "v2", "m2", "v3")}
    for i, name in enumerate(ops):
        if name[0] == "m":
            mm.register_ops(ops[name])
        else:
            mm.register_ops(ops[name], BASE + i * PAGE, PAGE)
    mm.exit()
    assert [entry[0] for entry in log] == ["m2", "m1", "v3", "v2", "v1"]


def test_an_ops_whose_last_vma_went_gets_no_release(mm, log):
    pages(mm, 2)
    mm.register_ops(device(log, "gone", "release"), BASE, PAGE)
    mm.register_ops(device(log, "left", "release"), BASE, 2 * PAGE)
    mm.munmap(BASE, PAGE)
    mm.exit()
    assert log == [("left", "release")]


def test_release_at_the_end_of_with_and_of_the_last_reference(mem, log):
    with ioproc.AddressSpace(mem) as mm:
        mm.register_ops(device(log, "with", "release"))
    assert log == [("with", "release")]
    mm = ioproc.AddressSpace(mem)
    mm.register_ops(device(log, "del", "release"))
    del mm
    assert log[1:] == [("del", "release")]


def test_a_chain_keeps_its_ops_alive_no_longer_than_needed(mm, log):
    ops = device(log, "a", "update_page")
    gone = weakref.ref(ops)
    pages(mm, 1)
    mm.register_ops(ops)
    del ops
    gc.collect()
    assert gone() is not None
    mm.touch(BASE)
    assert log == [("a", "update_page", BASE)]
    mm.unregister_ops(gone())
    gc.collect()
    assert gone() is None


def test_an_address_space_and_its_ops_in_a_cycle_are_collected(mem, log):
    mm = ioproc.AddressSpace(mem)
    pages(mm, 1)
    mm.touch(BASE, write=True)
    mm.register_ops(device(log, "a", "release", also=lambda _, mm=mm: None))
    del mm
    gc.collect()
    assert log == [("a", "release")]
    assert mem.stats["frames_used"] == 0


# ---- the chains of VMAs


def test_attaching_splits_at_the_edges(mm, log):
    pages(mm, 6)
    ops = device(log, "a", "update_page", "invalidate_range")
    mm.register_ops(ops, BASE + 2 * PAGE, 2 * PAGE)
    assert layout(mm) == [(0, 2), (2, 4), (4, 6)]
    mm.touch(BASE, 6 * PAGE)
    assert log == [("a", "update_page", BASE + i * PAGE) for i in (2, 3)]
    del log[:]
    mm.munmap(BASE, 6 * PAGE)
    assert log == [("a", "invalidate_range", BASE + 2 * PAGE, BASE + 4 * PAGE)]     # clipped


def test_detaching_merges_again(mm, log):
    pages(mm, 6)
    ops = device(log, "a")
    mm.register_ops(ops, BASE + PAGE, 4 * PAGE)
    mm.unregister_ops(ops, BASE + 2 * PAGE, PAGE)
    assert layout(mm) == [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6)]
    mm.unregister_ops(ops, BASE, 6 * PAGE)
    assert layout(mm) == [(0, 6)]
    assert log == []                                    # neither split, merge nor (un)registering fires


def test_length_is_rounded_up_and_addr_must_be_a_page(mm, log):
    pages(mm, 3)
    ops = device(log, "a")
    mm.register_ops(ops, BASE, PAGE + 1)
    assert layout(mm) == [(0, 2), (2, 3)]
    for addr, length in ((BASE + 1, PAGE), (BASE, 0), (BASE, 1 << 60), ((1 << 47), PAGE)):
        fails(errno.EINVAL, mm.register_ops, device(log, "b"), addr, length)
        fails(errno.EINVAL, mm.unregister_ops, ops, addr, length)
    assert layout(mm) == [(0, 2), (2, 3)]


def test_the_same_ops_twice_on_one_chain_is_eexist_before_anything_changes(mm, log):
    pages(mm, 6)
    ops = device(log, "a")
    mm.register_ops(ops, BASE + 3 * PAGE, PAGE)
    before = layout(mm)
    fails(errno.EEXIST, mm.register_ops, ops, BASE + PAGE, 4 * PAGE)
    assert layout(mm) == before
    mm.register_ops(ops, BASE + PAGE, 2 * PAGE)         # beside it is fine, and merges with it
    assert layout(mm) == [(0, 1), (1, 4), (4, 6)]


def test_attaching_over_a_hole_is_enomem_after_the_vmas_before_it(mm, log):
    pages(mm, 2)
    pages(mm, 2, BASE + 3 * PAGE)
    ops = device(log, "a", "update_page")
    fails(errno.ENOMEM, mm.register_ops, ops, BASE + PAGE, 4 * PAGE)
    for page in (0, 1, 3, 4):
        mm.touch(BASE + page * PAGE)
    assert log == [("a", "update_page", BASE + PAGE)]
    fails(errno.ENOMEM, mm.register_ops, device(log, "b"), BASE + 2 * PAGE, 2 * PAGE)   # begins in the hole
    assert layout(mm) == [(0, 1), (1, 2), (3, 5)]


def test_a_hole_hides_the_eexist_behind_it(mm, log):
    pages(mm, 1)
    pages(mm, 1, BASE + 2 * PAGE)
    ops = device(log, "a", "update_page")
    mm.register_ops(ops, BASE + 2 * PAGE, PAGE)
    fails(errno.ENOMEM, mm.register_ops, ops, BASE, 3 * PAGE)
    mm.touch(BASE)
    assert log == [("a", "update_page", BASE)]


def test_detaching_skips_holes_and_vmas_without_it(mm, log):
    for at in (0, 2, 4):
        pages(mm, 1, BASE + at * PAGE)
    ops, other = device(log, "a", "update_page"), device(log, "b", "update_page")
    mm.register_ops(ops, BASE, PAGE)
    mm.register_ops(ops, BASE + 4 * PAGE, PAGE)
    mm.register_ops(other, BASE + 4 * PAGE, PAGE)
    fails(errno.EINVAL, mm.unregister_ops, ops, BASE + PAGE, 2 * PAGE)
    fails(errno.EINVAL, mm.unregister_ops, other, BASE, PAGE)
    mm.unregister_ops(ops, BASE, 5 * PAGE)
    fails(errno.EINVAL, mm.unregister_ops, ops, BASE, 5 * PAGE)
    mm.touch(BASE)
    mm.touch(BASE + 4 * PAGE)
    assert log == [("b", "update_page", BASE + 4 * PAGE)]


def test_the_placements_are_unregistered_apart(mm, log):
    pages(mm, 1)
    ops = device(log, "a", "update_page")
    mm.register_ops(ops, BASE, PAGE)
    fails(errno.EINVAL, mm.unregister_ops, ops)                     # only on the VMA
    mm.register_ops(ops)
    mm.touch(BASE)
    assert log == [("a", "update_page", BASE)] * 2                  # on both: called twice
    mm.unregister_ops(ops)
    fails(errno.EINVAL, mm.unregister_ops, ops)
    mm.touch(BASE, write=True)
    assert [entry[1] for entry in log[2:]] == ["update_page"]       # the zero page's COW, still on the VMA


def test_vmas_merge_only_if_their_chains_are_equal(mm, log):
    first, second = device(log, "a"), device(log, "b")
    pages(mm, 1)
    mm.register_ops(first, BASE, PAGE)
    pages(mm, 1, BASE + PAGE)                           # a new mapping takes no part
    assert layout(mm) == [(0, 1), (1, 2)]
    mm.register_ops(first, BASE + PAGE, PAGE)
    assert layout(mm) == [(0, 2)]
    mm.register_ops(second, BASE, PAGE)
    assert layout(mm) == [(0, 1), (1, 2)]
    mm.register_ops(second, BASE + PAGE, PAGE)
    assert layout(mm) == [(0, 2)]
    mm.unregister_ops(first, BASE, PAGE)
    mm.unregister_ops(second, BASE + PAGE, PAGE)
    mm.register_ops(first, BASE, PAGE)                  # a over b here ...
    mm.register_ops(second, BASE + PAGE, PAGE)          # ... b over a there: not equal
    assert layout(mm) == [(0, 1), (1, 2)]


def test_splits_carry_the_chain(mm, log):
    pages(mm, 3)
    mm.register_ops(device(log, "a", "update_page", "change_protection"), BASE, 3 * PAGE)
    mm.mprotect(BASE + PAGE, PAGE, RO)
    assert layout(mm) == [(0, 1), (1, 2), (2, 3)]
    assert log == [("a", "change_protection", BASE + PAGE, BASE + 2 * PAGE, RO)]
    del log[:]
    mm.touch(BASE, 3 * PAGE)
    assert log == [("a", "update_page", BASE + i * PAGE) for i in range(3)]


def test_a_moved_vma_takes_its_chain_along(mm, log):
    pages(mm, 2)
    pages(mm, 1, BASE + 2 * PAGE, prot=RO)
    mm.touch(BASE, 2 * PAGE, write=True)
    mm.register_ops(device(log, "a", "update_page", "invalidate_range"), BASE, 2 * PAGE)
    target = BASE + 0x100000
    mm.mremap(BASE, 2 * PAGE, 2 * PAGE, ioproc.MREMAP_MAYMOVE | ioproc.MREMAP_FIXED, target)
    old, new = (BASE, BASE + 2 * PAGE), (target, target + 2 * PAGE)
    assert [entry[2:] for entry in log] == [old, new, old]
    del log[:]
    mm.munmap(target, PAGE)
    assert log == [("a", "invalidate_range", target, target + PAGE)]


def test_growing_in_place_keeps_the_chain(mm, log):
    pages(mm, 1)
    mm.register_ops(device(log, "a", "update_page"), BASE, PAGE)
    assert mm.mremap(BASE, PAGE, 3 * PAGE, 0) == BASE
    mm.touch(BASE, 3 * PAGE)
    assert log == [("a", "update_page", BASE + i * PAGE) for i in range(3)]


def test_munmap_drops_the_attachment_silently(mm, log):
    pages(mm, 2)
    ops = device(log, "a")
    mm.register_ops(ops, BASE, PAGE)
    mm.munmap(BASE, PAGE)
    assert log == [("a", "invalidate_range", BASE, BASE + PAGE)]
    pages(mm, 1)
    mm.touch(BASE)
    assert len(log) == 1
    fails(errno.EINVAL, mm.unregister_ops, ops, BASE, 2 * PAGE)


def test_map_fixed_over_it_drops_the_attachment(mm, log):
    pages(mm, 1)
    mm.register_ops(device(log, "a"), BASE, PAGE)
    pages(mm, 1)
    mm.touch(BASE)
    assert log == [("a", "invalidate_range", BASE, BASE + PAGE)]


def test_registering_respects_max_map_count(mem, log):
    with ioproc.AddressSpace(mem, max_map_count=2) as mm:
        pages(mm, 3)
        ops = device(log, "a")
        fails(errno.ENOMEM, mm.register_ops, ops, BASE + PAGE, PAGE)    # would need three
        assert mm.stats["map_count"] <= 2
        mm.register_ops(device(log, "b"), BASE, 3 * PAGE)


# ---- both placements at once


def test_the_mm_chain_runs_first_and_whole_then_each_vma_clipped_in_order(mm, log):
    pages(mm, 2)
    pages(mm, 2, BASE + 3 * PAGE)
    mm.register_ops(device(log, "v1", "invalidate_range"), BASE + PAGE, PAGE)
    mm.register_ops(device(log, "m", "invalidate_range"))
    mm.register_ops(device(log, "v2", "invalidate_range"), BASE + 3 * PAGE, 2 * PAGE)
    mm.register_ops(device(log, "v3", "invalidate_range"), BASE + PAGE, PAGE)
    mm.munmap(BASE, 4 * PAGE)
    assert log == [
        ("m", "invalidate_range", BASE, BASE + 4 * PAGE),
        ("v3", "invalidate_range", BASE + PAGE, BASE + 2 * PAGE),
        ("v1", "invalidate_range", BASE + PAGE, BASE + 2 * PAGE),
        ("v2", "invalidate_range", BASE + 3 * PAGE, BASE + 4 * PAGE),
    ]


def test_page_hooks_go_to_both(mm, log):
    pages(mm, 1)
    mm.register_ops(device(log, "v", "invalidate_page", "update_page"), BASE, PAGE)
    mm.register_ops(device(log, "m", "invalidate_page", "update_page"))
    mm.touch(BASE)
    mm.touch(BASE, write=True)
    assert log == [("m", "update_page", BASE), ("v", "update_page", BASE),
                   ("m", "invalidate_page", BASE), ("v", "invalidate_page", BASE),
                   ("m", "update_page", BASE), ("v", "update_page", BASE)]


def test_what_callbacks_get(mm):
    got = []
    ops = ioproc.Ops(update_page=lambda *arguments: got.append(arguments),
                     change_protection=lambda *arguments: got.append(arguments),
                     sync_range=lambda *arguments: got.append(arguments))
    mm.register_ops(ops)
    file = ioproc.File(mm.mem, 8 * PAGE)
    mm.mmap(2 * PAGE, RW, mmap.MAP_SHARED | FIXED, addr=BASE, file=file, offset=4 * PAGE)
    mm.touch(BASE + 5)
    mm.msync(BASE, PAGE)
    mm.mprotect(BASE, PAGE, RO)
    (vma, addr), synced, protected = got
    assert addr == BASE
    assert (vma.start, vma.end, vma.prot, vma.flags, vma.offset, vma.shared) == (
        BASE, BASE + 2 * PAGE, RW, mmap.MAP_SHARED, 4 * PAGE, True)
    assert vma.file is file
    assert synced[1:] == (BASE, BASE + PAGE)
    assert protected[1:] == (BASE, BASE + PAGE, RO)
    assert protected[0].end == BASE + PAGE              # the VMA that survives the split


def test_before_and_after(mm):
    """invalidate, change_protection and wrprotect see the entries as they were, update as they are."""
    seen = []

    def look(hook):
        def callback(vma, addr, *rest):
            row = mm.pagemap(addr, 1)[0]
            seen.append((hook, bool(row["present"]), bool(row["writable"])))
        return callback

    mm.register_ops(ioproc.Ops(**{hook: look(hook) for hook in ioproc.HOOK_NAMES[1:]}))
    pages(mm, 1)
    mm.touch(BASE)                          # zero page
    mm.touch(BASE, write=True)              # copied
    child = mm.fork()
    child.exit()
    mm.touch(BASE, write=True)              # reused
    mm.mprotect(BASE, PAGE, RO)
    mm.madvise(BASE, PAGE, mmap.MADV_DONTNEED)
    assert seen == [
        ("update_page", True, False),
        ("invalidate_page", True, False), ("update_page", True, True),
        ("wrprotect_page", True, True),
        ("update_page", True, True),
        ("change_protection", True, True),
        ("invalidate_range", True, False),
    ]


def test_counting_ops_count_every_hook(mm):
    counting = ioproc.CountingOps(name="all")
    mm.register_ops(counting)
    mm.mmap(4 * PAGE, RW, PRIVATE | FIXED | ioproc.MAP_POPULATE, addr=BASE)
    mm.mprotect(BASE, PAGE, RO)
    mm.munmap(BASE, 4 * PAGE)
    mm.exit()
    expected = dict.fromkeys(ioproc.HOOK_NAMES, 0) | {
        "update_page": 4, "change_protection": 1, "invalidate_range": 1, "release": 1}
    assert counting.counts == expected
