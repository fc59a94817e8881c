"""Interval notifiers: who is told, when the tree changes, who waits, and what a sequence is good for."""
import random
import threading

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ioproc._core import IntervalsProbe
from threads import no_deadlock, together  # noqa: F401  (a fixture)
from world import fails

SOON = 0.05                     # seconds: who has not returned by then waits
LATE = 30


@pytest.fixture
def probe():
    return IntervalsProbe()


def told(probe):
    """The names told of an invalidation since the last look, in order."""
    log, probe.log = probe.log, []
    return [name for name, what, *_ in log if what == "invalidate"]


def tree(probe):
    return probe.state()[0]


class Waiting:
    """A call in a thread of its own, which must not return before it should."""

    def __init__(self, call, *args):
        self.result = []
        self.thread = threading.Thread(target=lambda: self.result.append(call(*args)))
        self.thread.start()
        self.thread.join(SOON)
        assert self.thread.is_alive(), "did not wait"

    def returns(self):
        self.thread.join(LATE)
        assert not self.thread.is_alive(), "still waits"
        return self.result[0]


# ---- who is told

def test_intervals_that_overlap_are_told_in_address_order(probe):
    for name, start, end in [("d", 30, 40), ("a", 0, 10), ("c", 15, 60), ("b", 10, 20)]:
        probe.insert(name, start, end)
    assert tree(probe) == ["a", "b", "c", "d"]
    assert probe.start(19, 31) is True
    assert [(name, start, end) for name, _, start, end, _ in probe.log] == [("b", 19, 31), ("c", 19, 31), ("d", 19, 31)]
    probe.end()


def test_ends_are_exclusive(probe):
    probe.insert("a", 10, 20)
    assert not probe.start(0, 10) and not probe.start(20, 30)
    assert probe.start(9, 11) and probe.start(19, 21)
    assert told(probe) == ["a", "a"]


def test_an_interval_that_spans_all_is_found_behind_those_that_begin_later(probe):
    probe.insert("all", 0, 1 << 47)
    for page in range(1, 100):
        probe.insert(page, page << 12, (page + 1) << 12)
    assert probe.start(1 << 46, (1 << 46) + 1)
    assert told(probe) == ["all"]


def test_the_same_range_twice_is_told_twice(probe):
    probe.insert("a", 10, 20)
    probe.insert("b", 10, 20)
    probe.start(12, 13)
    assert sorted(told(probe)) == ["a", "b"]
    probe.end()
    probe.remove("a")
    assert tree(probe) == ["b"]


def test_what_cannot_be_inserted(probe):
    for start, end in [(10, 10), (10, 5)]:
        fails("EINVAL", probe.insert, (start, end), start, end)
    probe.insert("a", 10, 20)
    fails("EEXIST", probe.insert, "a", 10, 20)
    probe.start(0, 1)
    probe.insert("b", 10, 20)
    fails("EEXIST", probe.insert, "b", 10, 20)
    probe.end()
    assert sorted(tree(probe)) == ["a", "b"]


# ---- the sequence

def test_the_sequence_is_odd_only_while_an_interval_is_invalidated(probe):
    probe.insert("a", 10, 20)

    def odd():
        return probe.state()[3] % 2
    assert not odd()
    probe.start(30, 40)
    assert not odd()                        # a bracket, but over nobody
    probe.start(10, 11)
    assert odd()
    probe.end()
    assert odd()                            # the other is open still
    probe.end()
    assert not odd()
    probe.start(0, 50)
    probe.start(0, 50)
    probe.end(2)
    assert not odd() and probe.state()[2] == 0


def test_the_callback_gets_the_sequence_of_its_bracket(probe):
    probe.insert("a", 10, 20)
    seqs = []
    for _ in range(3):
        probe.start(10, 20)
        seqs.append(probe.log[-1][-1])
        assert seqs[-1] == probe.state()[3]
        probe.end()
    assert all(seq % 2 for seq in seqs) and len(set(seqs)) == 3


def test_a_read_that_nothing_came_between_is_good(probe):
    probe.insert("a", 10, 20)
    probe.insert("b", 30, 40)
    seq = probe.read_begin("a")
    probe.start(30, 40)                     # another's
    assert not probe.read_retry("a", seq)
    probe.end()
    assert not probe.read_retry("a", seq)


def test_a_read_that_an_invalidation_came_between_is_to_be_repeated(probe):
    probe.insert("a", 10, 20)
    seq = probe.read_begin("a")
    probe.start(19, 30)
    assert probe.read_retry("a", seq)       # as soon as it has begun
    probe.end()
    assert probe.read_retry("a", seq)
    assert not probe.read_retry("a", probe.read_begin("a"))


def test_the_device_sees_it_before_it_is_told(probe):
    """Who has the device's lock when `invalidate` wants it must not load: or what it loads is dropped at once."""
    seen = []
    probe = IntervalsProbe(lambda name, *what: seen.append(probe.read_retry(name, seq)))
    probe.insert("a", 10, 20)
    seq = probe.read_begin("a")
    probe.start(10, 20)
    assert seen == [True]


def test_a_read_waits_while_the_interval_is_invalidated(probe):
    probe.insert("a", 10, 20)
    probe.insert("b", 30, 40)
    before = probe.read_begin("a")
    probe.start(10, 20)
    probe.read_begin("b")                   # does not concern it
    waiting = Waiting(probe.read_begin, "a")
    probe.end()
    assert waiting.returns() != before


def test_a_read_waits_for_the_last_of_the_brackets(probe):
    probe.insert("a", 10, 20)
    probe.start(10, 20)
    probe.start(50, 60)
    probe.end()
    waiting = Waiting(probe.read_begin, "a")
    probe.end()
    waiting.returns()


def test_a_sequence_from_before_a_removal_is_not_good_after_the_next_insertion(probe):
    probe.insert("a", 10, 20)
    seq = probe.read_begin("a")
    probe.remove("a")
    probe.start(10, 20)                     # of which it is not told
    probe.end()
    probe.insert("a", 10, 20)
    assert probe.read_retry("a", seq)


# ---- edits while a bracket is open

def test_an_insertion_waits_for_the_end_and_counts_as_invalidated_until_then(probe):
    probe.start(0, 5)
    probe.insert("a", 10, 20)
    assert probe.state()[:2] == ([], ["a"])
    assert not probe.start(10, 20)          # not in the tree: not told, but nobody can load either
    waiting = Waiting(probe.read_begin, "a")
    probe.end(2)
    seq = waiting.returns()
    assert not probe.read_retry("a", seq) and tree(probe) == ["a"]
    assert probe.start(10, 20) and told(probe) == ["a"] and probe.read_retry("a", seq)


def test_an_insertion_taken_back_before_the_end(probe):
    probe.start(0, 5)
    for name in "abc":
        probe.insert(name, 10, 20)
    probe.remove("b")
    assert probe.state()[:2] == ([], ["c", "a"])
    probe.end()
    assert sorted(tree(probe)) == ["a", "c"]


def test_a_removal_waits_for_the_end(probe):
    probe.insert("a", 10, 20)
    probe.start(0, 5)
    waiting = Waiting(probe.remove, "a")
    assert probe.start(10, 20) and told(probe) == ["a"]         # until then it is told
    probe.end(2)
    waiting.returns()
    assert tree(probe) == []
    assert not probe.start(10, 20) and told(probe) == []


def test_a_removal_that_tells_does_not_wait(probe):
    probe.insert("a", 10, 20, removed=True)
    probe.start(0, 5)
    probe.remove("a")
    assert probe.log == [] and probe.state()[:2] == (["a"], ["a"])
    fails("EEXIST", probe.insert, "a", 10, 20)
    probe.remove("a")                       # once is enough
    probe.end()
    assert probe.log == [("a", "removed")] and tree(probe) == []


def test_a_removal_that_tells_when_no_bracket_is_open(probe):
    probe.insert("a", 10, 20, removed=True)
    probe.remove("a")
    assert probe.log == [("a", "removed")]
    probe.remove("a")
    assert len(probe.log) == 1


def test_a_callback_may_remove_its_own_interval_and_insert_others():
    def called(name, what, *args):
        if what == "invalidate":
            probe.remove(name)
            probe.insert("new", 10, 20)
        else:
            assert tree(probe) == ["b", "new"]
            probe.insert(name, 10, 20)      # all is quiet: at once
    probe = IntervalsProbe(called)
    probe.insert("a", 10, 20, removed=True)
    probe.insert("b", 0, 5)
    probe.start(10, 20)
    assert tree(probe) == ["b", "a"]
    probe.end()
    assert [what for _, what, *_ in probe.log] == ["invalidate", "removed"]
    assert sorted(tree(probe)) == ["a", "b", "new"]


# ---- against brute force

class Machine(RuleBasedStateMachine):
    """A list of intervals, and what the rules above make of it."""

    def __init__(self):
        super().__init__()
        self.probe = IntervalsProbe()
        self.ranges, self.coming, self.going = {}, set(), set()       # ranges: those in the tree
        self.known = {}
        self.open = 0
        self.invalidated = set()            # since all was quiet last
        self.read = {}                      # name -> a sequence that is still good
        self.stale = []                     # (name, a sequence that is not)
        self.removed = []                   # (name, a sequence that will not be, should it come back)

    names = st.integers(0, 40)
    places = st.integers(0, 120)

    def lose(self, names, to):
        to += [(name, self.read.pop(name)) for name in names if name in self.read]

    @rule(name=names, start=places, length=st.integers(1, 9) | st.integers(1, 120))
    def insert(self, name, start, length):
        start, end = self.known.setdefault(name, (start, start + length))
        if name in self.ranges or name in self.coming:
            fails("EEXIST", self.probe.insert, name, start, end, True)
        else:
            self.probe.insert(name, start, end, True)
            self.stale += [(other, seq) for other, seq in self.removed if other == name]
            self.removed = [(other, seq) for other, seq in self.removed if other != name]
            if self.open:
                self.coming.add(name)
            else:
                self.ranges[name] = start, end

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def remove(self, data):
        name = data.draw(st.sampled_from(sorted(self.known)))
        self.lose([name], self.removed)
        self.probe.remove(name)
        removed = [name] if name in self.coming or name in self.ranges and not self.open else []
        if name in self.ranges and self.open:
            self.going.add(name)
        elif name in self.ranges:
            del self.ranges[name]
        self.coming.discard(name)
        self.check_log(removed=removed)

    @rule(start=places, length=st.integers(1, 9) | st.integers(1, 120))
    def start(self, start, length):
        end = start + length
        over = [name for name, (a, b) in self.ranges.items() if a < end and b > start]
        assert self.probe.start(start, end) == bool(over)
        self.open += 1
        self.invalidated.update(over)
        self.lose(over, self.stale)
        self.check_log(told=over)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data):
        brackets = data.draw(st.integers(1, self.open))
        self.probe.end(brackets)
        self.open -= brackets
        removed = []
        if self.open == 0:
            removed = sorted(self.going)
            self.ranges.update((name, self.known[name]) for name in self.coming)
            for name in self.going:
                del self.ranges[name]
            self.coming, self.going, self.invalidated = set(), set(), set()
        self.check_log(removed=removed)

    @precondition(lambda self: self.ranges)
    @rule(data=st.data())
    def read_begin(self, data):
        ready = sorted(set(self.ranges) - self.invalidated - self.going)
        if ready:
            name = data.draw(st.sampled_from(ready))
            seq = self.probe.read_begin(name)
            assert self.read.setdefault(name, seq) == seq

    def check_log(self, told=(), removed=()):
        log, self.probe.log = self.probe.log, []
        got = [name for name, what, *_ in log if what == "invalidate"]
        assert sorted(got) == sorted(told)
        assert [self.known[name][0] for name in got] == sorted(self.known[name][0] for name in got)
        assert sorted(name for name, what, *_ in log if what == "removed") == sorted(removed)

    @invariant()
    def same(self):
        names, deferred, active, seq = self.probe.state()
        assert sorted(names) == sorted(self.ranges) and set(deferred) == self.coming | self.going and active == self.open
        assert [self.known[name][0] for name in names] == sorted(self.known[name][0] for name in names)
        assert seq % 2 == 0 or self.open
        assert all(not self.probe.read_retry(name, seq) for name, seq in self.read.items())
        assert all(self.probe.read_retry(name, seq) for name, seq in self.stale)


TestAgainstBruteForce = Machine.TestCase
TestAgainstBruteForce.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_many_intervals_against_a_list(probe):
    chance = random.Random(5)
    ranges = {}
    for name in range(3000):
        start = chance.randrange(1 << 40)
        ranges[name] = start, start + (1 << chance.randrange(38))
        probe.insert(name, *ranges[name])
    for name in chance.sample(range(3000), 1500):
        probe.remove(name)
        del ranges[name]
    assert tree(probe) == sorted(ranges, key=ranges.get)
    for _ in range(200):
        start = chance.randrange(1 << 40)
        end = start + (1 << chance.randrange(38))
        probe.start(start, end)
        probe.end()
        assert told(probe) == sorted((name for name, (a, b) in ranges.items() if a < end and b > start), key=ranges.get)


# ---- threads

class Device:
    """Eight intervals of one page, the page table's entries, and those that the device has loaded."""

    def __init__(self):
        self.table = [0] * 8
        self.loaded = {}
        self.lock = threading.Lock()
        self.probe = IntervalsProbe(self.drop)
        for page in range(8):
            self.probe.insert(page, page, page + 1)

    def drop(self, page, what, *args):
        with self.lock:
            self.loaded.pop(page, None)

    def load(self, page, meanwhile=lambda: None, careful=True):
        while True:
            seq = self.probe.read_begin(page)
            entry = self.table[page]
            meanwhile()
            with self.lock:
                if not careful or not self.probe.read_retry(page, seq):
                    self.loaded[page] = entry
                    return

    def change(self, first, end, meanwhile=lambda: None):
        self.probe.start(first, end)
        meanwhile()
        for page in range(first, end):
            self.table[page] += 1
        self.probe.end()

    def is_right(self):
        with self.lock:
            return all(self.table[page] == entry for page, entry in self.loaded.items())


@pytest.mark.parametrize("careful", [True, False])
def test_a_load_that_an_operation_comes_between(careful):
    device = Device()
    operations = iter([lambda: device.change(0, 4)])
    device.load(2, meanwhile=lambda: next(operations, lambda: None)(), careful=careful)
    assert device.is_right() == careful and 2 in device.loaded


def test_a_load_between_the_invalidation_and_the_change():
    device = Device()
    waiting = []
    device.change(0, 4, meanwhile=lambda: waiting.append(Waiting(device.load, 2)))
    waiting[0].returns()
    assert device.loaded == {2: 1} and device.is_right()


def test_loads_and_operations_race():
    """What the device has loaded is right whenever no operation is at work."""
    device = Device()
    quiet = threading.Lock()                    # operations: two at a time, and none while it is looked at
    working = threading.Semaphore(2)

    def operate(chance, going):
        while going():
            first = chance.randrange(8)
            with quiet:
                working.acquire()
            device.change(first, chance.randrange(first + 1, 9))
            working.release()
            device.probe.log = []

    def load(chance, going):
        while going():
            device.load(chance.randrange(8))

    def look(chance, going):
        while going():
            with quiet, working, working:
                assert device.is_right()

    together(operate, operate, load, load, look)


def test_insertions_and_removals_beside_brackets():
    """Nothing is told of an interval after its removal has returned."""
    gone = set()
    late = []

    def called(name, what, *args):
        if name in gone:
            late.append(name)

    probe = IntervalsProbe(called)

    def edit(chance, going):
        number = chance.random()
        while going():
            number += 1
            start = chance.randrange(100)
            probe.insert(number, start, start + chance.randrange(1, 30))
            probe.remove(number)
            gone.add(number)

    def operate(chance, going):
        while going():
            start = chance.randrange(100)
            probe.start(start, start + chance.randrange(1, 30))
            probe.end()

    together(edit, edit, operate)
    assert late == [] and probe.state()[:3] == ([], [], 0)
