"""System calls that change an address space: what their arguments mean, and from when on they count."""
from __future__ import annotations

from .format import Op, TraceWriter
from .source import LineError

__all__ = ["CLONE_THREAD", "CLONE_VFORK", "CLONE_VM", "EXECS", "FORKS", "GIVES", "KNOWN", "TAKES", "CallReader", "fields"]

CLONE_VM, CLONE_VFORK, CLONE_THREAD = 0x100, 0x4000, 0x10000
ANONYMOUS = 0x20

# At which of its two ends a call takes effect; the others of these classes of calls change no mapping.
TAKES = {"munmap", "madvise", "shmdt", "msync", "munlock"}
GIVES = {"mmap", "mprotect", "pkey_mprotect", "mremap", "shmat", "mlock", "mlock2", "brk"}
FORKS = {"clone", "clone3", "fork", "vfork"}
EXECS = {"execve", "execveat"}
KNOWN = TAKES | GIVES | FORKS | EXECS

# The fields of an event that a call's arguments are, in their order.
_ARGUMENTS = {
    "mmap": (Op.MMAP, "addr", "length", "prot", "flags", "file", "arg"),
    "munmap": (Op.MUNMAP, "addr", "length"),
    "mprotect": (Op.MPROTECT, "addr", "length", "prot"),
    "pkey_mprotect": (Op.MPROTECT, "addr", "length", "prot", "key"),
    "mremap": (Op.MREMAP, "addr", "length", "arg", "flags", "ret"),
    "brk": (Op.BRK, "addr"),
    "madvise": (Op.MADVISE, "addr", "length", "arg"),
    "msync": (Op.MSYNC, "addr", "length", "arg"),
    "mlock": (Op.MLOCK, "addr", "length"),
    "mlock2": (Op.MLOCK, "addr", "length", "flags"),
    "munlock": (Op.MUNLOCK, "addr", "length"),
    "shmat": (Op.SHMAT, "file", "addr", "flags"),
    "shmdt": (Op.SHMDT, "addr"),
}
_LIMITS = (("prot", 1 << 32), ("flags", 1 << 32), ("file", 1 << 31))
_GIVES_ADDRESS = {"mmap", "mremap", "shmat", "brk"}


def fields(name, arguments, value):
    """An event's fields out of a call's arguments; ``file`` is still a descriptor or the id of a segment.

    Parameters
    ----------
    name : str
    arguments : list of int
        `mremap` may have four.
    value : int
        What it returned, 0 if it failed.

    Raises
    ------
    LineError
        Another number of arguments than the call has, or one that is out of range.
    """
    op, *names = _ARGUMENTS[name]
    if len(arguments) != len(names) and (name, len(arguments)) != ("mremap", 4):
        raise LineError(f"{name} needs {len(names)} arguments, not {len(arguments)}")
    found = {"op": op, **dict(zip(names, arguments, strict=False))}
    found.pop("key", None)
    for field, limit in _LIMITS:
        if found.get(field, 0) >= limit:
            raise LineError(f"out of range: {field} {found[field]:#x}")
    if name in _GIVES_ADDRESS:
        found["ret"] = value or found.get("ret", 0)
    return found


class CallReader:
    """What every reader of system calls keeps: the events so far, files, threads and counts."""

    def __init__(self):
        self.writer = TraceWriter()
        self.files = {}
        self.counts = {"lines": 0, "skipped_lines": 0, "cut_short": 0, "failed_forks": 0, "failed_execs": 0,
                       "ignored_calls": {}}
        self.group = {}         # tid -> pid, while it lives
        self.members = {}       # pid -> its living tids
        self.breaks = {}        # pid -> program break
        self.now = 0

    def join(self, tid, pid):
        self.group[tid] = pid
        self.members.setdefault(pid, set()).add(tid)
        return pid

    def emit(self, t, pid, tid, op=0, errno=0, prot=0, flags=0, file=-1, addr=0, length=0, arg=0, ret=0):
        self.now = max(self.now, t)
        return self.writer.append((self.now, pid, tid, op, 0, 0, errno, prot, flags, file, addr, length, arg,
                                   ret))

    def file(self, path, handle, kind="file", inode=None, opened=None):
        """The number of a file as known here: `opened` tells one opening of a file from every other."""
        return self.files.setdefault((path, handle, kind, inode, opened), len(self.files))

    def ignored(self, name):
        ignored, name = self.counts["ignored_calls"], name.encode("ascii", "replace").decode()[:40]
        if len(ignored) < 1000 or name in ignored:
            ignored[name] = ignored.get(name, 0) + 1

    def changed(self, start, end, row, pid, tid, failed, event):
        """A call has returned that may have changed mappings.

        It counts from `start`, where `row` was reserved if other lines came in between, or from its `end`.
        """
        if not failed and (event.get("length", 0) >> 56 or event.get("arg", 0) >> 62 or event.get("ret", 0) >> 56):
            raise LineError("no such call can have succeeded")
        takes = event["op"] in _TAKING
        if event["op"] == Op.BRK:
            takes = 0 < event["addr"] < self.breaks.get(pid, 0)
            self.breaks[pid] = event["ret"]
        if takes and row is not None:
            self.writer.assign(row, errno=failed, **event)
        else:
            self.emit(start if takes else end, pid, tid, errno=failed, **event)

    def forked(self, t, row, pid, tid, child, flags):
        """A clone of whatever name has made a thread or a process."""
        if not 0 < child < 1 << 31:
            raise LineError("no process has this number")
        if flags & CLONE_THREAD:
            self.thread(child, pid)
            return
        self.join(child, child)
        event = {"op": Op.VFORK if flags & CLONE_VM else Op.FORK, "arg": child}
        if row is None:
            self.emit(t, pid, tid, **event)
        else:
            self.writer.assign(row, **event)

    def thread(self, child, pid):
        self.join(child, pid)

    def executed(self, start, t, pid, path):
        """The process runs another program from `t` on, in one thread; returns the event's index."""
        for other in self.members.get(pid, set()) - {pid}:
            self.group.pop(other, None)
        self.members[pid] = {pid}
        self.group[pid] = pid
        self.breaks.pop(pid, None)
        # The start tells which PERF_RECORD_MMAP2 belong to the new image; see infer.py.
        return self.emit(t, pid, pid, Op.EXEC, file=self.file(path, -1), arg=start)

    def finish(self):
        files = [{"path": path, "size": 0, "kind": kind, "handle": handle, "inode": inode, "opened": opened}
                 for path, handle, kind, inode, opened in self.files]
        return self.writer.finish({"files": files, "counts": self.counts})


_TAKING = {_ARGUMENTS[name][0] for name in TAKES}
