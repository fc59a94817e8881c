"""The device's translation cache: which set a page is in, who goes when it is full, what is dropped, and what is refused."""
import random
import threading

import numpy as np
import pytest

import ioproc
from ioproc import _core

# Narrow sets (up to 16 ways) and wide ones, sets that are a power of two and that are not, a single set, a single way.
GEOMETRIES = [(1, 1), (2, 2), (8, 1), (12, 4), (16, 16), (24, 3), (48, 16), (17, 17), (40, 20), (64, 32), (64, 4), (100, 100)]
PAGE = 2**39 - 1                # of a key; the bits above say whose page it is and how large


class Model:
    """Sets as dicts, the entry that goes first at the front."""

    def __init__(self, entries, ways, policy):
        self.ways, self.policy = ways, policy
        self.sets = [{} for _ in range(entries // ways)]
        self.evictions = 0

    def set_of(self, key):
        return self.sets[(key & PAGE) % len(self.sets)]

    def get(self, key):
        ways = self.set_of(key)
        if key in ways and self.policy == "lru":
            ways[key] = ways.pop(key)
        return ways.get(key)

    def put(self, key, value):
        """Return the key that goes; one of these, if it is up to chance."""
        ways = self.set_of(key)
        gone = []
        if key not in ways and len(ways) == self.ways:
            gone = list(ways) if self.policy == "random" else [next(iter(ways))]
            del ways[gone[0]]
        ways[key] = value
        return gone

    def drop(self, key):
        return self.set_of(key).pop(key, None) is not None

    def clear(self):
        for ways in self.sets:
            ways.clear()

    def access(self, page):
        hit = self.get(page) is not None
        self.evictions += not hit and len(self.put(page, 1))
        return hit

    @property
    def entries(self):
        return sum(map(len, self.sets))


def script(entries, ways, seed):
    """Operations on four times the keys that fit, of three contexts and two sizes of pages, crowded in a few of the sets."""
    r = random.Random(seed)
    sets = entries // ways
    keys = {r.randrange(8 * ways) * sets + r.randrange(min(sets, 3)) | r.randrange(2) << 39 | r.randrange(1, 4) << 40
            for _ in range(4 * ways * min(sets, 3))}
    keys |= {PAGE - r.randrange(entries) | 1 << 40 for _ in range(ways)}
    keys = sorted(keys)
    for _ in range(2000):
        what = r.choices(["put", "get", "drop", "clear"], [100, 100, 25, 1])[0]
        key = r.choice(keys)
        yield {"put": ("put", key, r.randrange(2**64)), "get": ("get", key), "drop": ("drop", key), "clear": ("clear",)}[what]


@pytest.mark.parametrize("policy", ["lru", "fifo", "random"])
@pytest.mark.parametrize("entries, ways", GEOMETRIES)
def test_the_interface_in_c(entries, ways, policy):
    model = Model(entries, ways, policy)
    operations = list(script(entries, ways, 1))
    evictions = 0
    for (what, *arguments), (answer, used) in zip(operations, _core.run_cache(operations, entries, ways, policy), strict=True):
        if what == "put" and policy == "random" and answer:
            full = model.set_of(arguments[0])
            assert answer in full and len(full) == ways and arguments[0] not in full
            del full[answer]
            assert model.put(*arguments) == []
        elif what == "put":
            assert ([answer] if answer else []) == model.put(*arguments)
        else:
            assert answer == getattr(model, what)(*arguments)
        evictions += what == "put" and answer != 0
        assert used == model.entries
    assert evictions > 50


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("entries, ways", GEOMETRIES)
def test_streams_of_pages(entries, ways, policy):
    r = np.random.default_rng(1)
    cache, model = ioproc.TranslationCache(entries, ways, policy), Model(entries, ways, policy)
    hits = accesses = 0
    for i in range(60):
        pages = r.integers(0, 3 * entries, 50)
        what = ["access", "access", "access", "drop"][i % 4]
        expected = sum(getattr(model, what)(page) for page in pages.tolist())
        assert getattr(cache, what)(pages) == expected
        if what == "access":
            hits += expected
            accesses += len(pages)
        if i == 30:
            cache.clear()
            model.clear()
        assert cache.stats == {"hits": hits, "misses": accesses - hits, "evictions": model.evictions,
                               "entries": model.entries}


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("entries, ways", [(1024, 16), (1024, 8), (1023, 11), (1024, None), (960, 64), (1000, 1)])
def test_a_long_stream(entries, ways, policy):
    pages = np.minimum(np.random.default_rng(1).zipf(1.2, 30_000), 20_000)
    cache, model = ioproc.TranslationCache(entries, ways, policy), Model(entries, ways or entries, policy)
    assert cache.access(pages) == sum(map(model.access, pages.tolist()))
    assert cache.stats["evictions"] == model.evictions


@pytest.mark.parametrize("entries, ways", [(64, 16), (64, None), (64, 4)])
def test_random_takes_every_way_alike_and_the_seed_decides(entries, ways):
    pages = np.random.default_rng(1).integers(0, 2 * entries, 50_000)

    def hits(seed):
        return ioproc.TranslationCache(entries, ways, "random", seed=seed).access(pages)

    assert hits(0) == hits(0) != hits(1)
    ways = ways or entries
    sets = entries // ways
    order = [sets * i + (1 << 40) for i in range(ways + 4000)]         # all in one set
    gone = [key for key, _ in _core.run_cache([("put", key, 0) for key in order], entries, ways, "random")][ways:]
    born = {key: i for i, key in enumerate(order)}
    ages = np.array([i + ways - born[key] for i, key in enumerate(gone)])
    assert ages.min() == 1                                              # also the newest may go
    assert abs(ages.mean() - ways) < ways / 10                          # each time one in `ways`: geometric


STREAMS = {
    "uniform": np.random.default_rng(1).integers(0, 4096, 100_000),
    "zipf": np.minimum(np.random.default_rng(2).zipf(1.1, 100_000), 65_536),
    "sequential": np.arange(10_000),
    "around": np.arange(10_000) % 1500,
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("sets, ways", [(64, 16), (16, 64), (24, 8), (1, 256)])
@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_hits_are_those_of_pycachesim(stream, sets, ways, policy):
    cachesim = pytest.importorskip("cachesim")
    memory = cachesim.MainMemory()
    level = cachesim.Cache("translations", sets, ways, 1, policy.upper())
    memory.load_to(level)
    memory.store_from(level)
    cachesim.CacheSimulator(level, memory).load(STREAMS[stream].tolist())
    assert ioproc.TranslationCache(sets * ways, ways, policy).access(STREAMS[stream]) == level.backend.HIT_count


@pytest.mark.parametrize("stream", STREAMS)
def test_hits_of_one_set_are_those_of_libcachesim(stream):
    libcachesim = pytest.importorskip("libcachesim")
    request = libcachesim.Request()
    request.obj_size = 1
    lru = libcachesim.LRU(500)
    hits = 0
    for page in STREAMS[stream][:20_000].tolist():
        request.obj_id = page + 1
        hits += lru.get(request)
    assert ioproc.TranslationCache(500).access(STREAMS[stream][:20_000]) == hits


def test_what_was_dropped_makes_room_first():
    cache = ioproc.TranslationCache(16, 16)
    cache.access(range(16))
    assert cache.drop([3, 12, 3, 99]) == 2
    cache.access([100, 101])
    assert cache.stats["evictions"] == 0
    cache.access([102])
    assert cache.stats["evictions"] == 1
    assert cache.drop([0]) == 0 and cache.drop([1]) == 1                # the oldest went


def test_integers_of_any_kind():
    cache = ioproc.TranslationCache(8, 2)
    for kind in (np.int8, np.uint16, np.int64, np.uint64):
        cache.access(np.arange(4, dtype=kind))
    cache.access(np.arange(8, dtype=np.uint64)[::2])
    cache.access([])
    cache.access((2**39 - 1, np.int32(5)))
    assert cache.stats["hits"] == 12 + 2


def test_threads_share_a_cache():
    cache = ioproc.TranslationCache(64, 8)
    pages = np.random.default_rng(1).integers(0, 500, 20_000)
    hits = []
    threads = [threading.Thread(target=lambda: hits.extend((cache.access(pages), cache.drop(pages) * 0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats
    assert stats["hits"] == sum(hits) and stats["hits"] + stats["misses"] == 4 * len(pages)


@pytest.mark.parametrize("arguments, message", [
    ((0,), r"entries = 0: not in 1 \.\. 2\*\*32 - 1"),
    ((-1,), r"entries = -1: not in"),
    ((1 << 32,), r"entries = 4294967296: not in 1"),
    ((1024, 0), r"ways = 0: not in 1 \.\. 1024, the entries"),
    ((1024, 2048), r"ways = 2048: not in 1 \.\. 1024"),
    ((1024, 3), r"ways = 3: 1024 entries are no whole number of sets of 3"),
    ((1024, 16, "plru"), r"policy = 'plru': not one of lru, random, fifo"),
    ((1024, 16, ["lru"]), r"policy = \['lru'\]"),
    ((1024, 16, "lru", -1), r"seed = -1"),
])
def test_geometry_that_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        ioproc.TranslationCache(*arguments)


@pytest.mark.parametrize("arguments", [(1024.0,), ("8",), (8, 2.0), (8, 2, "lru", None)])
def test_geometry_of_another_type(arguments):
    with pytest.raises(TypeError, match="not an integer"):
        ioproc.TranslationCache(*arguments)


@pytest.mark.parametrize("pages, error, message", [
    ([1, 2**39], ValueError, r"page 549755813888 is not in 0 \.\. 2\*\*39 - 1"),
    (np.array([1, 2**63], np.uint64), ValueError, "page 9223372036854775808 is not in"),
    ([1, -1], ValueError, "page -1 is not in"),
    ([1.5], TypeError, "an array of float64, not of integers"),
    ([True], TypeError, "an array of bool"),
    (["1"], TypeError, "not of integers"),
    ([1, 2**70], TypeError, "an array of object"),
    ([[1, 2]], ValueError, "2 dimensions"),
    (7, ValueError, "0 dimensions"),
])
def test_pages_that_are_none(pages, error, message):
    cache = ioproc.TranslationCache(8)
    for call in (cache.access, cache.drop, ioproc.hit_curve):
        with pytest.raises(error, match=message):
            call(pages)
    assert cache.stats == {"hits": 0, "misses": 0, "evictions": 0, "entries": 0}        # not even the good ones before
