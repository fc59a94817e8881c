"""The history format: fixed-size events, a metadata object, and the file that holds both.

A file is a 64-byte header, the metadata as JSON, and the events, all little endian.  The events are
either plain rows, which are mapped and never read as a whole, or *packed* in blocks of byte columns,
which compress several times better; packed and compressed files are unpacked block by block into an
unnamed temporary file.  Three checksums cover everything, and nothing in a file is ever executed.
"""
from __future__ import annotations

import enum
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from .source import FilePath, TraceError, open_input, open_output, output_path

__all__ = ["EVENT", "Access", "Op", "Origin", "Trace", "TraceError", "TraceWriter"]


class Op(enum.IntEnum):
    """What an event is.  Which fields an operation uses is said in docs/trace.md."""

    MMAP = 1
    MUNMAP = 2
    MPROTECT = 3
    MREMAP = 4
    BRK = 5
    MADVISE = 6
    MSYNC = 7
    FORK = 8
    VFORK = 9
    EXEC = 10
    EXIT = 11
    SHMAT = 12
    SHMDT = 13
    FAULT = 14
    COMM = 15
    MLOCK = 16
    MUNLOCK = 17
    MAP = 18


class Access(enum.IntEnum):
    """Direction of a fault, or of a communication as the device sees it."""

    UNKNOWN = 0
    READ = 1
    WRITE = 2


class Origin(enum.IntFlag):
    """What of an event was inferred, not recorded."""

    RECORDED = 0
    EVENT = 1
    ACCESS = 2
    FILE = 4
    SIZE = 8


# In the flags of a FAULT: the kernel took it, on the program's memory.
KERNEL = 1

EVENT = np.dtype([
    ("t", "<u8"), ("pid", "<i4"), ("tid", "<i4"),
    ("op", "u1"), ("access", "u1"), ("origin", "u1"), ("errno", "u1"),
    ("prot", "<u4"), ("flags", "<u4"), ("file", "<i4"),
    ("addr", "<u8"), ("length", "<u8"), ("arg", "<u8"), ("ret", "<u8"),
])

MAGIC = b"\x89IOPROC\n"
VERSION = 1
ROWS, PACKED = 0, 1
BLOCK = 1 << 14
# magic, version, layout, number of events, bytes of metadata, bytes of events as stored,
# crc32 of the metadata, crc32 of the stored events, events per packed block, crc32 of the header before
# this field
HEADER = struct.Struct("<8sIIQQQIIII8x")
BLOCK_LIMIT = 1 << 20
METADATA_LIMIT = 1 << 28


class Trace:
    """A recorded history: events in time order, and what is known about how they came about.

    Parameters
    ----------
    events : numpy.ndarray
        One-dimensional, of dtype `EVENT`; may be a memory map.
    metadata : dict, optional
        JSON-serialisable; ``metadata["files"]`` is the table that the events' ``file`` indexes.
    """

    def __init__(self, events: np.ndarray, metadata: dict[str, Any] | None = None) -> None:
        events = np.asanyarray(events)
        if events.dtype != EVENT or events.ndim != 1:
            raise ValueError("events must be a one-dimensional array of dtype ioproc.trace.EVENT")
        self.events = events
        self.metadata = dict(metadata or {})
        self.metadata.setdefault("files", [])

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[Any]:
        for begin in range(0, len(self.events), BLOCK):
            yield from self.events[begin:begin + BLOCK]

    def __getitem__(self, index: Any) -> Any:
        return self.events[index]

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} events: {self.metadata.get('command', 'unknown command')}>"

    def blocks(self, size: int | None = None) -> Iterator[np.ndarray]:
        """Yield the events in arrays of at most `size`."""
        size = size or BLOCK
        for begin in range(0, len(self.events), size):
            yield self.events[begin:begin + size]

    def inferred(self) -> dict[str, int]:
        """Count what the history does not tell.

        Returns
        -------
        dict
            Events that were inferred as a whole (``events``) or in their ``access``, ``file`` identity or ``size``.
        """
        origins = np.zeros(256, np.int64)
        for block in self.blocks():
            origins += np.bincount(block["origin"], minlength=256)

        def having(bit: int) -> int:
            return int(sum(origins[value] for value in range(256) if value & bit))

        return {"events": having(Origin.EVENT), "access": having(Origin.ACCESS),
                "file": having(Origin.FILE), "size": having(Origin.SIZE)}

    def programs(self) -> list[dict[str, Any]]:
        """Count the events of each process, and tell what it ran.

        Returns
        -------
        list of dict
            ``pid``, ``events``, ``faults`` and ``program`` (the path it executed last; a fork has its parent's), in order
            of appearance.
        """
        found: dict[int, dict[str, Any]] = {}

        def entry(pid: int) -> dict[str, Any]:
            return found.setdefault(pid, {"pid": pid, "events": 0, "faults": 0, "program": None})

        for block in self.blocks():
            pids, first, counts = np.unique(block["pid"], return_index=True, return_counts=True)
            for index in np.argsort(first):
                entry(int(pids[index]))["events"] += int(counts[index])
            pids, counts = np.unique(block["pid"][block["op"] == Op.FAULT], return_counts=True)
            for pid, count in zip(pids.tolist(), counts.tolist(), strict=True):
                entry(pid)["faults"] += count
            begun = block[np.isin(block["op"], (Op.EXEC, Op.FORK, Op.VFORK))]
            for op, pid, file, child in begun[["op", "pid", "file", "arg"]].tolist():
                if op == Op.EXEC:
                    entry(pid)["program"] = self.metadata["files"][file]["path"] if file >= 0 else None
                elif child < 1 << 31:
                    entry(child)["program"] = entry(pid)["program"]
        return list(found.values())

    def summary(self) -> dict[str, Any]:
        """Count the events by operation and origin.

        Returns
        -------
        dict
            ``events``, ``seconds``, ``processes``, ``threads``, ``operations`` (by name), ``failed`` (calls),
            ``faults`` (by access: ``read``, ``write``, ``unknown``; and of all of them ``kernel``) and ``inferred``
            (by kind: whole events, access, file identity, size).
        """
        operations, accesses = np.zeros(256, np.int64), np.zeros(256, np.int64)
        pids: set[int] = set()
        tids: set[int] = set()
        begin = end = 0
        failed = kernel = 0
        for number, block in enumerate(self.blocks()):
            operations += np.bincount(block["op"], minlength=256)
            faults = block[block["op"] == Op.FAULT]
            accesses += np.bincount(faults["access"], minlength=256)
            kernel += int(np.count_nonzero(faults["flags"] & KERNEL))
            failed += int(np.count_nonzero(block["errno"]))
            pids.update(np.unique(block["pid"]).tolist())
            tids.update(np.unique(block["tid"]).tolist())
            begin = begin if number else int(block["t"][0])
            end = int(block["t"][-1])
        return {
            "events": len(self),
            "seconds": (end - begin) / 1e9,
            "processes": len(pids),
            "threads": len(tids),
            "operations": {op.name.lower(): int(operations[op]) for op in Op if operations[op]},
            "failed": failed,
            "faults": {access.name.lower(): int(accesses[access]) for access in Access} | {"kernel": kernel},
            "inferred": self.inferred(),
        }

    def save(self, path: FilePath, *, packed: bool | None = None) -> None:
        """Write the history to `path`, compressed if its suffix is .xz, .gz or .zst.

        It is complete or not there; a symbolic link stays one.

        Parameters
        ----------
        path : path-like
            A regular file, which is replaced, or none yet.
        packed : bool, optional
            Store byte columns instead of rows.  Default: yes if the file is compressed.

        Raises
        ------
        OSError
            It cannot be written, or is something else than a regular file.
        TraceError
            The suffix is .zst and the package zstandard is missing.
        """
        path = Path(path)
        target = output_path(path)
        if packed is None:
            packed = path.suffix in (".xz", ".gz", ".zst")
        # Arguments and paths need not be UTF-8; what is not becomes "?".
        metadata = json.dumps(self.metadata, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        encode = _pack if packed else _row_bytes
        # The checksum stands in the header, so the events are encoded twice rather than kept.
        size, checksum = 0, 0
        for block in self.blocks():
            data = encode(block)
            size += len(data)
            checksum = zlib.crc32(data, checksum)
        header = HEADER.pack(MAGIC, VERSION, PACKED if packed else ROWS, len(self), len(metadata), size,
                             zlib.crc32(metadata), checksum, BLOCK, 0)
        header = _sealed(header)
        partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{path.suffix}")
        try:
            with open_output(partial) as out:
                out.write(header)
                out.write(metadata)
                for block in self.blocks():
                    out.write(encode(block))
            os.replace(partial, target)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
            raise

    @classmethod
    def load(cls, path: FilePath) -> Self:
        """Read a history that `save` wrote; plain rows stay in the file and are mapped.

        Raises
        ------
        TraceError
            The file is missing, damaged, truncated, of another version, or no history at all.
        """
        with open_input(path) as stream:
            header = _read_header(stream, path)
            metadata = _read_metadata(stream, path, header)
            events = _read_events(stream, path, header)
        _check_events(events, metadata, path)
        return cls(events, metadata)


class TraceWriter:
    """Collects events in an unnamed temporary file; `finish` turns them into a `Trace`.

    Memory does not grow with the number of events.  `array` shows the events written so far and may be
    assigned to, which is how a later event corrects an earlier one.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ioproc-")  # noqa: SIM115 - lives as long as the map
        self._pending: list[tuple[Any, ...]] = []
        self._length = 0
        self._map = self._mapped(BLOCK)

    def _mapped(self, capacity: int) -> np.memmap:
        self._file.truncate(capacity * EVENT.itemsize)
        return np.memmap(self._file, EVENT, "r+", shape=(capacity,))

    def __len__(self) -> int:
        return self._length + len(self._pending)

    def _reserve(self, count: int) -> None:
        if count > len(self._map):
            self._map = self._mapped(max(count, 2 * len(self._map)))

    def append(self, row: tuple[Any, ...]) -> int:
        """Add one event, a tuple in the order of EVENT's fields; returns its index."""
        index = self._length + len(self._pending)
        self._pending.append(row)
        if len(self._pending) >= 4096:
            self.flush()
        return index

    def extend(self, rows: np.ndarray) -> None:
        """Add an array of events."""
        self.flush()
        self._reserve(self._length + len(rows))
        self._map[self._length:self._length + len(rows)] = rows
        self._length += len(rows)

    def flush(self) -> None:
        if self._pending:
            self._reserve(self._length + len(self._pending))
            self._map[self._length:self._length + len(self._pending)] = self._pending
            self._length += len(self._pending)
            self._pending.clear()

    @property
    def array(self) -> np.ndarray:
        self.flush()
        return self._map[:self._length]

    def event(self, index: int) -> Any:
        """One event already written, as a view."""
        if index >= self._length:
            self.flush()
        return self._map[index]

    def assign(self, index: int, **fields: Any) -> None:
        """Correct fields of an event that was already written."""
        if index >= self._length:
            self.flush()
        for name, value in fields.items():
            self._map[name][index] = value

    def finish(self, metadata: dict[str, Any] | None = None) -> Trace:
        """Return the `Trace` of everything written; it owns the temporary file from here on.

        Places that were reserved and never became an event (operation 0) are closed up.
        """
        self.flush()
        kept = 0
        for begin in range(0, self._length, BLOCK):
            block = self._map[begin:min(begin + BLOCK, self._length)]
            chosen = block["op"] != 0
            count = int(np.count_nonzero(chosen))
            if kept != begin or count != len(block):
                self._map[kept:kept + count] = block[chosen]
            kept += count
        self._length = kept
        return Trace(self._map[:kept], metadata)


def _row_bytes(block):
    return block.tobytes()


# A packed block holds, for each field, the differences to the previous event of the same block and kind
# (none for the small fields), as byte planes: all lowest bytes first, and so on.  What an operation does not
# use is zero in every event, and costs nothing once compressed.
_DIFFERENCES = {"t", "addr", "ret", "arg"}


def _pack(block):
    planes = []
    order = np.argsort(block["pid"], kind="stable")
    for name in EVENT.names:
        column = np.ascontiguousarray(block[name])
        if name in ("addr", "ret", "arg"):
            column = column[order]
        if name in _DIFFERENCES:
            column = np.diff(column, prepend=column.dtype.type(0))
        planes.append(column.view(np.uint8).reshape(len(block), -1).T.tobytes())
    return b"".join(planes)


def _unpack(data, count):
    block = np.empty(count, EVENT)
    order, offset = None, 0
    for name in EVENT.names:
        kind = EVENT.fields[name][0]
        size = count * kind.itemsize
        planes = np.frombuffer(data, np.uint8, size, offset).reshape(kind.itemsize, count)
        column = np.ascontiguousarray(planes.T).view(kind).reshape(count)
        if name in _DIFFERENCES:
            column = np.cumsum(column, dtype=kind)
        if name in ("addr", "ret", "arg"):
            order = np.argsort(block["pid"], kind="stable") if order is None else order
            block[name][order] = column
        else:
            block[name] = column
        offset += size
    return block


def _sealed(header):
    at = HEADER.size - 12
    return header[:at] + struct.pack("<I", zlib.crc32(header[:at])) + header[at + 4:]


def _exactly(stream, size, path):
    """Read `size` bytes in pieces: a lying header must not make us allocate what is not there."""
    pieces, left = [], size
    while left:
        piece = stream.read(min(left, 1 << 20))
        if not piece:
            raise TraceError(path, f"truncated: {left} of {size} bytes are missing")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _read_header(stream, path):
    data = stream.read(HEADER.size)
    if data[:8] != MAGIC:
        raise TraceError(path, "not an ioproc history")
    if len(data) < HEADER.size:
        raise TraceError(path, "truncated in its header")
    _, version, layout, count, metadata_size, size, metadata_crc, events_crc, block, _ = HEADER.unpack(data)
    if version != VERSION:
        raise TraceError(path, f"format version {version}; this program reads version {VERSION}")
    if _sealed(data) != data:
        raise TraceError(path, "damaged: the header's checksum does not match")
    if layout not in (ROWS, PACKED) or size != count * EVENT.itemsize or metadata_size > METADATA_LIMIT \
            or not 0 < block <= BLOCK_LIMIT:
        raise TraceError(path, "damaged: the header contradicts itself")
    return layout, count, metadata_size, metadata_crc, events_crc, block


def _read_metadata(stream, path, header):
    data = _exactly(stream, header[2], path)
    if zlib.crc32(data) != header[3]:
        raise TraceError(path, "damaged: the metadata's checksum does not match")
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TraceError(path, f"damaged: the metadata is not JSON ({error})") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("files"), list):
        raise TraceError(path, "damaged: the metadata has no table of files")
    return metadata


def _read_events(stream, path, header):
    layout, count, metadata_size, _, events_crc, size = header
    plain = layout == ROWS and stream.plain
    writer = None if plain else TraceWriter()
    checksum = 0
    for begin in range(0, count, size):
        length = min(size, count - begin)
        data = _exactly(stream, length * EVENT.itemsize, path)
        checksum = zlib.crc32(data, checksum)
        if writer is not None:
            writer.extend(_unpack(data, length) if layout == PACKED else np.frombuffer(data, EVENT))
    if checksum != events_crc:
        raise TraceError(path, "damaged: the events' checksum does not match")
    if stream.read(1):
        raise TraceError(path, "damaged: there is something after the last event")
    if writer is not None:
        return writer.finish().events
    if not count:
        return np.empty(0, EVENT)
    return np.memmap(path, EVENT, "r", HEADER.size + metadata_size, (count,))


def _check_events(events, metadata, path):
    """A file with a right checksum may still hold events that mean nothing."""
    last, files = 0, metadata["files"]
    for entry in files:
        if not (isinstance(entry, dict) and isinstance(entry.get("path"), str | None)
                and isinstance(entry.get("size"), int) and 0 <= entry["size"] < 1 << 63
                and entry.get("kind") in ("file", "shm")):
            raise TraceError(path, "damaged: an entry of the table of files is malformed")
    if not isinstance(metadata.get("untraced_s"), int | float | None):
        raise TraceError(path, "damaged: the untraced wall time is not a number")
    for begin in range(0, len(events), BLOCK):
        block = events[begin:begin + BLOCK]
        wrong = (block["op"] < 1) | (block["op"] > max(Op)) | (block["access"] > 2)
        wrong |= (block["file"] < -1) | (block["file"] >= len(files)) | (block["origin"] > 15)
        earlier = np.concatenate(([last], block["t"][:-1]))
        wrong |= block["t"] < earlier
        if wrong.any():
            raise TraceError(path, f"damaged: event {begin + int(np.argmax(wrong))} is malformed")
        last = block["t"][-1]
