# The device's translation cache: keys to values, in sets of so many ways.  Whose lock covers it is its owner's affair.
#
# A narrow set, of at most 16 ways, is looked through at once: a byte of every key's hash side by side, and the order of the
# ways as the digits of one word.  A wide one, up to fully associative, finds keys by a hash table and keeps a ring as its order.
# Either way the order begins with what has to stay longest, and free ways are at its end.
from libc.stdint cimport uint8_t as u8, uint32_t as u32, uint64_t as u64
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from ioproc.hooks.chain cimport likely, unlikely

cdef extern from * nogil:
    """
    #define IOPROC_LOWEST(mask) ((uint64_t) __builtin_ctzll(mask))
    #ifdef __SSE2__
    #include <emmintrin.h>
    static inline uint32_t ioproc_equal_bytes(const uint8_t *bytes, uint8_t byte) {
        __m128i all = _mm_loadu_si128((const __m128i *) bytes);
        return (uint32_t) _mm_movemask_epi8(_mm_cmpeq_epi8(all, _mm_set1_epi8((char) byte)));
    }
    #else
    static inline uint32_t ioproc_equal_bytes(const uint8_t *bytes, uint8_t byte) {
        uint32_t mask = 0;
        for (int i = 0; i < 16; i++)
            mask |= (uint32_t) (bytes[i] == byte) << i;
        return mask;
    }
    #endif
    """
    u64 lowest "IOPROC_LOWEST"(u64 mask)                                    # number of the lowest bit set
    u32 equal_bytes "ioproc_equal_bytes"(const u8 *bytes, u8 byte)          # a bit for each of 16 bytes

cdef enum:
    CACHE_LRU = 0
    CACHE_RANDOM = 1
    CACHE_FIFO = 2

cdef enum:
    NARROW_WAYS = 16

cdef extern from * nogil:
    """
    #define IOPROC_CACHE_NONE (~0ULL)
    #define IOPROC_CACHE_ORDER 0xfedcba9876543210ULL
    #define IOPROC_CACHE_DIGIT 0x1111111111111111ULL
    #define IOPROC_CACHE_PAGE ((1ULL << 39) - 1)
    #define IOPROC_CACHE_HASH 0x9e3779b97f4a7c15ULL
    #define IOPROC_CACHE_RANDOM 0x2545f4914f6cdd1dULL
    """
    const u64 NO_ENTRY "IOPROC_CACHE_NONE"
    const u64 FIRST_ORDER "IOPROC_CACHE_ORDER"      # way 0 first, 15 last
    const u64 EVERY_DIGIT "IOPROC_CACHE_DIGIT"
    const u64 KEY_PAGE "IOPROC_CACHE_PAGE"          # what of a key decides its set
    const u64 KEY_HASH "IOPROC_CACHE_HASH"          # 2**64 by the golden ratio
    const u64 RANDOM_MULTIPLIER "IOPROC_CACHE_RANDOM"

cdef struct CacheEntry:
    u64 key                     # 0: free
    u64 value

cdef struct NarrowSet:
    u8 tags[16]                 # of the entries' keys; a free way's says nothing
    u64 order                   # ways, four bits each, the lowest first

cdef struct RingEntry:
    u32 newer, older            # in the set's ring, where the newest comes after the oldest
    u32 chained                 # next of the same bucket, plus one

cdef struct Cache:
    CacheEntry *entries         # set by set
    NarrowSet *narrow           # NULL: wide, with the following
    RingEntry *ring
    u32 *newest                 # by set
    u32 *buckets                # first entry, plus one
    u64 bucket_shift            # of a key's hash
    u64 sets
    u64 mask                    # sets - 1, if a power of two
    u64 ways
    u64 last                    # the shift of the last digit of a narrow set's order
    u64 used                    # entries
    u64 random
    int policy
    bint masked


cdef inline u64 key_hash(u64 key) noexcept nogil:
    return key * KEY_HASH


cdef inline u8 key_tag(u64 key) noexcept nogil:
    return <u8> (key_hash(key) >> 56)


cdef inline u64 key_set(const Cache *cache, u64 key) noexcept nogil:
    if likely(cache.masked):
        return key & cache.mask
    return (key & KEY_PAGE) % cache.sets


# ---- order of a narrow set

cdef inline u64 order_until(u64 order, u64 way) noexcept nogil:
    """All bits through the way's digit: the lowest that is zero after the exclusive or; below it nothing borrows."""
    cdef u64 digits = order ^ way * EVERY_DIGIT
    cdef u64 zeros = (digits - EVERY_DIGIT) & ~digits & EVERY_DIGIT << 3
    return zeros ^ zeros - 1


cdef inline u64 order_first(u64 order, u64 way) noexcept nogil:
    """The order with `way` in front: the digits before its own go up by one."""
    return order ^ (order ^ (order << 4 | way)) & order_until(order, way)


cdef inline u64 order_last(u64 order, u64 way, u64 last) noexcept nogil:
    """The order with `way` at the end, where `last` is the shift: the digits after its own go down by one."""
    cdef u64 from_its_own = ~(order_until(order, way) >> 4)
    cdef u64 until_last = (16ULL << last) - 1
    return order ^ (order ^ ((order & until_last) >> 4 | way << last)) & from_its_own & until_last


# ---- ring and hash table of wide sets

cdef inline void ring_join(Cache *cache, u64 set, u64 entry) noexcept nogil:
    """Take an entry, not the newest, to where the oldest meets the newest."""
    cdef RingEntry *ring = cache.ring
    cdef u32 newest = cache.newest[set]
    cdef u32 oldest = ring[newest].newer
    if oldest == entry:
        return
    ring[ring[entry].newer].older = ring[entry].older
    ring[ring[entry].older].newer = ring[entry].newer
    ring[entry].newer = oldest
    ring[entry].older = newest
    ring[oldest].older = <u32> entry
    ring[newest].newer = <u32> entry


cdef inline u32 *cache_bucket(const Cache *cache, u64 key) noexcept nogil:
    return &cache.buckets[key_hash(key) >> cache.bucket_shift]


cdef inline void bucket_add(Cache *cache, u64 key, u64 entry) noexcept nogil:
    cdef u32 *bucket = cache_bucket(cache, key)
    cache.ring[entry].chained = bucket[0]
    bucket[0] = <u32> (entry + 1)


cdef inline void bucket_remove(Cache *cache, u64 key, u64 entry) noexcept nogil:
    cdef u32 *at = cache_bucket(cache, key)
    while at[0] != entry + 1:
        at = &cache.ring[at[0] - 1].chained
    at[0] = cache.ring[entry].chained


# ---- either

cdef inline u64 cache_find(const Cache *cache, u64 set, u64 key) noexcept nogil:
    """The number of the key's entry, or NO_ENTRY."""
    cdef u64 first = set * cache.ways
    cdef u64 candidates, at
    if likely(cache.narrow != NULL):
        candidates = equal_bytes(cache.narrow[set].tags, key_tag(key))
        while candidates:
            at = first + lowest(candidates)
            if likely(cache.entries[at].key == key):
                return at
            candidates &= candidates - 1
        return NO_ENTRY
    at = cache_bucket(cache, key)[0]
    while at:
        if cache.entries[at - 1].key == key:
            return at - 1
        at = cache.ring[at - 1].chained
    return NO_ENTRY


cdef inline void cache_first(Cache *cache, u64 set, u64 entry) noexcept nogil:
    """The entry is the newest of its set."""
    if likely(cache.narrow != NULL):
        cache.narrow[set].order = order_first(cache.narrow[set].order, entry - set * cache.ways)
    elif cache.newest[set] != entry:
        ring_join(cache, set, entry)
        cache.newest[set] = <u32> entry


cdef inline void cache_last(Cache *cache, u64 set, u64 entry) noexcept nogil:
    """The entry is the oldest of its set."""
    if likely(cache.narrow != NULL):
        cache.narrow[set].order = order_last(cache.narrow[set].order, entry - set * cache.ways, cache.last)
    elif cache.newest[set] == entry:
        cache.newest[set] = cache.ring[entry].older
    else:
        ring_join(cache, set, entry)


cdef inline u64 cache_random(Cache *cache) noexcept nogil:
    """A way (xorshift64*; George Marsaglia, Sebastiano Vigna)."""
    cdef u64 x = cache.random
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    cache.random = x
    return (x * RANDOM_MULTIPLIER >> 32) * cache.ways >> 32


cdef inline u64 narrow_insert(Cache *cache, u64 set, u64 key, u64 value) noexcept nogil:
    cdef NarrowSet *ways = &cache.narrow[set]
    cdef CacheEntry *entries = &cache.entries[set * cache.ways]
    cdef u64 way = ways.order >> cache.last & 15
    cdef u64 evicted
    if unlikely(cache.policy == CACHE_RANDOM) and entries[way].key:
        way = cache_random(cache)
    evicted = entries[way].key
    entries[way].key = key
    entries[way].value = value
    ways.tags[way] = key_tag(key)
    ways.order = order_first(ways.order, way)
    return evicted


cdef inline u64 narrow_access(const Cache *cache, u64 set, u64 key, u64 *evicted) noexcept nogil:
    """
    1: a hit; 0: a miss, and the key is put in.  CACHE_LRU, no values, and `used` is the caller's to count.  It does not branch
    on which it was: over a stream that is what costs most, because nothing can predict it.
    """
    cdef NarrowSet *ways = &cache.narrow[set]
    cdef CacheEntry *entries = &cache.entries[set * cache.ways]
    cdef u64 oldest = 1ULL << 16 + (ways.order >> cache.last & 15)
    cdef u64 candidates = equal_bytes(ways.tags, key_tag(key))
    cdef u64 way = lowest(candidates | oldest) & 15
    cdef u64 hit = entries[way].key == key
    while unlikely(candidates & hit - 1):           # it was another with the same tag
        candidates &= candidates - 1
        way = lowest(candidates | oldest) & 15
        hit = entries[way].key == key
    evicted[0] = entries[way].key & hit - 1
    entries[way].key = key
    ways.tags[way] = key_tag(key)
    ways.order = order_first(ways.order, way)
    return hit


cdef inline u64 wide_insert(Cache *cache, u64 set, u64 key, u64 value) noexcept nogil:
    cdef u64 entry = cache.ring[cache.newest[set]].newer
    cdef u64 evicted = cache.entries[entry].key
    if unlikely(cache.policy == CACHE_RANDOM) and evicted:
        entry = set * cache.ways + cache_random(cache)
        evicted = cache.entries[entry].key
    if evicted:
        bucket_remove(cache, evicted, entry)
    cache.entries[entry].key = key
    cache.entries[entry].value = value
    bucket_add(cache, key, entry)
    cache_first(cache, set, entry)
    return evicted


cdef inline u64 cache_insert(Cache *cache, u64 set, u64 key, u64 value) noexcept nogil:
    """Insert a key that is not there.  The key that had to go, or 0."""
    cdef u64 evicted
    if likely(cache.narrow != NULL):
        evicted = narrow_insert(cache, set, key, value)
    else:
        evicted = wide_insert(cache, set, key, value)
    if unlikely(not evicted):
        cache.used += 1
    return evicted


# ---- the interface.  A key is not 0; see key_set

cdef inline bint cache_get(Cache *cache, u64 key, u64 *value) noexcept nogil:
    """A hit is its set's newest from now on, under CACHE_LRU."""
    cdef u64 set = key_set(cache, key)
    cdef u64 entry = cache_find(cache, set, key)
    if entry == NO_ENTRY:
        return False
    if cache.policy == CACHE_LRU:
        cache_first(cache, set, entry)
    value[0] = cache.entries[entry].value
    return True


cdef inline u64 cache_put(Cache *cache, u64 key, u64 value) noexcept nogil:
    """Insert, or replace the value.  The key that had to go, or 0."""
    cdef u64 set = key_set(cache, key)
    cdef u64 entry = cache_find(cache, set, key)
    if entry == NO_ENTRY:
        return cache_insert(cache, set, key, value)
    cache.entries[entry].value = value
    return 0


cdef inline bint cache_drop(Cache *cache, u64 key) noexcept nogil:
    """Was it there?"""
    cdef u64 set = key_set(cache, key)
    cdef u64 entry = cache_find(cache, set, key)
    if entry == NO_ENTRY:
        return False
    cache_last(cache, set, entry)
    if cache.narrow == NULL:
        bucket_remove(cache, key, entry)
    cache.entries[entry].key = 0
    cache.used -= 1
    return True


cdef inline void cache_clear(Cache *cache) noexcept nogil:
    cdef u64 set, i
    cdef u64 n = cache.sets * cache.ways
    memset(cache.entries, 0, n * sizeof(CacheEntry))
    cache.used = 0
    if cache.narrow != NULL:
        for set in range(cache.sets):
            cache.narrow[set].order = FIRST_ORDER
        return
    memset(cache.buckets, 0, (1ULL << 64 - cache.bucket_shift) * sizeof(u32))
    for set in range(cache.sets):
        cache.newest[set] = <u32> (set * cache.ways)
    for i in range(n):          # within a set the next is older, and the last meets the first
        cache.ring[i].older = <u32> (i + 1 if (i + 1) % cache.ways else i + 1 - cache.ways)
        cache.ring[i].newer = <u32> (i - 1 if i % cache.ways else i + cache.ways - 1)


cdef inline void cache_free(Cache *cache) noexcept nogil:
    if cache != NULL:
        free(cache.entries)
        free(cache.narrow)
        free(cache.ring)
        free(cache.newest)
        free(cache.buckets)
        free(cache)


cdef inline Cache *cache_new(u64 entries, u64 ways, int policy, u64 seed) noexcept nogil:
    """`entries` below 2**32, a multiple of `ways`; 0 ways: as many as entries.  NULL: no memory."""
    cdef Cache *cache = <Cache *> calloc(1, sizeof(Cache))
    if cache == NULL:
        return NULL
    cache.ways = ways if ways else entries
    cache.sets = entries // cache.ways
    cache.mask = cache.sets - 1
    cache.masked = not cache.sets & cache.mask
    cache.policy = policy
    cache.random = key_hash(seed + 1) | 1           # not 0
    # free ones at the end: a set with fewer ways than tags also looks at those behind it
    cache.entries = <CacheEntry *> calloc(entries + NARROW_WAYS, sizeof(CacheEntry))
    if cache.ways <= NARROW_WAYS:
        cache.last = 4 * (cache.ways - 1)
        cache.narrow = <NarrowSet *> calloc(cache.sets, sizeof(NarrowSet))
    else:
        cache.bucket_shift = 63
        while 1ULL << 64 - cache.bucket_shift < entries:
            cache.bucket_shift -= 1
        cache.ring = <RingEntry *> malloc(entries * sizeof(RingEntry))
        cache.newest = <u32 *> malloc(cache.sets * sizeof(u32))
        cache.buckets = <u32 *> malloc((1ULL << 64 - cache.bucket_shift) * sizeof(u32))
    if (cache.entries == NULL or cache.narrow == NULL
            and (cache.ring == NULL or cache.newest == NULL or cache.buckets == NULL)):
        cache_free(cache)
        return NULL
    cache_clear(cache)
    return cache
