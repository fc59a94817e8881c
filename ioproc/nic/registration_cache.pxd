# A registration cache: ranges of memory that stay registered with a device after use, for whoever communicates from them next.
# Knows neither devices nor address spaces: two callbacks register and deregister.
#
# Regions in the cache are disjoint.  The index is a sorted array of leaves, each a sorted array of up to LEAF_REGIONS regions:
# of many regions, a look-up finds one leaf out of the processor's cache, and then the region itself.
#
# The lock is never held while a callback runs.  A range that is being registered is announced (Pending): who wants any of it
# waits for that to end, and an invalidation, which must not wait, only marks it, to be registered again.
from libc.errno cimport EAGAIN, EDEADLOCK, EINTR, EINVAL, ENOMEM, ESHUTDOWN
from libc.stdint cimport UINT64_MAX, int64_t as i64, uint32_t as u32, uint64_t as u64
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove, memset
from ioproc.hooks.chain cimport likely, unlikely
from ioproc.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_self, pthread_t)
from ioproc.vm.mm cimport check

cdef enum:
    REGION_READ = 1             # what the device may do
    REGION_WRITE = 2
    LEAF_REGIONS = 32
    REGISTER_ATTEMPTS = 100     # of a range that is invalidated each time

cdef struct Region:
    u64 start
    u64 end
    void *handle                # of register_range
    u32 access                  # REGION_*
    u32 refs                    # gets that were not put yet
    bint cached                 # found by look-ups; else it is deregistered with its last put
    bint listed                 # in the order of use
    Region *older               # by the last put
    Region *newer               # of a region that has left: the next to deregister

cdef struct LeafEntry:
    u64 start                   # UINT64_MAX: not used
    Region *region

cdef struct Leaf:
    LeafEntry entry[32]         # in address order
    u64 n

cdef struct Pending:            # a registration that is going on
    u64 start
    u64 end
    pthread_t thread
    bint stale                  # its range was invalidated meanwhile
    Pending *next

cdef struct RegCacheCounts:
    u64 hits
    u64 misses
    u64 merges                  # misses whose region took in others
    u64 registrations
    u64 deregistrations
    u64 evictions               # regions that left for the limits
    u64 invalidations           # regions that left by regcache_invalidate
    u64 deferred                # regions that left while they were in use
    u64 regions                 # now in the cache
    u64 bytes                   # of these
    u64 in_use                  # regions with references, in the cache or not

cdef struct RegCache:
    int (*register_range)(void *arg, u64 start, u64 end, u32 access, void **handle) noexcept nogil      # 0 or negative errno
    void (*deregister_range)(void *arg, u64 start, u64 end, void *handle) noexcept nogil
    void *arg
    u64 max_regions             # UINT64_MAX: no limit
    u64 max_bytes
    bint limited
    u64 alignment               # a power of two
    bint merge
    bint defer                  # an invalidation leaves deregistering to the next get, put or flush
    pthread_mutex_t lock        # of what follows
    bint closed
    u64 *first                  # of each leaf, the start of its first region
    Leaf **leaf
    u64 leaves
    u64 room                    # for leaves
    Leaf *spare                 # so that no insertion can fail half-way
    Region *oldest              # the order of use, kept if limited.  Of those in use too: eviction takes them out, a put in again
    Region *newest
    Region *left                # to be deregistered later
    Pending *pending
    pthread_cond_t registered   # a registration has ended
    RegCacheCounts counts


# ---- index

cdef inline u64 leaf_at(const RegCache *cache, u64 addr) noexcept nogil:
    """The last leaf that does not begin above `addr`, or the first.  No branch: where it is, is anyone's guess."""
    cdef const u64 *at = cache.first
    cdef u64 n = cache.leaves
    cdef u64 half
    while n > 1:
        half = n >> 1
        at = &at[half] if at[half] <= addr else at
        n -= half
    return at - cache.first


cdef inline u64 not_above(const LeafEntry *entry, u64 i, u64 addr) noexcept nogil:
    return entry[i].start <= addr


cdef inline u64 leaf_slot(const Leaf *leaf, u64 addr) noexcept nogil:
    """The last entry that does not start above `addr`, or the first."""
    cdef const LeafEntry *entry = &leaf.entry[0]
    cdef u64 i = 4 * (not_above(entry, 4, addr) + not_above(entry, 8, addr) + not_above(entry, 12, addr)
                      + not_above(entry, 16, addr) + not_above(entry, 20, addr) + not_above(entry, 24, addr)
                      + not_above(entry, 28, addr))
    return i + not_above(entry, i + 1, addr) + not_above(entry, i + 2, addr) + not_above(entry, i + 3, addr)


cdef inline Region *region_below(const RegCache *cache, u64 addr) noexcept nogil:
    """The last region that does not start above `addr` (it may end below it), or NULL."""
    cdef const LeafEntry *entry
    cdef const Leaf *leaf
    if cache.leaves == 0:
        return NULL
    leaf = cache.leaf[leaf_at(cache, addr)]
    entry = &leaf.entry[leaf_slot(leaf, addr)]
    return entry.region if entry.start <= addr else NULL


cdef inline Region *region_above(const RegCache *cache, u64 addr) noexcept nogil:
    """The first region that does not start below `addr`, or NULL."""
    cdef const Leaf *leaf
    cdef u64 i, at
    if cache.leaves == 0:
        return NULL
    i = leaf_at(cache, addr)
    leaf = cache.leaf[i]
    at = leaf_slot(leaf, addr)
    at += leaf.entry[at].start < addr
    if at < leaf.n:
        return leaf.entry[at].region
    return cache.leaf[i + 1].entry[0].region if i + 1 < cache.leaves else NULL


cdef inline bint index_reserve(RegCache *cache) noexcept nogil:
    """Room for one more region.  False: no memory."""
    cdef u64 room
    cdef void *moved
    if cache.spare == NULL:
        cache.spare = <Leaf *> malloc(sizeof(Leaf))
        if cache.spare == NULL:
            return False
    if cache.leaves < cache.room:
        return True
    room = 2 * cache.room if cache.room else 16
    moved = realloc(cache.first, room * sizeof(u64))
    if moved == NULL:
        return False
    cache.first = <u64 *> moved
    moved = realloc(cache.leaf, room * sizeof(void *))
    if moved == NULL:
        return False
    cache.leaf = <Leaf **> moved
    cache.room = room
    return True


cdef inline void leaf_move(Leaf *leaf, u64 n, const LeafEntry *entries, u64 moved) noexcept nogil:
    """The leaf has its first `n` entries, and then these."""
    cdef u64 i
    memmove(&leaf.entry[n], entries, moved * sizeof(LeafEntry))
    leaf.n = n + moved
    for i in range(leaf.n, <u64> LEAF_REGIONS):
        leaf.entry[i].start = UINT64_MAX


cdef inline Leaf *leaf_insert(RegCache *cache, u64 i) noexcept nogil:
    """The spare leaf becomes leaf `i`: still empty."""
    cdef Leaf *leaf = cache.spare
    memmove(&cache.first[i + 1], &cache.first[i], (cache.leaves - i) * sizeof(u64))
    memmove(&cache.leaf[i + 1], &cache.leaf[i], (cache.leaves - i) * sizeof(void *))
    cache.spare = NULL
    cache.leaf[i] = leaf
    cache.leaves += 1
    leaf_move(leaf, 0, leaf.entry, 0)
    return leaf


cdef inline void leaf_erase(RegCache *cache, u64 i) noexcept nogil:
    free(cache.spare)
    cache.spare = cache.leaf[i]
    cache.leaves -= 1
    memmove(&cache.first[i], &cache.first[i + 1], (cache.leaves - i) * sizeof(u64))
    memmove(&cache.leaf[i], &cache.leaf[i + 1], (cache.leaves - i) * sizeof(void *))


cdef inline void index_insert(RegCache *cache, Region *region) noexcept nogil:
    """After index_reserve."""
    cdef u64 i = 0
    cdef u64 at = 0
    cdef u64 half = LEAF_REGIONS >> 1
    cdef Leaf *leaf
    if cache.leaves == 0:
        leaf = leaf_insert(cache, 0)
    else:
        i = leaf_at(cache, region.start)
        leaf = cache.leaf[i]
        at = leaf_slot(leaf, region.start)
        at += leaf.entry[at].start < region.start
    if leaf.n == LEAF_REGIONS:
        if at == LEAF_REGIONS:              # addresses that only rise leave full leaves behind
            half = at
        leaf_move(leaf_insert(cache, i + 1), 0, &leaf.entry[half], LEAF_REGIONS - half)
        leaf_move(leaf, half, leaf.entry, 0)
        cache.first[i + 1] = cache.leaf[i + 1].entry[0].start
        if at >= half:
            i += 1
            at -= half
            leaf = cache.leaf[i]
    leaf_move(leaf, at + 1, &leaf.entry[at], leaf.n - at)
    leaf.entry[at].start = region.start
    leaf.entry[at].region = region
    cache.first[i] = leaf.entry[0].start


cdef inline void index_erase(RegCache *cache, const Region *region) noexcept nogil:
    cdef u64 i = leaf_at(cache, region.start)
    cdef Leaf *leaf = cache.leaf[i]
    cdef u64 at = leaf_slot(leaf, region.start)
    check(leaf.entry[at].region == region)
    if leaf.n == 1:
        leaf_erase(cache, i)
        return
    leaf_move(leaf, at, &leaf.entry[at + 1], leaf.n - at - 1)
    cache.first[i] = leaf.entry[0].start


# ---- order of use

cdef inline void region_unlist(RegCache *cache, Region *region) noexcept nogil:
    if region.older != NULL:
        region.older.newer = region.newer
    else:
        cache.oldest = region.newer
    if region.newer != NULL:
        region.newer.older = region.older
    else:
        cache.newest = region.older
    region.listed = False


cdef inline void region_list(RegCache *cache, Region *region) noexcept nogil:
    """It was used last."""
    if region == cache.newest:
        return
    if region.listed:
        region_unlist(cache, region)
    region.older = cache.newest
    region.newer = NULL
    if cache.newest != NULL:
        cache.newest.newer = region
    else:
        cache.oldest = region
    cache.newest = region
    region.listed = True


# ---- leaving

cdef inline void region_discard(RegCache *cache, Region *region, Region **left) noexcept nogil:
    """Nobody uses it: to be deregistered."""
    cache.counts.deregistrations += 1
    region.newer = left[0]
    left[0] = region


cdef inline void region_leave(RegCache *cache, Region *region, Region **left) noexcept nogil:
    """Out of the cache: to be deregistered, by its last put if it is in use."""
    index_erase(cache, region)
    if region.listed:
        region_unlist(cache, region)
    region.cached = False
    cache.counts.regions -= 1
    cache.counts.bytes -= region.end - region.start
    if region.refs:
        cache.counts.deferred += 1
    else:
        region_discard(cache, region, left)


cdef inline u64 regions_leave(RegCache *cache, u64 start, u64 end, bint unused, Region **left) noexcept nogil:
    """All that overlap the range, or those of them that are `unused`; the highest first, which is cheapest.  How many."""
    cdef Region *region = region_below(cache, end - 1)
    cdef u64 n = 0
    cdef u64 next
    while region != NULL and region.end > start:
        next = region.start
        if not (unused and region.refs):
            region_leave(cache, region, left)
            n += 1
        region = region_below(cache, next - 1) if next else NULL
    return n


cdef inline bint regcache_is_full(const RegCache *cache) noexcept nogil:
    return cache.counts.regions > cache.max_regions or cache.counts.bytes > cache.max_bytes


cdef inline void regcache_evict(RegCache *cache, Region **left) noexcept nogil:
    """Until the limits are kept, or only regions in use are left."""
    cdef Region *region
    while regcache_is_full(cache) and cache.oldest != NULL:
        region = cache.oldest
        if region.refs:
            region_unlist(cache, region)
        else:
            region_leave(cache, region, left)
            cache.counts.evictions += 1


cdef inline void regcache_deregister(RegCache *cache, Region *left) noexcept nogil:
    """Without the lock."""
    cdef Region *region
    while left != NULL:
        region = left
        left = region.newer
        cache.deregister_range(cache.arg, region.start, region.end, region.handle)
        free(region)


# ---- the cache

cdef inline int regcache_init(
        RegCache *cache, int (*register_range)(void *, u64, u64, u32, void **) noexcept nogil,
        void (*deregister_range)(void *, u64, u64, void *) noexcept nogil, void *arg,
        u64 max_regions, u64 max_bytes, u64 alignment, bint merge, bint defer) noexcept nogil:
    """No limit where it is 0.  0, or -EINVAL: `alignment` is no power of two."""
    if alignment == 0 or alignment & (alignment - 1):
        return -EINVAL
    memset(cache, 0, sizeof(RegCache))
    cache.register_range = register_range
    cache.deregister_range = deregister_range
    cache.arg = arg
    cache.max_regions = max_regions if max_regions else UINT64_MAX
    cache.max_bytes = max_bytes if max_bytes else UINT64_MAX
    cache.limited = max_regions or max_bytes
    cache.alignment = alignment
    cache.merge = merge
    cache.defer = defer
    pthread_mutex_init(&cache.lock, NULL)
    pthread_cond_init(&cache.registered, NULL)
    return 0


cdef inline Region *regcache_find(const RegCache *cache, u64 start, u64 end, u32 access) noexcept nogil:
    """The region that has the whole range with these rights, or NULL."""
    cdef Region *region = region_below(cache, start)
    if region != NULL and end <= region.end and access & ~region.access == 0:
        return region
    return NULL


cdef inline Region *region_hold(RegCache *cache, Region *region) noexcept nogil:
    cache.counts.hits += 1
    cache.counts.in_use += region.refs == 0
    region.refs += 1
    return region


cdef inline Region *regcache_hit(RegCache *cache, u64 start, u64 end, u32 access) noexcept nogil:
    """A get that calls nobody and waits for nobody.  NULL: a miss, or there is something to deregister first."""
    cdef Region *region = NULL
    pthread_mutex_lock(&cache.lock)
    if likely(cache.left == NULL):
        region = regcache_find(cache, start, end, access)
        if region != NULL:
            region_hold(cache, region)
    pthread_mutex_unlock(&cache.lock)
    return region


cdef inline bint regcache_extend(const RegCache *cache, Region *made) noexcept nogil:
    """Take in every region that overlaps or touches the range, and their rights.  Whether there is any."""
    cdef Region *region = region_below(cache, made.end)
    cdef bint any = False
    while region != NULL and region.end > made.end:
        made.end = region.end
        region = region_below(cache, made.end)
    while region != NULL and region.end >= made.start:
        any = True
        made.access |= region.access
        made.start = min(made.start, region.start)
        region = region_below(cache, region.start - 1) if region.start else NULL
    return any


cdef inline Pending *pending_in(const RegCache *cache, u64 start, u64 end) noexcept nogil:
    cdef Pending *pending = cache.pending
    while pending != NULL and not (pending.start < end and start < pending.end):
        pending = pending.next
    return pending


cdef inline void pending_invalidate(RegCache *cache, u64 start, u64 end) noexcept nogil:
    cdef Pending *pending = cache.pending
    while pending != NULL:
        if pending.start < end and start < pending.end:
            pending.stale = True
        pending = pending.next


cdef inline void pending_end(RegCache *cache, const Pending *pending) noexcept nogil:
    cdef Pending **at = &cache.pending
    while at[0] != pending:
        at = &at[0].next
    at[0] = pending.next
    pthread_cond_broadcast(&cache.registered)


cdef inline int regcache_register(RegCache *cache, Pending *pending, Region *made) noexcept nogil:
    """Register the region, with the lock let go meanwhile."""
    cdef int error
    pending.start = made.start
    pending.end = made.end
    pending.thread = pthread_self()
    pending.stale = False
    pending.next = cache.pending
    cache.pending = pending
    pthread_mutex_unlock(&cache.lock)
    error = cache.register_range(cache.arg, made.start, made.end, made.access, &made.handle)
    pthread_mutex_lock(&cache.lock)
    pending_end(cache, pending)
    if not error:
        cache.counts.registrations += 1
    return error


cdef inline void regcache_add(RegCache *cache, Region *made, Region **left) noexcept nogil:
    """After index_reserve: the region is in the cache, and in use; what it covers leaves."""
    cache.counts.merges += regions_leave(cache, made.start, made.end, False, left) != 0
    made.refs = 1
    made.cached = True
    made.listed = False
    index_insert(cache, made)
    cache.counts.in_use += 1
    cache.counts.regions += 1
    cache.counts.bytes += made.end - made.start
    regcache_evict(cache, left)


cdef inline Region *regcache_take_left(RegCache *cache) noexcept nogil:
    """What waits to be deregistered."""
    cdef Region *left = cache.left
    cache.left = NULL
    return left


cdef inline int regcache_miss(RegCache *cache, u64 start, u64 end, u32 access, Region **region) noexcept nogil:
    """
    What regcache_get does when regcache_hit finds nothing.

    Another thread may be registering the range, or have done so; registering may fail for the merged range and not for
    the asked one; and the range may be invalidated before the region is in the cache.
    """
    cdef Region *made = <Region *> malloc(sizeof(Region))
    cdef Region *left = NULL
    cdef Region *found = NULL
    cdef Pending pending
    cdef Pending *other
    cdef bint alone = not cache.merge
    cdef int attempts = 0
    cdef int error = 0
    region[0] = NULL
    if made == NULL:
        return -ENOMEM
    pthread_mutex_lock(&cache.lock)
    while True:
        if cache.left != NULL:
            left = regcache_take_left(cache)
            pthread_mutex_unlock(&cache.lock)
            regcache_deregister(cache, left)
            left = NULL
            pthread_mutex_lock(&cache.lock)
        if cache.closed:
            error = -ESHUTDOWN
            break
        found = regcache_find(cache, start, end, access)
        if found != NULL:
            error = 0                       # that the merged range could not be registered, before somebody else came
            break
        made.start = start & ~(cache.alignment - 1)
        made.end = (end + cache.alignment - 1) & ~(cache.alignment - 1)
        made.access = access
        if not alone and not regcache_extend(cache, made):
            alone = True
        other = pending_in(cache, made.start, made.end)
        if other != NULL:
            if other.thread == pthread_self():
                error = -EDEADLOCK
                break
            pthread_cond_wait(&cache.registered, &cache.lock)
            alone = not cache.merge
            continue
        error = regcache_register(cache, &pending, made)
        if error and error != -EINTR and not alone:
            alone = True
            continue
        if error:
            break
        if not pending.stale and index_reserve(cache):
            regcache_add(cache, made, &left)
            break
        attempts += 1
        cache.counts.deregistrations += 1
        pthread_mutex_unlock(&cache.lock)
        cache.deregister_range(cache.arg, made.start, made.end, made.handle)
        pthread_mutex_lock(&cache.lock)
        if not pending.stale:
            error = -ENOMEM
            break
        if attempts == REGISTER_ATTEMPTS:
            error = -EAGAIN
            break
    if found != NULL:
        region[0] = region_hold(cache, found)
    else:
        cache.counts.misses += 1
        if not error:
            region[0] = made
    pthread_mutex_unlock(&cache.lock)
    regcache_deregister(cache, left)
    if region[0] != made:
        free(made)
    return error


cdef inline int regcache_get(RegCache *cache, u64 start, u64 length, u32 access, Region **region) noexcept nogil:
    """
    A region of the cache that has the whole range with these rights; it stays registered until it is put.

    Registers it if there is none: in one with the regions that overlap or touch it and with their rights, or, should that
    fail, alone.  What the new region covers leaves the cache.  May be called by many threads, not from register_range for a
    range that overlaps.

    0, or a negative errno and `region` NULL: what register_range said, -ENOMEM, -EINVAL (`length` is 0 or passes the end of
    the address space, `access` is no right), -EDEADLOCK (this thread is registering it), -EAGAIN (it was invalidated
    REGISTER_ATTEMPTS times while it was being registered), -ESHUTDOWN (the cache is closed).
    """
    cdef u64 end = start + length
    if length == 0 or end < start or end > <u64> -<i64> cache.alignment or access - 1 > 2:
        region[0] = NULL
        return -EINVAL
    region[0] = regcache_hit(cache, start, end, access)
    return 0 if likely(region[0] != NULL) else regcache_miss(cache, start, end, access, region)


cdef inline void regcache_put(RegCache *cache, Region *region) noexcept nogil:
    """Undo a get."""
    cdef Region *left
    pthread_mutex_lock(&cache.lock)
    check(region.refs != 0)
    left = regcache_take_left(cache)
    region.refs -= 1
    if region.refs == 0:
        cache.counts.in_use -= 1
        if likely(region.cached):
            if cache.limited:
                region_list(cache, region)
                regcache_evict(cache, &left)
        else:
            region_discard(cache, region, &left)
    pthread_mutex_unlock(&cache.lock)
    regcache_deregister(cache, left)


cdef inline u64 regcache_take_out(RegCache *cache, u64 start, u64 end, bint pending) noexcept nogil:
    """`regcache_invalidate`; without `pending` what is just being registered is given out all the same."""
    cdef Region *left = NULL
    cdef u64 n
    if start >= end:
        return 0
    pthread_mutex_lock(&cache.lock)
    if pending:
        pending_invalidate(cache, start, end)
    if cache.defer:
        n = regions_leave(cache, start, end, False, &cache.left)
    else:
        n = regions_leave(cache, start, end, False, &left)
    cache.counts.invalidations += n
    pthread_mutex_unlock(&cache.lock)
    regcache_deregister(cache, left)
    return n


cdef inline u64 regcache_invalidate(RegCache *cache, u64 start, u64 end) noexcept nogil:
    """
    The memory in [start, end) changes: every region that overlaps leaves the cache, and is deregistered now (`defer`: soon) or
    with its last put; what is just being registered will not be given out.  How many left.

    For hooks, under the address space's lock: never waits for a registration.
    """
    return regcache_take_out(cache, start, end, True)


cdef inline void regcache_flush(RegCache *cache) noexcept nogil:
    """Deregister every region that is not in use."""
    cdef Region *left
    pthread_mutex_lock(&cache.lock)
    left = regcache_take_left(cache)
    regions_leave(cache, 0, UINT64_MAX, True, &left)
    pthread_mutex_unlock(&cache.lock)
    regcache_deregister(cache, left)


cdef inline void regcache_close(RegCache *cache) noexcept nogil:
    """Every region leaves; those in use are deregistered with their last put, which may still come.  No more gets."""
    cdef Region *left
    pthread_mutex_lock(&cache.lock)
    cache.closed = True
    pending_invalidate(cache, 0, UINT64_MAX)
    left = regcache_take_left(cache)
    regions_leave(cache, 0, UINT64_MAX, False, &left)
    pthread_mutex_unlock(&cache.lock)
    regcache_deregister(cache, left)


cdef inline void regcache_destroy(RegCache *cache) noexcept nogil:
    """After the last put, when no other thread is in the cache."""
    regcache_close(cache)
    check(cache.counts.in_use == 0)
    free(cache.spare)
    free(cache.first)
    free(cache.leaf)
    pthread_cond_destroy(&cache.registered)
    pthread_mutex_destroy(&cache.lock)
