# What the page table says at this moment, for who has no lock: the oracle of device accesses.
#
# The tables of an address space that a device is attached to stay where they are, even empty, until it ends; so they can be
# walked while others change them, and each entry is one word.
from libc.stdint cimport uint64_t as u64
from ioproc.vm.huge cimport HUGE_SPENT
from ioproc.vm.mm cimport MM, PAGE_SHIFT, PTE_PRESENT
from ioproc.vm.page_table cimport TABLES_STAY, table_new

cdef extern from * nogil:
    """
    /* The VM's own stores are plain words, as are a kernel's: nothing for ThreadSanitizer. */
    #if defined(__SANITIZE_THREAD__)
    __attribute__((no_sanitize_thread, noinline))
    #endif
    static uint64_t ioproc_walk(const void *root, uint64_t addr)
    {
        const uint64_t *table = (const uint64_t *)root;
        int level;
        for (level = 3; table && level > 0; level--)
            table = (const uint64_t *)__atomic_load_n(&table[(addr >> (12 + 9 * level)) & 511], __ATOMIC_ACQUIRE);
        return table ? __atomic_load_n(&table[(addr >> 12) & 511], __ATOMIC_RELAXED) : 0;
    }
    """
    u64 walk_unlocked "ioproc_walk"(const void *root, u64 addr)


cdef inline bint tables_stay(MM *mm) noexcept nogil:
    """From now on; the lock is held.  False: no memory."""
    if mm.huge == NULL:
        mm.huge = table_new()
        if mm.huge == NULL:
            return False
    mm.root.used |= TABLES_STAY
    mm.huge.used |= TABLES_STAY
    return True


cdef inline u64 truth(const MM *mm, u64 addr) noexcept nogil:
    """The entry of the 4 KiB page at `addr`, as if of a huge page's part if it is one; 0: none that is present."""
    cdef u64 pte = walk_unlocked(mm.root, addr)
    if pte & PTE_PRESENT:
        return pte
    pte = walk_unlocked(mm.huge, addr >> 9) & ~<u64> HUGE_SPENT
    return pte + (((addr >> PAGE_SHIFT) & 511) << PAGE_SHIFT) if pte & PTE_PRESENT else 0
