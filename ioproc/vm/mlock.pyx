# mlock and munlock: flags over a range, then its pages.
from libc.errno cimport EAGAIN, EPERM


cdef int lock_checked(const MM *mm, u64 pages) noexcept nogil:
    """May a mapping call lock so many more?"""
    if mm.limit_memlock == 0:
        return -EPERM
    return 0 if may_lock(mm, pages) else -EAGAIN


cdef u64 locked_in(MM *mm, u64 start, u64 end) noexcept nogil:
    """Locked pages of the range."""
    cdef u64 pages = 0
    cdef u64 first, last
    cdef VMArea *vma = vma_first_in(mm, start, end)
    while vma != NULL:
        if vma.flags & VM_LOCKED:
            first = vma.start if vma.start > start else start
            last = vma.end if vma.end < end else end
            pages += (last - first) >> PAGE_SHIFT
        vma = vma_next_in(vma, end)
    return pages


cdef int mark_locked(MM *mm, u64 start, u64 length, u64 locked) noexcept nogil:
    """VM_LOCKED or not, VMA by VMA; a hole ends it with -ENOMEM after those before it."""
    cdef u64 end = start + length
    cdef u64 stop, flags
    cdef VMArea *vma
    cdef int error
    if end < start:
        return -EINVAL
    while start < end:
        vma = vma_at(mm, start)
        if vma == NULL:
            return -ENOMEM
        stop = vma.end if vma.end < end else end
        flags = vma.flags & ~<u64> VM_LOCKED | locked
        if flags != vma.flags and not vma.flags & (VM_PFNMAP | VM_HUGETLB):
            error = vma_modify(mm, &vma, start, stop, flags, vma.chain)
            if error:
                return error
        start = stop
    return 0


cdef int mm_mlock(MM *mm, u64 addr, u64 length) noexcept nogil:
    cdef u64 start = addr & PAGE_MASK
    cdef int error
    length = page_align(length + (addr - start))
    if mm.limit_memlock == 0:
        return -EPERM
    if not may_lock(mm, length >> PAGE_SHIFT) and (
            start + length < start or not may_lock(mm, (length >> PAGE_SHIFT) - locked_in(mm, start, start + length))):
        return -ENOMEM                      # what is locked already does not count again
    error = mark_locked(mm, start, length, VM_LOCKED)
    if error == 0:
        error = populate(mm, start, start + length, True)
    return error


cdef int mm_munlock(MM *mm, u64 addr, u64 length) noexcept nogil:
    return mark_locked(mm, addr & PAGE_MASK, page_align(length + (addr & (PAGE_SIZE - 1))), 0)
