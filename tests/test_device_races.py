"""
The two races that hooks for a device can lose, forced by schedule points: the re-load between the one invalidation up front
and the clearing of the entries; and the stale establish, after an invalidation that came while the driver held no lock.
"""
import threading
from mmap import MADV_DONTNEED

import pytest

import ioproc
from ioproc._core import break_interval, schedule

P = 4096


@pytest.fixture(autouse=True)
def no_schedule():
    yield
    for point in ("teardown-gap", "establish", "read-begin"):
        schedule(point, None)


def attached(design, **options):
    mm = ioproc.AddressSpace(ioproc.PhysicalMemory(256), **options)
    ctx = ioproc.Nic().attach(mm, **ioproc.DESIGNS[design])
    addr = mm.mmap(8 * P)
    mm.touch(addr, 8 * P, write=True)
    ctx.access(addr, 8 * P, write=True)
    return mm, ctx, addr


TAKING_AWAY = {
    "munmap": lambda mm, addr: mm.munmap(addr, 8 * P),
    "MADV_DONTNEED": lambda mm, addr: mm.madvise(addr, 8 * P, MADV_DONTNEED),
}


def reload_in_the_gap(mm, ctx, addr, take_away):
    """The device asks for the last page in the first gap; then, when all is over, once more."""
    asked = threading.Event()
    answers = []

    def ask():
        try:
            ctx.access(addr + 7 * P, 1, write=True)
            answers.append("loaded")
        except ioproc.RemoteAccessError as error:
            answers.append(error.cause)

    def in_gap():
        schedule("teardown-gap", None)
        schedule("read-begin", asked.set)       # it is about to wait, or it goes through
        thread.start()
        if ctx.placement == "interval":
            assert asked.wait(60)
            thread.join(0.05)
        else:
            thread.join(60)

    thread = threading.Thread(target=ask)
    schedule("teardown-gap", in_gap)
    take_away(mm, addr)
    thread.join(60)
    schedule("read-begin", None)
    try:
        ctx.access(addr + 7 * P, 1, write=True)
    except ioproc.RemoteAccessError as error:
        answers.append(error.cause)
    else:
        answers.append("went through")
    return answers


@pytest.mark.parametrize("take_away", TAKING_AWAY.values(), ids=TAKING_AWAY)
def test_a_reload_in_the_gap_of_a_batched_teardown_is_caught(take_away):
    mm, ctx, addr = attached("mm+fault", teardown_batch=2)
    assert reload_in_the_gap(mm, ctx, addr, take_away) == ["loaded", "went through"]
    assert ctx.stats["violations"] == ctx.stats["violations_frame"] == 1
    (violation,) = ctx.violations()
    assert (violation.address, violation.write, violation.kind, violation.design) == (addr + 7 * P, True, "frame", "mm+fault")


@pytest.mark.parametrize("design", ["interval+fault", "interval+preload-registered"])
@pytest.mark.parametrize("take_away", TAKING_AWAY.values(), ids=TAKING_AWAY)
def test_interval_notifiers_wait_for_the_end_of_the_teardown(take_away, design):
    mm, ctx, addr = attached(design, teardown_batch=2)
    first, last = reload_in_the_gap(mm, ctx, addr, take_away)
    # munmap: there is nothing to load.  MADV_DONTNEED: a new page is
    assert (first, last) in [("unmapped", "unmapped"), ("loaded", "went through")]
    assert ctx.stats["violations"] == 0


@pytest.mark.parametrize("take_away", TAKING_AWAY.values(), ids=TAKING_AWAY)
def test_without_the_bracket_they_lose_the_race_too(take_away):
    mm, ctx, addr = attached("interval+fault", teardown_batch=2)
    break_interval(mm, ctx, bracket=True)
    assert reload_in_the_gap(mm, ctx, addr, take_away) == ["loaded", "went through"]
    assert ctx.stats["violations"] == 1


def test_with_the_lock_held_throughout_there_is_no_gap():
    mm, ctx, addr = attached("mm+fault")
    schedule("teardown-gap", lambda: pytest.fail("the lock was let go of"))
    mm.munmap(addr, 8 * P)
    assert ctx.stats["violations"] == 0


@pytest.mark.parametrize("pages", [1, 7])
def test_others_wait_in_the_gap(pages):
    """Whoever would change the address space waits for the end, as for the kernel's mmap_sem."""
    mm, ctx, addr = attached("mm+fault", teardown_batch=pages)
    order = []

    def other():
        mm.mmap(8 * P)
        order.append("mmap")

    def in_gap():
        schedule("teardown-gap", None)
        thread.start()
        thread.join(0.05)
        order.append("gap")

    thread = threading.Thread(target=other)
    schedule("teardown-gap", in_gap)
    mm.munmap(addr, 8 * P)
    thread.join(60)
    assert order == ["gap", "mmap"]


def invalidated_before_it_is_established(mm, ctx, addr):
    """munmap comes between the driver's look at the page table and what it tells the NIC."""
    def between():
        schedule("establish", None)
        mm.munmap(addr, 8 * P)
        assert mm.mmap(8 * P, addr=addr) == addr
        mm.touch(addr, 8 * P, write=True)

    schedule("establish", between)
    ctx.access(addr, 1, write=True)


def test_a_stale_establish_is_noticed_and_tried_again():
    mm, ctx, addr = attached("interval+fault")
    mm.madvise(addr, P, MADV_DONTNEED)
    invalidated_before_it_is_established(mm, ctx, addr)
    assert ctx.stats["retries"] == 1
    assert ctx.stats["violations"] == 0


def test_without_the_retry_it_is_caught():
    mm, ctx, addr = attached("interval+fault")
    break_interval(mm, ctx, retry=True)
    mm.madvise(addr, P, MADV_DONTNEED)
    invalidated_before_it_is_established(mm, ctx, addr)
    assert ctx.stats["retries"] == 0
    assert ctx.stats["violations"] == ctx.stats["violations_frame"] == 1


@pytest.mark.parametrize("design", ["mm+fault", "vma+fault", "mm+preload-registered", "mm+pin-cache+hooks"])
def test_with_a_chain_the_driver_establishes_under_the_lock(design):
    mm, ctx, addr = attached(design)
    schedule("establish", lambda: pytest.fail("the lock was let go of"))
    mm.madvise(addr, P, MADV_DONTNEED)
    ctx.access(addr, 8 * P, write=True)
    assert ctx.stats["violations"] == 0
