"""The model's physical memory: frames, swap slots, files and their page caches. See model.py.

Reclaim has no policy here: which frames go is an input (`PhysicalMemory.victims`), or simply the oldest. What follows
from it is all here, in `PhysicalMemory.evict`.
"""
import errno
import functools
import itertools
import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

PAGE, HUGE = 4096, 512 * 4096
WORD = 1 << 64
BATCH = 32          # a fault that finds no frame reclaims this many, if it can and the memory is not small


class AccessError(Exception):
    """A memory access stopped at `address`, after `completed` bytes."""

    def __init__(self, address):
        super().__init__(f"at {address:#x}")
        self.address = address
        self.completed = 0


class SegmentationFault(AccessError):
    """No VMA allows the access."""


class BusError(AccessError):
    """The access is beyond the last page of the mapped file, or there is no huge page."""


class OutOfFrames(MemoryError):
    """No frame is free: perhaps one can be reclaimed."""


def fail(code):
    raise OSError(code, os.strerror(code))


def align(n):
    """Round up to whole pages, in 64 bits: the largest numbers become 0."""
    return (n + PAGE - 1) // PAGE * PAGE % WORD


def chunks(addr, length, size=PAGE):
    """Cut [addr, addr + length) at page borders: (address, bytes) of each piece."""
    end = addr + length
    while addr < end:
        n = min(end, addr // size * size + size) - addr
        yield addr, n
        addr += n


def operation(method):
    """A call that may change something: not from a callback; what callbacks raise goes to its caller."""
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        mem = self.mem
        if mem.in_callback:
            raise RuntimeError("a callback may look, not touch")
        mem.raised, mem.caller = [], getattr(self, "mm", None)
        try:
            result = method(self, *args, **kwargs)
        except Exception:
            if not mem.raised:
                raise
        finally:
            mem.let_go()
        if mem.raised:
            first, *others = mem.raised
            for other in others:
                first.add_note(f"another callback raised {other!r}")
            raise first
        return result
    return call


@dataclass(eq=False)
class Frame:
    pfn: int
    mappings: set = field(default_factory=set)      # (MM, address): the reverse map
    file: object = None                             # whose page cache it is in, which keeps it alive
    number: int = 0                                 # which page of the file
    pins: int = 0                                   # references of devices, which keep it alive too
    slot: object = None                             # anonymous: swapped in, and others still have it swapped
    dirty: bool = False                             # beside what page-table entries say
    counted: bool = True                            # neither the zero page nor a device's
    data: bytearray = field(default_factory=lambda: bytearray(PAGE))

    @property
    def huge(self):
        return len(self.data) > PAGE

    @property
    def alone(self):
        """An anonymous page that one page-table entry maps, and nobody else has."""
        return len(self.mappings) == 1 and not (self.file or self.pins or self.slot)


@dataclass(eq=False)
class Slot:
    """A page in swap."""

    data: bytes
    users: int = 0          # swap entries in page tables; 1 for a page of shared memory
    frame: Frame = None     # one user swapped it in, and others may map the same frame: the swap cache


class PhysicalMemory:
    def __init__(self, frames=65536, swap_slots=0):
        self.mem = self
        self.frames, self.swap_slots = frames, swap_slots
        self.used = {}                      # pfn -> Frame, oldest first
        self.slots = set()
        self.zero = Frame(0, counted=False)     # the zero page, never written
        self.device = {}                    # pfn -> Frame of device memory
        self.free_pfns = []
        self.counts = Counter()
        self.numbers = itertools.count()    # of address spaces
        self.in_callback, self.raised = False, []
        self.caller = None                  # whose operation it is
        self.victims = None                 # if set: per run of reclaim, what goes: (file or None, number, mappings)
        self.child = None                   # what the last fork made
        self.log = []                       # what went

    # --- frames

    def allocate(self, data=None):
        if len(self.used) == self.frames:
            raise OutOfFrames("out of frames")
        pfn = self.free_pfns.pop() if self.free_pfns else len(self.used) + 1
        frame = self.used[pfn] = Frame(pfn)
        if data:
            frame.data[:] = data
        return frame

    def release(self, frame):
        """Free the frame if nothing uses it any more."""
        if frame.slot and not frame.mappings:       # what is in swap as well needs no frame
            frame.slot.frame = frame.slot = None
        if frame.mappings or frame.file or frame.pins or not frame.counted:
            return
        if frame.huge:
            del self.huge_used[frame.pfn]
            self.huge_free.append(frame.pfn)
            return
        del self.used[frame.pfn]
        self.free_pfns.append(frame.pfn)

    @staticmethod
    def new_frame(pfn, data):
        return Frame(pfn, data=data)

    def device_page(self, pfn):
        return self.device.setdefault(pfn, Frame(pfn, counted=False))

    def with_room(self, call, *args):
        """Make a call; while it finds no frame, reclaim some and make it again from the start."""
        while True:
            try:
                return call(*args)
            except OutOfFrames:
                if not self._reclaim(min(max(1, self.frames // 16), BATCH)):
                    raise

    # --- swap

    def swap_slot(self, data):
        slot = Slot(bytes(data))
        self.slots.add(slot)
        return slot

    def swap_free(self, slot):
        """One user less."""
        slot.users -= 1
        if not slot.users:
            self.slots.remove(slot)
            if slot.frame:
                slot.frame.slot = None

    # --- reclaim

    def evictable(self, frame):
        if frame.pins or any(mm.find(addr).locked or mm.shows_another(addr) for mm, addr in frame.mappings):
            return False
        return bool(len(self.slots) < self.swap_slots or frame.slot or not self._wanted(frame)
                    or (frame.file and not frame.file.shmem))

    @staticmethod
    def _wanted(frame):
        """Its contents are nowhere else. (An anonymous page is dirty but for MADV_FREE.)"""
        return frame.dirty or any(mm.ptes[addr].dirty for mm, addr in frame.mappings)

    def evict(self, frame, mappings=None):
        """Take a frame from all who have it: hook by hook, then its contents go where they can be found again."""
        assert self.evictable(frame), "this frame must stay"
        mappings = sorted(frame.mappings, key=lambda m: (m[0].number, m[1])) if mappings is None else mappings
        file, slot, wanted = frame.file, frame.slot, self._wanted(frame)
        self.log.append((file, frame.number, mappings))
        self.counts["reclaimed"] += 1
        if wanted and not slot and (not file or file.shmem):
            slot = self.swap_slot(frame.data)
        self.counts["swapped_out"] += slot is not None
        for mm, addr in mappings:
            mm.fire("invalidate_page", mm.find(addr), addr)
            exclusive = mm.ptes[addr].exclusive
            mm.unset(addr)
            if slot and not file:
                mm.ptes[addr] = SwapEntry(slot, exclusive)
                slot.users += 1
        if file:
            file.evict(frame, slot)
        else:
            self.counts["discarded"] += not slot

    def _reclaim(self, n):
        """One run of reclaim: how many frames became free."""
        if self.victims is None:
            chosen = 0
            for frame in list(self.used.values()):
                if chosen < n and self.evictable(frame):
                    self.evict(frame)
                    chosen += 1
            return chosen
        victims = self.victims.pop(0) if self.victims else []
        assert len(victims) <= n
        for file, number, mappings in victims:
            mappings = [(mm or self.child, addr) for mm, addr in mappings]
            if file is None:
                mm, addr = mappings[0]
                frame = mm.ptes[addr].frame
            else:               # shared anonymous memory is named by where it is mapped
                file = file if isinstance(file, File) else file[0].find(file[1]).file
                frame = file.pages[number]
            assert frame.mappings == set(mappings) and frame.file is file
            self.evict(frame, mappings)
        return len(victims)

    @operation
    def reclaim(self, n):
        return self._reclaim(n)

    # --- devices

    @operation
    def pin(self, mm, addr, length, write=True):
        """get_user_pages: fault pages in and take a reference to each, to all of them or none."""
        if mm.mem is not self:
            raise ValueError("of another memory")
        frames, pfns = [], []
        try:
            for page, _ in chunks(addr, length):
                frame = mm.mm.get_page(page, write)
                frame.pins += 1
                frames.append(frame)
                pfns.append(frame.pfn + page % len(frame.data) // PAGE)
        except Exception as error:
            for frame in frames:
                self._unpin(frame)
            if isinstance(error, AccessError):
                fail(errno.EFAULT)
            raise
        return np.array(pfns, "u8")

    @operation
    def unpin(self, pfns):
        frames = [self._frame(int(pfn)) for pfn in pfns]
        if any(frame is None or frame.pins < n for frame, n in Counter(frames).items()):
            raise ValueError("not pinned")
        for frame in frames:
            self._unpin(frame)

    def _frame(self, pfn):
        return self.zero if pfn == 0 else self.used.get(pfn) or self.huge_used.get(pfn // 512 * 512)

    def _unpin(self, frame):
        frame.pins -= 1
        self.release(frame)

    # --- looking

    def mappings(self, pfn):
        frame = self._frame(pfn)
        return [(mm.face, addr + (pfn - frame.pfn) * PAGE) for mm, addr in frame.mappings]

    @property
    def stats(self):
        return {"frames": self.frames, "frames_used": len(self.used), "frames_free": self.frames - len(self.used),
                "swap_slots": self.swap_slots, "swap_used": len(self.slots),
                "swap_free": self.swap_slots - len(self.slots), "huge_pages": self.huge_pages,
                "huge_pages_free": len(self.huge_free), "huge_pages_reserved": self.huge_reserved,
                **{name: self.counts[name] for name in
                   ("reclaimed", "swapped_out", "swapped_in", "written_back", "discarded")}}


@dataclass
class Pte:
    frame: Frame
    writable: bool
    dirty: bool = False
    young: bool = True
    exclusive: bool = False     # an anonymous page that no other process maps


@dataclass
class SwapEntry:
    slot: Slot
    exclusive: bool


class File:
    """A file and its page cache. Pages come into being, filled with zeros, at first use.

    A page that was evicted is in the backing store; if the file is one of shared memory (memfd), in swap.
    """

    def __init__(self, mem, size, memfd=False, huge=False, anonymous=False):
        self.mem, self.size = mem, size
        self.page_size = HUGE if huge else PAGE
        self.reserved = set()           # numbers of huge pages that are not there yet
        if huge:
            mem.huge_files.append(self)
        self.anonymous = anonymous      # the unnamed file of shared anonymous memory: goes with its last VMA
        self.shmem = memfd or anonymous
        self.pages = {}                 # page number -> Frame
        self.slots = {}                 # page number -> Slot
        self.stored = {}                # page number -> contents in the backing store
        self.vmas = []                  # of those that map it
        self.holds = 0                  # operations that need it to their end, mapped or not

    @property
    def end(self):
        """The number of pages."""
        return -(self.size // -self.page_size)

    def page(self, number):
        """The frame of a page, read in if need be."""
        if number not in self.pages:
            slot = self.slots.get(number)
            frame = self.mem.allocate(slot.data if slot else self.stored.get(number))
            self.add(number, frame)
            if slot:
                frame.dirty = True              # what comes from swap is nowhere else from now on
                self.mem.swap_free(self.slots.pop(number))
                self.mem.counts["swapped_in"] += 1
        return self.pages[number]

    def add(self, number, frame):
        frame.file, frame.number = self, number
        self.pages[number] = frame

    def evict(self, frame, slot):
        """A page that nobody maps leaves the page cache, for swap or the backing store."""
        if slot:
            slot.users = 1
            self.slots[frame.number] = slot
        elif frame.dirty:
            self.stored[frame.number] = bytes(frame.data)
            self.mem.counts["written_back"] += 1
        else:
            self.mem.counts["discarded"] += 1
        self._drop(frame.number)

    def _drop(self, number):
        frame = self.pages.pop(number)
        frame.file = None
        self.mem.release(frame)

    def _contents(self, number):
        if number in self.pages:
            return bytes(self.pages[number].data)
        if number in self.slots:
            return self.slots[number].data
        return self.stored.get(number, bytes(self.page_size))

    def read(self, offset, n):
        n = max(0, min(n, self.size - offset))
        size = self.page_size
        return b"".join(self._contents(at // size)[at % size:at % size + k] for at, k in chunks(offset, n, size))

    @operation
    def write(self, offset, data):
        if self.page_size == HUGE:
            fail(errno.EINVAL)
        for at, n in chunks(offset, len(data)):
            frame = self.mem.with_room(self.page, at // PAGE)
            self.size = max(self.size, at + n)
            frame.data[at % PAGE:at % PAGE + n] = data[at - offset:at - offset + n]
            frame.dirty = True

    def unmapped(self, vma):
        self.vmas.remove(vma)
        self._forget_unless_needed()

    def let_go(self):
        self.holds -= 1
        self._forget_unless_needed()

    def _forget_unless_needed(self):
        if self.anonymous and not self.vmas and not self.holds:
            self._forget(0, self.end)
            self.reserved.clear()

    @operation
    def truncate(self, size):
        if size < 0 or self.page_size == HUGE and size % HUGE:
            fail(errno.EINVAL)
        first, end, grows, self.size = -(size // -self.page_size), self.end, size > self.size, size
        if first < end:
            self._unmap(first, None, copies=True)
            self._forget(first, end)
        if not grows:       # what a mapping wrote beyond the end stays when the file grows
            self._zero(size, -size % self.page_size)
        self.reserved = {number for number in self.reserved if number < first}

    @operation
    def punch_hole(self, offset, length):
        self.punch(offset, length)

    def punch(self, offset, length):
        """The range reads as zeros from now on; private copies stay."""
        if not 0 < length < 1 << 63 or not 0 <= offset < 1 << 63:
            fail(errno.EINVAL)
        if offset + length >= 1 << 63:
            fail(errno.EFBIG)
        size = self.page_size
        first, end = -(offset // -size), (offset + length) // size
        if first < end:
            self._unmap(first, end, copies=size == HUGE)
            self._forget(first, end)
        for at, n in chunks(offset, min(offset + length, self.end * size) - offset, size):
            if n < size:
                self._zero(at, n)

    def _unmap(self, first, end, copies):
        """Invalidate pages [first, end) (None: all above) wherever they are mapped, private copies too if `copies`."""
        # in no order that matters, but for who gives a huge page back last: the newest goes first
        for vma in self.vmas[::-1] if self.page_size == HUGE else self.vmas[:]:
            if vma.nonlinear:
                vma.mm.fire("invalidate_range", vma, vma.start, vma.end)        # they may be anywhere
                vma.mm.zap_shown(vma, first, 1 << 63 if end is None else end)
                continue
            first_at, end_at = (None if n is None else vma.start + n * self.page_size - vma.pgoff * PAGE for n in (first, end))
            start, stop = max(vma.start, first_at), vma.end if end is None else min(vma.end, end_at)
            if start < stop:
                vma.mm.fire("invalidate_range", vma, start, stop)
                vma.mm.zap(start, stop, copies)

    def _zero(self, offset, n):
        """Zero a part of one page, wherever it is."""
        number, at = divmod(offset, self.page_size)
        zeros = slice(at, at + n)
        if number in self.pages:
            self.pages[number].data[zeros] = bytes(n)
        for place in (self.slots, self.stored):
            if number in place:
                data = bytearray(self._contents(number))
                data[zeros] = bytes(n)
                if place is self.slots:
                    place[number].data = bytes(data)
                else:
                    place[number] = bytes(data)

    def _forget(self, first, end):
        """Pages [first, end) become holes."""
        for number in [number for number in self.pages if first <= number < end]:
            self._drop(number)
        for number in [number for number in self.slots if first <= number < end]:
            self.mem.swap_free(self.slots.pop(number))
        for number in [number for number in self.stored if first <= number < end]:
            del self.stored[number]
