"""The registration cache: what is registered when, what leaves, what comes out of errors; against a model; with threads."""
import contextlib
import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ioproc
from test_leaks import SANITIZED, resident
from threads import no_deadlock, together  # noqa: F401

PAGE = 4096
RIGHTS = {None: 0, "r": 1, "w": 2, "rw": 3}
NAMES = (None, "r", "w", "rw")


class Handle:
    def __init__(self, start, length, access):
        self.range = start, length, access


class Device:
    """Registers and writes down: ``+`` and ``-`` with the range in pages.  Ranges in `refused` cannot be registered."""

    def __init__(self, **options):
        self.log, self.registered, self.refused = [], set(), set()
        self.cache = ioproc.RegistrationCache(self.register, self.deregister, **options)

    def register(self, start, length, access):
        if (start // PAGE, length // PAGE) in self.refused:
            raise OSError(12, "refused")
        handle = Handle(start, length, access)
        self.registered.add(handle)
        self.log.append(("+", start // PAGE, length // PAGE, access))
        return handle

    def deregister(self, start, length, handle):
        assert handle.range[:2] == (start, length)
        self.registered.remove(handle)
        self.log.append(("-", start // PAGE, length // PAGE))

    def get(self, page, pages=1, access="rw"):
        return self.cache.get(page * PAGE, pages * PAGE, access)

    def use(self, page, pages=1, access="rw"):
        with self.get(page, pages, access) as region:
            return region.start // PAGE, region.length // PAGE, region.access

    def regions(self):
        return [(start // PAGE, length // PAGE, access) for start, length, access, _ in self.cache.regions()]

    def told(self):
        """What was registered and deregistered since this was last asked."""
        log, self.log = self.log, []
        return log


@pytest.fixture
def device():
    return Device()


# ---- look-up

def test_a_range_is_registered_once(device):
    with device.get(10, 4) as region:
        assert (region.start, region.length, region.access) == (10 * PAGE, 4 * PAGE, "rw")
        assert region.handle.range == (10 * PAGE, 4 * PAGE, "rw")
    with device.get(11, 2) as again:
        assert again.handle is region.handle
    assert device.told() == [("+", 10, 4, "rw")]
    assert device.cache.stats == {
        "gets": 2, "hits": 1, "misses": 1, "merges": 0, "registrations": 1, "deregistrations": 0, "evictions": 0,
        "invalidations": 0, "deferred": 0, "regions": 1, "bytes": 4 * PAGE, "in_use": 0}


@pytest.mark.parametrize("alignment", [1, 64, PAGE, 2 << 20])
def test_regions_are_aligned(alignment):
    device = Device(alignment=alignment)
    with device.cache.get(3 * PAGE + 17, PAGE) as region:
        assert region.start % alignment == region.length % alignment == 0
        assert 0 <= 3 * PAGE + 17 - region.start < alignment
        assert 0 <= region.start + region.length - (4 * PAGE + 17) < alignment


def test_a_hit_needs_the_rights(device):
    device.use(5, 1, "r")
    assert device.use(5, 1, "r") == (5, 1, "r")
    assert device.use(5, 1, "w") == (5, 1, "rw")                # united: the reader has not to be turned away
    assert device.told() == [("+", 5, 1, "r"), ("+", 5, 1, "rw"), ("-", 5, 1)]
    assert device.use(5, 1, "r") == (5, 1, "rw")


def test_in_use_are_counted_by_region(device):
    first, second, other = device.get(1), device.get(1), device.get(9)
    assert device.cache.stats["in_use"] == 2
    assert device.cache.regions() == [(PAGE, PAGE, "rw", 2), (9 * PAGE, PAGE, "rw", 1)]
    for region in first, second, other:
        device.cache.put(region)
    assert device.cache.stats["in_use"] == 0


def test_thousands_of_regions_are_found():
    """In and out at random places, against a dict: leaves of the index fill, split and empty."""
    device, chance, known = Device(merge=False), random.Random(1), {}
    for step in range(20_000):
        page = 2 * chance.randrange(4000)
        if chance.random() < (0.6 if step % 8000 < 5000 else 0.3):
            handle = device.get(page).handle
            assert known.setdefault(page, handle) is handle
        else:
            assert device.cache.invalidate(page * PAGE, PAGE) == (known.pop(page, None) is not None)
    assert device.regions() == [(page, 1, "rw") for page in sorted(known)]
    for page, handle in known.items():
        assert device.get(page).handle is handle
    device.cache.flush()
    assert device.regions() == [] and not device.registered


@pytest.mark.parametrize("order", [1, -1])
def test_addresses_that_rise_or_fall(order):
    device = Device()
    for page in range(0, 2000, 2)[::order]:
        device.use(page)
    assert device.regions() == [(page, 1, "rw") for page in range(0, 2000, 2)]
    assert device.cache.invalidate(300 * PAGE, 1000 * PAGE) == 500
    assert len(device.regions()) == 500


# ---- merging

@pytest.mark.parametrize("page, pages, merged", [
    (12, 2, (10, 4)), (8, 2, (8, 4)), (11, 2, (10, 3)), (9, 5, (9, 5)), (13, 1, (13, 1)), (12, 8, (10, 14))],
    ids=["above", "below", "overlapping", "around", "apart", "between two"])
def test_a_miss_takes_in_what_it_overlaps_or_touches(device, page, pages, merged):
    device.use(10, 2)
    device.use(20, 4)
    device.told()
    assert device.use(page, pages)[:2] == merged
    assert device.told()[0] == ("+", *merged, "rw")             # before the old ones go
    assert all(start >= end for (start, _, _), end in
               zip(device.regions()[1:], [start + length for start, length, _ in device.regions()]))


def test_a_region_in_use_is_deregistered_with_its_last_put(device):
    first, second = device.get(10), device.get(10)
    device.told()
    assert device.use(11) == (10, 2, "rw")
    assert device.told() == [("+", 10, 2, "rw")] and device.cache.stats["deferred"] == 1
    device.cache.put(first)
    assert device.told() == []
    device.cache.put(second)
    assert device.told() == [("-", 10, 1)]


def test_without_merging_what_overlaps_leaves():
    device = Device(merge=False)
    for page, pages in ((10, 2), (12, 2), (13, 2)):
        assert device.use(page, pages)[:2] == (page, pages)
    assert device.regions() == [(10, 2, "rw"), (13, 2, "rw")]
    assert device.told()[-1] == ("-", 12, 2)


def test_merged_range_refused_the_asked_one_is_tried(device):
    device.use(10, 2)
    device.refused = {(10, 4)}
    assert device.use(12, 2)[:2] == (12, 2)
    assert device.regions() == [(10, 2, "rw"), (12, 2, "rw")]
    device.refused = {(10, 5)}
    assert device.use(13, 2)[:2] == (13, 2)                     # cannot keep the one it overlaps
    assert device.regions() == [(10, 2, "rw"), (13, 2, "rw")]


# ---- limits

def test_what_was_not_used_longest_leaves_first():
    device = Device(max_regions=3)
    for page in 10, 20, 30, 10, 40:
        device.use(page)
    assert device.told()[-1] == ("-", 20, 1)
    device.use(30)
    device.use(50)
    assert device.told()[-1] == ("-", 10, 1)
    assert device.cache.stats["evictions"] == 2


def test_bytes_are_limited():
    device = Device(max_bytes=4 * PAGE)
    device.use(10, 2)
    device.use(20, 2)
    device.use(30)
    assert device.regions() == [(20, 2, "rw"), (30, 1, "rw")]
    assert device.use(40, 5)[:2] == (40, 5)                     # larger than all that may stay: registered, and not kept
    assert device.regions() == [] and device.cache.stats["bytes"] == 0


def test_regions_in_use_are_never_evicted():
    device = Device(max_regions=1)
    held = [device.get(page) for page in (10, 20, 30)]
    assert len(device.regions()) == 3 and device.cache.stats["evictions"] == 0
    device.cache.put(held[1])
    assert [page for page, _, _ in device.regions()] == [10, 30]
    device.use(30)
    device.cache.put(held[0])
    device.cache.put(held[2])
    assert device.regions() == [(30, 1, "rw")]
    with device.get(30):                                        # used before, so the oldest, and in use again
        device.use(40)
        assert device.regions() == [(30, 1, "rw")]


# ---- invalidation

def test_invalidated_regions_leave(device):
    for page in 10, 12, 14:
        device.use(page, 1)
    assert device.cache.invalidate(11 * PAGE, PAGE) == 0        # touches two, overlaps none
    assert device.cache.invalidate(13 * PAGE - 1, PAGE + 2) == 2
    assert device.regions() == [(10, 1, "rw")] and sorted(device.told()[3:]) == [("-", 12, 1), ("-", 14, 1)]
    assert device.cache.stats["invalidations"] == 2
    assert device.cache.invalidate(0, 0) == 0


def test_an_invalidated_region_in_use_is_not_found_and_not_yet_deregistered(device):
    with device.get(10) as old:
        assert device.cache.invalidate(10 * PAGE, 1) == 1
        with device.get(10) as new:
            assert new.handle is not old.handle
        assert device.told() == [("+", 10, 1, "rw")] * 2
    assert device.told() == [("-", 10, 1)]


@pytest.mark.parametrize("later", ["get", "put", "flush", "close"])
def test_deferred_deregistration(later):
    device = Device(defer=True)
    held = device.get(30)
    device.use(10)
    device.told()
    assert device.cache.invalidate(10 * PAGE, PAGE) == 1
    assert device.told() == [] and device.regions() == [(30, 1, "rw")]
    match later:
        case "get":
            device.get(30)
        case "put":
            device.cache.put(held)
        case "flush":
            device.cache.flush()
        case "close":
            device.cache.close()
    assert device.told() == [("-", 10, 1)]


def test_registered_by_another_after_merging_has_failed():
    """What was left over is deregistered before the second attempt, without the lock: somebody may be faster."""
    class Slow(Device):
        def register(self, start, length, access):
            if length > PAGE:
                self.cache.invalidate(50 * PAGE, PAGE)
            return super().register(start, length, access)

        def deregister(self, start, length, handle):
            super().deregister(start, length, handle)
            if start == 50 * PAGE:
                self.use(1)

    device = Slow(defer=True)
    device.refused.add((0, 2))
    device.use(50)
    device.use(0)
    assert device.use(1) == (1, 1, "rw") and device.cache.stats["in_use"] == 0
    assert device.regions() == [(0, 1, "rw"), (1, 1, "rw")]
    device.cache.close()
    assert not device.registered


def test_with_the_hooks_of_an_address_space():
    """A hook may not unpin: what it invalidates is deregistered later."""
    mem = ioproc.PhysicalMemory(frames=64)
    with ioproc.AddressSpace(mem) as mm:
        cache = ioproc.RegistrationCache(lambda start, length, access: mem.pin(mm, start, length),
                                         lambda start, length, pfns: mem.unpin(pfns), defer=True)
        mm.register_ops(ioproc.Ops(invalidate_range=lambda vma, start, end: cache.invalidate(start, end - start)))
        addr = mm.mmap(8 * PAGE)
        with cache.get(addr, 8 * PAGE) as region:
            pfns = region.handle
        mm.munmap(addr, 8 * PAGE)
        assert cache.regions() == [] and mem.stats["frames_used"] == 8      # pinned until somebody may unpin
        mm.mmap(8 * PAGE, addr=addr)
        with cache.get(addr, 8 * PAGE) as region:
            assert mm.pagemap(addr, 8 * PAGE)["pfn"].tolist() == list(region.handle) != list(pfns)
        cache.close()


def test_invalidated_while_it_is_registered(device):
    """The range is registered again: what was registered may be of memory that is gone."""
    register, left = device.register, [3]

    def invalidated(start, length, access):
        handle = register(start, length, access)
        if left[0]:
            left[0] -= 1
            assert device.cache.invalidate(start + length - 1, 1) == 0
        return handle

    device.cache = ioproc.RegistrationCache(invalidated, device.deregister)
    region = device.get(10, 2)
    assert device.told() == [("+", 10, 2, "rw"), ("-", 10, 2)] * 3 + [("+", 10, 2, "rw")]
    assert device.registered == {region.handle}
    assert device.cache.stats["registrations"] == 4 and device.cache.stats["misses"] == 1
    left[0] = 1000
    with pytest.raises(RuntimeError, match="0x14000, 0x15000.* 100 registrations"):
        device.get(20)
    assert device.registered == {region.handle} and device.regions() == [(10, 2, "rw")]


# ---- errors

def refuse(*arguments):
    raise OSError(12, "refused")


def test_what_register_raises(device):
    device.use(10, 2, "r")
    device.refused = {(10, 4), (12, 2)}
    before = device.cache.stats
    with pytest.raises(OSError, match="refused"):
        device.get(12, 2)
    assert device.regions() == [(10, 2, "r")] and len(device.registered) == 1
    assert device.cache.stats == {**before, "gets": 2, "misses": 2}
    device.refused = set()
    assert device.use(12, 2)[:2] == (10, 4)


def test_an_interrupt_is_not_taken_for_a_refusal():
    asked = []

    def register(start, length, access):
        asked.append(length)
        if len(asked) == 2:
            raise KeyboardInterrupt

    cache = ioproc.RegistrationCache(register, lambda *range: None)
    cache.put(cache.get(0, PAGE))
    with pytest.raises(KeyboardInterrupt):
        cache.get(PAGE, PAGE)
    assert asked == [PAGE, 2 * PAGE]


@pytest.mark.parametrize("call", ["put", "get", "invalidate", "flush", "close"])
def test_what_deregister_raises(call):
    """Surfaces after all was done, the first of several, and nothing is left registered or in use."""
    gone = []

    def deregister(start, length, handle):
        gone.append(start // PAGE)
        raise OSError(5, f"page {start // PAGE}")

    cache = ioproc.RegistrationCache(lambda *range: None, deregister, max_regions=2 if call in {"put", "get"} else None)
    for page in 10, 20:
        cache.put(cache.get(page * PAGE, PAGE))
    held = cache.get(30 * PAGE, PAGE) if call not in {"put", "get"} else None
    with pytest.raises(OSError, match="page (10|20)") as caught:
        match call:
            case "put":
                for page in 10, 20, 30:
                    held = cache.get(page * PAGE, PAGE)
                    cache.put(held)
            case "get":
                cache.get(30 * PAGE, PAGE)
            case "invalidate":
                cache.invalidate(0, 25 * PAGE)
            case "flush":
                cache.flush()
            case "close":
                cache.close()
    if call in {"put", "get"}:
        assert len(gone) == 1 and cache.stats["in_use"] == 0 and cache.stats["regions"] == 2
    else:
        assert sorted(gone) == [10, 20] and cache.stats["in_use"] == 1
        assert any("a later callback raised OSError" in note for note in caught.value.__notes__)
        with contextlib.suppress(OSError):
            cache.put(held)
    with contextlib.suppress(OSError):
        cache.close()
    assert cache.stats["registrations"] == cache.stats["deregistrations"] and cache.stats["regions"] == 0


def test_both_raise():
    cache = ioproc.RegistrationCache(lambda start, *rest: refuse() if start else None, refuse, defer=True)
    cache.put(cache.get(0, PAGE))
    cache.invalidate(0, PAGE)
    with pytest.raises(OSError) as caught:
        cache.get(8 * PAGE, PAGE)
    assert caught.value.__notes__ == ["a later callback raised OSError: [Errno 12] refused"]
    assert cache.stats["regions"] == cache.stats["in_use"] == 0


def test_register_that_asks_for_what_it_registers():
    cache = ioproc.RegistrationCache(lambda start, length, access: cache.get(start + 1, 1), lambda *range: None)
    with pytest.raises(RuntimeError, match=r"\[0x5001, 0x5002\)"):
        cache.get(0x5000, PAGE)
    cache = ioproc.RegistrationCache(
        lambda start, length, access: start and cache.get(start - PAGE, PAGE).start, lambda *range: None)
    with cache.get(5 * PAGE, PAGE) as region:
        assert region.handle == 4 * PAGE                        # another range is well


def test_a_region_is_put_back_once(device):
    region = device.get(10)
    with pytest.raises(ValueError, match=r"\[0xa000, 0xb000\) rw>: of another"):
        Device().cache.put(region)
    device.cache.put(region)
    with pytest.raises(ValueError, match="put back twice"):
        device.cache.put(region)
    with device.get(10) as region:
        device.cache.put(region)                                # the end of the block finds it done
    assert device.cache.stats["in_use"] == 0
    with pytest.raises(TypeError):
        device.cache.put(None)


@pytest.mark.parametrize("arguments, message", [
    ((0, 0), "length = 0: empty"), ((-1, 5), "addr = -1"), ((0, -1), "length = -1"), ((1 << 64, 1), "addr = 1844674407370955161"),
    (((1 << 64) - PAGE, PAGE), "past the end"), (((1 << 64) - 2 * PAGE, PAGE + 1), "past the end"),
    ((1, (1 << 64) - 1), "past the end"), ((0, 1, ""), "access = ''"), ((0, 1, "wr"), "access = 'wr'")])
def test_ranges_that_are_none(device, arguments, message):
    with pytest.raises(ValueError, match=message):
        device.cache.get(*arguments)
    assert device.cache.stats["gets"] == 0
    if len(arguments) == 2 and message != "past the end" and arguments[1]:
        with pytest.raises(ValueError, match=message):
            device.cache.invalidate(*arguments)


def test_the_ends_of_the_address_space(device):
    assert device.use(0) == (0, 1, "rw")
    assert device.use((1 << 52) - 2) == ((1 << 52) - 2, 1, "rw")
    assert device.cache.invalidate(0, (1 << 64) - 1) == 2
    with pytest.raises(ValueError, match="past the end"):
        device.cache.invalidate(2, (1 << 64) - 1)


@pytest.mark.parametrize("options, error, message", [
    ({"register": 5}, TypeError, "register = 5"), ({"deregister": None}, TypeError, "deregister = None"),
    ({"max_regions": 0}, ValueError, "max_regions = 0"), ({"max_bytes": -1}, ValueError, "max_bytes = -1"),
    ({"alignment": 0}, ValueError, "alignment = 0"), ({"alignment": 96}, ValueError, "alignment = 96"),
    ({"alignment": 1.5}, TypeError, "alignment = 1.5")])
def test_caches_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        ioproc.RegistrationCache(**{"register": refuse, "deregister": refuse, **options})


# ---- the end

def test_close(device):
    held = device.get(10)
    device.use(20)
    with device.cache:
        pass
    assert device.regions() == [] and device.registered == {held.handle}
    with pytest.raises(ValueError, match="closed"):
        device.get(10)
    device.cache.put(held)
    assert not device.registered
    device.cache.close()
    device.cache.flush()
    assert device.cache.invalidate(0, 1 << 40) == 0


def test_what_is_dropped_is_put_back(device):
    device.get(10)
    assert device.cache.stats["in_use"] == 0 and device.registered
    held = device.get(20)
    registered = device.registered
    del device.cache
    gc.collect()
    assert {handle.range[0] for handle in registered} == {10 * PAGE, 20 * PAGE}     # the held region holds the cache
    del held
    gc.collect()
    assert not registered


def test_a_handle_that_refers_to_the_cache():
    class Owner:
        def __init__(self):
            self.cache = ioproc.RegistrationCache(lambda *range: self, lambda *range: None)
            self.held = self.cache.get(0, PAGE)

    owner = Owner()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps what was freed")
def test_nothing_grows():
    def use():
        with Device(max_regions=50).cache as cache:
            held = [cache.get(page * PAGE, PAGE) for page in range(0, 400, 2)]
            cache.invalidate(0, 200 * PAGE)
            cache.put(cache.get(0, 400 * PAGE))
            with contextlib.suppress(ValueError):
                cache.get(0, 0)
            for region in held[::2]:
                cache.put(region)

    for _ in range(5):
        use()
    gc.collect()
    before = resident()
    for _ in range(200):
        use()
    gc.collect()
    assert resident() - before < 2 << 20


NO_MEMORY = r"""
import ctypes, ioproc
from ioproc import _core

shim = ctypes.CDLL(None)
core = [line.split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(_core.__file__)]
shim.failing_from(*(ctypes.c_void_p(int(end.split()[0], 16)) for end in (core[0][0], core[-1][1])))


def use(n, on):
    registered, held, refused = [], [], 0
    def register(start, length, access):
        registered.append(start)
        return start
    cache = ioproc.RegistrationCache(register, lambda start, length, handle: registered.remove(handle))
    shim.failing_at(n, on)
    for page in [*range(0, 160, 4), *range(2, 160, 4), 1]:
        before = cache.stats["regions"], len(registered)
        try:
            held.append(cache.get(page << 12, 4096))
        except MemoryError:
            assert before == (cache.stats["regions"], len(registered))
            refused += 1
    shim.failing_at(0, 0)
    assert len(cache.regions()) == cache.stats["regions"] == len(registered) - cache.stats["deferred"]
    cache.close()
    for region in held:
        cache.put(region)
    assert not registered and cache.stats["in_use"] == 0
    return refused


assert use(0, 0) == 0
assert all(use(n, 0) == 1 for n in range(1, 80))
assert all(use(n, 1) >= 1 for n in range(2, 80))
"""


@pytest.mark.skipif(any("san" in name for name in os.environ.get("LD_PRELOAD", "").split("/")), reason="replaces malloc")
def test_each_allocation_fails_once(tmp_path):
    shim = tmp_path / "failing_malloc.so"
    source = Path(__file__).parent / "native/failing_malloc.c"
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", shim, source], check=True)
    run = subprocess.run([sys.executable, "-c", NO_MEMORY], env={**os.environ, "LD_PRELOAD": str(shim)},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- threads

def test_a_range_is_registered_by_one_thread_and_the_others_wait(device):
    registering, go = threading.Event(), threading.Event()
    register = device.register

    def slow(*range):
        registering.set()
        assert go.wait(30)
        return register(*range)

    device.cache = ioproc.RegistrationCache(slow, device.deregister)
    got = []
    threads = [threading.Thread(target=lambda: got.append(device.get(10).handle)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert registering.wait(30)
    assert device.cache.regions() == [] and device.cache.invalidate(20 * PAGE, PAGE) == 0
    go.set()
    for thread in threads:
        thread.join()
    assert device.told() == [("+", 10, 1, "rw")] and len(set(got)) == 1
    assert device.cache.stats["hits"] == 3 and device.cache.stats["misses"] == 1


@pytest.mark.parametrize("end", ["invalidate", "close"])
def test_nobody_waits_for_a_registration_to_end_it(device, end):
    registering, go = threading.Event(), threading.Event()
    register = device.register

    def slow(*range):
        handle = register(*range)
        registering.set()
        assert go.wait(30)
        return handle

    device.cache = ioproc.RegistrationCache(slow, device.deregister)
    result = []

    def get():
        try:
            result.append(device.get(10).handle)
        except ValueError as error:
            result.append(str(error))

    thread = threading.Thread(target=get)
    thread.start()
    assert registering.wait(30)
    if end == "invalidate":
        assert device.cache.invalidate(10 * PAGE, 1) == 0       # returns although the registration goes on
    else:
        device.cache.close()
    go.set()
    thread.join()
    assert device.told()[:2] == [("+", 10, 1, "rw"), ("-", 10, 1)]
    if end == "invalidate":
        assert len(device.registered) == 1
    else:
        assert result == ["the registration cache is closed"] and not device.registered


@pytest.mark.parametrize("options", [{}, {"merge": False}, {"max_regions": 4}, {"max_bytes": 8 * PAGE, "defer": True}])
def test_threads(no_deadlock, options):  # noqa: F811
    """Nobody holds what was deregistered, nobody is given what was registered before the last invalidation."""
    pages = 32
    changed, told = [0] * pages, [0] * pages

    class Registered:
        def __init__(self, start, length, access):
            self.first = start // PAGE
            self.seen = changed[self.first:self.first + length // PAGE]
            self.valid = True

    def deregister(start, length, handle):
        assert handle.valid
        handle.valid = False

    def refusing(start, length, access):
        handle = Registered(start, length, access)
        if length > 12 * PAGE:
            raise OSError(12, "too long")
        return handle

    cache = ioproc.RegistrationCache(refusing, deregister, **options)

    def communicate(chance, going):
        held = []
        while going():
            page, length = chance.randrange(pages - 4), chance.randrange(1, 5)
            before = told[page:page + length]
            region = cache.get(page * PAGE + chance.randrange(PAGE), (length - 1) * PAGE + 1, chance.choice(["r", "w", "rw"]))
            at = page - region.handle.first
            assert region.handle.valid and at >= 0
            assert all(seen >= least for seen, least in zip(region.handle.seen[at:at + length], before))
            held.append(region)
            while len(held) > chance.randrange(4):
                region = held.pop(chance.randrange(len(held)))
                assert region.handle.valid
                cache.put(region)
        for region in held:
            cache.put(region)

    def change(chance, going):
        n = 0
        while going():
            n += 1
            page = chance.randrange(pages)
            changed[page] = n
            cache.invalidate(page * PAGE, PAGE)
            told[page] = n

    def flush(chance, going):
        while going():
            cache.flush()
            for start, length, access, uses in cache.regions():
                assert length > 0 and access and uses >= 0 and start % PAGE == 0

    together(communicate, communicate, communicate, change, flush)
    cache.close()
    stats = cache.stats
    assert stats["regions"] == stats["bytes"] == stats["in_use"] == 0
    assert stats["registrations"] == stats["deregistrations"]


# ---- against a model

class Model:
    """A list of regions [start, end, rights, uses], in pages, the one put back longest ago first."""

    def __init__(self, merge, max_regions, max_bytes, defer):
        self.merge, self.max_regions, self.max_bytes, self.defer = merge, max_regions, max_bytes, defer
        self.regions, self.away, self.left, self.log = [], [], [], []

    def leave(self, region, now=True):
        self.regions.remove(region)
        if region[3]:
            self.away.append(region)
        else:
            (self.log if now else self.left).append(("-", region[0], region[1] - region[0]))

    def clean(self):
        self.log += self.left
        self.left = []

    def evict(self):
        def full():
            return (self.max_regions and len(self.regions) > self.max_regions
                    or self.max_bytes and sum(end - start for start, end, *_ in self.regions) * PAGE > self.max_bytes)

        for region in [region for region in self.regions if not region[3]]:
            if full():
                self.leave(region)

    def get(self, start, end, rights, longest):
        """The region, or None: refused."""
        for region in self.regions:
            if region[0] <= start and end <= region[1] and not rights & ~region[2]:
                region[3] += 1
                self.clean()
                return region
        self.clean()
        low, high, all_rights = start, end, rights
        while self.merge:
            touching = [region for region in self.regions if region[0] <= high and low <= region[1]]
            merged = (min([low, *(r[0] for r in touching)]), max([high, *(r[1] for r in touching)]))
            for region in touching:
                all_rights |= region[2]
            if merged == (low, high):
                break
            low, high = merged
        for made in [low, high, all_rights, 1], [start, end, rights, 1]:
            if made[1] - made[0] <= longest:
                self.log.append(("+", made[0], made[1] - made[0], NAMES[made[2]]))
                for region in [r for r in self.regions if r[0] < made[1] and made[0] < r[1]]:
                    self.leave(region)
                self.regions.append(made)
                self.evict()
                return made
        return None

    def put(self, region):
        self.clean()
        region[3] -= 1
        if not region[3]:
            if any(region is other for other in self.away):
                self.away = [other for other in self.away if other is not region]
                self.log.append(("-", region[0], region[1] - region[0]))
            else:
                self.regions.remove(region)
                self.regions.append(region)
                self.evict()

    def invalidate(self, start, end):
        gone = [region for region in self.regions if region[0] < end and start < region[1]]
        for region in gone:
            self.leave(region, not self.defer)
        return len(gone)

    def flush(self):
        self.clean()
        for region in [region for region in self.regions if not region[3]]:
            self.leave(region)


class Against(RuleBasedStateMachine):
    ranges = st.tuples(st.integers(0, 40), st.integers(1, 5))

    @initialize(merge=st.booleans(), defer=st.booleans(), max_regions=st.none() | st.integers(1, 6),
                max_bytes=st.none() | st.integers(1, 16 * PAGE), longest=st.sampled_from([4, 8, 100]))
    def begin(self, longest, **options):
        self.longest = longest
        self.model = Model(**options)
        self.device = Device(**options)
        self.device.refused = {(start, length) for start in range(50) for length in range(longest + 1, 50)}
        self.held = []

    @rule(range=ranges, access=st.sampled_from(NAMES[1:]), offset=st.integers(0, PAGE - 1))
    def get(self, range, access, offset):
        start, pages = range
        expected = self.model.get(start, start + pages, RIGHTS[access], self.longest)
        try:
            region = self.device.cache.get(start * PAGE + offset, pages * PAGE - offset, access)
        except OSError:
            assert expected is None
            return
        assert (region.start // PAGE, (region.start + region.length) // PAGE, RIGHTS[region.access]) == tuple(expected[:3])
        self.held.append((region, expected))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def put(self, data):
        region, expected = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert region.handle in self.device.registered
        self.model.put(expected)
        self.device.cache.put(region)

    @rule(range=ranges)
    def invalidate(self, range):
        start, pages = range
        assert self.device.cache.invalidate(start * PAGE, pages * PAGE) == self.model.invalidate(start, start + pages)

    @rule()
    def flush(self):
        self.model.flush()
        self.device.cache.flush()

    @invariant()
    def same(self):
        if not hasattr(self, "model"):
            return
        assert [(start // PAGE, (start + length) // PAGE, RIGHTS[access], uses)
                for start, length, access, uses in self.device.cache.regions()] == sorted(map(tuple, self.model.regions))
        assert sorted(self.device.told()) == sorted(self.model.log)
        self.model.log = []
        stats = self.device.cache.stats
        assert stats["regions"] == len(self.model.regions)
        assert stats["bytes"] == sum(end - start for start, end, *_ in self.model.regions) * PAGE
        assert stats["in_use"] == len(self.model.away) + sum(region[3] > 0 for region in self.model.regions)
        assert stats["registrations"] - stats["deregistrations"] == len(self.device.registered) - len(self.model.left)

    def teardown(self):
        if hasattr(self, "model"):
            self.device.cache.close()
            for region, _ in self.held:
                self.device.cache.put(region)
            assert not self.device.registered


TestAgainstTheModel = Against.TestCase
TestAgainstTheModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
