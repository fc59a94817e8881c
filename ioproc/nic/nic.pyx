# Nic: the face of a NIC with an MMU of its own; the designs, and what a transfer can end with.

NIC_COUNTS = ("transfers", "bytes", "lookups", "hits", "misses", "walks", "faults", "loaded", "prefaulted", "preloaded",
              "callbacks", "useful", "invalidations", "shootdowns", "invalidated", "downgraded", "evicted", "attachments",
              "registrations", "registered_pages", "deregistrations", "deregistered_pages", "regcache_hits", "regcache_misses",
              "pinned", "pinned_peak", "copied_bytes", "retries", "precopied", "errors", "violations", "violations_frame",
              "violations_permission")
TRANSLATION_NAMES = ("fault", "preload", "preload-registered", "pin", "pin-cache", "pin-cache+hooks", "bounce")
PLACEMENT_NAMES = ("none", "mm", "vma", "interval")
FORK_NAMES = ("posted", "revised", "inherit", "precopy")

# Every combination that makes sense; and why the others do not.
cdef dict TRANSLATION_PLACEMENTS = {
    "fault": ("mm", "vma", "interval"), "preload": ("mm", "vma"), "preload-registered": ("mm", "vma", "interval"),
    "pin": ("none",), "pin-cache": ("none",), "pin-cache+hooks": ("mm", "vma", "interval"), "bounce": ("none",),
}
cdef dict REFUSALS = {
    "fault": "a translation that the NIC keeps must be taken back when the page goes: somebody has to tell it",
    "preload": "it loads in update hooks, which chains of ops have: interval notifiers (Linux 5.5) tell of invalidations alone",
    "preload-registered": "a translation that the NIC keeps must be taken back when the page goes: somebody has to tell it",
    "pin": "it holds its pages for one transfer and listens to nobody: hooks would be pure cost",
    "pin-cache": "it is the cache that nobody tells; with hooks it is 'pin-cache+hooks'",
    "pin-cache+hooks": "without a placement there are no hooks; that is 'pin-cache'",
    "bounce": "the device never sees the process's memory: there is nothing to tell it",
}


def design_name(placement, translation, fork="revised"):
    """``"mm+fault"``, ``"pin-cache"``, ``"mm+fault/posted"``."""
    name = translation if placement == "none" else f"{placement}+{translation}"
    return name if fork == "revised" else f"{name}/{fork}"


DESIGNS = {design_name(placement, translation): {"placement": placement, "translation": translation}
           for translation, placements in TRANSLATION_PLACEMENTS.items() for placement in placements}
DESIGNS["mm+fault/posted"] = {"placement": "mm", "translation": "fault", "fork": "posted"}


class RemoteAccessError(Exception):
    """
    A transfer that the device could not complete, as its completion reports it.

    Attributes
    ----------
    address : int
        The first byte that could not be accessed.
    cause : str
        ``"unmapped"``, ``"permission"``, ``"beyond the file"``, ``"out of memory"`` or ``"detached"``.
    completed : int
        Bytes transferred before it.
    """

    def __init__(self, address, cause, completed=0):
        super().__init__(address, cause, completed)
        self.address = address
        self.cause = cause
        self.completed = completed

    def __str__(self):
        return f"address {self.address:#x}: {self.cause}, {self.completed} bytes completed before"


RemoteAccessError.__module__ = "ioproc"


class Violation(tuple):
    """
    A device access that the page table did not allow any more: through a frame that is not the page's, or a permission that it
    has not.

    Attributes
    ----------
    address : int
        Of the access.
    write : bool
    kind : str
        ``"frame"`` or ``"permission"``.
    design : str
        The design that allowed it.
    """
    __slots__ = ()
    address = property(lambda self: self[0])
    write = property(lambda self: self[1])
    kind = property(lambda self: self[2])
    design = property(lambda self: self[3])

    def __repr__(self):
        return (f"<ioproc.Violation: {self.design} {'wrote' if self.write else 'read'} at {self.address:#x} through a stale "
                f"{self.kind}>")


Violation.__module__ = "ioproc"


cdef NicCounts context_counts(const NicContext *context) noexcept nogil:
    """Nic.lock is held, or nobody else has the context."""
    cdef NicCounts counts = context.counts
    counts.precopied = atomic_load(&context.precopy.pages)
    if context.has_registered:
        pthread_mutex_lock(<pthread_mutex_t *> &context.registered.lock)
        counts.regcache_hits = context.registered.counts.hits
        counts.regcache_misses = context.registered.counts.misses
        pthread_mutex_unlock(<pthread_mutex_t *> &context.registered.lock)
    return counts


cdef dict counts_dict(const NicCounts *counts):
    return {name: (<const u64 *> counts)[i] for i, name in enumerate(NIC_COUNTS)}


cdef int choice(object value, tuple names, str what) except -1:
    if value not in names:
        raise ValueError(f"{what} = {value!r}: not one of {', '.join(map(repr, names))}")
    return names.index(value)


cdef class Nic:
    """
    A network card with an MMU: contexts, one per attached process; translations in its memory; and a cache before them that all
    contexts share.

    Parameters
    ----------
    entries : int
        Of the translation cache.
    ways : int or None
        Entries of a set, which a page's number selects; None: fully associative.
    page_shift : {12, 21}
        21: a huge page is one translation of 2 MiB; 12: it is 512.
    policy : {"lru", "random", "fifo"}
        Of the cache, in each set.
    table_entries : int, optional
        Translations that NIC memory holds.  When it is full, the one not asked for the longest past the cache makes room.
    seed : int
        Of the random policy.

    Notes
    -----
    Threads may use one NIC at the same time.  Context manager: `close` at the end.
    """
    cdef NIC *nic
    cdef dict contexts          # Context by the address of its MM, weak: the address spaces own them
    cdef object __weakref__

    def __cinit__(self, entries=1024, ways=16, *, page_shift=12, str policy="lru", table_entries=None, seed=0):
        cdef u64 limit = 0 if table_entries is None else as_u64(table_entries, "table_entries")
        self.contexts = {}
        if page_shift not in (12, 21):
            raise ValueError(f"page_shift = {page_shift!r}: 12, or 21 for translations of 2 MiB besides")
        if table_entries is not None and (limit == 0 or limit >= 1ULL << 32):
            raise ValueError(f"table_entries = {table_entries}: not in 1 .. 2**32 - 1")
        self.nic = <NIC *> calloc(1, sizeof(NIC))
        if self.nic == NULL:
            raise MemoryError("no memory for a NIC")
        pthread_mutex_init(&self.nic.lock, NULL)
        pthread_cond_init(&self.nic.landed, NULL)
        self.nic.room = 64
        self.nic.entries = <Loaded *> calloc(64, sizeof(Loaded))
        if self.nic.entries == NULL:
            raise MemoryError("no memory for a NIC")
        self.nic.cache = cache_make(entries, ways, policy, seed)
        self.nic.limit = limit
        self.nic.huge = page_shift == 21

    def __dealloc__(self):
        if self.nic != NULL:        # each context has a reference: there is none
            if self.nic.cache != NULL:
                cache_free(self.nic.cache)
            free(self.nic.entries)
            pthread_cond_destroy(&self.nic.landed)
            pthread_mutex_destroy(&self.nic.lock)
            free(self.nic)

    def attach(self, AddressSpace mm not None, str placement="mm", str translation="fault", *, str fork="revised", prefault=1,
               max_regions=None, max_bytes=None, bounce_bytes=1 << 20):
        """
        Make a context for a process: from now on the device reaches its memory, by one of the designs.

        Parameters
        ----------
        mm : AddressSpace
        placement : {"mm", "vma", "interval", "none"}
            Who tells the driver of changes: a chain of ops on the address space; on the VMAs that have communicated; interval
            notifiers with collision-retry on the ranges that have; nobody.
        translation : str
            ``"fault"``: the NIC faults and the driver loads.  ``"preload"``: update hooks load as well.
            ``"preload-registered"``: a buffer's translations are loaded at its first transfer, without pinning.  ``"pin"``: each
            transfer pins and unpins.  ``"pin-cache"``: buffers stay pinned, and nobody tells of munmap.  ``"pin-cache+hooks"``:
            until the hooks tell.  ``"bounce"``: the processor copies through a buffer of the NIC's.
        fork : {"revised", "posted", "inherit", "precopy"}
            ``wrprotect_page`` takes the device's write permission where fork does; nobody tells; as revised, and the child is
            attached too, with its parent's registrations; as revised, but pages that are registered, or that the device may
            write to, are copied for the child at once.
        prefault : int
            Pages that a NIC fault loads, at most, from the one asked for on: 1 .. 2048.
        max_regions, max_bytes : int, optional
            Limits of the registration cache.
        bounce_bytes : int
            Of the bounce buffer, rounded up to pages.

        Returns
        -------
        Context

        Raises
        ------
        ValueError
            A combination that makes no sense, with the reason; or the process is attached already.
        OSError
            ESRCH: the process has ended.
        """
        cdef int where = choice(placement, PLACEMENT_NAMES, "placement")
        cdef int how = choice(translation, TRANSLATION_NAMES, "translation")
        cdef int way = choice(fork, FORK_NAMES, "fork")
        cdef u64 pages = as_u64(prefault, "prefault")
        cdef u64 regions = as_limit(max_regions, "max_regions")
        cdef u64 bytes_ = as_limit(max_bytes, "max_bytes")
        cdef u64 bounce = page_align(as_u64(bounce_bytes, "bounce_bytes") & ~(1ULL << 63)) >> PAGE_SHIFT
        cdef Context context
        if placement not in TRANSLATION_PLACEMENTS[translation]:
            raise ValueError(f"placement = {placement!r} with translation = {translation!r}: {REFUSALS[translation]}")
        if placement == "interval" and fork in ("posted", "precopy"):
            raise ValueError(f"fork = {fork!r} with placement = 'interval': its notifiers are told of a mapping before fork "
                             "copies it: nothing is kept from them, and nothing is left to copy")
        if not 1 <= pages <= PREFAULT_MOST:
            raise ValueError(f"prefault = {prefault}: not in 1 .. {<int> PREFAULT_MOST} pages")
        if bounce == 0 or bounce > 1 << 18:
            raise ValueError(f"bounce_bytes = {bounce_bytes}: not in 1 .. 2**30")
        refuse_in_callback()
        context = Context.__new__(Context, ATTACH)
        context.prepare(self, mm, where, how, way, pages, regions, bytes_)
        context.begin(mm, bounce)
        return context

    def context(self, AddressSpace mm not None):
        """The Context of a process; KeyError if it has none."""
        context = self.find(mm.mm)
        if context is None:
            raise KeyError(f"{mm!r} is not attached")
        return context

    cdef Context find(self, MM *mm):
        cdef object found = self.contexts.get(<size_t> mm)
        cdef Context context = None if found is None else found()
        return None if context is None or not context.attached else context

    @property
    def stats(self):
        """
        dict: the counts of all contexts together, also of those that are gone.

        ``transfers`` and their ``bytes``; ``lookups`` in the translation cache, in pages, of which ``hits`` and ``misses``;
        ``walks``: misses that NIC memory answered; ``faults``: the driver was asked; ``loaded`` by faults, of these
        ``prefaulted`` beyond the page asked for; ``preloaded`` by update hooks or a registration; ``callbacks`` run, of these
        ``useful``: that took something away from the device, or loaded what was used later; ``invalidations``: callbacks that
        invalidate or restrict, of these ``shootdowns``: that found something to take; ``invalidated``, ``downgraded``:
        translations dropped, or made read-only, by these; ``evicted`` from NIC memory; ``attachments`` of ops to VMAs, or of
        interval notifiers; ``registrations``, ``deregistrations`` and their pages; ``regcache_hits``, ``regcache_misses`` of the
        registration cache; ``pinned`` pages now, and at most; ``copied_bytes`` through bounce buffers; ``retries`` after a
        collision; ``precopied`` pages at fork; ``errors``: transfers that failed; ``violations``, and of these of the ``frame``
        and of the ``permission``.
        """
        cdef NicCounts sums, counts
        cdef NicContext *context
        with nogil:
            pthread_mutex_lock(&self.nic.lock)
            sums = self.nic.gone
            context = self.nic.contexts
            while context != NULL:
                counts = context_counts(context)
                counts_add(<u64 *> &sums, <const u64 *> &counts, sizeof(NicCounts) // 8)
                context = context.next
            sums.pinned_peak = self.nic.pinned_peak
            pthread_mutex_unlock(&self.nic.lock)
        return counts_dict(&sums)

    def violations(self):
        """list of Violation: the first 256."""
        return self.noted(0)

    cdef list noted(self, u64 context):
        """Of one context, or with 0 of all."""
        cdef u64 i, n
        cdef NotedViolation *noted
        cdef list found = []
        with nogil:
            pthread_mutex_lock(&self.nic.lock)
            n = self.nic.nnoted
            pthread_mutex_unlock(&self.nic.lock)
        for i in range(n):
            noted = &self.nic.noted[i]
            if context == 0 or noted.context == context:
                found.append(Violation((noted.addr, bool(noted.write), "frame" if noted.frame else "permission", design_name(
                    PLACEMENT_NAMES[noted.placement], TRANSLATION_NAMES[noted.translation], FORK_NAMES[noted.fork]))))
        return found

    def close(self):
        """Detach every process.  Transfers that go on end with an error."""
        cdef list attached = [None]
        while attached:             # a fork that goes on may attach one more
            attached = [found() for found in list(self.contexts.values())]
            attached = [context for context in attached if context is not None and (<Context> context).attached]
            for context in attached:
                (<Context> context).detach()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __repr__(self):
        cdef u64 n = 0
        cdef u64 live
        cdef const NicContext *context
        with nogil:
            pthread_mutex_lock(&self.nic.lock)
            live = self.nic.live
            context = self.nic.contexts
            while context != NULL:
                n += not context.gone
                context = context.next
            pthread_mutex_unlock(&self.nic.lock)
        return f"<ioproc.Nic: {live} translations of {n} process{'es' * (n != 1)}>"
