# 4-level page tables: 9 bits a level, 4 KiB pages.  Nodes appear on demand and go with their last entry.
from libc.stdint cimport uint64_t as u64
from libc.stdlib cimport calloc, free
from ioproc.hooks.chain cimport likely, unlikely
from ioproc.vm.mm cimport PAGE_SHIFT, Table, atomic_store, check


cdef extern from * nogil:
    """
    #define IOPROC_TABLES_STAY (1ULL << 32)
    """
    const u64 TABLES_STAY "IOPROC_TABLES_STAY"      # in the root's `used`: empty tables are not freed (see truth.pxd)


cdef inline u64 table_index(u64 addr, int level) noexcept nogil:
    """level 3: the root; level 0: the leaf, whose entries are PTEs."""
    return (addr >> (PAGE_SHIFT + 9 * level)) & 511


cdef inline u64 leaf_end(u64 addr) noexcept nogil:
    """Where what the leaf of `addr` covers (2 MiB) ends."""
    return ((addr >> (PAGE_SHIFT + 9)) + 1) << (PAGE_SHIFT + 9)


cdef inline Table *table_new() noexcept nogil:
    return <Table *> calloc(1, sizeof(Table))


cdef inline Table *leaf_find(const Table *root, u64 addr) noexcept nogil:
    """The leaf that covers `addr`, NULL if there is none."""
    cdef const Table *table = root
    table = <const Table *> table.entry[table_index(addr, 3)]
    if table == NULL:
        return NULL
    table = <const Table *> table.entry[table_index(addr, 2)]
    if table == NULL:
        return NULL
    return <Table *> table.entry[table_index(addr, 1)]


cdef inline u64 *pte_find(const Table *root, u64 addr) noexcept nogil:
    cdef Table *leaf = leaf_find(root, addr)
    return &leaf.entry[table_index(addr, 0)] if leaf != NULL else NULL


cdef inline Table *table_child(Table *table, u64 index) noexcept nogil:
    cdef Table *child = <Table *> table.entry[index]
    if likely(child != NULL):
        return child
    child = table_new()
    if child != NULL:
        atomic_store(&table.entry[index], <u64> child)      # a device may be walking
        table.used += 1
    return child


cdef inline void leaf_drop(Table *root, u64 addr) noexcept nogil:
    """Free the tables above `addr` that have become empty."""
    cdef Table *path[4]
    cdef int level
    path[3] = root
    for level in range(3, 0, -1):
        path[level - 1] = <Table *> path[level].entry[table_index(addr, level)]
        if path[level - 1] == NULL:
            break
    else:
        level = 0
    if unlikely(root.used & TABLES_STAY):
        return
    # `level` is now where the path ends: 0 at a leaf
    while level < 3 and path[level].used == 0:
        free(path[level])
        level += 1
        path[level].entry[table_index(addr, level)] = 0
        path[level].used -= 1


cdef inline Table *leaf_make(Table *root, u64 addr) noexcept nogil:
    """The leaf that covers `addr`, made if need be; NULL: no memory, nothing changed."""
    cdef Table *upper = table_child(root, table_index(addr, 3))
    cdef Table *middle = table_child(upper, table_index(addr, 2)) if upper != NULL else NULL
    cdef Table *leaf = table_child(middle, table_index(addr, 1)) if middle != NULL else NULL
    if unlikely(leaf == NULL):
        leaf_drop(root, addr)
    return leaf


cdef inline Table *leaf_next(const Table *root, u64 *addr, u64 end, u64 *stop) noexcept nogil:
    """
    The first leaf at or after *addr and below `end`, or NULL; *addr moves up to where it begins, if it moves.  *stop: where
    its part of the range ends.
    """
    cdef const Table *table
    cdef int level
    while addr[0] < end:
        table = root
        level = 3
        while level > 0:
            table = <const Table *> table.entry[table_index(addr[0], level)]
            if table == NULL:
                break
            level -= 1
        if level == 0:
            stop[0] = leaf_end(addr[0]) if leaf_end(addr[0]) < end else end
            return <Table *> table
        # nothing in this entry of `level`: on to the next one
        addr[0] = ((addr[0] >> (PAGE_SHIFT + 9 * level)) + 1) << (PAGE_SHIFT + 9 * level)
    return NULL


cdef inline void pte_set(Table *leaf, u64 index, u64 pte) noexcept nogil:
    """Into an empty entry."""
    check(leaf.entry[index] == 0)
    leaf.entry[index] = pte
    leaf.used += 1


cdef inline void table_free(Table *table, int level) noexcept nogil:
    """The tables, not what their entries refer to."""
    cdef u64 i
    if table == NULL:
        return
    if level > 0 and table.used:
        for i in range(512):
            if table.entry[i]:
                table_free(<Table *> table.entry[i], level - 1)
    free(table)
