"""Adding communication to a history: which thread sent or received which memory, and when."""
from __future__ import annotations

import heapq
import json
import operator

from .format import Access, Op, Trace, TraceWriter
from .source import FilePath, LineError, TraceError, lines

__all__ = ["annotate"]

FIELDS = ("time", "tid", "address", "length", "direction")
DIRECTIONS = {"send": Access.READ, "recv": Access.WRITE, "receive": Access.WRITE}


def annotate(trace: Trace, path: FilePath, *, lenient: bool = False) -> Trace:
    """Return a history with communication merged into it.

    Parameters
    ----------
    trace : Trace
    path : path-like
        A text, one communication per line in time order: either ``time,tid,address,length,direction`` or
        a JSON object with these names.  Time is in seconds as the recording counts them (since the epoch),
        or in integer ns since the history's first event if it is written ``+ns``.  Addresses and lengths
        are decimal or 0x-hexadecimal; the direction is ``send`` or ``recv``.
    lenient : bool
        Skip and count broken lines instead of raising.

    Returns
    -------
    Trace
        With COMM events, backed by a temporary file.
    """
    threads: dict[int, int] = {}
    for block in trace.blocks():
        threads.update(zip(block["tid"].tolist(), block["pid"].tolist(), strict=True))
    counts = {"lines": 0, "skipped_lines": 0}
    epoch = trace.metadata.get("epoch_ns", 0)
    events = (row for block in trace.blocks(1 << 13) for row in block.tolist())
    writer = TraceWriter()
    for row in heapq.merge(events, _rows(path, threads, epoch, counts, lenient), key=operator.itemgetter(0)):
        writer.append(row)
    return writer.finish({**trace.metadata, "comm": counts})


def _rows(path, threads, epoch, counts, lenient):
    last = 0
    for number, line in lines(path):
        if not line.strip() or line.startswith("#") or line.replace(" ", "") == ",".join(FIELDS):
            continue
        try:
            row = _row(line, threads, epoch)
            if row[0] < last:
                raise LineError("the lines are not in time order")
        except LineError as error:
            if not lenient:
                raise TraceError(path, str(error), number) from None
            counts["skipped_lines"] += 1
            continue
        counts["lines"] += 1
        last = row[0]
        yield row


def _row(line, threads, epoch):
    if line.lstrip().startswith("{"):
        try:
            record = json.loads(line)
            values = [str(record[name]) for name in FIELDS]
        except (ValueError, RecursionError, KeyError):
            raise LineError(f"not a JSON object with {', '.join(FIELDS)}") from None
    else:
        values = [part.strip() for part in line.split(",")]
    if len(values) != len(FIELDS):
        raise LineError(f"needs {', '.join(FIELDS)}")
    time, tid, address, length, direction = values
    try:
        t = int(time[1:]) if time.startswith("+") else _ns(time) - epoch
        tid, address, length = int(tid), int(address, 0), int(length, 0)
    except ValueError:
        raise LineError("time, tid, address and length must be numbers") from None
    if not (0 <= t < 1 << 64 and 0 <= address < 1 << 64 and 0 <= length < 1 << 64):
        raise LineError("before the history's first event, or out of range")
    if direction not in DIRECTIONS:
        raise LineError("the direction is send or recv")
    if tid not in threads:
        raise LineError(f"thread {tid} is not in the history")
    return (t, threads[tid], tid, Op.COMM, DIRECTIONS[direction], 0, 0, 0, 0, -1, address, length, 0, 0)


def _ns(text):
    seconds, _, fraction = text.partition(".")
    if not (seconds.isdecimal() and (fraction + "0").isdecimal()):
        raise ValueError
    return int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, "0"))
