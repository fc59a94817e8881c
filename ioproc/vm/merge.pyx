# VMAs: making, splitting and merging them.  Boundaries equal the running kernel's; the hook chain takes part like a
# memory policy: VMAs merge only if their chains are equal.

cdef VMArea *vma_new(MM *mm, u64 start, u64 end, u64 pgoff, u64 flags, FileCache *file) noexcept nogil:
    """Not yet in the address space.  NULL: no memory."""
    cdef VMArea *vma = <VMArea *> calloc(1, sizeof(VMArea)) if tree_reserve(mm) else NULL
    if vma != NULL:
        mm.made += 1
        vma.start = start
        vma.end = end
        vma.pgoff = pgoff
        vma.flags = flags
        vma.mm = mm
        vma.file = file
        if file != NULL:
            pthread_mutex_lock(&mm.mem.lock)
            file_link(vma)
            pthread_mutex_unlock(&mm.mem.lock)
    return vma


cdef void vma_free(VMArea *vma) noexcept nogil:
    """Out of the address space already."""
    cdef FileCache *unused = NULL
    cell_put(vma.mm, vma.chain)
    if vma.anon_links != NULL or vma.file != NULL:
        pthread_mutex_lock(&vma.mm.mem.lock)
        anon_unlink(vma)
        if vma.file != NULL:
            file_unlink(vma)
            vma.file.refs -= 1
            if vma.file.refs == 0:
                unused = vma.file
        pthread_mutex_unlock(&vma.mm.mem.lock)
    if unused != NULL:
        file_free(unused)
    vma.mm.made -= 1
    free(vma)


cdef VMArea *vma_duplicate(VMArea *vma, u64 start, u64 end, u64 pgoff) noexcept nogil:
    """A VMA like `vma` for [start, end), which may lie elsewhere; not yet in the address space.  NULL: no memory."""
    cdef VMArea *copy = vma_new(vma.mm, start, end, pgoff, vma.flags, vma.file)
    cdef bint done
    if copy == NULL:
        return NULL
    copy.anon = vma.anon
    copy.attach = vma.attach
    pthread_mutex_lock(&vma.mm.mem.lock)
    done = anon_clone(copy, vma, False)
    pthread_mutex_unlock(&vma.mm.mem.lock)
    if not done:
        vma_free(copy)
        return NULL
    copy.chain = cell_hold(vma.chain)
    return copy


cdef int vma_split(MM *mm, VMArea *vma, u64 addr) noexcept nogil:
    """[start, addr) stays `vma`, [addr, end) becomes its successor; both carry the chain.  Fires nothing."""
    cdef VMArea *upper
    if vma.flags & VM_HUGETLB and addr & (HUGE_SIZE - 1):
        return -EINVAL
    upper = vma_duplicate(vma, addr, vma.end, vma_index(vma, addr))
    if upper == NULL:
        return -ENOMEM
    vma_divide(mm, vma, upper)
    return 0


cdef int vma_split_counted(MM *mm, VMArea *vma, u64 addr) noexcept nogil:
    """For system calls that may not exceed the limit on mappings."""
    if mm.map_count >= mm.max_map_count:
        return -ENOMEM
    return vma_split(mm, vma, addr)


cdef struct Proposed:           # a range with the properties it is to have, next to what it might merge with
    u64 start
    u64 end
    u64 pgoff
    u64 flags
    FileCache *file
    u64 attach
    Chain *chain
    AnonVMA *anon
    VMArea *prev
    VMArea *middle                 # the VMA the range is in, if it exists already
    VMArea *next
    VMArea *copied                 # the VMA it is moved from (mremap)


cdef bint has_inherited(const VMArea *vma) noexcept nogil:
    """Pages may still be shared with what the VMA was forked from."""
    return vma != NULL and vma.anon != NULL and not anon_is_singular(vma)


cdef bint is_counted(const VMArea *vma) noexcept nogil:
    """An attached segment counts its VMAs: none is removed by merging."""
    return vma.flags & VM_SYSV_SHM != 0


cdef bint may_merge(const Proposed *want, const VMArea *with_vma) noexcept nogil:
    if with_vma.flags != want.flags or with_vma.file != want.file or with_vma.chain != want.chain:
        return False
    if want.flags & VM_SPECIAL:
        return False
    if with_vma.attach != want.attach:      # the kernel has another file object for each
        return False
    if with_vma.anon == NULL and want.anon != NULL:
        return not has_inherited(want.middle) and not has_inherited(want.copied)
    if with_vma.anon != NULL and want.anon == NULL:
        return not has_inherited(with_vma)
    return with_vma.anon == want.anon


cdef bint may_merge_prev(const Proposed *want) noexcept nogil:
    return (want.prev != NULL and want.prev.end == want.start and may_merge(want, want.prev)
            and vma_index(want.prev, want.prev.end) == want.pgoff)


cdef bint may_merge_next(const Proposed *want, bint with_prev) noexcept nogil:
    if (want.next == NULL or want.next.start != want.end or not may_merge(want, want.next)
            or want.pgoff + ((want.end - want.start) >> PAGE_SHIFT) != want.next.pgoff):
        return False
    # both neighbours suit the range: do they suit each other?
    return (not with_prev or want.prev.anon == NULL or want.next.anon == NULL or want.prev.anon == want.next.anon)


cdef bint anon_inherit(VMArea *to, const VMArea *source) noexcept nogil:
    """`to` is about to hold pages of `source`.  False: no memory, nothing changed."""
    cdef bint done
    if to.anon != NULL or source == NULL or source.anon == NULL:
        return True
    to.anon = source.anon
    pthread_mutex_lock(&to.mm.mem.lock)
    done = anon_clone(to, source, False)
    pthread_mutex_unlock(&to.mm.mem.lock)
    return done


cdef void vma_leave(MM *mm, VMArea *vma) noexcept nogil:
    """Out of the address space, with its pages gone; the caller frees it."""
    if vma.flags & VM_RESERVED:
        huge_unreserve(vma)
    vma_erase(mm, vma)


cdef void vma_remove(MM *mm, VMArea *vma) noexcept nogil:
    vma_leave(mm, vma)
    vma_free(vma)


cdef void vma_swallow(MM *mm, VMArea *vma) noexcept nogil:
    """`vma` becomes one with its successor."""
    cdef VMArea *next = vma.next
    if next.flags & VM_RESERVED:
        huge_unreserve(next)
    vma_absorb(mm, vma)
    vma_free(next)


cdef VMArea *merge_new(MM *mm, Proposed *want) noexcept nogil:
    """The VMA that grew over the free range, or NULL: nothing fits, or no memory."""
    cdef bint left = may_merge_prev(want)
    cdef bint right = may_merge_next(want, left) and not (left and is_counted(want.next))
    if left:
        if right and not anon_inherit(want.prev, want.next):
            return NULL
        if not anon_inherit(want.prev, want.copied):
            return NULL
        vma_resize(want.prev, want.prev.start, want.end)
        if right:
            vma_swallow(mm, want.prev)
        return want.prev
    if right:
        if not anon_inherit(want.next, want.copied):
            return NULL
        vma_resize(want.next, want.start, want.next.end)
        return want.next
    return NULL


cdef VMArea *merge_existing(MM *mm, Proposed *want) noexcept nogil:
    """
    The range, all or an end of `middle`, goes over to its neighbours.  The VMArea that holds it then, or NULL: nothing
    fits, or no memory.
    """
    cdef VMArea *middle = want.middle
    cdef bint at_start = want.start == middle.start
    cdef bint at_end = want.end == middle.end
    cdef bint left = at_start and may_merge_prev(want)
    cdef bint right
    if not at_end:
        want.next = NULL
    right = at_end and may_merge_next(want, left)
    if at_start and at_end and is_counted(middle):
        return NULL
    if left and right and is_counted(want.next):
        right = False
    if left and right:
        if not anon_inherit(want.prev, want.next if want.next.anon != NULL else middle):
            return NULL
        vma_swallow(mm, want.prev)
        vma_swallow(mm, want.prev)
        return want.prev
    if left:
        if not anon_inherit(want.prev, middle):
            return NULL
        if at_end:
            vma_swallow(mm, want.prev)
        else:
            vma_resize(middle, want.end, middle.end)
            vma_resize(want.prev, want.prev.start, want.end)
        return want.prev
    if right:
        if not anon_inherit(want.next, middle):
            return NULL
        if at_start:
            vma_remove(mm, middle)
        else:
            vma_resize(middle, middle.start, want.start)
        vma_resize(want.next, want.start, want.next.end)
        return want.next
    return NULL


cdef void vma_set_flags(VMArea *vma, u64 flags) noexcept nogil:
    pages_count(vma.mm, vma.flags, 0 - vma_pages(vma))
    atomic_store(&vma.flags, flags)         # the reverse map looks at them without the lock
    pages_count(vma.mm, flags, vma_pages(vma))


cdef int vma_modify(MM *mm, VMArea **at, u64 start, u64 end, u64 flags, Chain *chain) noexcept nogil:
    """
    Give [start, end) of VMArea *at these flags and this chain: merge it with its neighbours or split it off.  *at becomes
    the VMA that holds the range.  Only the page-table entries are left to the caller.
    """
    cdef VMArea *vma = at[0]
    cdef VMArea *merged
    cdef Proposed want
    cdef int error
    want.start = start
    want.end = end
    want.pgoff = vma_index(vma, start)
    want.flags = flags
    want.file = vma.file
    want.attach = vma.attach
    want.chain = chain
    want.anon = vma.anon
    want.prev = vma.prev
    want.middle = vma
    want.next = vma.next
    want.copied = NULL
    merged = merge_existing(mm, &want)
    if merged != NULL:
        at[0] = merged
        return 0
    if vma.start < start:
        error = vma_split_counted(mm, vma, start)
        if error:
            return error
        vma = vma.next
        at[0] = vma
    if end < vma.end:
        error = vma_split_counted(mm, vma, end)
        if error:
            return error
    vma_set_flags(vma, flags)
    if vma.chain != chain:
        cell_put(mm, vma.chain)
        vma.chain = cell_hold(chain)
    return 0
