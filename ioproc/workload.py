"""Histories without a recording: programs as they are often described, by parameters, with their communication.

Each function makes a `Trace` whose ``metadata["workload"]`` has the name and every parameter; the same parameters make the same
history.  All have in common:

messages
    How many there are, spread over the program's life.  A message begins where its buffer does; its length is drawn
    log-uniformly from ``smallest`` to ``largest`` bytes and cut at the buffer's end.
hot
    Buffers are used again as Zipf's law has it: the k-th favourite k**-hot times as often as the first.  0: all alike.
sends
    The share of messages that the device reads; it writes the others.

A page is touched by the program before it communicates, so that a replay agrees with the history whatever device it has; what
goes otherwise with a device is its own doing (a pre-copying fork leaves nothing for the program's next write to copy).
`communicate` adds messages to a recorded history.
"""
from __future__ import annotations

import bisect
import inspect
import math
import operator
from collections import defaultdict
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from numbers import Real
from typing import Any

import numpy as np

from .text import settings
from .trace.communication import choose
from .trace.format import EVENT, Access, Op, Trace

__all__ = ["WORKLOADS", "checkpoint", "communicate", "make", "malloc_churn", "pressure", "ranks", "static"]

PAGE = 4096
STEP = 1000                     # ns between events
PID = 100
TOP = 0x7FFF_0000_0000          # mappings are placed from here down, as the kernel places them
HEAP = 0x5555_5000_0000
RW = PROT_READ | PROT_WRITE
ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS
MADV_POPULATE_WRITE = 23        # "touch": makes pages present, whether or not they are
HEADER, ALIGNMENT = 16, 16      # of a chunk of malloc
TOP_PAD = 128 << 10             # mallopt(3): what the heap grows by besides what is asked for
THRESHOLD = 128 << 10           # mallopt(3): M_MMAP_THRESHOLD and M_TRIM_THRESHOLD where nothing is set,
THRESHOLD_MAX = 32 << 20        # which then follow the sizes that are freed, up to here
LARGEST = 1 << 40


# ---- the programs

def static(arrays: int = 64, array_bytes: int = 1 << 20, communicating: float = 0.25, messages: int = 10_000, smallest: int = 64,
           largest: int = 1 << 20, hot: float = 1.0, sends: float = 0.5, seed: int = 0) -> Trace:
    """A program that allocates its arrays once and uses them to its end.

    Parameters
    ----------
    arrays, array_bytes : int
        Each mapped, and written from end to end.
    communicating : float
        The share of the arrays that messages are in, each a buffer.
    messages, smallest, largest, hot, sends
        As this module says.
    seed : int

    Returns
    -------
    Trace
    """
    parameters = dict(locals())
    _whole(1, arrays=arrays, array_bytes=array_bytes)
    _room(arrays * array_bytes, arrays=arrays, array_bytes=array_bytes)
    _shares(communicating=communicating)
    random = _checked(messages, smallest, largest, hot, sends, seed)
    size = _pages(array_bytes)
    starts = TOP - size * np.arange(1, arrays + 1)
    events = _Events()
    for start in starts.tolist():
        events.map(start, size)
    buffers = random.permutation(starts)[:math.ceil(communicating * arrays)]
    events.extend(_messages(random, messages if len(buffers) else 0, buffers, array_bytes, smallest, largest, hot, sends))
    events.add(Op.EXIT)
    return events.trace("static", parameters)


def malloc_churn(allocator: str = "glibc", allocations: int = 10_000, live: int = 256, object_smallest: int = 1 << 10,
                 object_largest: int = 1 << 20, mmap_threshold: int | None = None, trim_threshold: int | None = None,
                 arena_bytes: int = 4 << 20, communicating: float = 0.25, messages: int = 10_000, smallest: int = 64,
                 largest: int = 1 << 20, hot: float = 1.0, sends: float = 0.5, seed: int = 0) -> Trace:
    """A program that frees and allocates all the time; some of its objects are buffers.

    Parameters
    ----------
    allocator : {"glibc", "mmap", "arena"}
        ``glibc``: objects of `mmap_threshold` bytes or more are mapped and unmapped; smaller ones lie on the heap, in the lowest
        place they fit in; the heap's end goes back to the kernel when `trim_threshold` bytes of it are free.  ``mmap``: every
        object is mapped and unmapped.  ``arena``: memory is mapped `arena_bytes` at a time and never returned.
    allocations : int
        Objects that take the place of another, chosen at random.
    live : int
        Objects at a time, `object_smallest` to `object_largest` bytes each (log-uniform), written from end to end.
    mmap_threshold, trim_threshold : int, optional
        Of ``glibc``, bytes.  Either given, both stay; none: both begin at 128 KiB and grow with the mapped objects that are
        freed, to at most 32 MiB, as mallopt(3) says.
    communicating : float
        The share of the places for objects whose objects are buffers.
    messages, smallest, largest, hot, sends
        As this module says; a place is hot, whatever object it holds.
    seed : int

    Returns
    -------
    Trace
    """
    parameters = dict(locals())
    if allocator not in ("glibc", "mmap", "arena"):
        raise ValueError(f"allocator = {allocator!r}: not 'glibc', 'mmap' or 'arena'")
    _whole(0, allocations=allocations)
    _whole(1, live=live, object_smallest=object_smallest, arena_bytes=arena_bytes)
    _whole(object_smallest, object_largest=object_largest)
    _room(live * object_largest, live=live, object_largest=object_largest)
    _room(arena_bytes, arena_bytes=arena_bytes)
    for name, value in (("mmap_threshold", mmap_threshold), ("trim_threshold", trim_threshold)):
        if value is not None:
            _whole(0, **{name: value})
            if allocator != "glibc":
                raise ValueError(f"{name} = {value}: the allocator {allocator!r} has none")
    _shares(communicating=communicating)
    random = _checked(messages, smallest, largest, hot, sends, seed)
    events = _Events()
    if allocator == "arena":
        malloc = _Allocator(events, None, None, arena_bytes)
    else:
        malloc = _Allocator(events, 0 if allocator == "mmap" else mmap_threshold, trim_threshold)
    sizes = _log_uniform(random, live + allocations, object_smallest, object_largest)
    places = np.concatenate((np.arange(live), random.integers(0, live, allocations)))
    objects, starts, rows = [0] * live, [], []
    for number, (place, size) in enumerate(zip(places.tolist(), sizes.tolist())):
        if number >= live:
            malloc.free(objects[place])
        objects[place] = malloc.allocate(size)
        starts.append(objects[place])
        rows.append(len(events.rows))
    events.add(Op.EXIT)
    buffers = math.ceil(communicating * live)
    said = _Draw(random, messages if buffers else 0, buffers, smallest, largest, hot, sends)
    after = np.sort(random.integers(live - 1, live + allocations, len(said)))
    # the newest object of the place by then
    order = np.lexsort((np.arange(len(places)), places))
    found = np.searchsorted(places[order] * len(places) + order, said.buffer * len(places) + after, side="right") - 1
    found = order[found]
    events.insert(np.array(rows)[after], _rows(Op.COMM, access=said.access, addr=np.array(starts)[found],
                                               length=np.minimum(said.length, sizes[found])))
    return events.trace("malloc_churn", parameters)


def checkpoint(memory: int = 64 << 20, checkpoints: int = 4, dirty: float = 0.2, lasts: float = 0.5, buffers: int = 32,
               buffer_bytes: int = 256 << 10, messages: int = 10_000, smallest: int = 64, largest: int = 1 << 20,
               hot: float = 1.0, sends: float = 0.5, seed: int = 0) -> Trace:
    """A program that is saved by its forked children while it computes and communicates.

    Parameters
    ----------
    memory : int
        Bytes, one mapping, written from end to end at the beginning.
    checkpoints : int
        Forks.  A child reads all of `memory` (which faults nothing) and writes it out through a buffer of its own.
    dirty : float
        The share of the pages that the program writes between one fork and the next: each is copied, if the child is still there.
    lasts : float
        The share of that time during which the child is there.
    buffers, buffer_bytes : int
        Spread evenly over `memory`.
    messages, smallest, largest, hot, sends
        As this module says; about the first ``1 / (checkpoints + 1)`` of them before the first fork.
    seed : int

    Returns
    -------
    Trace
    """
    parameters = dict(locals())
    _whole(1, memory=memory, buffers=buffers, buffer_bytes=buffer_bytes)
    _whole(0, checkpoints=checkpoints)
    _shares(dirty=dirty, lasts=lasts)
    _room(memory, memory=memory)
    _fits(buffers, buffer_bytes, memory)
    random = _checked(messages, smallest, largest, hot, sends, seed)
    size = _pages(memory)
    base = TOP - size
    starts = random.permutation(base + _spread(buffers, buffer_bytes, memory))
    events = _Events()
    events.map(base, size)
    rounds = np.array_split(_messages(random, messages, starts, buffer_bytes, smallest, largest, hot, sends), checkpoints + 1)
    events.extend(rounds[0])
    for child, said in enumerate(rounds[1:], PID + 1):
        at = np.sort(random.random(len(said)))
        pages = random.permutation(size // PAGE)[:round(dirty * size / PAGE)]
        writes = random.random(len(pages))
        # what the device wrote before is copied by then, and the program's own write faults no more
        first = np.full(size // PAGE, np.inf)
        for when, addr, length, access in zip(at.tolist(), said["addr"].tolist(), said["length"].tolist(), said["access"]):
            if access == Access.WRITE:
                begin, end = (addr - base) // PAGE, (addr - base + length - 1) // PAGE + 1
                np.minimum(first[begin:end], when, out=first[begin:end])
        early = writes < first[pages]
        faults = _rows(Op.FAULT, access=Access.WRITE, addr=base + pages[early] * PAGE, length=PAGE)
        there = np.concatenate((said, faults))
        order = np.concatenate((at, writes[early]))
        there, order = there[np.argsort(order, kind="stable")], np.sort(order)
        ends = int(np.searchsorted(order, lasts))
        events.add(Op.FORK, arg=child)
        events.map(base - (1 << 20), 1 << 20, pid=child)
        events.extend(there[:ends])
        events.add(Op.EXIT, pid=child)
        events.extend(there[ends:])
    events.add(Op.EXIT)
    return events.trace("checkpoint", parameters)


def pressure(memory: int = 64 << 20, resident: float = 0.5, passes: int = 4, chunk_bytes: int = 64 << 10, buffers: int = 32,
             buffer_bytes: int = 256 << 10, messages: int = 10_000, smallest: int = 64, largest: int = 1 << 20,
             hot: float = 1.0, sends: float = 0.5, seed: int = 0) -> Trace:
    """A program with more memory than there are frames.

    The metadata's ``frames`` and ``swap_slots`` say with how much it means to be replayed; with more it runs without pressure.
    A page that is used again is said to be so by MADV_POPULATE_WRITE, which is right whether or not it was swapped out.

    Parameters
    ----------
    memory : int
        Bytes, one mapping, written from end to end at the beginning.
    resident : float
        The share of its pages that there are frames for.
    passes : int
        How often all of it is used again, in pieces of `chunk_bytes` in random order.
    buffers, buffer_bytes : int
        Spread evenly over `memory`.
    messages, smallest, largest, hot, sends
        As this module says.
    seed : int

    Returns
    -------
    Trace
    """
    parameters = dict(locals())
    _whole(1, memory=memory, chunk_bytes=chunk_bytes, buffers=buffers, buffer_bytes=buffer_bytes)
    _whole(0, passes=passes)
    _shares(resident=resident)
    _room(memory, memory=memory)
    _fits(buffers, buffer_bytes, memory)
    random = _checked(messages, smallest, largest, hot, sends, seed)
    size, chunk = _pages(memory), _pages(chunk_bytes)
    base = TOP - size
    starts = random.permutation(base + _spread(buffers, buffer_bytes, memory))
    events = _Events()
    events.map(base, size)
    offsets = np.concatenate([random.permutation(np.arange(0, size, chunk)) for _ in range(passes)] or [np.empty(0, np.int64)])
    uses = _rows(Op.MADVISE, addr=base + offsets, length=np.minimum(chunk, size - offsets), arg=MADV_POPULATE_WRITE)
    said = _messages(random, messages, starts, buffer_bytes, smallest, largest, hot, sends)
    mixed = np.empty(len(uses) + len(said), EVENT)
    used = np.zeros(len(mixed), bool)
    used[random.permutation(len(mixed))[:len(uses)]] = True
    mixed[used], mixed[~used] = uses, said
    events.extend(mixed)
    events.add(Op.EXIT)
    pages = size // PAGE
    return events.trace("pressure", parameters, frames=max(int(resident * pages), 64), swap_slots=pages)


def ranks(n: int = 16, iterations: int = 50, memory: int = 4 << 20, buffers: int = 8, buffer_bytes: int = 64 << 10,
          messages: int = 10_000, rebuild: int = 10, shared_bytes: int = 64 << 10, smallest: int = 64, largest: int = 64 << 10,
          hot: float = 1.0, sends: float = 0.5, seed: int = 0) -> Trace:
    """Many processes on a node, each with the same layout: started by one, they exchange and exit.

    Parameters
    ----------
    n : int
        Processes, besides the one that starts them.
    iterations : int
        The messages of one, all ranks' mixed, come before those of the next.
    memory : int
        Bytes of each rank that never communicate.
    buffers, buffer_bytes : int
        Of each rank, one mapping.
    messages, smallest, largest, hot, sends
        As this module says, of all ranks together.
    rebuild : int
        After so many iterations each rank unmaps its buffers and maps them anew (at the same address); 0: never.
    shared_bytes : int
        Of each rank, in a segment that all map, which it writes and its right neighbour reads; 0: none.
    seed : int

    Returns
    -------
    Trace
    """
    parameters = dict(locals())
    _whole(1, n=n, memory=memory, buffers=buffers, buffer_bytes=buffer_bytes)
    _whole(0, iterations=iterations, rebuild=rebuild, shared_bytes=shared_bytes)
    _room(n * (memory + buffers * buffer_bytes + shared_bytes), n=n, memory=memory, buffers=buffers, buffer_bytes=buffer_bytes,
          shared_bytes=shared_bytes)
    random = _checked(messages, smallest, largest, hot, sends, seed)
    size, piece, shared = _pages(memory), _pages(buffer_bytes), _pages(shared_bytes)
    arena = TOP - size - buffers * piece
    segment = arena - (1 << 30) - n * shared
    events = _Events()
    pids = list(range(PID + 1, PID + 1 + n))
    for pid in pids:
        events.add(Op.FORK, arg=pid)
        events.add(Op.EXEC, pid=pid)
        events.map(TOP - size, size, pid=pid)
        events.map(arena, buffers * piece, pid=pid)
        if shared:
            events.add(Op.MMAP, pid=pid, prot=RW, flags=MAP_SHARED, file=0, length=n * shared, ret=segment)
    for rank, pid in enumerate(pids if shared else []):
        events.add(Op.FAULT, pid=pid, access=Access.WRITE, addr=segment + rank * shared, length=shared)
        if n > 1:
            events.add(Op.FAULT, pid=pid, access=Access.READ, addr=segment + (rank - 1) % n * shared, length=shared)
    said = _messages(random, messages if iterations else 0, random.permutation(arena + piece * np.arange(buffers)), buffer_bytes,
                     smallest, largest, hot, sends)
    said["pid"] = said["tid"] = PID + 1 + random.integers(0, n, len(said))
    for number, some in enumerate(np.array_split(said, max(iterations, 1))):
        if rebuild and number and number % rebuild == 0:
            for pid in pids:
                events.add(Op.MUNMAP, pid=pid, addr=arena, length=buffers * piece)
                events.map(arena, buffers * piece, pid=pid)
        events.extend(some)
    for pid in [*pids, PID]:
        events.add(Op.EXIT, pid=pid)
    return events.trace("ranks", parameters, files=[{"path": None, "size": n * shared, "kind": "shm"}] if shared else [])


WORKLOADS = {workload.__name__: workload for workload in (static, malloc_churn, checkpoint, pressure, ranks)}


def make(text: str) -> Trace:
    """Make the workload that a command line names.

    Parameters
    ----------
    text : str
        ``NAME`` or ``NAME:parameter=value,...``, such as ``malloc_churn:allocator=mmap,live=100``.

    Returns
    -------
    Trace

    Raises
    ------
    ValueError
        No such workload or parameter, or a bad value; the message names it.
    """
    name, _, values = text.partition(":")
    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r}: not one of {', '.join(WORKLOADS)}")
    known = inspect.signature(WORKLOADS[name]).parameters
    given = settings(values)
    for key in given:
        if key not in known:
            raise ValueError(f"{key!r}: {name} has the parameters {', '.join(known)}")
    try:
        return WORKLOADS[name](**given)
    except TypeError as error:
        raise ValueError(str(error)) from None


# ---- messages for a recorded history

def communicate(trace: Trace, share: float = 0.1, kind: str = "buffers", seed: int = 0, messages: int = 4, smallest: int = 64,
                largest: int = 1 << 20) -> Trace:
    """Add communication to a recorded history that has none.

    Parameters
    ----------
    trace : Trace
    share : float
        Of the writable anonymous memory, chosen as `ioproc.trace.choose` does.
    kind : {"mappings", "buffers"}
    seed : int
    messages : int
        Of each buffer, at random times between its first touch and its end (unmapped, moved, mapped over, made read-only, exec or
        exit).  Each begins at a random page; its length is log-uniform from `smallest` to `largest`.  What the recording says of
        the program's faults stays true: messages are in pages that the program has touched before (all, if the history has no
        faults), and the device writes only where no fault is still to come (half of those messages; it reads in the others).
        A buffer that is never touched has none.

    Returns
    -------
    Trace
        A new one, with COMM events; its metadata's ``communication`` has the parameters.

    Raises
    ------
    ValueError
        The history has communication of its own.
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"trace = {trace!r}: not a Trace; see Trace.load")
    if any((block["op"] == Op.COMM).any() for block in trace.blocks()):
        raise ValueError("trace: has communication of its own")
    random = _checked(messages, smallest, largest, 0, 0, seed)
    plan = choose(trace, share, kind, seed).plan
    events = np.asarray(trace.events)
    faults = _Faults(events)
    rows, places = [], []
    for event, start, length, end in zip(*(plan[name].tolist() for name in plan.dtype.names), _ends(events, plan).tolist()):
        pid = int(events["pid"][event])
        first, last = faults.of(pid, start, length // PAGE, event, end)
        touched = max(event, int(first.min()))
        if touched >= end:
            continue
        for at, size in zip(random.integers(touched + 1, end + 1, messages).tolist(),
                            _log_uniform(random, messages, smallest, largest).tolist()):
            usable = first < at
            begin = int(random.choice(np.flatnonzero(usable)))
            pages = min(-(-size // PAGE), len(usable) - begin)
            stop = begin + int(np.argmin(np.append(usable[begin:begin + pages], False)))
            writes = random.random() < 0.5 and (last[begin:stop] < at).all()
            rows.append((pid, Access.WRITE if writes else Access.READ, start + begin * PAGE, min(size, (stop - begin) * PAGE)))
            places.append(at)
    pids, accesses, addresses, lengths = np.array(rows, np.uint64).reshape(-1, 4).T
    said = _rows(Op.COMM, pid=pids, access=accesses, addr=addresses, length=lengths)
    order = np.argsort(places, kind="stable")
    places = np.array(places, np.intp)[order]
    said = said[order]
    said["t"] = events["t"][places - 1]
    made = {"share": share, "kind": kind, "seed": seed, "messages": messages, "smallest": smallest, "largest": largest}
    return Trace(np.insert(events, places, said), trace.metadata | {"communication": made})


class _Faults:
    """The faults of a history, to find those of one place and time."""

    def __init__(self, events):
        self.index = np.flatnonzero(events["op"] == Op.FAULT)
        found = events[self.index]
        self.addr, self.pid = found["addr"].astype(np.int64), found["pid"]
        order = np.lexsort((self.addr, self.pid))
        self.index, self.addr, self.pid = self.index[order], self.addr[order], self.pid[order]

    def of(self, pid, start, pages, event, end):
        """Of each page, the first and the last event after `event` and before `end` that is a fault in it; never and -1: none."""
        low, high = np.searchsorted(self.pid, (pid, pid + 1))
        low, high = low + np.searchsorted(self.addr[low:high], (start, start + pages * PAGE))
        index = self.index[low:high]
        during = (event < index) & (index < end)
        index, page = index[during], (self.addr[low:high][during] - start) // PAGE
        last = np.full(pages, -1)
        np.maximum.at(last, page, index)
        first = np.full(pages, np.iinfo(np.int64).max if len(self.index) else -1)
        np.minimum.at(first, page, index)
        return first, last


def _ends(events, plan):
    """The event that ends each buffer's life; the number of events: none does."""
    ends = np.full(len(plan), len(events))
    alive = defaultdict(list)           # of each process, (start, end, row) in address order
    heaps = defaultdict(int)
    taking = (Op.MMAP, Op.MAP, Op.SHMAT, Op.MUNMAP, Op.MPROTECT, Op.MREMAP, Op.BRK, Op.FORK, Op.EXEC, Op.EXIT)
    calls = np.flatnonzero(np.isin(events["op"], taking) & (events["errno"] == 0))
    row = 0
    for at in np.union1d(calls, plan["event"].astype(np.int64)).tolist():
        event = events[at]
        pid, buffers = int(event["pid"]), alive[int(event["pid"])]
        for start, end in _taken(event, heaps):
            begin = bisect.bisect_right(buffers, start, key=operator.itemgetter(1))
            stop = bisect.bisect_left(buffers, end, key=operator.itemgetter(0))
            ends[[number for *_, number in buffers[begin:stop]]] = at
            del buffers[begin:stop]
        while row < len(plan) and plan["event"][row] == at:
            start, length = int(plan["start"][row]), int(plan["length"][row])
            bisect.insort(alive[pid], (start, start + length, row))
            row += 1
    return ends


def _taken(event, heaps):
    """The memory of its process that an event takes, or makes unusable."""
    op, pid, addr, length, ret = (int(event[name]) for name in ("op", "pid", "addr", "length", "ret"))
    if op in (Op.MMAP, Op.MAP, Op.SHMAT):
        return [(ret, ret + _pages(length))]
    if op == Op.MUNMAP or op == Op.MPROTECT and int(event["prot"]) & RW != RW:
        return [(addr, addr + _pages(length))]
    if op == Op.MREMAP:
        new = _pages(int(event["arg"]))
        return [(addr, addr + _pages(length)), (ret, ret + new)] if ret != addr else [(addr + new, addr + _pages(length))]
    if op == Op.BRK:
        old, heaps[pid] = heaps[pid], ret
        return [(_pages(ret), _pages(old))] if ret < old else []
    if op == Op.FORK:
        heaps[int(event["arg"])] = heaps[pid]
    if op in (Op.EXEC, Op.EXIT):
        heaps[pid] = 0
        return [(0, 1 << 64)]
    return []


# ---- what they are made of

class _Events:
    """A history as it happens.  A run of page faults is one row, with the length of the run, until the end."""

    def __init__(self):
        self.parts, self.rows = [], []

    def add(self, op, *, pid=PID, access=0, prot=0, flags=0, file=-1, addr=0, length=0, arg=0, ret=0):
        self.rows.append((0, pid, pid, op, access, 0, 0, prot, flags, file, addr, length, arg, ret))

    def map(self, start, length, pid=PID):
        """Map memory and write it from end to end."""
        self.add(Op.MMAP, pid=pid, prot=RW, flags=ANONYMOUS, length=length, ret=start)
        self.add(Op.FAULT, pid=pid, access=Access.WRITE, addr=start, length=length)

    def extend(self, rows):
        self.parts += [np.array(self.rows, EVENT), rows]
        self.rows = []

    def insert(self, places, rows):
        """Put rows before those that are in these places now, which `add` made."""
        self.rows = np.insert(np.array(self.rows, EVENT), places, rows)

    def trace(self, name, parameters, files=(), **metadata):
        self.extend(np.empty(0, EVENT))
        rows = np.concatenate(self.parts)
        faults = rows["op"] == Op.FAULT
        count = np.where(faults, rows["length"] // PAGE, 1).astype(np.intp)
        rows["length"][faults] = 0
        events = np.repeat(rows, count)
        position = np.arange(len(events)) - np.repeat(np.cumsum(count) - count, count)
        events["addr"] += (PAGE * position).astype(np.uint64)
        events["t"] = STEP * np.arange(len(events))
        parameters = {key: value.item() if isinstance(value, np.generic) else value for key, value in parameters.items()}
        told = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
        return Trace(events, {"command": f"ioproc.workload.{name}({told})", "character": name.replace("_", " "),
                              "workload": {"name": name} | parameters, "files": list(files)} | metadata)


class _Draw:
    """Messages before it is known where their buffers are."""

    def __init__(self, random, count, buffers, smallest, largest, hot, sends):
        weights = np.cumsum(np.arange(1, buffers + 1, dtype=float) ** -hot)
        self.buffer = np.searchsorted(weights, random.random(count) * (weights[-1] if buffers else 0), side="right")
        self.length = _log_uniform(random, count, smallest, largest)
        self.access = np.where(random.random(count) < sends, Access.READ, Access.WRITE)

    def __len__(self):
        return len(self.buffer)


def _messages(random, count, starts, room, smallest, largest, hot, sends):
    """COMM events in buffers of `room` bytes each, the favourite first."""
    said = _Draw(random, count, len(starts), smallest, largest, hot, sends)
    return _rows(Op.COMM, access=said.access, addr=starts[said.buffer], length=np.minimum(said.length, room))


class _Gaps:
    """The free ranges of memory, in address order."""

    def __init__(self):
        self.starts, self.ends = [], []

    def give(self, start, end):
        at = bisect.bisect_left(self.starts, start)
        before, after = at > 0 and self.ends[at - 1] == start, at < len(self.starts) and self.starts[at] == end
        low, high = at - before, at + after
        start, end = self.starts[low] if before else start, self.ends[at] if after else end
        self.starts[low:high], self.ends[low:high] = [start], [end]

    def lowest(self, length):
        """Take the lowest place that is long enough; None: there is none."""
        for at, (start, end) in enumerate(zip(self.starts, self.ends)):
            if end - start >= length:
                self._cut(at, start + length, end)
                return start
        return None

    def highest(self, length):
        for at in range(len(self.starts) - 1, -1, -1):
            start, end = self.starts[at], self.ends[at]
            if end - start >= length:
                self._cut(at, start, end - length)
                return end - length
        return None

    def _cut(self, at, start, end):
        if start < end:
            self.starts[at], self.ends[at] = start, end
        else:
            del self.starts[at], self.ends[at]

    def top(self, end):
        """Where the last gap begins if it ends at `end`; else `end`."""
        return self.starts[-1] if self.ends and self.ends[-1] == end else end

    def shorten(self, end):
        self.ends[-1] = end


class _Allocator:
    """malloc and free, as the system calls and faults they cause."""

    def __init__(self, events, mmap_threshold, trim_threshold, arena_bytes=0):
        self.events = events
        self.dynamic = mmap_threshold is None and trim_threshold is None
        self.mmap_threshold = THRESHOLD if mmap_threshold is None else mmap_threshold
        self.trim_threshold = THRESHOLD if trim_threshold is None else trim_threshold
        self.arena_bytes = arena_bytes
        self.maps, self.heap = _Gaps(), _Gaps()
        self.maps.give(HEAP + (1 << 40), TOP)
        self.touched = set()            # pages of the heap or the arenas
        self.used = {}                  # (start, end) by the address given out
        self.brk = HEAP
        if not arena_bytes:
            events.add(Op.BRK, ret=HEAP)

    def allocate(self, size):
        length = -(-(size + HEADER) // ALIGNMENT) * ALIGNMENT
        if not self.arena_bytes and size >= self.mmap_threshold:
            length = _pages(length)
            start = self.maps.highest(length)
            self.events.map(start, length)
        else:
            start = self.heap.lowest(length)
            if start is None:
                self.grow(length)
                start = self.heap.lowest(length)
            for page in range(start // PAGE, (start + length - 1) // PAGE + 1):
                if page not in self.touched:
                    self.touched.add(page)
                    self.events.add(Op.FAULT, access=Access.WRITE, addr=page * PAGE, length=PAGE)
        self.used[start + HEADER] = start, start + length
        return start + HEADER

    def grow(self, length):
        if self.arena_bytes:
            length = _pages(max(length, self.arena_bytes))
            start = self.maps.highest(length)
            self.events.add(Op.MMAP, prot=RW, flags=ANONYMOUS, length=length, ret=start)
            self.heap.give(start, start + length)
            return
        old, self.brk = self.brk, _pages(self.heap.top(self.brk) + length + TOP_PAD)
        self.events.add(Op.BRK, addr=self.brk, ret=self.brk)
        self.heap.give(old, self.brk)

    def free(self, addr):
        start, end = self.used.pop(addr)
        if start >= HEAP + (1 << 40) and not self.arena_bytes:
            self.events.add(Op.MUNMAP, addr=start, length=end - start)
            self.maps.give(start, end)
            if self.dynamic and self.mmap_threshold < end - start <= THRESHOLD_MAX:
                self.mmap_threshold, self.trim_threshold = end - start, 2 * (end - start)
            return
        self.heap.give(start, end)
        top = self.heap.top(self.brk)
        if not self.arena_bytes and self.brk - top >= self.trim_threshold and _pages(top + TOP_PAD) < self.brk:
            old, self.brk = self.brk, _pages(top + TOP_PAD)
            self.events.add(Op.BRK, addr=self.brk, ret=self.brk)
            self.heap.shorten(self.brk)
            self.touched.difference_update(range(self.brk // PAGE, old // PAGE))


def _rows(op, pid=PID, **fields):
    """Events of one operation; what is an array gives their number."""
    fields |= {"op": op, "pid": pid, "tid": pid}
    rows = np.zeros(np.broadcast_shapes(*(np.shape(value) for value in fields.values())), EVENT)
    rows["file"] = -1
    for name, value in fields.items():
        rows[name] = value
    return rows


def _log_uniform(random, count, smallest, largest):
    drawn = np.exp(random.uniform(math.log(smallest), math.log(largest), count))
    return np.clip(np.rint(drawn).astype(np.int64), smallest, largest)


def _spread(buffers, buffer_bytes, memory):
    """Offsets of buffers in whole pages, at even distances."""
    return np.arange(buffers) * (_pages(memory) // buffers // PAGE * PAGE)


def _pages(length):
    """In whole pages."""
    return -(-length // PAGE) * PAGE


def _whole(least: int, **values: Any) -> None:
    for name, value in values.items():
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"{name} = {value!r}: not a whole number") from None
        if value < least:
            raise ValueError(f"{name} = {value}: not at least {least}")


def _shares(**values: Any) -> None:
    for name, value in values.items():
        _number(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: not in 0 .. 1")


def _number(name, value):
    if not isinstance(value, Real):
        raise TypeError(f"{name} = {value!r}: not a number")


def _room(total, **values):
    if total > LARGEST:
        told = ", ".join(f"{name} = {value}" for name, value in values.items())
        raise ValueError(f"{told}: more than {LARGEST} bytes of memory")


def _fits(buffers, buffer_bytes, memory):
    if buffers * _pages(buffer_bytes) > _pages(memory):
        raise ValueError(f"buffers = {buffers} of buffer_bytes = {buffer_bytes}: more than memory = {memory}")


def _checked(messages, smallest, largest, hot, sends, seed):
    """What all workloads have in common; the random numbers."""
    _whole(0, messages=messages, seed=seed)
    _whole(1, smallest=smallest)
    _whole(smallest, largest=largest)
    _number("hot", hot)
    if not 0 <= hot < math.inf:
        raise ValueError(f"hot = {hot}: not a finite number, at least 0")
    _shares(sends=sends)
    return np.random.default_rng(seed)
