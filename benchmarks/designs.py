"""Replays with a NIC: rows for the table.

``python benchmarks/designs.py preload | six [EVENTS] [REPETITIONS]``, as workloads.py: ns per event of the generated
history, whose program receives a message in every buffer before it unmaps it.
"""
from __future__ import annotations

import sys

import numpy as np

import ioproc
import paired
import workloads
from ioproc.trace import Access, Op, Trace

EVENTS = 1_000_000
SIX = ("mm+fault", "interval+fault", "mm+preload", "mm+preload-registered", "mm+pin-cache+hooks", "vma+pin-cache+hooks")


def history(events):
    """Add a message to each buffer of the generated history, over the whole of it."""
    rows = workloads.generated_history(events).events
    last = np.flatnonzero(rows["op"] == Op.MUNMAP)
    messages = rows[last]
    messages["op"], messages["access"] = Op.COMM, Access.WRITE
    return Trace(np.insert(rows, last, messages), {"command": "generated, with messages"})


def _replays(name, designs, events):
    trace = history(events)

    def run():
        for design in designs:
            result = ioproc.replay(trace, nic=ioproc.Nic(1024, 16), attach=ioproc.DESIGNS[design])
            assert result.disagreement == result.device["violations"] == 0

    return workloads.Workload(name, len(trace.events), lambda: (), run, lambda: None)


def preload(events=EVENTS):
    """One native op, whose update hook loads every page, and a cache of 16 ways that the messages go through."""
    return _replays("preload", ["mm+preload"], events)


def six(events=EVENTS):
    """Six safe designs, one after the other; per event of the history, for all of them."""
    return _replays("six", SIX, events)


workloads.WORKLOADS |= {w.__name__: w for w in (preload, six)}


def rows(row):
    """Add the rows to the table; a turn takes seconds, so there are few."""
    commands = {name: ([sys.executable, __file__, name, EVENTS],) for name in ("preload", "six")}
    ns = {name: float(np.median(samples)) for name, samples in paired.take_turns(commands, rounds=2, launches=1).items()}
    row("replay with one native op and a 16-way cache", "at least 5 million events/s",
        f"{1e3 / ns['preload']:.1f} million/s ({ns['preload']:.0f} ns)", 1e3 / ns["preload"] >= 5, ns=ns["preload"])
    seconds = ns["six"] * EVENTS / 1e9
    row("six safe designs over a history of a million events", "at most 2 s", f"{seconds:.2f} s ({', '.join(SIX)})",
        seconds <= 2, seconds=seconds)


if __name__ == "__main__":
    sys.exit(workloads.main(sys.argv[1:]))
