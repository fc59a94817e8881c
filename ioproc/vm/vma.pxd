# VMAs in address order: a list, and a treap over it that knows the largest gap below each subtree.
# Find, insert, erase and gap search are O(log n); neighbours are one pointer away.
from libc.stdint cimport int64_t as i64, uint64_t as u64
from ioproc.hooks.chain cimport likely
from ioproc.vm.mm cimport MMAP_MIN, MM, PAGE_SHIFT, VM_SHARED, VM_WRITE, VMArea, pthread_mutex_lock, pthread_mutex_unlock


cdef inline VMArea *vma_find(MM *mm, u64 addr) noexcept nogil:
    """The first VMA that ends above `addr` (it may begin above it too), or NULL."""
    cdef VMArea *vma = mm.cached
    cdef VMArea *found = NULL
    if likely(vma != NULL and vma.start <= addr and addr < vma.end):
        return vma
    vma = mm.tree
    while vma != NULL:
        if addr < vma.end:
            found = vma
            if vma.start <= addr:
                break
            vma = vma.left
        else:
            vma = vma.right
    if found != NULL:
        mm.cached = found
    return found


cdef inline VMArea *vma_at(MM *mm, u64 addr) noexcept nogil:
    """The VMA that contains `addr`, or NULL."""
    cdef VMArea *vma = vma_find(mm, addr)
    return vma if vma != NULL and vma.start <= addr else NULL


cdef inline VMArea *vma_first_in(MM *mm, u64 start, u64 end) noexcept nogil:
    """The first VMA that overlaps [start, end), or NULL."""
    cdef VMArea *vma = vma_find(mm, start)
    return vma if vma != NULL and vma.start < end else NULL


cdef inline VMArea *vma_next_in(const VMArea *vma, u64 end) noexcept nogil:
    return vma.next if vma.next != NULL and vma.next.start < end else NULL


cdef inline u64 vma_pages(const VMArea *vma) noexcept nogil:
    return (vma.end - vma.start) >> PAGE_SHIFT


cdef inline bint vma_is_anonymous(const VMArea *vma) noexcept nogil:
    return vma.file == NULL


cdef inline bint is_data(u64 flags) noexcept nogil:
    """Counts against RLIMIT_DATA."""
    return flags & (VM_WRITE | VM_SHARED) == VM_WRITE


cdef inline u64 vma_max_gap(const VMArea *vma) noexcept nogil:
    cdef u64 gap = vma.gap
    if vma.left != NULL and vma.left.max_gap > gap:
        gap = vma.left.max_gap
    if vma.right != NULL and vma.right.max_gap > gap:
        gap = vma.right.max_gap
    return gap


cdef inline void vma_raise_gap(VMArea *vma) noexcept nogil:
    """Carry a changed gap up, as far as it changes anything."""
    cdef u64 gap
    while vma != NULL:
        gap = vma_max_gap(vma)
        if gap == vma.max_gap:
            return
        vma.max_gap = gap
        vma = vma.parent


cdef inline void vma_set_gap(VMArea *vma) noexcept nogil:
    """After vma.start or vma.prev.end moved."""
    if vma != NULL:
        vma.gap = vma.start - (vma.prev.end if vma.prev != NULL else 0)
        vma_raise_gap(vma)


cdef inline void vma_resize(VMArea *vma, u64 start, u64 end) noexcept nogil:
    """Move the bounds; pgoff follows the start."""
    cdef u64 pages = vma_pages(vma)
    # what the reverse map reads of a VMA changes under the lock of the reverse map
    cdef bint listed = vma.anon_links != NULL or vma.file != NULL
    if listed:
        pthread_mutex_lock(&vma.mm.mem.lock)
    vma.pgoff += <u64> (<i64> (start - vma.start) >> PAGE_SHIFT)
    vma.start = start
    vma.end = end
    if listed:
        pthread_mutex_unlock(&vma.mm.mem.lock)
    vma.mm.total_pages += vma_pages(vma) - pages
    if is_data(vma.flags):
        vma.mm.data_pages += vma_pages(vma) - pages
    vma_set_gap(vma)
    vma_set_gap(vma.next)


cdef inline void vma_replace_child(MM *mm, VMArea *parent, VMArea *old, VMArea *new) noexcept nogil:
    if parent == NULL:
        mm.tree = new
    elif parent.left == old:
        parent.left = new
    else:
        parent.right = new
    if new != NULL:
        new.parent = parent


cdef inline void vma_rotate_up(MM *mm, VMArea *child) noexcept nogil:
    cdef VMArea *parent = child.parent
    vma_replace_child(mm, parent.parent, parent, child)
    if parent.left == child:
        parent.left = child.right
        if child.right != NULL:
            child.right.parent = parent
        child.right = parent
    else:
        parent.right = child.left
        if child.left != NULL:
            child.left.parent = parent
        child.left = parent
    parent.parent = child
    parent.max_gap = vma_max_gap(parent)
    child.max_gap = vma_max_gap(child)


cdef inline void vma_insert(MM *mm, VMArea *vma) noexcept nogil:
    """Into the list and the tree; its range is free."""
    cdef VMArea *above = mm.tree
    cdef VMArea *next = NULL
    cdef VMArea *prev
    while above != NULL:
        if vma.start < above.start:
            next = above
            above = above.left
        else:
            above = above.right
    prev = next.prev if next != NULL else mm.last
    vma.prev = prev
    vma.next = next
    if prev != NULL:
        prev.next = vma
    else:
        mm.first = vma
    if next != NULL:
        next.prev = vma
    else:
        mm.last = vma

    mm.seed ^= mm.seed << 13
    mm.seed ^= mm.seed >> 7
    mm.seed ^= mm.seed << 17
    vma.priority = mm.seed
    vma.left = NULL
    vma.right = NULL
    vma.max_gap = 0
    vma.gap = 0
    if prev != NULL and prev.right == NULL:
        vma.parent = prev
        prev.right = vma
    elif next != NULL:
        vma.parent = next
        next.left = vma
    else:
        vma.parent = NULL
        mm.tree = vma
    vma_set_gap(vma)
    vma_set_gap(next)
    while vma.parent != NULL and vma.parent.priority < vma.priority:
        vma_rotate_up(mm, vma)
    mm.map_count += 1
    mm.total_pages += vma_pages(vma)
    if is_data(vma.flags):
        mm.data_pages += vma_pages(vma)


cdef inline void vma_erase(MM *mm, VMArea *vma) noexcept nogil:
    """Out of the list and the tree; the VMA itself stays."""
    cdef VMArea *parent
    cdef VMArea *next = vma.next
    while vma.left != NULL or vma.right != NULL:
        if vma.right == NULL or (vma.left != NULL and vma.left.priority > vma.right.priority):
            vma_rotate_up(mm, vma.left)
        else:
            vma_rotate_up(mm, vma.right)
    parent = vma.parent
    vma_replace_child(mm, parent, vma, NULL)
    vma_raise_gap(parent)
    if vma.prev != NULL:
        vma.prev.next = next
    else:
        mm.first = next
    if next != NULL:
        next.prev = vma.prev
    else:
        mm.last = vma.prev
    vma_set_gap(next)
    if mm.cached == vma:
        mm.cached = NULL
    mm.map_count -= 1
    mm.total_pages -= vma_pages(vma)
    if is_data(vma.flags):
        mm.data_pages -= vma_pages(vma)


cdef inline VMArea *vma_gap_before(VMArea *vma, u64 length) noexcept nogil:
    """The last VMA, at or before `vma` in address order, with a gap of at least `length` below it."""
    cdef VMArea *below
    while vma != NULL:
        if vma.gap >= length:
            return vma
        if vma.left != NULL and vma.left.max_gap >= length:
            vma = vma.left
            while True:
                if vma.right != NULL and vma.right.max_gap >= length:
                    vma = vma.right
                elif vma.gap >= length:
                    return vma
                else:
                    vma = vma.left
        # nothing below on this side: up to the first ancestor we are to the right of
        below = vma
        vma = vma.parent
        while vma != NULL and vma.left == below:
            below = vma
            vma = vma.parent
    return NULL


cdef inline u64 gap_find(MM *mm, u64 length, u64 ceiling) noexcept nogil:
    """The highest free address below `ceiling` with room for `length` bytes, 0 if there is none."""
    cdef VMArea *above = vma_find(mm, ceiling)          # the first that ends above the ceiling
    cdef VMArea *below = above.prev if above != NULL else mm.last
    cdef u64 top = ceiling
    cdef u64 bottom
    if above != NULL and above.start < ceiling:
        top = above.start
    bottom = below.end if below != NULL else MMAP_MIN
    if top >= bottom and top - bottom >= length:
        return top - length
    while below != NULL:
        below = vma_gap_before(below, length)
        if below == NULL:
            return 0
        if below.prev != NULL or below.start >= MMAP_MIN + length:
            return below.start - length
        below = below.prev                              # the lowest gap ends at MMAP_MIN
    return 0
