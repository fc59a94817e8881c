# TranslationCache: the face of the translation cache by itself; hit_curve: LRU caches of all sizes at once.

cdef u64 CONTEXT_ONE = 1ULL << 40
cdef tuple CACHE_POLICIES = ("lru", "random", "fifo")


cdef Cache *cache_make(object entries, object ways, object policy, object seed) except NULL:
    """A cache of the geometry that a user asks for; `ways` None: fully associative."""
    cdef u64 n = as_u64(entries, "entries")
    cdef u64 w = n if ways is None else as_u64(ways, "ways")
    cdef u64 s = as_u64(seed, "seed")
    cdef Cache *cache
    if not 1 <= n < 1 << 32:
        raise ValueError(f"entries = {entries}: not in 1 .. 2**32 - 1")
    if not 1 <= w <= n:
        raise ValueError(f"ways = {ways}: not in 1 .. {n}, the entries")
    if n % w:
        raise ValueError(f"ways = {ways}: {n} entries are no whole number of sets of {w}")
    if policy not in CACHE_POLICIES:
        raise ValueError(f"policy = {policy!r}: not one of {', '.join(CACHE_POLICIES)}")
    cache = cache_new(n, w, CACHE_POLICIES.index(policy), s)
    if cache == NULL:
        raise MemoryError(f"no memory for a translation cache of {entries} entries")
    return cache


cdef object page_array(object pages):
    """Page numbers as a contiguous array of uint64."""
    cdef object array = np.asarray(pages)
    if array.ndim != 1:
        raise ValueError(f"pages: an array of {array.ndim} dimensions, not of one")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"pages: an array of {array.dtype}, not of integers")
    if array.size and array.dtype.kind == "i" and array.min() < 0:
        raise ValueError(f"pages: page {array.min()} is not in 0 .. 2**39 - 1")
    return np.ascontiguousarray(array, np.uint64)


cdef int check_pages(const u64[::1] pages) except -1:
    cdef u64 together = 0
    cdef Py_ssize_t i
    with nogil:
        for i in range(pages.shape[0]):
            together |= pages[i]
    if together > KEY_PAGE:
        raise ValueError(f"pages: page {np.max(pages)} is not in 0 .. 2**39 - 1")
    return 0


cdef class TranslationCache:
    """
    A device's translation cache by itself: hits and misses of a stream of pages.

    Parameters
    ----------
    entries : int
        Translations it holds.
    ways : int, optional
        Entries of a set; by default all are one set (fully associative).  A page's set is its number modulo the sets.
    policy : str
        Who goes when a set is full: ``"lru"`` (not used for the longest time), ``"fifo"`` (came first) or ``"random"``.
    seed : int
        Of ``"random"``.

    Raises
    ------
    ValueError
        `entries` is not in 1 .. 2**32 - 1, `ways` does not divide it, or the policy is another.

    Notes
    -----
    Up to 16 ways a look-up compares a whole set at once; beyond, and fully associative, it asks a hash table.
    """
    cdef Cache *cache
    cdef pthread_mutex_t lock
    cdef u64 hits, misses, evictions

    def __cinit__(self, entries, ways=None, policy="lru", seed=0):
        pthread_mutex_init(&self.lock, NULL)
        self.cache = cache_make(entries, ways, policy, seed)

    def __dealloc__(self):
        cache_free(self.cache)
        pthread_mutex_destroy(&self.lock)

    def access(self, pages):
        """
        Look up each page in turn; one that is not there is put in.

        Parameters
        ----------
        pages : array_like of int
            Page numbers below 2**39.  Fastest as a contiguous array of uint64.

        Returns
        -------
        int
            Hits.

        Raises
        ------
        ValueError, TypeError
            `pages` has something else; then none of them was looked up.
        """
        cdef const u64[::1] array = page_array(pages)
        cdef u64 n = array.shape[0]
        cdef u64 hits = 0
        cdef u64 evictions = 0
        cdef u64 i, key, value
        check_pages(array)
        with nogil:
            pthread_mutex_lock(&self.lock)
            for i in range(n):
                key = CONTEXT_ONE | array[i]
                if cache_get(self.cache, key, &value):
                    hits += 1
                elif cache_put(self.cache, key, 0):
                    evictions += 1
            self.hits += hits
            self.misses += n - hits
            self.evictions += evictions
            pthread_mutex_unlock(&self.lock)
        return hits

    def drop(self, pages):
        """
        Forget pages.

        Parameters
        ----------
        pages : array_like of int
            Page numbers below 2**39.

        Returns
        -------
        int
            How many of them were there.

        Raises
        ------
        ValueError, TypeError
            `pages` has something else; then none of them was dropped.
        """
        cdef const u64[::1] array = page_array(pages)
        cdef u64 dropped = 0
        cdef Py_ssize_t i
        check_pages(array)
        with nogil:
            pthread_mutex_lock(&self.lock)
            for i in range(array.shape[0]):
                dropped += cache_drop(self.cache, CONTEXT_ONE | array[i])
            pthread_mutex_unlock(&self.lock)
        return dropped

    def clear(self):
        """Forget all pages; the statistics go on."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            cache_clear(self.cache)
            pthread_mutex_unlock(&self.lock)

    @property
    def stats(self):
        """dict: ``hits``, ``misses`` and ``evictions`` so far; ``entries`` in use now."""
        cdef u64 hits, misses, evictions, used
        with nogil:
            pthread_mutex_lock(&self.lock)
            hits, misses, evictions, used = self.hits, self.misses, self.evictions, self.cache.used
            pthread_mutex_unlock(&self.lock)
        return {"hits": hits, "misses": misses, "evictions": evictions, "entries": used}
