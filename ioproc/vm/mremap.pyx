# mremap: shrink, grow in place, move; across several VMAs when only moving to a fixed place.
from libc.errno cimport EFAULT

cdef enum:
    MREMAP_MAYMOVE = 1
    MREMAP_FIXED = 2
    MREMAP_DONTUNMAP = 4


cdef VMArea *vma_move_target(MM *mm, VMArea *vma, u64 old, u64 new, u64 length) noexcept nogil:
    """
    A VMArea for the copy of `vma` (from `old` on) at the free range `new`: its own, or a neighbour there that grows.  It carries
    the chain.  Anonymous memory never faulted takes its page offset from the new place, to merge there.
    """
    cdef Proposed want
    cdef VMArea *copy
    want.start = new
    want.end = new + length
    want.pgoff = vma_index(vma, old)
    if vma_is_anonymous(vma) and vma.anon == NULL:
        want.pgoff = new >> PAGE_SHIFT
    want.flags = vma.flags
    want.file = vma.file
    want.attach = vma.attach
    want.chain = vma.chain
    want.anon = vma.anon
    want.middle = NULL
    want.copied = vma
    want.next = vma_find(mm, new)
    want.prev = want.next.prev if want.next != NULL else mm.last
    copy = merge_new(mm, &want)
    if copy != NULL:
        return copy
    copy = vma_duplicate(vma, new, new + length, want.pgoff)
    if copy != NULL:
        vma_insert(mm, copy)
    return copy


cdef void vma_vacate(VMArea *vma, bint whole) noexcept nogil:
    """MREMAP_DONTUNMAP took the pages of `vma`: with all of them it is as if never written."""
    vma_set_flags(vma, vma.flags & ~<u64> VM_LOCKED)
    if whole and vma.anon != NULL:
        pthread_mutex_lock(&vma.mm.mem.lock)
        anon_unlink(vma)
        pthread_mutex_unlock(&vma.mm.mem.lock)


cdef i64 move_vma(MM *mm, VMArea *vma, u64 old, u64 old_length, u64 new, u64 new_length, int flags) noexcept nogil:
    """`new` is free.  The entries of [old, old + old_length) move; the old place is unmapped, or not."""
    cdef VMArea *target
    cdef int error
    cdef u64 moved = old_length if old_length < new_length else new_length
    if mm.map_count + 3 >= mm.max_map_count:
        return -ENOMEM
    # the tables first, so that nothing can fail once something has moved
    if vma.flags & VM_HUGETLB:
        error = huge_move_prepare(mm, old, new, moved)
        if error:
            return error
        vma = vma_at(mm, old)
    elif not move_prepare(mm.root, old, new, moved):
        return -ENOMEM
    target = vma_move_target(mm, vma, old, new, new_length)
    if target == NULL:
        drop_empty_tables(mm.root, new, moved)
        if mm.huge != NULL:
            drop_empty_tables(mm.huge, new >> 9, moved >> 9)
        return -ENOMEM
    if moved == 0:                          # a shared mapping duplicated
        return <i64> new
    vma = vma_at(mm, old)                   # may have merged with the target
    fire_range(mm, INVALIDATE_RANGE, vma, old, old + moved)
    fire_range(mm, INVALIDATE_RANGE, target, new, new + moved)
    if vma.flags & VM_HUGETLB:
        huge_move(mm, vma, old, new, moved)
    else:
        move_range(mm.root, old, new, moved)
    if flags & MREMAP_DONTUNMAP:
        vma_vacate(vma, vma != target and vma.start == old and vma.end == old + old_length)
    else:
        unmap_range(mm, old, old + old_length)
    return <i64> new


cdef i64 mremap_check_resize(MM *mm, VMArea *vma, u64 addr, u64 old_length, u64 new_length, bint placed) noexcept nogil:
    """What growing, or moving one VMA with a new length, must satisfy."""
    cdef u64 pgoff
    if vma == NULL:
        return -EFAULT
    if new_length <= old_length:
        # what shrinks may reach beyond the VMA, what moves may not
        return -EFAULT if placed and new_length > vma.end - addr else 0
    if old_length == 0 and not vma.flags & VM_SHARED:
        return -EINVAL
    if old_length > vma.end - addr:
        return -EFAULT
    pgoff = vma_index(vma, addr)
    if pgoff + (new_length >> PAGE_SHIFT) < pgoff:
        return -EINVAL
    if vma.flags & (VM_DONTEXPAND | VM_PFNMAP):
        return -EFAULT
    if vma.flags & VM_LOCKED and not may_lock(mm, (new_length - old_length) >> PAGE_SHIFT):
        return -EAGAIN
    if not may_expand(mm, vma.flags, (new_length - old_length) >> PAGE_SHIFT):
        return -ENOMEM
    return 0


cdef i64 mremap_check_kind(VMArea *vma, u64 addr, u64 *old_length, u64 *new_length, u64 new, int flags) noexcept nogil:
    """Huge pages move whole, and never become more; what may not be mapped twice has no DONTUNMAP."""
    if vma == NULL:
        return 0
    if vma.flags & VM_HUGETLB:
        if addr & (HUGE_SIZE - 1) or (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) and new & (HUGE_SIZE - 1)):
            return -EINVAL
        old_length[0] = huge_align(old_length[0])
        new_length[0] = huge_align(new_length[0])
        if new_length[0] > old_length[0]:
            return -EINVAL
    return -EINVAL if flags & MREMAP_DONTUNMAP and vma.flags & VM_SPECIAL else 0


cdef i64 mremap_to(MM *mm, u64 addr, u64 old_length, u64 new_length, u64 new, int flags) noexcept nogil:
    """To a fixed place, which is unmapped first, or with MREMAP_DONTUNMAP alone near to `new`."""
    cdef VMArea *vma
    cdef i64 found
    cdef i64 error = unmap_range(mm, new, new + new_length) if flags & MREMAP_FIXED else 0
    if error:
        return error
    vma = vma_at(mm, addr)
    if vma == NULL:
        return -EFAULT
    if flags & MREMAP_DONTUNMAP and not may_expand(mm, vma.flags, old_length >> PAGE_SHIFT):
        return -ENOMEM
    if old_length > new_length:
        error = mm_munmap(mm, addr + new_length, old_length - new_length)
        if error:
            return error
        old_length = new_length
        vma = vma_at(mm, addr)
    found = address_find(mm, new, new_length, flags & MREMAP_FIXED != 0)
    if found < 0:
        return found
    return move_vma(mm, vma, addr, old_length, <u64> found, new_length, flags)


cdef i64 mremap_move_all(MM *mm, u64 addr, u64 length, u64 new, int flags) noexcept nogil:
    """
    Every VMA of the range, with the gaps between them; none may be missing at its start.  An attached segment moves only
    alone, and whole.
    """
    cdef u64 end = addr + length
    cdef u64 at = addr
    cdef u64 stop, part
    cdef i64 result
    cdef VMArea *vma = vma_at(mm, addr)
    if vma == NULL:
        return -EFAULT
    while vma != NULL:
        if vma.start > at:
            at = vma.start
        stop = vma.end if vma.end < end else end
        if vma.flags & VM_SYSV_SHM and (at > addr or vma.end < end):
            return -EFAULT
        part = stop - at
        result = mremap_check_kind(vma, at, &part, &part, new + (at - addr), flags)
        if result == 0:
            result = mremap_to(mm, at, part, part, new + (at - addr), flags)
        if result < 0:
            return result
        at += part
        vma = vma_first_in(mm, at, end) if at < end else NULL
    return <i64> new


cdef bint grow_in_place(MM *mm, VMArea *vma, u64 delta) noexcept nogil:
    """Extend the VMA, over its successor's edge if the two merge.  False: no room."""
    cdef Proposed want
    cdef u64 end = vma.end + delta
    if end < vma.end or end > TASK_SIZE or vma_first_in(mm, vma.end, end) != NULL:
        return False
    want.start = vma.end
    want.end = end
    want.pgoff = vma_index(vma, vma.end)
    want.flags = vma.flags
    want.file = vma.file
    want.attach = vma.attach
    want.chain = vma.chain
    want.anon = vma.anon
    want.prev = vma
    want.middle = NULL
    want.next = vma.next
    want.copied = NULL
    return merge_new(mm, &want) != NULL


cdef i64 mm_mremap(MM *mm, u64 addr, u64 old_length, u64 new_length, int flags, u64 new) noexcept nogil:
    cdef VMArea *vma
    cdef i64 result = mremap_unlocked(mm, addr, old_length, new_length, flags, new)
    old_length = page_align(old_length)
    new_length = page_align(new_length)
    if result >= 0 and new_length > old_length:
        vma = vma_at(mm, <u64> result)
        if vma.flags & VM_LOCKED:
            populate(mm, <u64> result + old_length, <u64> result + new_length, False)
    return result


cdef i64 mremap_unlocked(MM *mm, u64 addr, u64 old_length, u64 new_length, int flags, u64 new) noexcept nogil:
    """All but populating what locked memory grew by."""
    cdef VMArea *vma
    cdef i64 error
    cdef i64 found
    cdef bint placed = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) != 0
    old_length = page_align(old_length)
    new_length = page_align(new_length)
    if flags & ~(MREMAP_FIXED | MREMAP_MAYMOVE | MREMAP_DONTUNMAP) or addr & (PAGE_SIZE - 1):
        return -EINVAL
    if new_length == 0 or new_length > TASK_SIZE:
        return -EINVAL
    if placed:
        if new > TASK_SIZE - new_length or new & (PAGE_SIZE - 1) or not flags & MREMAP_MAYMOVE:
            return -EINVAL
        if flags & MREMAP_DONTUNMAP and old_length != new_length:
            return -EINVAL
        if addr + old_length > new and new + new_length > addr:
            return -EINVAL
        # a move needs up to four mappings more for a while
        if mm.map_count + 5 >= mm.max_map_count:
            return -ENOMEM
        if old_length == new_length and flags & MREMAP_FIXED:
            return mremap_move_all(mm, addr, old_length, new, flags)
    vma = vma_at(mm, addr)
    error = mremap_check_kind(vma, addr, &old_length, &new_length, new, flags)
    if error == 0:
        error = mremap_check_resize(mm, vma, addr, old_length, new_length, placed)
    if error:
        return error
    if placed:
        return mremap_to(mm, addr, old_length, new_length, new, flags)
    if new_length < old_length:
        error = mm_munmap(mm, addr + new_length, old_length - new_length)
        return error if error else <i64> addr
    if new_length == old_length:
        return <i64> addr
    if vma.end - addr == old_length and grow_in_place(mm, vma, new_length - old_length):
        return <i64> addr
    if not flags & MREMAP_MAYMOVE:
        return -ENOMEM
    found = address_find(mm, 0, new_length, False)
    if found < 0:
        return found
    return move_vma(mm, vma, addr, old_length, <u64> found, new_length, flags)
