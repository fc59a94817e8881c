"""Reading ``perf script --header --ns -F trace:pid,tid,time,event,trace --show-mmap-events --show-task-events`` of
system calls and page faults recorded as tracepoints, which root may do; and the same as normalised lines
(``t_ns pid tid op hexargs.. hexret``).

One clock stamps all of it, so that calls, faults and the mappings that execve makes are ordered exactly, and
page faults say whether they write and whether the kernel took them.
"""
from __future__ import annotations

import heapq
import re

from .calls import ANONYMOUS, CLONE_THREAD, CLONE_VFORK, CLONE_VM, EXECS, FORKS, KNOWN, TAKES, CallReader, fields
from .format import KERNEL, Access, Op, Trace, TraceWriter
from .perf import MAPPING, mapping, mapping_row
from .source import FilePath, LineError, TraceError, lines

__all__ = ["read_tracepoints"]

_LINE = re.compile(r"(?:.*?\s)?(-?\d{1,9})(?:/(-?\d{1,9}))?\s+(?:\[\d+\]\s+)?(\d{1,10})\.(\d{6,9}):\s+(?:\d+\s+)?"
                   r"((?:[a-z]\w*:\w+(?=:))|PERF_RECORD_\w+)(.*)", re.S)
_NORMALISED = re.compile(r"(\d{1,19}) (\d{1,9}) (\d{1,9}) ([a-z]\w{0,40})((?: -?(?:0x)?[0-9a-f]{1,16})+) *$")
_ARGUMENT = re.compile(r": (0x[0-9a-f]{1,16})(?:,|$| )")
_RESULT = re.compile(r": (0x[0-9a-f]{1,16})")
_FAULT = re.compile(r": address=(0x[0-9a-f]{1,16}|0) ip=(?:(0x[0-9a-f]{1,16})|\S+) error_code=(0x[0-9a-f]{1,8})$")
_NEW_TASK = re.compile(r": pid=(\d{1,9}) comm=.{0,64} clone_flags=([0-9a-f]{1,16})\b", re.S)
_FORKED = re.compile(r": comm=.{0,64} pid=\d{1,9} child_comm=.{0,64} child_pid=(\d{1,9})$", re.S)
_EXECUTED = re.compile(r": filename=(.*) pid=\d{1,9} old_pid=\d{1,9}$", re.S)
_TASK = re.compile(r"\((\d{1,9}):(\d{1,9})\):\((\d{1,9}):(\d{1,9})\)$")
_COMM = re.compile(r"( exec)?: .*:(-?\d{1,9})/-?\d{1,9}$", re.S)
_LOST = re.compile(r" lost (\d{1,18})$")
_REFERENCE = re.compile(r"# reference time: .*= (\d{1,10})\.(\d{6}) \(TOD\) = (\d{1,10})\.(\d{9}) \((\w+)\)")

OPENS = {"open", "openat", "openat2", "creat", "memfd_create"}
DUPLICATES = {"dup", "dup2", "dup3", "fcntl"}
CLOSES = {"close", "close_range"}
F_DUPFD, F_DUPFD_CLOEXEC, CLONE_FILES = 0, 1030, 0x400
# perf script sorts by time, but for a few events near the ends of its rounds.
WINDOW = 1 << 12
# Error code of a page fault: the access was a write; it was made in user mode.
WRITE, USER = 2, 4
MREMAP_FIXED = 3    # with MAYMOVE, without which it is refused
FAULT = int(Op.FAULT)


def read_tracepoints(path: FilePath, lenient: bool = False) -> tuple[Trace, Trace]:
    """Read the system calls and page faults of a recording made with tracepoints.

    Parameters
    ----------
    path : path-like
        The output of perf script, or normalised lines; plain or compressed.
    lenient : bool
        Skip and count lines that make no sense, instead of raising.

    Returns
    -------
    calls, faults : Trace
        As `read_strace` and `read_perf` return them, of one clock: in ns since the epoch if perf's header is
        there, else as recorded.  FAULT has its access, and flags 1 if it was taken in kernel mode.

    Raises
    ------
    TraceError
        With file and line number, if a line is broken or far out of order.
    """
    reader = _Reader()
    for _, number, line in _sorted(path, reader, lenient):
        try:
            reader.line(*line)
        except LineError as error:
            if not lenient:
                raise TraceError(path, str(error), number) from None
            reader.counts["skipped_lines"] += 1
    if not reader.counts["lines"]:
        raise TraceError(path, "no line of tracepoints in it")
    return reader.finish()


def _sorted(path, reader, lenient):
    waiting, last = [], 0
    for number, line in lines(path):
        try:
            parsed = reader.parse(line)
            if parsed is None:
                continue
            if parsed[0] < last:
                raise LineError("this is earlier than lines long before it")
        except LineError as error:
            if not lenient:
                raise TraceError(path, str(error), number) from None
            reader.counts["skipped_lines"] += 1
            continue
        reader.counts["lines"] += 1
        entry = parsed[0], number, parsed
        if len(waiting) < WINDOW:
            heapq.heappush(waiting, entry)
        else:
            entry = heapq.heappushpop(waiting, entry)
            last = entry[0]
            yield entry
    yield from sorted(waiting)


class _Call:
    """A system call that has not returned yet, and what was seen to happen in it."""

    __slots__ = ("arguments", "child", "flags", "mapping", "name", "row", "start")

    def __init__(self, name, arguments, start, row):
        self.name, self.arguments, self.start, self.row = name, arguments, start, row
        self.mapping = self.child = None
        self.flags = None       # of a clone
        if name in FORKS and name != "clone3":
            self.flags = CLONE_VM | CLONE_VFORK if name == "vfork" else arguments[0] if name == "clone" and arguments else 0


class _Reader(CallReader):
    def __init__(self):
        super().__init__()
        self.counts |= {"kernel_addresses": 0, "other_records": 0, "lost": 0}
        self.faults, self.fault_files = TraceWriter(), {}
        self.pending = {}       # tid -> _Call
        self.images = {}        # pid -> event of the EXEC that is still mapping its program
        self.exits = {}         # pid -> event of its EXIT, until a later one is seen
        self.unsure = {}        # new tid -> (parent's pid, event), if nothing told yet whether it is a thread
        self.descriptors = {}   # pid -> {descriptor: which opening of a file}, as far as seen
        self.openings = 0
        self.offset, self.clock = 0, "unknown"

    # -- lines

    def parse(self, line):
        """``(t, pid, tid, event, rest)``, or None for what is no line of an event."""
        try:
            ids, time, event, rest = line.split(None, 3)
            pid, _, tid = ids.partition("/")
            seconds, _, fraction = time.partition(".")
            if len(fraction) != 10 or fraction[9] != ":" or event[-1] != ":":
                raise ValueError
            t = int(seconds) * 1_000_000_000 + int(fraction[:9])
            pid, tid = int(pid), int(tid)
            if not (0 <= t < 1 << 63 and -1 <= pid < 1 << 31 and -1 <= tid < 1 << 31):
                raise ValueError
            return t + self.offset, pid, tid, event[:-1], ": " + rest
        except ValueError:
            return self.unusual(line)

    def unusual(self, line):
        if not line.strip() or line.startswith("#"):
            match = _REFERENCE.match(line)
            if match and not self.counts["lines"]:
                second, micro, own, nano, self.clock = match.groups()
                self.offset = int(second + micro) * 1000 - int(own + nano)
            return None
        match = _NORMALISED.match(line)
        if match:
            t, pid, tid, name, numbers = match.groups()
            return int(t), int(pid), int(tid), name, [_hexadecimal(text) for text in numbers.split()]
        match = _LINE.match(line)
        if match is None:
            raise LineError("not a line of perf script --ns -F trace:pid,tid,time,event,trace")
        pid, tid, seconds, fraction, event, rest = match.groups()
        t = int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0"))
        return t + self.offset, int(pid), int(tid or pid), event, rest.rstrip()

    def line(self, t, pid, tid, event, rest):
        if isinstance(rest, list):
            self.normalised(t, pid, tid, event, rest)
        elif event.startswith("PERF_RECORD_"):
            self.record(t, event[12:], rest)
        elif pid > 0:
            self.seen(pid, tid)
            if event.startswith("exceptions:page_fault_"):
                match = _FAULT.match(rest)
                if match is None:
                    raise LineError("broken page fault")
                address, ip, code = match.groups()
                self.fault(t, pid, tid, int(address, 16), int(ip or "0", 16), int(code, 16), event.endswith("_kernel"))
            elif event.startswith("syscalls:sys_enter_"):
                self.entered(t, pid, tid, event[19:], rest)
            elif event.startswith("syscalls:sys_exit_"):
                match = _RESULT.match(rest)
                if match is None:
                    raise LineError("broken result of a call")
                self.returned(t, pid, tid, event[18:], int(match[1], 16))
            elif event == "task:task_newtask" and (match := _NEW_TASK.match(rest)):
                self.born(t, pid, tid, int(match[1]), int(match[2], 16))
            elif event == "sched:sched_process_fork" and (match := _FORKED.match(rest)):
                self.born(t, pid, tid, int(match[1]), None)
            elif event == "sched:sched_process_exec" and (match := _EXECUTED.match(rest)):
                self.named(t, pid, tid, match[1])
            elif event == "sched:sched_process_exit":
                self.ended(t, pid, tid)

    def normalised(self, t, pid, tid, name, numbers):
        self.seen(pid, tid)
        *arguments, result = numbers
        if name in ("pf", "pfk"):
            if len(arguments) not in (2, 3):
                raise LineError("a page fault has an address, an error code and a 0")
            self.fault(t, pid, tid, arguments[0], arguments[2] if len(arguments) == 3 else 0, arguments[1], name == "pfk")
            return
        if name == "exit":
            self.ended(t, pid, tid)
            return
        self.enter(t, pid, tid, name, arguments)
        self.returned(t, pid, tid, name, result)

    def record(self, t, kind, rest):
        if kind in ("MMAP", "MMAP2"):
            match = MAPPING.match(rest)
            if match is None:
                raise LineError("broken mapping record")
            self.mapped(t, match)
        elif kind == "COMM" and (match := _COMM.match(rest)):
            if match[1] and int(match[2]) > 0:
                self.replaced(t, int(match[2]))
        elif kind.startswith("FORK") and (match := _TASK.match(rest)):
            self.seen(int(match[3]), int(match[4]))
            self.born(t, int(match[3]), int(match[4]), int(match[2]), CLONE_THREAD if match[1] == match[3] else None,
                      match[1] == match[2])
        elif kind.startswith("EXIT") and (match := _TASK.match(rest)):
            self.ended(t, int(match[1]), int(match[2]))
        else:
            self.counts["other_records"] += 1
            lost = _LOST.search(rest) if kind.startswith("LOST") else None
            self.counts["lost"] += int(lost[1]) if lost else 0

    # -- threads and processes

    def seen(self, pid, tid):
        """A line of thread `tid`: tells which process it belongs to, and that it lives."""
        if pid in self.exits:
            self.writer.assign(self.exits.pop(pid), op=0)
        known = self.group.get(tid)
        if known == pid:
            return
        if known is not None:
            self.members.get(known, set()).discard(tid)
        parent, row = self.unsure.pop(tid, (pid, None))
        if parent != pid:
            self.settle(0, row, parent, parent, tid, 0)
        self.join(tid, pid)

    def born(self, t, pid, tid, child, flags, process=False):
        """Something tells that `tid` has made `child`: how (`flags`), or only that it is a process."""
        call = self.pending.get(tid)
        if call is not None and call.name in FORKS:
            if call.child is None:
                flags = call.flags if flags is None else flags
                if flags is not None:
                    call.child = child
                    self.settle(t, call.row, pid, tid, child, flags)
                elif process:
                    call.flags = 0          # task_newtask may still tell more
        elif child not in self.group and (flags is not None or process):
            self.settle(t, None, pid, tid, child, flags or 0)

    def settle(self, t, row, pid, tid, child, flags):
        if not flags & CLONE_THREAD:
            self.exits.pop(child, None)
            known = self.descriptors.get(pid)
            if known:
                self.descriptors[child] = known if flags & CLONE_FILES else dict(known)
        self.forked(t, row, pid, tid, child, flags)

    def replaced(self, t, pid):
        """execve has passed the point of no return: from here on, it maps the new program."""
        start = t
        for tid in self.members.get(pid, {pid}):
            call = self.pending.pop(tid, None)
            if call is not None and call.name in EXECS:
                start = call.start
        self.images[pid] = self.executed(start, t, pid, None)

    def named(self, t, pid, tid, path):
        if pid not in self.images:
            self.replaced(t, pid)
        path = path.encode("utf-8", "replace").decode()
        self.writer.assign(self.images[pid], file=self.file(path, -1))

    def ended(self, t, pid, tid):
        """A thread ends, which several lines may tell; the last of them counts."""
        self.drop(tid)
        self.group.pop(tid, None)
        members = self.members.get(pid, set())
        members.discard(tid)
        if not members:
            self.members.pop(pid, None)
            self.exit(t, pid, tid)

    def exit(self, t, pid, tid):
        if pid in self.exits:
            self.writer.assign(self.exits[pid], op=0)
        self.exits[pid] = self.emit(t, pid, tid, Op.EXIT)
        self.images.pop(pid, None)
        self.breaks.pop(pid, None)
        self.descriptors.pop(pid, None)

    def drop(self, tid):
        """What `tid` was in the middle of never returned."""
        call = self.pending.pop(tid, None)
        if call is not None and call.name in KNOWN - EXECS:
            self.counts["cut_short"] += 1

    # -- calls and faults

    def entered(self, t, pid, tid, name, rest):
        self.enter(t, pid, tid, name, [int(value, 16) for value in _ARGUMENT.findall(rest)])

    def enter(self, t, pid, tid, name, arguments):
        self.drop(tid)
        self.images.pop(pid, None)
        if name == "exit_group":
            self.exit(t, pid, tid)
        elif name in KNOWN:
            row = self.emit(t, pid, tid) if name in TAKES or name in FORKS or name == "brk" else None
            self.pending[tid] = _Call(name, arguments, t, row)
        elif name in OPENS or name in DUPLICATES:
            self.pending[tid] = _Call(name, arguments, t, None)
        elif name in CLOSES and arguments:
            self.closed(pid, arguments[0], arguments[1] if len(arguments) > 1 else arguments[0])
        elif name != "exit":
            self.ignored(name)

    def returned(self, t, pid, tid, name, result):
        failed = min((1 << 64) - result, 255) if result > (1 << 64) - 4096 else 0
        if name in EXECS:
            if not failed and pid not in self.images:
                self.replaced(t, pid)
            self.counts["failed_execs"] += bool(failed)
            self.images.pop(pid, None)
            self.pending.pop(tid, None)
            return
        call = self.pending.pop(tid, None)
        if name not in KNOWN:
            if call is not None and call.name == name and not failed:
                self.opened(pid, call, result)
        elif call is None or call.name != name:
            # It began before the recording did, or is a new process's return from clone.
            self.counts["cut_short"] += name not in FORKS
        elif name not in FORKS:
            self.changed(call.start, t, call.row, pid, tid, failed, self.event(pid, call, 0 if failed else result))
        elif failed:
            self.counts["failed_forks"] += 1
        elif call.child is None:
            if call.flags is None and result not in self.group:
                self.unsure[result] = pid, call.row
            else:
                if call.flags is None:
                    call.flags = CLONE_THREAD if self.group[result] == pid else 0
                self.settle(t, call.row, pid, tid, result, call.flags)

    def opened(self, pid, call, result):
        """A descriptor has been made: of a file just opened, or of one that another has."""
        known = self.descriptors.setdefault(pid, {})
        if call.name in OPENS:
            known[result] = self.openings = self.openings + 1
        elif call.arguments and (call.name != "fcntl" or call.arguments[1:2] in ([F_DUPFD], [F_DUPFD_CLOEXEC])):
            known[result] = known.get(call.arguments[0])

    def closed(self, pid, first, last):
        known = self.descriptors.get(pid, {})
        for descriptor in [first] if first == last else [descriptor for descriptor in known if first <= descriptor <= last]:
            known.pop(descriptor, None)

    def event(self, pid, call, value):
        arguments = call.arguments
        (path, inode), length = call.mapping or ((None, None), 0)
        if call.name == "mmap" and len(arguments) == 6:
            handle = arguments[4] & 0x7fffffff
            opened = self.descriptors.get(pid, {}).get(handle)
            arguments[4] = -1 if arguments[3] & ANONYMOUS else self.file(path, handle, inode=inode, opened=opened)
        elif call.name == "mremap" and len(arguments) == 5 and arguments[3] & MREMAP_FIXED != MREMAP_FIXED:
            arguments.pop()
        event = fields(call.name, arguments, value)
        if call.name == "shmat":
            event |= {"file": self.file(None, event["file"], "shm"), "length": length}
        return event

    def mapped(self, t, match):
        mapped = mapping(match)
        if mapped is None or t == self.offset:
            return          # the kernel's own, or what was there before perf came to an old process
        named, event = mapped
        pid, tid = event[:2]
        call = self.pending.get(tid)
        if named[0] == "[stack]" and pid not in self.images and (call.name in EXECS if call else pid not in self.members):
            self.replaced(t, pid)       # where nothing else tells: execve maps the stack first
        self.seen(pid, tid)
        call = self.pending.get(tid)
        if call is not None and call.name in ("mmap", "shmat"):
            call.mapping = named, event[10]
        elif pid in self.images or (call is not None and call.name in EXECS):
            self.faults.append(mapping_row(t, named, event, self.fault_files))

    def fault(self, t, pid, tid, address, ip, code, kernel):
        if address >> 63:
            self.counts["kernel_addresses"] += 1
            return
        if not kernel:
            self.images.pop(pid, None)
        access = Access.WRITE if code & WRITE else Access.READ
        self.faults.append((t, pid, tid, FAULT, access, 0, 0, 0, KERNEL * kernel, -1, address, 0, ip, 0))

    def finish(self):
        self.counts["cut_short"] += sum(call.name in KNOWN - EXECS for call in self.pending.values())
        calls = super().finish()
        calls.metadata["clock"] = self.clock
        return calls, self.faults.finish({"files": list(self.fault_files.values())})


def _hexadecimal(text):
    """Normalised numbers are hexadecimal, with or without 0x; a negative one is an error's."""
    return int(text, 16) % (1 << 64)
