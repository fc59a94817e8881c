# remap_file_pages: today's, which maps the range anew, and that of 2.6.12.  There the VMA stays whole and shows its
# file's pages in any order (VM_NONLINEAR): what an entry shows is in the entry, also while it is not present.


cdef int mm_remap_file_pages(MM *mm, u64 start, u64 length, u64 pgoff) noexcept nogil:
    cdef u64 end = (start & PAGE_MASK) + (length & PAGE_MASK)
    cdef VMArea *vma
    cdef VMArea *last
    cdef u64 kept = VM_ACCESS | VM_MAYACCESS | VM_SHARED | VM_LOCKED | VM_SYSV_SHM | VM_HUGETLB | VM_DONTEXPAND
    cdef i64 result
    cdef int error
    start &= PAGE_MASK
    length &= PAGE_MASK
    if end <= start or pgoff + (length >> PAGE_SHIFT) < pgoff:
        return -EINVAL
    vma = vma_at(mm, start)
    # a segment attached for reading is not shared in this sense; another page of a device is its driver's business
    if vma == NULL or vma.flags & (VM_SHARED | VM_MAYWRITE) != VM_SHARED | VM_MAYWRITE or vma.flags & VM_PFNMAP:
        return -EINVAL
    if mm.nonlinear:
        return remap_nonlinear(mm, vma, start, end, pgoff)
    last = vma
    while last.end < end:
        last = last.next
        if last == NULL or last.start != last.prev.end or last.file != vma.file or last.attach != vma.attach:
            return -EINVAL
        if last.flags != vma.flags:
            return -EINVAL
    if mm.map_count > mm.max_map_count:
        return -ENOMEM
    if vma.flags & VM_HUGETLB and (start | length) & (HUGE_SIZE - 1):
        return -EINVAL
    if vma.flags & VM_LOCKED:
        error = lock_checked(mm, length >> PAGE_SHIFT)
        if error:
            return error
    if pgoff > (FILE_LIMIT - length) >> PAGE_SHIFT:
        return -EOVERFLOW
    result = map_range(mm, start, length, vma.flags & kept, vma.file, pgoff, vma.attach, False)
    if result < 0:
        return <int> result
    populate(mm, start, end, False)
    replaced_free(mm)
    return 0


cdef int remap_nonlinear(MM *mm, VMArea *vma, u64 start, u64 end, u64 pgoff) noexcept nogil:
    cdef FrameBatch batch
    cdef int tries = RECLAIM_TRIES
    cdef int result = 0
    if end > vma.end or vma.flags & VM_HUGETLB:
        return -EINVAL
    if pgoff != vma_index(vma, start):
        pthread_mutex_lock(&mm.mem.lock)    # the reverse map counts its candidates first
        vma_set_flags(vma, vma.flags | VM_NONLINEAR)
        pthread_mutex_unlock(&mm.mem.lock)
    if pgoff + ((end - start) >> PAGE_SHIFT) > page_align(vma.file.size) >> PAGE_SHIFT:
        return -EINVAL
    batch_begin(&batch, mm.mem, 0)
    while start < end and result == 0:
        result = install_page(mm, vma, start, pgoff, &batch)
        if result and tries and make_room(&batch):
            tries -= 1
            result = 0
            continue
        start += PAGE_SIZE
        pgoff += 1
    batch_end(&batch)
    return result


cdef int install_page(MM *mm, VMArea *vma, u64 addr, u64 index, FrameBatch *batch) noexcept nogil:
    """Show the file's page `index` at `addr`, whatever is there.  Not a fault."""
    cdef Table *leaf = leaf_make(mm.root, addr)
    cdef u64 *pte
    cdef u64 page
    if leaf == NULL:
        return -ENOMEM
    pthread_mutex_lock(&mm.mem.lock)
    page = file_page(vma.file, index, NULL)
    if page:
        atomic_add(&mm.mem.frames[page].counts, ONE_REFERENCE)      # it stays; the device sees it mapped no more than it is
    pthread_mutex_unlock(&mm.mem.lock)
    if page == 0:
        if leaf.used == 0:
            leaf_drop(mm.root, addr)
        return -ENOMEM
    pte = &leaf.entry[table_index(addr, 0)]
    if pte[0] & PTE_PRESENT:
        fire_page(mm, INVALIDATE_PAGE, vma, addr)
        if pte[0] & PTE_DIRTY:
            frame_keep_dirty(frame_at(mm.mem, pte_pfn(pte[0])))
        frame_unmap(batch, pte_pfn(pte[0]))
    else:
        mm.rss += 1
        if pte[0] == 0:
            leaf.used += 1
    atomic_add(&mm.mem.frames[page].counts, 1 - <u64> ONE_REFERENCE)
    pte[0] = pte_make(page, vma_pte_bits(vma) | PTE_YOUNG | (PTE_WRITE if vma.flags & VM_WRITE else 0))
    fire_page(mm, UPDATE_PAGE, vma, addr)
    return 0


cdef void zap_nonlinear(MM *mm, VMArea *vma, u64 start, u64 end, u64 first, u64 last, FrameBatch *batch) noexcept nogil:
    """
    Unmap the pages of a VM_NONLINEAR `vma` in [start, end) that show pages [first, last) of the file; entries remember what
    they show.
    """
    cdef u64 addr = start
    cdef u64 stop, pte, index, i
    cdef Table *leaf
    while True:
        leaf = leaf_next(mm.root, &addr, end, &stop)
        if leaf == NULL:
            return
        start = addr
        while addr < stop:
            i = table_index(addr, 0)
            pte = leaf.entry[i]
            if pte & PTE_PRESENT:
                index = frame_at(mm.mem, pte_pfn(pte)).index
                if first <= index < last:
                    leaf.entry[i] = 0
                    if index != vma_index(vma, addr):
                        leaf.entry[i] = pte_make(index, PTE_SPECIAL)
                    else:
                        leaf.used -= 1
                    mm.rss -= 1
                    if pte & PTE_DIRTY:
                        frame_keep_dirty(frame_at(mm.mem, pte_pfn(pte)))
                    frame_unmap(batch, pte_pfn(pte))
            addr += PAGE_SIZE
        if leaf.used == 0:
            leaf_drop(mm.root, start)
