# Swap slots, the swap cache, and where a page of a file is while it has no frame.
#
# A slot counts the page-table entries that refer to it.  While it has some and one of them was mapped again, the frame
# stays known to the slot (the swap cache holds one reference), so that the others find the same frame.
from libc.stdint cimport uint32_t as u32, uint64_t as u64
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from ioproc.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from ioproc.vm.frames cimport ONE_REFERENCE, FrameBatch, frame_at, frame_put
from ioproc.vm.mm cimport PAGE_SHIFT, PAGE_SIZE, PTE_SWAP, Frame, Memory, Slot, atomic_add

# An entry of FileCache.pages: a pfn, or one of these.
cdef extern from * nogil:
    """
    #define IOPROC_CACHE_DISK (1ULL << 63)      /* in the backing store: the rest is a pointer to the contents */
    #define IOPROC_CACHE_SLOT (1ULL << 62)      /* shared memory, swapped out: the rest is a slot */
    #define IOPROC_CACHE_PFN(entry) ((entry) >> 62 ? 0 : (entry))
    """
    const u64 CACHE_DISK "IOPROC_CACHE_DISK"
    const u64 CACHE_SLOT "IOPROC_CACHE_SLOT"
    u64 cache_pfn "IOPROC_CACHE_PFN"(u64 entry)             # 0: the page has no frame


cdef inline u64 swap_pte(u64 slot, u64 exclusive) noexcept nogil:
    return slot << PAGE_SHIFT | PTE_SWAP | exclusive


# ---- Memory.lock is held

cdef inline u64 slot_take(Memory *mem) noexcept nogil:
    """A free slot, 0 if there is none."""
    cdef u64 n = 0
    if mem.nfree_slots:
        mem.nfree_slots -= 1
        n = mem.free_slots[mem.nfree_slots]
    elif mem.fresh_slot <= mem.nslots:
        n = mem.fresh_slot
        mem.fresh_slot += 1
    if n:
        mem.swap_used += 1
    return n


cdef inline void slot_give(Memory *mem, u64 n) noexcept nogil:
    free(mem.slots[n].contents)
    mem.slots[n].contents = NULL
    mem.slots[n].count = 0
    mem.free_slots[mem.nfree_slots] = <u32> n
    mem.nfree_slots += 1
    mem.swap_used -= 1


cdef inline void slot_cache(Memory *mem, u64 n, u64 pfn) noexcept nogil:
    """The frame has the slot's contents: remember it, with a reference."""
    mem.slots[n].pfn = <u32> pfn
    mem.slot_of[pfn] = <u32> n
    atomic_add(&mem.frames[pfn].counts, ONE_REFERENCE)


cdef inline u64 slot_put(Memory *mem, u64 n) noexcept nogil:
    """One entry fewer refers to the slot.  The frame of the swap cache if that ends now: the caller drops its reference."""
    cdef Slot *slot = &mem.slots[n]
    cdef u64 pfn = slot.pfn
    slot.count -= 1
    if slot.count:
        return 0
    if pfn:
        slot.pfn = 0
        mem.slot_of[pfn] = 0
    slot_give(mem, n)
    return pfn


cdef inline bint slot_copy(const Memory *mem, u64 n, Frame *to) noexcept nogil:
    """The slot's contents into a frame without any.  False: no memory."""
    cdef const char *contents = mem.slots[n].contents
    if contents == NULL:
        return True
    to.contents = <char *> malloc(PAGE_SIZE)
    if to.contents == NULL:
        return False
    memcpy(to.contents, contents, PAGE_SIZE)
    return True


cdef inline const char *cache_contents(const Memory *mem, u64 entry) noexcept nogil:
    """Of a page of a file, wherever it is; NULL: zeros."""
    if entry & CACHE_DISK:
        return <const char *> (entry & ~CACHE_DISK)
    if entry & CACHE_SLOT:
        return mem.slots[entry & ~CACHE_SLOT].contents
    return mem.frames[entry].contents if entry else NULL


cdef inline void cache_entry_forget(Memory *mem, u64 entry) noexcept nogil:
    """A page of a file that has no frame is gone for good."""
    if entry & CACHE_DISK:
        free(<void *> (entry & ~CACHE_DISK))
    elif entry & CACHE_SLOT:
        slot_put(mem, entry & ~CACHE_SLOT)


# ---- Memory.lock is taken here

cdef inline void swap_entry_copied(Memory *mem, u64 pte) noexcept nogil:
    """fork copies a swap entry."""
    pthread_mutex_lock(&mem.lock)
    mem.slots[pte >> PAGE_SHIFT].count += 1
    pthread_mutex_unlock(&mem.lock)


cdef inline void swap_entry_dropped(FrameBatch *batch, u64 pte) noexcept nogil:
    cdef u64 pfn
    pthread_mutex_lock(&batch.mem.lock)
    pfn = slot_put(batch.mem, pte >> PAGE_SHIFT)
    pthread_mutex_unlock(&batch.mem.lock)
    if pfn:
        frame_put(batch, pfn)
