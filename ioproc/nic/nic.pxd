# A NIC with an MMU of its own: contexts, the translations in NIC memory, the cache before them, and a device access.
#
# Nic.lock covers all of it.  Order: MM.lock, Nic.lock, then those of registration caches.  A device access takes Nic.lock and
# never MM.lock: it looks its translation up, and while it moves bytes it is counted as in flight; an invalidating callback
# drops translations and then waits for the accesses in flight (`wait_for_flights`).
#
# A translation is a word like a page-table entry's: page frame number, PTE_PRESENT, PTE_WRITE, PTE_ZERO, PTE_SPECIAL.
from libc.stdint cimport int64_t as i64, uint32_t as u32, uint64_t as u64
from libc.stdlib cimport realloc
from ioproc.hooks.chain cimport ioproc_ops, unlikely
from ioproc.hooks.interval cimport Interval
from ioproc.nic.registration_cache cimport RegCache
from ioproc.nic.translation_cache cimport KEY_PAGE, Cache, cache_drop, cache_get, cache_put
from ioproc.pthread cimport pthread_cond_broadcast, pthread_cond_t, pthread_cond_wait, pthread_mutex_t
from ioproc.vm.mm cimport (
    MM, PAGE_SHIFT, PAGE_SIZE, PTE_PRESENT, PTE_SPECIAL, PTE_USER, PTE_WRITE, PTE_ZERO, TASK_SIZE, Precopy, Table)
from ioproc.vm.page_table cimport leaf_drop, leaf_find, leaf_make, leaf_next, pte_set, table_index
from ioproc.vm.truth cimport truth

cdef enum Translation:
    FAULT                       # the NIC faults, the driver loads
    PRELOAD                     # update hooks load as well
    PRELOAD_REGISTERED          # a registration loads
    PIN                         # a registration pins, for one transfer
    PIN_CACHE                   # and stays
    PIN_CACHE_HOOKS             # until an invalidation
    BOUNCE                      # copies through a buffer of the NIC's own
    TRANSLATIONS

cdef enum NicPlacement:
    AT_NONE
    AT_MM
    AT_VMA
    AT_INTERVAL
    NIC_PLACEMENTS

cdef enum ForkWay:
    FORK_POSTED                 # nobody tells
    FORK_REVISED                # wrprotect_page
    FORK_INHERIT                # and the child is attached as its parent
    FORK_PRECOPY                # the child has copies of registered pages at once
    FORK_WAYS

cdef enum:
    NOTED_VIOLATIONS = 256
    WORD_BITS = PTE_PRESENT | PTE_SPECIAL | PTE_ZERO        # that a word has of the page-table entry
    WORD_PRELOADED = 0x800      # by an update hook, and not yet used

cdef extern from * nogil:
    """
    #define IOPROC_KEY_HUGE (1ULL << 39)
    """
    const u64 KEY_HUGE "IOPROC_KEY_HUGE"

cdef struct NicCounts:          # in the order of NIC_COUNTS in nic.pyx
    u64 transfers
    u64 bytes
    u64 lookups
    u64 hits
    u64 misses
    u64 walks
    u64 faults
    u64 loaded
    u64 prefaulted
    u64 preloaded
    u64 callbacks
    u64 useful
    u64 invalidations
    u64 shootdowns
    u64 invalidated
    u64 downgraded
    u64 evicted
    u64 attachments
    u64 registrations
    u64 registered_pages
    u64 deregistrations
    u64 deregistered_pages
    u64 regcache_hits           # these two and `precopied` in `context_counts`
    u64 regcache_misses
    u64 pinned
    u64 pinned_peak
    u64 copied_bytes
    u64 retries
    u64 precopied
    u64 errors
    u64 violations
    u64 violations_frame
    u64 violations_permission

cdef struct Loaded:             # a translation in NIC memory
    u64 key
    u64 word
    NicContext *context
    u32 older                   # by when it was last asked for past the cache
    u32 newer

cdef struct NotedViolation:
    u64 context                 # its number
    int placement
    int translation
    int fork
    u64 addr
    bint write
    bint frame                  # another frame than the page table's; else only a permission it does not give

cdef struct Attachment:         # an interval notifier of a context
    Interval interval
    NicContext *context

cdef struct NicContext:            # one process on one NIC
    NIC *nic
    MM *mm                      # held
    u64 number                  # << 40: its part of a key
    Table *index                # addr -> its number in Nic.entries
    Table *huge_index           # of 2 MiB translations, shifted as MM.huge
    u64 nhuge
    int placement
    int translation
    int fork
    u64 prefault                # pages a fault loads at most
    ioproc_ops ops
    Precopy precopy
    u64 gone                    # detached, or its process ended; changes under MM.lock and Nic.lock
    u64 phase                   # the access in flight counts in flights[phase & 1]
    u64 flights[2]
    bint awaited                # somebody waits for those of the phase before
    RegCache registered
    bint has_registered
    bint registering            # pins, under the lock of the address space
    u64 max_regions             # 0: no limit
    u64 max_bytes
    Attachment **attachments    # by address, disjoint
    u64 nattachments
    u64 attachments_room
    u64 bounce_pages
    u64 *bounce                 # their frames
    bint careless               # for tests: establishes without asking whether an invalidation came between
    NicCounts counts
    NicContext *next               # of the NIC's

cdef struct NIC:
    pthread_mutex_t lock
    pthread_cond_t landed       # an access in flight that somebody waits for has ended
    Cache *cache
    Loaded *entries              # entries[0] is the end of both lists below
    u64 room
    u64 used                    # entries in use, or free and once used
    u64 live                    # in use
    u64 limit                   # NIC memory, in translations; 0: none
    u32 free_entries            # linked by `newer`
    bint huge                   # 2 MiB translations
    NicContext *contexts
    u64 attached                # contexts so far
    NicCounts gone              # of those that are no more
    u64 pinned                  # pages, now
    u64 pinned_peak
    NotedViolation noted[NOTED_VIOLATIONS]      # the first
    u64 nnoted


cdef inline void count_pinned(NicContext *context, u64 pages) noexcept nogil:
    """So many more, which may be negative.  Nic.lock is held."""
    cdef NIC *nic = context.nic
    context.counts.pinned += pages
    if <i64> pages > 0 and context.counts.pinned > context.counts.pinned_peak:
        context.counts.pinned_peak = context.counts.pinned
    nic.pinned += pages
    if <i64> pages > 0 and nic.pinned > nic.pinned_peak:
        nic.pinned_peak = nic.pinned


# ---- translations in NIC memory.  Nic.lock is held.

cdef inline u64 context_key(const NicContext *context, u64 addr, bint huge) noexcept nogil:
    return context.number << 40 | (KEY_HUGE | addr >> 21 if huge else addr >> PAGE_SHIFT)


cdef inline void entry_unlink(NIC *nic, u32 number) noexcept nogil:
    cdef Loaded *entry = &nic.entries[number]
    nic.entries[entry.older].newer = entry.newer
    nic.entries[entry.newer].older = entry.older


cdef inline void entry_link(NIC *nic, u32 number) noexcept nogil:
    """As the one asked for last."""
    cdef Loaded *entry = &nic.entries[number]
    entry.older = nic.entries[0].older
    entry.newer = 0
    nic.entries[entry.older].newer = number
    nic.entries[0].older = number


cdef inline u32 entry_find(const NicContext *context, u64 addr) noexcept nogil:
    """The number of the translation of `addr`, of either size; 0: none."""
    cdef const Table *leaf = leaf_find(context.index, addr)
    cdef u64 number = leaf.entry[table_index(addr, 0)] if leaf != NULL else 0
    if number == 0 and context.nhuge:
        leaf = leaf_find(context.huge_index, addr >> 9)
        number = leaf.entry[table_index(addr >> 9, 0)] if leaf != NULL else 0
    return <u32> number


cdef inline void entry_free(NIC *nic, u32 number) noexcept nogil:
    """It is out of its context's index."""
    cdef Loaded *entry = &nic.entries[number]
    cache_drop(nic.cache, entry.key)
    entry_unlink(nic, number)
    entry.context = NULL
    entry.newer = nic.free_entries
    nic.free_entries = number
    nic.live -= 1


cdef inline void entry_drop(NIC *nic, u32 number) noexcept nogil:
    cdef Loaded *entry = &nic.entries[number]
    cdef NicContext *context = entry.context
    cdef bint huge = entry.key & KEY_HUGE != 0
    cdef Table *root = context.huge_index if huge else context.index
    cdef u64 at = (entry.key & KEY_PAGE) << PAGE_SHIFT
    cdef Table *leaf = leaf_find(root, at)
    leaf.entry[table_index(at, 0)] = 0
    leaf.used -= 1
    context.nhuge -= huge
    if leaf.used == 0:
        leaf_drop(root, at)
    entry_free(nic, number)


cdef inline u32 entry_take(NIC *nic) noexcept nogil:
    """A free one; with NIC memory full, that of the translation not asked for the longest.  0: no memory."""
    cdef u32 number
    cdef u64 room
    cdef Loaded *moved
    if nic.limit and nic.live == nic.limit:
        number = nic.entries[0].newer
        nic.entries[number].context.counts.evicted += 1
        entry_drop(nic, number)
    number = nic.free_entries
    if number:
        nic.free_entries = nic.entries[number].newer
    else:
        if nic.used + 1 == nic.room:
            room = 2 * nic.room
            moved = <Loaded *> realloc(nic.entries, room * sizeof(Loaded)) if room <= 1ULL << 32 else NULL
            if moved == NULL:
                return 0
            nic.entries = moved
            nic.room = room
        nic.used += 1
        number = <u32> nic.used
    nic.live += 1
    return number


cdef inline bint context_load(NicContext *context, u64 addr, u64 word, bint huge) noexcept nogil:
    """
    The NIC translates the page of `addr` so from now on.  `huge`: 2 MiB, where the NIC can; `word` is that of the page's 4 KiB at
    `addr`.  False: no memory, and it has none.
    """
    cdef NIC *nic = context.nic
    cdef Table *root
    cdef Table *leaf
    cdef u64 at, i
    cdef u32 number
    huge = huge and nic.huge
    if huge:
        word -= ((addr >> PAGE_SHIFT) & 511) << PAGE_SHIFT
    at = addr >> 9 if huge else addr
    root = context.huge_index if huge else context.index
    leaf = leaf_find(root, at)
    i = table_index(at, 0)
    if leaf != NULL and leaf.entry[i]:
        number = <u32> leaf.entry[i]
        if nic.entries[number].word != word:
            nic.entries[number].word = word
            cache_drop(nic.cache, nic.entries[number].key)
        return True
    number = entry_take(nic)                # first: it may take away the table's last
    if number == 0:
        return False
    leaf = leaf_make(root, at)
    if leaf == NULL:
        nic.entries[number].newer = nic.free_entries
        nic.free_entries = number
        nic.live -= 1
        return False
    pte_set(leaf, i, number)
    context.nhuge += huge
    nic.entries[number].key = context_key(context, addr, huge)
    nic.entries[number].word = word
    nic.entries[number].context = context
    entry_link(nic, number)
    return True


cdef inline u64 context_drop_in(NicContext *context, Table *root, u64 start, u64 end) noexcept nogil:
    """Of one size; costs by what there is, not by the length of the range.  How many."""
    cdef u64 addr = start
    cdef u64 begin, stop, i
    cdef u64 dropped = 0
    cdef u64 cleared
    cdef Table *leaf
    while True:
        leaf = leaf_next(root, &addr, end, &stop)
        if leaf == NULL:
            return dropped
        begin = addr
        cleared = 0
        for i in range(table_index(addr, 0), table_index(addr, 0) + ((stop - addr) >> PAGE_SHIFT)):
            if leaf.entry[i]:
                entry_free(context.nic, <u32> leaf.entry[i])
                leaf.entry[i] = 0
                cleared += 1
        leaf.used -= cleared
        dropped += cleared
        if leaf.used == 0:
            leaf_drop(root, begin)
        addr = stop


cdef inline u64 context_drop(NicContext *context, u64 start, u64 end) noexcept nogil:
    """Every translation that overlaps the range.  How many."""
    cdef u64 dropped = context_drop_in(context, context.index, start, end)
    cdef u64 huge = 0
    if context.nhuge:
        huge = context_drop_in(context, context.huge_index, (start >> 21) << PAGE_SHIFT,
                               ((end + (1 << 21) - 1) >> 21) << PAGE_SHIFT)
        context.nhuge -= huge
    return dropped + huge


cdef inline u64 context_restrict_in(NicContext *context, Table *root, u64 start, u64 end) noexcept nogil:
    cdef u64 addr = start
    cdef u64 stop, i
    cdef u64 restricted = 0
    cdef Loaded *entry
    cdef Table *leaf
    while True:
        leaf = leaf_next(root, &addr, end, &stop)
        if leaf == NULL:
            return restricted
        for i in range(table_index(addr, 0), table_index(addr, 0) + ((stop - addr) >> PAGE_SHIFT)):
            entry = &context.nic.entries[leaf.entry[i]]
            if leaf.entry[i] and entry.word & PTE_WRITE:
                entry.word &= ~<u64> PTE_WRITE
                cache_drop(context.nic.cache, entry.key)
                restricted += 1
        addr = stop


cdef inline u64 context_restrict(NicContext *context, u64 start, u64 end) noexcept nogil:
    """No translation of the range may be used for writing any more.  How many lost that."""
    cdef u64 restricted = context_restrict_in(context, context.index, start, end)
    if context.nhuge:
        restricted += context_restrict_in(context, context.huge_index, (start >> 21) << PAGE_SHIFT,
                                          ((end + (1 << 21) - 1) >> 21) << PAGE_SHIFT)
    return restricted


cdef inline void wait_for_flights(NicContext *context) noexcept nogil:
    """Until every access that began before has ended: what was dropped is in use no more."""
    cdef u64 phase
    while context.awaited:                  # one at a time, or the one that comes second would not wait for the first's
        pthread_cond_wait(&context.nic.landed, &context.nic.lock)
    phase = context.phase & 1
    if context.flights[phase]:
        context.awaited = True
        context.phase += 1
        while context.flights[phase]:
            pthread_cond_wait(&context.nic.landed, &context.nic.lock)
        context.awaited = False
        pthread_cond_broadcast(&context.nic.landed)


# ---- a device access

cdef inline void violation(NicContext *context, u64 addr, bint write, bint frame) noexcept nogil:
    cdef NotedViolation *noted = &context.nic.noted[context.nic.nnoted]
    if context.nic.nnoted < NOTED_VIOLATIONS:
        context.nic.nnoted += 1
        noted.context = context.number
        noted.placement = context.placement
        noted.translation = context.translation
        noted.fork = context.fork
        noted.addr = addr
        noted.write = write
        noted.frame = frame
    context.counts.violations += 1
    context.counts.violations_frame += frame
    context.counts.violations_permission += not frame


cdef inline void audit(NicContext *context, u64 addr, u64 word, bint write) noexcept nogil:
    """The oracle: does the page table, at this moment, give the device what its translation gives it?"""
    cdef u64 pte
    if unlikely(addr >= TASK_SIZE):         # a bounce buffer
        return
    pte = truth(context.mm, addr)
    if unlikely(not pte & PTE_PRESENT or (pte ^ word) & ~<u64> 0xfff or (pte ^ word) & (PTE_SPECIAL | PTE_ZERO)):
        violation(context, addr, write, True)
    elif unlikely(not pte & PTE_USER or (write and not pte & PTE_WRITE)):
        violation(context, addr, write, False)


cdef inline u64 device_translate(NicContext *context, u64 addr, bint write, bint again) noexcept nogil:
    """
    The word that the NIC would use for an access of 4 KiB at `addr`, audited; 0: it must ask the driver.  `again`: for the same
    page, after the driver answered.  Nic.lock is held.
    """
    cdef NIC *nic = context.nic
    cdef u64 key = context_key(context, addr, False)
    cdef u64 word = 0
    cdef bint hit = cache_get(nic.cache, key, &word)
    cdef Loaded *entry
    cdef u32 number
    if not hit and context.nhuge:
        hit = cache_get(nic.cache, context_key(context, addr, True), &word)
        if hit:
            word += ((addr >> PAGE_SHIFT) & 511) << PAGE_SHIFT
    if not again:
        context.counts.lookups += 1
        context.counts.hits += hit
        context.counts.misses += not hit
    if not hit:
        number = entry_find(context, addr)
        if number == 0:
            return 0
        entry = &nic.entries[number]
        if entry.word & WORD_PRELOADED:
            entry.word &= ~<u64> WORD_PRELOADED
            context.counts.useful += 1
        if not again:
            context.counts.walks += 1
        entry_unlink(nic, number)
        entry_link(nic, number)
        word = entry.word
        cache_put(nic.cache, entry.key, word)
        if entry.key & KEY_HUGE:
            word += ((addr >> PAGE_SHIFT) & 511) << PAGE_SHIFT
    if write and not word & PTE_WRITE:
        return 0
    audit(context, addr, word, write)
    return word
