"""The LRU hit curve: at each size what a cache of that size has, from one pass."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ioproc


def simulated(pages):
    distinct = len(np.unique(pages))
    return [0] + [ioproc.TranslationCache(n).access(pages) for n in range(1, distinct + 1)]


@given(st.lists(st.integers(0, 40) | st.integers(0, 2**39 - 1), max_size=300))
def test_it_is_a_simulation_of_every_size(pages):
    assert ioproc.hit_curve(pages).tolist() == simulated(pages)


@pytest.mark.parametrize("pages", [
    np.random.default_rng(1).integers(0, 300, 20_000),
    np.minimum(np.random.default_rng(2).zipf(1.1, 20_000), 400),
    np.tile(np.arange(200), 50),
    np.concatenate([np.arange(150), np.arange(150)[::-1]] * 40),
], ids=["uniform", "zipf", "around and around", "to and fro"])
def test_a_long_stream_uses_up_its_times_and_goes_on(pages):
    curve = ioproc.hit_curve(pages)
    assert len(curve) == len(np.unique(pages)) + 1
    sizes = range(1, len(curve), 7)
    assert curve[sizes].tolist() == [ioproc.TranslationCache(n).access(pages) for n in sizes]
    assert curve[-1] == len(pages) - len(np.unique(pages))      # all but the first use of each


def test_around_and_around_all_or_nothing():
    assert ioproc.hit_curve(list(range(10)) * 3).tolist() == [0] * 10 + [20]


def test_the_same_page_again_and_again_needs_one_entry():
    assert ioproc.hit_curve([7] * 100_000).tolist() == [0, 99_999]


def test_no_pages():
    assert ioproc.hit_curve([]).tolist() == [0]
