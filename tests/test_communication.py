"""The choice of communicating memory: its candidates, its two kinds, its share."""
import errno
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ioproc.histories
from history import NONE, PAGE, PRIVATE, RO, RW, SHARED, History, page
from ioproc.trace import REGISTRATION, Op, Trace, choose

SMALLEST, LARGEST = 64 << 10, 4 << 20
REDIS = Path(list(ioproc.histories.__path__)[0]) / "redis.ioproc.xz"


@pytest.fixture(scope="module")
def redis():
    return Trace.load(REDIS)


def candidates(history):
    """``(event, first page, pages)`` of all there are."""
    chosen = choose(history.trace(), 1)
    assert chosen.bytes == chosen.candidate_bytes == chosen.plan["length"].sum()
    return [(int(event), int(start - page(0)) // PAGE, int(length) // PAGE) for event, start, length in chosen.plan.tolist()]


# ---- candidates

@pytest.mark.parametrize("history", [
    History(),
    History().mmap(0, 4, RO),
    History().mmap(0, 4, NONE),
    History().mmap(0, 4, RW, SHARED),
    History(PAGE).mmap(0, 1, RW, MAP_PRIVATE, file=0),
    History(PAGE).mmap(0, 1, RW, MAP_SHARED, file=0),
    History(PAGE).mmap(0, 1, RO, MAP_PRIVATE, file=0).mprotect(0, 1, RW),
    History(PAGE).add(Op.SHMAT, file=0, ret=page(0), length=PAGE),
    History().mmap(0, 4, errno=errno.ENOMEM),
    History().mmap(0, 4, RO).mprotect(0, 4, RW, errno=errno.ENOMEM),
    History().mmap(0, 4, RO).mprotect(0, 4, RO),
    History().mmap(0, 4, RO).munmap(0, 4).mprotect(0, 4, RW),
    History().mprotect(0, 4, RW),
    History().brk(0, page(0)),
    History().brk(page(4)),
    History().mmap(0, 4, RO).exec().mprotect(0, 4, RW),
])
def test_what_is_no_candidate(history):
    assert candidates(history) == []


def test_private_anonymous_memory_that_may_be_written():
    more = PRIVATE | ioproc.MAP_NORESERVE | ioproc.MAP_STACK
    assert candidates(History().mmap(0, 4).mmap(8, 2, flags=more)) == [(0, 0, 4), (1, 8, 2)]


def test_what_execve_mapped_is_one():
    history = History().exec().add(Op.MAP, addr=page(3), length=2 * PAGE, prot=RW, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    assert candidates(history) == [(1, 3, 2)]


def test_lengths_are_in_whole_pages():
    assert candidates(History().add(Op.MMAP, ret=page(0), length=PAGE + 1, prot=RW, flags=PRIVATE)) == [(0, 0, 2)]


def test_the_heap_is_one_as_it_grows():
    history = (History().brk(0, page(0)).brk(page(4)).brk(page(4)).brk(page(6) + 1).brk(page(5)).brk(page(99), page(5))
               .brk(0, page(5)).brk(page(8)))
    assert candidates(history) == [(1, 0, 4), (3, 4, 3), (7, 5, 3)]


def test_memory_that_becomes_writable_later_is_one_from_then_on_and_once():
    history = History().mmap(0, 8, NONE).mprotect(2, 2, RW).mprotect(2, 2, RO).mprotect(0, 6, RW).mprotect(0, 8, RW)
    assert candidates(history) == [(1, 2, 2), (3, 0, 2), (3, 4, 2), (4, 6, 2)]


def test_memory_that_is_mapped_anew_is_new():
    assert candidates(History().mmap(0, 4).munmap(1, 1).mmap(1, 1).mmap(0, 2)) == [(0, 0, 4), (2, 1, 1), (3, 0, 2)]


def test_memory_under_something_else_is_none():
    assert candidates(History().mmap(0, 4, RO).mmap(1, 2, RO, SHARED).mprotect(0, 4, RW)) == [(2, 0, 1), (2, 3, 1)]


@pytest.mark.parametrize("to", [None, 16])
def test_what_moves_and_grows_is_not_new(to):
    at = to or 0
    history = History().mmap(0, 4).mremap(0, 4, 8, to).mprotect(at, 8, RO).mprotect(at, 8, RW)
    assert candidates(history) == [(0, 0, 4)]


def test_what_was_never_writable_is_new_after_a_move():
    assert candidates(History().mmap(0, 4, RO).mremap(0, 4, 4, 16).mprotect(16, 4, RW)) == [(2, 16, 4)]


def test_what_a_move_left_behind_is_gone():
    assert candidates(History().mmap(0, 4, RO).mremap(0, 4, 4, 16).mprotect(0, 4, RW).mmap(0, 4)) == [(3, 0, 4)]


def test_a_child_has_its_parents_memory_and_nothing_new():
    history = (History().mmap(0, 4).mmap(8, 4, RO).fork(2)
               .mprotect(0, 4, RW, pid=2)               # was the parent's already
               .mprotect(8, 2, RW, pid=2).mprotect(8, 4, RW)    # each its own from here
               .mmap(16, 1, pid=2))
    assert candidates(history) == [(0, 0, 4), (4, 8, 2), (5, 8, 4), (6, 16, 1)]


def test_a_vfork_child_works_on_its_parents_memory():
    history = (History().mmap(0, 4, RO).vfork(2).mprotect(0, 2, RW, pid=2).exec(pid=2)
               .mprotect(0, 4, RW).mprotect(0, 4, RW, pid=2))
    assert candidates(history) == [(2, 0, 2), (4, 2, 2)]


def test_processes_are_told_apart():
    history = History().mmap(0, 4, RO).mmap(0, 2, pid=2).exit(pid=2).mmap(0, 1, pid=2).mprotect(0, 1, RW, pid=2)
    assert candidates(history) == [(1, 0, 2), (3, 0, 1)]


def test_blocks_of_a_long_history():
    history = History()
    for number in range(20_000):
        history.fault(number)
    assert candidates(history.mmap(0, 1)) == [(20_000, 0, 1)]


# ---- kinds and shares

def arena(*sizes):
    """Mappings of so many pages, with a gap behind each."""
    history, at = History(), 0
    for size in sizes:
        history.mmap(at, size)
        at += size + 1
    return history.trace()


def test_mappings_are_chosen_whole():
    trace = arena(1, 10, 100, 1000)
    chosen = choose(trace, 0.15)
    assert chosen.plan.dtype == REGISTRATION
    assert set(chosen.plan["length"] // PAGE) <= {1, 10, 100}
    assert (chosen.kind, chosen.share, chosen.candidate_bytes) == ("mappings", 0.15, 1111 * PAGE)


def test_buffers_lie_in_their_mappings():
    sizes = (1, 15, 16, 17, 100, 5000)
    trace = arena(*sizes)
    chosen = choose(trace, 1, "buffers")
    plan = chosen.plan
    assert (plan["start"] % PAGE == 0).all()
    assert (plan["length"] % PAGE == 0).all()
    assert (plan["length"] >= SMALLEST).all()
    assert (plan["length"] <= LARGEST).all()
    assert plan["length"].max() > 4 * plan["length"].min()
    mapped = trace.events[plan["event"]]
    assert (plan["start"] >= mapped["ret"]).all()
    assert (plan["start"] + plan["length"] <= mapped["ret"] + mapped["length"]).all()
    assert set(plan["event"].tolist()) == {2, 3, 4, 5}      # less than 64 KiB has none
    assert (plan["start"][1:] >= plan["start"][:-1] + plan["length"][:-1]).all()
    assert chosen.bytes == plan["length"].sum() <= chosen.candidate_bytes == sum(sizes) * PAGE


def test_sizes_of_buffers_are_log_uniform():
    lengths = choose(arena(1 << 20), 1, "buffers", seed=3).plan["length"][:-1]
    assert len(lengths) > 1000
    logs = (np.log2(lengths) - 16) / 6
    assert np.allclose(np.quantile(logs, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.06)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 3000), max_size=20), st.floats(0, 1), st.sampled_from(["mappings", "buffers"]), st.integers(0, 99))
def test_the_share_is_never_exceeded(sizes, share, kind, seed):
    trace = arena(*sizes)
    chosen = choose(trace, share, kind, seed)
    total = sum(sizes) * PAGE
    assert chosen.candidate_bytes == total
    assert chosen.bytes == chosen.plan["length"].sum() <= share * total
    assert (chosen.plan["event"][1:] >= chosen.plan["event"][:-1]).all()
    assert len(np.unique(chosen.plan["start"])) == len(chosen.plan)
    left = {int(start) for start in choose(trace, 1, kind, seed).plan["start"]} - {int(start) for start in chosen.plan["start"]}
    lengths = dict(choose(trace, 1, kind, seed).plan[["start", "length"]].tolist())
    assert all(lengths[start] > share * total - chosen.bytes for start in left)     # no other piece would fit


@pytest.mark.parametrize("kind", ["mappings", "buffers"])
def test_a_real_history_comes_near_the_share(redis, kind):
    for share in (0.01, 0.1, 0.5, 1):
        chosen = choose(redis, share, kind)
        assert 0.9 * share < chosen.bytes / chosen.candidate_bytes <= share


def test_a_seed_makes_the_same_choice(redis):
    first, same, other = (choose(redis, 0.1, "buffers", seed).plan for seed in (7, 7, 8))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_nothing_and_nobody():
    for kind in ("mappings", "buffers"):
        assert len(choose(arena(100), 0, kind).plan) == 0
        for share in (0, 0.5, 1):
            chosen = choose(History().trace(), share, kind)
            assert (len(chosen.plan), chosen.bytes, chosen.candidate_bytes) == (0, 0, 0)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((-0.1,), ValueError, "share = -0.1"),
    ((1.1,), ValueError, "share = 1.1"),
    ((float("nan"),), ValueError, "share = nan"),
    ((0.5, "pages"), ValueError, "kind = 'pages'"),
    ((0.5, "mappings", -1), ValueError, "non-negative"),
])
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        choose(History().trace(), *arguments)
