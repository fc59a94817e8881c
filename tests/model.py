"""A small virtual memory, written to be read: what ioproc's core must agree with.

It has ioproc's names and arguments, so one driver can run one sequence of calls on both and compare
everything that can be seen. It is slow on purpose: VMAs are a sorted list, a page table is a dict, and
every rule stands once, in the order in which Linux 6.18 applies it. Behaviour is the running kernel's
(tests/test_kernel.py compares this file with it); hooks fire where the IOPROC patch put them.

Left to later issues, and absent here: swap and reclaim, truncate, mlock, remap_file_pages, huge pages.

Out of frames: MemoryError. What the call did before stays (pages faulted in so far, page cache pages
read in), the failing page is left as it was, and MAP_POPULATE ignores the failure as the kernel does.
"""
import errno
import functools
import itertools
import os
from collections import Counter, namedtuple
from dataclasses import dataclass, field, replace
from enum import IntFlag, auto

import numpy as np

PAGE = 4096
WORD = 1 << 64
TASK_SIZE = 0x7FFFFFFFF000
MMAP_BASE = 0x7FFFF7FFF000
MMAP_MIN_ADDR = PAGE
START_BRK = 0x555555756000

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC, PROT_SEM = 0, 1, 2, 4, 8
PROT_GROWSDOWN, PROT_GROWSUP = 0x01000000, 0x02000000
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 1, 2, 3, 0xF
MAP_FIXED, MAP_ANONYMOUS, MAP_LOCKED, MAP_NORESERVE = 0x10, 0x20, 0x2000, 0x4000
MAP_POPULATE, MAP_NONBLOCK, MAP_STACK, MAP_FIXED_NOREPLACE = 0x8000, 0x10000, 0x20000, 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED = 0, 1, 2, 3, 4
MADV_FREE, MADV_DONTFORK, MADV_DOFORK = 8, 10, 11
MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP = 14, 15, 16, 17
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4

CALLBACKS = ("release", "sync_range", "invalidate_range", "update_range", "change_protection",
             "sync_page", "invalidate_page", "update_page", "wrprotect_page")
FAULT_KINDS = ("zero", "anon", "file", "reuse", "cow")
PAGE_ROW = np.dtype([(name, "?") for name in
                     ("present", "swapped", "writable", "dirty", "young", "zero", "shared")] + [("pfn", "u8")])
VMA = namedtuple("VMA", "start end prot flags file offset shared")     # what callbacks and vmas() show


class Flag(IntFlag):
    """What two VMAs must have in common to be one."""

    READ = 1
    WRITE = 2
    EXEC = 4
    SHARED = auto()
    MAYSHARE = auto()       # shared, even if only attached for reading
    MAYWRITE = auto()
    ACCOUNT = auto()        # private memory that was writable once: counted against overcommit
    NORESERVE = auto()
    LOCKED = auto()
    RAND_READ = auto()
    SEQ_READ = auto()
    HUGEPAGE = auto()
    NOHUGEPAGE = auto()
    DONTDUMP = auto()
    DONTCOPY = auto()       # fork leaves it out


ACCESS = Flag.READ | Flag.WRITE | Flag.EXEC
ADVICE = {      # advice -> (flags it clears, flags it sets)
    MADV_NORMAL: (Flag.RAND_READ | Flag.SEQ_READ, 0),
    MADV_RANDOM: (Flag.SEQ_READ, Flag.RAND_READ),
    MADV_SEQUENTIAL: (Flag.RAND_READ, Flag.SEQ_READ),
    MADV_HUGEPAGE: (Flag.NOHUGEPAGE, Flag.HUGEPAGE),
    MADV_NOHUGEPAGE: (Flag.HUGEPAGE, Flag.NOHUGEPAGE),
    MADV_DONTDUMP: (0, Flag.DONTDUMP),
    MADV_DODUMP: (Flag.DONTDUMP, 0),
    MADV_DONTFORK: (0, Flag.DONTCOPY),
    MADV_DOFORK: (Flag.DONTCOPY, 0),
}


class AccessError(Exception):
    """A memory access stopped at `address`, after `completed` bytes."""

    def __init__(self, address):
        super().__init__(f"at {address:#x}")
        self.address = address
        self.completed = 0


class SegmentationFault(AccessError):
    """No VMA allows the access."""


class BusError(AccessError):
    """The access is beyond the last page of the mapped file."""


def fail(code):
    raise OSError(code, os.strerror(code))


def align(n):
    """Round up to whole pages, in 64 bits: the largest numbers become 0."""
    return (n + PAGE - 1) // PAGE * PAGE % WORD


# --- physical memory and files ------------------------------------------------------------------


@dataclass(eq=False)
class Frame:
    pfn: int
    mappings: set = field(default_factory=set)      # (address space, address): the reverse map
    cached: bool = False                            # in a file's page cache, which keeps it alive
    data: bytearray = field(default_factory=lambda: bytearray(PAGE))


class PhysicalMemory:
    def __init__(self, frames=65536, swap_slots=0):
        self.frames = frames
        self.used = {}                      # pfn -> Frame
        self.zero = Frame(0)                # the zero page: not counted, never written
        self.free_pfns = []
        self.in_callback = False

    def allocate(self, copy_of=None):
        if len(self.used) == self.frames:
            raise MemoryError("out of frames")
        pfn = self.free_pfns.pop() if self.free_pfns else len(self.used) + 1
        frame = self.used[pfn] = Frame(pfn)
        if copy_of:
            frame.data[:] = copy_of.data
        return frame

    def release(self, frame):
        """Free the frame if nothing uses it any more."""
        if not frame.mappings and not frame.cached and frame is not self.zero:
            del self.used[frame.pfn]
            self.free_pfns.append(frame.pfn)

    def mappings(self, pfn):
        return list(self.used[pfn].mappings)

    @property
    def stats(self):
        return {"frames": self.frames, "frames_used": len(self.used),
                "frames_free": self.frames - len(self.used)}


class File:
    """A file and its page cache. Pages come into being, filled with zeros, at first use (as in tmpfs)."""

    def __init__(self, mem, size, anonymous=False):
        self.mem, self.size = mem, size
        self.anonymous = anonymous      # the unnamed file of shared anonymous memory: goes with its last VMA
        self.pages = {}                 # page number -> Frame
        self.vmas = 0                   # how many VMAs map it

    def page(self, number):
        """The frame of a page; None beyond the end of the file."""
        if number >= align(self.size) // PAGE:
            return None
        if number not in self.pages:
            self.pages[number] = self.mem.allocate()
            self.pages[number].cached = True
        return self.pages[number]

    def read(self, offset, n):
        n = max(0, min(n, self.size - offset))
        pages = {i: bytes(frame.data) for i, frame in self.pages.items()}
        return b"".join(pages.get(at // PAGE, bytes(PAGE))[at % PAGE:at % PAGE + k] for at, k in chunks(offset, n))

    def write(self, offset, data):
        if offset + len(data) > self.size:
            raise ValueError("write beyond the end of the file")
        for at, n in chunks(offset, len(data)):
            self.page(at // PAGE).data[at % PAGE:at % PAGE + n] = data[at - offset:at - offset + n]

    def unmapped(self):
        self.vmas -= 1
        if self.anonymous and not self.vmas:
            for frame in self.pages.values():
                frame.cached = False
                self.mem.release(frame)
            self.pages = {}


def chunks(addr, length):
    """Cut [addr, addr + length) at page borders: (address, bytes) of each piece."""
    end = addr + length
    while addr < end:
        n = min(end, addr // PAGE * PAGE + PAGE) - addr
        yield addr, n
        addr += n


class Ops:
    """A device's callbacks, any of the nine."""

    def __init__(self, *, name=None, **callbacks):
        unknown = set(callbacks) - set(CALLBACKS)
        if unknown:
            raise TypeError(f"not a callback: {unknown}")
        self.name = name
        self.callbacks = callbacks

    def __repr__(self):
        return f"<Ops {self.name}>"


# --- VMAs and what ties anonymous ones together ---------------------------------------------------


class AnonVma:
    """What connects an anonymous page to every VMA that may map it.

    A VMA gets one at its first private page; fork gives the child's VMA one of its own below the
    parent's, and links it to all above. VMAs with different ones cannot become one VMA.
    """

    def __init__(self, parent=None):
        self.parent = parent or self
        self.linked = []                # the VMAs whose pages may be found through this one
        self.children = 0
        self.parent.children += 1       # a root counts itself

    @property
    def active(self):
        """The VMAs whose new pages belong to this one."""
        return [vma for vma in self.linked if vma.anon_vma is self]


@dataclass(eq=False)
class Vma:
    """[start, end) of an address space: one file or none, the same flags and hook chain throughout."""

    start: int
    end: int
    flags: Flag
    pgoff: int                      # page number in the file; of anonymous memory, of the address it was born at
    file: File = None
    attach: object = None           # the shmat() it comes from
    chain: tuple = ()               # ops attached to it, newest first
    anon_vma: AnonVma = None
    links: list = field(default_factory=list)       # its anon_vma and those above, newest first

    @property
    def anonymous(self):
        return self.file is None

    @property
    def pages(self):
        return (self.end - self.start) // PAGE

    @property
    def forked(self):
        """Came out of a fork with pages its parent had (and maybe still shares)."""
        return self.anon_vma is not None and len(self.links) > 1

    def pgoff_at(self, addr):
        return self.pgoff + (addr - self.start) // PAGE

    def snapshot(self):
        kind = MAP_SHARED if self.flags & Flag.MAYSHARE else MAP_PRIVATE
        named = self.file is not None and not self.file.anonymous
        return VMA(self.start, self.end, int(self.flags & ACCESS), kind | (0 if named else MAP_ANONYMOUS),
                   self.file if named else None, 0 if self.anonymous else self.pgoff * PAGE,
                   bool(self.flags & Flag.MAYSHARE))

    # anon_vma links

    def link(self, anon_vma):
        self.links.insert(0, anon_vma)
        anon_vma.linked.append(self)

    def clone_links(self, other):
        """Link to all that `other` links to. A new VMA may take over an abandoned anon_vma on the way."""
        for anon_vma in reversed(other.links):
            self.link(anon_vma)
            if self.anon_vma is None and anon_vma.children < 2 and not anon_vma.active:
                self.anon_vma = anon_vma

    def take_links(self, other):
        """Part of `other` is merged into this VMA."""
        if other.anon_vma and not self.anon_vma:
            self.anon_vma = other.anon_vma
            self.clone_links(other)

    def inherit_links(self, parent):
        """This VMA is a fork of `parent`."""
        if parent.anon_vma:
            self.clone_links(parent)
            if not self.anon_vma:
                self.anon_vma = AnonVma(parent.anon_vma)
                self.link(self.anon_vma)

    def unlink(self):
        for anon_vma in self.links:
            anon_vma.linked.remove(self)
            if not anon_vma.linked:
                anon_vma.parent.children -= 1
        self.links, self.anon_vma = [], None


@dataclass
class Pte:
    frame: Frame
    writable: bool
    dirty: bool = False
    young: bool = True
    exclusive: bool = False     # an anonymous page that no other process maps


# --- the address space ------------------------------------------------------------------------------


def operation(method):
    """A call that may change something: not from a callback; what callbacks raise goes to its caller."""
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        if self.mem.in_callback:
            raise RuntimeError("a callback may look, not touch")
        self.raised = []
        try:
            result = method(self, *args, **kwargs)
        except Exception:
            if not self.raised:
                raise
        if self.raised:
            first, *others = self.raised
            for other in others:
                first.add_note(f"another callback raised {other!r}")
            raise first
        return result
    return call


class AddressSpace:
    def __init__(self, mem, max_map_count=65530, start_brk=START_BRK, rlimits=None):
        self.mem = mem
        self.max_map_count = max_map_count
        self.rlimits = dict(rlimits or {})
        self.start_brk = self.end_brk = start_brk
        self.list = []              # VMAs in address order
        self.ptes = {}              # page address -> Pte
        self.chain = []             # ops of the whole address space, newest first
        self.attached = {}          # ops -> since when they are somewhere in this address space
        self.clock = itertools.count()
        self.raised = []
        self.faults, self.hooks, self.callbacks, self.chain_nodes = Counter(), Counter(), Counter(), 0
        self.dead = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.exit()

    # --- hooks

    def _walk(self, chain, kind, *args):
        if chain:
            self.hooks[kind] += 1
        for ops in chain:
            self.chain_nodes += 1
            callback = ops.callbacks.get(kind)
            if not callback:
                continue
            self.callbacks[kind] += 1
            self.mem.in_callback = True
            try:
                callback(*args)
            except Exception as exception:      # the rest still runs; see operation()
                self.raised.append(exception)
            finally:
                self.mem.in_callback = False

    def _fire(self, kind, vma, *args):
        """A hook of one VMA: the address space's chain, then the VMA's."""
        self._walk(self.chain, kind, vma.snapshot(), *args)
        self._walk(vma.chain, kind, vma.snapshot(), *args)

    def _fire_unmap(self, vmas, start, end):
        """Once and whole for the address space; for each VMA's own chain clipped to it."""
        self._walk(self.chain, "invalidate_range", vmas[0].snapshot(), start, end)
        for vma in vmas:
            self._walk(vma.chain, "invalidate_range", vma.snapshot(), max(start, vma.start), min(end, vma.end))

    @operation
    def register_ops(self, ops, addr=None, length=None):
        since = self.attached.get(ops) if self._is_attached(ops) else next(self.clock)
        if addr is None:
            if ops in self.chain:
                fail(errno.EEXIST)
            self.attached[ops] = since
            self.chain.insert(0, ops)
            return
        end = self._hook_range(addr, length)
        reached = addr
        for vma in self._over(addr, end):
            if vma.start > reached:
                break
            if ops in vma.chain:
                fail(errno.EEXIST)
            reached = vma.end
        self.attached[ops] = since
        at = addr
        while at < end:
            vma = self._find(at) or fail(errno.ENOMEM)
            stop = min(vma.end, end)
            self._modify(vma, at, stop, chain=(ops, *vma.chain))
            at = stop

    @operation
    def unregister_ops(self, ops, addr=None, length=None):
        if addr is None:
            if ops not in self.chain:
                fail(errno.EINVAL)
            self.chain.remove(ops)
            return
        end = self._hook_range(addr, length)
        if not any(ops in vma.chain for vma in self._over(addr, end)):
            fail(errno.EINVAL)
        at = addr
        while vma := self._first(at, end):
            start, stop = max(at, vma.start), min(vma.end, end)
            if ops in vma.chain:
                self._modify(vma, start, stop, chain=tuple(o for o in vma.chain if o is not ops))
            at = stop

    def _is_attached(self, ops):
        return ops in self.chain or any(ops in vma.chain for vma in self.list)

    def _hook_range(self, addr, length):
        if addr % PAGE or not length or length < 0 or addr + align(length) > TASK_SIZE:
            fail(errno.EINVAL)
        return addr + align(length)

    # --- looking

    def vmas(self):
        return [vma.snapshot() for vma in self.list]

    def pagemap(self, addr, length):
        rows = np.zeros((addr % PAGE + length + PAGE - 1) // PAGE, PAGE_ROW)
        for i, page in enumerate(range(addr // PAGE * PAGE, addr + length, PAGE)):
            pte = self.ptes.get(page)
            if pte:
                rows[i] = (True, False, pte.writable, pte.dirty, pte.young, pte.frame is self.mem.zero,
                           len(pte.frame.mappings) > 1, pte.frame.pfn)
        return rows

    @property
    def stats(self):
        resident = sum(pte.frame is not self.mem.zero for pte in self.ptes.values())
        return {"faults": self.faults.total(), **{f"faults_{k}": self.faults[k] for k in FAULT_KINDS},
                "map_count": len(self.list), "total_pages": self._total(), "rss_pages": resident,
                "hooks": {k: self.hooks[k] for k in CALLBACKS},
                "callbacks": {k: self.callbacks[k] for k in CALLBACKS}, "chain_nodes": self.chain_nodes}

    def _first(self, start, end):
        """The first VMA that overlaps [start, end)."""
        return next(iter(self._over(start, end)), None)

    def _find(self, addr):
        return self._first(addr, addr + 1)

    def _over(self, start, end):
        return [vma for vma in self.list if vma.end > start and vma.start < end] if start < end else []

    def _present(self, start, end):
        return sorted(page for page in self.ptes if start <= page < end)

    def _neighbours(self, start, end):
        """The VMAs before and after a hole, or before and after the VMA that fills [start, end)."""
        before = [vma for vma in self.list if vma.end <= start]
        after = [vma for vma in self.list if vma.start >= end]
        return before[-1] if before else None, after[0] if after else None

    # --- the VMA list: insert, remove, split, merge

    def _insert(self, vma):
        self.list.append(vma)
        self.list.sort(key=lambda v: v.start)
        if vma.file:
            vma.file.vmas += 1

    def _remove(self, vma):
        self.list.remove(vma)
        vma.unlink()
        if vma.file:
            vma.file.unmapped()

    def _split(self, vma, at):
        """Cut `vma` in two at an address inside it; both halves keep the chain."""
        upper = replace(vma, start=at, pgoff=vma.pgoff_at(at), links=[])
        upper.clone_links(vma)
        vma.end = at
        self._insert(upper)

    def _split_counted(self, vma, at):
        if len(self.list) >= self.max_map_count:
            fail(errno.ENOMEM)
        self._split(vma, at)

    def _continues(self, left, right):
        """Do the two have everything in common that does not concern their anon_vmas?"""
        return (left is not None and right is not None and left.end == right.start and left.flags == right.flags
                and left.file is right.file and left.attach is right.attach and left.chain == right.chain
                and left.pgoff + left.pages == right.pgoff)

    @staticmethod
    def _anon_joins(neighbour, anon_vma, origin):
        """May memory with `anon_vma`, coming from the VMA `origin`, become part of `neighbour`?

        A VMA that came out of a fork has several anon_vmas and gives them to no VMA that has none.
        """
        if neighbour.anon_vma and anon_vma is None:
            return not neighbour.forked
        if anon_vma and neighbour.anon_vma is None:
            return origin is None or not origin.forked
        return neighbour.anon_vma is anon_vma

    def _joins(self, new, prev, next, origin):
        """Can the proposed VMA `new` join its neighbours? (left, right)"""
        left = self._continues(prev, new) and self._anon_joins(prev, new.anon_vma, origin)
        right = self._continues(new, next) and self._anon_joins(next, new.anon_vma, origin)
        if left and right and prev.anon_vma and next.anon_vma and prev.anon_vma is not next.anon_vma:
            right = False       # each would do, but not both
        return left, right

    def _merge_new(self, new, copied_from=None, only_left=False, origin=None):
        """Let a neighbour grow over the hole that `new` would fill. The grown VMA, or None."""
        prev, next = self._neighbours(new.start, new.end)
        left, right = self._joins(new, prev, next, copied_from)
        right = right and not only_left
        if left and right and next.attach:
            right = False       # an attached segment's VMA must be closed, not swallowed
        if not left and not right:
            return None
        grown = prev if left else next
        if left:
            grown.end = next.end if right else new.end
        else:
            grown.start, grown.pgoff = new.start, new.pgoff
        if left and right:
            grown.take_links(next)
            self._remove(next)
        if copied_from:
            grown.take_links(copied_from)
        return grown

    def _merge_existing(self, vma, start, end, flags, chain):
        """[start, end) of `vma` gets new flags or another chain: let a neighbour take it over."""
        prev, next = self._neighbours(vma.start, vma.end)
        new = replace(vma, start=start, end=end, pgoff=vma.pgoff_at(start), flags=flags, chain=chain)
        left, right = self._joins(new, prev, next, vma)     # only a side of the VMA touches a neighbour
        whole = (start, end) == (vma.start, vma.end)
        if whole and vma.attach:
            return None
        if left and right and next.attach:
            right = False
        if left:
            prev.take_links(next if right and next.anon_vma else vma)
            prev.end = next.end if right else end
            if right:
                self._remove(next)
            if whole:
                self._remove(vma)
            else:
                vma.start, vma.pgoff = end, vma.pgoff_at(end)
            return prev
        if right:
            next.take_links(vma)
            next.start, next.pgoff = start, new.pgoff
            if whole:
                self._remove(vma)
            else:
                vma.end = start
            return next
        return None

    def _modify(self, vma, start, end, flags=None, chain=None):
        """Give [start, end) of `vma` new flags or another chain. The VMA that now covers it."""
        flags = vma.flags if flags is None else flags
        chain = vma.chain if chain is None else chain
        merged = self._merge_existing(vma, start, end, flags, chain)
        if merged:
            return merged
        if vma.start < start:
            self._split_counted(vma, start)
            vma = self._find(start)
        if vma.end > end:
            self._split_counted(vma, end)
        vma.flags, vma.chain = flags, chain
        return vma

    # --- limits

    def _total(self):
        return sum(vma.pages for vma in self.list)

    def _may_expand(self, flags, pages):
        def over(limit, now):
            return limit in self.rlimits and now + pages > self.rlimits[limit] // PAGE

        def data(flags):
            return flags & (Flag.WRITE | Flag.SHARED) == Flag.WRITE

        return not over("AS", self._total()) and not (
            data(flags) and over("DATA", sum(vma.pages for vma in self.list if data(vma.flags))))

    def _unmapped_area(self, addr, length, fixed=False):
        """Where a new mapping goes: at a free hint, else as high as it fits below MMAP_BASE."""
        if length > TASK_SIZE:
            fail(errno.ENOMEM)
        if fixed:
            if addr > TASK_SIZE - length:
                fail(errno.ENOMEM)
            if addr % PAGE:
                fail(errno.EINVAL)
            if addr < MMAP_MIN_ADDR:
                fail(errno.EPERM)
            return addr
        if addr:
            addr = max(addr // PAGE * PAGE, MMAP_MIN_ADDR)
            if addr <= TASK_SIZE - length and not self._first(addr, addr + length):
                return addr
        top = MMAP_BASE
        for vma in [*reversed([v for v in self.list if v.start < MMAP_BASE]), None]:
            bottom = vma.end if vma else MMAP_MIN_ADDR
            if top - bottom >= length:
                return top - length
            top = vma.start if vma else 0
        fail(errno.ENOMEM)

    # --- mapping and unmapping

    @operation
    def mmap(self, length, prot=PROT_READ | PROT_WRITE, flags=MAP_PRIVATE | MAP_ANONYMOUS, *,
             addr=None, file=None, offset=0):
        if flags & MAP_FIXED_NOREPLACE:
            flags |= MAP_FIXED
        if offset % PAGE:
            fail(errno.EINVAL)
        if not file and not flags & MAP_ANONYMOUS:
            fail(errno.EBADF)
        if not length:
            fail(errno.EINVAL)
        length = align(length)
        if not length or len(self.list) > self.max_map_count:
            fail(errno.ENOMEM)
        addr = self._unmapped_area(addr or 0, length, fixed=flags & MAP_FIXED)
        end = addr + length
        if flags & MAP_FIXED_NOREPLACE and self._first(addr, end):
            fail(errno.EEXIST)
        kind = flags & MAP_TYPE
        if kind not in (MAP_SHARED, MAP_PRIVATE) and not (file and kind == MAP_SHARED_VALIDATE):
            fail(errno.EINVAL)
        if kind == MAP_SHARED_VALIDATE and flags & MAP_FIXED_NOREPLACE:
            fail(errno.EOPNOTSUPP)      # not one of the flags from before MAP_SHARED_VALIDATE

        vm_flags = Flag(prot & ACCESS) | Flag.MAYWRITE
        vm_flags |= Flag.NORESERVE if flags & MAP_NORESERVE else 0
        vm_flags |= Flag.LOCKED if flags & MAP_LOCKED else 0
        vm_flags |= Flag.NOHUGEPAGE if flags & MAP_STACK else 0
        if kind != MAP_PRIVATE:
            vm_flags |= Flag.SHARED | Flag.MAYSHARE
        elif vm_flags & Flag.WRITE and not vm_flags & Flag.NORESERVE:
            vm_flags |= Flag.ACCOUNT
        if flags & MAP_ANONYMOUS:
            file = None
        pgoff = offset // PAGE if file else 0 if kind == MAP_SHARED else addr // PAGE
        if not file and kind == MAP_SHARED:
            file = File(self.mem, length, anonymous=True)
        self._map(Vma(addr, end, vm_flags, pgoff, file))
        if flags & MAP_LOCKED or flags & (MAP_POPULATE | MAP_NONBLOCK) == MAP_POPULATE:
            self._populate(addr, end)
        return addr

    def _map(self, new):
        """Put `new` where it belongs, over whatever is there."""
        doomed = self._isolate(new.start, new.end)
        if not self._may_expand(new.flags, new.pages - sum(vma.pages for vma in doomed)):
            fail(errno.ENOMEM)      # what was split stays split
        if doomed:
            self._unmap_isolated(doomed, new.start, new.end)
        if not self._merge_new(new):
            self._insert(new)

    def _isolate(self, start, end):
        """Split VMAs at the edges of the range. The VMAs that then fill it."""
        first = self._first(start, end)
        if first and first.start < start and end < first.end and len(self.list) >= self.max_map_count:
            fail(errno.ENOMEM)      # a hole in one VMA adds a VMA for good; other splits are gone again soon
        for at in start, end:
            vma = self._find(at)
            if vma and vma.start < at:
                self._split(vma, at)
        return self._over(start, end)

    def _unmap_isolated(self, vmas, start, end):
        self._fire_unmap(vmas, start, end)
        self._zap(start, end)
        for vma in vmas:
            self._remove(vma)

    def _unmap(self, start, end):
        vmas = self._isolate(start, end)
        if vmas:
            self._unmap_isolated(vmas, start, end)

    @operation
    def munmap(self, addr, length):
        if addr % PAGE or addr > TASK_SIZE or length > TASK_SIZE - addr or not length:
            fail(errno.EINVAL)
        self._unmap(addr, addr + align(length))

    @operation
    def brk(self, addr=None):
        if addr is None or addr < self.start_brk:
            return self.end_brk
        if addr - self.start_brk > self.rlimits.get("DATA", TASK_SIZE):
            return self.end_brk
        old, new = align(self.end_brk), align(addr)
        if new > TASK_SIZE:
            return self.end_brk
        try:
            if new < old:
                if not self._first(new, old):
                    return self.end_brk
                self._unmap(new, old)
            elif new > old:
                self._grow_brk(old, new)
        except OSError:
            return self.end_brk
        self.end_brk = addr
        return addr

    def _grow_brk(self, old, new):
        flags = Flag.READ | Flag.WRITE | Flag.MAYWRITE | Flag.ACCOUNT
        if (self._first(old, new + PAGE) or not self._may_expand(flags, (new - old) // PAGE)
                or len(self.list) > self.max_map_count):
            fail(errno.ENOMEM)
        area = Vma(old, new, flags, old // PAGE)
        if not (old > self.start_brk and self._merge_new(area, only_left=True)):
            self._insert(area)

    # --- System V shared memory

    @operation
    def shmat(self, file, addr=None, readonly=False):
        if addr:
            if addr % PAGE or self._first(addr, addr + file.size):
                fail(errno.EINVAL)
        length = align(file.size)
        if len(self.list) > self.max_map_count:
            fail(errno.ENOMEM)
        addr = self._unmapped_area(addr or 0, length, fixed=bool(addr))
        flags = Flag.READ | Flag.MAYSHARE
        if not readonly:
            flags |= Flag.WRITE | Flag.SHARED | Flag.MAYWRITE
        self._map(Vma(addr, addr + length, flags, 0, file, attach=object()))
        return addr

    @operation
    def shmdt(self, addr):
        if addr % PAGE:
            fail(errno.EINVAL)

        def piece_of_it(vma):
            return vma.attach and vma.start >= addr and vma.start - addr == vma.pgoff * PAGE

        pieces = [vma for vma in self.list if piece_of_it(vma)]
        if not pieces:
            fail(errno.EINVAL)
        end = addr + align(pieces[0].file.size)
        for vma in pieces:
            if vma is pieces[0] or (vma.attach is pieces[0].attach and vma.end <= end):
                self._unmap(vma.start, vma.end)

    # --- changing what is mapped

    @operation
    def mprotect(self, addr, length, prot):
        grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP)
        prot &= ~grows
        if addr % PAGE or grows == PROT_GROWSDOWN | PROT_GROWSUP:
            fail(errno.EINVAL)
        if not length:
            return
        end = (addr + align(length)) % WORD
        if end <= addr:
            fail(errno.ENOMEM)
        if prot & ~(PROT_READ | PROT_WRITE | PROT_EXEC | PROT_SEM):
            fail(errno.EINVAL)
        if grows:       # for stacks, which no VMA here is
            first = self._first(addr, end)
            fail(errno.EINVAL if first and (grows == PROT_GROWSDOWN or first.start <= addr) else errno.ENOMEM)
        at = addr
        while at < end:
            vma = self._find(at) or fail(errno.ENOMEM)
            flags = vma.flags & ~ACCESS | Flag(prot & ACCESS)
            if flags & Flag.WRITE and not flags & Flag.MAYWRITE:
                fail(errno.EACCES)
            stop = min(vma.end, end)
            if flags != vma.flags:
                vma = self._protect(vma, at, stop, flags, prot)
            at = max(stop, vma.end)

    def _protect(self, vma, start, end, flags, prot):
        old, pages = vma.flags, (end - start) // PAGE
        if flags & Flag.WRITE:
            if not self._may_expand(flags, pages) and self._may_expand(old, pages):
                fail(errno.ENOMEM)
            if not old & (Flag.ACCOUNT | Flag.WRITE | Flag.SHARED | Flag.NORESERVE):
                flags |= Flag.ACCOUNT
        elif vma.anonymous and not vma.anon_vma:
            flags &= ~Flag.ACCOUNT
        vma = self._modify(vma, start, end, flags)
        self._fire("change_protection", vma, start, end, prot)
        for page in self._present(start, end):
            pte = self.ptes[page]
            # Private pages stay read-only unless it is certain that nobody else has them.
            pte.writable = bool(flags & Flag.WRITE and (flags & Flag.SHARED or pte.exclusive))
        if old & (Flag.WRITE | Flag.SHARED | Flag.LOCKED) == Flag.LOCKED and flags & Flag.WRITE:
            self._populate(start, end)
        return vma

    @operation
    def madvise(self, addr, length, advice):
        if advice not in (*ADVICE, MADV_WILLNEED, MADV_DONTNEED, MADV_FREE) or addr % PAGE:
            fail(errno.EINVAL)
        end = addr + align(length)
        if end >= WORD or length and not align(length):
            fail(errno.EINVAL)
        at, hole = addr, False
        while at < end:
            vma = self._first(at, end) or fail(errno.ENOMEM)
            hole = hole or vma.start > at
            start, stop = max(at, vma.start), min(end, vma.end)
            if advice == MADV_DONTNEED:
                if vma.flags & Flag.LOCKED:
                    fail(errno.EINVAL)
                self._fire("invalidate_range", vma, start, stop)
                self._zap(start, stop)
            elif advice == MADV_FREE:
                if vma.flags & Flag.LOCKED or not vma.anonymous:
                    fail(errno.EINVAL)
                self._fire("invalidate_range", vma, start, stop)
                for page in self._present(start, stop):     # they may go at any time, and do not here
                    pte = self.ptes[page]
                    if pte.frame is not self.mem.zero:
                        pte.young = pte.dirty = False
            elif advice in ADVICE:
                clear, add = ADVICE[advice]
                flags = vma.flags & ~clear | add
                if flags != vma.flags:
                    try:
                        vma = self._modify(vma, start, stop, flags)
                    except OSError:
                        fail(errno.EAGAIN)
            at = max(stop, min(vma.end, end))
        if hole:
            fail(errno.ENOMEM)

    @operation
    def msync(self, addr, length, flags=MS_SYNC):
        if (flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC) or addr % PAGE
                or flags & (MS_ASYNC | MS_SYNC) == MS_ASYNC | MS_SYNC):
            fail(errno.EINVAL)
        end = addr + align(length)
        if end >= WORD:
            fail(errno.ENOMEM)
        at, hole = addr, False
        while at < end:
            vma = self._first(at, end) or fail(errno.ENOMEM)
            if vma.start > at:
                if flags == MS_ASYNC:
                    fail(errno.ENOMEM)
                hole = True
            if flags & MS_INVALIDATE and vma.flags & Flag.LOCKED:
                fail(errno.EBUSY)
            if vma.flags & Flag.MAYSHARE:       # even attached for reading only
                self._fire("sync_range", vma, max(at, vma.start), min(end, vma.end))
            at = vma.end
        if hole:
            fail(errno.ENOMEM)

    # --- mremap

    @operation
    def mremap(self, old_addr, old_length, new_length, flags=MREMAP_MAYMOVE, new_addr=None):
        old, new, target = align(old_length), align(new_length), new_addr or 0
        placed = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)
        if flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP) or old_addr % PAGE:
            fail(errno.EINVAL)
        if not new or new > TASK_SIZE:
            fail(errno.EINVAL)
        if placed:
            if (target > TASK_SIZE - new or target % PAGE or not flags & MREMAP_MAYMOVE
                    or (flags & MREMAP_DONTUNMAP and old != new)
                    or ((old_addr + old) % WORD > target and target + new > old_addr)):
                fail(errno.EINVAL)
            if len(self.list) + 2 >= self.max_map_count - 3:
                fail(errno.ENOMEM)      # moving needs room for splits; better to refuse before unmapping
        if placed and old == new:
            return self._move_all(old_addr, old, target, flags)

        vma = self._find(old_addr) or fail(errno.EFAULT)
        self._check_remap(vma, old_addr, old, new, flags)
        if placed:
            return self._move_to(old_addr, old, new, target, flags)
        if new <= old:
            if new < old:
                self._shrink(old_addr, old, new)
            return old_addr
        if self._can_extend(vma, old_addr, old, new):
            extension = replace(vma, start=vma.end, end=old_addr + new, pgoff=vma.pgoff_at(vma.end))
            self._merge_new(extension)
            if vma.flags & Flag.LOCKED:
                self._populate(old_addr + old, old_addr + new)
            return old_addr
        if not flags & MREMAP_MAYMOVE:
            fail(errno.ENOMEM)
        return self._move(vma, old_addr, old, new, self._unmapped_area(0, new), flags)

    def _check_remap(self, vma, addr, old, new, flags):
        if new <= old and not flags & (MREMAP_FIXED | MREMAP_DONTUNMAP):
            return
        if not old and not vma.flags & Flag.MAYSHARE:
            fail(errno.EINVAL)      # an old length of 0 maps shared memory a second time
        if min(old, new) > vma.end - addr:
            fail(errno.EFAULT)      # a tail to be unmapped may lie in other VMAs
        if new > old and not self._may_expand(vma.flags, (new - old) // PAGE):
            fail(errno.ENOMEM)

    def _can_extend(self, vma, addr, old, new):
        end = addr + new
        return addr + old == vma.end and end <= TASK_SIZE and not self._first(vma.end, end)

    def _shrink(self, addr, old, new):
        if addr + new > TASK_SIZE or old - new > TASK_SIZE - (addr + new):
            fail(errno.EINVAL)
        self._unmap(addr + new, addr + old)

    def _move_all(self, addr, length, target, flags):
        """Move every VMA of the range, with the holes between them."""
        at, end, result = addr, addr + length, None
        while vma := self._first(at, end):
            if result is None and vma.start > addr:
                fail(errno.EFAULT)
            if vma.attach and (result is not None or vma.end < end):
                fail(errno.EFAULT)      # attached segments move alone
            start = max(vma.start, addr)
            if result is not None:
                target += vma.start - at
            at, size = vma.end, min(end, vma.end) - start
            self._check_remap(vma, start, size, size, flags)
            target = self._move_to(start, size, size, target, flags)
            result = target if result is None else result
            target += size
        return fail(errno.EFAULT) if result is None else result

    def _move_to(self, addr, old, new, target, flags):
        if flags & MREMAP_FIXED:
            self._unmap(target, target + new)
            if not self._find(addr):
                fail(errno.EFAULT)      # old was 0, and the target where the VMA was
        if new < old:
            self._shrink(addr, old, new)
            old = new
        vma = self._find(addr)
        if flags & MREMAP_DONTUNMAP and not self._may_expand(vma.flags, old // PAGE):
            fail(errno.ENOMEM)
        target = self._unmapped_area(target, new, fixed=flags & MREMAP_FIXED)
        return self._move(vma, addr, old, new, target, flags)

    def _move(self, vma, addr, old, new, target, flags):
        if len(self.list) >= self.max_map_count - 3:
            fail(errno.ENOMEM)
        copy = replace(vma, start=target, end=target + new, pgoff=vma.pgoff_at(addr), links=[])
        if vma.anonymous and not vma.anon_vma:
            copy.pgoff = target // PAGE         # nothing points at the old numbers yet
        merged = self._merge_new(copy, copied_from=vma)
        if merged:
            vma = self._find(addr) if old else vma     # it may have grown into itself
        else:
            copy.clone_links(vma)
            self._insert(copy)
        moved = merged or copy
        if old:
            self._fire("invalidate_range", vma, addr, addr + old)
            self._fire("invalidate_range", moved, target, target + old)
        for page in self._present(addr, addr + old):
            pte = self.ptes.pop(page)
            self.ptes[page - addr + target] = pte
            if pte.frame is not self.mem.zero:
                pte.frame.mappings.remove((self, page))
                pte.frame.mappings.add((self, page - addr + target))
        if flags & MREMAP_DONTUNMAP:
            vma.flags &= ~Flag.LOCKED
            if moved is not vma and (addr, addr + old) == (vma.start, vma.end):
                vma.unlink()
        elif old:
            self._unmap(addr, addr + old)
        if new > old and moved.flags & Flag.LOCKED:
            self._populate(target + old, target + new)
        return target

    # --- pages

    def _zap(self, start, end):
        for page in self._present(start, end):
            self._unset(page)

    def _unset(self, page):
        frame = self.ptes.pop(page).frame
        frame.mappings.discard((self, page))
        self.mem.release(frame)

    def _set(self, page, pte):
        if page in self.ptes:
            self._unset(page)
        self.ptes[page] = pte
        if pte.frame is not self.mem.zero:
            pte.frame.mappings.add((self, page))
        return pte

    def _prepare_anon(self, vma):
        """The first private page of a VMA: share a neighbour's anon_vma, so that the two may merge later."""
        if vma.anon_vma:
            return
        prev, next = self._neighbours(vma.start, vma.end)
        for near, left, right in (next, vma, next), (prev, prev, vma):
            if near and near.anon_vma and not near.forked:
                if self._continues(left, replace(right, flags=right.flags & ~ACCESS | left.flags & ACCESS)):
                    vma.anon_vma = near.anon_vma
                    break
        else:
            vma.anon_vma = AnonVma()
        vma.link(vma.anon_vma)

    def _fault(self, addr, write):
        """One access to the page of `addr`. (its PTE, did it fault?)"""
        page = addr // PAGE * PAGE
        vma = self._find(addr)
        if vma is None or not vma.flags & (Flag.WRITE if write else ACCESS):
            raise SegmentationFault(addr)
        pte = self.ptes.get(page)
        faulted = pte is None or (write and not pte.writable)
        if pte is None:
            pte = self._fault_absent(vma, addr, page, write)
        elif faulted:
            pte = self._fault_protected(vma, page, pte)
        pte.young = True
        pte.dirty = pte.dirty or write
        return pte, faulted

    def _fault_absent(self, vma, addr, page, write):
        writable = bool(vma.flags & Flag.WRITE)
        if write and not vma.flags & Flag.SHARED:
            self._prepare_anon(vma)
        if vma.anonymous:
            kind = "anon" if write else "zero"
            pte = Pte(self.mem.allocate(), writable, exclusive=True) if write else Pte(self.mem.zero, False)
        else:
            kind = "file"
            frame = vma.file.page(vma.pgoff_at(page))
            if frame is None:
                raise BusError(addr)
            if vma.flags & Flag.SHARED or not write:
                pte = Pte(frame, writable and bool(vma.flags & Flag.SHARED))
            else:
                pte = Pte(self.mem.allocate(copy_of=frame), writable, exclusive=True)
        self.faults[kind] += 1
        pte.dirty = write       # before the hook, which may look
        self._set(page, pte)
        self._fire("update_page", vma, page)
        return pte

    def _fault_protected(self, vma, page, pte):
        frame = pte.frame
        anon = frame is not self.mem.zero and not frame.cached
        if anon and (pte.exclusive or len(frame.mappings) == 1):
            self.faults["reuse"] += 1
            pte.exclusive = pte.writable = pte.dirty = pte.young = True
        else:
            self._prepare_anon(vma)
            copy = self.mem.allocate(copy_of=frame)
            self.faults["cow"] += 1
            self._fire("invalidate_page", vma, page)
            pte = self._set(page, Pte(copy, writable=True, dirty=True, exclusive=True))
        self._fire("update_page", vma, page)
        return pte

    def _populate(self, start, end):
        """Fault in a range as far as it goes: what fails ends its VMA's part and is not reported."""
        for vma in self._over(start, end):
            write = vma.flags & (Flag.WRITE | Flag.SHARED) == Flag.WRITE
            if not vma.flags & ACCESS:
                continue
            try:
                for page in range(max(start, vma.start), min(end, vma.end), PAGE):
                    self._fault(page, write)
            except (BusError, MemoryError):
                pass

    # --- access

    def _access(self, addr, length, write):
        """The pieces of [addr, addr + length), page by page, each faulted in as it is reached."""
        for at, n in chunks(addr, length):
            try:
                pte, faulted = self._fault(at, write)
            except AccessError as error:
                error.completed = at - addr
                raise
            yield at, n, pte.frame, faulted

    @operation
    def read(self, addr, n):
        return b"".join(bytes(frame.data[at % PAGE:at % PAGE + k]) for at, k, frame, _ in self._access(addr, n, False))

    @operation
    def write(self, addr, data):
        for at, n, frame, _ in self._access(addr, len(data), True):
            frame.data[at % PAGE:at % PAGE + n] = data[at - addr:at - addr + n]

    @operation
    def touch(self, addr, length=1, write=False):
        faults = done = 0
        try:
            for *_, faulted in self._access(addr, length, write):
                done += 1           # one byte of the page
                faults += faulted
        except AccessError as error:
            error.completed = done
            raise
        return faults

    # --- processes

    @operation
    def fork(self):
        child = AddressSpace(self.mem, self.max_map_count, self.start_brk, self.rlimits)
        child.end_brk = self.end_brk
        for vma in self.list:
            if vma.flags & Flag.DONTCOPY:
                continue
            copy = replace(vma, chain=(), anon_vma=None, links=[], flags=vma.flags & ~Flag.LOCKED)
            copy.inherit_links(vma)
            child._insert(copy)
            if not vma.anon_vma:
                continue        # the child faults in what it needs
            for page in self._present(vma.start, vma.end):
                pte = self.ptes[page]
                if pte.writable:
                    self._fire("wrprotect_page", vma, page)
                pte.writable = pte.exclusive = False
                child._set(page, replace(pte, young=False))
        return child

    @operation
    def exit(self):
        if self.dead:
            return
        self.dead = True
        only_on_vmas = {ops for vma in self.list for ops in vma.chain} - set(self.chain)
        while self.chain:
            self._walk([self.chain.pop(0)], "release", self)
        for ops in sorted(only_on_vmas, key=self.attached.get, reverse=True):
            self._walk([ops], "release", self)
        for page in list(self.ptes):
            self._unset(page)
        for vma in list(self.list):
            self._remove(vma)


# --- what must always hold ---------------------------------------------------------------------------


def check(mem, *spaces, files=()):
    """Assert the invariants; `spaces` and `files` are all that are alive on `mem`."""
    mapped = {}
    for mm in spaces:
        for left, right in zip(mm.list, mm.list[1:]):
            assert left.end <= right.start, "VMAs overlap or are out of order"
        for vma in mm.list:
            assert vma.start < vma.end and not vma.start % PAGE and not vma.end % PAGE
            assert (vma.anon_vma is None) == (not vma.links)
            assert all(vma in anon_vma.linked for anon_vma in vma.links)
            assert len(set(vma.chain)) == len(vma.chain)
        for page, pte in mm.ptes.items():
            vma = mm._find(page)
            assert vma, "a page outside every VMA"
            assert not pte.writable or vma.flags & Flag.WRITE
            assert not pte.exclusive or len(pte.frame.mappings) == 1
            if pte.frame is mem.zero:
                assert not pte.writable and not pte.dirty
            else:
                mapped.setdefault(pte.frame.pfn, set()).add((mm, page))
                assert pte.frame.cached or vma.anon_vma, "a private page without an anon_vma"
    for pfn, frame in mem.used.items():
        assert frame.mappings == mapped.pop(pfn, set()), "the reverse map lies"
        assert frame.mappings or frame.cached, "a frame leaked"
    assert not mapped and not any(mem.zero.data)
    cached = {frame.pfn for mm in spaces for vma in mm.list if vma.file for frame in vma.file.pages.values()}
    cached |= {frame.pfn for file in files for frame in file.pages.values()}
    assert cached == {pfn for pfn, frame in mem.used.items() if frame.cached}, "the page cache leaked"
    assert len(mem.used) <= mem.frames
