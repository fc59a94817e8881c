"""The model's VMAs: what they are, when they merge, where new ones go. See model.py."""
import errno
from collections import namedtuple
from dataclasses import dataclass, field, replace

from model_memory import HUGE, PAGE, WORD, File, fail

TASK_SIZE = 0x7FFFFFFFF000
MMAP_BASE = 0x7FFFF7FFF000
MMAP_MIN_ADDR = PAGE
GUARD_GAP = 256 * PAGE          # below a stack
START_BRK = 0x555555756000

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC, PROT_SEM = 0, 1, 2, 4, 8
PROT_GROWSDOWN, PROT_GROWSUP = 0x01000000, 0x02000000
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 1, 2, 3, 0xF
MAP_FIXED, MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE = 0x10, 0x20, 0x100, 0x2000, 0x4000
MAP_POPULATE, MAP_NONBLOCK, MAP_STACK, MAP_HUGETLB, MAP_FIXED_NOREPLACE = 0x8000, 0x10000, 0x20000, 0x40000, 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED = 0, 1, 2, 3, 4
MADV_FREE, MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK = 8, 9, 10, 11
MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP = 14, 15, 16, 17
MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_COLD, MADV_PAGEOUT = 18, 19, 20, 21
MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_DONTNEED_LOCKED = 22, 23, 24
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4

VMA = namedtuple("VMA", "start end prot flags file offset shared")     # what callbacks and vmas() show


class Flag:
    """What two VMAs must have in common to be one."""

    READ = 1
    WRITE = 2
    EXEC = 4
    SHARED = 1 << 3
    MAYSHARE = 1 << 4       # shared, even if only attached for reading
    MAYWRITE = 1 << 5
    ACCOUNT = 1 << 6        # private memory that was writable once: counted against overcommit
    NORESERVE = 1 << 7
    LOCKED = 1 << 8
    RAND_READ = 1 << 9
    SEQ_READ = 1 << 10
    HUGEPAGE = 1 << 11
    NOHUGEPAGE = 1 << 12
    DONTDUMP = 1 << 13
    DONTCOPY = 1 << 14      # fork leaves it out
    WIPEONFORK = 1 << 15    # fork's child finds it empty
    GROWSDOWN = 1 << 16     # a stack
    PFNMAP = 1 << 17        # device memory
    HUGETLB = 1 << 18
    NONLINEAR = 1 << 19     # shows its file's pages in any order (2.6.12)


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
    MADV_WIPEONFORK: (0, Flag.WIPEONFORK),
    MADV_KEEPONFORK: (Flag.WIPEONFORK, 0),
}


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

    mm: object
    start: int
    end: int
    flags: int                      # of Flag
    pgoff: int                      # page number in the file; of anonymous memory, of the address it was born at
    file: File = None
    attach: object = None           # the shmat() it comes from
    chain: tuple = ()               # ops attached to it, newest first
    anon_vma: AnonVma = None
    links: list = field(default_factory=list)       # its anon_vma and those above, newest first
    owner: bool = False             # private huge pages: they are reserved for it,
    robbed: bool = False            # or the owner took one back: no page will be had here

    @property
    def anonymous(self):
        return self.file is None and not self.device

    @property
    def device(self):
        """Device memory: nothing to free or to copy."""
        return bool(self.flags & Flag.PFNMAP)

    @property
    def huge(self):
        return bool(self.flags & Flag.HUGETLB)

    @property
    def special(self):
        """Nothing to merge, to lock or to reclaim."""
        return self.device or self.huge

    @property
    def page_size(self):
        return HUGE if self.huge else PAGE

    @property
    def locked(self):
        return bool(self.flags & Flag.LOCKED)

    @property
    def nonlinear(self):
        return bool(self.flags & Flag.NONLINEAR)

    @property
    def start_gap(self):
        """New mappings stay below: a stack needs room to grow."""
        return max(0, self.start - GUARD_GAP) if self.flags & Flag.GROWSDOWN else self.start

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
        kind |= (0 if named or self.device else MAP_ANONYMOUS) | (MAP_HUGETLB if self.huge else 0)
        return VMA(self.start, self.end, self.flags & ACCESS, kind,
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



class VmaList:
    """The VMAs of an address space, in address order."""

    def __init__(self, max_map_count, rlimits):
        self.max_map_count = max_map_count
        self.rlimits = dict(rlimits or {})
        self.list = []

    def find(self, addr):
        return self.first(addr, addr + 1)

    def first(self, start, end):
        """The first VMA that overlaps [start, end)."""
        return next(iter(self.over(start, end)), None)

    def over(self, start, end):
        return [vma for vma in self.list if vma.end > start and vma.start < end] if start < end else []

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
            vma.file.vmas.append(vma)

    def _remove(self, vma):
        self.list.remove(vma)
        vma.unlink()
        if vma.file:
            vma.file.unmapped(vma)

    def _split(self, vma, at):
        """Cut `vma` in two at an address inside it; both halves keep the chain."""
        if at % vma.page_size:
            fail(errno.EINVAL)
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
                and not left.special
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

    def _merge_new(self, new, copied_from=None, only_left=False):
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
            vma = self.find(start)
        if vma.end > end:
            self._split_counted(vma, end)
        vma.flags, vma.chain = flags, chain
        return vma

    # --- limits

    @property
    def total(self):
        return sum(vma.pages for vma in self.list)

    @property
    def locked(self):
        return sum(vma.pages for vma in self.list if vma.locked)

    def _may_expand(self, flags, pages):
        def over(limit, now):
            return limit in self.rlimits and now + pages > self.rlimits[limit] // PAGE

        def data(flags):
            return flags & (Flag.WRITE | Flag.SHARED | Flag.GROWSDOWN) == Flag.WRITE

        return not over("AS", self.total) and not (
            data(flags) and over("DATA", sum(vma.pages for vma in self.list if data(vma.flags))))

    def _may_lock(self, pages):
        return (self.locked + pages) * PAGE <= self.rlimits.get("MEMLOCK", WORD)

    def _unmapped_area(self, addr, length, fixed=False, page_size=PAGE):
        """Where a new mapping goes: at a free hint, else as high as it fits below MMAP_BASE."""
        if length > TASK_SIZE:
            fail(errno.ENOMEM)
        if fixed and page_size > PAGE and addr % page_size:
            fail(errno.EINVAL)
        if fixed:
            if addr > TASK_SIZE - length:
                fail(errno.ENOMEM)
            if addr % PAGE:
                fail(errno.EINVAL)
            if addr < MMAP_MIN_ADDR:
                fail(errno.EPERM)
            return addr
        if addr:
            addr = -(max(addr // PAGE * PAGE, MMAP_MIN_ADDR) // -page_size) * page_size
            prev, next = self._neighbours(addr, addr)
            free = not self.find(addr) and (not next or addr + length <= next.start_gap)
            if addr <= TASK_SIZE - length and free:
                return addr
        pad = page_size - PAGE          # room to align
        top, next = MMAP_BASE, self._neighbours(MMAP_BASE, MMAP_BASE)[1]
        for prev in [*reversed([vma for vma in self.list if vma.start < MMAP_BASE]), None]:
            bottom = prev.end if prev else MMAP_MIN_ADDR
            if top - bottom >= length + pad and next:
                top = min(top, next.start_gap)      # the gap would do, but for the stack above it
            if top - bottom >= length + pad:
                return (top - length) // page_size * page_size
            top, next = min(top, prev.start) if prev else 0, prev
        fail(errno.ENOMEM)
