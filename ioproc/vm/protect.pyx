# mprotect, madvise and msync.
from libc.errno cimport EACCES, EBUSY, ENODEV

cdef enum:
    PROT_SEM = 0x8
    PROT_GROWSDOWN = 0x01000000
    PROT_GROWSUP = 0x02000000

cdef int mm_mprotect(MM *mm, u64 start, u64 length, u64 prot) noexcept nogil:
    """VMA by VMA; a hole ends it with -ENOMEM after the VMAs before it were changed."""
    cdef u64 end, stop, flags
    cdef VMArea *vma
    cdef int error
    cdef u64 grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP)
    prot &= ~grows
    if grows == PROT_GROWSDOWN | PROT_GROWSUP or start & (PAGE_SIZE - 1):
        return -EINVAL
    if length == 0:
        return 0
    length = page_align(length)
    end = start + length
    if end <= start:
        return -ENOMEM
    if prot & ~<u64> (VM_ACCESS | PROT_SEM):
        return -EINVAL
    if grows:                               # from the start of the stack; none grows up
        vma = vma_first_in(mm, start, end)
        if vma == NULL or (grows == PROT_GROWSUP and vma.start > start):
            return -ENOMEM
        if grows == PROT_GROWSUP or not vma.flags & VM_GROWSDOWN:
            return -EINVAL
        start = vma.start
    while start < end:
        vma = vma_at(mm, start)
        if vma == NULL:
            return -ENOMEM
        stop = vma.end if vma.end < end else end
        flags = vma.flags & ~<u64> VM_ACCESS | prot & VM_ACCESS
        if (prot & VM_ACCESS) & ~(flags >> 4):
            return -EACCES
        if flags != vma.flags:
            error = vma_protect(mm, vma, start, stop, flags)
            if error:
                return error
        start = stop
    return 0


cdef int vma_protect(MM *mm, VMArea *vma, u64 start, u64 end, u64 flags) noexcept nogil:
    cdef u64 pages = (end - start) >> PAGE_SHIFT
    cdef u64 old = vma.flags
    cdef int error
    if flags & VM_WRITE:
        if not may_expand(mm, flags, pages) and may_expand(mm, vma.flags, pages):
            return -ENOMEM
        if not vma.flags & (VM_ACCOUNT | VM_WRITE | VM_SHARED | VM_NORESERVE | VM_HUGETLB):
            flags |= VM_ACCOUNT
    elif vma.flags & VM_ACCOUNT and vma_is_anonymous(vma) and vma.anon == NULL:
        flags &= ~<u64> VM_ACCOUNT
    error = vma_modify(mm, &vma, start, end, flags, vma.chain)
    if error:
        return error
    fire_protection(mm, vma, start, end, <u32> (flags & VM_ACCESS))
    if vma.flags & VM_HUGETLB:
        protect_huge_range(mm, vma, start, end)
    else:
        protect_range(mm, vma, start, end)
    if flags & VM_WRITE and old & (VM_WRITE | VM_SHARED | VM_LOCKED) == VM_LOCKED:
        populate(mm, start, end, False)            # locked memory takes its write faults now
    return 0


cdef enum Advice:
    MADV_NORMAL
    MADV_RANDOM
    MADV_SEQUENTIAL
    MADV_WILLNEED
    MADV_DONTNEED
    MADV_FREE = 8
    MADV_REMOVE = 9
    MADV_DONTFORK = 10
    MADV_DOFORK = 11
    MADV_HUGEPAGE = 14
    MADV_NOHUGEPAGE = 15
    MADV_DONTDUMP = 16
    MADV_DODUMP = 17
    MADV_WIPEONFORK = 18
    MADV_KEEPONFORK = 19
    MADV_COLD = 20
    MADV_PAGEOUT
    MADV_POPULATE_READ
    MADV_POPULATE_WRITE = 23
    MADV_DONTNEED_LOCKED = 24


cdef u64 advised_flags(u64 flags, int advice) noexcept nogil:
    if advice == MADV_NORMAL:
        return flags & ~<u64> (VM_RAND_READ | VM_SEQ_READ)
    if advice == MADV_RANDOM:
        return flags & ~<u64> VM_SEQ_READ | VM_RAND_READ
    if advice == MADV_SEQUENTIAL:
        return flags & ~<u64> VM_RAND_READ | VM_SEQ_READ
    if advice == MADV_DONTFORK:
        return flags | VM_DONTCOPY
    if advice == MADV_DOFORK:
        return flags & ~<u64> VM_DONTCOPY
    if advice == MADV_HUGEPAGE:
        return flags & ~<u64> VM_NOHUGEPAGE | VM_HUGEPAGE
    if advice == MADV_NOHUGEPAGE:
        return flags & ~<u64> VM_HUGEPAGE | VM_NOHUGEPAGE
    if advice == MADV_DONTDUMP:
        return flags | VM_DONTDUMP
    if advice == MADV_DODUMP:
        return flags & ~<u64> VM_DONTDUMP
    if advice == MADV_WIPEONFORK:
        return flags | VM_WIPEONFORK
    if advice == MADV_KEEPONFORK:
        return flags & ~<u64> VM_WIPEONFORK
    return flags


cdef int advice_known(int advice) noexcept nogil:
    """0; -EINVAL for what is no advice; -ENOSYS for what the model does not have yet."""
    if advice < 0:
        return -EINVAL
    if MADV_NORMAL <= advice <= MADV_DONTNEED or MADV_HUGEPAGE <= advice <= MADV_KEEPONFORK:
        return 0
    if MADV_FREE <= advice <= MADV_DOFORK or MADV_COLD <= advice <= MADV_DONTNEED_LOCKED:
        return 0
    if 8 <= advice <= 25 or 100 <= advice <= 103:
        return -ENOSYS
    return -EINVAL


cdef int populate_advised(MM *mm, u64 start, u64 end, bint write) noexcept nogil:
    """As far as it goes; why no further is the caller's to know."""
    cdef VMArea *vma
    cdef FrameBatch batch
    cdef u64 stop, faulted, stopped
    cdef int why
    while start < end:
        vma = vma_at(mm, start)
        if vma == NULL:
            return -ENOMEM
        if not vma.flags & (VM_WRITE if write else VM_READ) or vma.flags & VM_PFNMAP:
            return -EINVAL
        stop = vma.end if vma.end < end else end
        batch_begin(&batch, mm.mem, (stop - start) >> PAGE_SHIFT)
        why = touch_any(mm, start, stop, write, &batch, &faulted, &stopped)
        batch_end(&batch)
        if why:
            return -EFAULT if why == ACCESS_BUS else -ENOMEM
        start = stop
    return 0


cdef void remove_advised(MM *mm, VMArea *vma, u64 start, u64 end) noexcept nogil:
    """A hole in the file.  The lock is let go of meanwhile, and `vma` may be gone after."""
    cdef FileCache *file = vma.file
    cdef u64 offset = vma_index(vma, start) << PAGE_SHIFT
    file_hold(file)
    thread_set_inside(NULL)
    mm_unlock(mm)
    file_punch(file, offset, offset + (end - start))
    mm_lock(mm)
    thread_set_inside(mm)
    file_put(file)


cdef void pages_unused(MM *mm, u64 start, u64 end, bint out) noexcept nogil:
    """MADV_COLD, MADV_PAGEOUT: the pages of the range that nobody else maps are old, or go `out` at once."""
    cdef Memory *mem = mm.mem
    cdef u64 addr = start
    cdef u64 begin, stop
    cdef u64 *pte
    cdef Table *leaf
    cdef Scan scan
    scan_begin(&scan, mem)
    while True:
        leaf = leaf_next(mm.root, &addr, end, &stop)
        if leaf == NULL:
            break
        begin = addr
        leaf.used += 1                      # it stays, whatever reclaim takes out of it
        pthread_mutex_lock(&mem.lock)
        while addr < stop:
            pte = &leaf.entry[table_index(addr, 0)]
            if (pte[0] and not pte[0] & PTE_UNCOUNTED
                    and mapcount_of(atomic_load(&frame_at(mem, pte_pfn(pte[0])).counts)) == 1):
                if out:
                    reclaim_frame(&scan, pte_pfn(pte[0]), True)
                else:
                    pte[0] &= ~<u64> PTE_YOUNG
            addr += PAGE_SIZE
        pthread_mutex_unlock(&mem.lock)
        leaf.used -= 1
        if leaf.used == 0:
            leaf_drop(mm.root, begin)
    scan_end(&scan)


cdef int mm_madvise(MM *mm, u64 start, u64 length, int advice) noexcept nogil:
    """Holes are skipped, and -ENOMEM at the end."""
    cdef u64 end = start + page_align(length)
    cdef u64 stop
    cdef VMArea *vma
    cdef int error = advice_known(advice)
    cdef int result = 0
    cdef FrameBatch batch
    if error:
        return error
    if start & (PAGE_SIZE - 1) or (length and page_align(length) == 0) or end < start:
        return -EINVAL
    if advice == MADV_POPULATE_READ or advice == MADV_POPULATE_WRITE:
        return populate_advised(mm, start, end, advice == MADV_POPULATE_WRITE)
    while start < end:
        vma = vma_first_in(mm, start, end)
        if vma == NULL:
            return -ENOMEM
        if vma.start > start:
            result = -ENOMEM
            start = vma.start
        stop = vma.end if vma.end < end else end
        if advice == MADV_DONTNEED or advice == MADV_DONTNEED_LOCKED:
            if vma.flags & VM_PFNMAP or (vma.flags & VM_LOCKED and advice == MADV_DONTNEED):
                return -EINVAL
            if vma.flags & VM_HUGETLB:
                if start & (HUGE_SIZE - 1):
                    return -EINVAL
                stop &= HUGE_MASK           # part of a page is not forgotten
                if start == stop:
                    return result
            fire_range(mm, INVALIDATE_RANGE, vma, start, stop)
            batch_begin(&batch, mm.mem, 0)
            if vma.flags & VM_NONLINEAR:
                zap_nonlinear(mm, vma, start, stop, 0, UINT64_MAX, &batch)
            else:
                zap_in_batches(mm, start, stop, &batch)
            batch_end(&batch)
            stop = vma.end if vma.end < end else end
        elif advice == MADV_FREE:
            if vma.flags & VM_LOCKED or not vma_is_anonymous(vma):
                return -EINVAL
            fire_range(mm, INVALIDATE_RANGE, vma, start, stop)
            batch_begin(&batch, mm.mem, 0)
            free_range(mm, start, stop, &batch)
            batch_end(&batch)
        elif advice == MADV_COLD or advice == MADV_PAGEOUT:
            if vma.flags & (VM_LOCKED | VM_PFNMAP | VM_HUGETLB):
                return -EINVAL
            pages_unused(mm, start, stop, advice == MADV_PAGEOUT)
        elif advice == MADV_REMOVE:
            if vma.flags & (VM_LOCKED | VM_NONLINEAR) or vma_is_anonymous(vma):
                return -EINVAL
            if vma.flags & VM_PFNMAP:
                return -ENODEV
            if vma.flags & (VM_SHARED | VM_MAYWRITE) != VM_SHARED | VM_MAYWRITE:
                return -EACCES
            remove_advised(mm, vma, start, stop)
        elif advice == MADV_WIPEONFORK and not vma_is_anonymous(vma):
            return -EINVAL
        elif vma.flags & VM_PFNMAP and (advice == MADV_DOFORK or advice == MADV_DODUMP):
            return -EINVAL
        elif advised_flags(vma.flags, advice) != vma.flags:
            error = vma_modify(mm, &vma, start, stop, advised_flags(vma.flags, advice), vma.chain)
            if error:
                return -EAGAIN if error == -ENOMEM else error
        start = stop
    return result


cdef enum:
    MS_ASYNC = 1
    MS_INVALIDATE = 2
    MS_SYNC = 4


cdef int mm_msync(MM *mm, u64 start, u64 length, int flags) noexcept nogil:
    """The hook of each shared VMA; nothing is ever unwritten in the model's files."""
    cdef u64 end = start + page_align(length)
    cdef u64 stop
    cdef VMArea *vma
    cdef int result = 0
    if flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC) or start & (PAGE_SIZE - 1):
        return -EINVAL
    if flags & MS_ASYNC and flags & MS_SYNC:
        return -EINVAL
    if end < start:
        return -ENOMEM
    while start < end:
        vma = vma_first_in(mm, start, end)
        if vma == NULL:
            return -ENOMEM
        if vma.start > start:
            if flags == MS_ASYNC:
                return -ENOMEM
            result = -ENOMEM
            start = vma.start
        if flags & MS_INVALIDATE and vma.flags & VM_LOCKED:
            return -EBUSY
        stop = vma.end if vma.end < end else end
        if vma.flags & VM_SHARED:
            fire_range(mm, SYNC_RANGE, vma, start, stop)
        start = stop
    return result
