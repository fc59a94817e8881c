"""Random programs of memory-management calls, and how to print and shrink them.

An operation is a tuple ``(name, process, *arguments)``.  Processes are numbered in the order of their forks, from 0;
an operation of a process that does not exist (any more) is skipped, so any subset of a program is a program.
"""

import mmap
import random
from dataclasses import dataclass, replace

PAGE = 4096
PAGES = 64
"""Pages of the window in which the two sides are compared."""
ARENA = 32
"""Pages of the window in which operations start; none is longer, so that nothing valid leaves the window."""
BASE = 0x100000200000 - 16 * PAGE
"""Start of the window.  A page table ends in its middle, and nothing else is near."""
HUGE = 512 * PAGE
HUGE_BASE, HUGE_PAGES = 0x180000000000, 8
"""The window of programs with huge pages, and its size in those."""
BRK = BASE + 20 * PAGE
MAX_PROCESSES, MAX_PINS = 8, 4

MAP_FIXED = 0x10
MAP_FIXED_NOREPLACE = 0x100000
MAP_SHARED_VALIDATE = 3
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4
R, W, X = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
PRIVATE, SHARED, ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_SHARED, mmap.MAP_ANONYMOUS
GROWSDOWN, LOCKED, NORESERVE, POPULATE, STACK, HUGETLB = 0x100, 0x2000, 0x4000, 0x8000, 0x20000, 0x40000
PROT_GROWSDOWN, PROT_GROWSUP = 0x1000000, 0x2000000
HUGE_LENGTHS = ((1 << 64) - 4096, (1 << 64) - 1, 1 << 47, (1 << 63) - 4096)
FLAG_ADVICE = {
    "NORMAL": 0, "RANDOM": 1, "SEQUENTIAL": 2, "WILLNEED": 3, "DONTFORK": 10, "DOFORK": 11,
    "HUGEPAGE": 14, "NOHUGEPAGE": 15, "DONTDUMP": 16, "DODUMP": 17, "WIPEONFORK": 18, "KEEPONFORK": 19,
}
DONTNEED, FREE, REMOVE, COLD, PAGEOUT, POPULATE_READ, POPULATE_WRITE, DONTNEED_LOCKED = 4, 8, 9, 20, 21, 22, 23, 24
ADVICE_NAMES = {value: name for name, value in FLAG_ADVICE.items()} | {
    DONTNEED: "DONTNEED", FREE: "FREE", REMOVE: "REMOVE", COLD: "COLD", PAGEOUT: "PAGEOUT",
    POPULATE_READ: "POPULATE_READ", POPULATE_WRITE: "POPULATE_WRITE", DONTNEED_LOCKED: "DONTNEED_LOCKED",
}


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes
    ----------
    ops : tuple
        The operations.
    files : tuple of int
        Sizes of its files in bytes.
    segments : tuple of int
        Sizes of its segments of System V shared memory in bytes.
    start_brk : int
        Where its brk area starts; 0: not in the window.
    limit_as, limit_data : int
        RLIMIT_AS and RLIMIT_DATA in pages; 0: no limit.
    mappings : int
        How many mappings a process may have; 0: as many as the kernel lets it.
    limit_memlock, limit_stack : int
        RLIMIT_MEMLOCK (and no CAP_IPC_LOCK) and RLIMIT_STACK in bytes; 0: no limit.
    huge : bool
        Whether its window is one for huge pages, of which its files are then.
    """

    ops: tuple
    files: tuple = ()
    segments: tuple = ()
    start_brk: int = 0
    limit_as: int = 0
    limit_data: int = 0
    mappings: int = 0
    limit_memlock: int = 0
    limit_stack: int = 0
    huge: bool = False

    def __str__(self):
        lines = [f"files of {', '.join(map(str, self.files))} bytes"] if self.files else []
        if self.segments:
            lines.append(f"segments of {', '.join(map(str, self.segments))} bytes")
        if self.start_brk:
            lines.append(f"start_brk {_number(self.start_brk)}")
        for name in ("limit_as", "limit_data", "mappings", "limit_memlock", "limit_stack", "huge"):
            if getattr(self, name):
                lines.append(f"{name} {getattr(self, name)}")
        return "\n".join(lines + [f"{i:3d}  {describe(op)}" for i, op in enumerate(self.ops)])

    @property
    def swaps(self):
        """Whether it swaps pages out."""
        return any(op[0] == "madvise" and op[4] == PAGEOUT for op in self.ops)

    @property
    def window(self):
        """The start and the number of pages of its window."""
        return (HUGE_BASE, HUGE_PAGES * 512) if self.huge else (BASE, PAGES)


def _number(value):
    page, rest = divmod(value - BASE, PAGE)
    if 0 <= page < PAGES:
        return f"A+{page}" + (f"p+{rest}" if rest else "p")
    page, rest = divmod(value - HUGE_BASE, HUGE)
    if 0 <= page < HUGE_PAGES:
        return f"H+{page}M" + (f"+{_length(rest)}" if rest else "")
    return hex(value)


def _length(value):
    if value % HUGE == 0 and 0 < value <= HUGE_PAGES * HUGE:
        return f"{value // HUGE}M"
    return f"{value // PAGE}p" if value % PAGE == 0 and 0 < value < 1 << 20 else hex(value)


def _names(value, names, none="0"):
    found = [name for name, bit in names if value & bit]
    rest = value & ~sum(bit for _, bit in names)
    return "|".join(found + ([hex(rest)] if rest else [])) or none


PROT_NAMES = (("R", R), ("W", W), ("X", X), ("GROWSDOWN", PROT_GROWSDOWN), ("GROWSUP", PROT_GROWSUP))
FLAG_NAMES = (("SHARED", 1), ("PRIVATE", 2), ("FIXED", 0x10), ("ANON", 0x20), ("NORESERVE", NORESERVE),
              ("POPULATE", POPULATE), ("STACK", STACK), ("NOREPLACE", MAP_FIXED_NOREPLACE),
              ("GROWSDOWN", GROWSDOWN), ("LOCKED", LOCKED), ("HUGETLB", HUGETLB))
MREMAP_NAMES = (("MAYMOVE", 1), ("FIXED", 2), ("DONTUNMAP", 4))
MSYNC_NAMES = (("ASYNC", 1), ("INVALIDATE", 2), ("SYNC", 4))


def describe(op):
    """Return an operation as a line to read: A (H: huge pages) is the window's start, p is pages, M huge ones."""
    name, process, *a = op
    if name == "mmap":
        args = [_number(a[0]), _length(a[1]), _names(a[2], PROT_NAMES, "NONE"), _names(a[3], FLAG_NAMES)]
        if a[4] >= 0:
            args += [f"file{a[4]}", _length(a[5]) if a[5] else "0"]
    elif name in ("munmap", "mlock", "munlock"):
        args = [_number(a[0]), _length(a[1])]
    elif name == "mprotect":
        args = [_number(a[0]), _length(a[1]), _names(a[2], PROT_NAMES, "NONE")]
    elif name == "mremap":
        args = [_number(a[0]), _length(a[1]), _length(a[2]), _names(a[3], MREMAP_NAMES)]
        args += [_number(a[4])] if a[4] else []
    elif name == "madvise":
        args = [_number(a[0]), _length(a[1]), ADVICE_NAMES.get(a[2], a[2])]
    elif name == "pin":
        args = [_number(a[0]), _length(a[1])] + ["write"] * bool(a[2]) + [f"slot{a[3]}"]
    elif name == "remap":
        args = [_number(a[0]), _length(a[1]), _length(a[2] * PAGE) if 0 < a[2] < 100 else a[2]]
    elif name == "msync":
        args = [_number(a[0]), _length(a[1]), _names(a[2], MSYNC_NAMES)]
    elif name in ("brk", "read", "shmdt"):
        args = [_number(a[0])]
    elif name == "write":
        args = [_number(a[0]), a[1]]
    elif name == "shmat":
        args = [_number(a[0]), f"segment{a[1]}"] + ["RDONLY"] * bool(a[2])
    elif name in ("fread", "fwrite", "truncate", "punch", "unpin", "spawn"):
        return f"{name}({', '.join(str(x) for x in a)})"
    else:
        args = a
    return f"{process}: {name}({', '.join(map(str, args))})"


class _Writer:
    """Writes one random program.  It remembers page boundaries it used, because boundaries are where rules meet."""

    def __init__(self, rng, length, *, brk, executable, mappings, swap, lock_limit):
        self.rng = rng
        self.length = length
        self.theme = rng.choice(("private", "private", "private", "shared", "files", "mixed", "segments"))
        self.forks = rng.choice((0, 0, 1, 2, 4))
        self.executable = executable
        self.start_brk = BRK if brk and rng.random() < 0.25 else 0
        self.files = ()
        if self.theme in ("files", "mixed"):
            self.files = tuple(rng.choice((1, 3, 8, 12)) * PAGE - rng.choice((0, 0, 1, 2000)) for _ in range(2))
        self.segments = ()
        if self.theme == "segments":
            self.segments = tuple(rng.choice((1, 4, 7)) * PAGE - rng.choice((0, 0, 100)) for _ in range(2))
        self.attached = []
        # what else the program is about; most are about little, so that operations meet
        self.locks, self.pins, self.stacks, self.remaps = (rng.random() < share for share in (0.2, 0.15, 0.15, 0.1))
        self.swap = swap and not self.pins and rng.random() < 0.4
        # some look closely at a few pages that several processes have, and map little
        self.close = rng.random() < (0.5 if self.swap or self.pins else 0.15)
        self.arena = 5 if self.close else ARENA
        if self.close:
            self.forks = rng.choice((2, 3))
        self.cuts = bool(self.files) and rng.random() < 0.6
        self.spawns = bool(self.files) and rng.random() < 0.3
        self.limits = {}
        if mappings:
            self.limits["mappings"] = rng.randint(6, 14)
        elif rng.random() < 0.1:
            self.limits["limit_as"] = rng.randint(8, 40)
        elif rng.random() < 0.1 and not self.start_brk:
            # brk() counts the executor's data against this limit differently
            self.limits["limit_data"] = rng.randint(4, 30)
        if self.locks and (rng.random() < 0.4 or lock_limit):
            self.limits["limit_memlock"] = rng.randint(2, 15) * PAGE + rng.choice((0, 0, 100))
        if self.stacks and rng.random() < 0.4:
            self.limits["limit_stack"] = rng.randint(3, 20) * PAGE + rng.choice((0, 0, 100))
        self.stack_starts = []
        self.recent = []  # pages accessed or swapped out, which are worth another look
        self.boundaries = [0, 4, 8, 16]
        self.mapped = {}
        self.live = [0]
        self.forked = 0
        self.ops = []

    def page(self, prot=0):
        """Return a page number: usually one that is mapped with a protection, often one that was an edge before."""
        rng = self.rng
        near = [b + d for b in self.boundaries[-8:] for d in (0, 0, 0, -1, 1)]
        mapped = [page for page, has in self.mapped.items() if has & prot == prot and page < self.arena]
        if mapped and rng.random() < 0.9:
            near = [page for page in near if page in mapped] or mapped
        else:
            mapped = range(self.arena)
        return min(max(rng.choice(near if rng.random() < 0.7 else mapped), 0), self.arena - 1)

    def range(self, longest=8, mapped=True):
        """Return a start and a length in pages; usually mapped ones, often ones whose edges were used before."""
        start = self.page() if mapped else self.rng.choice((self.page(), self.rng.randrange(self.arena)))
        rest = [b - start for b in self.boundaries[-8:] if 0 < b - start <= self.arena]
        if rest and self.rng.random() < 0.4:
            pages = self.rng.choice(rest)
        else:
            pages = self.rng.randint(1, longest)
        if mapped and self.rng.random() < 0.8:
            run = 1
            while run < pages and start + run in self.mapped:
                run += 1
            pages = run
        self.boundaries += [start, start + pages]
        return start, pages

    def note(self, addr, length, prot=None):
        """Note what an operation does to an arena (None: unmaps), roughly: it may fail, and each process has its own."""
        if 0 <= addr - BASE < PAGES * PAGE and 0 < length < PAGES * PAGE:
            for page in range((addr - BASE) // PAGE, (addr - BASE + length + PAGE - 1) // PAGE):
                self.mapped.pop(page, None)
                if prot is not None:
                    self.mapped[page] = prot

    def span(self, huge=HUGE_LENGTHS):
        """Return an address and a length in bytes; now and then odd ones."""
        start, pages = self.range()
        return self.bend(BASE + start * PAGE, pages * PAGE, huge)

    def bend(self, addr, length, huge=HUGE_LENGTHS, odd=0.03):
        if self.rng.random() < odd:
            how = self.rng.randrange(5)
            if how == 0:
                addr += self.rng.choice((1, 8, 2048, 4095))
            elif how == 1:
                length = 0
            elif how == 2:
                length = self.rng.choice(huge)
            elif length:
                length -= self.rng.choice((1, 1000, 4095))
        return addr, length

    def prot(self):
        prots = [R | W] * 12 + [R] * 4 + [0] * 2 + [W, R | X, R | W | X]
        if not self.executable:
            prots = prots[:19]
        if self.pins:
            # a reference to what cannot be read depends on whether it is there
            prots = [prot | R if prot & W else prot for prot in prots]
        return self.rng.choice(prots)

    def process(self):
        return self.rng.choice(self.live)

    # each of these returns an operation

    def mmap(self):
        rng = self.rng
        kinds = {
            "private": ["private"],
            "shared": ["shared", "shared", "private"],
            "files": ["file-private", "file-shared", "file-private", "file-shared", "private"],
            "segments": ["shared", "private"],
            "mixed": ["private", "private", "shared", "file-private", "file-shared"],
        }
        kind = rng.choice(kinds[self.theme])
        flags = SHARED if "shared" in kind else PRIVATE
        file, offset = -1, 0
        start, pages = self.range(mapped=False)
        addr, length = self.bend(BASE + start * PAGE, pages * PAGE)
        if "file" in kind:
            file = rng.randrange(2)
            # offsets that continue a neighbour's make merges
            offset = rng.choice((start % 8, start % 8, 0, rng.randrange(6))) * PAGE
            if rng.random() < 0.02:
                offset += 512
        else:
            flags |= ANONYMOUS
        how = rng.random()
        if how < 0.75:
            flags |= MAP_FIXED
        elif how < 0.87:
            flags |= MAP_FIXED_NOREPLACE
        elif how < 0.88:
            addr = 0
        for flag, share in ((NORESERVE, 0.04), (POPULATE, 0.08), (STACK, 0.03)):
            if rng.random() < share:
                flags |= flag
        if self.locks and rng.random() < 0.08:
            flags |= LOCKED
        if self.stacks and rng.random() < (0.3 if kind == "private" else 0.02):
            flags |= GROWSDOWN
            self.stack_starts.append(start)
        if rng.random() < 0.02:
            flags = flags & ~3 | rng.choice((0, MAP_SHARED_VALIDATE))
        if rng.random() < 0.01:
            addr, flags = 0x7fffffffe000 + rng.randrange(3) * PAGE, flags | MAP_FIXED
        prot = self.prot()
        self.note(addr, length, prot)
        return "mmap", self.process(), addr, length, prot, flags, file, offset

    def munmap(self):
        addr, length = self.span()
        self.note(addr, length)
        return "munmap", self.process(), addr, length

    def mprotect(self):
        prot, huge = self.prot(), HUGE_LENGTHS
        if self.rng.random() < 0.02:
            # PROT_GROWSDOWN looks for the next mapping, which must not be the executor's
            prot, huge = self.rng.choice((0x10, PROT_GROWSDOWN, PROT_GROWSUP, 0x03000000, 8 | R)), HUGE_LENGTHS[:2]
        elif self.stacks and self.rng.random() < 0.2:
            prot, huge = prot | PROT_GROWSDOWN, HUGE_LENGTHS[:2]
        addr, length = self.span(huge)
        self.note(addr, length, prot & (R | W))
        return "mprotect", self.process(), addr, length, prot

    def mremap(self):
        rng = self.rng
        start, old = self.range()
        new = old
        how = rng.random()
        if how < 0.25:
            new = rng.randint(1, old)
        elif how < 0.5:
            new = old + rng.randint(1, 6)
        elif how < 0.53:
            old = 0
        flags = rng.choice((0, MREMAP_MAYMOVE, *[MREMAP_MAYMOVE | MREMAP_FIXED] * 4))
        if rng.random() < 0.12 and not ("limit_memlock" in self.limits or self.locks and self.swap):
            # (of locked memory: the kernel counts the old VMA as locked and keeps its pages from swap, though it is not)
            flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP | rng.choice((0, MREMAP_FIXED, MREMAP_FIXED))
            new = old = old or 1
            if rng.random() < 0.05:
                new += 1
        target = 0
        if flags & (MREMAP_FIXED | MREMAP_DONTUNMAP):
            target = BASE + self.page() * PAGE
            self.boundaries += [(target - BASE) // PAGE, (target - BASE) // PAGE + new]
        if rng.random() < 0.03:
            flags = rng.choice((MREMAP_FIXED, 8, 16 | MREMAP_MAYMOVE))
        if target and rng.random() < 0.02:
            target += rng.choice((8, 2048))
        addr, length = self.bend(BASE + start * PAGE, old * PAGE)
        new_length = new * PAGE
        if rng.random() < 0.02:
            new_length = rng.choice((0, new_length - 100, *HUGE_LENGTHS))
        if target and not flags & MREMAP_DONTUNMAP:
            self.note(addr, length)
        self.note(target or addr, new_length, R | W)
        return "mremap", self.process(), addr, length, new_length, flags, target

    def madvise(self):
        # a page that was written after MADV_FREE is swapped out at the second MADV_PAGEOUT only
        often = [DONTNEED, DONTNEED, DONTNEED if self.swap else FREE, POPULATE_READ, POPULATE_WRITE]
        often += [REMOVE, REMOVE] * (self.theme != "private") + [PAGEOUT, PAGEOUT, COLD] * self.swap
        often += [DONTNEED_LOCKED] * self.locks
        advice = self.rng.choice(often if self.rng.random() < 0.6 else list(FLAG_ADVICE.values()))
        if self.rng.random() < 0.03:
            advice = self.rng.choice((5, 6, 99, 1 << 20))
        # the long lengths that do not wrap would reach what the executor itself runs on
        addr, length = self.span(HUGE_LENGTHS[:2])
        return "madvise", self.process(), addr, length, advice

    def pageout(self):
        start = self.rng.choice(self.recent[-4:] or [0])
        pages = self.rng.randint(1, 4)
        self.recent += range(start, start + pages)
        return "madvise", self.process(), BASE + start * PAGE, pages * PAGE, PAGEOUT

    def msync(self):
        flags = self.rng.choice((MS_ASYNC, MS_SYNC, MS_SYNC | MS_INVALIDATE, 0, MS_SYNC | MS_ASYNC, 8))
        return "msync", self.process(), *self.span(), flags

    def brk(self):
        addr = BASE + self.rng.randint(18, 40) * PAGE + self.rng.choice((0, 0, 0, 1, 100))
        self.boundaries.append(min((addr - BASE) // PAGE, ARENA))
        self.note(BRK, addr - BRK, R | W)
        return "brk", self.process(), addr

    def address(self, prot):
        if self.stack_starts and self.rng.random() < 0.3:
            page = max(self.rng.choice(self.stack_starts) - self.rng.randint(1, 6), 0)
            self.note(BASE + page * PAGE, PAGE, R | W)
            self.boundaries.append(page)
            return BASE + page * PAGE
        recent = [page for page in self.recent[-4:] if self.mapped.get(page, 0) & prot]
        page = self.rng.choice(recent) if recent and self.rng.random() < 0.4 else self.page(prot)
        self.recent.append(page)
        return BASE + page * PAGE + self.rng.choice((0, 0, 0, 1, 4095))

    def read(self):
        return "read", self.process(), self.address(R)

    def write(self):
        return "write", self.process(), self.address(W), self.rng.randrange(1, 256)

    def shmat(self):
        segment = self.rng.randrange(2)
        addr, length = BASE + self.range(mapped=False)[0] * PAGE, self.segments[segment]
        if self.rng.random() < 0.05:
            addr += 512
        readonly = self.rng.random() < 0.2
        self.attached.append(addr)
        self.note(addr, length, R if readonly else R | W)
        return "shmat", self.process(), addr, segment, int(readonly)

    def shmdt(self):
        addr = self.rng.choice(self.attached[-4:] or [BASE])
        if self.rng.random() < 0.2:
            addr += self.rng.choice((1, -1, 2)) * PAGE
        return "shmdt", self.process(), addr

    def file_place(self):
        file = self.rng.randrange(2)
        last = (self.files[file] - 1) // PAGE
        return file, min(self.rng.randint(0, last) * PAGE + self.rng.choice((0, 1, 2095)), self.files[file] - 1)

    def fread(self):
        return "fread", 0, *self.file_place()

    def fwrite(self):
        return "fwrite", 0, *self.file_place(), self.rng.randrange(1, 256)

    def mlock(self):
        return "mlock", self.process(), *self.span()

    def munlock(self):
        return "munlock", self.process(), *self.span()

    def pin(self):
        start, pages = self.range()
        return "pin", self.process(), BASE + start * PAGE, pages * PAGE, self.rng.randrange(2), self.rng.randrange(MAX_PINS)

    def unpin(self):
        return "unpin", 0, self.rng.randrange(MAX_PINS)

    def remap(self):
        addr, length = self.span(HUGE_LENGTHS[:2])
        offset = self.rng.choice(((addr - BASE) // PAGE % 8, self.rng.randrange(8), self.rng.randrange(8)))
        if self.rng.random() < 0.03:
            offset = self.rng.choice((1 << 52, (1 << 64) - 1, 20))
        return "remap", self.process(), addr, length, offset

    def truncate(self):
        return "truncate", 0, self.rng.randrange(2), self.rng.randrange(13) * PAGE + self.rng.choice((0, 0, 1, 1000, 4095))

    def punch(self):
        offset, length = self.rng.randrange(10) * PAGE, self.rng.randint(1, 6) * PAGE
        if self.rng.random() < 0.3:
            # not one that ends in the first page: the kernel unmaps more than it needs to then
            offset, length = offset + self.rng.randrange(PAGE), length + self.rng.randrange(PAGE)
        if self.rng.random() < 0.05:
            length = 0
        return "punch", 0, self.rng.randrange(2), offset, length

    def spawn(self):
        self.forked += 1
        self.live.append(self.forked)
        return "spawn", 0

    def fork(self):
        parent = self.process()
        self.forked += 1
        self.live.append(self.forked)
        return "fork", parent

    def exit(self):
        process = self.process()
        self.live.remove(process)
        return "exit", process

    def write_program(self):
        weights = {
            self.mmap: 18, self.munmap: 6, self.mprotect: 14, self.mremap: 12, self.madvise: 6, self.msync: 2,
            self.read: 12, self.write: 20,
        }
        if self.close:
            weights |= {self.mmap: 3, self.munmap: 1, self.mprotect: 4, self.mremap: 3, self.madvise: 4, self.msync: 0}
        if self.files:
            weights |= {self.fread: 2, self.fwrite: 3}
        if self.segments:
            weights |= {self.shmat: 16, self.shmdt: 5}
        if self.start_brk:
            weights[self.brk] = 8
        if self.forks:
            weights |= {self.fork: 2 * self.forks, self.exit: self.forks if not self.close else 2 * self.forks}
        if self.locks:
            weights |= {self.mlock: 12, self.munlock: 5}
        if self.pins:
            weights |= {self.pin: 12, self.unpin: 4, self.fork: 6, self.exit: 3}
        if self.cuts:
            weights |= {self.truncate: 6, self.punch: 4}
        if self.remaps and self.theme != "private":
            weights |= {self.remap: 10}
        if self.spawns:
            weights |= {self.spawn: 4, self.exit: 2}
        if self.swap:
            weights[self.pageout] = 14
        if self.close:
            prot = self.rng.choice((R | W, R | W, R | W, R))
            kind = SHARED if self.theme == "shared" and self.rng.random() < 0.5 else PRIVATE
            file = 0 if self.files and self.rng.random() < 0.7 else -1
            flags = kind | MAP_FIXED | (ANONYMOUS if file < 0 else 0)
            self.ops.append(("mmap", 0, BASE, self.arena * PAGE, prot, flags, file, 0))
            self.note(BASE, self.arena * PAGE, prot)
            self.ops += [("write", 0, BASE + page * PAGE, 1 + page) for page in range(self.arena) if self.rng.random() < 0.7]
            self.recent += range(self.arena)
            if self.swap and self.rng.random() < 0.6:
                self.ops.append(("madvise", 0, BASE, self.arena * PAGE, PAGEOUT))
            if self.pins and self.rng.random() < 0.6:
                self.ops.append(("pin", 0, BASE, self.arena * PAGE, 0, 0))
            self.ops.append(self.fork())
        else:
            self.ops += [self.mmap() for _ in range(self.rng.randint(1, 3))]
        choices, shares = list(weights), list(weights.values())
        while len(self.ops) < self.length:
            choice = self.rng.choices(choices, shares)[0]
            if choice in (self.fork, self.spawn) and self.forked + 1 == MAX_PROCESSES:
                continue
            if choice == self.exit and len(self.live) == 1:
                continue
            self.ops.append(choice())
        return Program(tuple(self.ops), self.files, self.segments, self.start_brk, **self.limits)


class _HugeWriter:
    """Writes one random program with huge pages.

    Nothing moves: the kernel forgets reservations when part of a private mapping does, and they are few.  Where there are forks
    private mappings have none: it gives them back twice when the process that has them unmaps what its child still has.
    """

    def __init__(self, rng, length):
        self.rng, self.length = rng, length
        self.files = tuple(rng.randint(1, 3) * HUGE for _ in range(2)) if rng.random() < 0.5 else ()
        self.forks = rng.choice((0, 1, 2))
        self.live, self.started, self.used = [0], 1, [0, 1]

    def process(self):
        return self.rng.choice(self.live)

    def span(self, longest=3):
        """Return an address and a length: mostly of whole huge pages, now and then with an end within one."""
        rng = self.rng
        start = rng.choice(self.used[-6:]) if rng.random() < 0.8 else rng.randrange(HUGE_PAGES)
        pages = min(rng.randint(1, longest), HUGE_PAGES - start)
        self.used += [start, min(start + pages, HUGE_PAGES - 1)]
        addr, length = HUGE_BASE + start * HUGE, pages * HUGE
        if rng.random() < 0.12:
            addr, length = rng.choice(((addr + PAGE, length - PAGE), (addr, length - PAGE), (addr, PAGE), (addr, 0),
                                       (addr + HUGE // 2, HUGE // 2), (addr, HUGE // 2)))
        return addr, length

    # each of these returns an operation

    def mmap(self):
        rng = self.rng
        flags, file, offset = rng.choice((PRIVATE, PRIVATE, SHARED)), -1, 0
        addr, length = self.span()
        if self.files and rng.random() < 0.6:
            file, offset = rng.randrange(2), rng.choice((0, 0, 0, HUGE, HUGE // 2 if rng.random() < 0.1 else 0))
        else:
            flags |= ANONYMOUS | (HUGETLB if rng.random() < 0.85 else 0)
        flags |= MAP_FIXED if rng.random() < 0.85 else MAP_FIXED_NOREPLACE
        for flag, share in ((NORESERVE, 0.2), (POPULATE, 0.1), (LOCKED, 0.05), (GROWSDOWN, 0.02)):
            if rng.random() < share and (flag != GROWSDOWN or flags & HUGETLB):
                flags |= flag
        if self.forks and flags & 3 == PRIVATE:
            flags |= NORESERVE
        return "mmap", self.process(), addr, length, rng.choice((R | W, R | W, R | W, R, 0)), flags, file, offset

    def munmap(self):
        return "munmap", self.process(), *self.span()

    def mprotect(self):
        return "mprotect", self.process(), *self.span(), self.rng.choice((R | W, R | W, R, 0))

    def mremap(self):
        addr, length = self.span()
        return "mremap", self.process(), addr, length, self.rng.randint(1, 3) * HUGE, 0, 0

    def madvise(self):
        often = (DONTNEED, DONTNEED, FREE, REMOVE, POPULATE_READ, POPULATE_WRITE, COLD, 3, 10, 11, 16, 18)
        return "madvise", self.process(), *self.span(), self.rng.choice(often)

    def mlock(self):
        return "mlock", self.process(), *self.span()

    def msync(self):
        return "msync", self.process(), *self.span(), MS_SYNC

    def address(self):
        return HUGE_BASE + self.rng.choice(self.used[-8:]) * HUGE + self.rng.choice((0, 0, 5, HUGE // 2, HUGE - 1))

    def read(self):
        return "read", self.process(), self.address()

    def write(self):
        return "write", self.process(), self.address(), self.rng.randrange(1, 256)

    def truncate(self):
        return "truncate", 0, self.rng.randrange(2), self.rng.choice((0, HUGE, 2 * HUGE, 3 * HUGE, HUGE + PAGE))

    def punch(self):
        return "punch", 0, self.rng.randrange(2), self.rng.randrange(5) * HUGE // 2, self.rng.randint(1, 4) * HUGE // 2

    def fread(self):
        return "fread", 0, self.rng.randrange(2), self.rng.choice((0, 5, HUGE, 2 * HUGE - 1))

    def spawn(self):
        self.live.append(self.started)
        self.started += 1
        return "spawn", 0

    def fork(self):
        parent = self.process()
        self.live.append(self.started)
        self.started += 1
        return "fork", parent

    def exit(self):
        process = self.process()
        self.live.remove(process)
        return "exit", process

    def write_program(self):
        weights = {self.mmap: 14, self.munmap: 5, self.mprotect: 5, self.mremap: 2, self.madvise: 6, self.mlock: 1, self.msync: 1,
                   self.read: 12, self.write: 18}
        if self.files:
            weights |= {self.truncate: 4, self.punch: 4, self.fread: 2, self.spawn: 1}
        if self.forks:
            weights |= {self.fork: 3 * self.forks, self.exit: 2 * self.forks}
        self.ops = [self.mmap()]
        choices, shares = list(weights), list(weights.values())
        while len(self.ops) < self.length:
            choice = self.rng.choices(choices, shares)[0]
            if choice in (self.fork, self.spawn) and self.started == MAX_PROCESSES or choice == self.exit and len(self.live) == 1:
                continue
            self.ops.append(choice())
        return Program(tuple(self.ops), self.files, huge=True)


def generate(seed, index, *, length=None, brk=True, executable=True, mappings=False, swap=False, lock_limit=False, huge=False):
    """Return random program number ``index`` of a seed.

    Parameters
    ----------
    seed, index : int
        The same pair and the same options give the same program.
    length : int, optional
        Number of operations; by default it varies.
    brk, executable : bool
        Whether brk() and PROT_EXEC are used.
    mappings : bool
        Whether the number of mappings is limited.
    swap : bool
        Whether pages are swapped out, which needs a swap device.
    lock_limit : bool
        Whether all programs that lock memory have a limit on it, not only some: who may not lock as much as he likes needs one.
    huge : bool
        Whether it is about huge pages, which needs a pool of them.
    """
    rng = random.Random(f"{seed}/{index}")
    if huge:
        return _HugeWriter(rng, length or rng.choice((10, 20, 40))).write_program()
    length = length or rng.choice((12, 25, 40, 60))
    writer = _Writer(rng, length, brk=brk, executable=executable, mappings=mappings, swap=swap, lock_limit=lock_limit)
    return writer.write_program()


def shrink(program, fails, attempts=2000):
    """Return a smaller program that still fails: operations are deleted while ``fails(program)`` holds."""
    size = max(1, len(program.ops) // 2)
    while size:
        at = 0
        while at < len(program.ops) and attempts:
            smaller = replace(program, ops=program.ops[:at] + program.ops[at + size:])
            attempts -= 1
            if fails(smaller):
                program = smaller
            else:
                at += size
        size //= 2
    return program
