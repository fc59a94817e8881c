# RegistrationCache: the face of a registration cache whose callbacks are Python's.
from libc.errno cimport EDEADLOCK, EINTR, EIO, ESHUTDOWN

cdef dict ACCESS = {"r": REGION_READ, "w": REGION_WRITE, "rw": REGION_READ | REGION_WRITE}
cdef tuple ACCESS_NAMES = (None, "r", "w", "rw")


cdef inline u64 bytes_of(object value, str name) except? 0xfffffffffffffff1:
    """as_u64, at less cost for what nearly always comes."""
    if type(value) is int:
        try:
            return value
        except OverflowError:
            pass
    return as_u64(value, name)


cdef int register_python(void *arg, u64 start, u64 end, u32 access, void **handle) noexcept with gil:
    cdef RegistrationCache cache = <RegistrationCache> arg
    cdef tuple kept
    try:
        kept = (cache.register(start, end - start, ACCESS_NAMES[access]),)
        cache.handles[<size_t> <void *> kept] = kept
        handle[0] = <void *> kept
        return 0
    except BaseException as exception:
        cache.refused[<size_t> pthread_self()] = exception
        return -EIO if isinstance(exception, Exception) else -EINTR


cdef void deregister_python(void *arg, u64 start, u64 end, void *handle) noexcept with gil:
    cdef RegistrationCache cache = <RegistrationCache> arg
    try:
        cache.deregister(start, end - start, cache.handles.pop(<size_t> handle)[0])
    except BaseException as exception:
        callback_raised(exception)


cdef class CachedRegion:
    """
    A registered range of memory in use, from `RegistrationCache.get`.  ``with`` puts it back at the end; one that is dropped is
    put back as well.

    Attributes
    ----------
    start, length : int
        Bytes: at least the range that was asked for.
    handle : object
        What ``register`` returned.
    """
    cdef RegistrationCache cache
    cdef Region *region         # NULL: was put back
    cdef readonly u64 start
    cdef readonly u64 length
    cdef readonly object handle
    cdef u32 rights

    def __init__(self, *args, **kwargs):
        raise TypeError("cannot create 'ioproc._core.CachedRegion' instances: see RegistrationCache.get")

    @property
    def access(self):
        """str: what the device may do: ``"r"``, ``"w"`` or ``"rw"``."""
        return ACCESS_NAMES[self.rights]

    def __enter__(self):
        return self

    def __exit__(self, kind, exception, traceback):
        if self.region != NULL:
            self.cache.put(self)

    def __del__(self):
        if self.region != NULL:
            self.cache.put(self)

    def __repr__(self):
        return (f"<ioproc.CachedRegion [{self.start:#x}, {self.start + self.length:#x}) {self.access}"
                f"{'' if self.region != NULL else ', put back'}>")


cdef u64 as_limit(object limit, str name) except? 1:
    """As the C structures have it: 0 is none."""
    cdef u64 most = 0 if limit is None else as_u64(limit, name)
    if limit is not None and most == 0:
        raise ValueError(f"{name} = 0: no limit is None")
    return most


cdef class RegistrationCache:
    """
    Ranges of memory that stay registered after use, for whoever communicates from them next.

    A range is looked up by its address.  One that no region contains, or not with the rights asked for, is registered in one
    region with those that overlap or touch it, and with their rights; these leave the cache.  If registering that fails, just
    the range asked for is tried.  Regions in the cache are disjoint.

    Parameters
    ----------
    register : callable
        ``register(start, length, access)`` with `access` ``"r"``, ``"w"`` or ``"rw"``: what the device may do.  Returns a handle,
        any object.
    deregister : callable
        ``deregister(start, length, handle)``.
    max_regions, max_bytes : int, optional
        Of the regions in the cache; those not in use leave, the one first whose last put was longest ago.  Regions in
        use stay, even where that exceeds the limits.
    merge : bool
        False: a range is registered as asked.  Regions that overlap it leave all the same.
    alignment : int
        Bytes, a power of two: regions begin and end at multiples of it.
    defer : bool
        `invalidate` does not call `deregister`: the next `get`, `put` or `flush` does.  For callers in a fault handler, or in
        a hook whose `deregister` unpins: a hook may not change the memory it is told about.

    Raises
    ------
    ValueError
        A limit below 1, an `alignment` that is no power of two.
    TypeError
        `register` or `deregister` cannot be called.

    Notes
    -----
    Threads may use a cache at the same time.  No lock is held while a callable runs; who asks for a range that another thread
    is registering waits for it.  `invalidate` waits for nobody: a range it meets while it is being registered is
    registered again before it is given out.

    What `register` raises `get` raises, and the cache is as before.  What `deregister` raises, the call that caused it raises
    after all its work; the region counts as deregistered.

    A look-up takes O(log n) for n regions, a miss O(log n) and O(log n) for each region it takes in.
    """
    cdef RegCache cache
    cdef readonly object register
    cdef readonly object deregister
    cdef dict handles           # of regions, in tuples, by the address of these: here the garbage collector sees them
    cdef dict refused           # by thread: what `register` raised last
    cdef bint ready
    cdef object __weakref__

    def __cinit__(self, register, deregister, *, max_regions=None, max_bytes=None, merge=True, alignment=4096, defer=False):
        for name, what in ("register", register), ("deregister", deregister):
            if not callable(what):
                raise TypeError(f"{name} = {what!r}: cannot be called")
        cdef u64 regions = as_limit(max_regions, "max_regions")
        cdef u64 bytes_ = as_limit(max_bytes, "max_bytes")
        self.register = register
        self.deregister = deregister
        self.handles = {}
        self.refused = {}
        if regcache_init(&self.cache, register_python, deregister_python, <void *> self, regions, bytes_,
                         as_u64(alignment, "alignment"), merge, defer):
            raise ValueError(f"alignment = {alignment}: not a power of two")
        self.ready = True

    def __del__(self):
        if self.ready:
            self.close()

    def __dealloc__(self):
        if self.ready:
            regcache_destroy(&self.cache)

    def __enter__(self):
        return self

    def __exit__(self, kind, exception, traceback):
        self.close()

    def get(self, addr, length, access="rw"):
        """
        A region that contains the range, registered with these rights until it is put back.

        Parameters
        ----------
        addr, length : int
            Bytes.
        access : {"r", "w", "rw"}
            What the device will do: read the memory, write to it.

        Returns
        -------
        CachedRegion
            With ``start``, ``length``, ``access`` and ``handle``; give it to `put`, or use it in a ``with`` statement.

        Raises
        ------
        ValueError
            The range is empty or passes the end of the address space, `access` is something else, or the cache is closed.
        RuntimeError
            `register` itself asks for a range that overlaps the one it registers; or the range was invalidated during each
            of 100 registrations.
        Exception
            Whatever `register` or `deregister` raised.
        """
        cdef u64 start = bytes_of(addr, "addr")
        cdef u64 size = bytes_of(length, "length")
        cdef u32 rights = ACCESS.get(access, 0)
        cdef Region *region
        if rights == 0:
            raise ValueError(f"access = {access!r}: not 'r', 'w' or 'rw'")
        if size == 0 or size > -self.cache.alignment or start > -self.cache.alignment - size:
            raise ValueError(f"length = {length}: empty, or past the end of the address space from {start:#x}")
        region = regcache_hit(&self.cache, start, start + size, rights)
        if region == NULL:
            region = self.miss(start, start + size, rights)
        return region_face(self, region)

    cdef Region *miss(self, u64 start, u64 end, u32 rights) except NULL:
        cdef PyObject *outer = thread_raised()
        cdef Region *region
        cdef int error
        thread_set_raised(NULL)
        with nogil:
            error = regcache_miss(&self.cache, start, end, rights, &region)
        refused = self.refused.pop(<size_t> pthread_self(), None)
        if error == 0 and thread_raised() != NULL:
            regcache_put(&self.cache, region)
        if error == -EIO or error == -EINTR:
            callback_raised(refused)
        raise_and_restore(outer)
        if error == -ESHUTDOWN:
            raise ValueError("the registration cache is closed")
        if error == -ENOMEM:
            raise MemoryError("no memory for a region")
        if error == -EDEADLOCK:
            raise RuntimeError(f"register asks for [{start:#x}, {end:#x}), which it is registering")
        if error:
            raise RuntimeError(f"[{start:#x}, {end:#x}) was invalidated during each of {REGISTER_ATTEMPTS} registrations")
        return region

    def put(self, CachedRegion region not None):
        """
        Give a region back.  It stays registered, unless it has left the cache meanwhile or the limits want it to.

        Raises
        ------
        ValueError
            Given back before, or of another cache.
        """
        cdef PyObject *outer = thread_raised()
        cdef Region *held
        if region.cache is not self:
            raise ValueError(f"region = {region!r}: of another RegistrationCache")
        if region.region == NULL:
            raise ValueError(f"region = {region!r}: put back twice")
        held = region.region
        region.region = NULL
        thread_set_raised(NULL)
        regcache_put(&self.cache, held)
        raise_and_restore(outer)

    def invalidate(self, addr, length):
        """
        The memory changes: every region that overlaps the range leaves the cache; those in use are deregistered when they are
        put back.

        Returns
        -------
        int
            Regions that left.
        """
        cdef PyObject *outer = thread_raised()
        cdef u64 start = as_u64(addr, "addr")
        cdef u64 size = as_u64(length, "length")
        cdef u64 n
        if start + size < start:
            raise ValueError(f"length = {length}: past the end of the address space from {start:#x}")
        thread_set_raised(NULL)
        n = regcache_invalidate(&self.cache, start, start + size)
        raise_and_restore(outer)
        return n

    def flush(self):
        """Deregister every region that is not in use."""
        cdef PyObject *outer = thread_raised()
        thread_set_raised(NULL)
        regcache_flush(&self.cache)
        raise_and_restore(outer)

    def close(self):
        """Deregister every region; those in use when they are put back.  No more regions can be had.  More than once is well."""
        cdef PyObject *outer = thread_raised()
        thread_set_raised(NULL)
        regcache_close(&self.cache)
        raise_and_restore(outer)

    @property
    def stats(self):
        """
        dict: so far ``gets``, ``hits``, ``misses`` (failed ones too), ``merges`` (misses whose region replaced others),
        ``registrations``, ``deregistrations``, ``evictions`` (regions that left for the limits), ``invalidations`` (regions that
        left by `invalidate`), ``deferred`` (regions that left while in use); now ``regions`` and ``bytes`` in the cache, and
        ``in_use``: regions in use, in the cache or not.
        """
        cdef RegCacheCounts counts
        pthread_mutex_lock(&self.cache.lock)
        counts = self.cache.counts
        pthread_mutex_unlock(&self.cache.lock)
        return {"gets": counts.hits + counts.misses, **counts}

    def regions(self):
        """
        The regions in the cache, in address order.

        Returns
        -------
        list of (int, int, str, int)
            Start, length, access, and how often in use.
        """
        cdef Region *copy
        cdef u64 n
        with nogil:
            copy = regcache_copy(&self.cache, &n)
        if copy == NULL:
            raise MemoryError("no memory for the list of regions")
        try:
            return [(copy[i].start, copy[i].end - copy[i].start, ACCESS_NAMES[copy[i].access], copy[i].refs) for i in range(n)]
        finally:
            free(copy)


cdef Region *regcache_copy(RegCache *cache, u64 *n) noexcept nogil:
    """Of its regions; NULL: no memory."""
    cdef const Region *region
    cdef Region *copy
    n[0] = 0
    pthread_mutex_lock(&cache.lock)
    copy = <Region *> malloc((cache.counts.regions + 1) * sizeof(Region))
    region = region_above(cache, 0) if copy != NULL else NULL
    while region != NULL:
        copy[n[0]] = region[0]
        n[0] += 1
        region = region_above(cache, region.end)
    pthread_mutex_unlock(&cache.lock)
    return copy


cdef CachedRegion region_face(RegistrationCache cache, Region *region):
    cdef CachedRegion face
    try:
        face = CachedRegion.__new__(CachedRegion)
    except BaseException:
        regcache_put(&cache.cache, region)
        raise
    face.cache = cache
    face.region = region
    face.start = region.start
    face.length = region.end - region.start
    face.rights = region.access
    face.handle = (<tuple> region.handle)[0]
    return face


cdef int raise_and_restore(PyObject *outer) except -1:
    """Raise what callbacks of the call raised; `outer` is what the caller's callbacks did, should it be one."""
    cdef PyObject *raised = thread_raised()
    thread_set_raised(outer)
    if raised == NULL:
        return 0
    exception = <object> raised
    Py_DECREF(exception)
    raise exception


def get_and_put(RegistrationCache cache not None, const u64[::1] addresses, u64 length):
    """For benchmarks: the C interface from a loop in C.  How many could be had."""
    cdef Region *region
    cdef u64 got = 0
    cdef Py_ssize_t i
    with nogil:
        for i in range(addresses.shape[0]):
            if regcache_get(&cache.cache, addresses[i], length, REGION_READ | REGION_WRITE, &region) == 0:
                regcache_put(&cache.cache, region)
                got += 1
    return got
