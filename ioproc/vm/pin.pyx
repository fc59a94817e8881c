# Pinning: what a device driver's get_user_pages does.  A reference keeps the frame, and nothing else: the page-table entry
# may go elsewhere, and a write fault that finds the reference copies.


cdef int mm_pin(MM *mm, u64 start, u64 end, bint write, u64 *pfns) noexcept nogil:
    """A reference to the frame of each page of [start, end), page aligned.  0, or a negative errno and no page pinned."""
    cdef FrameBatch batch
    cdef u64 addr = start
    cdef u64 pte = 0
    cdef u64 allowed = VM_WRITE if write else VM_READ
    cdef const VMArea *vma
    cdef int why = ACCESS_OK
    batch_begin(&batch, mm.mem, (end - start) >> PAGE_SHIFT)
    while addr < end:
        # unlike for the processor a stack does not grow, and what may be written need not be readable
        vma = vma_at(mm, addr)
        why = ACCESS_SEGV
        if vma != NULL and vma.flags & allowed and not vma.flags & VM_PFNMAP:
            why = access_any(mm, addr, write, &batch, &pte)
        if why:
            break
        pfns[(addr - start) >> PAGE_SHIFT] = 0
        if not pte & PTE_ZERO:              # which is never counted
            pfns[(addr - start) >> PAGE_SHIFT] = pte_pfn(pte)
            atomic_add(&frame_any(mm.mem, pte_pfn(pte)).counts, ONE_REFERENCE)
        addr += PAGE_SIZE
    if why:
        while addr > start:
            addr -= PAGE_SIZE
            if pfns[(addr - start) >> PAGE_SHIFT]:
                pin_put(&batch, pfns[(addr - start) >> PAGE_SHIFT])
    batch_end(&batch)
    if why == ACCESS_OOM:
        return -ENOMEM
    return -EFAULT if why else 0


cdef u64 pins_of(Memory *mem, u64 pfn) noexcept nogil:
    """References to a frame that are no cache's."""
    cdef u64 owner, cached
    cdef Frame *frame
    frame = frame_any(mem, pfn)
    if frame == NULL:
        return 0
    pthread_mutex_lock(&mem.lock)
    owner = atomic_load(&frame.owner) & ~<u64> OWNER_DIRTY
    cached = owner != 0 and not owner & OWNER_ANON
    if pfn <= mem.nframes and mem.nslots and mem.slot_of[pfn]:
        cached = 1
    pthread_mutex_unlock(&mem.lock)
    return references_of(atomic_load(&frame.counts)) - cached


cdef void pin_put(FrameBatch *batch, u64 pfn) noexcept nogil:
    if pfn <= batch.mem.nframes:
        frame_put(batch, pfn)
    else:
        huge_put(batch.mem, pfn, ONE_REFERENCE, False)


cdef u64 frames_unpin(Memory *mem, const u64 *pfns, const i64 *times, u64 n) noexcept nogil:
    """Drop so many references of each frame.  The index of one that has not so many, and nothing is dropped; or `n`."""
    cdef FrameBatch batch
    cdef u64 i
    cdef i64 left
    for i in range(n):
        if pfns[i] and pins_of(mem, pfns[i]) < <u64> times[i]:
            return i
    batch_begin(&batch, mem, 0)
    for i in range(n):
        left = times[i] if pfns[i] else 0
        while left:
            left -= 1
            pin_put(&batch, pfns[i])
    batch_end(&batch)
    return n
