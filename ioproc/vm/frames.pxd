# Physical frames: allocation in batches, mapping counts, contents.
from libc.stdint cimport uint32_t as u32, uint64_t as u64
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from ioproc.hooks.chain cimport likely, unlikely
from ioproc.pthread cimport pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
from ioproc.vm.mm cimport (
    OWNER_ANON, OWNER_DIRTY, PAGE_SIZE, POOL_FRAMES, POOLS, Frame, Memory, Pool, atomic_add, atomic_load, atomic_or,
    atomic_store, atomic_sub, check)

cdef enum:
    BATCH = 64
    POOL_FILL = 512

cdef extern from * nogil:
    """
    #define IOPROC_ONE_REFERENCE (1ULL << 32)
    #define IOPROC_MAPCOUNT(counts) ((counts) & 0xffffffffULL)
    #define IOPROC_REFERENCES(counts) ((counts) >> 32)
    #define IOPROC_RARE(x) __builtin_expect_with_probability(!!(x), 0, 1.0)
    """
    const u64 ONE_REFERENCE "IOPROC_ONE_REFERENCE"
    u64 mapcount_of "IOPROC_MAPCOUNT"(u64 counts)
    u64 references_of "IOPROC_REFERENCES"(u64 counts)
    bint rare "IOPROC_RARE"(bint)           # once in a batch: what follows is called, not put into the loop

# Frames on their way between a pool and one operation, so that its lock is taken once per batch.
cdef struct FrameBatch:
    Memory *mem
    u64 alone                   # the counts of a frame that nobody else can reach (see below)
    u64 wanted                  # frames the operation may still need: never take more
    u64 n
    u64 nfreed
    u32 pfn[BATCH]
    u32 freed[BATCH]


cdef inline Frame *frame_at(const Memory *mem, u64 pfn) noexcept nogil:
    check(pfn <= mem.nframes)
    return &mem.frames[pfn]


# ---- the pools: every thread has one, perhaps with others.  What is too much for a pool, and what was never used, is the
# Memory's; a thread that finds nothing there takes from the other pools.  Locks: Memory.lock, a pool's, Memory.pool_lock.

cdef extern from * nogil:
    """
    static unsigned ioproc_pools_used;
    static __thread unsigned ioproc_pool __attribute__((tls_model("initial-exec")));   /* this thread's, and one; 0: none yet */
    static inline unsigned ioproc_pool_number(void)
    {
        if (__builtin_expect(!ioproc_pool, 0))
            ioproc_pool = __atomic_fetch_add(&ioproc_pools_used, 1, __ATOMIC_RELAXED) % 16 + 1;
        return ioproc_pool - 1;
    }
    """
    u32 pool_number "ioproc_pool_number"()


cdef inline Pool *pool_make(Memory *mem, u32 number) noexcept nogil:
    """With no memory for it: the first, which every Memory has from the start; then NULL."""
    cdef Pool *pool = <Pool *> malloc(sizeof(Pool))
    if pool == NULL:
        return mem.pools[0]
    pthread_mutex_init(&pool.lock, NULL)
    pool.n = 0
    pthread_mutex_lock(&mem.pool_lock)
    if mem.pools[number] == NULL:
        atomic_store(<u64 *> &mem.pools[number], <u64> pool)
        pool = NULL
    pthread_mutex_unlock(&mem.pool_lock)
    free(pool)
    return mem.pools[number]


cdef inline Pool *pool_mine(Memory *mem) noexcept nogil:
    cdef u32 number = pool_number()
    cdef Pool *pool = <Pool *> atomic_load(<u64 *> &mem.pools[number])
    return pool if likely(pool != NULL) else pool_make(mem, number)


cdef inline void pool_fill(Memory *mem, Pool *pool) noexcept nogil:
    """From what no pool has.  The pool has fewer than a batch and is locked."""
    cdef u64 count, i
    pthread_mutex_lock(&mem.pool_lock)
    count = mem.nreturned if mem.nreturned < POOL_FILL else POOL_FILL
    mem.nreturned -= count
    memcpy(&pool.pfn[pool.n], mem.returned + mem.nreturned, count * sizeof(u32))
    pool.n += count
    if count == 0:                          # never used ones, to be taken in ascending order
        count = mem.nframes + 1 - mem.fresh
        if count > POOL_FILL:
            count = POOL_FILL
        for i in range(count):
            pool.pfn[pool.n + count - 1 - i] = <u32> (mem.fresh + i)
        pool.n += count
        atomic_store(&mem.fresh, mem.fresh + count)
    pthread_mutex_unlock(&mem.pool_lock)


cdef inline u64 pool_steal(Memory *mem, u32 *pfns, u64 n) noexcept nogil:
    """Up to `n` frames of any pools; how many."""
    cdef u64 got = 0
    cdef u64 count
    cdef Pool *pool
    cdef int i
    for i in range(POOLS):
        pool = <Pool *> atomic_load(<u64 *> &mem.pools[i])
        if pool != NULL:
            pthread_mutex_lock(&pool.lock)
            count = n - got if n - got < pool.n else pool.n
            pool.n -= count
            memcpy(pfns + got, &pool.pfn[pool.n], count * sizeof(u32))
            pthread_mutex_unlock(&pool.lock)
            got += count
    return got


cdef inline u64 pool_get(Memory *mem, u32 *pfns, u64 n) noexcept nogil:
    """Up to `n` free frames, at most a batch, to be used from the last; how many: fewer only if there are no more."""
    cdef Pool *pool = pool_mine(mem)
    cdef u64 count
    pthread_mutex_lock(&pool.lock)
    if unlikely(pool.n < n):
        pool_fill(mem, pool)
    count = n if n < pool.n else pool.n
    pool.n -= count
    memcpy(pfns, &pool.pfn[pool.n], count * sizeof(u32))
    pthread_mutex_unlock(&pool.lock)
    if unlikely(count < n):
        count += pool_steal(mem, pfns + count, n - count)
    return count


cdef inline u64 pool_take(Memory *mem) noexcept nogil:
    """One frame, 0 if there is none."""
    cdef u32 pfn
    return pfn if pool_get(mem, &pfn, 1) else 0


cdef inline void pool_give(Memory *mem, const u32 *pfns, u64 n) noexcept nogil:
    """At most a batch."""
    cdef Pool *pool = pool_mine(mem)
    cdef u64 many = POOL_FRAMES // 2
    pthread_mutex_lock(&pool.lock)
    if unlikely(pool.n + n > POOL_FRAMES):
        pthread_mutex_lock(&mem.pool_lock)
        pool.n -= many
        memcpy(mem.returned + mem.nreturned, &pool.pfn[pool.n], many * sizeof(u32))
        mem.nreturned += many
        pthread_mutex_unlock(&mem.pool_lock)
    memcpy(&pool.pfn[pool.n], pfns, n * sizeof(u32))
    pool.n += n
    pthread_mutex_unlock(&pool.lock)


cdef inline u64 frames_free(Memory *mem) noexcept nogil:
    """How many, now; exact if nobody takes or returns any."""
    cdef u64 total
    cdef Pool *pool
    cdef int i
    pthread_mutex_lock(&mem.pool_lock)
    total = mem.nreturned + mem.nframes + 1 - mem.fresh
    pthread_mutex_unlock(&mem.pool_lock)
    for i in range(POOLS):
        pool = <Pool *> atomic_load(<u64 *> &mem.pools[i])
        if pool != NULL:
            pthread_mutex_lock(&pool.lock)
            total += pool.n
            pthread_mutex_unlock(&pool.lock)
    return total


cdef inline u64 frames_alone(const Memory *mem) noexcept nogil:
    """What `counts` is where a plain store will do: one mapping; with devices, never."""
    return 0 if atomic_load(&mem.devices) else 1


cdef inline void batch_begin(FrameBatch *batch, Memory *mem, u64 wanted) noexcept nogil:
    batch.mem = mem
    batch.alone = frames_alone(mem)
    batch.wanted = wanted
    batch.n = 0
    batch.nfreed = 0


cdef inline void batch_refill(FrameBatch *batch) noexcept nogil:
    cdef u64 count = batch.wanted if batch.wanted < BATCH else BATCH
    if count == 0:
        count = 1
    if batch.nfreed:
        pool_give(batch.mem, batch.freed, batch.nfreed)
        batch.nfreed = 0
    count = pool_get(batch.mem, batch.pfn, count)
    batch.n = count
    batch.wanted -= count if count < batch.wanted else batch.wanted


cdef inline u64 batch_take(FrameBatch *batch) noexcept nogil:
    """One frame for the operation, 0 if there is none."""
    if rare(batch.n == 0):
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
    if batch.nfreed:
        pool_give(batch.mem, batch.freed, batch.nfreed)
    if batch.n:
        pool_give(batch.mem, batch.pfn, batch.n)
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
    if rare(batch.nfreed == BATCH):
        batch_return(batch)
    batch.freed[batch.nfreed] = <u32> pfn
    batch.nfreed += 1


cdef inline void batch_end(FrameBatch *batch) noexcept nogil:
    if batch.n or batch.nfreed:
        batch_return(batch)


# Counts.  A frame whose only count is one mapping can be reached by nobody but the address space that maps it, and its
# lock is held: there a plain store will do, unless there are devices.  Every other change is atomic.
cdef inline void frame_map_again(Frame *frame, u64 alone) noexcept nogil:
    if likely(atomic_load(&frame.counts) == alone):
        atomic_store(&frame.counts, 2)
    else:
        atomic_add(&frame.counts, 1)


cdef inline void frame_unmap(FrameBatch *batch, u64 pfn) noexcept nogil:
    cdef Frame *frame = frame_at(batch.mem, pfn)
    cdef u64 left = 0
    if atomic_load(&frame.counts) != batch.alone:
        left = atomic_sub(&frame.counts, 1)
    if left == 0:                           # one place: else it is too long to be inlined
        batch_free(batch, pfn)
    elif unlikely(mapcount_of(left) == 0) and atomic_load(&frame.owner) & OWNER_ANON:
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
    # another address space may be making it at this moment, for its first write
    cdef const char *contents = <const char *> atomic_load(<const u64 *> &source.contents)
    if contents == NULL:
        return True
    to.contents = <char *> malloc(PAGE_SIZE)
    if to.contents == NULL:
        return False
    memcpy(to.contents, contents, PAGE_SIZE)
    return True
