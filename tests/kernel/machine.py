"""The running kernel's side: builds the executor, sends it programs and reads what every operation did."""

import os
import struct
import subprocess
import sysconfig
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("executor.c")
OPCODES = {
    name: number
    for number, name in enumerate(
        ("mmap", "munmap", "mprotect", "mremap", "madvise", "msync", "brk", "read", "write", "fork", "exit",
         "fread", "fwrite", "mlock", "munlock", "shmat", "shmdt", "truncate", "punch", "pin", "unpin", "remap",
         "spawn"), 1)
}
STRAY, SIGNALLED, SKIPPED = -5000, -6000, -7000
"""Results that are no system call's: see executor.c."""
PRESENT, SWAPPED, FILE, EXCLUSIVE, ZERO = 1, 2, 4, 8, 16
"""Bits of a page's state."""

_PROGRAM = struct.Struct("<14Q")
_OP = struct.Struct("<2q6Q")
_OUTCOME = struct.Struct("<qII")
_PROCESS = struct.Struct("<6I")
_VMA = np.dtype([("start", "u8"), ("end", "u8"), ("offset", "u8"), ("prot", "u1"), ("shared", "u1"), ("file", "i1"),
                 ("heap", "u1"), ("pad", "u4")])
_PAGE = np.dtype([("pfn", "u8"), ("mapcount", "u4"), ("page", "u2"), ("state", "u2")])


@dataclass
class State:
    """One process after an operation.

    ``vmas`` are tuples (start, end, offset, prot, shared, file); ``pages`` maps a page number of the window to a tuple
    (pfn, mapcount, page, state).  ``locked`` and ``swapped`` count pages of the whole process.
    """

    vmas: list
    pages: dict
    locked: int = 0
    swapped: int = 0


@dataclass
class Outcome:
    """What one operation did: its result (or -errno), the page faults of an access, and every live process."""

    result: int
    faults: int
    states: dict


def build(directory):
    """Compile the executor into a directory and return its path."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    target = Path(directory) / "executor"
    command = [compiler, "-O1", "-Wall", "-no-pie", "-o", str(target), str(SOURCE)]
    # a static program has the fewest mappings for the kernel to list and to copy at fork
    if subprocess.run([*command, "-static"], capture_output=True).returncode:
        subprocess.run(command, check=True)
    return target


def _encode(program):
    files = (*program.files, 0, 0)[:2]
    parts = [_PROGRAM.pack(len(program.ops), *program.window, program.start_brk, *files, *(*program.segments, 0, 0)[:2],
                           program.limit_as, program.limit_data, program.mappings,
                           program.limit_memlock, program.limit_stack, program.huge)]
    for name, process, *arguments in program.ops:
        arguments = [int(x) & (1 << 64) - 1 for x in arguments] + [0] * (6 - len(arguments))
        parts.append(_OP.pack(OPCODES[name], process, *arguments))
    return b"".join(parts)


def _decode(frame, count):
    at, outcomes = 0, []
    for _ in range(count):
        result, faults, processes = _OUTCOME.unpack_from(frame, at)
        at += _OUTCOME.size
        states = {}
        for _ in range(processes):
            process, vmas, pages, locked, swapped, _ = _PROCESS.unpack_from(frame, at)
            at += _PROCESS.size
            table = np.frombuffer(frame, _VMA, vmas, at)
            at += table.nbytes
            lines = [row[:6] for row in table.tolist()]
            table = np.frombuffer(frame, _PAGE, pages, at)
            at += table.nbytes
            states[process] = State(lines, {row[2]: row for row in table.tolist()}, locked, swapped)
        outcomes.append(Outcome(result, faults, states))
    return outcomes


class Kernel:
    """The running kernel, as something that runs programs.

    Parameters
    ----------
    executor : path
        What `build` returned.
    """

    def __init__(self, executor):
        self._process = subprocess.Popen([str(executor)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        magic, *self._sees = struct.unpack("<4I", self._read(16))
        if magic != 0x6F696F70:
            raise RuntimeError("the executor did not greet")

    @property
    def sees(self):
        """What this user may see: a set of "zero" (the zero page), "pfn" and "mapcount"."""
        return {name for name, is_seen in zip(("zero", "pfn", "mapcount"), self._sees) if is_seen}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the executor and its workers."""
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, n):
        data = self._process.stdout.read(n)
        if len(data) != n:
            raise RuntimeError("the executor ended early; its message is on stderr")
        return data

    def run(self, program):
        """Return the outcome of each operation of a program."""
        return next(self.run_all([program]))[1]

    def run_all(self, programs, ahead=8):
        """Yield (program, outcomes) in order; the kernel works ahead of the caller."""
        sent = deque()
        for program in programs:
            self._process.stdin.write(_encode(program))
            self._process.stdin.flush()
            sent.append(program)
            if len(sent) > ahead:
                yield self._receive(sent.popleft())
        while sent:
            yield self._receive(sent.popleft())

    def _receive(self, program):
        (size,) = struct.unpack("<I", self._read(4))
        return program, _decode(self._read(size), len(program.ops))
