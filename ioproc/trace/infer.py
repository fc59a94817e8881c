"""From what was recorded to a history that can be replayed.

System calls and page faults are merged by time, twice.  The first pass, the *survey*, only keeps the
mappings that the calls make, and notes for each executed program what it did outside them: that is what
execve mapped.  The second pass writes the history, with those mappings after each EXEC, and decides which
access each fault was.  The rules, and what they cost, are in docs/trace.md.
"""
from __future__ import annotations

import bisect
import collections
import itertools
import operator
import re
from typing import Any

from .comm import annotate
from .format import EVENT, KERNEL, Access, Op, Origin, Trace, TraceWriter
from .perf import read_perf
from .source import FilePath, TraceError, lines
from .strace import read_strace
from .tracepoints import read_tracepoints

__all__ = ["import_recording", "recognise"]

PAGE = 4096
READ, WRITE, EXECUTE = 1, 2, 4
SHARED, PRIVATE, FIXED, ANONYMOUS, GROWSDOWN, STACK = 1, 2, 0x10, 0x20, 0x100, 0x20000
FIXED_NOREPLACE = 0x100000
MREMAP_DONTUNMAP = 4
DONTNEED, FREE, REMOVE, PAGEOUT, DONTNEED_LOCKED = 4, 8, 9, 21, 24
# What madvise tells a fork, as flags of an area beyond those of mmap: the child has not the area, or finds it empty.
NOT_IN_CHILD, EMPTY_IN_CHILD = 1 << 32, 1 << 33
FORK_ADVICE = {10: (NOT_IN_CHILD, NOT_IN_CHILD), 11: (NOT_IN_CHILD, 0),       # MADV_DONTFORK, DOFORK
               18: (EMPTY_IN_CHILD, EMPTY_IN_CHILD), 19: (EMPTY_IN_CHILD, 0)}  # WIPEONFORK, KEEPONFORK
# Programs and their heaps lie below, what the kernel places for mmap and the stack above.
IMAGE_END = 0x700000000000
# The kernel keeps at least 128 MiB between the stack and the highest mmap.
STACK_GAP = 64 << 20
# Two threads that fault on one page within this time may both have found it absent.
RACE_NS = 100_000

# Plain integers: a member of an enumeration costs ten times as much to look up, per event.
FAULT, MAPPING = int(Op.FAULT), int(Op.MAP)
READS, WRITES, BY_RULE = int(Access.READ), int(Access.WRITE), int(Origin.ACCESS)

T, PID, TID, OP, ACCESS, ORIGIN, ERRNO, PROT, FLAGS, FILE, ADDR, LENGTH, ARG, RET = range(14)


def import_recording(strace: FilePath | None = None, perf: FilePath | None = None, *, tracepoints: FilePath | None = None,
                     lenient: bool = False, comm: FilePath | None = None, metadata: dict[str, Any] | None = None) -> Trace:
    """Make a history out of a recording.

    Parameters
    ----------
    strace, perf : path-like, optional
        Output of ``strace`` and of ``perf script`` of page faults; see docs/trace.md for their options.
    tracepoints : path-like
        Instead of these: output of ``perf script`` of system calls and page faults as tracepoints, or normalised lines.
    lenient : bool
        Skip and count broken lines instead of raising.
    comm : path-like, optional
        Communication to add, as `annotate` reads it.
    metadata : dict, optional
        Command, host, kernel and so on; put into the history's metadata.

    Returns
    -------
    Trace
        In an unnamed temporary file; memory does not grow with its length, only with the number of pages
        that are mapped at one time.

    Raises
    ------
    TraceError
        The input cannot be read; names the file and, for a broken line, its number.
    TypeError
        Neither strace's output nor one of tracepoints, or both.
    """
    if tracepoints is not None and strace is perf is None:
        calls, faults = read_tracepoints(tracepoints, lenient)
    elif strace is not None and tracepoints is None:
        calls = read_strace(strace, lenient)
        faults = read_perf(perf, lenient) if perf is not None else Trace(calls.events[:0])
    else:
        raise TypeError("a recording is strace's, with or without perf's page faults, or one of tracepoints")
    programs = _survey(calls, faults)
    trace = _Inference(calls, faults, programs).run(metadata)
    trace.metadata["import"] |= {
        "tracepoints": calls.metadata["counts"], "clock": calls.metadata["clock"],
    } if tracepoints is not None else {
        "strace": calls.metadata["counts"], "perf": faults.metadata.get("counts", {}), "clock": "realtime",
    }
    if comm is not None:
        trace = annotate(trace, comm, lenient=lenient)
    return trace


# What a line of each kind of recording looks like.  A mapping record may stand in two of them.
_KINDS = {kind: re.compile(pattern) for kind, pattern in {
    "tracepoints": r"(?:.{0,99}\s)?\d{1,10}\.\d{6,9}:\s+(?:\d{1,9}\s+)?[a-z]\w{0,40}:\w{1,60}:"
                   r"|\d+ \d+ \d+ [a-z]\w* [0-9a-f]",
    "strace": r"(?:\[pid +)?\d{1,9}\]? +\d{1,10}\.\d{6,9} (?:\w{1,40}\(|<\.\.\. |\+\+\+ |--- )",
    "perf": r"(?:.{0,99}\s)?\d{1,10}\.\d{6,9}:\s+(?:\d{1,9}\s+)?(?:page-faults\S{0,9}:\s+)?"
            r"[0-9a-f]{1,16}\s+[0-9a-f]{1,16}\s*$",
}.items()}
_RECORD = re.compile(r"(?:.{0,99}\s)?\d{1,10}\.\d{6,9}: PERF_RECORD_")
LOOKED_AT = 10_000      # lines


def recognise(path: FilePath) -> str:
    """Tell what a recording is by its content.

    Parameters
    ----------
    path : path-like
        A text, plain or compressed.

    Returns
    -------
    str
        ``strace``, ``perf`` (page faults) or ``tracepoints``: the argument of `import_recording` that it is for.

    Raises
    ------
    TraceError
        It is none of these.
    """
    records = False
    for _, line in itertools.islice(lines(path), LOOKED_AT):
        for kind, pattern in _KINDS.items():
            if pattern.match(line[:400]):
                return kind
        records = records or _RECORD.match(line[:400]) is not None
    if records:
        return "perf"
    raise TraceError(path, "neither strace's nor perf script's output")


END = (1 << 64,)


def _rows(trace):
    for block in trace.blocks(1 << 12):
        yield from block.tolist()


def _merged(calls, faults):
    """Both in time order; at the same time a call comes before a fault."""
    call_rows, fault_rows = _rows(calls), _rows(faults)
    call = next(call_rows, END)
    for fault in fault_rows:
        while call[T] <= fault[T]:
            yield call
            call = next(call_rows, END)
        yield fault
    while call is not END:
        yield call
        call = next(call_rows, END)


def _up(length):
    return (length + PAGE - 1) & -PAGE


class Space:
    """The mappings of one address space: ``(start, end, prot, flags)`` in address order."""

    def __init__(self, program=None):
        self.program = program
        self.starts, self.areas = [], []
        self.heap = self.brk = None
        self.pages = {}
        self.generation = self.born = 0

    def fork(self):
        child = Space(self.program)
        child.starts, child.areas = self.starts.copy(), self.areas.copy()
        child.heap, child.brk = self.heap, self.brk
        self.generation += 1
        child.generation = child.born = self.generation
        child.pages = self.pages.copy()
        for area in self.areas:
            if area[3] & NOT_IN_CHILD:
                child.cut(area[0], area[1])
            elif area[3] & EMPTY_IN_CHILD:
                child.forget(area[0], area[1])
        return child

    def find(self, addr):
        index = bisect.bisect_right(self.starts, addr) - 1
        if index >= 0 and addr < self.areas[index][1]:
            return self.areas[index]
        return None

    def overlapping(self, start, end):
        """The slice of areas that intersect the range."""
        low = bisect.bisect_right(self.starts, start) - 1
        if low < 0 or self.areas[low][1] <= start:
            low += 1
        return low, bisect.bisect_left(self.starts, end, low)

    def replace(self, low, high, areas):
        self.areas[low:high] = areas
        self.starts[low:high] = [area[0] for area in areas]

    def put(self, start, end, prot, flags):
        self.cut(start, end)
        index = bisect.bisect_left(self.starts, start)
        self.replace(index, index, [(start, end, prot, flags)])

    def cut(self, start, end):
        """Unmap; returns what was mapped, clipped to the range."""
        self.forget(start, end)
        low, high = self.overlapping(start, end)
        removed = self.areas[low:high]
        if removed:
            rest = []
            if removed[0][0] < start:
                rest.append((removed[0][0], start, *removed[0][2:]))
            if removed[-1][1] > end:
                rest.append((end, *removed[-1][1:]))
            self.replace(low, high, rest)
        return [(max(area[0], start), min(area[1], end), *area[2:]) for area in removed]

    def protect(self, start, end, prot):
        for area in self.cut_keeping_pages(start, end):
            index = bisect.bisect_left(self.starts, area[0])
            self.replace(index, index, [(area[0], area[1], prot, area[3])])

    def advise_fork(self, start, end, mask, flag):
        for area in self.cut_keeping_pages(start, end):
            index = bisect.bisect_left(self.starts, area[0])
            self.replace(index, index, [(*area[:3], area[3] & ~mask | flag)])

    def cut_keeping_pages(self, start, end):
        pages, self.pages = self.pages, {}
        removed = self.cut(start, end)
        self.pages = pages
        return removed

    def gap_end(self, addr):
        """Where the first mapping above `addr` starts."""
        index = bisect.bisect_right(self.starts, addr)
        return self.starts[index] if index < len(self.starts) else None

    def present(self, start, end):
        """The known pages of a range, at a cost of the smaller of the range and what is known."""
        first, last = start // PAGE, -(-end // PAGE)
        if last - first <= len(self.pages):
            return [page for page in range(first, last) if page in self.pages]
        return [page for page in self.pages if first <= page < last]

    def forget(self, start, end):
        if self.pages:
            for page in self.present(start, end):
                del self.pages[page]

    def touch_protection(self, start, end):
        """A fault after this proves nothing about the one before it."""
        for page in self.present(start, end):
            self.pages[page] |= CHANGED

    def move(self, old, new, length):
        moved = [(page, self.pages.pop(page)) for page in self.present(old, old + length)]
        for page, state in moved:
            self.pages[page + (new - old) // PAGE] = state

    def apply(self, row, segment_size):
        """Follow one system call; returns ranges outside every mapping that it names."""
        op, start = row[OP], row[ADDR] & -PAGE
        if op == Op.BRK:
            self.set_brk(row[ADDR], row[RET])
        elif op == Op.MUNMAP and not row[ERRNO]:
            self.cut(start, start + _up(row[LENGTH]))
        elif op == Op.MMAP and not row[ERRNO]:
            self.put(row[RET], row[RET] + _up(row[LENGTH]), row[PROT], row[FLAGS])
        elif op == Op.MAP:
            self.put(start, start + _up(row[LENGTH]), row[PROT], row[FLAGS])
        elif op == Op.MPROTECT:
            self.touch_protection(start, start + _up(row[LENGTH]))
            if not row[ERRNO]:
                self.protect(start, start + _up(row[LENGTH]), row[PROT])
        elif op == Op.MREMAP and not row[ERRNO]:
            self.mremap(start, _up(row[LENGTH]), _up(row[ARG]), row[FLAGS], row[RET])
        elif op == Op.MADVISE and not row[ERRNO]:
            end = start + _up(row[LENGTH])
            if row[ARG] in (DONTNEED, REMOVE, DONTNEED_LOCKED):
                self.forget(start, end)
            elif row[ARG] in (FREE, PAGEOUT):
                self.touch_protection(start, end)
            elif row[ARG] in FORK_ADVICE:
                self.advise_fork(start, end, *FORK_ADVICE[row[ARG]])
        elif op == Op.SHMAT and not row[ERRNO]:
            prot = READ if row[FLAGS] & 0o10000 else READ | WRITE
            self.put(row[RET], row[RET] + segment_size, prot, SHARED)
        elif op == Op.SHMDT and not row[ERRNO]:
            area = self.find(row[ADDR])
            if area is not None and area[0] == row[ADDR]:
                self.cut(area[0], area[1])

    def set_brk(self, wanted, got):
        if self.heap is None:
            self.heap = self.brk = got
        elif got != self.brk:
            old, new = _up(self.brk), _up(got)
            if new < old:
                self.cut(new, old)
            elif new > old:
                self.put(old, new, READ | WRITE, PRIVATE | ANONYMOUS)
            self.brk = got

    def mremap(self, old, old_length, new_length, flags, new):
        if not old_length:    # a second mapping of a shared one
            area = self.find(old)
            if area is not None:
                self.put(new, new + new_length, *area[2:])
            return
        kept = min(old_length, new_length)
        if new == old:
            if new_length < old_length:
                self.cut(old + new_length, old + old_length)
            elif new_length > old_length:
                area = self.find(old)
                if area is not None:
                    self.put(old + old_length, old + new_length, *area[2:])
            return
        self.cut(new, new + new_length)
        areas = self.cut_keeping_pages(old, old + old_length)
        if flags & MREMAP_DONTUNMAP:
            for area in areas:
                self.replace(*[bisect.bisect_left(self.starts, area[0])] * 2, [area])
        self.move(old, new, kept)
        self.forget(old, old + old_length)
        for area in areas:
            start, end = area[0] - old + new, min(area[1] - old, kept) + new
            if area is areas[-1] and new_length > old_length:
                end = new + new_length
            if start < end:
                index = bisect.bisect_left(self.starts, start)
                self.replace(index, index, [(start, end, *area[2:])])


# -- what execve maps


class Records:
    """What perf saw being mapped, brought together with the calls that did it.

    A record is made inside its call, and so before the same process faults or calls again; it may still be
    later than the call's end as strace has it, for strace begins to measure only when it has printed the
    call's start.
    """

    def __init__(self, calls, faults):
        self.calls, self.files = calls, faults.metadata["files"]
        self.waiting = {}    # pid -> records that no call has claimed
        self.last = {}       # pid -> (index, row) of its last call
        self.named = {}

    def add(self, row, space):
        index, call = self.last.get(row[PID], (0, None))
        if call is None or not self.claim(index, call, row, space):
            self.waiting.setdefault(row[PID], collections.deque(maxlen=256)).append(row)

    def call(self, index, row, space):
        self.last[row[PID]] = index, row
        for record in self.waiting.pop(row[PID], ()):
            self.claim(index, row, record, space)

    def fault(self, pid):
        """From here on, no record can belong to what came before."""
        self.last.pop(pid, None)
        self.waiting.pop(pid, None)

    def claim(self, index, call, record, space):
        if call[OP] == Op.EXEC and record[T] >= call[ARG]:
            name = self.files[record[FILE]]["path"] if record[FILE] >= 0 else None
            space.program.records.append((record, name))
            space.put(record[ADDR] & -PAGE, record[ADDR] + _up(record[LENGTH]), record[PROT], record[FLAGS])
        elif call[OP] == Op.MMAP and record[ADDR] == call[RET] and min(call[FILE], record[FILE]) >= 0:
            self.name(index, call, self.files[record[FILE]])
        elif call[OP] == Op.SHMAT and record[ADDR] == call[RET]:
            self.calls.events["length"][index] = record[LENGTH]
        else:
            return False
        return True

    def name(self, index, call, file):
        """Of the two paths, strace's tells more; of an unnamed file, only the inode tells which it is."""
        files = self.calls.metadata["files"]
        entry = files[call[FILE]]
        if entry["path"] is None or entry["inode"] is None:
            path = file["path"] if entry["path"] is None else entry["path"]
            number = self.named.setdefault((path, entry["handle"], file["inode"]), len(files))
            if number == len(files):
                files.append({**entry, "path": path, "inode": file["inode"]})
            self.calls.events["file"][index] = number


class Program:
    """What one execve's address space, and those forked from it, did outside every known mapping."""

    def __init__(self, path=None):
        self.path = path
        self.seen = False        # perf saw the mappings being made
        self.touched = set()     # pages of faults in no mapping
        self.code = set()        # pages of instructions in no mapping
        self.protected = []      # (start, end) of mprotect in no mapping
        self.records = []        # (row, name) of the mappings themselves, where perf saw them made
        self.heap = None
        self.first_mmap = None
        self.later = []          # mappings that were placed above the first one
        self.checked = set()     # pages of instructions already looked at
        self.users = 1           # address spaces that have it
        self.found = None        # the answer, once nobody has it any more

    def leave(self):
        """An address space is gone; after the last one, only the answer is kept."""
        self.users -= 1
        if not self.users:
            self.found = self.mappings()
            del self.touched, self.code, self.protected, self.records, self.later, self.checked

    def mapped(self, row):
        if not row[FLAGS] & (FIXED | FIXED_NOREPLACE):
            if self.first_mmap is None:
                self.first_mmap = row[RET]
            elif row[RET] > self.first_mmap and len(self.later) < 4096:
                self.later.append((row[RET], row[RET] + _up(row[LENGTH])))

    def mappings(self):
        """What execve mapped: ``(start, end, prot, flags, name, offset)`` in address order.

        Without records: the program's image in two parts, the loader in two, the stack and the vdso, as far
        as there is evidence of each.
        """
        if self.found is not None:
            return self.found
        if self.records:
            self.seen = True
            return sorted(self.recorded(), key=operator.itemgetter(0))
        found, base = [], 0
        for start, end, prot, flags, name in sorted(self.evident()):
            base = start if prot & EXECUTE else base
            found.append((start, end, prot, flags, name, 0 if flags & ANONYMOUS else start - base))
        return found

    def recorded(self):
        """The records, later over earlier, and the stack as far down as it was used."""
        made = Space()
        for record, name in self.records:
            start = record[ADDR] & -PAGE
            made.put(start, start + _up(record[LENGTH]), record[PROT], (record[FLAGS], name, record[ARG] - start))
        for start, end, prot, (flags, name, shift) in made.areas:
            if name == "[stack]":
                flags |= GROWSDOWN | STACK
                used = (page * PAGE for page in self.touched if start - STACK_GAP < page * PAGE < start)
                start = min(used, default=start)
            yield start, end, prot, flags, name, 0 if flags & ANONYMOUS else start + shift

    def evident(self):
        below = sorted(page for page in self.touched if page * PAGE < IMAGE_END)
        if self.heap is not None:
            below = [page for page in below if page * PAGE < self.heap]
        above = sorted(page for page in self.touched if page * PAGE >= IMAGE_END)
        found = []
        if below:
            found += self.image(below[0] * PAGE, (below[-1] + 1) * PAGE, self.path)
        highest = len(above) - 1
        while highest > 0 and above[highest] - above[highest - 1] <= STACK_GAP // PAGE:
            highest -= 1
        stack, rest = above[max(highest, 0):], above[:max(highest, 0)]
        if stack and (self.first_mmap is None or stack[0] * PAGE - self.first_mmap > STACK_GAP) and \
                not any(stack[0] * PAGE <= start <= stack[-1] * PAGE for start, _ in self.protected):
            found += self.stack(stack)
        else:
            rest = above
        for low, high in self.runs(rest):
            found += self.image(low, high, "[loader]")
        return [part for part in found if part[0] < part[1]]

    def runs(self, pages):
        """Join pages above the first mmap into ranges that no later mapping interrupts."""
        pages = [page for page in pages if self.first_mmap is None or page * PAGE > self.first_mmap]
        begin = 0
        for index in range(1, len(pages) + 1):
            if index < len(pages):
                low, high = pages[index - 1] * PAGE, pages[index] * PAGE
                if high - low < STACK_GAP and not any(low < end and start < high + PAGE
                                                      for start, end in self.later):
                    continue
            if index > begin:
                yield pages[begin] * PAGE, (pages[index - 1] + 1) * PAGE
            begin = index

    def image(self, low, high, name):
        """Split an executable's range where its writable part begins."""
        relro = [part for part in self.protected if low <= part[0] <= high + (1 << 20)]
        code = [page * PAGE for page in self.code if low <= page * PAGE < high]
        high = max([high, *(end for _, end in relro)])
        last_code = max(code, default=low - PAGE) + PAGE
        data = min((start for start, _ in relro if start >= last_code), default=last_code)
        flags = PRIVATE
        return [(low, data, READ | EXECUTE, flags, name), (data, high, READ | WRITE, flags, name)]

    def stack(self, pages):
        low, high = pages[0] * PAGE, (pages[-1] + 1) * PAGE
        code = sorted(page for page in self.code if pages[0] <= page <= pages[-1] + 16)
        # Nothing executes on the stack, so this is the vdso: its code, and its data in the few pages before.
        vdso = min([page for page in pages if code and page >= code[0] - 8] + code[:1], default=None)
        found = []
        if vdso is not None:
            found.append((vdso * PAGE, max(high, (code[-1] + 1) * PAGE), READ | EXECUTE, PRIVATE | ANONYMOUS, "[vdso]"))
            high = max((page + 1 for page in pages if page < vdso), default=pages[0]) * PAGE
        return [*found, (low, high, READ | WRITE, PRIVATE | ANONYMOUS | GROWSDOWN | STACK, "[stack]")]


def leave(space, spaces, pid):
    """The process ends or executes something else; a vfork child leaves its parent's space alone."""
    spaces.pop(pid, None)
    if space is not None and not any(other is space for other in spaces.values()):
        space.program.leave()


def _survey(calls, faults):
    """Find what each executed program used outside the mappings that calls made."""
    spaces, programs = {}, []
    files, records, index = calls.metadata["files"], Records(calls, faults), -1
    for row in _merged(calls, faults):
        op, pid = row[OP], row[PID]
        space = spaces.get(pid)
        if op == FAULT:
            if space is None:
                continue
            if pid in records.last and not row[FLAGS] & KERNEL:
                records.fault(pid)
            program, addr, ip = space.program, row[ADDR], row[ARG]
            if space.find(addr) is None:
                program.touched.add(addr // PAGE)
            if ip // PAGE not in program.checked:
                program.checked.add(ip // PAGE)
                if space.find(ip) is None:
                    program.code.add(ip // PAGE)
            continue
        if op == MAPPING:
            records.add(row, space)
            continue
        index += 1
        if space is None or op == Op.EXEC:
            leave(space, spaces, pid)
            path = files[row[FILE]]["path"] if op == Op.EXEC else None
            programs.append(Program(path))
            space = spaces[pid] = Space(programs[-1])
        records.call(index, row, space)
        if op == Op.FORK:
            spaces[row[ARG]] = space.fork()
            space.program.users += 1
        elif op == Op.VFORK:
            spaces[row[ARG]] = space
        elif op == Op.EXIT:
            leave(space, spaces, pid)
            records.fault(pid)
        elif op != Op.EXEC:
            program = space.program
            if op == Op.MMAP and not row[ERRNO]:
                program.mapped(row)
            elif op == Op.BRK and program.heap is None:
                program.heap = row[RET]
            elif op == Op.MPROTECT and not row[ERRNO]:
                low, high = space.overlapping(row[ADDR], row[ADDR] + row[LENGTH])
                if low == high and len(program.protected) < 4096:
                    program.protected.append((row[ADDR], row[ADDR] + _up(row[LENGTH])))
            # How long a segment is shows only later; up to the next mapping it can be nothing else.
            end = space.gap_end(row[RET]) if op == Op.SHMAT else None
            space.apply(row, _up(row[LENGTH]) or (end or row[RET] + (1 << 30)) - row[RET])
    return programs


# -- writing the history

# What is known of a page: the event of its last fault, the generation of forks it belongs to, and a state.
ASSUMED, KNOWN_READ, KNOWN_WRITE = 1, 2, 3
CHANGED = 4
GENERATIONS = 1 << 20


class _Inference:
    def __init__(self, calls, faults, programs):
        self.calls, self.faults = calls, faults
        self.programs = iter(programs)
        self.writer = TraceWriter()
        self.spaces = {}
        self.files = []             # as the history's metadata has them
        self.identities = {}        # how a file is known -> index into files
        self.patterns = {}          # (program, length, ...) -> how often it was mapped
        self.current = {}           # (space, descriptor) -> (base, end, index): the mapping last begun
        self.excluded = {}
        self.traced = set()
        self.counts = dict.fromkeys((
            "recorded_mappings", "inferred_mappings", "assumed_writes", "proved_reads", "known_writes", "known_reads",
            "recorded_accesses", "write_notified", "races", "repeated", "unanswered", "unmapped", "not_accessible",
            "recognised_files", "segments"), 0)

    def run(self, metadata):
        for row in _merged(self.calls, self.faults):
            if row[OP] == FAULT:
                self.fault(row)
            elif row[OP] != MAPPING:
                self.call(row)
        return self.finish(metadata)

    def emit(self, row, **fields):
        if fields:
            row = list(row)
            for name, value in fields.items():
                row[_INDEX[name]] = value
            row = tuple(row)
        return self.writer.append(row)

    # -- system calls

    def call(self, row):
        op, pid = row[OP], row[PID]
        space = self.spaces.get(pid)
        if space is None or op == Op.EXEC:
            self.traced.add(pid)
            self.begin(row)
            space = self.spaces[pid]
            if op == Op.EXEC:
                return
        if op == Op.FORK:
            self.spaces[row[ARG]] = space.fork()
            self.traced.add(row[ARG])
            self.inherit(space, self.spaces[row[ARG]])
        elif op == Op.VFORK:
            self.spaces[row[ARG]] = space
            self.traced.add(row[ARG])
        elif op == Op.EXIT:
            del self.spaces[pid]
            self.leave(space)
        size = 0
        if op == Op.MMAP and row[FILE] >= 0:
            row = self.map_file(row, space)
        elif op == Op.SHMAT:
            row, size = self.attach(row, space)
        self.emit(row)
        space.apply(row, size)

    def begin(self, row):
        program = next(self.programs)
        old = self.spaces.get(row[PID])
        space = self.spaces[row[PID]] = Space(program)
        if old is not None:
            self.leave(old)
        image = self.identify(("path", program.path or f"program of process {row[PID]}"), program.path)
        if row[OP] == Op.EXEC:
            self.emit(row, file=image, arg=0)
        for low, high, prot, flags, name, offset in program.mappings():
            file = -1
            if not flags & ANONYMOUS:
                file = image if name == program.path else self.identify(("path", name), name)
                self.grow(file, offset + high - low)
            origin = Origin.RECORDED if program.seen else Origin.EVENT
            mapping = (row[T], row[PID], row[PID], Op.MAP, 0, origin, 0, prot, flags, file, low,
                       high - low, offset, 0)
            self.emit(mapping)
            space.apply(mapping, 0)
            self.counts["recorded_mappings" if program.seen else "inferred_mappings"] += 1

    def leave(self, space):
        """Forget what belongs to an address space that nobody has any more."""
        if not any(other is space for other in self.spaces.values()):
            for key in [key for key in self.current if key[0] == id(space)]:
                del self.current[key]
            self.patterns.pop(id(space), None)

    def inherit(self, parent, child):
        for (owner, handle), value in list(self.current.items()):
            if owner == id(parent):
                self.current[id(child), handle] = value
        self.patterns[id(child)] = dict(self.patterns.get(id(parent), {}))

    # -- files

    def identify(self, key, path, kind="file"):
        if key not in self.identities:
            self.identities[key] = len(self.files)
            self.files.append({"path": path, "size": 0, "kind": kind})
        return self.identities[key]

    def grow(self, file, size):
        self.files[file]["size"] = max(self.files[file]["size"], _up(size))

    def map_file(self, row, space):
        entry = self.calls.metadata["files"][row[FILE]]
        path, handle, inode, opened = (entry[name] for name in ("path", "handle", "inode", "opened"))
        origin = row[ORIGIN]
        base, end, file = self.current.get((id(space), row[FILE]), (0, 0, None))
        fixed = row[FLAGS] & (FIXED | FIXED_NOREPLACE)
        lasting = path is not None and path.startswith("/") and "(deleted)" not in path \
            and path != "/dev/zero"
        if lasting:
            file = self.identify(("path", path), path)
        elif inode is not None and path != "/dev/zero":
            file = self.identify(("inode", inode), path)
        elif ("opened", opened) in self.identities:
            file = self.identities["opened", opened]
        elif not (fixed and file is not None and base <= row[RET] < end):
            what = (path, row[LENGTH], row[PROT], row[FLAGS], row[ARG])
            if row[FLAGS] & SHARED:
                key = ("shared", id(space.program), handle, path, row[LENGTH], opened)
            else:
                # Each process that runs the same program maps the same libraries alike.
                seen = self.patterns.setdefault(id(space), {})
                seen[what] = seen.get(what, 0) + 1
                key = ("pattern", space.program.path, *what, seen[what])
                if key in self.identities:
                    origin |= Origin.FILE
                    self.counts["recognised_files"] += 1
            file = self.identify(key, path)
            if opened is None:
                self.current[id(space), row[FILE]] = (row[RET], row[RET] + row[LENGTH], file)
            else:
                self.identities["opened", opened] = file
        self.grow(file, row[ARG] + row[LENGTH])
        return (*row[:ORIGIN], origin, *row[ORIGIN + 1:FILE], file, *row[FILE + 1:])

    def attach(self, row, space):
        handle = self.calls.metadata["files"][row[FILE]]["handle"]
        file = self.identify(("segment", handle), None, "shm")
        entry = self.files[file]
        if row[LENGTH]:
            entry["size"] = max(entry["size"], _up(row[LENGTH]))
        elif not entry["size"] and not row[ERRNO]:
            end = space.gap_end(row[RET])
            entry["size"] = end - row[RET] if end is not None and end - row[RET] < STACK_GAP else PAGE
            self.counts["segments"] += 1
        origin = Origin.RECORDED if row[LENGTH] else Origin.SIZE
        row = (*row[:ORIGIN], origin, *row[ORIGIN + 1:FILE], file, row[ADDR], entry["size"], *row[ARG:])
        return row, entry["size"]

    # -- faults

    def fault(self, row):
        space = self.spaces.get(row[PID])
        if space is None:
            self.excluded[row[PID]] = self.excluded.get(row[PID], 0) + 1
            return
        if row[ACCESS]:
            self.known_fault(row, space)
            return
        addr, counts = row[ADDR], self.counts
        page = addr // PAGE
        area = space.find(addr)
        index = len(self.writer)
        access, state = WRITES, KNOWN_WRITE
        if area is None:
            access, state = 0, None
            counts["unmapped"] += 1
        elif not area[2] & WRITE:
            access, state = READS, KNOWN_READ
            counts["known_reads" if area[2] else "not_accessible"] += 1
            state = KNOWN_READ if area[2] else None
            if state and self.before(space, page, area):
                counts["repeated"] += 1
        else:
            before = self.before(space, page, area)
            known = before & 3
            if not known:
                if row[ARG] // PAGE == page and area[2] & EXECUTE:
                    access, state = READS, KNOWN_READ
                    counts["known_reads"] += 1
                else:
                    state = ASSUMED
                    counts["assumed_writes"] += 1
            elif known == KNOWN_READ or before & CHANGED:
                counts["known_writes"] += 1
            else:
                first = before >> 24
                earlier = self.writer.event(first)
                if earlier["tid"] != row[TID] and row[T] - int(earlier["t"]) < RACE_NS:
                    counts["races"] += 1
                    state = known
                    index = first
                elif known == ASSUMED:
                    counts["write_notified"] += area[3] & SHARED
                    self.writer.assign(first, access=READS)
                    counts["proved_reads"] += 1
                    counts["assumed_writes"] -= 1
                    counts["known_writes"] += 1
                else:
                    counts["repeated"] += 1
        self.writer.append((row[T], row[PID], row[TID], FAULT, access, BY_RULE, 0, 0, 0, -1, addr, 0, 0, 0))
        if state is not None:
            space.pages[page] = index << 24 | (space.generation % GENERATIONS) << 3 | state

    def known_fault(self, row, space):
        """A fault that says what it was; it is only told whether the history explains it."""
        access, counts, page = row[ACCESS], self.counts, row[ADDR] // PAGE
        area = space.find(row[ADDR])
        index = len(self.writer)
        counts["recorded_accesses"] += 1
        if area is None:
            counts["unmapped"] += 1
        elif not area[2] & WRITE if access == WRITES else not area[2]:
            counts["not_accessible"] += 1
        else:
            before = self.before(space, page, area)
            known = before & 3
            if known and not before & CHANGED and (known == KNOWN_WRITE or access == READS):
                earlier = self.writer.event(before >> 24)
                if earlier["flags"] & KERNEL and earlier["tid"] == row[TID]:
                    # The kernel had asked not to wait for it; only now it does.
                    self.writer.assign(before >> 24, op=0)
                    counts["unanswered"] += 1
                elif earlier["tid"] != row[TID] and row[T] - int(earlier["t"]) < RACE_NS:
                    counts["races"] += 1
                else:
                    counts["repeated"] += 1
            elif known == KNOWN_READ and access == WRITES:
                counts["write_notified"] += area[3] & SHARED
            state = KNOWN_WRITE if access == WRITES else max(known, KNOWN_READ)
            space.pages[page] = index << 24 | (space.generation % GENERATIONS) << 3 | state
        self.writer.append((*row[:ARG], 0, 0))

    def before(self, space, page, area):
        """The state of a page: its last event, CHANGED if something came between, or 0 if it is absent."""
        state = space.pages.get(page, 0)
        if not state:
            return 0
        generation = state >> 3 & GENERATIONS - 1
        if generation != space.generation % GENERATIONS:
            inherited = generation < space.born
            if area[3] & SHARED:
                return 0 if inherited else state
            if inherited and state & 3 == KNOWN_READ:
                return 0    # fork does not copy what was only read
            state |= CHANGED
        return state

    def finish(self, metadata):
        before = sum(count for pid, count in self.excluded.items() if pid in self.traced)
        counts = self.counts | {
            "excluded_processes": sum(pid not in self.traced for pid in self.excluded),
            "excluded_faults": sum(self.excluded.values()) - before,
            "faults_before_start": before,
        }
        trace = self.writer.finish()
        start = int(trace.events["t"][0]) if len(trace) else 0
        for block in trace.blocks():
            block["t"] -= start
        trace.metadata = {**(metadata or {}), "epoch_ns": start, "files": self.files, "import": counts}
        return trace


_INDEX = {name: index for index, name in enumerate(EVENT.names or ())}
