# Physical frames: allocation in batches, mapping counts, contents.
from libc.stdint cimport uint32_t as u32, uint64_t as u64
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from ioproc.hooks.chain cimport likely, unlikely
from ioproc.vm.mm cimport (
    OWNER_ANON, OWNER_DIRTY, PAGE_SIZE, Frame, Memory, atomic_add, atomic_load, atomic_or, atomic_store, atomic_sub, check,
    pthread_mutex_lock, pthread_mutex_unlock)

cdef enum:
    BATCH = 64

cdef extern from * nogil:
    """
    #define IOPROC_ONE_REFERENCE (1ULL << 32)
    #define IOPROC_MAPCOUNT(counts) ((counts) & 0xffffffffULL)
    #define IOPROC_REFERENCES(counts) ((counts) >> 32)
    """
    const u64 ONE_REFERENCE "IOPROC_ONE_REFERENCE"
    u64 mapcount_of "IOPROC_MAPCOUNT"(u64 counts)
    u64 references_of "IOPROC_REFERENCES"(u64 counts)

# Frames on their way between the pool and one operation, so that its lock is taken once per batch.
cdef struct FrameBatch:
    Memory *mem
    u64 wanted                  # frames the operation may still need: never take more
    u64 n
    u64 nfreed
    u32 pfn[BATCH]
    u32 freed[BATCH]


cdef inline Frame *frame_at(const Memory *mem, u64 pfn) noexcept nogil:
    check(pfn <= mem.nframes)
    return &mem.frames[pfn]


cdef inline u64 pool_take(Memory *mem) noexcept nogil:
    """One frame, 0 if there is none.  Memory.lock is held."""
    if mem.nfree == 0:
        return 0
    mem.nfree -= 1
    if mem.nreturned:
        mem.nreturned -= 1
        return mem.returned[mem.nreturned]
    mem.fresh += 1
    return mem.fresh - 1


cdef inline void pool_give(Memory *mem, const u32 *pfns, u64 n) noexcept nogil:
    """Memory.lock is held."""
    memcpy(mem.returned + mem.nreturned, pfns, n * sizeof(u32))
    mem.nreturned += n
    mem.nfree += n


cdef inline void batch_begin(FrameBatch *batch, Memory *mem, u64 wanted) noexcept nogil:
    batch.mem = mem
    batch.wanted = wanted
    batch.n = 0
    batch.nfreed = 0


cdef inline void batch_refill(FrameBatch *batch) noexcept nogil:
    cdef Memory *mem = batch.mem
    cdef u64 count = batch.wanted if batch.wanted < BATCH else BATCH
    cdef u64 again, i
    if count == 0:
        count = 1
    pthread_mutex_lock(&mem.lock)
    pool_give(mem, batch.freed, batch.nfreed)
    batch.nfreed = 0
    if mem.nfree < count:
        count = mem.nfree
    again = count if count < mem.nreturned else mem.nreturned
    mem.nreturned -= again
    # taken from the end of pfn[]: returned frames first, then fresh ones in ascending order
    memcpy(batch.pfn + (count - again), mem.returned + mem.nreturned, again * sizeof(u32))
    i = count - again
    while i:
        i -= 1
        batch.pfn[i] = <u32> mem.fresh
        mem.fresh += 1
    mem.nfree -= count
    pthread_mutex_unlock(&mem.lock)
    batch.n = count
    batch.wanted -= count if count < batch.wanted else batch.wanted


cdef inline u64 batch_take(FrameBatch *batch) noexcept nogil:
    """One frame for the operation, 0 if there is none."""
    if unlikely(batch.n == 0):
        batch_refill(batch)
        if batch.n == 0:
            return 0
    batch.n -= 1
    return batch.pfn[batch.n]


cdef inline void batch_put_back(FrameBatch *batch, u64 pfn) noexcept nogil:
    """What batch_take gave last was not needed."""
    batch.pfn[batch.n] = <u32> pfn
    batch.n += 1


cdef inline void batch_return(FrameBatch *batch) noexcept nogil:
    pthread_mutex_lock(&batch.mem.lock)
    pool_give(batch.mem, batch.freed, batch.nfreed)
    pool_give(batch.mem, batch.pfn, batch.n)
    pthread_mutex_unlock(&batch.mem.lock)
    batch.nfreed = 0
    batch.n = 0


cdef inline void batch_free(FrameBatch *batch, u64 pfn) noexcept nogil:
    """Nobody maps or references the frame any more."""
    cdef Frame *frame = frame_at(batch.mem, pfn)
    if unlikely(frame.contents != NULL):
        free(frame.contents)
        frame.contents = NULL
    atomic_store(&frame.counts, 0)
    atomic_store(&frame.owner, 0)
    if unlikely(batch.nfreed == BATCH):
        batch_return(batch)
    batch.freed[batch.nfreed] = <u32> pfn
    batch.nfreed += 1


cdef inline void batch_end(FrameBatch *batch) noexcept nogil:
    if batch.n or batch.nfreed:
        batch_return(batch)


# Counts.  A frame whose only count is one mapping can be reached by nobody but the address space that maps it, and its
# lock is held: there a plain store will do.  Every other change is atomic.
cdef inline void frame_map_again(Frame *frame) noexcept nogil:
    if likely(atomic_load(&frame.counts) == 1):
        atomic_store(&frame.counts, 2)
    else:
        atomic_add(&frame.counts, 1)


cdef inline void frame_unmap(FrameBatch *batch, u64 pfn) noexcept nogil:
    cdef Frame *frame = frame_at(batch.mem, pfn)
    cdef u64 left
    if atomic_load(&frame.counts) == 1:
        batch_free(batch, pfn)
        return
    left = atomic_sub(&frame.counts, 1)
    if left == 0:
        batch_free(batch, pfn)
    elif mapcount_of(left) == 0 and atomic_load(&frame.owner) & OWNER_ANON:
        frame_disown(batch, pfn)


cdef inline void frame_disown(FrameBatch *batch, u64 pfn) noexcept nogil:
    """An anonymous page that nobody maps any more: its AnonVMA may go, and what is in swap as well needs no frame."""
    cdef Memory *mem = batch.mem
    cdef Frame *frame = frame_at(mem, pfn)
    cdef u64 slot = 0
    pthread_mutex_lock(&mem.lock)
    if mapcount_of(atomic_load(&frame.counts)) == 0 and atomic_load(&frame.owner) & OWNER_ANON:
        atomic_store(&frame.owner, 0)
        if mem.nslots:
            slot = mem.slot_of[pfn]
            mem.slot_of[pfn] = 0
            mem.slots[slot].pfn = 0
    pthread_mutex_unlock(&mem.lock)
    if slot:
        frame_put(batch, pfn)


cdef inline void frame_put(FrameBatch *batch, u64 pfn) noexcept nogil:
    """Drop one of the references that are no mappings."""
    if atomic_sub(&frame_at(batch.mem, pfn).counts, ONE_REFERENCE) == 0:
        batch_free(batch, pfn)


cdef inline void frame_keep_dirty(Frame *frame) noexcept nogil:
    """A dirty entry that may map a file's page is about to go."""
    cdef u64 owner = atomic_load(&frame.owner)
    if owner and not owner & (OWNER_ANON | OWNER_DIRTY):
        atomic_or(&frame.owner, OWNER_DIRTY)


cdef inline bint frame_copy_contents(Frame *to, const Frame *source) noexcept nogil:
    """False: no memory for a buffer."""
    if source.contents == NULL:
        return True
    to.contents = <char *> malloc(PAGE_SIZE)
    if to.contents == NULL:
        return False
    memcpy(to.contents, source.contents, PAGE_SIZE)
    return True
