"""Which memory communicates: the choice a replay registers, when a history does not tell.

The candidates are all private anonymous memory from when it becomes writable: mapped by mmap, by growing the heap or by
execve, or made writable by mprotect later.  Two ways to choose among them by bytes, both drawn with a seed:

``mappings``
    Whole mappings (the part that becomes writable at once), as an application that registers its arrays does.
``buffers``
    Page-aligned buffers of 64 KiB to 4 MiB (log-uniform) inside the mappings, as a library that registers what it is
    asked to send does.  Mappings of less than 64 KiB have none.
"""
from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

import numpy as np

from .format import Op, Trace

__all__ = ["REGISTRATION", "Communication", "choose", "mappings"]

# After event `event` succeeded, [start, start + length) of its process is registered.
REGISTRATION = np.dtype([("event", "<u8"), ("start", "<u8"), ("length", "<u8")])

PAGE = 4096
MAP_PRIVATE_ANONYMOUS, MAP_TYPE_ANONYMOUS = 0x22, 0x2F
PROT_WRITE = 2
BUFFER_BYTES = (64 << 10, 4 << 20)


@dataclass(frozen=True)
class Communication:
    """A plan of registrations.

    Attributes
    ----------
    plan : numpy.ndarray
        Rows of `REGISTRATION`, in the order of their events.
    kind : str
        ``"mappings"`` or ``"buffers"``.
    share : float
        The share of the candidate bytes that was asked for.
    bytes, candidate_bytes : int
        What was chosen, of how much; whole mappings need not add up to the share.
    """

    plan: np.ndarray
    kind: str
    share: float
    bytes: int
    candidate_bytes: int


def choose(trace: Trace, share: float, kind: str = "mappings", seed: int = 0,
           candidates: np.ndarray | None = None) -> Communication:
    """Choose the memory that communicates.

    Parameters
    ----------
    trace : Trace
    share : float
        Of the candidate bytes, 0 to 1.  Never exceeded.
    kind : {"mappings", "buffers"}
    seed : int
    candidates : numpy.ndarray, optional
        What `mappings` returned for the trace, to walk it once for many choices.

    Returns
    -------
    Communication
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share = {share}: not in 0 .. 1")
    if kind not in ("mappings", "buffers"):
        raise ValueError(f"kind = {kind!r}: not 'mappings' or 'buffers'")
    random = np.random.default_rng(seed)
    candidates = mappings(trace) if candidates is None else candidates
    total = int(candidates["length"].sum())
    pieces = candidates if kind == "mappings" else _buffers(candidates, random)
    plan = pieces[_take(pieces["length"], share * total, random)] if share < 1 else pieces
    plan = plan[np.lexsort((plan["start"], plan["event"]))]
    return Communication(plan, kind, share, int(plan["length"].sum()), total)


class _Ranges:
    """A set of addresses, as sorted disjoint ranges."""

    def __init__(self, ranges=()):
        self.ranges = list(ranges)

    def pieces(self, start, end):
        """What of [start, end) is in the set."""
        first = bisect.bisect_right(self.ranges, start, key=lambda piece: piece[1])
        found = []
        for low, high in itertools.islice(self.ranges, first, None):
            if low >= end:
                break
            found.append((max(low, start), min(high, end)))
        return found

    def remove(self, start, end):
        first = bisect.bisect_right(self.ranges, start, key=lambda piece: piece[1])
        last = bisect.bisect_left(self.ranges, end, key=lambda piece: piece[0])
        kept = [(low, high) for piece in self.ranges[first:last]
                for low, high in ((piece[0], start), (end, piece[1])) if low < high]
        self.ranges[first:last] = kept

    def add(self, start, end):
        self.remove(start, end)
        bisect.insort(self.ranges, (start, end))


class _Memory:
    """The private anonymous memory of a process: all of it, and what is writable or was once."""

    def __init__(self, parent=None):
        self.anonymous = _Ranges(parent.anonymous.ranges if parent else ())
        self.candidates = _Ranges(parent.candidates.ranges if parent else ())
        self.brk = parent.brk if parent else 0

    def mapped(self, start, end, anonymous, writable):
        """New pieces that communication may use."""
        self.unmapped(start, end)
        if anonymous:
            self.anonymous.add(start, end)
        return self.writable(start, end) if anonymous and writable else []

    def unmapped(self, start, end):
        self.anonymous.remove(start, end)
        self.candidates.remove(start, end)

    def writable(self, start, end):
        fresh = _Ranges(self.anonymous.pieces(start, end))
        for low, high in self.candidates.pieces(start, end):
            fresh.remove(low, high)
        for low, high in fresh.ranges:
            self.candidates.add(low, high)
        return fresh.ranges

    def moved(self, start, old_end, new_start, new_end):
        was = bool(self.candidates.pieces(start, old_end))
        anonymous = bool(self.anonymous.pieces(start, old_end))
        self.unmapped(start, old_end)
        self.unmapped(new_start, new_end)
        if anonymous:
            self.anonymous.add(new_start, new_end)
        if was:
            self.candidates.add(new_start, new_end)     # what was registered moves along; nothing new


_MAPPING = (Op.MMAP, Op.MAP, Op.MUNMAP, Op.MPROTECT, Op.MREMAP, Op.BRK, Op.FORK, Op.VFORK, Op.EXEC, Op.EXIT)


def mappings(trace: Trace) -> np.ndarray:
    """The candidates of a history: rows of `REGISTRATION`, one for each piece of memory when it becomes writable."""
    rows: list[tuple[int, int, int]] = []
    memories: dict[int, _Memory] = {}
    base = 0
    for block in trace.blocks():
        for index in np.flatnonzero(np.isin(block["op"], _MAPPING) & (block["errno"] == 0)).tolist():
            event = block[index]
            memory = memories.setdefault(int(event["pid"]), _Memory())
            rows += [(base + index, low, high - low) for low, high in _fresh(memory, memories, event)]
        base += len(block)
    return np.array(rows, REGISTRATION)


def _fresh(memory, memories, event):
    """Apply one event; the pieces that became writable by it."""
    op, addr, length, ret = (int(event[name]) for name in ("op", "addr", "length", "ret"))
    start = addr if op != Op.MMAP else ret
    end = start + -(-length // PAGE) * PAGE
    if op in (Op.MMAP, Op.MAP):
        anonymous = int(event["flags"]) & MAP_TYPE_ANONYMOUS == MAP_PRIVATE_ANONYMOUS
        return memory.mapped(start, end, anonymous, int(event["prot"]) & PROT_WRITE)
    if op == Op.MPROTECT:
        return memory.writable(start, end) if int(event["prot"]) & PROT_WRITE else []
    if op == Op.MUNMAP:
        memory.unmapped(start, end)
    elif op == Op.MREMAP:
        memory.moved(start, end, ret, ret + -(-int(event["arg"]) // PAGE) * PAGE)
    elif op == Op.BRK:
        old, new = (-(-value // PAGE) * PAGE for value in (memory.brk, ret))
        memory.brk = ret
        if new > old > 0:                               # the first tells only where the heap begins
            return memory.mapped(old, new, True, True)
        if new < old:
            memory.unmapped(new, old)
    elif op == Op.FORK:
        memories[int(event["arg"])] = _Memory(memory)
    elif op == Op.VFORK:
        memories[int(event["arg"])] = memory            # its parent's, until exec or exit
    else:                               # exec, exit
        memories.pop(int(event["pid"]), None)
    return []


def _buffers(candidates, random):
    """Cut each mapping into buffers, one behind the other."""
    low, high = np.log(BUFFER_BYTES)
    rows = []
    for event, start, length in candidates.tolist():
        end = start + length
        while end - start >= BUFFER_BYTES[0]:
            size = int(np.exp(random.uniform(low, high))) // PAGE * PAGE
            size = min(max(size, BUFFER_BYTES[0]), end - start)
            rows.append((event, start, size))
            start += size
    return np.array(rows, REGISTRATION)


def _take(lengths, wanted, random):
    """Indices of pieces in random order, each unless it would exceed the `wanted` bytes."""
    taken, left = [], wanted
    for index in random.permutation(len(lengths)).tolist():
        if lengths[index] <= left:
            taken.append(index)
            left -= int(lengths[index])
    return np.array(taken, np.intp)
