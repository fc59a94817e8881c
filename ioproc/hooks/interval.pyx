# The interval notifiers' face, for their tests.

cdef struct Named:              # one interval of a probe
    Interval interval
    void *probe
    void *name                  # a key of probe.named: as long as it is there


cdef void probe_invalidate(void *arg, u64 start, u64 end, u64 seq) noexcept nogil:
    with gil:
        probe_called(<Named *> arg, ("invalidate", start, end, seq))


cdef void probe_removed(void *arg) noexcept nogil:
    with gil:
        probe_called(<Named *> arg, ("removed",))


cdef void probe_called(Named *named, tuple what) noexcept:
    cdef IntervalsProbe probe = <IntervalsProbe> named.probe
    name = <object> named.name
    try:
        probe.log.append((name, *what))
        if probe.called is not None:
            probe.called(name, *what)
    except BaseException as exception:
        callback_raised(exception)


cdef const char *treap_broken(const Interval *node) noexcept nogil:
    """NULL, or what is wrong at or below `node`."""
    cdef const char *reason
    cdef u64 last
    if node == NULL:
        return NULL
    last = node.end
    if node.left != NULL:
        last = max(last, node.left.last)
        if node.left.priority > node.priority or not interval_before(node.left, node):
            return "left"
    if node.right != NULL:
        last = max(last, node.right.last)
        if node.right.priority > node.priority or not interval_before(node, node.right):
            return "right"
    if last != node.last:
        return "last"
    reason = treap_broken(node.left)
    return reason if reason != NULL else treap_broken(node.right)


cdef list treap_names(const Interval *node):
    if node == NULL:
        return []
    return [*treap_names(node.left), <object> (<Named *> node.arg).name, *treap_names(node.right)]


@cython.no_gc_clear          # its intervals are found by `named` until the end
cdef class IntervalsProbe:
    """
    For tests: the intervals of an address space that is not there.

    Parameters
    ----------
    called : callable
        ``called(name, "invalidate", start, end, seq)`` and ``called(name, "removed")``, which also go to ``log``.
    """
    cdef Intervals *intervals
    cdef dict named             # name -> the address of its Named
    cdef object called
    cdef public list log

    def __cinit__(self, called=None):
        self.named = {}
        self.called = called
        self.log = []
        self.intervals = intervals_new()
        if self.intervals == NULL:
            raise MemoryError("IntervalsProbe")

    def __dealloc__(self):
        for address in self.named.values():
            free(<void *> <size_t> address)
        intervals_free(self.intervals)

    cdef Interval *find(self, name) except NULL:
        return &(<Named *> <size_t> self.named[name]).interval

    def insert(self, name, u64 start, u64 end, bint removed=False):
        """`removed`: its removal never waits.  A name that is known is inserted again, as it is."""
        cdef Named *named
        cdef int error
        if name not in self.named:
            named = <Named *> calloc(1, sizeof(Named))
            if named == NULL:
                raise MemoryError("insert")
            self.named[name] = <size_t> named
            named.probe = <void *> self
            named.name = <void *> name
            named.interval.start, named.interval.end = start, end
            named.interval.invalidate = probe_invalidate
            if removed:
                named.interval.removed = probe_removed
            named.interval.arg = named
        cdef Interval *interval = self.find(name)
        with nogil:
            error = intervals_insert(self.intervals, interval)
        if error:
            raise OSError(-error, os.strerror(-error))

    def remove(self, name):
        cdef Interval *interval = self.find(name)
        with nogil:
            intervals_remove(self.intervals, interval)
        raise_pending()

    def start(self, u64 start, u64 end):
        cdef bint overlapped
        with nogil:
            overlapped = intervals_start(self.intervals, start, end)
        raise_pending()
        return overlapped

    def end(self, u64 brackets=1):
        with nogil:
            intervals_end(self.intervals, brackets)
        raise_pending()

    def read_begin(self, name):
        cdef Interval *interval = self.find(name)
        cdef u64 seq
        with nogil:
            seq = interval_read_begin(self.intervals, interval)
        return seq

    def read_retry(self, name, u64 seq):
        return interval_read_retry(self.intervals, self.find(name), seq)

    def state(self):
        """The names in the tree in order, those that wait for the end, brackets open, the sequence.  AssertionError: no treap."""
        cdef const char *reason
        cdef const Interval *interval
        cdef list deferred = []
        pthread_mutex_lock(&self.intervals.lock)        # a leaf, under which nobody waits for the GIL
        reason = treap_broken(self.intervals.root)
        names = treap_names(self.intervals.root)
        interval = self.intervals.deferred
        while interval != NULL:
            deferred.append(<object> (<Named *> interval.arg).name)
            interval = interval.next
        active, seq = self.intervals.active, self.intervals.seq
        pthread_mutex_unlock(&self.intervals.lock)
        if reason != NULL:
            raise AssertionError(reason.decode())
        return names, deferred, active, seq
