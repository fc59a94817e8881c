# Pinning: what a device driver's get_user_pages does.  A reference keeps the frame, and nothing else: the page-table entry
# may go elsewhere, and a write fault that finds the reference copies.


cdef int mm_pin(MM *mm, u64 start, u64 end, bint write, u64 *pfns) noexcept nogil:
    """A reference to the frame of each page of [start, end), page aligned.  0, or a negative errno and no page pinned."""
    cdef FrameBatch batch
    cdef u64 addr = start
    cdef u64 *pte
    cdef int why = ACCESS_OK
    batch_begin(&batch, mm.mem, (end - start) >> PAGE_SHIFT)
    while addr < end:
        why = access_page(mm, addr, write, &batch, &pte)
        if why == ACCESS_OK and pte[0] & PTE_SPECIAL:           # no frame of ours
            why = ACCESS_SEGV
        if why:
            break
        pfns[(addr - start) >> PAGE_SHIFT] = 0
        if not pte[0] & PTE_ZERO:           # which is never counted
            pfns[(addr - start) >> PAGE_SHIFT] = pte_pfn(pte[0])
            atomic_add(&frame_at(mm.mem, pte_pfn(pte[0])).counts, ONE_REFERENCE)
        addr += PAGE_SIZE
    if why:
        frames_unpin(&batch, pfns, (addr - start) >> PAGE_SHIFT)
    batch_end(&batch)
    if why == ACCESS_OOM:
        return -ENOMEM
    return -EFAULT if why else 0


cdef u64 frames_unpin(FrameBatch *batch, const u64 *pfns, u64 n) noexcept nogil:
    """How many were unpinned: fewer than `n` if the next is not pinned."""
    cdef Memory *mem = batch.mem
    cdef Frame *frame
    cdef u64 owner, cached, i
    cdef bint pinned
    for i in range(n):
        if pfns[i] == 0:
            continue
        if pfns[i] > mem.nframes:
            return i
        frame = frame_at(mem, pfns[i])
        pthread_mutex_lock(&mem.lock)
        owner = atomic_load(&frame.owner)
        cached = owner != 0 and not owner & OWNER_ANON or (mem.nslots and mem.slot_of[pfns[i]] != 0)
        pinned = references_of(atomic_load(&frame.counts)) > cached
        pthread_mutex_unlock(&mem.lock)
        if not pinned:
            return i
        frame_put(batch, pfns[i])
    return n
