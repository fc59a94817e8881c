"""Reading ``strace -f [-y] --seccomp-bpf -ttt -T -X raw -e trace=memory,process``.

The order of the lines is the order in which strace saw the tracees stop, so it is kept: a call that takes
memory away counts from the line where it starts, one that gives memory from the line where it ends, and a
fork from where it starts, since the child may run before it returns.
"""
from __future__ import annotations

import errno
import re

from .calls import ANONYMOUS, CLONE_VFORK, CLONE_VM, EXECS, FORKS, KNOWN, TAKES, CallReader, fields
from .format import Op, Trace
from .source import FilePath, LineError, TraceError, lines

__all__ = ["read_strace"]

_LINE = re.compile(r"(?:\[pid +)?(\d{1,9})\]? +(\d{1,10})\.(\d{6,9}) (.+)", re.S)
_CALL = re.compile(r"([\w?]+)\((.*)\) += (0x[0-9a-f]+|-?\d+|\?)(.*)", re.S)
_RESUMED = re.compile(r"<\.\.\. ([\w?]+) resumed>(.*)", re.S)
_HALF = re.compile(r"([\w?]+)\((.*?) ?<(?:unfinished|pid changed to (\d{1,9})) \.\.\.>$", re.S)
_ENDED = re.compile(r"\+\+\+ (?:exited with \d+|killed by \w+(?: \(core dumped\))?"
                    r"|superseded by execve in pid \d{1,9}) \+\+\+$")
_DURATION = re.compile(r" <(\d{1,6})\.(\d{6,9})>$")
_ERROR = re.compile(r" ([A-Z]\w*)")
_MMAP = re.compile(r"(\w+), (\w+), (\w+), (\w+), (-?\w+)(?:<(.*)>(\(deleted\))?)?, (\w+)$", re.S)
_FLAGS = re.compile(r"\bflags=(0x[0-9a-f]+|0)(?:[,|})]|$)")
_PATH = re.compile(r'execve(?:at\([^"]*|\()"((?:[^"\\]|\\.)*)"')
_NOT_RAW = re.compile(r"\b(?:PROT_|MAP_|CLONE_|MADV_|MREMAP_|MS_)")


def read_strace(path: FilePath, lenient: bool = False) -> Trace:
    """Read the system calls of a recording.

    Parameters
    ----------
    path : path-like
        The output of strace, plain or compressed.
    lenient : bool
        Skip and count lines that make no sense, instead of raising.

    Returns
    -------
    Trace
        In strace's order, times in ns since the epoch.  ``metadata["files"]`` tells files apart by
        descriptor and, with ``-y``, path; ``metadata["counts"]`` says what was passed over.

    Raises
    ------
    TraceError
        With file and line number, if a line is broken.
    """
    reader = _Reader()
    for number, line in lines(path):
        try:
            reader.line(line)
        except LineError as error:
            if not lenient:
                raise TraceError(path, str(error), number) from None
            reader.counts["skipped_lines"] += 1
    if not reader.counts["lines"]:
        raise TraceError(path, "no line of strace in it")
    return reader.finish()


def number(text, limit=1 << 64):
    """A raw argument as an unsigned integer below `limit`."""
    if text == "NULL":
        return 0
    try:
        value = int(text, 0)
    except ValueError:
        if _NOT_RAW.search(text):
            raise LineError("symbolic arguments; record with strace -X raw") from None
        raise LineError(f"not a number: {text[:40]!r}") from None
    if not 0 <= value < limit:
        raise LineError(f"out of range: {text[:40]!r}")
    return value


class _Reader(CallReader):
    def __init__(self):
        super().__init__()
        self.counts["signals"] = 0
        self.pending = {}       # tid -> (name, arguments so far, start, reserved row)
        self.first_row = {}     # tid that appeared before its clone returned -> row from which it wrote
        self.gone = {}          # tid that has also ended before -> that row, and the one of its end

    def line(self, line):
        match = _LINE.match(line)
        if match is None:
            if not line or line.startswith("strace: "):
                return
            raise LineError("not a line of strace -f -ttt -T")
        tid, seconds, fraction, rest = match.groups()
        tid = int(tid)
        t = int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0"))
        if rest.startswith("+++ "):
            self.ended(tid, t, rest)
        elif rest.startswith("--- "):
            if not rest.endswith(" ---"):
                raise LineError("broken signal line")
            self.counts["signals"] += 1
        elif rest.startswith("<..."):
            self.resumed(tid, rest)
        elif rest.endswith(" ...>") and (match := _HALF.match(rest)):
            self.started(tid, t, *match.groups())
        else:
            match = _CALL.match(rest)
            if match is None:
                raise LineError("neither a call with its result nor a part of one")
            self.call(tid, t, None, *match.groups())
        self.counts["lines"] += 1

    # -- threads and processes

    def pid_of(self, tid):
        pid = self.group.get(tid)
        if pid is None:
            pid = self.join(tid, tid)
            self.first_row[tid] = len(self.writer)
        return pid

    def join(self, tid, pid):
        if self.gone.pop(tid, None) is None:
            super().join(tid, pid)
        return pid

    def thread(self, tid, pid):
        """A clone has returned: `tid` is a thread of `pid`, whatever it may have looked like before."""
        first, end = self.gone.get(tid, (None, None))
        if end is not None:
            self.writer.assign(end, op=0)
        elif self.group.get(tid) == tid != pid:
            first = self.first_row.get(tid)
        if first is not None:
            early = self.writer.array[first:]
            early["pid"][early["tid"] == tid] = pid
            self.members.pop(tid, None)
        self.join(tid, pid)

    def ended(self, tid, t, text):
        if not _ENDED.match(text):
            raise LineError("broken end of a thread")
        pid = self.pid_of(tid)
        if "superseded" in text:
            # A thread's execve goes on under the leader's number.
            call = self.pending.get(int(text.split()[-2]))
            if call is not None:
                self.drop(tid)
                self.pending[tid] = self.pending.pop(int(text.split()[-2]))
            return
        self.drop(tid)
        self.group.pop(tid, None)
        first = self.first_row.pop(tid, None)
        members = self.members[pid]
        members.discard(tid)
        if not members:
            del self.members[pid]
            self.breaks.pop(pid, None)
            end = self.emit(t, pid, tid, Op.EXIT)
            if first is not None and any(name in FORKS for name, *_ in self.pending.values()):
                self.gone[tid] = first, end

    def drop(self, tid):
        """What `tid` was in the middle of never returned."""
        name = self.pending.pop(tid, ("",))[0]
        if name in KNOWN - EXECS:
            self.counts["cut_short"] += 1

    # -- calls and their halves

    def started(self, tid, t, name, arguments, successor):
        pid = self.pid_of(tid)
        self.drop(tid)
        row = None
        if name in TAKES or name in FORKS or name == "brk":
            row = self.emit(t + 999, pid, tid, 0)
        self.pending[int(successor) if successor else tid] = (name, arguments, t, row)

    def resumed(self, tid, rest):
        match = _RESUMED.match(rest)
        if match is None:
            raise LineError("broken resumption of a call")
        name, tail = match.groups()
        begun, arguments, t, row = self.pending.pop(tid, (None,) * 4)
        if begun is None:
            raise LineError(f"{name} is resumed but was not started")
        whole = f"{begun}({arguments}{tail}"
        match = _CALL.match(whole) if begun == name else None
        if match is None:
            raise LineError(f"{begun} was started, and this does not resume it")
        self.call(tid, t, row, *match.groups())

    def call(self, tid, t, row, name, arguments, result, tail):
        pid = self.pid_of(tid)
        if name not in KNOWN:
            if name not in ("exit", "exit_group"):
                self.ignored(name)
            return
        if result == "?":
            self.counts["cut_short"] += 1
            return
        match = _DURATION.search(tail)
        if match is None:
            raise LineError("no duration after the result; record with strace -T")
        seconds, fraction = match.groups()
        end = t + int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0"))
        failed = 0
        if result == "-1":
            error = _ERROR.match(tail)
            if error is None:
                raise LineError("failed with no error name")
            failed = min(getattr(errno, error[1], 255), 255)
        value = 0 if failed else number(result)
        if name in FORKS:
            if failed:
                self.counts["failed_forks"] += 1
            else:
                self.forked(t, row, pid, tid, value, _clone_flags(name, arguments))
        elif name in EXECS:
            match = _PATH.match(f"{name}({arguments}")
            if failed:
                self.counts["failed_execs"] += 1
            else:
                self.executed(t, end, pid, _unescaped(match[1]) if match else None)
        else:
            # strace rounds off the microseconds at which a call starts.
            self.changed(min(t + 999, end), end, row, pid, tid, failed, self.event(name, arguments, value))

    def event(self, name, arguments, value):
        if name == "mmap":
            return self.mapped(arguments, value)
        event = fields(name, [number(part) for part in arguments.split(", ")], value)
        if name == "shmat":
            event["file"] = self.file(None, event["file"], "shm")
        return event

    def mapped(self, arguments, value):
        match = _MMAP.match(arguments)
        if match is None:
            raise LineError("mmap needs six arguments")
        addr, length, prot, flags, fd, path, deleted, offset = match.groups()
        flags, file = number(flags), -1
        if not flags & ANONYMOUS:
            path = _unescaped(path) + (" (deleted)" if deleted else "") if path is not None else None
            file = self.file(path, number(fd, 1 << 31))
        return fields("mmap", [number(addr), number(length), number(prot), flags, file, number(offset)], value)

    def finish(self):
        self.counts["cut_short"] += sum(name in KNOWN - EXECS for name, *_ in self.pending.values())
        return super().finish()


def _clone_flags(name, arguments):
    if not name.startswith("clone"):
        return CLONE_VM | CLONE_VFORK if name == "vfork" else 0
    match = _FLAGS.search(arguments)
    if match is None:
        raise LineError(f"no raw flags in {name}; record with strace -X raw")
    return number(match[1])


def _unescaped(text):
    """Undo C escapes, and make what is not UTF-8 harmless."""
    if "\\" in text:
        raw = re.sub(rb"\\(x[0-9a-f]{1,2}|[0-7]{1,3}|.)", _escape, text.encode("utf-8", "surrogateescape"))
        return raw.decode("utf-8", "replace")
    return text.encode("utf-8", "replace").decode()


def _escape(match):
    code = match[1]
    if code[:1] == b"x" and len(code) > 1:
        return bytes([int(code[1:], 16)])
    if code.isdigit() and max(code) < ord("8"):
        return bytes([int(code, 8) & 255])
    return {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"v": b"\v", b"f": b"\f"}.get(code, code)
