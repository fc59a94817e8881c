"""A small virtual memory, written to be read: what ioproc's core must agree with.

It has ioproc's names and arguments, so one driver can run one sequence of calls on both and compare
everything that can be seen. It is slow on purpose: VMAs are a sorted list, a page table is a dict, and
every rule stands once, in the order in which Linux 6.18 applies it. Behaviour is the running kernel's
(tests/test_kernel.py compares this model with it); hooks fire where the IOPROC patch put them.

In model_memory.py: frames, swap, files. In model_vma.py: VMAs, merging, limits. In model_huge.py: huge pages.
Here: page tables and calls.

Out of frames: some are reclaimed, and if none can be, MemoryError. What the call did before stays (pages
faulted in so far, page cache pages read in), the failing page is left as it was, and MAP_POPULATE ignores
the failure as the kernel does.
"""
# ruff: noqa: F403, F405
import errno
import functools
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np

from model_huge import *
from model_huge import HugeMappings, HugePool
from model_memory import *
from model_memory import PhysicalMemory as Frames
from model_vma import *

CALLBACKS = ("release", "sync_range", "invalidate_range", "update_range", "change_protection",
             "sync_page", "invalidate_page", "update_page", "wrprotect_page")
FAULT_KINDS = ("zero", "anon", "file", "reuse", "cow", "swap")
PAGE_ROW = np.dtype([(name, "?") for name in
                     ("present", "swapped", "writable", "dirty", "young", "zero", "shared")] + [("pfn", "u8")])


class PhysicalMemory(Frames, HugePool):
    def __init__(self, frames=65536, swap_slots=0, huge_pages=0):
        Frames.__init__(self, frames, swap_slots)
        HugePool.__init__(self, huge_pages)


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


# --- address spaces -------------------------------------------------------------------------------


class MM(VmaList, HugeMappings):
    """VMAs, page tables and hook chains: what one process has, or two after vfork."""

    def __init__(self, mem, max_map_count=65530, start_brk=START_BRK, rlimits=None, nonlinear=False):
        super().__init__(max_map_count, rlimits)
        self.mem, self.nonlinear = mem, nonlinear
        self.number = next(mem.numbers)
        self.faces = []             # the AddressSpace objects that are in it
        self.start_brk = self.end_brk = start_brk
        self.ptes = {}              # page address -> Pte or SwapEntry
        self.shows = {}             # page address -> page of the file, where remap_file_pages of 2.6.12 put another
        self.spent = set()          # where a huge page was, and its owner's reservation is used up
        self.chain = []             # ops of the whole address space, newest first
        self.attached = {}          # ops -> since when they are somewhere in this address space
        self.clock = itertools.count()
        self.faults, self.hooks, self.callbacks, self.chain_nodes = Counter(), Counter(), Counter(), 0

    @property
    def face(self):
        return self.faces[0] if self.faces else None

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
                if self is not self.mem.caller:
                    exception.add_note(f"in {self.face}")
                self.mem.raised.append(exception)
            finally:
                self.mem.in_callback = False

    def fire(self, kind, vma, *args):
        """A hook of one VMA: the address space's chain, then the VMA's."""
        self._walk(self.chain, kind, vma.snapshot(), *args)
        self._walk(vma.chain, kind, vma.snapshot(), *args)

    def _fire_unmap(self, vmas, start, end):
        """Once and whole for the address space; for each VMA's own chain clipped to it."""
        self._walk(self.chain, "invalidate_range", vmas[0].snapshot(), start, end)
        for vma in vmas:
            self._walk(vma.chain, "invalidate_range", vma.snapshot(), max(start, vma.start), min(end, vma.end))

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
        for vma in self.over(addr, end):
            if vma.start > reached:
                break
            if ops in vma.chain:
                fail(errno.EEXIST)
            reached = vma.end
        self.attached[ops] = since
        at = addr
        while at < end:
            vma = self.find(at) or fail(errno.ENOMEM)
            stop = min(vma.end, end)
            self._modify(vma, at, stop, chain=(ops, *vma.chain))
            at = stop

    def unregister_ops(self, ops, addr=None, length=None):
        if addr is None:
            if ops not in self.chain:
                fail(errno.EINVAL)
            self.chain.remove(ops)
            return
        end = self._hook_range(addr, length)
        if not any(ops in vma.chain for vma in self.over(addr, end)):
            fail(errno.EINVAL)
        at = addr
        while vma := self.first(at, end):
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
        first = addr // PAGE
        for page, pte in self._entries(addr // HUGE * HUGE, addr + length).items():
            n = 512 if isinstance(pte, Pte) and pte.frame.huge else 1
            at = max(page // PAGE, first)
            end = max(page // PAGE + n, first)
            where = rows[at - first:end - first]
            if isinstance(pte, SwapEntry):
                where["swapped"] = True
            else:
                where[:] = (True, False, pte.writable, pte.dirty, pte.young, pte.frame is self.mem.zero,
                            len(pte.frame.mappings) > 1, 0)
                where["pfn"] = pte.frame.pfn + at - page // PAGE + np.arange(len(where))
        return rows

    @property
    def stats(self):
        swapped = sum(isinstance(pte, SwapEntry) for pte in self.ptes.values())
        resident = sum(pte.frame.counted and not pte.frame.huge for pte in self._present(0, TASK_SIZE).values())
        return {"faults": self.faults.total(), **{f"faults_{k}": self.faults[k] for k in FAULT_KINDS},
                "map_count": len(self.list), "total_pages": self.total, "rss_pages": resident,
                "swap_pages": swapped, "locked_pages": self.locked,
                "hooks": {k: self.hooks[k] for k in CALLBACKS},
                "callbacks": {k: self.callbacks[k] for k in CALLBACKS}, "chain_nodes": self.chain_nodes}
    def _entries(self, start, end):
        """The entries of a range by address, in order."""
        return {page: self.ptes[page] for page in sorted(page for page in self.ptes if start <= page < end)}

    def _present(self, start, end):
        return {page: pte for page, pte in self._entries(start, end).items() if isinstance(pte, Pte)}
    # --- mapping and unmapping

    def mmap(self, length, prot=PROT_READ | PROT_WRITE, flags=MAP_PRIVATE | MAP_ANONYMOUS, *,
             addr=None, file=None, offset=0):
        if flags & MAP_FIXED_NOREPLACE:
            flags |= MAP_FIXED
        if offset % PAGE:
            fail(errno.EINVAL)
        if not file and not flags & MAP_ANONYMOUS:
            fail(errno.EBADF)
        huge = flags & MAP_HUGETLB or file and file.page_size == HUGE and not flags & MAP_ANONYMOUS
        if huge:
            length = align_huge(length)
            if flags & MAP_ANONYMOUS:
                file, flags = self._huge_file(length, flags), flags & ~MAP_ANONYMOUS
            elif file.page_size != HUGE:
                fail(errno.EINVAL)
        if not length:
            fail(errno.EINVAL)
        length = align(length)
        if not length or len(self.list) > self.max_map_count:
            fail(errno.ENOMEM)
        addr = self._unmapped_area(addr or 0, length, flags & MAP_FIXED, HUGE if huge else PAGE)
        end = addr + length
        if flags & MAP_FIXED_NOREPLACE and self.first(addr, end):
            fail(errno.EEXIST)
        if flags & MAP_LOCKED:
            self._check_mlock(length)
        kind = flags & MAP_TYPE
        if kind not in (MAP_SHARED, MAP_PRIVATE) and not (file and kind == MAP_SHARED_VALIDATE):
            fail(errno.EINVAL)
        if kind == MAP_SHARED_VALIDATE and flags & MAP_FIXED_NOREPLACE:
            fail(errno.EOPNOTSUPP)      # not one of the flags from before MAP_SHARED_VALIDATE
        if flags & MAP_GROWSDOWN and (kind != MAP_PRIVATE or not flags & MAP_ANONYMOUS):
            fail(errno.EINVAL)

        vm_flags = prot & ACCESS | Flag.MAYWRITE
        vm_flags |= Flag.NORESERVE if flags & MAP_NORESERVE else 0
        vm_flags |= Flag.HUGETLB if huge else Flag.LOCKED if flags & MAP_LOCKED else 0
        vm_flags |= Flag.NOHUGEPAGE if flags & MAP_STACK else 0
        vm_flags |= Flag.GROWSDOWN if flags & MAP_GROWSDOWN else 0
        if kind != MAP_PRIVATE:
            vm_flags |= Flag.SHARED | Flag.MAYSHARE
        elif vm_flags & Flag.WRITE and not vm_flags & Flag.NORESERVE and not huge:
            vm_flags |= Flag.ACCOUNT
        if flags & MAP_ANONYMOUS:
            file = None
        if file and offset > (1 << 63) - 1 - length:
            fail(errno.EOVERFLOW)
        pgoff = offset // PAGE if file else 0 if kind == MAP_SHARED else addr // PAGE
        if not file and kind == MAP_SHARED:
            file = File(self.mem, length, anonymous=True)
        self._map(Vma(self, addr, end, vm_flags, pgoff, file))
        if flags & MAP_LOCKED or flags & (MAP_POPULATE | MAP_NONBLOCK) == MAP_POPULATE:
            self._populate(addr, end)
        return addr

    def mmap_device(self, length, pfn, prot=PROT_READ | PROT_WRITE, *, addr=None):
        """Map memory that no frame of ours is, as a driver does: all entries at once, and never any other."""
        if not self.mem.frames + 512 * self.mem.huge_pages < pfn <= (1 << 36) - align(length) // PAGE:
            raise ValueError("pfn: not a device's")
        flags = ACCESS & prot | Flag.MAYWRITE | Flag.SHARED | Flag.MAYSHARE | Flag.PFNMAP | Flag.DONTDUMP
        return self._map_filled(length, flags, addr, pfn, lambda page: Pte(self.mem.device_page(pfn + page), bool(prot & 2)))

    def zeromap(self, length, prot=PROT_READ | PROT_WRITE, *, addr=None):
        """Private /dev/zero: the zero page everywhere, later writes copy."""
        flags = ACCESS & prot | Flag.MAYWRITE | (Flag.ACCOUNT if prot & PROT_WRITE else 0)
        return self._map_filled(length, flags, addr, None, lambda page: Pte(self.mem.zero, False))

    def _map_filled(self, length, flags, addr, pgoff, entry):
        if not length:
            fail(errno.EINVAL)
        length = align(length)
        if not length or len(self.list) > self.max_map_count:
            fail(errno.ENOMEM)
        addr = self._unmapped_area(addr or 0, length)
        self._map(Vma(self, addr, addr + length, flags, addr // PAGE if pgoff is None else pgoff))
        vma = self.find(addr)
        self.fire("invalidate_range", vma, addr, addr + length)
        for page in range(length // PAGE):
            self._set(addr + page * PAGE, entry(page))
        self.fire("update_range", vma, addr, addr + length)
        return addr

    def remap_file_pages(self, addr, length, page_offset):
        """Map other pages of the file in place: today a new mapping, populated."""
        start, length = addr // PAGE * PAGE, length // PAGE * PAGE
        end = start + length
        if not length or end >= WORD or page_offset + length // PAGE >= WORD:
            fail(errno.EINVAL)
        vma = self.find(start)
        if not vma or not vma.flags & Flag.SHARED or vma.device:
            fail(errno.EINVAL)
        if self.nonlinear:
            return self._remap_nonlinear(vma, start, end, page_offset)
        pieces = self.over(start, end)
        if pieces[-1].end < end or any(
                left.end != right.start or (right.file, right.attach, right.flags) != (vma.file, vma.attach, vma.flags)
                for left, right in zip(pieces, pieces[1:])):
            fail(errno.EINVAL)
        if len(self.list) > self.max_map_count:
            fail(errno.ENOMEM)
        if vma.locked:
            self._check_mlock(length)
        if page_offset * PAGE > (1 << 63) - 1 - length:
            fail(errno.EOVERFLOW)
        kept = ACCESS | Flag.SHARED | Flag.MAYSHARE | Flag.MAYWRITE | Flag.LOCKED
        self.mem.hold(vma.file)     # this may have been its last mapping
        self._map(Vma(self, start, end, vma.flags & kept, page_offset, vma.file, vma.attach))
        self._populate(start, end)

    def _remap_nonlinear(self, vma, start, end, number):
        """As in 2.6.12: the VMA stays whole, and entries say what they show."""
        if end > vma.end:
            fail(errno.EINVAL)
        if number != vma.pgoff_at(start):
            vma.flags |= Flag.NONLINEAR
        if number + (end - start) // PAGE > vma.file.end:
            fail(errno.EINVAL)
        for page in range(start, end, PAGE):
            try:
                frame = self.mem.with_room(vma.file.page, number)
            except MemoryError:
                fail(errno.ENOMEM)
            if page in self.ptes:
                self.fire("invalidate_page", vma, page)
            self._set(page, Pte(frame, bool(vma.flags & Flag.WRITE)))
            self.shows[page] = number
            self.fire("update_page", vma, page)
            number += 1

    def _map(self, new):
        """Put `new` where it belongs, over whatever is there."""
        doomed = self._isolate(new.start, new.end)
        if not self._may_expand(new.flags, new.pages - sum(vma.pages for vma in doomed)):
            fail(errno.ENOMEM)      # what was split stays split
        for vma in doomed:
            if vma.huge:
                self.mem.hold(vma.file)
        if doomed:
            self._unmap_isolated(doomed, new.start, new.end)
        if new.huge:
            self.reserve(new)       # too late for what was mapped here
        if not self._merge_new(new):
            self._insert(new)

    def _isolate(self, start, end):
        """Split VMAs at the edges of the range. The VMAs that then fill it."""
        first = self.first(start, end)
        if first and first.start < start and end < first.end and len(self.list) >= self.max_map_count:
            fail(errno.ENOMEM)      # a hole in one VMA adds a VMA for good; other splits are gone again soon
        for at in start, end:
            vma = self.find(at)
            if vma and vma.start < at:
                self._split(vma, at)
        return self.over(start, end)

    def _unmap_isolated(self, vmas, start, end):
        self._fire_unmap(vmas, start, end)
        self.zap(start, end)
        self.shows = {page: number for page, number in self.shows.items() if not start <= page < end}
        self.spent = {page for page in self.spent if not start <= page < end}
        for vma in vmas:
            self._remove(vma)

    def _unmap(self, start, end):
        vmas = self._isolate(start, end)
        if vmas:
            self._unmap_isolated(vmas, start, end)

    def munmap(self, addr, length):
        if addr % PAGE or addr > TASK_SIZE or length > TASK_SIZE - addr or not length:
            fail(errno.EINVAL)
        self._unmap(addr, addr + align(length))

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
                if not self.first(new, old):
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
        next = self._neighbours(old, old)[1]
        if (self.find(old) or next and new + PAGE > next.start_gap or not self._may_expand(flags, (new - old) // PAGE)
                or len(self.list) > self.max_map_count):
            fail(errno.ENOMEM)
        area = Vma(self, old, new, flags, old // PAGE)
        if not (old > self.start_brk and self._merge_new(area, only_left=True)):
            self._insert(area)

    # --- System V shared memory

    def shmat(self, file, addr=None, readonly=False):
        if addr:
            if addr % PAGE or self.first(addr, addr + file.size):
                fail(errno.EINVAL)
        length = align(file.size)
        if not length:
            fail(errno.EINVAL)
        if len(self.list) > self.max_map_count:
            fail(errno.ENOMEM)
        addr = self._unmapped_area(addr or 0, length, fixed=bool(addr))
        flags = Flag.READ | Flag.MAYSHARE
        if not readonly:
            flags |= Flag.WRITE | Flag.SHARED | Flag.MAYWRITE
        self._map(Vma(self, addr, addr + length, flags, 0, file, attach=object()))
        return addr

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
        if grows:
            first = self.first(addr, end)
            if not first or (grows == PROT_GROWSUP and first.start > addr):
                fail(errno.ENOMEM)
            if grows == PROT_GROWSUP or not first.flags & Flag.GROWSDOWN:
                fail(errno.EINVAL)
            addr = first.start      # from where the stack is now
        at = addr
        while at < end:
            vma = self.find(at) or fail(errno.ENOMEM)
            flags = vma.flags & ~ACCESS | prot & ACCESS
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
            if not old & (Flag.ACCOUNT | Flag.WRITE | Flag.SHARED | Flag.NORESERVE | Flag.HUGETLB):
                flags |= Flag.ACCOUNT
        elif vma.anonymous and not vma.anon_vma:
            flags &= ~Flag.ACCOUNT
        vma = self._modify(vma, start, end, flags)
        self.fire("change_protection", vma, start, end, prot)
        for pte in self._present(start, end).values():
            # Private pages stay read-only unless it is certain that nobody else has them.
            pte.writable = bool(flags & Flag.WRITE and (flags & Flag.SHARED or pte.exclusive and not vma.huge))
        if old & (Flag.WRITE | Flag.SHARED | Flag.LOCKED) == Flag.LOCKED and flags & Flag.WRITE:
            self._populate(start, end)
        return vma

    def madvise(self, addr, length, advice):
        visits = {MADV_WILLNEED: None, MADV_DONTNEED: self._dontneed, MADV_DONTNEED_LOCKED: self._dontneed_locked,
                  MADV_FREE: self._free, MADV_REMOVE: self._remove_pages, MADV_COLD: self._cold, MADV_PAGEOUT: self._pageout}
        populates = MADV_POPULATE_READ, MADV_POPULATE_WRITE
        if advice not in (*ADVICE, *visits, *populates) or addr % PAGE:
            fail(errno.EINVAL)
        end = addr + align(length)
        if end >= WORD or length and not align(length):
            fail(errno.EINVAL)
        if advice in populates:
            return self._populate_advised(addr, end, advice == MADV_POPULATE_WRITE)
        at, hole = addr, False
        while at < end:
            vma = self.first(at, end) or fail(errno.ENOMEM)
            hole = hole or vma.start > at
            start, stop = max(at, vma.start), min(end, vma.end)
            if advice in ADVICE:
                vma = self._advise(vma, start, stop, advice)
            elif visits[advice]:
                visits[advice](vma, start, stop)
            at = max(stop, min(vma.end, end))
        if hole:
            fail(errno.ENOMEM)

    def _advise(self, vma, start, end, advice):
        """Advice that marks VMAs. The VMA that now covers the range."""
        if (advice == MADV_WIPEONFORK and not vma.anonymous
                or advice in (MADV_DOFORK, MADV_DODUMP) and vma.device):
            fail(errno.EINVAL)
        clear, add = ADVICE[advice]
        flags = vma.flags & ~clear | add
        if flags == vma.flags:
            return vma
        try:
            return self._modify(vma, start, end, flags)
        except OSError as error:
            fail(errno.EAGAIN if error.errno == errno.ENOMEM else error.errno)

    def _dontneed(self, vma, start, end):
        if vma.locked:
            fail(errno.EINVAL)
        self._dontneed_locked(vma, start, end)

    def _dontneed_locked(self, vma, start, end):
        if vma.device or start % vma.page_size:
            fail(errno.EINVAL)
        end = end // vma.page_size * vma.page_size      # part of a huge page is not forgotten
        if start < end:
            self.fire("invalidate_range", vma, start, end)
            self.zap(start, end)

    def _free(self, vma, start, end):
        if vma.locked or not vma.anonymous:
            fail(errno.EINVAL)
        self.fire("invalidate_range", vma, start, end)
        for page, pte in self._entries(start, end).items():
            if isinstance(pte, SwapEntry):
                self.unset(page)
            elif pte.frame.counted:
                frame = pte.frame
                if frame.slot or frame.dirty and len(frame.mappings) > 1:
                    continue            # others may need what only this frame says
                frame.dirty = pte.young = pte.dirty = False

    def _remove_pages(self, vma, start, end):
        if vma.device:
            fail(errno.ENODEV)
        if vma.locked or vma.anonymous:
            fail(errno.EINVAL)
        if not vma.flags & Flag.SHARED or not vma.flags & Flag.MAYWRITE:
            fail(errno.EACCES)
        vma.file.punch(vma.pgoff_at(start) * PAGE, end - start)

    def _mine(self, start, end):
        """The pages of the range that nobody else maps."""
        return {page: pte for page, pte in self._present(start, end).items()
                if len(pte.frame.mappings) == 1}

    def _cold(self, vma, start, end):
        if vma.locked or vma.special:
            fail(errno.EINVAL)
        for pte in self._mine(start, end).values():
            pte.young = False

    def _pageout(self, vma, start, end):
        if vma.locked or vma.special:
            fail(errno.EINVAL)
        for pte in self._mine(start, end).values():
            if self.mem.evictable(pte.frame):
                self.mem.evict(pte.frame)

    def shows_another(self, addr):
        """Does `addr` show a page that the reverse map does not look for there?"""
        return addr in self.shows and self.shows[addr] != self.find(addr).pgoff_at(addr)

    def _populate_advised(self, addr, end, write):
        for page in range(addr, end, PAGE):
            vma = self.find(page) or fail(errno.ENOMEM)
            if vma.device or not vma.flags & (Flag.WRITE if write else Flag.READ):
                fail(errno.EINVAL)
            try:
                self._fault(page, write)
            except AccessError:
                fail(errno.EFAULT)
            except MemoryError:
                fail(errno.ENOMEM)

    # --- locked memory

    def _check_mlock(self, length):
        """May `length` more bytes be locked by a mapping call?"""
        if not self.rlimits.get("MEMLOCK", WORD):
            fail(errno.EPERM)
        if not self._may_lock(length // PAGE):
            fail(errno.EAGAIN)

    def mlock(self, addr, length):
        if not self.rlimits.get("MEMLOCK", WORD):
            fail(errno.EPERM)
        start, length = addr // PAGE * PAGE, align(length + addr % PAGE)
        already = sum((min(vma.end, start + length) - max(vma.start, start)) // PAGE
                      for vma in self.over(start, start + length) if vma.locked)
        if not self._may_lock(length // PAGE) and not self._may_lock(length // PAGE - already):
            fail(errno.ENOMEM)
        self._mark_locked(start, length, Flag.LOCKED)
        try:
            self._populate(start, start + length, strict=True)
        except AccessError:
            fail(errno.ENOMEM)
        except MemoryError:
            fail(errno.EAGAIN)

    def munlock(self, addr, length):
        self._mark_locked(addr // PAGE * PAGE, align(length + addr % PAGE), 0)

    def _mark_locked(self, start, length, locked):
        end = (start + length) % WORD
        if end < start:
            fail(errno.EINVAL)
        at = start
        while at < end:
            vma = self.find(at) or fail(errno.ENOMEM)
            stop = min(vma.end, end)
            flags = vma.flags & ~Flag.LOCKED | locked
            if flags != vma.flags and not vma.special:
                vma = self._modify(vma, at, stop, flags)
            at = max(stop, min(vma.end, end))

    def msync(self, addr, length, flags=MS_SYNC):
        if (flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC) or addr % PAGE
                or flags & (MS_ASYNC | MS_SYNC) == MS_ASYNC | MS_SYNC):
            fail(errno.EINVAL)
        end = addr + align(length)
        if end >= WORD:
            fail(errno.ENOMEM)
        at, hole = addr, False
        while at < end:
            vma = self.first(at, end) or fail(errno.ENOMEM)
            if vma.start > at:
                if flags == MS_ASYNC:
                    fail(errno.ENOMEM)
                hole = True
            if flags & MS_INVALIDATE and vma.locked:
                fail(errno.EBUSY)
            if vma.flags & Flag.MAYSHARE:       # even attached for reading only
                self.fire("sync_range", vma, max(at, vma.start), min(end, vma.end))
            at = vma.end
        if hole:
            fail(errno.ENOMEM)

    # --- mremap

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
        if flags & MREMAP_FIXED and old == new:
            return self._move_all(old_addr, old, target, flags)

        vma = self.find(old_addr) or fail(errno.EFAULT)
        if vma.huge:
            old, new = self._check_huge_remap(old_addr, old, new, target if placed else 0)
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
            if vma.locked:
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
        if flags & MREMAP_DONTUNMAP and vma.special:
            fail(errno.EINVAL)
        if min(old, new) > vma.end - addr or new > old and vma.special:
            fail(errno.EFAULT)      # a tail to be unmapped may lie in other VMAs
        if new > old and vma.locked and not self._may_lock((new - old) // PAGE):
            fail(errno.EAGAIN)
        if new > old and not self._may_expand(vma.flags, (new - old) // PAGE):
            fail(errno.ENOMEM)

    @staticmethod
    def _check_huge_remap(addr, old, new, target):
        old, new = align_huge(old), align_huge(new)
        if addr % HUGE or target % HUGE or new > old:
            fail(errno.EINVAL)
        return old, new

    def _can_extend(self, vma, addr, old, new):
        end = addr + new
        return addr + old == vma.end and end <= TASK_SIZE and not self.first(vma.end, end)

    def _shrink(self, addr, old, new):
        if addr + new > TASK_SIZE or old - new > TASK_SIZE - (addr + new):
            fail(errno.EINVAL)
        self._unmap(addr + new, addr + old)

    def _move_all(self, addr, length, target, flags):
        """Move every VMA of the range, with the holes between them."""
        at, end, result = addr, addr + length, None
        while vma := self.first(at, end):
            if result is None and vma.start > addr:
                fail(errno.EFAULT)
            if vma.attach and (result is not None or vma.end < end):
                fail(errno.EFAULT)      # attached segments move alone
            start = max(vma.start, addr)
            if result is not None:
                target += vma.start - at
            at, size = vma.end, min(end, vma.end) - start
            if vma.huge:
                size, _ = self._check_huge_remap(start, size, size, target)
            self._check_remap(vma, start, size, size, flags)
            target = self._move_to(start, size, size, target, flags)
            result = target if result is None else result
            target += size
        return fail(errno.EFAULT) if result is None else result

    def _move_to(self, addr, old, new, target, flags):
        if flags & MREMAP_FIXED:
            self._unmap(target, target + new)
            if not self.find(addr):
                fail(errno.EFAULT)      # old was 0, and the target where the VMA was
        if new < old:
            self._shrink(addr, old, new)
            old = new
        vma = self.find(addr)
        if flags & MREMAP_DONTUNMAP and not self._may_expand(vma.flags, old // PAGE):
            fail(errno.ENOMEM)
        target = self._unmapped_area(target, new, flags & MREMAP_FIXED, vma.page_size)
        return self._move(vma, addr, old, new, target, flags)

    def _move(self, vma, addr, old, new, target, flags):
        if len(self.list) >= self.max_map_count - 3:
            fail(errno.ENOMEM)
        copy = replace(vma, start=target, end=target + new, pgoff=vma.pgoff_at(addr), links=[])
        if vma.anonymous and not vma.anon_vma:
            copy.pgoff = target // PAGE         # nothing points at the old numbers yet
        merged = self._merge_new(copy, copied_from=vma)
        if merged:
            vma = self.find(addr) if old else vma     # it may have grown into itself
        else:
            copy.clone_links(vma)
            self._insert(copy)
        moved = merged or copy
        if old:
            self.fire("invalidate_range", vma, addr, addr + old)
            self.fire("invalidate_range", moved, target, target + old)
        for page, pte in self._entries(addr, addr + old).items():
            del self.ptes[page]
            self.ptes[page - addr + target] = pte
            if isinstance(pte, Pte) and pte.frame.counted:
                pte.frame.mappings.remove((self, page))
                pte.frame.mappings.add((self, page - addr + target))
        self.spent |= {page - addr + target for page in self.spent if addr <= page < addr + old}
        for page in [page for page in self.shows if addr <= page < addr + old]:
            self.shows[page - addr + target] = self.shows[page]
        if flags & MREMAP_DONTUNMAP:
            vma.flags &= ~Flag.LOCKED
            if moved is not vma and (addr, addr + old) == (vma.start, vma.end):
                vma.unlink()
        elif old:
            self._unmap(addr, addr + old)
        if new > old and moved.locked:
            self._populate(target + old, target + new)
        return target

    # --- pages

    def zap(self, start, end, copies=True):
        """Empty the entries of a range; without `copies`, only those of page-cache pages."""
        for page, pte in self._entries(start, end).items():
            if copies or (isinstance(pte, Pte) and pte.frame.file):
                self.unset(page)

    def zap_shown(self, vma, first, end):
        """Empty the entries of a non-linear mapping that show pages [first, end) of its file."""
        for page in self._present(vma.start, vma.end):
            if first <= self.shows.get(page, vma.pgoff_at(page)) < end:
                self.unset(page)

    def unset(self, page):
        pte = self.ptes.pop(page)
        if isinstance(pte, SwapEntry):
            self.mem.swap_free(pte.slot)
        else:
            pte.frame.dirty |= pte.dirty and pte.frame.file is not None
            pte.frame.mappings.discard((self, page))
            if pte.frame.huge and (pte.frame.mappings or pte.frame.pins) and not pte.frame.file and self.find(page).owner:
                self.spent.add(page)        # it was reserved for the owner, but others have it now
            self.mem.release(pte.frame)

    def _set(self, page, pte):
        if page in self.ptes:
            self.unset(page)
        self.ptes[page] = pte
        self.spent.discard(page)
        if pte.frame.counted:
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
        return self.mem.with_room(self._try_fault, addr, write)

    def _try_fault(self, addr, write):
        page = addr // PAGE * PAGE
        vma = self.find(addr) or self._grow_stack(page)
        if vma is None or not vma.flags & (Flag.WRITE if write else ACCESS):
            raise SegmentationFault(addr)
        if vma.huge:
            page = page // HUGE * HUGE
        pte = self.ptes.get(page)
        faulted = not isinstance(pte, Pte) or (write and not pte.writable)
        if vma.huge:
            pte = self.fault_huge(vma, addr, page, write)
        elif pte is None:
            pte = self._fault_absent(vma, addr, page, write)
        elif isinstance(pte, SwapEntry):
            pte = self._fault_swapped(vma, page, pte, write)
        elif faulted:
            pte = self._fault_protected(vma, page, pte)
        pte.young = True
        pte.dirty = pte.dirty or write
        return pte, faulted

    def _grow_stack(self, page):
        """An access below a stack extends it, but not into the guard gap above what is mapped below."""
        prev, vma = self._neighbours(page, page)
        if not vma or not vma.flags & Flag.GROWSDOWN or page < MMAP_MIN_ADDR:
            return None
        if prev and not prev.flags & Flag.GROWSDOWN and prev.flags & ACCESS and page - prev.end < GUARD_GAP:
            return None
        self._prepare_anon(vma)
        grow = (vma.start - page) // PAGE
        if (grow > vma.pgoff or not self._may_expand(vma.flags, grow)
                or vma.end - page > self.rlimits.get("STACK", WORD)
                or vma.locked and not self._may_lock(grow)):
            return None
        vma.start, vma.pgoff = page, vma.pgoff - grow
        return vma

    def _fault_absent(self, vma, addr, page, write):
        writable = bool(vma.flags & Flag.WRITE)
        if write and not vma.flags & Flag.SHARED:
            self._prepare_anon(vma)
        if vma.anonymous:
            kind = "anon" if write else "zero"
            pte = Pte(self.mem.allocate(), writable, exclusive=True) if write else Pte(self.mem.zero, False)
        else:
            kind, file, number = "file", vma.file, self.shows.get(page, vma.pgoff_at(page))
            if number >= file.end:
                raise BusError(addr)
            if write and not vma.flags & Flag.SHARED:
                pte = Pte(self._early_copy(file, number), writable, exclusive=True)
            else:
                pte = Pte(file.page(number), writable and bool(vma.flags & Flag.SHARED))
        self.faults[kind] += 1
        pte.dirty = write       # before the hook, which may look
        self._set(page, pte)
        self.fire("update_page", vma, page)
        return pte

    def _early_copy(self, file, number):
        """A private copy of a page that is not mapped yet. Both frames, or none."""
        copy = self.mem.allocate()
        try:
            copy.data[:] = file.page(number).data
        except OutOfFrames:
            self.mem.release(copy)
            raise
        return copy

    def _fault_swapped(self, vma, page, entry, write):
        slot, frame = entry.slot, entry.slot.frame
        alone = entry.exclusive or (
            (write or vma.locked) and slot.users == 1 and frame is None)
        if write and not alone:
            return self._copy_swapped(vma, page, slot)
        if frame is None:
            frame = self.mem.allocate(slot.data)
            frame.dirty = True                  # its contents are nowhere else, once the slot is free
            self.mem.counts["swapped_in"] += 1
        if slot.users > 1:
            slot.frame, frame.slot = frame, slot
        pte = self._set(page, Pte(frame, alone and bool(vma.flags & Flag.WRITE), write, exclusive=alone))
        self.faults["swap"] += 1
        self.fire("update_page", vma, page)
        return pte

    def _copy_swapped(self, vma, page, slot):
        self._prepare_anon(vma)
        copy = self.mem.allocate(slot.data)
        self.mem.counts["swapped_in"] += 1
        self.faults["swap"] += 1
        self.fire("invalidate_page", vma, page)
        pte = self._set(page, Pte(copy, writable=True, dirty=True, exclusive=True))
        self.fire("update_page", vma, page)
        return pte

    def _fault_protected(self, vma, page, pte):
        frame = pte.frame
        if pte.exclusive or frame.alone:
            self.faults["reuse"] += 1
            pte.exclusive = pte.writable = pte.dirty = pte.young = True
        else:
            self._prepare_anon(vma)
            copy = self.mem.allocate(frame.data)
            self.faults["cow"] += 1
            self.fire("invalidate_page", vma, page)
            pte = self._set(page, Pte(copy, writable=True, dirty=True, exclusive=True))
        self.fire("update_page", vma, page)
        return pte

    def _populate(self, start, end, strict=False):
        """Fault in a range as far as it goes: what fails ends its VMA's part and is not reported, or (strict) all."""
        for vma in self.over(start, end):
            write = vma.flags & (Flag.WRITE | Flag.SHARED) == Flag.WRITE
            if vma.device:
                continue
            try:
                size = vma.page_size
                for page in range(max(start, vma.start) // size * size, min(end, vma.end), size):
                    self._fault(page, write)
            except (AccessError, MemoryError):
                if strict:
                    raise

    def get_page(self, addr, write):
        """A device asks for the frame of a page."""
        vma = self.find(addr)
        if not vma or vma.device or not vma.flags & (Flag.WRITE if write else Flag.READ):
            raise SegmentationFault(addr)
        return self._fault(addr, write)[0].frame

    # --- access

    def _access(self, addr, length, write):
        """The pieces of [addr, addr + length), page by page, each faulted in as it is reached."""
        if addr + length > TASK_SIZE:
            raise ValueError("beyond the address space")
        for at, n in chunks(addr, length):
            try:
                pte, faulted = self._fault(at, write)
            except AccessError as error:
                error.completed = at - addr
                raise
            yield memoryview(pte.frame.data)[at % len(pte.frame.data):][:n], at, faulted

    def read(self, addr, n):
        return b"".join(bytes(piece) for piece, *_ in self._access(addr, n, False))

    def write(self, addr, data):
        for piece, at, _ in self._access(addr, len(data), True):
            piece[:] = data[at - addr:at - addr + len(piece)]

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

    # --- beginnings and ends

    def fork(self):
        child = MM(self.mem, self.max_map_count, self.start_brk, self.rlimits, self.nonlinear)
        child.shows = dict(self.shows)
        child.end_brk = self.end_brk
        self.mem.child = child
        try:
            self._copy_vmas(child)
        except MemoryError:
            child.tear_down()
            raise
        return child

    def _copy_vmas(self, child):
        for vma in self.list:
            if vma.flags & Flag.DONTCOPY:
                continue
            copy = replace(vma, mm=child, chain=(), anon_vma=None, links=[], owner=False, robbed=False,
                           flags=vma.flags & ~Flag.LOCKED)
            child._insert(copy)
            if vma.flags & Flag.WIPEONFORK:
                continue
            copy.inherit_links(vma)
            if vma.anon_vma or vma.flags & (Flag.PFNMAP | Flag.NONLINEAR):      # of others the child faults in what it needs
                self._copy_pages(vma, child)

    def _copy_pages(self, vma, child):
        for page in [] if vma.flags & Flag.SHARED else list(self._present(vma.start, vma.end)):
            # one that is copied may take the room of those that come after it
            if page in self._present(page, page + PAGE) and self.ptes[page].writable and not self._precopy(vma, page, child):
                self.fire("wrprotect_page", vma, page)
        for page, pte in self._entries(vma.start, vma.end).items():
            if page in child.ptes:
                continue
            if isinstance(pte, SwapEntry):
                pte.exclusive = False
                pte.slot.users += 1
                child.ptes[page] = replace(pte)
                continue
            if vma.flags & Flag.SHARED:
                child._set(page, replace(pte, young=False, dirty=False))
                continue
            pte.writable = pte.exclusive = False
            child._set(page, replace(pte, young=pte.young and vma.huge))

    def _precopy(self, vma, page, child):
        """Give the child a copy of a writable page at once?"""
        return False

    def tear_down(self):
        """The last user is gone."""
        only_on_vmas = {ops for vma in self.list for ops in vma.chain} - set(self.chain)
        while self.chain:
            self._walk([self.chain.pop(0)], "release", self.face)
        for ops in sorted(only_on_vmas, key=self.attached.get, reverse=True):
            self._walk([ops], "release", self.face)
        for page in list(self.ptes):
            self.unset(page)
        for vma in list(self.list):
            self._remove(vma)


class AddressSpace:
    """A process as its calls see it: an MM, which the child of a vfork has together with its parent."""

    def __init__(self, mem, max_map_count=65530, start_brk=START_BRK, rlimits=None, nonlinear=False):
        self.mem = mem
        self._enter(MM(mem, max_map_count, start_brk, rlimits, nonlinear))

    def _enter(self, mm):
        self.mm = mm
        mm.faces.append(self)

    def _leave(self):
        if len(self.mm.faces) == 1:
            self.mm.tear_down()
        self.mm.faces.remove(self)

    def __getattr__(self, name):        # looking
        return getattr(self.__dict__["mm"], name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.exit()

    @operation
    def fork(self):
        child = object.__new__(AddressSpace)
        child.mem = self.mem
        child._enter(self.mm.fork())
        return child

    @operation
    def vfork(self):
        """A child that is in this address space until it calls exec or exit."""
        child = object.__new__(AddressSpace)
        child.mem = self.mem
        child._enter(self.mm)
        return child

    @operation
    def exec(self):
        """Leave the address space for a new one, empty, with the same limits."""
        self._leave()
        mm = self.mm
        self._enter(MM(self.mem, mm.max_map_count, mm.start_brk, mm.rlimits, mm.nonlinear))

    @operation
    def exit(self):
        if self in self.mm.faces:
            self._leave()


def _call(name):
    method = getattr(MM, name)

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        return method(self.mm, *args, **kwargs)
    return operation(call)


for name in ("mmap", "munmap", "mprotect", "madvise", "msync", "mremap", "brk", "mlock", "munlock", "shmat", "shmdt",
             "mmap_device", "zeromap", "remap_file_pages",
             "read", "write", "touch", "register_ops", "unregister_ops"):
    setattr(AddressSpace, name, _call(name))


# --- what must always hold ---------------------------------------------------------------------------


def check(mem, *spaces, files=()):
    """Assert the invariants; `spaces` and `files` are all that are alive on `mem`."""
    mapped, swapped = {}, Counter()
    mms = {space.mm for space in spaces}
    for mm in mms:
        for left, right in zip(mm.list, mm.list[1:]):
            assert left.end <= right.start, "VMAs overlap or are out of order"
        for vma in mm.list:
            assert vma.mm is mm and vma.start < vma.end and not vma.start % PAGE and not vma.end % PAGE
            assert (vma.anon_vma is None) == (not vma.links)
            assert all(vma in anon_vma.linked for anon_vma in vma.links)
            assert len(set(vma.chain)) == len(vma.chain)
            assert not vma.file or vma in vma.file.vmas
        for page, pte in mm.ptes.items():
            vma = mm.find(page)
            assert vma, "a page outside every VMA"
            if isinstance(pte, SwapEntry):
                swapped[pte.slot] += 1
                assert vma.anon_vma and not (pte.exclusive and pte.slot.users > 1)
                continue
            assert not pte.writable or vma.flags & Flag.WRITE
            assert not pte.exclusive or (len(pte.frame.mappings) == 1 and not pte.frame.slot)
            assert pte.frame.huge == vma.huge
            if vma.device:
                assert not pte.frame.counted
            elif pte.frame is mem.zero:
                assert not pte.writable and not pte.dirty
            else:
                mapped.setdefault(pte.frame.pfn, set()).add((mm, page))
                assert pte.frame.file or vma.anon_vma, "a private page without an anon_vma"
                assert not pte.frame.slot or not pte.writable
    for pfn, frame in [*mem.used.items(), *mem.huge_used.items()]:
        assert frame.mappings == mapped.pop(pfn, set()), "the reverse map lies"
        assert frame.mappings or frame.file or frame.pins, "a frame leaked"
        assert not frame.slot or (frame.slot.frame is frame and frame.slot in mem.slots)
    assert not mapped and not any(mem.zero.data)
    files = {*files, *(vma.file for mm in mms for vma in mm.list if vma.file)}
    cached = {frame.pfn: file for file in files for frame in file.pages.values()}
    assert cached == {pfn: frame.file for pfn, frame in (mem.used | mem.huge_used).items() if frame.file}, \
        "the page cache leaked"
    assert len(mem.huge_used) + len(mem.huge_free) == mem.huge_pages and 0 <= mem.huge_reserved <= len(mem.huge_free)
    swapped.update(slot for file in files for slot in file.slots.values())
    assert swapped == Counter({slot: slot.users for slot in mem.slots}), "a swap slot leaked"
    assert all(frame.number < file.end for file in files for frame in file.pages.values())
    assert len(mem.used) <= mem.frames and len(mem.slots) <= mem.swap_slots
