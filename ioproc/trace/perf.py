"""Reading ``perf script --ns -F pid,tid,time,addr,ip`` of user-mode page faults, and the mapping records
that ``--show-mmap-events`` adds to it."""
from __future__ import annotations

import operator
import re
from typing import Any

import numpy as np

from .calls import ANONYMOUS
from .format import EVENT, Op, Trace, TraceWriter
from .source import FilePath, LineError, TraceError, lines

__all__ = ["read_perf"]

_FAULT = re.compile(r"(?:.*\s)?(\d{1,9})/(\d{1,9})\s+(?:\[\d+\]\s+)?(\d{1,10})\.(\d{6,9}):"
                    r"\s+(?:\d+\s+)?(?:page-faults\S*:\s+)?([0-9a-f]{1,16})\s+([0-9a-f]{1,16})\s*$", re.S)
_RECORD = re.compile(r".*?\s(\d{1,10})\.(\d{6,9}):\s+PERF_RECORD_(\w+)(.*)", re.S)
MAPPING = re.compile(r" (-?\d{1,9})/(-?\d{1,9}): \[(0x[0-9a-f]{1,16}|0)\((0x[0-9a-f]{1,16}|0)\)"
                      r" @ (0x[0-9a-f]{1,16}|0)([^\]]*)\]: (?:([r-])([w-])([x-])([ps])|[rx]) (.*)", re.S)
_LOST = re.compile(r"PERF_RECORD_LOST(?:_SAMPLES)? lost (\d{1,18})$")

# perf script sorts by time, but for a few events near the ends of its rounds.
WINDOW = 1 << 12

FAULT = int(Op.FAULT)


def read_perf(path: FilePath, lenient: bool = False) -> Trace:
    """Read the page faults of a recording.

    Parameters
    ----------
    path : path-like
        The output of perf script, plain or compressed.
    lenient : bool
        Skip and count lines that make no sense, instead of raising.

    Returns
    -------
    Trace
        In time order, times in ns as recorded: FAULT with the instruction's address in ``arg``, and MAP
        for the mapping records.

    Raises
    ------
    TraceError
        With file and line number, if a line is broken or far out of order.
    """
    writer = TraceWriter()
    files: dict[tuple[str, str | None], dict[str, Any]] = {}
    counts = {"lines": 0, "skipped_lines": 0, "other_records": 0, "lost": 0}
    rows: list[tuple[Any, ...]] = []
    last = 0

    def drain(keep):
        nonlocal rows, last
        rows.sort(key=operator.itemgetter(0))
        done = rows[:max(len(rows) - keep, 0)]
        if done:
            last = done[-1][0]
            writer.extend(np.array(done, EVENT))
        rows = rows[len(done):]

    for number, line in lines(path):
        try:
            row = _row(line, files)
        except LineError as error:
            if not lenient:
                raise TraceError(path, str(error), number) from None
            counts["skipped_lines"] += 1
            continue
        if row is None:
            counts["other_records"] += bool(line)
            lost = _LOST.search(line)
            counts["lost"] += int(lost[1]) if lost else 0
            continue
        counts["lines"] += 1
        if row[0] < last:
            if not lenient:
                raise TraceError(path, "this is earlier than lines long before it", number)
            counts["skipped_lines"] += 1
            continue
        rows.append(row)
        if len(rows) >= 2 * WINDOW:
            drain(WINDOW)
    drain(0)
    if not counts["lines"] and not counts["other_records"]:
        raise TraceError(path, "no line of perf script in it")
    return writer.finish({"files": list(files.values()), "counts": counts})


def _row(line, files):
    try:
        ids, time, addr, ip = line.split()
        pid, tid = ids.split("/")
        seconds, fraction = time.split(".")
        if len(fraction) != 10 or fraction[9] != ":":
            raise ValueError
        t = int(seconds) * 1_000_000_000 + int(fraction[:9])
        pid, tid, addr, ip = int(pid), int(tid), int(addr, 16), int(ip, 16)
        if (t | addr | ip) >> 64 or (pid | tid) >> 31:
            raise ValueError
    except ValueError:
        return _unusual(line, files)
    return (t, pid, tid, FAULT, 0, 0, 0, 0, 0, -1, addr, 0, ip, 0)


def mapping(match):
    """``(path, inode)`` of what a mapping record maps, and the fields of its MAP event after the time; None: the kernel's own.

    Neither is known of anonymous memory; what only the kernel names has no inode.
    """
    pid, tid, addr, length, offset, inode, r, w, x, kept, path = match.groups()
    addr, length, offset = int(addr, 16), int(length, 16), int(offset, 16)
    if pid.startswith("-") or addr >> 63:
        return None
    if addr >> 57 or length >> 56 or offset >> 62:
        raise LineError("no such mapping can exist")
    prot = (r == "r") + 2 * (w == "w") + 4 * (x == "x" or r is None)
    flags = 1 if kept == "s" else 2
    if not path.startswith("/") or path == "//anon":
        flags |= ANONYMOUS
    path = None if path == "//anon" else path.encode("utf-8", "replace").decode()
    inode = inode.strip() if not flags & ANONYMOUS and inode.count(" ") == 3 else None
    return (path, inode), (int(pid), int(tid), Op.MAP, 0, 1, 0, prot, flags, -1, addr, length, offset, 0)


def mapping_row(t, named, event, files):
    """The row of a MAP event; what it maps goes into `files`."""
    if named[0] is None:
        return t, *event
    path, inode = named
    entry = {"path": path, "size": 0, "kind": "file", "inode": inode, "number": len(files)}
    return t, *event[:8], files.setdefault(named, entry)["number"], *event[9:]


def _unusual(line, files):
    if not line.strip() or line.startswith("#"):
        return None
    match = _RECORD.match(line)
    if match:
        seconds, fraction, kind, rest = match.groups()
        if kind not in ("MMAP", "MMAP2"):
            return None
        match = MAPPING.match(rest)
        if match is None:
            raise LineError("broken mapping record")
        mapped = mapping(match)
        return mapped and mapping_row(_time(seconds, fraction), *mapped, files)
    match = _FAULT.match(line)
    if match is None:
        raise LineError("not a line of perf script --ns -F pid,tid,time,addr,ip")
    pid, tid, seconds, fraction, addr, ip = match.groups()
    return (_time(seconds, fraction), int(pid), int(tid), Op.FAULT, 0, 0, 0, 0, 0, -1,
            int(addr, 16), 0, int(ip, 16), 0)


def _time(seconds, fraction):
    return int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0"))
