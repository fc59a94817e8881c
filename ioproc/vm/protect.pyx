# mprotect, madvise and msync.
from libc.errno cimport EACCES, EAGAIN, EBUSY

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
    if grows:                               # the model has no VMA that grows: what is there is the wrong kind
        vma = vma_first_in(mm, start, end)
        if vma == NULL or (grows == PROT_GROWSUP and vma.start > start):
            return -ENOMEM
        return -EINVAL
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
        if not vma.flags & (VM_ACCOUNT | VM_WRITE | VM_SHARED | VM_NORESERVE):
            flags |= VM_ACCOUNT
    elif vma.flags & VM_ACCOUNT and vma_is_anonymous(vma) and vma.anon == NULL:
        flags &= ~<u64> VM_ACCOUNT
    error = vma_modify(mm, &vma, start, end, flags, vma.chain)
    if error:
        return error
    fire_protection(mm, vma, start, end, <u32> (flags & VM_ACCESS))
    protect_range(mm, vma, start, end)
    if flags & VM_WRITE and old & (VM_WRITE | VM_SHARED | VM_LOCKED) == VM_LOCKED:
        populate(mm, start, end)            # locked memory takes its write faults now
    return 0


cdef enum Advice:
    MADV_NORMAL
    MADV_RANDOM
    MADV_SEQUENTIAL
    MADV_WILLNEED
    MADV_DONTNEED
    MADV_FREE = 8
    MADV_DONTFORK = 10
    MADV_DOFORK = 11
    MADV_HUGEPAGE = 14
    MADV_NOHUGEPAGE = 15
    MADV_DONTDUMP = 16
    MADV_DODUMP = 17


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
    return flags


cdef int advice_known(int advice) noexcept nogil:
    """0; -EINVAL for what is no advice; -ENOSYS for what the model does not have yet."""
    if advice < 0:
        return -EINVAL
    if MADV_NORMAL <= advice <= MADV_DONTNEED or MADV_HUGEPAGE <= advice <= MADV_DODUMP:
        return 0
    if advice == MADV_FREE or advice == MADV_DONTFORK or advice == MADV_DOFORK:
        return 0
    if 8 <= advice <= 25 or 100 <= advice <= 103:
        return -ENOSYS
    return -EINVAL


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
    while start < end:
        vma = vma_first_in(mm, start, end)
        if vma == NULL:
            return -ENOMEM
        if vma.start > start:
            result = -ENOMEM
            start = vma.start
        stop = vma.end if vma.end < end else end
        if advice == MADV_DONTNEED:
            if vma.flags & (VM_LOCKED | VM_PFNMAP):
                return -EINVAL
            fire_range(mm, INVALIDATE_RANGE, vma, start, stop)
            batch_begin(&batch, mm.mem, 0)
            if vma.flags & VM_NONLINEAR:
                zap_nonlinear(mm, vma, start, stop, 0, &batch)
            else:
                zap_range(mm, start, stop, &batch)
            batch_end(&batch)
        elif advice == MADV_FREE:
            if vma.flags & VM_LOCKED or not vma_is_anonymous(vma):
                return -EINVAL
            fire_range(mm, INVALIDATE_RANGE, vma, start, stop)
            batch_begin(&batch, mm.mem, 0)
            free_range(mm, start, stop, &batch)
            batch_end(&batch)
        elif vma.flags & VM_SPECIAL and (advice == MADV_DOFORK or advice == MADV_DODUMP):
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
