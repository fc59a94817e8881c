# Huge pages: 2 MiB each, from a pool of their own.
#
# They have a page table of their own, MM.huge: walked with an address shifted right by 9, it maps 2 MiB with an entry, and
# nothing that goes over 4 KiB pages sees it.  Page caches of huge files are indexed in the same way.
#
# mmap reserves pages: Memory.huge_reserved of those free belong to mappings that have not faulted them in yet.  A shared
# mapping's are noted in its file (HUGE_RESERVED).  A private one's are its owner's (VM_RESERVED: not a child's): one for each
# entry that is empty or maps the page cache, unless it has HUGE_SPENT: its page went to another, and none is reserved.
from libc.stdint cimport uint32_t as u32, uint64_t as u64
from libc.stdlib cimport free
from ioproc.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from ioproc.vm.frames cimport Frame
from ioproc.vm.mm cimport (
    MM, OWNER_ANON, PAGE_SHIFT, PAGE_SIZE, PTE_PRESENT, PTE_SPECIAL, VM_RESERVED, Memory, Table, VMArea, atomic_load,
    atomic_store, atomic_sub, check)
from ioproc.vm.page_table cimport leaf_drop, leaf_next, pte_find, table_index
from ioproc.vm.vma cimport vma_at

cdef enum:
    HUGE_SHIFT = 21
    HUGE_SIZE = 0x200000
    HUGE_PAGES = 512            # pages of 4 KiB in a huge one
    HUGE_RESERVED = 1           # in a file's page cache: no page yet
    HUGE_SPENT = PTE_SPECIAL

cdef extern from * nogil:
    """
    #define IOPROC_HUGE_MASK (~0x1fffffULL)
    """
    const u64 HUGE_MASK "IOPROC_HUGE_MASK"


cdef inline u64 huge_align(u64 length) noexcept nogil:
    return (length + HUGE_SIZE - 1) & HUGE_MASK


cdef inline Frame *huge_frame(const Memory *mem, u64 pfn) noexcept nogil:
    """`pfn`: of any 4 KiB page in it."""
    check(pfn - mem.huge_pfn < mem.nhuge << 9)
    return &mem.huge[(pfn - mem.huge_pfn) >> 9]


cdef inline Frame *frame_any(const Memory *mem, u64 pfn) noexcept nogil:
    """Of a page of either size; NULL: there is none."""
    if pfn <= mem.nframes:
        return &mem.frames[pfn]
    if mem.huge_pfn <= pfn and pfn < mem.huge_pfn + (mem.nhuge << 9):
        return huge_frame(mem, pfn)
    return NULL


cdef inline u64 *huge_entry(const Table *root, u64 addr) noexcept nogil:
    """Of a page table of huge pages, perhaps NULL, or of a huge file's page cache."""
    return pte_find(root, addr >> 9) if root != NULL else NULL


cdef inline u64 huge_lookup(const MM *mm, u64 addr) noexcept nogil:
    """The entry that a 4 KiB page of a huge page would have, 0 if there is none."""
    cdef u64 *pte = huge_entry(mm.huge, addr)
    if pte == NULL or not pte[0] & PTE_PRESENT:
        return 0
    return (pte[0] & ~<u64> HUGE_SPENT) + ((addr & (HUGE_SIZE - 1)) >> PAGE_SHIFT << PAGE_SHIFT)


cdef inline u64 huge_take(Memory *mem, bint reserved) noexcept nogil:
    """A page, 0 if there is none but reserved ones; with `reserved` one of these.  Memory.lock is held."""
    if reserved:
        mem.huge_reserved -= 1
    elif mem.huge_free == mem.huge_reserved:
        return 0
    mem.huge_free -= 1
    return mem.huge_pfn + (<u64> mem.huge_stack[mem.huge_free] << 9)


cdef inline void huge_give(Memory *mem, u64 pfn) noexcept nogil:
    """Nobody maps or references any page of it any more.  Memory.lock is held."""
    cdef Frame *frame = huge_frame(mem, pfn)
    free(frame.contents)
    frame.contents = NULL
    frame.counts = 0
    atomic_store(&frame.owner, 0)
    mem.huge_stack[mem.huge_free] = <u32> ((pfn - mem.huge_pfn) >> 9)
    mem.huge_free += 1


cdef inline bint huge_put(Memory *mem, u64 pfn, u64 count, bint reserve) noexcept nogil:
    """One mapping or one reference less, as `count` says.  True: the page is free, and with `reserve` reserved."""
    if atomic_sub(&huge_frame(mem, pfn).counts, count) != 0:
        return False
    pthread_mutex_lock(&mem.lock)
    huge_give(mem, pfn)
    if reserve:
        mem.huge_reserved += 1
    pthread_mutex_unlock(&mem.lock)
    return True


cdef inline void zap_huge_range(MM *mm, u64 start, u64 end) noexcept nogil:
    """Unmap every huge page of [start, end)."""
    cdef u64 at = start >> 9
    cdef u64 stop, begin, pte, i
    cdef bint owned
    cdef const VMArea *vma
    cdef Table *leaf
    while True:
        leaf = leaf_next(mm.huge, &at, end >> 9, &stop)
        if leaf == NULL:
            return
        begin = at
        while at < stop:
            i = table_index(at, 0)
            pte = leaf.entry[i]
            if pte & PTE_PRESENT:
                vma = vma_at(mm, at << 9)
                # what the owner's reservation was spent on is reserved again, if nobody else has it
                owned = (vma.flags & VM_RESERVED
                         and atomic_load(&huge_frame(mm.mem, pte >> PAGE_SHIFT).owner) & OWNER_ANON)
                leaf.entry[i] = pte & HUGE_SPENT
                if not huge_put(mm.mem, pte >> PAGE_SHIFT, 1, owned) and owned:
                    leaf.entry[i] = HUGE_SPENT
                leaf.used -= leaf.entry[i] == 0
            at += PAGE_SIZE
        if leaf.used == 0:
            leaf_drop(mm.huge, begin)
