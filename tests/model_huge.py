"""The model's huge pages: 2 MiB each, from a pool of their own, reserved when they are mapped. See model.py.

A huge page has one entry, at its first address. What a mapping reserves is its own until it is used: in the file, if
shared; of a private mapping it is the owner's, who mapped it, and not a child's.
"""
import errno

from model_memory import HUGE, BusError, File, Pte, fail
from model_vma import Flag

MAP_HUGE_SHIFT = 26


def align_huge(n):
    return (n + HUGE - 1) // HUGE * HUGE % (1 << 64)


class HugePool:
    """The part of physical memory that is huge pages."""

    def __init__(self, pages):
        self.huge_pages = pages
        self.huge_base = (self.frames + 512) // 512 * 512       # page frame numbers go on above the ordinary ones
        self.huge_free = [self.huge_base + 512 * i for i in reversed(range(pages))]
        self.huge_used = {}         # pfn -> Frame
        self.huge_files, self.held = [], []

    def hold(self, file):
        """Until the operation ends: the pages it has, and has reserved, cannot be had before."""
        file.holds += 1
        self.held.append(file)

    def let_go(self):
        while self.held:
            self.held.pop().let_go()

    @property
    def huge_reserved(self):
        """Free pages that belong to somebody already."""
        owners = [vma for file in self.huge_files for vma in file.vmas if vma.owner]
        return sum(len(file.reserved) for file in self.huge_files) + sum(
            vma.mm.has_reserved(vma, at) for vma in owners for at in range(vma.start, vma.end, HUGE))

    @property
    def huge_available(self):
        return len(self.huge_free) - self.huge_reserved

    def allocate_huge(self, reserved, data=None):
        """A page; None if all that are free are reserved by others."""
        if not reserved and self.huge_available <= 0:
            return None
        pfn = self.huge_free.pop()
        frame = self.huge_used[pfn] = self.new_frame(pfn, bytearray(data or HUGE))
        return frame


class HugeMappings:
    """The part of an address space that maps huge pages."""

    def _huge_file(self, length, flags):
        """MAP_ANONYMOUS | MAP_HUGETLB: a file that nobody else has."""
        if flags >> MAP_HUGE_SHIFT & 0x3F not in (0, 21):
            fail(errno.EINVAL)
        return File(self.mem, length, huge=True, anonymous=True)

    def reserve(self, vma):
        """What a new mapping needs of the pool; a writable one makes its file long enough."""
        file, pages = vma.file, range(vma.pgoff // 512, vma.pgoff // 512 + vma.pages // 512)
        if vma.pgoff % 512:
            fail(errno.EINVAL)
        shared = vma.flags & Flag.SHARED
        needed = [page for page in pages if not shared or page not in file.reserved and page not in file.pages]
        if not vma.flags & Flag.NORESERVE:
            if len(needed) > self.mem.huge_available:
                fail(errno.ENOMEM)
            if shared:
                file.reserved.update(needed)
            else:
                vma.owner = True
        if vma.flags & Flag.WRITE:
            file.size = max(file.size, pages.stop * HUGE)

    def has_reserved(self, vma, at):
        """The owner has not used the page it reserved for this place."""
        pte = self.ptes.get(at)
        return vma.owner and at not in self.spent and (pte is None or pte.frame.file is not None)

    def fault_huge(self, vma, addr, at, write):
        """No hooks where nothing was mapped: a device asks for what it needs."""
        pte = self.ptes.get(at)
        if pte is None:
            pte = self._fault_huge_absent(vma, addr, at, write)
        elif write and not pte.writable:
            frame = pte.frame
            pte = self._write_huge(vma, addr, at, pte, told=True)
            self.faults["reuse" if pte.frame is frame else "cow"] += 1
        return pte

    def _fault_huge_absent(self, vma, addr, at, write):
        file, number, shared = vma.file, vma.pgoff_at(at) // 512, bool(vma.flags & Flag.SHARED)
        if vma.robbed or number >= file.end:
            raise BusError(addr)
        frame = file.pages.get(number)
        if write and not shared or not frame and not shared:
            self._prepare_anon(vma)
        cached = frame or shared
        if not frame:
            reserved = number in file.reserved if shared else self.has_reserved(vma, at)
            frame = self.mem.allocate_huge(reserved)
            if not frame:
                raise BusError(addr)
            if shared:
                file.reserved.discard(number)
                file.add(number, frame)
        writable = bool(vma.flags & Flag.WRITE) if shared else write and not cached
        pte = Pte(frame, writable, write, exclusive=not cached)
        if cached and write and not shared:
            pte = self._write_huge(vma, addr, at, pte, told=False)
        else:
            self._set(at, pte)
        self.faults["file" if cached else "anon"] += 1
        return pte

    @staticmethod
    def _huge_alone(frame):
        """References do not matter here."""
        return not frame.file and len(frame.mappings) == 1

    def _write_huge(self, vma, addr, at, pte, told):
        """A write to a private page that is mapped read-only; if it was before this fault, devices are told."""
        frame = pte.frame
        if not self._huge_alone(frame):
            copy = self.mem.allocate_huge(frame.file and self.has_reserved(vma, at), frame.data)
            if copy:
                self._prepare_anon(vma)
                if told:
                    self.fire("invalidate_page", vma, at)
                pte = self._set(at, Pte(copy, False))
            elif frame.file or not vma.owner:
                raise BusError(addr)
            else:
                self._take_back(frame)
        pte.exclusive = pte.writable = pte.dirty = pte.young = True
        if told:
            self.fire("update_page", vma, at)
        return pte

    def _take_back(self, frame):
        """Who has the page from a fork loses it for good, because its owner writes and there is no other."""
        for mm, at in sorted(frame.mappings, key=lambda m: m[0].number):
            if mm is not self:
                vma = mm.find(at)
                mm.fire("invalidate_page", vma, at)
                mm.unset(at)
                vma.robbed = True
