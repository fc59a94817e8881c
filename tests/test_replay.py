"""Replay: what each event does, what counts as a difference, and that its counts are those of address spaces driven by hand."""
import dataclasses
import errno
import gc
import mmap
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ioproc
import ioproc.histories
from history import BASE, NONE, PAGE, PRIVATE, READ, RO, RW, SHARED, WRITE, History, page
from ioproc.trace import EVENT, REGISTRATION, Communication, Op, Trace, choose, import_recording, replay

DATA = Path(__file__).parent / "data"
SHIPPED = sorted(Path(list(ioproc.histories.__path__)[0]).glob("*.ioproc.xz"))
HOOKS = [name for name in ioproc.HOOK_NAMES if name != "release"]
NO_CALLS = dict.fromkeys(ioproc.HOOK_NAMES, 0)
DEVICE = ("mm", "vma")


class Watch:
    """A device that writes down what it is told: ``(hook, *addresses)``, and the VMAs of each process where it is told."""

    def __init__(self):
        self.log, self.layouts = [], []
        self.ops = ioproc.Ops(**{hook: self.called(hook) for hook in ioproc.HOOK_NAMES})

    def called(self, hook):
        def callback(first, *addresses):
            self.log.append((hook, *addresses))
            if hook == "release":
                self.layouts.append([((vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE, vma.prot) for vma in first.vmas()])
                self.mem = first.mem
        return callback


def watched(history, placement="mm", **options):
    """The hooks that a history fires, and the VMAs of each address space at its end."""
    watch = Watch()
    result = replay(history.trace(), placement=placement, ops=watch.ops, **options)
    assert result.differences == {}
    return [entry for entry in watch.log if entry[0] != "release"], watch.layouts


def differences(history, **options):
    return replay(history.trace(), **options).differences


def ranges(*entries):
    """Hooks with addresses in pages."""
    return [(hook, *(page(number) for number in numbers)) for hook, *numbers in entries]


# ---- each kind of event

def test_nothing():
    result = replay(History().trace())
    assert (result.events, result.calls, result.operations, result.differences) == (0, 0, {}, {})
    assert np.isnan(result.ns_per_event)
    assert np.isnan(result.useful_share)


def test_mmap_imposes_the_address_and_replaces_what_is_there():
    history = History().mmap(0, 4).fault(1).mmap(1, 2, RO)
    assert watched(history) == (ranges(("update_page", 1), ("invalidate_range", 1, 3)), [[(0, 1, RW), (1, 3, RO), (3, 4, RW)]])


def test_an_imposed_address_needs_no_fixed_flag_and_noreplace_is_past():
    history = History().mmap(0, 4).mmap(0, 4, RO, PRIVATE | ioproc.MAP_FIXED_NOREPLACE)
    assert watched(history)[1] == [[(0, 4, RO)]]


def test_map_is_what_execve_mapped():
    history = History().exec().add(Op.MAP, addr=page(3), length=2 * PAGE, prot=RO, flags=PRIVATE, origin=1)
    hooks, layouts = watched(history)
    assert (hooks, layouts) == ([], [[(3, 5, RO)]])
    assert replay(history.trace()).inferred == {"events": 1, "access": 0, "file": 0, "size": 0}


def test_munmap():
    history = History().mmap(0, 4).munmap(1, 1).munmap(8, 1)
    assert watched(history) == (ranges(("invalidate_range", 1, 2)), [[(0, 1, RW), (2, 4, RW)]])


def test_mprotect():
    history = History().mmap(0, 4).mprotect(1, 1, RO).mprotect(3, 2, RO, errno=errno.ENOMEM)
    hooks, layouts = watched(history)
    assert hooks == [("change_protection", page(1), page(2), RO), ("change_protection", page(3), page(4), RO)]
    assert layouts == [[(0, 1, RW), (1, 2, RO), (2, 3, RW), (3, 4, RO)]]


def test_mremap_moves_grows_and_shrinks():
    history = (History().mmap(0, 4).fault(0)
               .mremap(0, 4, 6)                         # grows where it is
               .mremap(0, 6, 6, to=16)                  # moves to where it moved
               .fault(16)                               # present: it went along
               .mremap(16, 6, 2))                       # shrinks
    watch = Watch()
    result = replay(history.trace(), placement="mm", ops=watch.ops)
    assert watch.log == [*ranges(("update_page", 0), ("invalidate_range", 0, 6), ("invalidate_range", 16, 22),
                                 ("invalidate_range", 0, 6), ("invalidate_range", 18, 22)), ("release",)]
    assert watch.layouts == [[(16, 18, RW)]]
    assert result.differences == {"fault": {"present": 1}}


def test_a_move_that_chance_let_stay_is_imposed():
    """The model has room behind the mapping, the machine had none: it moves all the same."""
    assert watched(History().mmap(0, 2).mremap(0, 2, 4, to=9))[1] == [[(9, 13, RW)]]


def test_a_failed_mremap_changes_nothing():
    history = History().mmap(0, 8).mremap(0, 8, 4, to=1, flags=3, errno=errno.EINVAL).mremap(20, 1, 2, errno=errno.EFAULT)
    assert watched(history) == ([], [[(0, 8, RW)]])


def test_brk():
    history = (History().brk(0, page(0))                # where the heap begins
               .brk(page(4)).brk(page(2)).brk(page(99), page(2))    # grows, shrinks, is refused
               .brk(0, page(2)).fault(1))
    assert watched(history) == (ranges(("invalidate_range", 2, 4), ("update_page", 1)), [[(0, 2, RW)]])


def test_a_heap_begins_anew_after_exec():
    history = History().brk(0, page(0)).brk(page(2)).exec().brk(0, page(50)).brk(page(51))
    assert watched(history)[1] == [[(0, 2, RW)], [(50, 51, RW)]]


def test_madvise_and_msync():
    history = (History().mmap(0, 2).mmap(2, 2, flags=SHARED).fault(0).madvise(0, 2).fault(0)
               .add(Op.MSYNC, addr=page(0), length=4 * PAGE, arg=ioproc.MS_SYNC)
               .add(Op.MSYNC, addr=page(8), length=PAGE, arg=ioproc.MS_SYNC, errno=errno.ENOMEM))
    assert watched(history)[0] == ranges(("update_page", 0), ("invalidate_range", 0, 2), ("update_page", 0), ("sync_range", 2, 4))


def test_fork_copies_and_breaks():
    history = (History().mmap(0, 2).faults(0, 2).fork(2)
               .fault(0)                                # the parent breaks one page
               .fault(0, pid=2)                         # the child's is its own now
               .fault(1, READ, pid=2))                  # present: fork copied it
    watch = Watch()
    result = replay(history.trace(), placement="mm", ops=watch.ops)
    assert watch.log[:-2] == ranges(("update_page", 0), ("update_page", 1), ("wrprotect_page", 0), ("wrprotect_page", 1),
                                    ("invalidate_page", 0), ("update_page", 0), ("update_page", 0))
    assert result.faults == {"zero": 0, "anon": 2, "file": 0, "reuse": 1, "cow": 1, "swap": 0}
    assert result.differences == {"fault": {"present": 1}}
    assert (result.address_spaces, result.registrations, result.vmas_peak) == (2, 2, 2)


def test_a_failed_fork_or_exec_is_skipped():
    history = History().mmap(0, 1).fork(2, errno=errno.EAGAIN).vfork(2, errno=errno.EAGAIN).exec(errno=errno.ENOENT)
    result = replay(history.trace())
    assert result.differences == {"fork": {"skipped": 1}, "vfork": {"skipped": 1}, "exec": {"skipped": 1}}
    assert (result.address_spaces, result.disagreement, result.first_differing) == (1, 0, [])


def test_a_vfork_child_uses_its_parents_memory_until_exec():
    history = (History().mmap(0, 4).vfork(2)
               .fault(0, pid=2).munmap(3, 1, pid=2)     # the parent's
               .exec(pid=2).mmap(0, 1, RO, pid=2)       # its own
               .fault(1))
    assert watched(history) == (ranges(("update_page", 0), ("invalidate_range", 3, 4), ("update_page", 1)),
                                [[(0, 3, RW)], [(0, 1, RO)]])


def test_a_vfork_child_that_exits_leaves_its_parents_memory():
    assert watched(History().mmap(0, 1).vfork(2).exit(pid=2).fault(0)) == (ranges(("update_page", 0)), [[(0, 1, RW)]])


@pytest.mark.parametrize("placement", ["none", "mm", "vma"])
@pytest.mark.parametrize("end", [lambda h: h.exit(), lambda h: h.exec(), lambda h: h.fork(1, pid=2)],
                         ids=["exit", "exec", "reused"])
def test_a_vfork_child_outlives_its_parent(placement, end):
    """Another thread of the parent may be killed or call exec; the child keeps the memory."""
    history = end(History().mmap(0, 4).comm(0, 1).vfork(2)).fault(1, pid=2).munmap(0, 4, pid=2)
    result = replay(history.trace(), placement=placement)
    assert result.differences == {}
    assert result.faults["anon"] == 1


@pytest.mark.parametrize("placement", DEVICE)
@pytest.mark.parametrize("end", [lambda h: h.exit(pid=2), lambda h: h.exec(pid=2)], ids=["exit", "exec"])
def test_what_a_vfork_child_registers_is_its_parents(placement, end):
    """It stays registered when the child is gone; two forks later its memory may not be taken for anything else."""
    history = end(History().mmap(0, 8).vfork(2).comm(2, 2, pid=2)).fork(3).fork(4).fault(2).comm(6, 1).munmap(0, 8)
    result = replay(history.trace(), placement=placement)
    assert result.useful == NO_CALLS | {"update_page": 1, "invalidate_range": {"mm": 1, "vma": 2}[placement]}
    assert result.registered_peak == 3 * PAGE


def test_a_pid_is_used_again():
    history = History().mmap(0, 1).fork(2).mmap(1, 1, pid=2).fork(2).fault(0, pid=2).exit(pid=2).mmap(4, 1, pid=2)
    assert sorted(watched(history)[1]) == [[(0, 1, RW)], [(0, 1, RW)], [(0, 2, RW)], [(4, 5, RW)]]


@pytest.mark.parametrize("op", [Op.FORK, Op.VFORK])
def test_nobody_is_its_own_child(op):
    assert differences(History().mmap(0, 1).add(op, arg=1).fault(0)) == {op.name.lower(): {"result": 1}}


def test_shared_memory_segments():
    history = (History(3 * PAGE).add(Op.SHMAT, file=0, ret=page(0), length=3 * PAGE).fault(1)
               .fork(2).fault(1, pid=2)                 # refaulted, the same frame
               .add(Op.SHMDT, addr=page(0)).add(Op.SHMDT, addr=page(0), errno=errno.EINVAL))
    hooks, layouts = watched(history)
    assert hooks == ranges(("update_page", 1), ("update_page", 1), ("invalidate_range", 0, 3))
    assert sorted(layouts) == [[], [(0, 3, RW)]]


def test_a_segment_attached_to_be_read():
    history = History(PAGE).add(Op.SHMAT, file=0, ret=page(0), length=PAGE, flags=0o10000)
    assert watched(history)[1] == [[(0, 1, RO)]]
    assert differences(history.fault(0)) == {"fault": {"denied": 1}}


def test_faults_read_write_and_unknown():
    history = History().mmap(0, 3).mmap(3, 1, RO).fault(0, READ).fault(1, WRITE).fault(2, 0).fault(3, 0)
    result = replay(history.trace())
    assert result.faults == {"zero": 2, "anon": 2, "file": 0, "reuse": 0, "cow": 0, "swap": 0}
    assert (result.guessed, result.differences) == (2, {})


def test_locked_memory():
    """mlock populates; MLOCK_ONFAULT, a flag of mlock2, does not, and memory unlocked again may be forgotten."""
    history = History().mmap(0, 8).add(Op.MLOCK, addr=page(0) + 1, length=PAGE).add(Op.MLOCK, addr=page(4), length=PAGE, flags=1)
    history.madvise(0, 1, errno=errno.EINVAL).madvise(4, 1, errno=errno.EINVAL).add(Op.MUNLOCK, addr=page(0), length=8 * PAGE)
    result = replay(history.madvise(0, 8).add(Op.MLOCK, addr=page(8), length=1, errno=errno.ENOMEM).trace(), placement="mm")
    assert (result.faults["anon"], result.differences) == (2, {})
    assert result.callbacks == NO_CALLS | {"update_page": 2, "invalidate_range": 1, "release": 1}


def test_files_are_shared_by_all_processes():
    history = (History(2 * PAGE).mmap(0, 2, RW, mmap.MAP_SHARED, file=0).fault(0)
               .mmap(0, 2, RW, mmap.MAP_PRIVATE, file=0, pid=2).fault(0, READ, pid=2).fault(0, WRITE, pid=2))
    result = replay(history.trace(), placement="mm")
    assert result.faults == {"zero": 0, "anon": 0, "file": 2, "reuse": 0, "cow": 1, "swap": 0}
    assert result.callbacks == NO_CALLS | {"update_page": 3, "invalidate_page": 1, "release": 2}


def test_a_process_that_is_unknown_begins_empty():
    assert replay(History().exit(pid=5).fault(0, pid=6).trace()).differences == {"fault": {"unmapped": 1}}


# ---- differences

@pytest.mark.parametrize(("history", "expected"), [
    (History().munmap(0, 1, errno=errno.EINVAL), {"munmap": {"result": 1}}),
    (History().mprotect(0, 1, RO), {"mprotect": {"result": 1}}),
    (History().mmap(0, 1).mremap(0, 1, 2, errno=errno.ENOMEM), {"mremap": {"result": 1}}),
    (History().add(Op.MMAP, ret=page(0) + 1, length=PAGE, prot=RW, flags=PRIVATE), {"mmap": {"result": 1}}),
    (History().brk(0, page(0)).brk(0, page(1)), {"brk": {"result": 1}}),
    (History().fault(0), {"fault": {"unmapped": 1}}),
    (History().mmap(0, 1, RO).fault(0, WRITE), {"fault": {"denied": 1}}),
    (History().mmap(0, 1, NONE).fault(0, READ), {"fault": {"denied": 1}}),
    (History().mmap(0, 1).fault(0).fault(0, READ), {"fault": {"present": 1}}),
    (History(PAGE).mmap(0, 2, RO, mmap.MAP_SHARED, file=0).fault(1, READ), {"fault": {"beyond": 1}}),
    (History().mmap(0, 1).madvise(0, 1, 12), {"madvise": {"unmodelled": 1}}),           # MADV_MERGEABLE
    (History().mmap(0, 1, errno=errno.ENODEV), {"mmap": {"skipped": 1}}),
    (History().add(Op.SHMAT, file=-1, errno=errno.EINVAL), {"shmat": {"skipped": 1}}),
])
def test_classes_of_differences(history, expected):
    result = replay(history.trace())
    assert result.differences == expected
    skipped = "skipped" in next(iter(expected.values()))
    assert result.first_differing == ([] if skipped else [len(history.rows) - 1])
    assert result.disagreement == (0 if skipped else 1 / len(history.rows))


def test_what_fails_as_recorded_is_no_difference():
    history = (History().munmap(0, 0, errno=errno.EINVAL).mprotect(0, 1, RO, errno=errno.ENOMEM)
               .madvise(0, 1, errno=errno.ENOMEM).add(Op.SHMDT, addr=page(0), errno=errno.EINVAL))
    assert differences(history) == {}


def test_what_reaches_into_other_address_spaces_or_keeps_the_old_place():
    history = (History(8 * PAGE).mmap(0, 8, RW, mmap.MAP_SHARED, file=0).mmap(0, 8, RW, mmap.MAP_SHARED, file=0, pid=2)
               .faults(0, 8).faults(0, 8, READ, pid=2)
               .madvise(2, 4, mmap.MADV_REMOVE).fault(2, READ).fault(5, READ, pid=2)
               .mmap(16, 4).faults(16, 2).mremap(16, 4, 4, to=32, flags=5).fault(16)
               .madvise(32, 4, ioproc.MADV_POPULATE_WRITE).madvise(32, 4, ioproc.MADV_WIPEONFORK).fork(3).fault(32, pid=3)
               .mmap(400, 1, flags=PRIVATE | ioproc.MAP_GROWSDOWN).fault(396).madvise(0, 4, mmap.MADV_REMOVE))
    result = replay(history.trace(), placement="mm")
    assert result.differences == {}
    assert result.callbacks["invalidate_range"] == 2 + 3 + 2          # REMOVE in two processes, in three; a move
    assert result.faults["anon"] == 2 + 1 + 2 + 1 + 1


def test_what_stays_mapped_stays_a_buffer():
    history = (History().mmap(0, 2).comm(0, 2).mremap(0, 2, 2, to=8, flags=5).madvise(0, 2).madvise(8, 2).munmap(8, 2)
               .madvise(0, 2))
    result = replay(history.trace(), placement="vma")
    assert result.differences == {}
    assert result.callbacks["invalidate_range"] == 2 + 2 + 1 + 1
    assert result.useful["invalidate_range"] == result.callbacks["invalidate_range"] - 1     # of the move, at the new place


def test_the_first_differing_events_are_told_and_all_are_counted():
    result = replay(History().faults(0, 100).trace())
    assert result.differences == {"fault": {"unmapped": 100}}
    assert result.first_differing == list(range(64))
    assert result.disagreement == 1


def test_events_from_nowhere_do_no_harm():
    """A file is checked when it is loaded; an array made by hand may hold anything."""
    random = np.random.default_rng(1)
    odd = np.array([0, PAGE, BASE, BASE + PAGE, BASE + 1, 2**47 - PAGE, 2**64 - PAGE, 2**64 - 1], np.uint64)
    for _ in range(20):
        events = np.zeros(400, EVENT)
        events["pid"] = random.integers(1, 4, 400)
        events["op"] = random.integers(0, 24, 400)
        events["arg"] = random.choice(np.array([0, 1, 2, 3, PAGE, 2**64 - 1, 2**63], np.uint64), 400)
        events["access"], events["errno"] = random.integers(0, 4, 400), random.choice([0, 0, 0, 12], 400)
        events["prot"], events["flags"] = random.integers(0, 8, 400), random.choice([0x22, 0x21, 1, 2, 3, 2**32 - 1], 400)
        events["file"] = random.integers(-2, 4, 400)
        for name in ("addr", "length", "ret"):
            events[name] = random.choice(odd, 400)
        for placement in ("none", "mm", "vma"):
            replay(Trace(events, {"files": [{"size": 2 * PAGE}] * 2}), placement=placement, frames=4096)


# ---- what communicates

@pytest.mark.parametrize("placement", DEVICE)
def test_useful_calls(placement):
    history = (History().mmap(0, 8).comm(2, 2)
               .faults(0, 8)                            # 2 of 8
               .mprotect(2, 3, RO)                      # 1 of 1
               .munmap(2, 2)                            # 1 of 1, and no more
               .mmap(2, 2).faults(2, 2))                # no part of it
    result = replay(history.trace(), placement=placement)
    assert result.useful == NO_CALLS | {"update_page": 2, "change_protection": 1, "invalidate_range": 1}
    assert result.calls == {"mm": 12, "vma": 4}[placement]
    assert result.useful_share == 4 / result.calls
    assert result.callbacks["release"] == {"mm": 1, "vma": 0}[placement]
    assert (result.registrations, result.registered_peak) == (1, 2 * PAGE)
    assert result.vmas_peak == {"mm": 3, "vma": 4}[placement]
    assert result.chain_nodes == result.calls + result.callbacks["release"]


def test_without_a_device_nothing_is_called():
    result = replay(History().mmap(0, 8).comm(2, 2).faults(0, 8).trace())
    assert (result.calls, result.registrations, result.vmas_peak, result.chain_nodes) == (0, 0, 1, 0)
    assert np.isnan(result.useful_share)


def plan(*rows):
    rows = np.array([(event, page(at), pages * PAGE) for event, at, pages in rows], REGISTRATION)
    return Communication(rows, "buffers", 0.5, 0, 0)


def test_a_plan_is_carried_out_after_its_event():
    history = History().mmap(0, 8).faults(0, 2).mprotect(0, 1, RO).fault(4).fault(5)
    result = replay(history.trace(), placement="vma", communication=plan((1, 0, 1), (4, 4, 4)))
    assert result.callbacks == NO_CALLS | {"change_protection": 1, "update_page": 1, "release": 1}
    assert (result.registrations, result.registered_peak, result.useful_share) == (2, 5 * PAGE, 1)


def test_a_plan_for_an_event_that_went_otherwise_is_dropped():
    result = replay(History().mmap(0, 1, errno=errno.ENOMEM).mmap(8, 1).trace(), placement="vma", communication=plan((0, 0, 1)))
    assert (result.registrations, result.register_failures, result.registered_peak) == (0, 0, 0)


def test_a_plan_where_nothing_is_mapped_is_a_failure():
    result = replay(History().mmap(0, 1).trace(), placement="vma", communication=plan((0, 4, 1), (0, 0, 2)))
    assert (result.registrations, result.register_failures) == (0, 2)


@pytest.mark.parametrize(("array", "error"), [
    (np.zeros(1, EVENT), TypeError),
    (np.zeros((1, 1), REGISTRATION), TypeError),
    (np.array([(2, BASE, PAGE), (1, BASE, PAGE)], REGISTRATION), ValueError),
])
def test_a_plan_that_is_none(array, error):
    with pytest.raises(error, match="communication.plan"):
        replay(History().trace(), communication=Communication(array, "buffers", 1, 0, 0))


@pytest.mark.parametrize("placement", DEVICE)
def test_memory_is_registered_once(placement):
    """A second message from a registered buffer registers nothing, one that reaches further only what is new."""
    history = History().mmap(0, 8).comm(2, 2).comm(2, 1).comm(1, 4).faults(0, 8).comm(0, 0)
    result = replay(history.trace(), placement=placement)
    assert (result.useful["update_page"], result.registered_peak, result.register_failures) == (4, 4 * PAGE, 0)
    assert result.registrations == {"mm": 1, "vma": 3}[placement]


@pytest.mark.parametrize("placement", DEVICE)
def test_registered_memory_moves_and_grows_with_its_mapping(placement):
    history = (History().mmap(0, 4).comm(0, 4).mremap(0, 4, 8, to=32).faults(32, 8).munmap(34, 2).mremap(36, 4, 1)
               .fault(36, READ))
    result = replay(history.trace(), placement=placement)
    assert result.useful["update_page"] == 8
    assert result.registered_peak == 8 * PAGE
    assert result.callbacks["invalidate_range"] == 5
    assert result.useful["invalidate_range"] == 4       # the new place is not registered before the move


def test_detached_segments_communicate_no_more():
    history = (History(4 * PAGE).add(Op.SHMAT, file=0, ret=page(0), length=4 * PAGE).comm(0, 4).add(Op.SHMDT, addr=page(0))
               .mmap(8, 4).comm(8, 4))
    assert replay(history.trace(), placement="mm").registered_peak == 4 * PAGE


def test_a_child_registers_for_itself():
    history = History().mmap(0, 2).comm(0, 1).faults(0, 2).fork(2).fault(0, pid=2)
    results = {placement: replay(history.trace(), placement=placement) for placement in DEVICE}
    assert results["mm"].callbacks == NO_CALLS | {"update_page": 3, "invalidate_page": 1, "wrprotect_page": 2, "release": 2}
    assert results["mm"].useful == NO_CALLS | {"update_page": 1, "wrprotect_page": 1}
    assert results["vma"].callbacks == NO_CALLS | {"update_page": 1, "wrprotect_page": 1, "release": 1}


def test_communication_outside_user_space_is_a_failure():
    history = History().mmap(0, 1)
    for addr, length in ((2**64 - PAGE, 2 * PAGE), (BASE, 2**64 - 1), (2**47 - PAGE, PAGE), (2**63, 1)):
        history.add(Op.COMM, addr=addr, length=length)
    result = replay(history.munmap(0, 1).trace(), placement="vma")
    assert (result.registrations, result.register_failures, result.registered_peak, result.calls) == (0, 4, 0, 0)


def test_vmas_of_a_child_that_exits_at_once():
    assert replay(History().mmap(0, 1).mmap(2, 1).fork(2).exit(pid=2).trace()).vmas_peak == 4


# ---- the same by hand

class Hand:
    """Drives address spaces through their Python interface, writes down the history of it, and counts in sets of pages."""

    def __init__(self, placement):
        self.history = History()
        self.placement = placement
        self.mem = ioproc.PhysicalMemory(4096)
        self.log, self.useful = [], NO_CALLS.copy()
        self.differences = {}
        self.ops = ioproc.Ops(**{hook: self.called(hook) for hook in ioproc.HOOK_NAMES})
        self.spaces, self.registered = {}, {}
        self.registrations = self.register_failures = 0
        self.registered_peak = self.vmas_peak = 0
        self.pid = 1
        self.begin(1, ioproc.AddressSpace(self.mem))

    def called(self, hook):
        def callback(first, *addresses):
            if hook == "release":
                self.log.append((hook,))
                return
            self.log.append((hook, first.start, first.end, first.prot, *addresses))
            end = addresses[1] if len(addresses) > 1 else addresses[0] + PAGE
            touched = set(range((addresses[0] - BASE) // PAGE, (end - BASE) // PAGE))
            self.useful[hook] += bool(touched & self.registered[self.pid])
        return callback

    def begin(self, pid, mm):
        self.spaces[pid], self.registered[pid] = mm, set()
        if self.placement == "mm":
            mm.register_ops(self.ops)
            self.registrations += 1

    def differs(self, op, kind):
        row = self.differences.setdefault(op, {})
        row[kind] = row.get(kind, 0) + 1

    def call(self, method, *arguments):
        """errno of a system call."""
        try:
            getattr(self.spaces[self.pid], method)(*arguments)
        except OSError as error:
            return error.errno
        return 0

    def map(self, at, pages, prot, flags):
        self.spaces[self.pid].mmap(pages * PAGE, prot, flags | ioproc.MAP_FIXED, addr=page(at))
        self.registered[self.pid] -= set(range(at, at + pages))
        self.history.mmap(at, pages, prot, flags, pid=self.pid)

    def unmap(self, at, pages):
        self.history.munmap(at, pages, pid=self.pid, errno=self.call("munmap", page(at), pages * PAGE))
        self.registered[self.pid] -= set(range(at, at + pages))

    def protect(self, at, pages, prot):
        self.history.mprotect(at, pages, prot, pid=self.pid, errno=self.call("mprotect", page(at), pages * PAGE, prot))

    def discard(self, at, pages):
        self.history.madvise(at, pages, pid=self.pid,
                             errno=self.call("madvise", page(at), pages * PAGE, mmap.MADV_DONTNEED))

    def move(self, at, pages, new_pages, to):
        flags = ioproc.MREMAP_MAYMOVE | ioproc.MREMAP_FIXED
        number = self.call("mremap", page(at), pages * PAGE, new_pages * PAGE, flags, page(to))
        self.history.mremap(at, pages, new_pages, to, pid=self.pid, flags=flags, errno=number)
        if number == 0:
            registered = self.registered[self.pid]
            moved = {one - at + to for one in registered if at <= one < at + min(pages, new_pages)}
            grown = set(range(to + pages, to + new_pages)) if at + pages - 1 in registered else set()
            registered -= set(range(at, at + pages)) | set(range(to, to + new_pages))
            registered |= moved | grown

    def touch(self, at, write):
        mm = self.spaces[self.pid]
        self.history.fault(at, WRITE if write else READ, pid=self.pid)
        try:
            if not mm.touch(page(at), 1, write):
                self.differs("fault", "present")
        except ioproc.SegmentationFault:
            mapped = any(vma.start <= page(at) < vma.end for vma in mm.vmas())
            self.differs("fault", "denied" if mapped else "unmapped")

    def communicate(self, at, pages):
        self.history.comm(at, pages, pid=self.pid)
        registered = self.registered[self.pid]
        new = [one for one in range(at, at + pages) if one not in registered]
        runs = np.split(new, np.flatnonzero(np.diff(new) > 1) + 1) if new else []
        for run in runs if self.placement == "vma" else []:
            if self.call("register_ops", self.ops, page(int(run[0])), len(run) * PAGE):
                self.register_failures += 1
            else:
                self.registrations += 1
        registered |= set(new)

    def fork(self):
        child = max(self.spaces) + 1
        self.history.fork(child, pid=self.pid)
        self.begin(child, self.spaces[self.pid].fork())

    def exit(self):
        if len(self.spaces) > 1:
            self.history.exit(pid=self.pid)
            self.spaces.pop(self.pid).exit()
            del self.registered[self.pid]

    def run(self, steps):
        for process, (name, *arguments) in steps:
            self.pid = sorted(self.spaces)[process % len(self.spaces)]
            getattr(self, name)(*arguments)
            self.registered_peak = max(self.registered_peak, PAGE * sum(map(len, self.registered.values())))
            self.vmas_peak = max(self.vmas_peak, sum(len(mm.vmas()) for mm in self.spaces.values()))
        for _, mm in sorted(self.spaces.items()):
            mm.exit()


at = st.integers(0, 23)
few = st.integers(1, 8)
prots = st.sampled_from([RW, RW, RO, NONE])
STEPS = st.lists(st.tuples(st.integers(0, 2), st.one_of(
    st.tuples(st.just("map"), at, few, prots, st.sampled_from([PRIVATE, PRIVATE, SHARED])),
    st.tuples(st.just("unmap"), at, few),
    st.tuples(st.just("protect"), at, few, prots),
    st.tuples(st.just("discard"), at, few),
    st.tuples(st.just("move"), at, few, few, at),
    st.tuples(st.just("touch"), at, st.booleans()),
    st.tuples(st.just("touch"), at, st.booleans()),
    st.tuples(st.just("communicate"), at, few),
    st.tuples(st.just("communicate"), at, few),
    st.tuples(st.just("fork")),
    st.tuples(st.just("exit")),
)), max_size=40)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, placement=st.sampled_from(DEVICE))
def test_replay_does_what_is_done_by_hand(steps, placement):
    hand = Hand(placement)
    hand.run([(0, ("map", 0, 16, RW, PRIVATE)), *steps])
    trace = hand.history.trace()

    log = []
    ops = ioproc.Ops(**{hook: lambda first, *addresses, hook=hook: log.append(
        (hook, first.start, first.end, first.prot, *addresses) if addresses else (hook,)) for hook in ioproc.HOOK_NAMES})
    replay(trace, placement=placement, ops=ops)
    assert log == hand.log

    result = replay(trace, placement=placement)
    calls = NO_CALLS.copy()
    for hook, *_ in hand.log:
        calls[hook] += 1
    assert result.callbacks == calls
    assert result.useful == hand.useful
    assert result.calls == sum(calls[hook] for hook in HOOKS)
    assert result.differences == hand.differences
    for name in ("registrations", "register_failures", "registered_peak", "vmas_peak"):
        assert getattr(result, name) == getattr(hand, name), name


# A set of ranges, seen through the only thing that reads it: which of the calls are useful.
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "add", "remove"]), st.integers(0, 255), st.integers(1, 64)), max_size=60))
def test_regions_are_a_set_of_pages(changes):
    history, pages, peak = History().mmap(0, 320), set(), 0
    for change, first, count in changes:
        several = set(range(first, first + count))
        if change == "add":
            history.comm(first, count)
            pages |= several
        else:
            history.munmap(first, count).mmap(first, count)
            pages -= several
        peak = max(peak, len(pages))
    history.munmap(0, 320).mmap(0, 320)                 # ... until here, hence once more:
    before = replay(history.trace(), placement="mm")
    asked = History()
    asked.rows = history.rows[:-2]
    asked.faults(0, 320)
    result = replay(asked.trace(), placement="mm")
    assert result.useful["update_page"] == len(pages)
    assert before.registered_peak == result.registered_peak == peak * PAGE
    assert replay(asked.trace(), placement="vma").callbacks["update_page"] == len(pages)


# ---- the caller's device

def test_a_device_of_ones_own():
    counting = ioproc.CountingOps()
    history = History().mmap(0, 8).comm(2, 2).faults(0, 8)
    result = replay(history.trace(), placement="vma", ops=counting)
    assert counting.counts == result.callbacks == NO_CALLS | {"update_page": 2, "release": 1}
    assert result.useful == NO_CALLS
    assert np.isnan(result.useful_share)


@pytest.mark.parametrize("placement", DEVICE)
def test_python_and_native_devices_are_called_alike(placement):
    history = History().mmap(0, 8).comm(2, 4).faults(0, 8).fork(2).comm(3, 1, pid=2).faults(0, 8, pid=2).mprotect(2, 3, RO)
    watch, native = Watch(), ioproc.CountingOps()
    results = [replay(history.trace(), placement=placement, ops=ops) for ops in (watch.ops, native, None)]
    assert results[0].callbacks == results[1].callbacks == results[2].callbacks == native.counts
    assert len(watch.log) == sum(native.counts.values())


def fail(*arguments):
    raise ZeroDivisionError("in the device")


def test_a_callback_that_raises_stops_the_replay_after_its_event():
    seen = []

    def update(vma, addr):
        seen.append(addr)
        if addr == page(2):
            fail()
    with pytest.raises(ZeroDivisionError) as caught:
        replay(History().mmap(0, 8).faults(0, 8).trace(), placement="mm", ops=ioproc.Ops(update_page=update))
    assert seen == [page(0), page(1), page(2)]
    assert any("event 3" in note for note in caught.value.__notes__)
    replay(History().mmap(0, 8).trace())                # nothing is left of it


def test_a_callback_that_raises_at_the_end():
    with pytest.raises(ZeroDivisionError) as caught:
        replay(History().mmap(0, 8).trace(), placement="mm", ops=ioproc.Ops(release=fail))
    assert "exited" in caught.value.__notes__[0]


def test_a_callback_may_look_and_may_not_replay():
    trace = History().mmap(0, 8).fault(0).trace()
    looks = []

    def update(vma, addr):
        looks.append(vma.end - vma.start)
        replay(trace)
    with pytest.raises(RuntimeError, match="may not change"):
        replay(trace, placement="mm", ops=ioproc.Ops(update_page=update))
    assert looks == [8 * PAGE]


def test_what_a_callback_keeps_is_dead_afterwards():
    kept = []
    replay(History().mmap(0, 8).fork(2).exit(pid=2).trace(), placement="mm", ops=ioproc.Ops(release=kept.append))
    assert len(kept) == 2
    for mm in kept:
        with pytest.raises(OSError, match="No such process"):
            mm.mmap(PAGE)
        assert mm.mem.stats["frames_used"] == 0


# ---- limits

@pytest.mark.parametrize("placement", DEVICE)
def test_out_of_frames(placement):
    history = History(8 * PAGE).mmap(0, 8, RW, mmap.MAP_SHARED, file=0).comm(0, 4).faults(0, 3).mmap(16, 8).faults(16, 8)
    watch = Watch()
    with pytest.raises(MemoryError, match="event 12"):      # pages of the file went first
        replay(history.trace(), placement=placement, ops=watch.ops, frames=6)
    gc.collect()
    assert watch.mem.stats["frames_used"] == 0
    with pytest.raises(MemoryError, match="event 12"):
        replay(history.trace(), frames=6)
    assert replay(history.trace(), frames=11).differences == {}


def test_out_of_frames_and_a_callback_that_raises():
    with pytest.raises(MemoryError, match="event 2") as caught:
        replay(History().mmap(0, 2).faults(0, 2).trace(), placement="mm", ops=ioproc.Ops(release=fail), frames=1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with ioproc.AddressSpace(ioproc.PhysicalMemory(4)) as mm:
        mm.mmap(PAGE)                                   # nothing is pending


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"placement": "nowhere"}, ValueError, "nowhere"),
    ({"placement": None}, ValueError, "None"),
    ({"communication": 0.5}, TypeError, "choose"),
    ({"ops": print}, TypeError, "not an Ops"),
    ({"frames": 0}, ValueError, "frames"),
    ({"frames": "many"}, TypeError, "frames"),
])
def test_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        replay(History().trace(), **options)


def test_a_path_is_no_history():
    with pytest.raises(TypeError, match="trace = 'file'"):
        replay("file")


def test_the_gil_is_released():
    """Between two callbacks, another thread runs although nobody would take the GIL away."""
    events = np.zeros(400_000, EVENT)
    events[:] = np.array(History().fault(1, READ).rows[0], EVENT)       # present: does nothing, and takes a while
    edge = History().mmap(0, 2).faults(0, 2).comm(0, 1).mprotect(0, 1, RO).trace().events
    last = History().mprotect(0, 1, RW).trace().events
    trace = Trace(np.concatenate([edge, events, last]))
    times, ticks, stop = [], [], threading.Event()
    device = ioproc.Ops(change_protection=lambda *_: times.append(time.perf_counter()))

    def ran_meanwhile():
        """In one replay; a busy machine may give the other thread no turn, so several are tried."""
        times.clear()
        replay(trace, placement="vma", ops=device)
        begin, end = times
        return sum(begin < tick < end for tick in ticks) > 1

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=tick)
    try:
        thread.start()
        assert any(ran_meanwhile() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


# ---- real histories

def counts(result):
    return {name: value for name, value in dataclasses.asdict(result).items() if name != "seconds"}


@pytest.mark.parametrize("name", ["halo2", "lammps", *(path.name for path in SHIPPED)])
def test_real_histories_fit(name):
    if name.endswith(".xz"):
        trace = Trace.load(SHIPPED[[path.name for path in SHIPPED].index(name)])
    else:
        trace = import_recording(DATA / f"{name}.user.strace.xz", DATA / f"{name}.user.pf.txt.xz")
    nothing = replay(trace)
    assert nothing.events == len(trace) == sum(nothing.operations.values())
    assert nothing.disagreement < 0.001
    inferred = nothing.inferred
    assert inferred["events"] + inferred["file"] + inferred["size"] < 0.01 * len(trace)

    plan = choose(trace, 0.1, "buffers")
    whole, vma = (replay(trace, placement=placement, communication=plan) for placement in DEVICE)
    again = replay(trace, placement="vma", communication=plan)
    assert {name: value for name, value in counts(vma).items() if name != "useful_share"} == {
        name: value for name, value in counts(again).items() if name != "useful_share"}
    assert whole.differences == vma.differences == nothing.differences
    assert whole.faults == vma.faults == nothing.faults
    assert whole.registered_peak == vma.registered_peak > 0
    assert vma.calls <= whole.calls
    assert vma.useful_share > 0.99
    assert whole.vmas_peak == nothing.vmas_peak <= vma.vmas_peak
    assert whole.callbacks["update_page"] >= sum(nothing.faults.values()) * 0.99
    assert (nothing.register_failures, whole.register_failures, vma.register_failures) == (0, 0, 0)


def test_ctrl_c_stops_it():
    """The signal comes while no Python code runs; a weak reference's callback, which runs next, must not swallow it."""
    code = ("import ioproc, itertools\nfrom importlib import resources\n"
            "with resources.as_file(resources.files('ioproc.histories') / 'redis.ioproc.xz') as path:\n"
            "    trace = ioproc.Trace.load(path)\n"
            "print('ready', flush=True)\n"
            "for _ in itertools.count():\n    ioproc.replay(trace)\n")
    for delay in (0.05, 0.1, 0.15):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            try:
                _, said = process.communicate(timeout=30)
            finally:
                process.kill()
        assert process.returncode == -signal.SIGINT
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert "ignored" not in said
