# mmap, munmap, brk and shared-memory attach.  System calls of the model return an address or 0, or a negative errno.
from libc.errno cimport EBADF, EOPNOTSUPP, EOVERFLOW
from posix.mman cimport MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED

cdef enum:
    MAP_TYPE = 0x0f
    MAP_SHARED_VALIDATE = 0x03
    MAP_GROWSDOWN = 0x100
    MAP_LOCKED = 0x2000
    MAP_NORESERVE = 0x4000
    MAP_POPULATE = 0x8000
    MAP_NONBLOCK = 0x10000
    MAP_STACK = 0x20000
    MAP_FIXED_NOREPLACE = 0x100000

cdef extern from * nogil:
    """
    #define IOPROC_FILE_LIMIT ((1ULL << 63) - 1)
    """
    const u64 FILE_LIMIT "IOPROC_FILE_LIMIT"        # bytes: the largest offset a file can have


cdef int unmap_prepare(MM *mm, u64 start, u64 end) noexcept nogil:
    """Split what sticks out of [start, end) on either side."""
    cdef VMArea *vma = vma_first_in(mm, start, end)
    cdef int error
    if vma == NULL:
        return 0
    if vma.start < start:
        # may pass the limit by one for a moment, as long as it ends within it
        if end < vma.end and mm.map_count >= mm.max_map_count:
            return -ENOMEM
        error = vma_split(mm, vma, start)
        if error:
            return error
    vma = vma_at(mm, end)
    if vma != NULL and vma.start < end:
        return vma_split(mm, vma, end)
    return 0


cdef VMArea *unmap_detach(MM *mm, u64 start, u64 end) noexcept nogil:
    """The hook, the pages; the VMAs leave the address space, and are the caller's to free: a list by `next`."""
    cdef VMArea *first = vma_first_in(mm, start, end)
    cdef VMArea *vma = first
    cdef VMArea *next
    cdef FrameBatch batch
    if vma == NULL:
        return NULL
    fire_range(mm, INVALIDATE_RANGE, vma, start, end)
    batch_begin(&batch, mm.mem, 0)
    zap_in_batches(mm, start, end, &batch)
    batch_end(&batch)
    while vma != NULL:
        next = vma_next_in(vma, end)
        vma_leave(mm, vma)
        vma.next = next
        vma = next
    return first


cdef void vmas_free(VMArea *vma) noexcept nogil:
    cdef VMArea *next
    while vma != NULL:
        next = vma.next
        vma_free(vma)
        vma = next


cdef void replaced_free(MM *mm) noexcept nogil:
    vmas_free(mm.replaced)
    mm.replaced = NULL


cdef void unmap_prepared(MM *mm, u64 start, u64 end) noexcept nogil:
    vmas_free(unmap_detach(mm, start, end))


cdef int unmap_range(MM *mm, u64 start, u64 end) noexcept nogil:
    cdef int error = unmap_prepare(mm, start, end)
    if error == 0:
        unmap_prepared(mm, start, end)
    return error


cdef int mm_munmap(MM *mm, u64 start, u64 length) noexcept nogil:
    if start & (PAGE_SIZE - 1) or start > TASK_SIZE or length > TASK_SIZE - start or length == 0:
        return -EINVAL
    return unmap_range(mm, start, start + page_align(length))


cdef int populate(MM *mm, u64 start, u64 end, bint strict) noexcept nogil:
    """
    Fault in what is mapped.  `strict` (mlock): up to the first failure, which is -ENOMEM, or -EAGAIN for want of a frame;
    else (MAP_POPULATE, MAP_LOCKED) as far as it goes, and a failure is not the caller's.
    """
    cdef VMArea *vma = vma_first_in(mm, start, end)
    cdef FrameBatch batch
    cdef u64 faulted, stopped, first, last
    cdef bint write
    cdef int why
    while vma != NULL:
        first = vma.start if vma.start > start else start
        last = vma.end if vma.end < end else end
        if not vma.flags & VM_PFNMAP:
            write = vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE
            batch_begin(&batch, mm.mem, (last - first) >> PAGE_SHIFT)
            why = touch_any(mm, first, last, write, &batch, &faulted, &stopped)
            batch_end(&batch)
            if why and strict:
                return -EAGAIN if why == ACCESS_OOM else -ENOMEM
        vma = vma_next_in(vma, end)
    return 0


cdef i64 address_find(MM *mm, u64 addr, u64 length, bint fixed) noexcept nogil:
    """Where a mapping goes: a hint is taken if it is free, else the highest gap that fits."""
    cdef const VMArea *above
    cdef u64 found
    if length > TASK_SIZE:
        return -ENOMEM
    if fixed:
        if addr > TASK_SIZE - length:
            return -ENOMEM
        return -EINVAL if addr & (PAGE_SIZE - 1) else <i64> addr
    addr &= PAGE_MASK
    if addr != 0:
        if addr < MMAP_MIN:
            addr = MMAP_MIN
        above = vma_find(mm, addr)
        if addr <= TASK_SIZE - length and (above == NULL or addr + length <= vma_start_gap(above)):
            return <i64> addr
    found = gap_find(mm, length, MMAP_BASE)
    return <i64> found if found else -ENOMEM


cdef i64 map_range(MM *mm, u64 addr, u64 length, u64 flags, FileCache *file, u64 pgoff, u64 attach,
                   bint only_grow) noexcept nogil:
    """Map [addr, addr + length), unmapping what is there.  `only_grow`: brk, which extends its predecessor or nobody."""
    cdef u64 end = addr + length
    cdef VMArea *vma
    cdef VMArea *old
    cdef Proposed want
    cdef u64 replaced = 0
    cdef int error = unmap_prepare(mm, addr, end)
    if error:
        return error
    vma = vma_first_in(mm, addr, end)
    while vma != NULL:
        replaced += vma_pages(vma)
        vma = vma_next_in(vma, end)
    if not may_expand(mm, flags, (length >> PAGE_SHIFT) - replaced):
        return -ENOMEM
    if flags & (VM_NORESERVE | VM_SHARED | VM_WRITE | VM_HUGETLB) == VM_WRITE:
        flags |= VM_ACCOUNT
    # a VMA in hand before anything is taken away
    vma = vma_new(mm, addr, end, pgoff, flags, file)
    if vma == NULL:
        return -ENOMEM
    vma.attach = attach
    old = unmap_detach(mm, addr, end)
    if flags & VM_HUGETLB:                  # as in the kernel: too late for what was mapped here
        error = huge_reserve(vma)
        mm.replaced = old                   # and too early for its files, which go at the end of the call
    else:
        vmas_free(old)
    if error:
        replaced_free(mm)
        vma_free(vma)
        return error
    want.start = addr
    want.end = end
    want.pgoff = pgoff
    want.flags = flags
    want.file = file
    want.attach = attach
    want.chain = NULL
    want.anon = NULL
    want.middle = NULL
    want.copied = NULL
    want.next = vma_find(mm, addr)
    want.prev = want.next.prev if want.next != NULL else mm.last
    if only_grow:
        want.next = NULL
        if want.prev != NULL and want.prev.end <= mm.start_brk:
            want.prev = NULL                # it ends where the heap begins: not the heap
    if merge_new(mm, &want) != NULL:
        vma_free(vma)
    else:
        vma_insert(mm, vma)
    return <i64> addr


cdef i64 mm_mmap(MM *mm, u64 addr, u64 length, u64 prot, u64 flags, FileCache *file, u64 offset) noexcept nogil:
    cdef u64 type = flags & MAP_TYPE
    cdef u64 vm_flags = (prot & VM_ACCESS) | VM_MAYACCESS
    cdef u64 pgoff = offset >> PAGE_SHIFT
    cdef bint fixed = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) != 0
    cdef FileCache *made = NULL
    cdef i64 result
    cdef int error
    if offset & (PAGE_SIZE - 1):
        return -EINVAL
    if flags & MAP_ANONYMOUS:
        if flags & MAP_HUGETLB:
            return mmap_huge_anonymous(mm, addr, length, prot, flags, offset)
        file = NULL
    elif file == NULL:
        return -EBADF
    elif file.huge:
        length = huge_align(length)
        vm_flags |= VM_HUGETLB | VM_DONTEXPAND
    elif flags & MAP_HUGETLB:
        return -EINVAL
    if length == 0:
        return -EINVAL
    length = page_align(length)
    if length == 0:
        return -ENOMEM
    if mm.map_count > mm.max_map_count:
        return -ENOMEM
    if flags & MAP_LOCKED and not vm_flags & VM_HUGETLB:
        vm_flags |= VM_LOCKED
    if flags & MAP_NORESERVE:
        vm_flags |= VM_NORESERVE
    if flags & MAP_GROWSDOWN:
        vm_flags |= VM_GROWSDOWN
    if flags & MAP_STACK:
        vm_flags |= VM_NOHUGEPAGE
    result = huge_address(mm, addr, length, fixed) if vm_flags & VM_HUGETLB else address_find(mm, addr, length, fixed)
    if result < 0:
        return result
    addr = <u64> result
    if flags & MAP_FIXED_NOREPLACE and vma_first_in(mm, addr, addr + length) != NULL:
        return -EEXIST
    if flags & MAP_LOCKED:
        error = lock_checked(mm, length >> PAGE_SHIFT)
        if error:
            return error
    if file != NULL and pgoff > (FILE_LIMIT - length) >> PAGE_SHIFT:
        return -EOVERFLOW
    if type == MAP_SHARED_VALIDATE and file != NULL and flags & MAP_FIXED_NOREPLACE:
        return -EOPNOTSUPP                  # VALIDATE knows only the flags older than itself
    if flags & MAP_GROWSDOWN and (file != NULL or type != MAP_PRIVATE):
        return -EINVAL
    if type == MAP_SHARED or (type == MAP_SHARED_VALIDATE and file != NULL):
        vm_flags |= VM_SHARED
        if file == NULL:
            made = file_new(mm.mem, length)
            if made == NULL:
                return -ENOMEM
            made.anonymous = True
            file = made
            pgoff = 0
    elif type == MAP_PRIVATE:
        if file == NULL:
            pgoff = addr >> PAGE_SHIFT
    else:
        return -EINVAL
    result = map_range(mm, addr, length, vm_flags, file, pgoff, 0, False)
    if made != NULL:
        file_put(made)
    if result >= 0 and (flags & MAP_LOCKED or flags & (MAP_POPULATE | MAP_NONBLOCK) == MAP_POPULATE):
        populate(mm, addr, addr + length, False)
    replaced_free(mm)
    return result


cdef u64 mm_brk(MM *mm, u64 brk) noexcept nogil:
    """The break afterwards: `brk`, or the old one where it cannot be had."""
    cdef u64 old = page_align(mm.brk)
    cdef u64 new = page_align(brk)
    cdef u64 flags = VM_READ | VM_WRITE | VM_MAYACCESS
    cdef const VMArea *above
    if brk < mm.start_brk or brk > TASK_SIZE:
        return mm.brk
    if brk - mm.start_brk > mm.limit_data:
        return mm.brk
    if new < old:
        if vma_first_in(mm, new, old) == NULL or unmap_range(mm, new, old):
            return mm.brk
    elif new > old:
        # a page of room above, as the kernel keeps
        above = vma_find(mm, old)
        if (above != NULL and new + PAGE_SIZE > vma_start_gap(above)) or mm.map_count > mm.max_map_count:
            return mm.brk
        if map_range(mm, old, new - old, flags, NULL, old >> PAGE_SHIFT, 0, True) < 0:
            return mm.brk
    mm.brk = brk
    return brk


cdef i64 mm_shmat(MM *mm, FileCache *file, u64 addr, bint readonly) noexcept nogil:
    cdef u64 flags = VM_READ | VM_MAYREAD | VM_MAYEXEC | VM_SHARED | VM_SYSV_SHM
    cdef u64 length = page_align(atomic_load(&file.size))
    cdef i64 result
    if not readonly:
        flags |= VM_WRITE | VM_MAYWRITE
    if file.huge:
        return -ENOSYS
    if addr & (PAGE_SIZE - 1) or length == 0:
        return -EINVAL
    if addr and (addr > TASK_SIZE - length or vma_first_in(mm, addr, addr + length) != NULL):
        return -EINVAL
    if mm.map_count > mm.max_map_count:
        return -ENOMEM
    result = address_find(mm, addr, length, addr != 0)
    if result < 0:
        return result
    mm.attaches += 1
    return map_range(mm, <u64> result, length, flags, file, 0, mm.attaches, False)


cdef int mm_shmdt(MM *mm, u64 addr) noexcept nogil:
    """Unmap what is left of the segment attached at `addr`."""
    cdef VMArea *vma
    cdef u64 attach = 0
    cdef u64 end = TASK_SIZE
    cdef VMArea *next
    if addr & (PAGE_SIZE - 1):
        return -EINVAL
    next = vma_first_in(mm, addr, end)
    while True:
        vma = next
        if vma == NULL or (attach and vma.end > end):       # what mremap made longer stays
            return 0 if attach else -EINVAL
        next = vma.next
        if (vma.flags & VM_SYSV_SHM and vma.start >= addr and (vma.start - addr) >> PAGE_SHIFT == vma.pgoff
                and (attach == 0 or vma.attach == attach)):
            if attach == 0:
                attach = vma.attach
                end = addr + page_align(atomic_load(&vma.file.size))
            unmap_range(mm, vma.start, vma.end)
