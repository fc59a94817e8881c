# AddressSpace and VMA: the faces of an address space.
import mmap as _mmap
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize


class AccessError(Exception):
    """
    A CPU access that cannot be made.

    Attributes
    ----------
    address : int
        The first byte that could not be accessed.
    completed : int
        Bytes accessed before it; ``touch`` accesses one of each page.
    """

    def __init__(self, address, completed=0):
        super().__init__(address, completed)
        self.address = address
        self.completed = completed

    def __str__(self):
        return f"address {self.address:#x}, {self.completed} completed before"


class SegmentationFault(AccessError):
    """An access that no VMA allows."""


class BusError(AccessError):
    """An access to a mapping beyond the last page of its file."""


for _error in (AccessError, SegmentationFault, BusError):
    _error.__module__ = "ioproc"


cdef class VMA:
    """
    A VMA as it was when it was looked at: one mapping, [start, end).

    Attributes
    ----------
    start, end : int
        Bytes.
    prot : int
        ``mmap.PROT_READ`` and so on.
    flags : int
        ``mmap.MAP_PRIVATE`` or ``MAP_SHARED``, with ``MAP_ANONYMOUS`` and ``ioproc.MAP_HUGETLB`` where they apply.
    file : File or None
        None for anonymous memory, private or shared, and for device memory, which is shared and not anonymous.
    offset : int
        Of `start` in the file, bytes; 0 for private anonymous memory; the physical address for device memory.
    shared : bool
    """
    cdef readonly object start
    cdef readonly object end
    cdef readonly int prot
    cdef readonly int flags
    cdef readonly object file
    cdef readonly object offset
    cdef readonly bint shared

    def __init__(self):
        raise TypeError("a VMA comes from AddressSpace.vmas() or in a callback")

    cdef tuple key(self):
        return (self.start, self.end, self.prot, self.flags, self.offset, id(self.file))

    def __eq__(self, other):
        return self.key() == (<VMA> other).key() if isinstance(other, VMA) else NotImplemented

    def __hash__(self):
        return hash(self.key())

    def __repr__(self):
        letters = "".join(letter if self.prot & bit else "-" for letter, bit in zip("rwx", (1, 2, 4)))
        what = "device memory" if self.file is None else repr(self.file)
        kind = "anonymous" if self.flags & MAP_ANONYMOUS else f"{what} at {self.offset:#x}"
        return f"<ioproc.VMA {self.start:#x}-{self.end:#x} {letters}{'s' if self.shared else 'p'} {kind}>"


cdef VMA vma_face(const VMArea *vma):
    cdef VMA face = VMA.__new__(VMA)
    face.start = vma.start
    face.end = vma.end
    face.prot = vma.flags & VM_ACCESS
    face.shared = vma.flags & VM_SHARED != 0
    face.flags = MAP_SHARED if face.shared else MAP_PRIVATE
    face.offset = 0
    if vma.file != NULL:
        face.offset = vma.pgoff << PAGE_SHIFT
    if vma.flags & VM_HUGETLB:
        face.flags |= MAP_HUGETLB
    if vma.file == NULL or vma.file.anonymous:
        face.flags |= MAP_ANONYMOUS
    elif not vma.flags & VM_PFNMAP:
        face.file = face_of(vma.file)
        if face.file is None:
            face.file = file_face(vma.file, (<AddressSpace> vma.mm.face).mem)
    return face


cdef VMArea *vmas_copy(MM *mm, u64 *count) noexcept nogil:
    """The VMAs, with their files held, to look at without the lock; NULL with *count nonzero: no memory."""
    cdef VMArea *copies = <VMArea *> malloc((mm.map_count + 1) * sizeof(VMArea))
    cdef const VMArea *vma = mm.first
    cdef VMArea *copy
    count[0] = mm.map_count
    if copies == NULL:
        count[0] += 1
        return NULL
    count[0] = 0
    while vma != NULL:
        # not the whole: what links it to its file changes under another lock
        copy = &copies[count[0]]
        copy.start = vma.start
        copy.end = vma.end
        copy.pgoff = vma.pgoff
        copy.flags = vma.flags
        copy.mm = mm
        copy.file = vma.file
        if vma.file != NULL:
            file_hold(vma.file)
        count[0] += 1
        vma = vma.next
    return copies


cdef void end_late() noexcept:
    """The ends that had to wait; what their release callbacks raise is nobody's."""
    while ends:
        (<AddressSpace> ends.pop()).end()


cdef object mm_face(MM *mm):
    return <object> mm.face if mm.face != NULL else None


PAGEMAP_DTYPE = [("present", "?"), ("swapped", "?"), ("writable", "?"), ("dirty", "?"), ("young", "?"), ("zero", "?"),
                 ("shared", "?"), ("pfn", "<u8")]

cdef packed struct PageRow:
    unsigned char present, swapped, writable, dirty, young, zero, shared
    u64 pfn


cdef void pagemap_row(Memory *mem, u64 pte, PageRow *row) noexcept nogil:
    row.present = pte & PTE_PRESENT != 0
    row.swapped = pte & PTE_SWAP != 0
    row.writable = pte & PTE_WRITE != 0
    row.dirty = pte & PTE_DIRTY != 0
    row.young = pte & PTE_YOUNG != 0
    row.zero = pte & PTE_ZERO != 0
    if pte & (PTE_PRESENT | PTE_ZERO) == PTE_PRESENT:
        row.pfn = pte_pfn(pte)
    if not pte & PTE_UNCOUNTED:
        row.shared = mapcount_of(atomic_load(&frame_any(mem, row.pfn).counts)) > 1


cdef void pagemap_fill(MM *mm, u64 start, u64 pages, PageRow *rows) noexcept nogil:
    cdef u64 addr = start
    cdef u64 end = start + (pages << PAGE_SHIFT)
    cdef u64 at = (start & HUGE_MASK) >> 9
    cdef u64 pte, stop
    cdef Table *leaf
    while True:
        leaf = leaf_next(mm.root, &addr, end, &stop)
        if leaf == NULL:
            break
        while addr < stop:
            pte = leaf.entry[table_index(addr, 0)]
            if pte:
                pagemap_row(mm.mem, pte, &rows[(addr - start) >> PAGE_SHIFT])
            addr += PAGE_SIZE
    while mm.huge != NULL and leaf_next(mm.huge, &at, huge_align(end) >> 9, &stop) != NULL:
        addr = at << 9
        while addr < stop << 9:
            pte = huge_lookup(mm, addr)
            if pte and start <= addr < end:
                pagemap_row(mm.mem, pte, &rows[(addr - start) >> PAGE_SHIFT])
            addr += PAGE_SIZE if pte else HUGE_SIZE
        at = stop


cdef int access_error(int why, u64 address, u64 completed) except -1:
    if why == ACCESS_SEGV:
        raise SegmentationFault(address, completed)
    if why == ACCESS_BUS:
        raise BusError(address, completed)
    if why == ACCESS_OOM:
        raise MemoryError(f"no frame for {address:#x}, {completed} completed before")
    return 0


cdef int range_in_space(u64 addr, u64 length) except -1:
    if addr > TASK_SIZE or length > TASK_SIZE - addr:
        raise ValueError(f"addr = {addr:#x}, length = {length:#x}: beyond the address space, which ends at {TASK_SIZE:#x}")
    return 0


cdef object syscall_error(i64 result, str what):
    if result == -ENOSYS:
        return NotImplementedError(f"{what} is not modelled")
    return OSError(-result, os.strerror(-result))


cdef class AddressSpace:
    """
    One process's memory: VMAs, page tables, and the ops chains that are told of their changes.

    System calls behave as Linux on x86-64: results, errno, VMA boundaries and partial effects are the running kernel's.
    Addresses, lengths and offsets are ints in bytes, protections and flags those of the `mmap` module.  A context
    manager: ``exit()`` at the end.  Several threads may use one; operations on it take turns, without the GIL.

    Parameters
    ----------
    mem : PhysicalMemory
    max_map_count : int
        As ``/proc/sys/vm/max_map_count``.
    start_brk : int
        Where the heap begins.
    rlimits : dict, optional
        Bytes, by name: ``"AS"``, ``"DATA"``, ``"MEMLOCK"``, ``"STACK"`` (of each stack); missing: unlimited.
    nonlinear : bool
        `remap_file_pages` as in Linux 2.6.12.
    teardown_batch : int
        Pages that munmap and MADV_DONTNEED take away before they let go of the lock for a moment, as kernels of that time did
        after the one invalidation up front; 0: never.  Other operations wait all the same; a NIC's driver that only looks at
        page-table entries does not.
    """
    cdef MM *mm
    cdef readonly PhysicalMemory mem
    cdef dict owners            # the Ops attached here by address, kept alive; visible to the garbage collector
    cdef int looking            # looks of the thread that already had the lock
    cdef MM *home               # an empty one, to go to from one shared with the child or parent of a vfork
    cdef void *next_user        # of `mm`, borrowed
    cdef object __weakref__

    def __cinit__(self, PhysicalMemory mem not None, *, max_map_count=65530, start_brk=0x555555756000, rlimits=None,
                  nonlinear=False, teardown_batch=0):
        cdef u64 count = as_u64(max_map_count, "max_map_count")
        cdef u64 brk = as_u64(start_brk, "start_brk")
        cdef u64 batch = as_u64(teardown_batch, "teardown_batch")
        cdef dict limits = dict(rlimits or {})
        cdef u64 limit_as = as_u64(limits.pop("AS", UINT64_MAX), "rlimits['AS']")
        cdef u64 limit_data = as_u64(limits.pop("DATA", UINT64_MAX), "rlimits['DATA']")
        cdef u64 limit_memlock = as_u64(limits.pop("MEMLOCK", UINT64_MAX), "rlimits['MEMLOCK']")
        cdef u64 limit_stack = as_u64(limits.pop("STACK", UINT64_MAX), "rlimits['STACK']")
        if limits:
            raise ValueError(f"rlimits: {', '.join(map(repr, limits))}: not one of 'AS', 'DATA', 'MEMLOCK', 'STACK'")
        if brk & (PAGE_SIZE - 1) or brk > TASK_SIZE:
            raise ValueError(f"start_brk = {start_brk:#x}: not a page of the address space")
        self.adopt(mem, mm_new(mem.mem))
        self.mm.max_map_count = count
        self.mm.start_brk = brk
        self.mm.brk = brk
        self.mm.limit_as = limit_as
        self.mm.limit_data = limit_data
        self.mm.limit_memlock = limit_memlock
        self.mm.limit_stack = limit_stack
        self.mm.nonlinear = nonlinear
        self.mm.teardown_batch = batch

    cdef int adopt(self, PhysicalMemory mem, MM *mm) except -1:
        if mm == NULL:
            raise MemoryError("AddressSpace")
        self.mem = mem
        self.mm = mm
        self.owners = {}
        mm.face = <void *> self
        mm.users = 1
        faces[<size_t> mm] = ref(self)
        return 0

    cdef int replace(self, MM *mm) except -1:
        """Take over an address space, in place of the empty one."""
        faces[<size_t> mm] = ref(self)  # the one thing that may fail
        faces.pop(<size_t> self.mm, None)
        mm_discard(self.mm)
        self.mm = mm
        mm.face = <void *> self
        mm.users = 1
        return 0

    # ---- users of one MM: after vfork there are two, linked from the oldest on

    cdef int enter_with_home(self) except -1:
        """`enter`, with an MM to go to, should this one be left to others."""
        while True:
            if self.home == NULL:
                self.home = mm_new(self.mem.mem)
                if self.home == NULL:
                    raise MemoryError("AddressSpace")
                faces[<size_t> self.home] = ref(self)
            self.enter()
            if self.home != NULL:
                return 0
            self.leave()                # another thread's exec took it

    cdef void join(self, AddressSpace parent):
        """Of a new object, whose empty MM becomes its home.  The parent's lock is held."""
        cdef AddressSpace last = parent
        while last.next_user != NULL:
            last = <AddressSpace> last.next_user
        last.next_user = <void *> self
        self.home = self.mm
        self.home.face = NULL
        self.mm = parent.mm
        self.mm.users += 1
        mm_hold(self.mm)
        self.owners = parent.owners

    cdef void go_home(self):
        """Let the others have the MM, which stays locked and is for the caller to put."""
        cdef MM *mm = self.mm
        cdef AddressSpace before
        if mm.face == <void *> self:
            mm.face = self.next_user
        else:
            before = <AddressSpace> mm.face
            while before.next_user != <void *> self:
                before = <AddressSpace> before.next_user
            before.next_user = self.next_user
        mm.users -= 1
        self.next_user = NULL
        self.mm = self.home
        self.home = NULL
        self.mm.face = <void *> self
        self.mm.users = 1
        mm_configure(self.mm, mm)

    def __del__(self):
        self.end()

    def __dealloc__(self):
        if self.mm != NULL:
            face_gone(self.mm)
            mm_put(self.mm)
        if self.home != NULL:
            face_gone(self.home)
            mm_put(self.home)

    # ---- entering and leaving the VM: no lock of ours is ever waited for with the GIL held

    cdef int enter(self) except -1:
        refuse_in_callback()
        self.lock()
        if self.mm.dead:
            mm_unlock(self.mm)
            raise OSError(ESRCH, os.strerror(ESRCH))
        thread_set_inside(self.mm)
        return 0

    cdef void lock(self):
        cdef MM *mm = self.mm
        while not mm_trylock(mm):
            mm_hold(mm)
            with nogil:
                mm_lock(mm)
            if mm == self.mm:
                mm_put(mm)              # ours is another
                return
            mm_unlock(mm)               # an exec took its place meanwhile
            mm_put(mm)
            mm = self.mm

    cdef int leave(self) except -1:
        cdef MM *mm = <MM *> thread_inside()
        thread_set_inside(NULL)
        mm_unlock(mm)
        return raise_pending()

    cdef bint look_begin(self, bint wait=True) except -1:
        """Lock for looking, unless this thread has the lock: False if that would have to wait and must not."""
        if mm_is_mine(self.mm):
            self.looking += 1
        elif thread_inside() == NULL:
            self.lock()
        elif not mm_trylock(self.mm):
            if wait:
                raise RuntimeError("this address space is in use, and a hook callback never waits")
            return False
        return True

    cdef void look_end(self):
        if self.looking:
            self.looking -= 1
        else:
            mm_unlock(self.mm)

    # ---- system calls

    def mmap(self, length, prot=_mmap.PROT_READ | _mmap.PROT_WRITE, flags=_mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS, *,
             addr=None, File file=None, offset=0):
        """
        Map memory.

        Parameters
        ----------
        length : int
            Bytes, rounded up to pages.
        prot, flags : int
            As mmap(2): ``PROT_*``; ``MAP_PRIVATE`` or ``MAP_SHARED``, ``MAP_ANONYMOUS``, ``MAP_FIXED``, ``MAP_FIXED_NOREPLACE``,
            ``MAP_POPULATE``, ``MAP_LOCKED``, ``MAP_NORESERVE``, ``MAP_STACK``; ``MAP_GROWSDOWN``: a stack, which grows down to
            an access in the hole below it, but not into 256 pages above another mapping; ``MAP_HUGETLB``: 2 MiB pages (`length`
            is rounded up to whole ones).
        addr : int, optional
            A hint, or with ``MAP_FIXED`` the place.  Without one: the highest gap that fits.
        file : File, optional
        offset : int
            In the file.

        Returns
        -------
        int
            The address.

        Raises
        ------
        OSError
            EINVAL, ENOMEM, EEXIST, EBADF, EOVERFLOW, as the kernel.
        """
        cdef u64 at = 0 if addr is None else as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef u64 protection = as_u64(prot, "prot")
        cdef u64 flag_bits = as_u64(flags, "flags")
        cdef u64 start = as_u64(offset, "offset")
        cdef FileCache *cache = NULL
        cdef i64 result
        if file is not None:
            if file.file.mem != self.mm.mem:
                raise ValueError("file: of another PhysicalMemory")
            cache = file.file
        self.enter()
        with nogil:
            result = mm_mmap(self.mm, at, bytes_, protection, flag_bits, cache, start)
        self.leave()
        if result < 0:
            raise syscall_error(result, "mmap")
        return result

    def mmap_device(self, length, pfn, prot=_mmap.PROT_READ | _mmap.PROT_WRITE, *, addr=None):
        """
        Map device memory, as a driver's mmap does with remap_pfn_range: shared, all entries present at once;
        ``invalidate_range`` for the range, then ``update_range``.

        Such a mapping never merges, grows or becomes resident; fork copies its entries.  MADV_DONTNEED is EINVAL, mlock
        passes over it.  Device memory keeps what is written to it, whoever maps it.

        Parameters
        ----------
        length : int
            Bytes, rounded up to pages.
        pfn : int
            The device's first page frame number, above those of `mem` and below 2**36.
        prot : int
        addr : int, optional
            A hint.

        Returns
        -------
        int
            The address.
        """
        cdef u64 at = 0 if addr is None else as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef u64 first = as_u64(pfn, "pfn")
        cdef u64 protection = as_u64(prot, "prot")
        cdef i64 result
        cdef u64 last = self.mm.mem.huge_pfn + (self.mm.mem.nhuge << 9) - 1 if self.mm.mem.nhuge else self.mm.mem.nframes
        if first <= last or first >= 1ULL << 36 or bytes_ > (1ULL << 48) - (first << PAGE_SHIFT):
            raise ValueError(f"pfn = {pfn}: a device's are above {last} and below 2**36")
        self.enter()
        with nogil:
            result = mm_mmap_device(self.mm, at, bytes_, protection, first)
        self.leave()
        if result < 0:
            raise syscall_error(result, "mmap_device")
        return result

    def zeromap(self, length, prot=_mmap.PROT_READ | _mmap.PROT_WRITE, *, addr=None):
        """
        Map private anonymous memory with the zero page everywhere at once, as Linux 2.6.12 did for a private mapping of
        /dev/zero: ``invalidate_range`` for the range, then ``update_range``.  A later write copies.

        Returns
        -------
        int
            The address; `addr` is a hint.
        """
        cdef u64 at = 0 if addr is None else as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef u64 protection = as_u64(prot, "prot")
        cdef i64 result
        self.enter()
        with nogil:
            result = mm_zeromap(self.mm, at, bytes_, protection)
        self.leave()
        if result < 0:
            raise syscall_error(result, "zeromap")
        return result

    def munmap(self, addr, length):
        """Unmap [addr, addr + length): one ``invalidate_range`` for the whole, if anything is mapped there."""
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef int error
        self.enter()
        with nogil:
            error = mm_munmap(self.mm, at, bytes_)
        self.leave()
        if error:
            raise syscall_error(error, "munmap")

    def mprotect(self, addr, length, prot):
        """
        Change the protection: ``change_protection`` per VMA that changes.  A hole is ENOMEM after the VMAs before it changed.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef u64 protection = as_u64(prot, "prot")
        cdef int error
        self.enter()
        with nogil:
            error = mm_mprotect(self.mm, at, bytes_, protection)
        self.leave()
        if error:
            raise syscall_error(error, "mprotect")

    def madvise(self, addr, length, advice):
        """
        ``MADV_DONTNEED``: forget the pages, ``invalidate_range`` per VMA.  ``FREE``: the same hook; reclaim throws the pages
        away, instead of keeping them, unless they are written before.  ``PAGEOUT``: reclaim the pages that nobody else maps;
        ``COLD``: let them look unused.  ``REMOVE``: `File.punch_hole` of what is mapped.  ``POPULATE_READ POPULATE_WRITE``
        fault pages in, as far as it goes.  ``DONTFORK DOFORK WIPEONFORK KEEPONFORK NORMAL RANDOM SEQUENTIAL
        HUGEPAGE NOHUGEPAGE DONTDUMP DODUMP`` mark VMAs, which splits and merges them; ``WILLNEED`` does nothing.  The other
        kinds of advice raise NotImplementedError.  Holes are skipped, and ENOMEM at the end.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef int what = as_int(advice, "advice")
        cdef int error
        cdef MM *mm
        self.enter()
        mm = self.mm
        mm_hold(mm)                     # REMOVE lets go of the lock meanwhile
        with nogil:
            error = mm_madvise(mm, at, bytes_, what)
        try:
            self.leave()
        finally:
            mm_put(mm)
        if error:
            raise syscall_error(error, f"madvise advice {advice}")

    def mlock(self, addr, length):
        """
        Lock the pages of a range, rounded out: reclaim passes them over from now on, and they are faulted in at once.

        Raises
        ------
        OSError
            ENOMEM: a hole (what is before it is locked, but not faulted in), a page that cannot be had, or more than
            ``rlimits["MEMLOCK"]``.  EAGAIN: no frame.  EPERM: that limit is 0.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef int error
        self.enter()
        with nogil:
            error = mm_mlock(self.mm, at, bytes_)
        self.leave()
        if error:
            raise syscall_error(error, "mlock")

    def munlock(self, addr, length):
        """Unlock the pages of a range, rounded out.  A hole is ENOMEM after the VMAs before it are unlocked."""
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef int error
        self.enter()
        with nogil:
            error = mm_munlock(self.mm, at, bytes_)
        self.leave()
        if error:
            raise syscall_error(error, "munlock")

    def msync(self, addr, length, flags=4):
        """``sync_range`` per shared VMA.  `flags`: MS_ASYNC 1, MS_INVALIDATE 2, MS_SYNC 4."""
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef int flag_bits = as_int(flags, "flags")
        cdef int error
        self.enter()
        with nogil:
            error = mm_msync(self.mm, at, bytes_, flag_bits)
        self.leave()
        if error:
            raise syscall_error(error, "msync")

    def mremap(self, old_addr, old_length, new_length, flags=1, new_addr=None):
        """
        Shrink, grow or move a mapping.

        A move fires ``invalidate_range`` for the old range, for the new one, and for the old one again when it is
        unmapped, and no update at the new place: the device faults it in.  The chain of a VMA moves with it.

        Parameters
        ----------
        flags : int
            ``MREMAP_MAYMOVE``, ``MREMAP_FIXED`` (with `new_addr`; several VMAs if the length stays), ``MREMAP_DONTUNMAP`` (the
            old place stays mapped, empty, and does not hear the last ``invalidate_range``).
        new_addr : int, optional
            The place; a hint with ``MREMAP_DONTUNMAP`` alone.

        Returns
        -------
        int
            The new address.
        """
        cdef u64 at = as_u64(old_addr, "old_addr")
        cdef u64 old = as_u64(old_length, "old_length")
        cdef u64 new = as_u64(new_length, "new_length")
        cdef int flag_bits = as_int(flags, "flags")
        cdef u64 target = 0 if new_addr is None else as_u64(new_addr, "new_addr")
        cdef i64 result
        if flag_bits & MREMAP_FIXED and new_addr is None:
            raise ValueError("new_addr = None: MREMAP_FIXED needs one")
        self.enter()
        with nogil:
            result = mm_mremap(self.mm, at, old, new, flag_bits, target)
        self.leave()
        if result < 0:
            raise syscall_error(result, "mremap")
        return result

    def remap_file_pages(self, addr, length, page_offset):
        """
        Show other pages of a shared mapping's file in [addr, addr + length), rounded down to pages.

        Today's kernel maps the range anew, and so does this: ``invalidate_range``, then ``update_page`` as the pages are
        populated.  An address space made with ``nonlinear=True`` does as 2.6.12 did: the VMA stays whole, and page by page
        ``invalidate_page`` fires if one was present, then ``update_page``.

        Parameters
        ----------
        page_offset : int
            The file's page that `addr` is to show.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef u64 first = as_u64(page_offset, "page_offset")
        cdef int error
        self.enter()
        with nogil:
            error = mm_remap_file_pages(self.mm, at, bytes_, first)
        self.leave()
        if error:
            raise syscall_error(error, "remap_file_pages")

    def brk(self, addr=None):
        """Move the end of the heap; None only asks.  Returns it: unchanged where the kernel would refuse."""
        cdef bint ask = addr is None
        cdef u64 at = 0 if ask else as_u64(addr, "addr")
        cdef u64 result
        self.enter()
        with nogil:
            result = self.mm.brk if ask else mm_brk(self.mm, at)
        self.leave()
        return result

    def shmat(self, File file not None, addr=None, readonly=False):
        """Attach a shared-memory segment, whole; returns its address."""
        cdef u64 at = 0 if addr is None else as_u64(addr, "addr")
        cdef bint read_only = readonly
        cdef i64 result
        if file.file.mem != self.mm.mem:
            raise ValueError("file: of another PhysicalMemory")
        self.enter()
        with nogil:
            result = mm_shmat(self.mm, file.file, at, read_only)
        self.leave()
        if result < 0:
            raise syscall_error(result, "shmat")
        return result

    def shmdt(self, addr):
        """Detach the segment attached at `addr`."""
        cdef u64 at = as_u64(addr, "addr")
        cdef int error
        self.enter()
        with nogil:
            error = mm_shmdt(self.mm, at)
        self.leave()
        if error:
            raise syscall_error(error, "shmdt")

    # ---- CPU access

    def read(self, addr, n):
        """
        Read `n` bytes; pages are faulted in.

        Raises
        ------
        SegmentationFault, BusError
            With the address, and the bytes read before.
        MemoryError
            No frame for a page.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 count = as_u64(n, "n")
        cdef u64 completed = 0
        cdef int why
        cdef bytes result
        cdef char *data
        range_in_space(at, count)
        result = PyBytes_FromStringAndSize(NULL, count)
        data = result
        self.enter()
        with nogil:
            why = mm_copy(self.mm, at, data, count, False, &completed)
        self.leave()
        access_error(why, at + completed, completed)
        return result

    def write(self, addr, data):
        """Write bytes; pages are faulted in and copied where they are copy-on-write.  Errors as `read`."""
        cdef u64 at = as_u64(addr, "addr")
        cdef const unsigned char[::1] source = data
        cdef u64 count = source.shape[0]
        cdef u64 completed = 0
        cdef int why = ACCESS_OK
        range_in_space(at, count)
        self.enter()
        if count:
            with nogil:
                why = mm_copy(self.mm, at, <char *> &source[0], count, True, &completed)
        self.leave()
        access_error(why, at + completed, completed)

    def touch(self, addr, length=1, write=False):
        """
        Access one byte of each page of [addr, addr + length), without contents: the accessed and dirty bits are set.

        Returns
        -------
        int
            Pages that took a fault.

        Raises
        ------
        SegmentationFault, BusError
            With the address, and the number of pages accessed before.
        MemoryError
            No frame for a page; the pages before it stay.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef bint writing = write
        cdef u64 start = at & PAGE_MASK
        cdef u64 end
        cdef u64 faulted = 0
        cdef u64 stopped = 0
        cdef int why
        cdef FrameBatch batch
        range_in_space(at, bytes_)
        end = page_align(at + bytes_) if bytes_ else start
        self.enter()
        with nogil:
            batch_begin(&batch, self.mm.mem, (end - start) >> PAGE_SHIFT)
            why = touch_any(self.mm, start, end, writing, &batch, &faulted, &stopped)
            batch_end(&batch)
        self.leave()
        if why:
            access_error(why, stopped if stopped > at else at, (stopped - start) >> PAGE_SHIFT)
        return faulted

    # ---- processes

    def fork(self):
        """
        A copy-on-write child.  The parent's ``wrprotect_page`` fires for each page-table entry that loses its write
        permission; the child starts with no ops.

        Returns
        -------
        AddressSpace
        """
        cdef MM *child
        cdef AddressSpace face = AddressSpace.__new__(AddressSpace, self.mem)
        cdef list inherited = heirs(self.owners) if self.owners else []
        self.enter()
        with nogil:
            child = mm_fork(self.mm)
        try:
            self.leave()
        finally:
            if child != NULL:
                face.replace(child)
        if child == NULL:
            raise MemoryError("fork")
        inherit_contexts(inherited, face)
        raise_pending()
        return face

    def vfork(self):
        """
        A child that uses this address space, not a copy, until its ``exec`` or ``exit``.  (The parent is not suspended.)

        Returns
        -------
        AddressSpace
        """
        cdef AddressSpace child = AddressSpace.__new__(AddressSpace, self.mem)
        self.enter_with_home()
        child.join(self)
        self.leave()
        return child

    def exec(self):
        """
        Begin anew: with an empty address space, no ops, and the same limits.  Of the old one the last user fires ``release``, as
        ``exit`` does; the child of a ``vfork`` only leaves it.
        """
        cdef dict owners
        cdef dict fresh = {}
        cdef bint last
        cdef MM *mm
        self.enter_with_home()
        mm = self.mm
        owners = self.owners
        last = mm.users == 1
        if last:
            with nogil:
                mm_teardown(mm)
        self.go_home()
        self.owners = fresh
        try:
            self.leave()
        finally:
            self.left(mm, owners if last else None)

    def exit(self):
        """
        The end of the process: ``release`` of each ops, newest first and already unlinked; then everything is unmapped, which
        fires nothing.  While another process uses the address space (`vfork`), it only leaves it.  Every other operation
        afterwards raises ESRCH; a second ``exit`` does nothing.
        """
        refuse_in_callback()
        self.end()

    cdef void left(self, MM *mm, dict owners):
        """After `go_home`, without the lock."""
        cdef AddressSpace heir
        if owners is not None:
            end_contexts(owners)
            owners.clear()
        if mm.face != NULL:
            heir = <AddressSpace> mm.face
            faces[<size_t> mm] = ref(heir)
        else:
            faces.pop(<size_t> mm, None)
        mm_put(mm)

    cdef int end(self) except -1:
        """Garbage collection may run in a callback of another address space: its state is put aside meanwhile."""
        cdef void *outer = thread_inside()
        cdef PyObject *outer_raised = thread_raised()
        cdef dict owners                        # let go of without the lock
        cdef bint shared
        cdef MM *mm
        if self.mm == NULL:
            return 0
        if mm_is_mine(self.mm):
            # its last reference went in a callback, while a file's truncation, say, was here: later
            ends.append(self)
            return 0
        thread_set_raised(NULL)
        self.lock()
        mm = self.mm
        thread_set_inside(mm)
        owners = self.owners
        self.owners = None
        shared = mm.users > 1 and not mm.dead
        if shared:
            self.go_home()
            self.mm.dead = True
        elif not mm.dead:
            with nogil:
                mm_teardown(mm)
        thread_set_inside(outer)
        mm_unlock(mm)
        try:
            raise_pending()
        finally:
            thread_set_raised(outer_raised)
            if shared:
                self.left(mm, None)
            elif owners is not None:
                end_contexts(owners)
                owners.clear()
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.exit()

    # ---- hooks

    def register_ops(self, Ops ops not None, addr=None, length=None):
        """
        Attach a device: to the address space, at the head of its chain, or to the VMAs of a range.

        Parameters
        ----------
        ops : Ops
            May be attached to several address spaces and VMAs.
        addr, length : int, optional
            Both or neither.  VMAs are split at the edges of the range.

        Raises
        ------
        OSError
            EEXIST: it is on that chain already (nothing changed).  EINVAL: `addr` is no page, or an empty range.  ENOMEM:
            the range has a hole (the VMAs before it are attached, as mbind does), or too many mappings.
        """
        self.change_chains(ops, addr, length, True)

    def unregister_ops(self, Ops ops not None, addr=None, length=None):
        """
        Detach a device from the address space's chain, or from the VMAs of a range that have it.  EINVAL if there is none.
        A walk in another thread is waited for: no callback runs after this returned.  (An Ops whose last VMA is unmapped is
        detached by that; it is let go of at the next call of one of these two.)
        """
        self.change_chains(ops, addr, length, False)

    cdef int change_chains(self, Ops ops, object addr, object length, bint register) except -1:
        cdef u64 at = 0
        cdef u64 bytes_ = 0
        cdef bint whole = addr is None
        cdef int error
        cdef list gone = []             # ends after the lock
        cdef dict owners
        cdef Attached *record
        cdef Attached *next
        if (addr is None) != (length is None):
            raise TypeError("addr and length: give both or neither")
        if not whole:
            at = as_u64(addr, "addr")
            bytes_ = as_u64(length, "length")
        self.enter()
        owners = self.owners
        try:
            if register:
                owners[<size_t> &ops.ops] = ops
            with nogil:
                if whole:
                    error = mm_register(self.mm, &ops.ops) if register else mm_unregister(self.mm, &ops.ops)
                elif register:
                    error = vma_register(self.mm, &ops.ops, at, bytes_)
                else:
                    error = vma_unregister(self.mm, &ops.ops, at, bytes_)
            # nothing here makes an object the garbage collector knows, and what is let go of ends after the lock
            if attached_find(self.mm, &ops.ops) == NULL:
                gone.append(owners.pop(<size_t> &ops.ops, None))
            record = attached_take_gone(self.mm)
            while record != NULL:
                gone.append(owners.pop(<size_t> record.ops, None))
                next = record.next
                free(record)
                record = next
        finally:
            self.leave()
        if error:
            raise syscall_error(error, "")
        return 0

    # ---- looking

    def vmas(self):
        """list of VMA: the mappings, in address order."""
        cdef u64 i
        cdef u64 count = 0
        cdef VMArea *copies
        self.look_begin()
        with nogil:
            copies = vmas_copy(self.mm, &count)
        self.look_end()
        if copies == NULL:
            raise MemoryError("vmas")
        try:
            return [vma_face(&copies[i]) for i in range(count)]
        finally:
            with nogil:
                for i in range(count):
                    if copies[i].file != NULL:
                        file_put(copies[i].file)
                free(copies)

    def pagemap(self, addr, length):
        """
        The page-table entries of a range.

        Parameters
        ----------
        addr, length : int
            Rounded out to pages.

        Returns
        -------
        ndarray
            One row per page: ``present swapped writable dirty young zero shared`` (bool; `zero`: the shared zero page,
            `shared`: the frame is mapped more than once), ``pfn`` (uint64, 0 where there is none).
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef u64 start = at & PAGE_MASK
        cdef u64 pages
        cdef Py_buffer view
        range_in_space(at, bytes_)
        pages = (page_align(at + bytes_) - start) >> PAGE_SHIFT if bytes_ else 0
        rows = np.zeros(pages, PAGEMAP_DTYPE)
        PyObject_GetBuffer(rows.view(np.uint8), &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.look_begin()
            pagemap_fill(self.mm, start, pages, <PageRow *> view.buf)
            self.look_end()
        finally:
            PyBuffer_Release(&view)
        return rows

    @property
    def stats(self):
        """
        dict: ``faults`` and their kinds (``faults_zero _anon _file _reuse _cow _swap``), ``map_count``, ``total_pages``,
        ``rss_pages``, ``swap_pages``, ``locked_pages``; ``hooks`` (chains walked) and ``callbacks`` (run), by callback name;
        ``chain_nodes`` visited.  Hooks are counted only where a chain exists.
        """
        cdef FaultCounts faults
        cdef HookCounts hooks
        cdef u64 map_count, total_pages, rss, swapped, locked
        self.look_begin()
        faults = self.mm.faults
        hooks = self.mm.hooks
        map_count = self.mm.map_count
        total_pages = self.mm.total_pages
        rss = self.mm.rss
        swapped = self.mm.swapped
        locked = self.mm.locked_pages
        self.look_end()
        return {
            "faults": faults.zero + faults.anon + faults.file + faults.reuse + faults.cow + faults.swap,
            "faults_zero": faults.zero, "faults_anon": faults.anon, "faults_file": faults.file,
            "faults_reuse": faults.reuse, "faults_cow": faults.cow, "faults_swap": faults.swap,
            "map_count": map_count, "total_pages": total_pages, "rss_pages": rss, "swap_pages": swapped,
            "locked_pages": locked,
            "hooks": hook_dict(hooks.walks), "callbacks": hook_dict(hooks.callbacks), "chain_nodes": hooks.cells,
        }

    def __repr__(self):
        cdef MM *mm = self.mm
        state = "exited" if mm.dead else f"{mm.map_count} VMAs, {mm.rss} pages resident"
        return f"<ioproc.AddressSpace at {<size_t> mm:#x}: {state}>"


cdef int mm_copy(MM *mm, u64 addr, char *data, u64 count, bint write, u64 *completed) noexcept nogil:
    """Read memory into `data` or write it from there."""
    cdef FrameBatch batch
    cdef u64 part, offset
    cdef u64 pte = 0
    cdef char *contents
    cdef int why = ACCESS_OK
    batch_begin(&batch, mm.mem, (count >> PAGE_SHIFT) + 2)
    while completed[0] < count:
        offset = addr & (PAGE_SIZE - 1)
        part = PAGE_SIZE - offset
        if part > count - completed[0]:
            part = count - completed[0]
        why = access_any(mm, addr, write, &batch, &pte)
        if why:
            break
        if write:
            contents = page_contents(mm.mem, pte, True)
            if contents == NULL:
                why = ACCESS_OOM
                break
            memcpy(contents + offset, data, part)
        else:
            contents = page_contents(mm.mem, pte, False)
            if contents != NULL:
                memcpy(data, contents + offset, part)
            else:
                memset(data, 0, part)
        addr += part
        data += part
        completed[0] += part
    batch_end(&batch)
    return why


cdef char *page_contents(Memory *mem, u64 pte, bint write) noexcept nogil:
    """The buffer of a present page, made for the first write; NULL: zeros, or no memory to write to."""
    if pte & PTE_SPECIAL:
        return device_contents(mem, pte_pfn(pte), write)
    if pte_pfn(pte) > mem.nframes:
        return huge_contents(mem, pte_pfn(pte), write)
    if write:
        return frame_contents(mem, pte_pfn(pte))
    # who makes it at this moment may be another address space, or a device
    return NULL if pte & PTE_ZERO else <char *> atomic_load(<u64 *> &frame_at(mem, pte_pfn(pte)).contents)


cdef char *frame_contents(Memory *mem, u64 pfn) noexcept nogil:
    """The frame's buffer, made at the first write; another address space may be making it too."""
    cdef Frame *frame = frame_at(mem, pfn)
    cdef char *contents
    pthread_mutex_lock(&mem.lock)
    contents = frame.contents
    if contents == NULL:
        contents = <char *> calloc(1, PAGE_SIZE)
        atomic_store(<u64 *> &frame.contents, <u64> contents)
    pthread_mutex_unlock(&mem.lock)
    return contents
