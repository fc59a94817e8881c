# VMAs in address order: a list, and a B+-tree over it.  Find, insert, erase and gap search are O(log n); neighbours are one
# pointer away.
#
# An entry of a node knows where its last VMA ends and the largest gap below one of its VMAs, so a search reads nodes only,
# whose keys lie side by side: of a million VMAs one leaf is out of the cache, and then the VMA itself.
from libc.stdint cimport UINT64_MAX, int64_t as i64, uint64_t as u64
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove
from ioproc.hooks.chain cimport likely, unlikely
from ioproc.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from ioproc.vm.mm cimport (
    MM, MMAP_MIN, NODE_ENTRIES, PAGE_SHIFT, VM_GROWSDOWN, VM_LOCKED, VM_SHARED, VM_WRITE, Entry, Node, VMArea, check)

cdef enum:
    STACK_GUARD_GAP = 256 << 12         # bytes: what is kept free below a stack
    NODE_FEW = 7                        # entries: fewer than that only in the root
    HEIGHT = 16                         # more than 7 ** 16 VMAs do not fit an address space

cdef struct Path:               # to an entry: of each level, the leaf first, the node and its entry
    Node *node[16]
    u64 slot[16]


cdef inline u64 node_above(const Node *node, u64 i, u64 addr) noexcept nogil:
    return node.entry[i].end <= addr


cdef inline u64 node_slot(const Node *node, u64 addr) noexcept nogil:
    """The first entry that ends above `addr`, or the one after the last.  No branch: where it is, is anyone's guess."""
    cdef u64 i = 4 * (node_above(node, 3, addr) + node_above(node, 7, addr) + node_above(node, 11, addr)
                      + node_above(node, 15, addr) + node_above(node, 19, addr) + node_above(node, 23, addr)
                      + node_above(node, 27, addr))
    return i + node_above(node, i, addr) + node_above(node, i + 1, addr) + node_above(node, i + 2, addr)


cdef inline VMArea *vma_find(MM *mm, u64 addr) noexcept nogil:
    """The first VMA that ends above `addr` (it may begin above it too), or NULL."""
    cdef VMArea *vma = mm.cached
    cdef const Node *node
    cdef u64 level = mm.height
    if likely(vma != NULL and vma.start <= addr and addr < vma.end):
        return vma
    node = mm.tree
    while level and node != NULL:
        node = <const Node *> node.entry[node_slot(node, addr)].child
        level -= 1
    if node != NULL:
        mm.cached = <VMArea *> node
    return <VMArea *> node


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
    return flags & (VM_WRITE | VM_SHARED | VM_GROWSDOWN) == VM_WRITE


cdef inline bint may_expand(const MM *mm, u64 flags, u64 pages) noexcept nogil:
    """RLIMIT_AS and RLIMIT_DATA allow so many more."""
    if mm.total_pages + pages > mm.limit_as >> PAGE_SHIFT:
        return False
    return not is_data(flags) or mm.data_pages + pages <= mm.limit_data >> PAGE_SHIFT


cdef inline bint may_lock(const MM *mm, u64 pages) noexcept nogil:
    """RLIMIT_MEMLOCK allows so many more."""
    return mm.limit_memlock == UINT64_MAX or mm.locked_pages + pages <= mm.limit_memlock >> PAGE_SHIFT


cdef inline void pages_count(MM *mm, u64 flags, u64 pages) noexcept nogil:
    """So many more, which may be negative, in VMAs with these flags."""
    mm.total_pages += pages
    if is_data(flags):
        mm.data_pages += pages
    if flags & VM_LOCKED:
        mm.locked_pages += pages


cdef inline u64 vma_start_gap(const VMArea *vma) noexcept nogil:
    """Where the gap below the VMA ends: a stack keeps a distance."""
    if vma.flags & VM_GROWSDOWN:
        return vma.start - STACK_GUARD_GAP if vma.start > STACK_GUARD_GAP else 0
    return vma.start


cdef inline u64 vma_gap(const VMArea *vma) noexcept nogil:
    """Bytes that may be mapped between its predecessor and the VMA."""
    cdef u64 bottom = vma.prev.end if vma.prev != NULL else 0
    cdef u64 top = vma_start_gap(vma)
    return top - bottom if top > bottom else 0


# ---- nodes

cdef inline Node *node_new() noexcept nogil:
    """Empty; NULL: no memory."""
    cdef Node *node = <Node *> malloc(sizeof(Node))
    cdef int i
    if node == NULL:
        return NULL
    for i in range(NODE_ENTRIES + 1):
        node.entry[i].end = UINT64_MAX
        node.entry[i].child = NULL
    node.n = 0
    return node


cdef inline u64 node_end(const Node *node) noexcept nogil:
    return node.entry[node.n - 1].end


cdef inline u64 node_gap(const Node *node) noexcept nogil:
    cdef u64 gap = 0
    cdef u64 i
    for i in range(node.n):
        if node.gap[i] > gap:
            gap = node.gap[i]
    return gap


cdef inline void node_set(Node *node, u64 i, Node *child) noexcept nogil:
    """Entry `i` is `child`, as it is now."""
    node.entry[i].end = node_end(child)
    node.entry[i].child = child
    node.gap[i] = node_gap(child)


cdef inline void node_open(Node *node, u64 at, u64 count) noexcept nogil:
    """Make room for `count` entries."""
    memmove(&node.entry[at + count], &node.entry[at], (node.n - at) * sizeof(Entry))
    memmove(&node.gap[at + count], &node.gap[at], (node.n - at) * sizeof(u64))
    node.n += count


cdef inline void node_close(Node *node, u64 at, u64 count) noexcept nogil:
    """Take `count` entries out."""
    cdef u64 i
    node.n -= count
    memmove(&node.entry[at], &node.entry[at + count], (node.n - at) * sizeof(Entry))
    memmove(&node.gap[at], &node.gap[at + count], (node.n - at) * sizeof(u64))
    for i in range(node.n, node.n + count):
        node.entry[i].end = UINT64_MAX
        node.entry[i].child = NULL


cdef inline void node_move(Node *to, u64 at, Node *source, u64 first, u64 count) noexcept nogil:
    """Entries of one node become entries of another."""
    node_open(to, at, count)
    memcpy(&to.entry[at], &source.entry[first], count * sizeof(Entry))
    memcpy(&to.gap[at], &source.gap[first], count * sizeof(u64))
    node_close(source, first, count)


# ---- the reserve: vma_insert cannot fail, because a VMA is made with the nodes that its insertion may take

cdef inline u64 tree_reserve_size(const MM *mm, u64 more) noexcept nogil:
    """
    Nodes that inserting all VMAs not in the tree, and so many more, may take: each splits a node on every level and then the
    root, perhaps.
    """
    if mm.made + more <= NODE_ENTRIES:          # nothing can be full
        return 0
    return (mm.made + more - mm.map_count) * (mm.height + 2)


cdef inline bint tree_reserve(MM *mm) noexcept nogil:
    """For a VMA about to be made.  False: no memory."""
    cdef Node *node
    while unlikely(mm.nspare < tree_reserve_size(mm, 1)):
        node = node_new()
        if node == NULL:
            return False
        node.entry[0].child = mm.spare
        mm.spare = node
        mm.nspare += 1
    return True


cdef inline Node *spare_take(MM *mm) noexcept nogil:
    cdef Node *node = mm.spare
    check(node != NULL)
    mm.spare = <Node *> node.entry[0].child
    node.entry[0].child = NULL
    mm.nspare -= 1
    return node


cdef inline void spare_give(MM *mm, Node *node) noexcept nogil:
    """An empty node."""
    if mm.nspare < tree_reserve_size(mm, 1):
        node.entry[0].child = mm.spare
        mm.spare = node
        mm.nspare += 1
    else:
        free(node)


# ---- the tree

cdef inline bint tree_begin(MM *mm) noexcept nogil:
    """Empty: one leaf.  False: no memory."""
    mm.tree = node_new()
    mm.height = 1
    return mm.tree != NULL


cdef inline void tree_end(MM *mm) noexcept nogil:
    """Nothing is in it any more."""
    free(mm.tree)
    while mm.spare != NULL:
        free(spare_take(mm))


cdef inline void path_find(MM *mm, u64 addr, Path *path) noexcept nogil:
    """To the first VMA that ends above `addr`, or, in the last leaf, to the place for one."""
    cdef Node *node = mm.tree
    cdef u64 level = mm.height
    cdef u64 slot
    while level:
        level -= 1
        slot = node_slot(node, addr)
        if unlikely(slot == node.n) and level:
            slot -= 1
        path.node[level] = node
        path.slot[level] = slot
        node = <Node *> node.entry[slot].child


cdef inline void path_settle(MM *mm, Path *path, u64 level) noexcept nogil:
    """The node at `level` has changed: let those above it know, as far as it changes anything."""
    cdef Node *parent
    cdef u64 slot, end, gap
    while level + 1 < mm.height:
        end = node_end(path.node[level])
        gap = node_gap(path.node[level])
        level += 1
        parent = path.node[level]
        slot = path.slot[level]
        if parent.entry[slot].end == end and parent.gap[slot] == gap:
            return
        parent.entry[slot].end = end
        parent.gap[slot] = gap


cdef inline void tree_insert(MM *mm, Path *path, u64 end, void *child, u64 gap) noexcept nogil:
    """An entry at the path's place."""
    cdef u64 level = 0
    cdef Node *node
    cdef Node *upper = NULL
    cdef u64 at, keep
    while True:
        node = path.node[level]
        at = path.slot[level]
        if upper != NULL:               # the node below was split
            node_set(node, at, <Node *> node.entry[at].child)
            at += 1
            end = node_end(upper)
            gap = node_gap(upper)
            child = upper
        upper = NULL
        if unlikely(node.n == NODE_ENTRIES):
            # in the middle; but what grows at an end will go on there
            keep = NODE_FEW if at == 0 else NODE_ENTRIES - NODE_FEW if at == node.n else NODE_ENTRIES // 2
            upper = spare_take(mm)
            node_move(upper, 0, node, keep, node.n - keep)
            if level + 1 == mm.height:
                path.node[level + 1] = spare_take(mm)
                path.slot[level + 1] = 0
                node_open(path.node[level + 1], 0, 1)
                path.node[level + 1].entry[0].child = node
                mm.tree = path.node[level + 1]
                mm.height += 1
            if at > keep:
                at -= keep
                node = upper
        node_open(node, at, 1)
        node.entry[at].end = end
        node.entry[at].child = child
        node.gap[at] = gap
        if upper == NULL:
            break
        level += 1
    path_settle(mm, path, level)


cdef inline void tree_erase(MM *mm, Path *path) noexcept nogil:
    """The path's entry."""
    cdef u64 level = 0
    cdef u64 i, total
    cdef Node *node
    cdef Node *parent
    cdef Node *low
    cdef Node *high
    while True:
        node = path.node[level]
        node_close(node, path.slot[level], 1)
        if level + 1 == mm.height:
            if level and node.n == 1:
                mm.tree = <Node *> node.entry[0].child
                mm.height -= 1
                node_close(node, 0, 1)
                spare_give(mm, node)
            return
        if likely(node.n >= NODE_FEW):
            break
        # few: join a neighbour, or take some of its entries
        level += 1
        parent = path.node[level]
        i = path.slot[level] - 1 if path.slot[level] else 0
        low = <Node *> parent.entry[i].child
        high = <Node *> parent.entry[i + 1].child
        total = low.n + high.n
        if total > NODE_ENTRIES - NODE_FEW:
            if low.n < high.n:
                node_move(low, low.n, high, 0, total // 2 - low.n)
            else:
                node_move(high, 0, low, total // 2, low.n - total // 2)
            node_set(parent, i, low)
            node_set(parent, i + 1, high)
            break
        node_move(low, low.n, high, 0, high.n)
        spare_give(mm, high)
        node_set(parent, i, low)
        path.slot[level] = i + 1
    path_settle(mm, path, level)


# ---- VMAs

cdef inline void vma_set_gap(MM *mm, VMArea *vma) noexcept nogil:
    """After its predecessor changed, in another leaf."""
    cdef Path path
    path_find(mm, vma.start, &path)
    path.node[0].gap[path.slot[0]] = vma_gap(vma)
    path_settle(mm, &path, 0)


cdef inline void vma_set_next_gap(MM *mm, Path *path, VMArea *next) noexcept nogil:
    """The gap below the successor of the path's VMA; the path is settled later."""
    cdef Node *leaf = path.node[0]
    cdef u64 slot = path.slot[0] + 1
    if next != NULL:
        if likely(slot < leaf.n):
            leaf.gap[slot] = vma_gap(next)
        else:
            vma_set_gap(mm, next)


cdef inline void vma_set_bounds(VMArea *vma, u64 start, u64 end) noexcept nogil:
    """pgoff follows the start.  What the reverse map reads of a VMA changes under its lock."""
    cdef bint listed = vma.anon_links != NULL or vma.file != NULL
    if listed:
        pthread_mutex_lock(&vma.mm.mem.lock)
    vma.pgoff += <u64> (<i64> (start - vma.start) >> PAGE_SHIFT)
    vma.start = start
    vma.end = end
    if listed:
        pthread_mutex_unlock(&vma.mm.mem.lock)


cdef inline void vma_resize(VMArea *vma, u64 start, u64 end) noexcept nogil:
    """Move the bounds, over free memory."""
    cdef MM *mm = vma.mm
    cdef u64 pages = vma_pages(vma)
    cdef Path path
    path_find(mm, vma.start, &path)
    vma_set_bounds(vma, start, end)
    pages_count(mm, vma.flags, vma_pages(vma) - pages)
    path.node[0].entry[path.slot[0]].end = end
    path.node[0].gap[path.slot[0]] = vma_gap(vma)
    vma_set_next_gap(mm, &path, vma.next)
    path_settle(mm, &path, 0)


cdef inline void vma_divide(MM *mm, VMArea *vma, VMArea *upper) noexcept nogil:
    """`upper`, not in the address space yet, takes over the end of `vma`.  The others, and so the gaps, stay as they are."""
    cdef Path path
    path_find(mm, vma.start, &path)
    vma_set_bounds(vma, vma.start, upper.start)
    upper.prev = vma
    upper.next = vma.next
    vma.next = upper
    if upper.next != NULL:
        upper.next.prev = upper
    else:
        mm.last = upper
    path.node[0].entry[path.slot[0]].end = upper.start
    path.slot[0] += 1
    tree_insert(mm, &path, upper.end, upper, 0)
    mm.map_count += 1


cdef inline void vma_absorb(MM *mm, VMArea *vma) noexcept nogil:
    """The opposite: `vma` takes over its successor, which begins where it ends and leaves the address space."""
    cdef VMArea *next = vma.next
    cdef Path path
    path_find(mm, next.start, &path)
    if likely(path.slot[0] > 0):
        path.node[0].entry[path.slot[0] - 1].end = next.end
    tree_erase(mm, &path)
    pages_count(mm, next.flags, 0 - vma_pages(next))
    pages_count(mm, vma.flags, vma_pages(next))
    vma.next = next.next
    if next.next != NULL:
        next.next.prev = vma
    else:
        mm.last = vma
    if unlikely(path.slot[0] == 0):         # they were in two leaves
        path_find(mm, vma.start, &path)
        path.node[0].entry[path.slot[0]].end = next.end
        path_settle(mm, &path, 0)
    vma_set_bounds(vma, vma.start, next.end)
    if mm.cached == next:
        mm.cached = vma
    mm.map_count -= 1


cdef inline void vma_insert(MM *mm, VMArea *vma) noexcept nogil:
    """Into the list and the tree; its range is free."""
    cdef Path path
    cdef VMArea *next
    cdef VMArea *prev
    path_find(mm, vma.start, &path)
    next = <VMArea *> path.node[0].entry[path.slot[0]].child
    prev = next.prev if next != NULL else mm.last
    vma.prev = prev
    vma.next = next
    if prev != NULL:
        prev.next = vma
    else:
        mm.first = vma
    if next != NULL:
        next.prev = vma
        path.node[0].gap[path.slot[0]] = vma_gap(next)
    else:
        mm.last = vma
    tree_insert(mm, &path, vma.end, vma, vma_gap(vma))
    mm.map_count += 1
    pages_count(mm, vma.flags, vma_pages(vma))


cdef inline void vma_erase(MM *mm, VMArea *vma) noexcept nogil:
    """Out of the list and the tree; the VMA itself stays."""
    cdef VMArea *next = vma.next
    cdef Path path
    path_find(mm, vma.start, &path)
    if vma.prev != NULL:
        vma.prev.next = next
    else:
        mm.first = next
    if next != NULL:
        next.prev = vma.prev
    else:
        mm.last = vma.prev
    vma_set_next_gap(mm, &path, next)
    tree_erase(mm, &path)
    if mm.cached == vma:
        mm.cached = NULL
    mm.map_count -= 1
    pages_count(mm, vma.flags, 0 - vma_pages(vma))


cdef inline VMArea *vma_gap_before(MM *mm, const VMArea *vma, u64 length) noexcept nogil:
    """The last VMA, at or before `vma` in address order, with a gap of at least `length` below it."""
    cdef u64 level = 0
    cdef Node *node
    cdef Path path
    path_find(mm, vma.start, &path)
    path.slot[0] += 1
    while level < mm.height:
        node = path.node[level]
        while path.slot[level]:
            path.slot[level] -= 1
            if node.gap[path.slot[level]] >= length:
                if level == 0:
                    return <VMArea *> node.entry[path.slot[level]].child
                node = <Node *> node.entry[path.slot[level]].child
                level -= 1
                path.node[level] = node
                path.slot[level] = node.n
                break
        else:
            level += 1                  # nothing below on this side
    return NULL


cdef inline u64 gap_find(MM *mm, u64 length, u64 ceiling) noexcept nogil:
    """The highest free address below `ceiling` with room for `length` bytes, 0 if there is none."""
    cdef VMArea *above = vma_find(mm, ceiling)          # the first that ends above the ceiling
    cdef VMArea *below = above.prev if above != NULL else mm.last
    cdef u64 top = ceiling
    cdef u64 bottom
    if above != NULL and vma_start_gap(above) < ceiling:
        top = vma_start_gap(above)
    bottom = below.end if below != NULL else MMAP_MIN
    if top >= bottom and top - bottom >= length:
        return top - length
    while below != NULL:
        below = vma_gap_before(mm, below, length)
        if below == NULL:
            return 0
        if below.prev != NULL or vma_start_gap(below) >= MMAP_MIN + length:
            return vma_start_gap(below) - length
        below = below.prev                              # the lowest gap ends at MMAP_MIN
    return 0
