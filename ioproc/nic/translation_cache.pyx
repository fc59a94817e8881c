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
        cdef Cache *cache = self.cache
        cdef u64 *hits_so_far = &self.hits
        cdef u64 *misses_so_far = &self.misses
        cdef u64 *evictions_so_far = &self.evictions
        cdef u64 n = array.shape[0]
        cdef u64 hits = 0
        cdef u64 evictions = 0
        cdef u64 i, key, value, evicted
        check_pages(array)
        with nogil:
            pthread_mutex_lock(&self.lock)
            if cache.narrow != NULL and cache.policy == CACHE_LRU:
                for i in range(n):
                    key = CONTEXT_ONE | array[i]
                    hits += narrow_access(cache, key_set(cache, key), key, &evicted)
                    evictions += evicted != 0
                cache.used += n - hits - evictions
            else:
                for i in range(n):
                    key = CONTEXT_ONE | array[i]
                    if cache_get(cache, key, &value):
                        hits += 1
                    elif cache_put(cache, key, 0):
                        evictions += 1
            hits_so_far[0] += hits
            misses_so_far[0] += n - hits
            evictions_so_far[0] += evictions
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


def hit_curve(pages):
    """
    Hits of LRU caches of every size, fully associative, over the same stream of pages.

    Parameters
    ----------
    pages : array_like of int
        Page numbers below 2**39.

    Returns
    -------
    numpy.ndarray of int64
        At index n the hits of ``TranslationCache(n).access(pages)``: from none at 0 to all there can be when every distinct
        page has its entry, at the last index.

    Raises
    ------
    ValueError, TypeError
        `pages` has something else.

    Notes
    -----
    A page hits if the cache has room for all that were used since its last use, and for itself: its stack distance (Mattson
    et al., 1970).  One pass finds them all, in n log n time and in memory for the distinct pages and the stream's copy.
    """
    cdef const u64[::1] array = page_array(pages)
    check_pages(array)
    numbers, inverse = np.unique(array, return_inverse=True)
    cdef Py_ssize_t distinct = len(numbers)
    cdef const i64[::1] ids = np.ascontiguousarray(inverse, np.int64)
    # Each use takes the next time; when times run out the pages' last uses are renumbered from 1 in their order.
    cdef Py_ssize_t times = 2 * distinct + 1024
    cdef i64[::1] last = np.zeros(distinct, np.int64)           # use, by page; 0: none yet
    cdef i64[::1] used = np.zeros(times + 1, np.int64)          # page, by time
    # A binary indexed tree counts the times that are some page's last use.  It begins with all of them, also those to come.
    cdef i64[::1] tree = np.empty(times + 1, np.int64)
    cdef i64[::1] curve = np.zeros(distinct + 1, np.int64)      # first: uses at each stack distance
    cdef i64 now = times
    cdef i64 seen = 0
    cdef i64 i, time, page, deeper
    cdef Py_ssize_t n
    with nogil:
        for n in range(ids.shape[0]):
            if now == times:
                now = 0
                for i in range(1, times + 1):
                    tree[i] = i & -i
                    page = used[i]
                    if last[page] == i:
                        now += 1
                        last[page] = now
                        used[now] = page
            now += 1
            page = ids[n]
            time = last[page]
            if time:
                deeper = 0                                      # pages not used since, and this one
                i = time
                while i:
                    deeper += tree[i]
                    i &= i - 1
                curve[seen - deeper + 1] += 1
                i = time
                while i <= times:
                    tree[i] -= 1
                    i += i & -i
            else:
                seen += 1
            last[page] = now
            used[now] = page
    return np.cumsum(curve)


def run_cache(operations, entries, ways=None, policy="lru", seed=0):
    """
    For tests, the C interface: the answers to ``("get", key)`` (the value or None), ``("put", key, value)`` (the key evicted
    or 0), ``("drop", key)`` (was it there) and ``("clear",)`` (None), and the entries in use after each.
    """
    cdef Cache *cache = cache_make(entries, ways, policy, seed)
    cdef u64 value = 0
    cdef list answers = []
    try:
        for what, *arguments in operations:
            answer = None
            if what == "get":
                answer = value if cache_get(cache, arguments[0], &value) else None
            elif what == "put":
                answer = cache_put(cache, arguments[0], arguments[1])
            elif what == "drop":
                answer = bool(cache_drop(cache, arguments[0]))
            else:
                cache_clear(cache)
            answers.append((answer, cache.used))
        return answers
    finally:
        cache_free(cache)
