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


cdef u64 as_u64(object value, str name) except? 0xfffffffffffffff1:
    """An address, length or offset in bytes."""
    cdef object number
    try:
        number = value.__index__()
    except AttributeError:
        raise TypeError(f"{name} = {value!r}: not an integer") from None
    if not 0 <= number <= 0xffffffffffffffff:
        raise ValueError(f"{name} = {value}: not in 0 .. 2**64 - 1")
    return number


cdef int as_int(object value, str name) except? -0x7ffffff1:
    """Flags or advice, as a system call's int."""
    try:
        number = value.__index__()
    except AttributeError:
        raise TypeError(f"{name} = {value!r}: not an integer") from None
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

    Raises
    ------
    ValueError
        `frames` is not in 1 .. 2**32 - 1.
    """
    cdef Memory *mem
    cdef object __weakref__

    def __cinit__(self, frames=65536):
        cdef u64 count = as_u64(frames, "frames")
        if not 1 <= count < 1 << 32:
            raise ValueError(f"frames = {frames}: not in 1 .. 2**32 - 1")
        self.mem = memory_new(count)
        if self.mem == NULL:
            raise MemoryError(f"no memory to describe {frames} frames")

    def __dealloc__(self):
        if self.mem != NULL:
            memory_free(self.mem)

    @property
    def stats(self):
        """dict: ``frames``, ``frames_free``, ``frames_used``, now."""
        cdef u64 left
        with nogil:
            pthread_mutex_lock(&self.mem.lock)
            left = self.mem.nfree
            pthread_mutex_unlock(&self.mem.lock)
        return {"frames": self.mem.nframes, "frames_free": left, "frames_used": self.mem.nframes - left}

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
        cdef u64 *pte
        if number > self.mem.nframes:
            raise ValueError(f"pfn = {pfn}: this memory has {self.mem.nframes} frames")
        with nogil:
            pthread_mutex_lock(&self.mem.lock)
            spots = rmap_candidates(frame_at(self.mem, number), &count)
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
            pte = pte_find(space.mm.root, addr)
            mapped = pte != NULL and pte[0] & PTE_PRESENT and not pte[0] & PTE_UNCOUNTED and pte_pfn(pte[0]) == number
            space.look_end()
            if mapped and (space, addr) not in found:       # a VMA being split is listed twice for a moment
                found.append((space, addr))
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
    if owner & 1:
        link = (<const AnonVMA *> (owner & ~1ULL)).links
        room = (<const AnonVMA *> (owner & ~1ULL)).nlinks
    elif owner:
        vma = (<const FileCache *> owner).mappings
        while vma != NULL:
            room += vma_pages(vma) if vma.flags & VM_NONLINEAR else 1
            vma = vma.file_above
        vma = (<const FileCache *> owner).mappings
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
    if vma.flags & VM_NONLINEAR:            # anywhere
        while addr < vma.end:
            spots[2 * count[0]] = <u64> vma.mm
            spots[2 * count[0] + 1] = addr
            count[0] += 1
            addr += PAGE_SIZE
    elif vma.pgoff <= index and index < vma_index(vma, vma.end):
        spots[2 * count[0]] = <u64> vma.mm
        spots[2 * count[0] + 1] = vma.start + ((index - vma.pgoff) << PAGE_SHIFT)
        count[0] += 1
