# PhysicalMemory: the face of what address spaces share.

# Python objects by the address of what they are the face of.  References without callbacks: a signal that arrives in a
# callback would be lost there.
cdef dict faces = {}


# Address spaces whose end came while their lock was held by the thread it came in.
cdef list ends = []


cdef object face_of(const void *what):
    """The face, or None if there is none or it is going."""
    known = faces.get(<size_t> what)
    return None if known is None else known()


cdef void face_gone(const void *what):
    """In __dealloc__, where references to the object are dead; another face may have taken its place."""
    if face_of(what) is None:
        faces.pop(<size_t> what, None)


cdef int refuse_in_callback() except -1:
    """Callbacks may look and may not touch."""
    if thread_inside() != NULL:
        raise RuntimeError("a hook callback may look at an address space and may not change it")
    return 0


cdef object as_integer(object value, str name):
    try:
        return value.__index__()
    except AttributeError:
        raise TypeError(f"{name} = {value!r}: not an integer") from None


cdef u64 as_u64(object value, str name) except? 0xfffffffffffffff1:
    """An address, length or offset in bytes."""
    cdef object number = as_integer(value, name)
    if not 0 <= number <= 0xffffffffffffffff:
        raise ValueError(f"{name} = {value}: not in 0 .. 2**64 - 1")
    return number


cdef int as_int(object value, str name) except? -0x7ffffff1:
    """Flags or advice, as a system call's int."""
    cdef object number = as_integer(value, name)
    if not -1 << 31 <= number < 1 << 31:
        raise ValueError(f"{name} = {value}: not in -2**31 .. 2**31 - 1")
    return number


cdef class PhysicalMemory:
    """
    Frames of 4096 bytes that address spaces and files take their pages from, and the shared zero page beside them.

    Parameters
    ----------
    frames : int
        How many.  One that was never used costs address space only; one in use 32 bytes, and 4096 more once it has contents.
    swap_slots : int
        Pages of swap.  An access that finds no frame takes one back from whoever has not used his lately, in any
        address space: pages of files go to the file's backing store, anonymous ones to a slot.
    huge_pages : int
        Pages of 2 MiB for hugetlb mappings and files, apart from the frames: ``nr_hugepages``.  Each is 512 page frame
        numbers, the first of them the next multiple of 512 above `frames`.

    Raises
    ------
    ValueError
        `frames` is not in 1 .. 2**32 - 1, `swap_slots` not in 0 .. 2**32 - 2, or `huge_pages` not in 0 .. 2**26.
    """
    cdef Memory *mem
    cdef object __weakref__

    def __cinit__(self, frames=65536, swap_slots=0, huge_pages=0):
        cdef u64 count = as_u64(frames, "frames")
        cdef u64 slots = as_u64(swap_slots, "swap_slots")
        cdef u64 pages = as_u64(huge_pages, "huge_pages")
        if not 1 <= count < 1 << 32:
            raise ValueError(f"frames = {frames}: not in 1 .. 2**32 - 1")
        if slots >= (1ULL << 32) - 1:
            raise ValueError(f"swap_slots = {swap_slots}: not in 0 .. 2**32 - 2")
        if pages > 1 << 26:
            raise ValueError(f"huge_pages = {huge_pages}: not in 0 .. 2**26")
        self.mem = memory_new(count, slots, pages)
        if self.mem == NULL:
            raise MemoryError(f"no memory to describe {frames} frames, {swap_slots} swap slots and {huge_pages} huge pages")

    def __dealloc__(self):
        if self.mem != NULL:
            memory_free(self.mem)

    @property
    def stats(self):
        """
        dict: ``frames``, ``frames_free``, ``frames_used``, ``swap_slots``, ``swap_free``, ``swap_used``, ``huge_pages``,
        ``huge_pages_free``, ``huge_pages_reserved`` (of those free: promised to mappings), now; and so far, in pages:
        ``scanned`` (looked at by reclaim), ``reclaimed`` (frames freed by it), ``swapped_out``, ``swapped_in``, ``written_back``
        (dirty pages of files), ``discarded`` (clean pages of files, and what MADV_FREE gave up).
        """
        cdef u64 left, swap_used, huge_free, huge_reserved
        cdef ReclaimCounts counts
        with nogil:
            left = frames_free(self.mem)
            pthread_mutex_lock(&self.mem.lock)
            swap_used = self.mem.swap_used
            counts = self.mem.reclaim
            huge_free = self.mem.huge_free
            huge_reserved = self.mem.huge_reserved
            pthread_mutex_unlock(&self.mem.lock)
        return {
            "frames": self.mem.nframes, "frames_free": left, "frames_used": self.mem.nframes - left,
            "swap_slots": self.mem.nslots, "swap_free": self.mem.nslots - swap_used, "swap_used": swap_used,
            "huge_pages": self.mem.nhuge, "huge_pages_free": huge_free, "huge_pages_reserved": huge_reserved,
            "scanned": counts.scanned, "reclaimed": counts.reclaimed, "swapped_out": counts.swapped_out,
            "swapped_in": counts.swapped_in, "written_back": counts.written_back, "discarded": counts.discarded,
        }

    def reclaim(self, n):
        """
        Take frames back, as kswapd does: a clock goes over the frames, twice at most; one that was accessed since the clock
        came by last is passed over once.

        ``invalidate_page`` is fired in every address space that maps a victim, before its page-table entry changes.  Passed
        over: pinned frames, frames in locked memory, frames of an address space that another thread is using (reclaim
        never waits for one), and what would need a swap slot when none is free.

        Parameters
        ----------
        n : int
            Frames, at most.

        Returns
        -------
        int
            Frames freed.

        Raises
        ------
        RuntimeError
            In a hook callback.  What a callback raises is raised when reclaim is done; a note names the address space.
        """
        cdef u64 count = as_u64(n, "n")
        cdef u64 freed
        refuse_in_callback()
        thread_set_inside(self.mem)
        with nogil:
            freed = reclaim(self.mem, count)
        thread_set_inside(NULL)
        raise_pending()
        return freed

    def pin(self, AddressSpace mm not None, addr, length, write=True):
        """
        Take a reference to each page of a range, as a device driver's get_user_pages does: the pages are faulted in, for
        writing if `write`.

        The frames stay until `unpin`, whatever becomes of the addresses: reclaim passes them over, munmap leaves them to
        the device.  A reference does not keep frame and address together: after a fork the next write copies, even when
        the other process is gone (hook-less pinning is not coherence).

        Parameters
        ----------
        mm : AddressSpace
            Of this memory.
        addr, length : int
            Bytes, rounded out to pages.
        write : bool
            False pins what a read finds, perhaps the zero page (pfn 0), which is not counted.

        Returns
        -------
        ndarray of uint64
            A pfn per page.

        Raises
        ------
        OSError
            EFAULT: a page cannot be accessed so.  Nothing is pinned; pages faulted in stay.
        MemoryError
            No frame for a page; nothing is pinned.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 bytes_ = as_u64(length, "length")
        cdef u64 start = at & PAGE_MASK
        cdef u64 end
        cdef bint writing = write
        cdef int error
        cdef u64[::1] rows
        if mm.mem is not self:
            raise ValueError("mm: of another PhysicalMemory")
        range_in_space(at, bytes_)
        end = page_align(at + bytes_) if bytes_ else start
        pfns = np.zeros((end - start) >> PAGE_SHIFT, np.uint64)
        if end == start:
            return pfns
        rows = pfns
        mm.enter()
        with nogil:
            error = mm_pin(mm.mm, start, end, writing, &rows[0])
        mm.leave()
        if error == -ENOMEM:
            raise MemoryError(f"no frame to pin in {addr:#x}, length {length:#x}")
        if error:
            raise syscall_error(error, "pin")
        return pfns

    def unpin(self, pfns):
        """
        Drop a reference of `pin` to each frame; a frame that nobody maps is free then.

        Parameters
        ----------
        pfns : array_like of int
            As `pin` gave them, in any order and grouping.

        Raises
        ------
        ValueError
            A frame is not pinned (so often); nothing is unpinned.
        """
        cdef const u64[::1] rows
        cdef const i64[::1] times
        cdef u64 n, done
        refuse_in_callback()
        numbers = np.asarray(pfns, np.uint64)
        # references are a huge page's, not its parts'
        numbers = np.where(numbers > self.mem.nframes, numbers // HUGE_PAGES * HUGE_PAGES, numbers)
        rows, times = np.unique(numbers, return_counts=True)
        n = rows.shape[0]
        if n == 0:
            return
        with nogil:
            done = frames_unpin(self.mem, &rows[0], &times[0], n)
        if done < n:
            raise ValueError(f"pfns: {rows[done]} is not pinned {times[done]} times")

    def mappings(self, pfn):
        """
        Who maps a frame, by the reverse map.

        Parameters
        ----------
        pfn : int
            As `AddressSpace.pagemap` gives it.  The zero page (0) has no reverse map.

        Returns
        -------
        list of (AddressSpace, int)
            Each page-table entry that maps the frame: its address space and address.  An address space that another
            thread is using at the moment is waited for, except from a callback, which never waits: there it is left out.

        Notes
        -----
        Costs a look at every VMA that may map pages of the frame's object, not a look at every page.
        """
        cdef u64 number = as_u64(pfn, "pfn")
        cdef list candidates = []
        cdef list found = []
        cdef u64 *spots = NULL
        cdef u64 count = 0
        cdef u64 i
        cdef bint mapped
        cdef AddressSpace space
        cdef u64 *entry
        cdef u64 pte
        cdef u64 within = 0
        cdef const Frame *frame = frame_any(self.mem, number)
        if frame == NULL:
            raise ValueError(f"pfn = {pfn}: this memory has {self.mem.nframes} frames")
        with nogil:
            pthread_mutex_lock(&self.mem.lock)
            spots = rmap_candidates(frame, &count)
            pthread_mutex_unlock(&self.mem.lock)
        if spots == NULL and count:
            raise MemoryError("reverse map")
        # an address space is destroyed under the GIL, which was let go above: only those still known count
        try:
            for i in range(count):
                space = face_of(<void *> spots[2 * i])
                if space is not None:
                    candidates.append((space, spots[2 * i + 1]))
        finally:
            free(spots)
        for space, addr in candidates:
            if not space.look_begin(False):
                continue
            if number > self.mem.nframes:
                within = (number & (HUGE_PAGES - 1)) << PAGE_SHIFT
                pte = huge_lookup(space.mm, addr + within)
            else:
                entry = pte_find(space.mm.root, addr)
                pte = entry[0] if entry != NULL else 0
            mapped = pte & PTE_PRESENT and not pte & PTE_UNCOUNTED and pte_pfn(pte) == number
            space.look_end()
            if mapped and (space, addr + within) not in found:      # a VMA being split is listed twice for a moment
                found.append((space, addr + within))
        return found

    def __repr__(self):
        stats = self.stats
        return f"<ioproc.PhysicalMemory: {stats['frames_used']} of {stats['frames']} frames used>"


cdef u64 *rmap_candidates(const Frame *frame, u64 *count) noexcept nogil:
    """
    (MM *, address) pairs where the frame may be mapped: the VMAs of its owner that cover its index.  Memory.lock is held.
    NULL with *count nonzero: no memory.
    """
    cdef u64 owner = atomic_load(&frame.owner)
    cdef u64 index = atomic_load(&frame.index)
    cdef const AnonLink *link = NULL
    cdef const VMArea *vma = NULL
    cdef u64 room = 0
    cdef u64 *spots
    count[0] = 0
    if owner & OWNER_ANON:
        link = (<const AnonVMA *> (owner & ~<u64> OWNER_BITS)).links
        room = (<const AnonVMA *> (owner & ~<u64> OWNER_BITS)).nlinks
    elif owner:
        vma = (<const FileCache *> (owner & ~<u64> OWNER_BITS)).mappings
        while vma != NULL:
            room += vma_pages(vma) if atomic_load(&vma.flags) & VM_NONLINEAR else 1
            vma = vma.file_above
        vma = (<const FileCache *> (owner & ~<u64> OWNER_BITS)).mappings
    if room == 0:
        return NULL
    spots = <u64 *> malloc(16 * room)
    if spots == NULL:
        count[0] = room
        return NULL
    while link != NULL:
        rmap_candidate(link.vma, index, spots, count)
        link = link.above
    while vma != NULL:
        rmap_candidate(vma, index, spots, count)
        vma = vma.file_above
    return spots


cdef void rmap_candidate(const VMArea *vma, u64 index, u64 *spots, u64 *count) noexcept nogil:
    cdef u64 addr = vma.start
    if atomic_load(&vma.flags) & VM_NONLINEAR:      # anywhere
        while addr < vma.end:
            spots[2 * count[0]] = <u64> vma.mm
            spots[2 * count[0] + 1] = addr
            count[0] += 1
            addr += PAGE_SIZE
    elif vma.pgoff <= index and index < vma_index(vma, vma.end):
        spots[2 * count[0]] = <u64> vma.mm
        spots[2 * count[0] + 1] = vma.start + ((index - vma.pgoff) << PAGE_SHIFT)
        count[0] += 1


def watch_victims(PhysicalMemory memory not None):
    """For tests: note from now on what reclaim takes."""
    cdef Memory *mem = memory.mem
    cdef Victims *victims = <Victims *> calloc(1, sizeof(Victims))
    if victims == NULL:
        raise MemoryError("watch_victims")
    with nogil:
        pthread_mutex_lock(&mem.lock)
        if mem.victims == NULL:
            mem.victims = victims
            victims = NULL
        pthread_mutex_unlock(&mem.lock)
    free(victims)


def victims(PhysicalMemory memory not None):
    """
    For tests: what reclaim took since the last call, in order.

    Returns
    -------
    list of tuple
        ``("batch",)``: a run of reclaim began; ``("anon", [(space, addr), ...])``: an anonymous page, and where it was
        mapped; ``("file", file, page, [...])``: a page of a `File`; instead of shared anonymous memory's, ``(space, addr)``,
        where one of its VMAs begins.
    """
    cdef Memory *mem = memory.mem
    cdef u64 *rows = NULL
    cdef u64 n = 0
    cdef u64 i, what, value
    cdef list result = []
    cdef list row = None
    cdef list spots = None
    if mem.victims == NULL:
        raise ValueError("memory: nobody called watch_victims")
    with nogil:
        pthread_mutex_lock(&mem.lock)
        if not mem.victims.failed:
            rows = mem.victims.rows
            n = mem.victims.n
            mem.victims.rows = NULL
            mem.victims.room = 0
            mem.victims.n = 0
        pthread_mutex_unlock(&mem.lock)
    if mem.victims.failed:
        raise MemoryError("victims")
    try:
        for i in range(n):
            what, value = rows[2 * i], rows[2 * i + 1]
            if what == VICTIM_BATCH:
                result.append(["batch"])
            elif what == VICTIM_ANON:
                spots = []
                result.append(["anon", spots])
            elif what == VICTIM_FILE:
                spots = []
                row = ["file", face_of(<void *> value), None, spots]
                result.append(row)
            elif what == VICTIM_PAGE:
                row[2] = value
            elif what == VICTIM_VIA and row[1] is None:
                row[1] = (face_of(<void *> value), rows[2 * i + 3])
            elif what == VICTIM_SPOT:
                spots.append((face_of(<void *> value), rows[2 * i + 3]))
    finally:
        free(rows)
    return [tuple(victim) for victim in result]
