# Context and Registration: the faces of a process on a NIC.

cdef enum:
    PACKET = 65536              # bytes that go from one NIC to the other at once
    CONTEXTS_MOST = (1 << 24) - 1       # of one NIC: as many numbers as there are in a key


cdef object ATTACH = object()    # whoever has it prepares what it makes


@cython.no_gc_clear               # its end needs the NIC
cdef class Context:
    """A process on a NIC, from `Nic.attach`."""
    cdef NicContext *context
    cdef readonly Nic nic
    cdef PhysicalMemory mem
    cdef object __weakref__

    def __cinit__(self, token=None):
        if token is not ATTACH:
            raise TypeError("a Context comes from Nic.attach()")

    cdef list registrations(self):
        """(start, end, access) of what the registration cache has."""
        cdef RegCache *cache = &self.context.registered
        cdef const Region *region
        cdef u64 at = 0
        cdef u64 end = 0
        cdef u32 access = 0         # no object is made under the lock
        cdef list found = []
        while self.context.has_registered:
            pthread_mutex_lock(&cache.lock)
            region = region_above(cache, at)
            if region != NULL:
                at, end, access = region.start, region.end, region.access
            pthread_mutex_unlock(&cache.lock)
            if region == NULL:
                break
            found.append((at, end, access))
            at = end
        return found

    cdef int inherit(self, AddressSpace child, list registrations) except -1:
        """The child of a fork is attached as its parent is, with the same registrations, but for those it cannot make."""
        cdef NicContext *context = self.context
        cdef NicContext *heir
        cdef Context made = Context.__new__(Context, ATTACH)
        cdef Region *region
        cdef u64 start, end
        cdef u32 access
        cdef int why
        made.prepare(self.nic, child, context.placement, context.translation, context.fork, context.prefault, context.max_regions,
                     context.max_bytes)
        made.begin(child, context.bounce_pages)
        heir = made.context
        with nogil:
            schedule_point(INHERIT)
            why = inherit_attachments(context, heir)
        if why == NO_FRAME:
            raise MemoryError("fork: no memory for the attachments that the child inherits")
        if why == DETACHED:                 # who did that has not seen the child
            made.detach()
            return 0
        for start, end, access in registrations:
            with nogil:
                if regcache_get(&heir.registered, start, end - start, access, &region) == 0:
                    regcache_put(&heir.registered, region)
        return 0

    cdef int prepare(self, Nic nic, AddressSpace mm, int placement, int translation, int fork, u64 prefault, u64 regions,
                     u64 bytes_) except -1:
        """Everything but the attachment."""
        cdef NicContext *context = <NicContext *> calloc(1, sizeof(NicContext))
        if context == NULL:
            raise MemoryError("no memory for a context")
        self.context = context
        context.gone = True                 # so far
        self.nic = nic
        self.mem = mm.mem
        context.nic = nic.nic
        context.placement = placement
        context.translation = translation
        context.fork = fork
        context.prefault = prefault
        context.max_regions = regions
        context.max_bytes = bytes_
        context.index = table_new()
        context.huge_index = table_new()
        if context.index == NULL or context.huge_index == NULL:
            raise MemoryError("no memory for a context")
        if translation in (PIN_CACHE, PIN_CACHE_HOOKS):
            context.has_registered = 0 == regcache_init(
                &context.registered, register_pinned, deregister_pinned, context, regions, bytes_, PAGE_SIZE, True, False)
        elif translation == PRELOAD_REGISTERED:
            context.has_registered = 0 == regcache_init(
                &context.registered, register_preloaded, deregister_preloaded, context, regions, bytes_, PAGE_SIZE, True, False)
        if translation in (PIN_CACHE, PIN_CACHE_HOOKS, PRELOAD_REGISTERED) and not context.has_registered:
            raise MemoryError("no memory for a context")
        return 0

    cdef int begin(self, AddressSpace space, u64 bounce) except -1:
        """Attach; the address space owns the context from now on."""
        cdef NicContext *context = self.context
        cdef Nic nic = self.nic
        cdef NIC *card = nic.nic
        cdef MM *mm
        cdef bint done = True
        cdef int error
        cdef object weak_self = ref(self)   # not under the lock: the garbage collector may run
        space.enter()
        mm = space.mm
        try:
            if nic.find(mm) is not None:
                raise ValueError("mm: it is attached to this NIC already")
            if card.attached == CONTEXTS_MOST:
                raise MemoryError(f"a NIC numbers {CONTEXTS_MOST:,} contexts, ever")
            mm_hold(mm)
            context.mm = mm
            with nogil:
                pthread_mutex_lock(&card.lock)
                card.attached += 1
                context.number = card.attached
                context.next = card.contexts
                card.contexts = context
                pthread_mutex_unlock(&card.lock)
                if context.translation == BOUNCE:
                    done = bounce_new(context, bounce)
                error = context_attach(context) if done else -ENOMEM
            if not done:
                raise MemoryError(f"no frames for a bounce buffer of {bounce} pages")
            if error:
                raise MemoryError("no memory for a context") if error == -ENOMEM else syscall_error(error, "attach")
            atomic_store(&context.gone, False)
            nic.contexts[<size_t> mm] = weak_self
            space.owners[<size_t> context] = self
        finally:
            space.leave()
        return 0

    def __dealloc__(self):
        cdef NicContext *context = self.context
        cdef NicContext **link
        cdef u64 i
        if context == NULL:
            return
        if context.mm != NULL:
            with nogil:
                if not context.gone:
                    context_detach(context)
                elif context.bounce != NULL:        # never attached
                    bounce_free(context)
                pthread_mutex_lock(&context.nic.lock)
                context.counts = context_counts(context)
                context_drop(context, 0, ADDRESSES_END)     # of one that was never attached
                counts_add(<u64 *> &context.nic.gone, <const u64 *> &context.counts, sizeof(NicCounts) // 8)
                link = &context.nic.contexts
                while link[0] != context:
                    link = &link[0].next
                link[0] = context.next
                pthread_mutex_unlock(&context.nic.lock)
        if context.has_registered:
            regcache_destroy(&context.registered)       # now that no statistics look at it
        if context.mm != NULL:
            mm_put(context.mm)
        table_free(context.index, 3)
        table_free(context.huge_index, 3)
        for i in range(context.nattachments):
            free(context.attachments[i])
        free(context.attachments)
        free(context)

    cdef int leave_space(self) except -1:
        """The address space no longer owns it."""
        cdef AddressSpace space = face_of(self.context.mm)
        found = self.nic.contexts.get(<size_t> self.context.mm)
        if found is not None and found() is self:       # not one attached since
            del self.nic.contexts[<size_t> self.context.mm]
        if space is not None and space.owners is not None:
            space.owners.pop(<size_t> self.context, None)
        return 0

    def detach(self):
        """
        End it: no translation, no registration and no hook is left, but for what a `Registration` in somebody's hand keeps
        pinned.  A transfer in another thread ends with an error; a second ``detach`` does nothing.
        """
        refuse_in_callback()
        with nogil:
            context_detach(self.context)
        self.leave_space()
        raise_pending()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.detach()

    # ---- transfers

    cdef int complete(self, int why, u64 addr, u64 length, bint write, u64 completed) except -1:
        raise_pending()
        return self.fail(why, addr + completed, length - completed, write, completed) if why else 0

    cdef int fail(self, int why, u64 addr, u64 length, bint write, u64 completed) except -1:
        """At `addr`; or, where a registration failed, at the first byte from there on that the process may not access so."""
        cdef u64 allowed = 0
        if why in (NO_MAPPING, NO_RIGHT) and self.attached:
            with nogil:
                allowed = accessible(self.context.mm, addr, length, write)
        raise RemoteAccessError(addr + allowed if allowed < length else addr, CAUSES[why], completed)

    cdef u64 transfer(self, u64 addr, u64 length, bint write, char *data) except? 0xffffffffffffffff:
        cdef u64 completed = 0
        cdef int why
        range_in_space(addr, length)
        refuse_in_callback()
        with nogil:
            why = context_transfer(self.context, addr, length, write, data, &completed)
        self.complete(why, addr, length, write, completed)
        return completed

    def rdma_write(self, addr, data):
        """
        The device writes into the process's memory.

        Parameters
        ----------
        addr : int
        data : bytes-like, of bytes (``memoryview(array).cast("B")`` of others)

        Raises
        ------
        RemoteAccessError
            With the address, the cause, and the bytes written before.  A page that the process may not write to is never
            written.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef const unsigned char[::1] source = data
        if source.shape[0]:
            self.transfer(at, source.shape[0], True, <char *> &source[0])

    def rdma_read(self, addr, n):
        """The device reads `n` bytes of the process's memory.  Errors as `rdma_write`."""
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 count = as_u64(n, "n")
        cdef bytes result
        range_in_space(at, count)
        result = PyBytes_FromStringAndSize(NULL, count)
        self.transfer(at, count, False, result)
        return result

    def rdma_write_to(self, addr, n, Context remote not None, remote_addr):
        """
        An RDMA write: this NIC reads `n` bytes at `addr` here, the remote context's writes them at `remote_addr` there.  The
        two may be of one NIC or of two, in one physical memory or in two.

        Raises
        ------
        RemoteAccessError
            Of the side that failed; `completed` are the bytes that arrived.
        """
        self.move(addr, n, remote, remote_addr, True)

    def rdma_read_from(self, addr, n, Context remote not None, remote_addr):
        """An RDMA read: `n` bytes at `remote_addr` there come to `addr` here.  Errors as `rdma_write_to`."""
        self.move(addr, n, remote, remote_addr, False)

    cdef int move(self, object addr, object n, Context remote, object remote_addr, bint out) except -1:
        cdef u64 here = as_u64(addr, "addr")
        cdef u64 there = as_u64(remote_addr, "remote_addr")
        cdef u64 count = as_u64(n, "n")
        cdef NicContext *source = self.context if out else remote.context
        cdef NicContext *target = remote.context if out else self.context
        cdef u64 source_addr = here if out else there
        cdef u64 target_addr = there if out else here
        cdef u64 moved = 0
        cdef bint sending = True
        cdef u64 part, read, written
        cdef Context failed = None
        cdef int why = DONE
        cdef char *packet
        range_in_space(here, count)
        range_in_space(there, count)
        refuse_in_callback()
        packet = <char *> malloc(PACKET)
        if packet == NULL:
            raise MemoryError("rdma")
        while moved < count and why == DONE:
            part = count - moved if count - moved < PACKET else PACKET
            written = 0
            with nogil:
                why = context_transfer(source, source_addr + moved, part, False, packet, &read)
            if why:
                failed = self if out else remote
                sending = True
            if read:                        # what could be read goes on
                with nogil:
                    part = context_transfer(target, target_addr + moved, read, True, packet, &written)
                if part:
                    why = part
                    failed = remote if out else self
                    sending = False
            moved += written
        free(packet)
        raise_pending()
        if failed is not None:
            failed.fail(why, (source_addr if sending else target_addr) + moved, count - moved, not sending, moved)
        return 0

    def access(self, addr, length, write=False):
        """
        A transfer without bytes: translations, faults and registrations as for `rdma_read` or, with `write`, `rdma_write`.
        About 20 ns per page that hits.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 count = as_u64(length, "length")
        self.transfer(at, count, write, NULL)

    # ---- registrations

    def register(self, addr, length, str access="rw"):
        """
        Register memory ahead of its transfers, which do it by themselves otherwise.

        Parameters
        ----------
        addr, length : int
            Bytes, rounded out to pages.
        access : {"r", "rw"}
            What the device may do.

        Returns
        -------
        Registration
            In the registration cache where the design has one: it stays until it is deregistered, and longer if the cache likes.

        Raises
        ------
        RemoteAccessError
            The memory cannot be registered.
        ValueError
            The design registers nothing: ``"bounce"``.
        """
        cdef u64 at = as_u64(addr, "addr")
        cdef u64 count = as_u64(length, "length")
        cdef Registration registration
        range_in_space(at, count)
        if access not in ("r", "rw"):
            raise ValueError(f"access = {access!r}: not 'r' or 'rw'")
        if count == 0:
            raise ValueError("length = 0: nothing to register")
        if self.context.translation == BOUNCE:
            raise ValueError("a bounce buffer is registered once, and nothing else")
        refuse_in_callback()
        registration = Registration.__new__(Registration)
        registration.context = self
        registration.start = at & PAGE_MASK
        registration.end = page_align(at + count)
        registration.begin(access == "rw")
        return registration

    # ---- looking

    @property
    def stats(self):
        """dict: the counts of `Nic.stats`, of this context."""
        cdef NicCounts counts
        with nogil:
            pthread_mutex_lock(&self.context.nic.lock)
            counts = context_counts(self.context)
            pthread_mutex_unlock(&self.context.nic.lock)
        return counts_dict(&counts)

    def violations(self):
        """list of Violation: of this context, among the first 256 of the NIC."""
        return self.nic.noted(self.context.number)

    @property
    def mm(self):
        """AddressSpace: the first that has the memory (`vfork`); None if it is gone."""
        return face_of(self.context.mm)

    @property
    def placement(self):
        return PLACEMENT_NAMES[self.context.placement]

    @property
    def translation(self):
        return TRANSLATION_NAMES[self.context.translation]

    @property
    def fork(self):
        return FORK_NAMES[self.context.fork]

    @property
    def design(self):
        """str: as in ``ioproc.DESIGNS``."""
        return design_name(self.placement, self.translation, self.fork)

    @property
    def attached(self):
        """bool: neither detached nor has the process ended."""
        return not atomic_load(&self.context.gone)

    def __repr__(self):
        return f"<ioproc.Context {self.design}: {'attached' if self.attached else 'detached'}>"


cdef int end_contexts(dict owners) except -1:
    """Of a process that has ended: also those that nobody told."""
    cdef object owned
    for owned in list(owners.values()):
        if isinstance(owned, Context):
            with nogil:
                context_detach((<Context> owned).context)
            (<Context> owned).leave_space()
    return 0


cdef list heirs(dict owners):
    """Before a fork, which may take registrations away: the contexts that the child inherits, and what they have registered."""
    cdef object owned
    return [(owned, (<Context> owned).registrations()) for owned in list(owners.values())
            if isinstance(owned, Context) and (<Context> owned).context.fork == FORK_INHERIT and (<Context> owned).attached]


cdef int inherit_contexts(list inherited, AddressSpace child) except -1:
    for context, registrations in inherited:
        (<Context> context).inherit(child, registrations)
    return 0


cdef u64 accessible(MM *mm, u64 addr, u64 length, bint write) noexcept nogil:
    """Bytes from `addr` on that the mappings allow an access to."""
    cdef u64 at = addr
    cdef const VMArea *vma
    mm_lock(mm)
    vma = vma_at(mm, at)
    while vma != NULL and vma.flags & (VM_WRITE if write else VM_READ) and at < addr + length:
        at = vma.end
        vma = vma_at(mm, at)
    mm_unlock(mm)
    return at - addr


@cython.no_gc_clear               # its end needs the context
cdef class Registration:
    """
    Memory registered with a device, from `Context.register`.

    Attributes
    ----------
    start, end : int
        Bytes; whole pages.
    """
    cdef readonly u64 start
    cdef readonly u64 end
    cdef Context context
    cdef Region *region
    cdef Region own             # of a design without a cache
    cdef bint live

    def __init__(self):
        raise TypeError("a Registration comes from Context.register()")

    cdef int begin(self, bint write) except -1:
        cdef NicContext *context = self.context.context
        cdef u64 start = self.start
        cdef u64 end = self.end
        cdef int why = DONE
        with nogil:
            if context.has_registered:
                why = regcache_get(&context.registered, start, end - start, access_of(write), &self.region)
                if why:
                    why = DETACHED if context_gone(context) else cause_of_cache(why)
            elif context.translation == PIN:
                self.own.start = start
                self.own.end = end
                why = register_pinned(context, start, end, access_of(write), &self.own.handle)
                if why:
                    why = cause_of_cache(why)
            else:
                why = register_preloaded(context, start, end, access_of(write), &self.own.handle)
                if why:
                    why = cause_of_cache(why)
        self.live = why == DONE
        self.context.complete(why, start, end - start, write, 0)
        return 0

    cdef int finish(self) except -1:
        cdef NicContext *context = self.context.context
        self.live = False
        with nogil:
            if self.region != NULL:
                regcache_put(&context.registered, self.region)
            elif self.own.handle != NULL:
                deregister_pinned(context, self.own.start, self.own.end, self.own.handle)
            else:
                deregister_preloaded(context, self.start, self.end, NULL)
        return 0

    def deregister(self):
        """Undo it; ValueError if that was done."""
        if not self.live:
            raise ValueError(f"{self!r} is not registered (any more)")
        refuse_in_callback()
        self.finish()

    def __dealloc__(self):
        if self.live:
            self.finish()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.live:
            self.deregister()

    def __repr__(self):
        return f"<ioproc.Registration {self.start:#x}-{self.end:#x}{'' if self.live else ', deregistered'}>"


def break_interval(AddressSpace mm not None, Context context not None, *, bint bracket=False, bint retry=False):
    """
    For tests: undo what makes interval notifiers safe.

    Parameters
    ----------
    bracket : bool
        An invalidation is over when the callbacks have returned, as IOPROC's is, not when the entries have gone.
    retry : bool
        The driver establishes without asking whether an invalidation came since it read the page table.
    """
    mm.mm.no_brackets = bracket
    context.context.careless = retry
