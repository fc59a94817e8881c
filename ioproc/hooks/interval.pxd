# Interval notifiers, as Linux has them since 5.5: a device follows one range of an address space instead of all of it, and may
# fault without the address space's lock.  Knows neither address spaces nor devices.
#
# An operation opens a bracket before it takes entries away and closes it when they are gone; between the two the intervals it
# overlaps have been told.  Who loads a translation asks for the sequence first (`interval_read_begin`, which waits while an
# operation is at work there), reads the page table, takes the device's lock, and loads only if nothing came between
# (`interval_read_retry`): else it begins again.
#
#     the loader                              the operation
#         seq = read_begin                        start: interval.seq = the sequence, odd
#         reads the page table                        invalidate: takes the device's lock, drops
#         takes the device's lock                 the entries go
#         read_retry(seq)? begin again            end: the sequence is even
#         loads
#
# The tree is a treap by where intervals begin, in which a node knows where its subtree ends.  It does not change while a
# bracket is open, so that it is walked without a lock: edits wait for the end of the last one.
#
# Intervals.lock is a leaf; no callback runs under it.
from libc.errno cimport EEXIST, EINVAL
from libc.stdint cimport uint64_t as u64
from libc.stdlib cimport calloc, free
from ioproc.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)

cdef extern from * nogil:
    """
    static inline uint64_t ioproc_seq(const uint64_t *seq) { return __atomic_load_n(seq, __ATOMIC_ACQUIRE); }
    static inline void ioproc_seq_set(uint64_t *seq, uint64_t to) { __atomic_store_n(seq, to, __ATOMIC_RELEASE); }
    """
    u64 seq_load "ioproc_seq"(const u64 *seq)
    void seq_store "ioproc_seq_set"(u64 *seq, u64 to)

cdef enum IntervalState:
    INTERVAL_OUT                # not inserted, or removed: its owner's
    INTERVAL_IN                 # in the tree
    INTERVAL_COMING             # to be inserted when the last bracket ends
    INTERVAL_GOING              # in the tree, to be removed when the last bracket ends

cdef struct Interval:           # zeroed by its owner, who then fills in the first five
    u64 start                   # bytes, [start, end)
    u64 end
    # entries in [start, end), which overlaps the interval, are about to go.  Not while Intervals.lock is held
    void (*invalidate)(void *arg, u64 start, u64 end, u64 seq) noexcept nogil
    # NULL: `intervals_remove` waits.  Else it does not, and this is called when no `invalidate` runs or will run
    void (*removed)(void *arg) noexcept nogil
    void *arg
    u64 seq                     # the last invalidation that concerned it: odd; Intervals.seq: going on
    IntervalState state
    u64 priority                # of the treap: no child's is higher
    u64 last                    # where the subtree ends
    Interval *left
    Interval *right
    Interval *next              # of those that wait for the end

cdef struct Intervals:          # of one address space
    pthread_mutex_t lock
    pthread_cond_t quiet        # the last bracket has ended
    Interval *root
    Interval *deferred          # COMING and GOING
    u64 active                  # brackets open
    u64 seq                     # odd: some interval is being invalidated, or is COMING
    u64 random


# ---- the treap

cdef inline bint interval_before(const Interval *a, const Interval *b) noexcept nogil:
    return a.start < b.start or (a.start == b.start and a < b)


cdef inline void interval_update(Interval *node) noexcept nogil:
    """From its children."""
    node.last = node.end
    if node.left != NULL and node.left.last > node.last:
        node.last = node.left.last
    if node.right != NULL and node.right.last > node.last:
        node.last = node.right.last


cdef inline void treap_split(Interval *node, const Interval *at, Interval **below, Interval **above) noexcept nogil:
    """What is before `at`, and the rest."""
    if node == NULL:
        below[0] = NULL
        above[0] = NULL
        return
    if interval_before(node, at):
        treap_split(node.right, at, &node.right, above)
        below[0] = node
    else:
        treap_split(node.left, at, below, &node.left)
        above[0] = node
    interval_update(node)


cdef inline Interval *treap_join(Interval *below, Interval *above) noexcept nogil:
    if below == NULL:
        return above
    if above == NULL:
        return below
    if below.priority > above.priority:
        below.right = treap_join(below.right, above)
        interval_update(below)
        return below
    above.left = treap_join(below, above.left)
    interval_update(above)
    return above


cdef inline Interval *treap_insert(Interval *node, Interval *new) noexcept nogil:
    if node == NULL or new.priority > node.priority:
        treap_split(node, new, &new.left, &new.right)
        node = new
    elif interval_before(new, node):
        node.left = treap_insert(node.left, new)
    else:
        node.right = treap_insert(node.right, new)
    interval_update(node)
    return node


cdef inline Interval *treap_remove(Interval *node, const Interval *old) noexcept nogil:
    if node == old:
        return treap_join(node.left, node.right)
    if interval_before(old, node):
        node.left = treap_remove(node.left, old)
    else:
        node.right = treap_remove(node.right, old)
    interval_update(node)
    return node


cdef inline bint treap_overlaps(const Interval *node, u64 start, u64 end) noexcept nogil:
    """O(log n): if what ends last on the left does not overlap, nothing there does, nor on its right."""
    while node != NULL and node.last > start:
        if node.start < end and node.end > start:
            return True
        node = node.left if node.left != NULL and node.left.last > start else node.right
    return False


cdef inline void treap_invalidate(Interval *node, u64 start, u64 end, u64 seq) noexcept nogil:
    """Tell those that overlap, in address order: O(log n) for each, and for none."""
    while node != NULL and node.last > start:
        treap_invalidate(node.left, start, end, seq)
        if node.start >= end:
            return
        if node.end > start:
            seq_store(&node.seq, seq)       # before the device's lock is taken: who has it and sees the old one is waited for
            node.invalidate(node.arg, start, end, seq)
        node = node.right


# ---- of an address space

cdef inline Intervals *intervals_new() noexcept nogil:
    """NULL: no memory."""
    cdef Intervals *intervals = <Intervals *> calloc(1, sizeof(Intervals))
    if intervals != NULL:
        pthread_mutex_init(&intervals.lock, NULL)
        pthread_cond_init(&intervals.quiet, NULL)
        intervals.seq = 2
        intervals.random = 1
    return intervals


cdef inline void intervals_free(Intervals *intervals) noexcept nogil:
    """No bracket is open and nobody waits; intervals that are still in are their owners'."""
    if intervals != NULL:
        pthread_cond_destroy(&intervals.quiet)
        pthread_mutex_destroy(&intervals.lock)
        free(intervals)


cdef inline int intervals_insert(Intervals *intervals, Interval *interval) noexcept nogil:
    """
    0, or -EINVAL: empty, or -EEXIST: it is in, or not yet removed.  While a bracket is open it is not told of it, nor of
    those that open before the last ends; until then it counts as being invalidated.
    """
    cdef int error = 0
    if interval.start >= interval.end:
        return -EINVAL
    pthread_mutex_lock(&intervals.lock)
    if interval.state != INTERVAL_OUT:
        error = -EEXIST
    else:
        intervals.random ^= intervals.random << 13
        intervals.random ^= intervals.random >> 7
        intervals.random ^= intervals.random << 17
        interval.priority = intervals.random
        if intervals.active:
            intervals.seq |= 1
            seq_store(&interval.seq, intervals.seq)
            interval.state = INTERVAL_COMING
            interval.next = intervals.deferred
            intervals.deferred = interval
        else:
            intervals.seq += 2              # so that a sequence from before it was removed is not taken for one of now
            seq_store(&interval.seq, intervals.seq - 1)
            interval.state = INTERVAL_IN
            intervals.root = treap_insert(intervals.root, interval)
    pthread_mutex_unlock(&intervals.lock)
    return error


cdef inline void intervals_undefer(Intervals *intervals, Interval *interval) noexcept nogil:
    cdef Interval **link = &intervals.deferred
    while link[0] != interval:
        link = &link[0].next
    link[0] = interval.next


cdef inline void intervals_remove(Intervals *intervals, Interval *interval) noexcept nogil:
    """
    While a bracket is open, removed when the last ends; until then `invalidate` may run.  With `removed`, that tells: before
    this returns, or from the thread that ends the last bracket.  Without, this waits: not for callbacks, nor for who
    has a bracket open or holds a lock that one who has needs (the address space's, the device's).  Not inserted: nothing.
    """
    cdef bint gone = False
    pthread_mutex_lock(&intervals.lock)
    if interval.state == INTERVAL_IN and intervals.active:
        interval.state = INTERVAL_GOING
        interval.next = intervals.deferred
        intervals.deferred = interval
    elif interval.state == INTERVAL_IN or interval.state == INTERVAL_COMING:
        if interval.state == INTERVAL_IN:
            intervals.root = treap_remove(intervals.root, interval)
        else:
            intervals_undefer(intervals, interval)
        interval.state = INTERVAL_OUT
        gone = True
    while interval.removed == NULL and interval.state == INTERVAL_GOING:
        pthread_cond_wait(&intervals.quiet, &intervals.lock)
    pthread_mutex_unlock(&intervals.lock)
    if gone and interval.removed != NULL:
        interval.removed(interval.arg)


cdef inline bint intervals_start(Intervals *intervals, u64 start, u64 end) noexcept nogil:
    """
    Open a bracket: entries in [start, end) are about to go.  The intervals that overlap are told, in this thread; whether
    there are any.  `intervals_end` closes it, once the entries are gone.
    """
    cdef u64 seq = 0
    pthread_mutex_lock(&intervals.lock)
    intervals.active += 1
    if treap_overlaps(intervals.root, start, end):
        intervals.seq |= 1
        seq = intervals.seq
    pthread_mutex_unlock(&intervals.lock)
    if seq:
        treap_invalidate(intervals.root, start, end, seq)
    return seq != 0


cdef inline void intervals_end(Intervals *intervals, u64 brackets) noexcept nogil:
    """Close so many."""
    cdef Interval *gone = NULL
    cdef Interval *interval
    cdef Interval *next
    pthread_mutex_lock(&intervals.lock)
    intervals.active -= brackets
    if brackets and intervals.active == 0:
        intervals.seq += intervals.seq & 1
        next = intervals.deferred
        intervals.deferred = NULL
        while next != NULL:
            interval = next
            next = interval.next
            if interval.state == INTERVAL_COMING:
                interval.state = INTERVAL_IN
                intervals.root = treap_insert(intervals.root, interval)
                continue
            interval.state = INTERVAL_OUT
            intervals.root = treap_remove(intervals.root, interval)
            if interval.removed != NULL:
                interval.next = gone
                gone = interval
        pthread_cond_broadcast(&intervals.quiet)
    pthread_mutex_unlock(&intervals.lock)
    while gone != NULL:
        next = gone.next
        gone.removed(gone.arg)      # which may free it
        gone = next


# ---- who loads a translation

cdef inline u64 interval_read_begin(Intervals *intervals, Interval *interval) noexcept nogil:
    """
    The sequence for `interval_read_retry`.  Waits while the interval is being invalidated: not in a callback, nor with
    a lock that it or the rest of the operation needs.
    """
    cdef u64 seq
    pthread_mutex_lock(&intervals.lock)
    seq = seq_load(&interval.seq)
    while seq == intervals.seq:
        pthread_cond_wait(&intervals.quiet, &intervals.lock)
        seq = seq_load(&interval.seq)
    pthread_mutex_unlock(&intervals.lock)
    return seq


cdef inline bint interval_read_retry(Intervals *intervals, Interval *interval, u64 seq) noexcept nogil:
    """Under the lock that `invalidate` takes: an invalidation has come between, what was read may be stale."""
    return seq_load(&interval.seq) != seq
