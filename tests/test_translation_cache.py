"""The device's translation cache: geometry, replacement, and what a set is, against a cache in five lines of Python."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ioproc

# Narrow sets (up to 16 ways) and wide ones, sets that are a power of two and that are not, a single set, a single way.
GEOMETRIES = [(1, 1), (2, 2), (8, 1), (12, 4), (16, 16), (24, 3), (48, 16), (17, 17), (40, 20), (64, 32), (64, 4), (100, 100)]


class Model:
    """Sets as lists of pages, the oldest first."""

    def __init__(self, entries, ways, policy):
        self.ways, self.policy = ways, policy
        self.sets = [[] for _ in range(entries // ways)]
        self.evictions = 0

    def access(self, page):
        ways = self.sets[page % len(self.sets)]
        hit = page in ways
        if hit and self.policy == "fifo":
            return True
        if hit:
            ways.remove(page)
        elif len(ways) == self.ways:
            ways.pop(0)
            self.evictions += 1
        ways.append(page)
        return hit

    def drop(self, page):
        ways = self.sets[page % len(self.sets)]
        found = page in ways
        if found:
            ways.remove(page)
        return found

    def clear(self):
        for ways in self.sets:
            ways.clear()

    @property
    def entries(self):
        return sum(map(len, self.sets))


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("entries, ways", GEOMETRIES)
@settings(max_examples=40)
@given(operations=st.lists(st.tuples(st.sampled_from(["access"] * 12 + ["drop"] * 3 + ["clear"]),
                                     st.lists(st.integers(0, 150) | st.integers(0, 2**39 - 1), max_size=40))))
def test_every_access_and_drop_is_as_in_the_model(entries, ways, policy, operations):
    cache, model = ioproc.TranslationCache(entries, ways, policy), Model(entries, ways, policy)
    hits = accesses = 0
    for what, pages in operations:
        if what == "clear":
            cache.clear()
            model.clear()
            continue
        expected = sum(getattr(model, what)(page) for page in pages)
        assert getattr(cache, what)(pages) == expected
        if what == "access":
            hits += expected
            accesses += len(pages)
        assert cache.stats == {"hits": hits, "misses": accesses - hits, "evictions": model.evictions,
                               "entries": model.entries}


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("entries, ways", [(1024, 16), (1024, 8), (1023, 11), (1024, None), (960, 64), (1000, 1)])
def test_a_long_stream_has_the_hits_of_the_model(entries, ways, policy):
    pages = np.minimum(np.random.default_rng(1).zipf(1.2, 30_000), 20_000)
    cache, model = ioproc.TranslationCache(entries, ways, policy), Model(entries, ways or entries, policy)
    assert cache.access(pages) == sum(map(model.access, pages.tolist()))
    assert cache.stats["evictions"] == model.evictions
