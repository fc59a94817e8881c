# The driver: the ops of a context, NIC faults, registrations.
#
# How it keeps the device from what is stale.  With a chain (mm, vma) it establishes under the address space's lock, which its
# callbacks run under too.  With interval notifiers it reads the page table, lets go of that lock, and establishes under the
# NIC's if no invalidation came between.  A callback drops translations and then waits for the accesses in flight.

# Why a transfer ended.
cdef enum Cause:
    DONE
    NO_MAPPING
    NO_RIGHT
    BEYOND_FILE
    NO_FRAME
    DETACHED
    STALE                       # its registration was invalidated: again

cdef tuple CAUSES = (None, "unmapped", "permission", "beyond the file", "out of memory", "detached", "invalidated")

cdef struct Transfer:           # what is being moved
    u64 start                   # bytes, what the driver may attach or register
    u64 end
    bint write                  # into this memory
    Region *region              # pinned
    bint preload                # nobody waits for the translations yet

cdef struct Pinned:             # the handle of a pinned region
    u64 n
    u64 *words                  # as the NIC's, by page

cdef enum:
    PREFAULT_MOST = 2048        # pages
    CAUSE_ERRNO = 1000          # and a Cause: what a registration that fails says to the cache, beside its errnos

cdef extern from * nogil:
    """
    #define IOPROC_ADDRESSES_END (1ULL << 48)
    """
    const u64 ADDRESSES_END "IOPROC_ADDRESSES_END"      # bounce buffers lie between TASK_SIZE and here


cdef u64 word_of(u64 pte, bint write) noexcept nogil:
    """What the device may do with a page: write only where the entry is dirty already, or the page would be taken for clean."""
    cdef u64 word = pte & (~<u64> 0xfff | WORD_BITS)
    if pte & PTE_WRITE and (write or pte & PTE_DIRTY):
        word |= PTE_WRITE
    return word


cdef bint pte_is_huge(const NicContext *context, u64 pte) noexcept nogil:
    return pte_pfn(pte) > context.mm.mem.nframes and not pte & PTE_SPECIAL


cdef u64 lookup_any(const MM *mm, u64 addr) noexcept nogil:
    """The entry of a page of either size.  The lock is held."""
    cdef const u64 *pte = pte_find(mm.root, addr)
    if pte != NULL and pte[0] & PTE_PRESENT:
        return pte[0]
    return huge_lookup(mm, addr)


# ---- callbacks.  Under the lock of the address space.

cdef void context_told(NicContext *context, u64 start, u64 end, bint restrict) noexcept nogil:
    """The device may use no page of the range any more; with `restrict`: write to none."""
    cdef u64 changed
    cdef u64 left = 0
    if context.translation == PIN_CACHE_HOOKS:
        # a page that a registration itself faults in is pinned after that
        left = regcache_take_out(&context.registered, start, end, not context.registering)
    pthread_mutex_lock(&context.nic.lock)
    changed = context_restrict(context, start, end) if restrict else context_drop(context, start, end)
    if restrict:
        context.counts.downgraded += changed
    else:
        context.counts.invalidated += changed
    context.counts.callbacks += 1
    context.counts.invalidations += 1
    context.counts.useful += changed + left != 0
    context.counts.shootdowns += changed + left != 0
    wait_for_flights(context)
    pthread_mutex_unlock(&context.nic.lock)


cdef void context_invalidate(NicContext *context, u64 start, u64 end) noexcept nogil:
    context_told(context, start, end, False)


cdef void context_writeprotect(NicContext *context, u64 start, u64 end) noexcept nogil:
    context_told(context, start, end, True)


cdef void nic_invalidate_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    context_invalidate(<NicContext *> arg, start, end)

cdef void nic_invalidate_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    context_invalidate(<NicContext *> arg, addr, addr + (HUGE_SIZE if vma.flags & VM_HUGETLB else PAGE_SIZE))

cdef void nic_wrprotect_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    context_writeprotect(<NicContext *> arg, addr, addr + (HUGE_SIZE if vma.flags & VM_HUGETLB else PAGE_SIZE))

cdef void nic_change_protection(void *arg, const ioproc_vma *vma, u64 start, u64 end, u32 newprot) noexcept nogil:
    if not newprot & VM_READ:
        context_invalidate(<NicContext *> arg, start, end)
    elif not newprot & VM_WRITE:
        context_writeprotect(<NicContext *> arg, start, end)
    else:
        nic_told(<NicContext *> arg)

cdef void nic_told(NicContext *context) noexcept nogil:
    """Of something that is nothing to it."""
    pthread_mutex_lock(&context.nic.lock)
    context.counts.callbacks += 1
    pthread_mutex_unlock(&context.nic.lock)

cdef void nic_sync_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    nic_told(<NicContext *> arg)           # whatever the device wrote is in memory

cdef void nic_update_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    cdef u64 addr = start
    nic_told(<NicContext *> arg)
    while addr < end:
        context_preload(<NicContext *> arg, addr)
        addr += PAGE_SIZE

cdef void nic_update_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    nic_told(<NicContext *> arg)
    context_preload(<NicContext *> arg, addr)

cdef void context_preload(NicContext *context, u64 addr) noexcept nogil:
    """What an update hook is for: to look at the new entry.  No memory: the device will fault."""
    cdef u64 pte = lookup_any(context.mm, addr)
    cdef u64 word = word_of(pte, False)
    if not pte_allows(pte, False):
        return
    pthread_mutex_lock(&context.nic.lock)
    context.counts.preloaded += context_load(context, addr, word | WORD_PRELOADED, pte_is_huge(context, pte))
    pthread_mutex_unlock(&context.nic.lock)


cdef void nic_release(void *arg, ioproc_mm *mm) noexcept nogil:
    """The process ends: the ops are unlinked already."""
    pthread_mutex_lock(&(<NicContext *> arg).nic.lock)
    (<NicContext *> arg).counts.callbacks += 1
    pthread_mutex_unlock(&(<NicContext *> arg).nic.lock)
    context_end(<NicContext *> arg)


cdef void interval_invalidate(void *arg, u64 start, u64 end, u64 seq) noexcept nogil:
    cdef Attachment *attachment = <Attachment *> arg
    context_invalidate(attachment.context, start if start > attachment.interval.start else attachment.interval.start,
                       end if end < attachment.interval.end else attachment.interval.end)


cdef void interval_removed(void *arg) noexcept nogil:
    """Whoever waits with it in hand may go on: its memory is the context's to the end."""


cdef bint precopy_wants(void *arg, u64 addr) noexcept nogil:
    """Whether fork is to copy the page: one that is registered, or that the device may write to."""
    cdef NicContext *context = <NicContext *> arg
    cdef Region *region
    cdef u32 number
    cdef bint wants = False
    if context.has_registered:
        pthread_mutex_lock(&context.registered.lock)
        region = region_below(&context.registered, addr)
        wants = region != NULL and addr < region.end
        pthread_mutex_unlock(&context.registered.lock)
    pthread_mutex_lock(&context.nic.lock)
    if not wants:
        number = entry_find(context, addr)
        wants = number != 0 and context.nic.entries[number].word & PTE_WRITE != 0
    context.counts.precopied += wants
    pthread_mutex_unlock(&context.nic.lock)
    return wants


# ---- NIC faults

cdef int cause_of(int why) noexcept nogil:
    """Of a failed CPU access."""
    if why == ACCESS_BUS:
        return BEYOND_FILE
    return NO_FRAME if why == ACCESS_OOM else NO_MAPPING


cdef int page_in(MM *mm, u64 addr, bint write, u64 *pte, VMArea **found) noexcept nogil:
    """As get_user_pages: the entry of a page, faulted in.  The lock is held."""
    cdef FrameBatch batch
    cdef VMArea *vma = vma_at(mm, addr)
    cdef int why
    found[0] = vma
    if vma == NULL:
        return NO_MAPPING
    if not vma.flags & (VM_WRITE if write else VM_READ):
        return NO_RIGHT
    pte[0] = lookup_any(mm, addr)
    if not pte_allows(pte[0], write):
        if vma.flags & VM_PFNMAP:
            return NO_RIGHT
        batch_begin(&batch, mm.mem, 1)
        why = access_any(mm, addr, write, &batch, pte)
        batch_end(&batch)
        if why:
            return cause_of(why)
    elif write and not pte[0] & PTE_DIRTY:
        mark_dirty(mm, addr)
        pte[0] |= PTE_DIRTY
    return DONE


cdef void mark_dirty(MM *mm, u64 addr) noexcept nogil:
    """The device will write, and nobody will see when."""
    cdef u64 *pte = pte_find(mm.root, addr)
    if pte == NULL or not pte[0] & PTE_PRESENT:
        pte = huge_entry(mm.huge, addr)
    pte[0] |= PTE_DIRTY | PTE_YOUNG


cdef bint load_counted(NicContext *context, const Transfer *transfer, u64 addr, u64 word, bint huge, bint asked) noexcept nogil:
    """Nic.lock is held.  False: no memory."""
    if transfer.preload:
        context.counts.preloaded += 1
    else:
        context.counts.loaded += 1
        context.counts.prefaulted += not asked
    return context_load(context, addr, word, huge)


cdef u64 prefault_end(const NicContext *context, const VMArea *vma, u64 addr, u64 limit) noexcept nogil:
    """Where what a fault at `addr` loads ends."""
    cdef u64 end = addr + (context.prefault << PAGE_SHIFT)
    if end > limit:
        end = limit
    return end if end < vma.end else vma.end


cdef bint attach_vma(NicContext *context, VMArea **vma, u64 addr, const Transfer *transfer) noexcept nogil:
    """With the chain on VMAs: the transfer's part of this one takes part from now on.  False: no memory, too many VMAs."""
    cdef u64 start = transfer.start & PAGE_MASK
    cdef u64 end = page_align(transfer.end)
    if chain_has(vma[0].chain, &context.ops):
        return True
    if vma[0].flags & VM_HUGETLB:           # which is split between its pages only
        start &= HUGE_MASK
        end = huge_align(end)
    if start < vma[0].start:
        start = vma[0].start
    if end > vma[0].end:
        end = vma[0].end
    if vma_register(context.mm, &context.ops, start, end - start):
        return False
    pthread_mutex_lock(&context.nic.lock)
    context.counts.attachments += 1
    pthread_mutex_unlock(&context.nic.lock)
    vma[0] = vma_at(context.mm, addr)
    return True


cdef int fault_with_chain(NicContext *context, const Transfer *transfer, u64 addr, bint write) noexcept nogil:
    """The page is looked up, faulted in if need be, and established under the lock that the callbacks run under."""
    cdef MM *mm = context.mm
    cdef VMArea *vma = NULL
    cdef u64 pte = 0
    cdef u64 more = 0
    cdef u64 at, end
    cdef int why
    cdef bint done
    while True:
        mm_lock_to_look(mm)
        if context.gone or mm.dead:
            mm_unlock_looked(mm)
            return DETACHED
        if not mm.paused:
            break
        # in the middle of an operation: whoever only looks may
        vma = vma_at(mm, addr)
        pte = lookup_any(mm, addr)
        done = (vma != NULL and pte_allows(pte, write) and (not write or word_of(pte, False) & PTE_WRITE)
                and (context.placement == AT_MM or chain_has(vma.chain, &context.ops)))
        if done:
            pthread_mutex_lock(&context.nic.lock)
            done = load_counted(context, transfer, addr, word_of(pte, False), pte_is_huge(context, pte), True)
            pthread_mutex_unlock(&context.nic.lock)
        mm_unlock_looked(mm)
        if done:
            return DONE
        sched_yield()
    thread_set_inside(mm)
    why = page_in(mm, addr, write, &pte, &vma)
    if why == DONE and context.placement == AT_VMA and not attach_vma(context, &vma, addr, transfer):
        why = NO_FRAME
    if why == DONE:
        # the others first, so that in a small memory they do not take the place of the one asked for
        at = addr + PAGE_SIZE
        end = prefault_end(context, vma, addr, TASK_SIZE)
        while at < end and page_in(mm, at, write, &more, &vma) == DONE:
            if context.placement == AT_VMA and not chain_has(vma.chain, &context.ops):
                break
            pthread_mutex_lock(&context.nic.lock)
            load_counted(context, transfer, at, word_of(more, write), pte_is_huge(context, more), False)
            pthread_mutex_unlock(&context.nic.lock)
            at += PAGE_SIZE
        why = page_in(mm, addr, write, &pte, &vma)      # with frames short, the others may have taken its own
        pthread_mutex_lock(&context.nic.lock)
        if why == DONE and not load_counted(context, transfer, addr, word_of(pte, write), pte_is_huge(context, pte), True):
            why = NO_FRAME
        pthread_mutex_unlock(&context.nic.lock)
    thread_set_inside(NULL)
    mm_unlock(mm)
    return why


cdef u64 attachment_above(const NicContext *context, u64 addr) noexcept nogil:
    """Index of the first that ends above `addr`."""
    cdef u64 low = 0
    cdef u64 high = context.nattachments
    cdef u64 middle
    while low < high:
        middle = (low + high) >> 1
        if context.attachments[middle].interval.end > addr:
            high = middle
        else:
            low = middle + 1
    return low


cdef bint attach_interval(NicContext *context, u64 start, u64 end) noexcept nogil:
    """A notifier for what has none yet.  The address space is locked.  False: no memory."""
    cdef Attachment *attachment
    cdef Attachment **moved
    cdef u64 i, stop, room
    while start < end:
        i = attachment_above(context, start)
        stop = end
        if i < context.nattachments:
            if context.attachments[i].interval.start <= start:
                start = context.attachments[i].interval.end
                continue
            if context.attachments[i].interval.start < stop:
                stop = context.attachments[i].interval.start
        if context.nattachments == context.attachments_room:
            room = 2 * context.attachments_room + 8
            moved = <Attachment **> realloc(context.attachments, room * sizeof(Attachment *))
            if moved == NULL:
                return False
            context.attachments = moved
            context.attachments_room = room
        attachment = <Attachment *> calloc(1, sizeof(Attachment))
        if attachment == NULL:
            return False
        attachment.context = context
        attachment.interval.start = start
        attachment.interval.end = stop
        attachment.interval.arg = attachment
        attachment.interval.invalidate = interval_invalidate
        attachment.interval.removed = interval_removed
        memmove(&context.attachments[i + 1], &context.attachments[i], (context.nattachments - i) * sizeof(Attachment *))
        context.attachments[i] = attachment
        context.nattachments += 1
        intervals_insert(context.mm.intervals, &attachment.interval)
        pthread_mutex_lock(&context.nic.lock)
        context.counts.attachments += 1
        pthread_mutex_unlock(&context.nic.lock)
        start = stop
    return True


cdef int fault_with_interval(NicContext *context, const Transfer *transfer, u64 addr, bint write) noexcept nogil:
    """The page table is read without keeping its lock; what came between is noticed, and it is read again."""
    cdef MM *mm = context.mm
    cdef Interval *interval
    cdef VMArea *vma = NULL
    cdef u64 pte = 0
    cdef u64 words[PREFAULT_MOST]
    cdef u64 seq, n, i, end
    cdef u64 collisions = 0
    cdef int why
    cdef bint huge
    while True:
        mm_lock_to_look(mm)
        why = DETACHED if context.gone or mm.dead else DONE
        if why == DONE and not attach_interval(context, transfer.start & PAGE_MASK, page_align(transfer.end)):
            why = NO_FRAME
        if why == DONE:
            interval = &context.attachments[attachment_above(context, addr)].interval
            # with frames short, the pages of a batch may take each other's: in the end, one alone
            end = interval.end if collisions < 2 else addr + PAGE_SIZE
        mm_unlock_looked(mm)
        if why:
            return why
        schedule_point(READ_BEGIN)
        seq = interval_read_begin(mm.intervals, interval)
        mm_lock_to_look(mm)
        if mm.paused:
            # only if the bracket is not there that would have kept us waiting (for tests), or it is not of this interval
            pte = lookup_any(mm, addr)
            vma = vma_at(mm, addr)
            if vma == NULL or not pte_allows(pte, write) or (write and not pte & PTE_DIRTY):
                mm_unlock_looked(mm)
                sched_yield()
                continue
            why = DONE
            n = 1
            words[0] = word_of(pte, False)
            huge = pte_is_huge(context, pte)
            mm_unlock_looked(mm)
        else:
            thread_set_inside(mm)
            why = DETACHED if context.gone or mm.dead else page_in(mm, addr, write, &pte, &vma)
            n = 0
            huge = why == DONE and pte_is_huge(context, pte)
            while why == DONE:
                words[n] = word_of(pte, write)
                n += 1
                if (n == PREFAULT_MOST or addr + (n << PAGE_SHIFT) >= prefault_end(context, vma, addr, end)
                        or page_in(mm, addr + (n << PAGE_SHIFT), write, &pte, &vma) or pte_is_huge(context, pte) != huge):
                    break
            thread_set_inside(NULL)
            mm_unlock(mm)
        if why:
            return why
        schedule_point(ESTABLISH)
        pthread_mutex_lock(&context.nic.lock)
        if context.gone:
            why = DETACHED
        if why or not interval_read_retry(mm.intervals, interval, seq) or context.careless:
            i = n
            while i and why == DONE:
                i -= 1
                if not load_counted(context, transfer, addr + (i << PAGE_SHIFT), words[i], huge, i == 0):
                    why = NO_FRAME
            pthread_mutex_unlock(&context.nic.lock)
            return why
        context.counts.retries += 1
        pthread_mutex_unlock(&context.nic.lock)
        collisions += 1


cdef int fault_in_region(NicContext *context, const Transfer *transfer, u64 addr) noexcept nogil:
    """NIC memory has lost a pinned page's translation: the driver knows it still."""
    cdef const Pinned *pinned = <const Pinned *> transfer.region.handle
    cdef u64 word = pinned.words[(addr - transfer.region.start) >> PAGE_SHIFT]
    cdef int why = DONE
    cdef bint valid
    pthread_mutex_lock(&context.nic.lock)
    pthread_mutex_lock(&context.registered.lock)
    valid = transfer.region.cached or context.translation == PIN
    pthread_mutex_unlock(&context.registered.lock)
    # an invalidation takes the region from the cache first, and then what was loaded of it
    if context.gone:
        why = DETACHED
    elif not valid:
        why = STALE
    elif not load_counted(context, transfer, addr, word, pte_is_huge(context, word), True):
        why = NO_FRAME
    pthread_mutex_unlock(&context.nic.lock)
    return why


cdef bint load_bounce(NicContext *context, u64 addr) noexcept nogil:
    """Nic.lock is held.  False: no memory."""
    return context_load(context, addr, pte_make(context.bounce[(addr - TASK_SIZE) >> PAGE_SHIFT], PTE_PRESENT | PTE_WRITE), False)


cdef int fault_in_bounce(NicContext *context, const Transfer *transfer, u64 addr) noexcept nogil:
    cdef int why = DONE
    pthread_mutex_lock(&context.nic.lock)
    context.counts.loaded += 1
    if context.gone:
        why = DETACHED
    elif not load_bounce(context, addr):
        why = NO_FRAME
    pthread_mutex_unlock(&context.nic.lock)
    return why


cdef bint bounce_new(NicContext *context, u64 pages) noexcept nogil:
    """The NIC's buffer, registered once.  False: no frame or no memory."""
    cdef Memory *mem = context.mm.mem
    cdef bint done = True
    context.bounce = <u64 *> calloc(pages, sizeof(u64))
    if context.bounce == NULL:
        return False
    pthread_mutex_lock(&context.nic.lock)
    while context.bounce_pages < pages and done:
        context.bounce[context.bounce_pages] = pool_take(mem)
        done = context.bounce[context.bounce_pages] != 0
        if done:
            atomic_store(&frame_at(mem, context.bounce[context.bounce_pages]).counts, ONE_REFERENCE)
            context.bounce_pages += 1
            done = load_bounce(context, TASK_SIZE + ((context.bounce_pages - 1) << PAGE_SHIFT))
    if done:
        context.counts.registrations += 1
        context.counts.registered_pages += pages
    count_pinned(context, context.bounce_pages)
    pthread_mutex_unlock(&context.nic.lock)
    return done


cdef void bounce_free(NicContext *context) noexcept nogil:
    cdef FrameBatch batch
    cdef u64 i
    batch_begin(&batch, context.mm.mem, 0)
    for i in range(context.bounce_pages):
        frame_put(&batch, context.bounce[i])
    batch_end(&batch)
    pthread_mutex_lock(&context.nic.lock)
    count_pinned(context, -context.bounce_pages)
    pthread_mutex_unlock(&context.nic.lock)
    free(context.bounce)
    context.bounce = NULL


cdef int nic_fault(NicContext *context, const Transfer *transfer, u64 addr, bint write) noexcept nogil:
    """The device has no translation for the access: the driver loads one.  DONE, or why there is none."""
    addr &= PAGE_MASK
    if addr >= TASK_SIZE:
        return fault_in_bounce(context, transfer, addr)
    if transfer.region != NULL:
        return fault_in_region(context, transfer, addr)
    if context.placement == AT_INTERVAL:
        return fault_with_interval(context, transfer, addr, write)
    return fault_with_chain(context, transfer, addr, write)


# ---- registrations: what the cache, or a transfer of its own, asks for

cdef int pinned_page(MM *mm, u64 addr, bint write, u64 *word) noexcept nogil:
    """Pin one page; for writing where the mapping allows it, so that no later write parts page and address."""
    cdef VMArea *vma = vma_at(mm, addr)
    cdef u64 pte = 0
    cdef int why
    if vma != NULL and vma.flags & VM_PFNMAP:
        return NO_RIGHT
    write = write or (vma != NULL and vma.flags & VM_WRITE != 0 and not vma.flags & VM_SHARED)
    why = page_in(mm, addr, write, &pte, &vma)
    if why == DONE:
        word[0] = word_of(pte, write)
        if not pte & PTE_ZERO:
            atomic_add(&frame_any(mm.mem, pte_pfn(pte)).counts, ONE_REFERENCE)
    return why


cdef void pinned_free(Memory *mem, Pinned *pinned) noexcept nogil:
    cdef FrameBatch batch
    cdef u64 i
    batch_begin(&batch, mem, 0)
    for i in range(pinned.n):
        if not pinned.words[i] & PTE_ZERO:
            pin_put(&batch, pte_pfn(pinned.words[i]))
    batch_end(&batch)
    free(pinned.words)
    free(pinned)


cdef int register_pinned(void *arg, u64 start, u64 end, u32 access, void **handle) noexcept nogil:
    """0, or -CAUSE_ERRNO less the Cause."""
    cdef NicContext *context = <NicContext *> arg
    cdef MM *mm = context.mm
    cdef Pinned *pinned = <Pinned *> calloc(1, sizeof(Pinned))
    cdef Transfer transfer
    cdef VMArea *vma
    cdef u64 *moved
    cdef u64 addr = start
    cdef u64 room = 0
    cdef u64 i
    cdef int why = DONE
    if pinned == NULL:
        return -CAUSE_ERRNO - NO_FRAME
    mm_lock(mm)
    thread_set_inside(mm)
    context.registering = True
    if context.gone or mm.dead:
        why = DETACHED
    transfer.start = start
    transfer.end = end
    if why == DONE and context.placement == AT_INTERVAL and not attach_interval(context, start, end):
        why = NO_FRAME
    while addr < end and why == DONE:
        if pinned.n == room:                # by what there is: the range may be larger than any memory
            room = 2 * room + 64
            moved = <u64 *> realloc(pinned.words, room * sizeof(u64))
            if moved == NULL:
                why = NO_FRAME
                break
            pinned.words = moved
        why = pinned_page(mm, addr, access & REGION_WRITE, &pinned.words[pinned.n])
        pinned.n += why == DONE
        vma = vma_at(mm, addr)
        if why == DONE and context.placement == AT_VMA and not attach_vma(context, &vma, addr, &transfer):
            why = NO_FRAME
        addr += PAGE_SIZE
    if why == DONE:
        pthread_mutex_lock(&context.nic.lock)
        for i in range(pinned.n):
            # what does not fit is loaded when it is needed
            context_load(context, start + (i << PAGE_SHIFT), pinned.words[i], pte_is_huge(context, pinned.words[i]))
        context.counts.registrations += 1
        context.counts.registered_pages += pinned.n
        context.counts.preloaded += pinned.n
        count_pinned(context, pinned.n)
        pthread_mutex_unlock(&context.nic.lock)
    context.registering = False
    thread_set_inside(NULL)
    mm_unlock(mm)
    if why:
        pinned_free(mm.mem, pinned)
        return -CAUSE_ERRNO - why
    handle[0] = pinned
    return 0


cdef void drop_uncached(NicContext *context, u64 start, u64 end) noexcept nogil:
    """The translations of a region that goes, but for what the one it was merged into has loaded.  Nic.lock is held."""
    cdef const Region *region
    cdef u64 stop
    if context.has_registered:
        pthread_mutex_lock(&context.registered.lock)
    while start < end:
        stop = end
        region = region_below(&context.registered, start) if context.has_registered else NULL
        if region != NULL and region.end > start:
            start = region.end
            continue
        region = region_above(&context.registered, start) if context.has_registered else NULL
        if region != NULL and region.start < stop:
            stop = region.start
        context_drop(context, start, stop)
        start = stop
    if context.has_registered:
        pthread_mutex_unlock(&context.registered.lock)


cdef void deregister_pinned(void *arg, u64 start, u64 end, void *handle) noexcept nogil:
    cdef NicContext *context = <NicContext *> arg
    cdef Pinned *pinned = <Pinned *> handle
    pthread_mutex_lock(&context.nic.lock)
    drop_uncached(context, start, end)
    context.counts.deregistrations += 1
    context.counts.deregistered_pages += pinned.n
    count_pinned(context, -pinned.n)
    wait_for_flights(context)
    pthread_mutex_unlock(&context.nic.lock)
    pinned_free(context.mm.mem, pinned)


cdef int register_preloaded(void *arg, u64 start, u64 end, u32 access, void **handle) noexcept nogil:
    """No pin: the device is told of the pages there are, faulted in; what is invalidated later it faults for."""
    cdef NicContext *context = <NicContext *> arg
    cdef Transfer transfer
    cdef u64 addr = start
    cdef int why = DONE
    transfer.start = start
    transfer.end = end
    transfer.write = access & REGION_WRITE != 0
    transfer.region = NULL
    transfer.preload = True
    while addr < end and why == DONE:
        why = nic_fault(context, &transfer, addr, transfer.write)
        addr += PAGE_SIZE
    if why:
        return -CAUSE_ERRNO - why
    pthread_mutex_lock(&context.nic.lock)
    context.counts.registrations += 1
    context.counts.registered_pages += (end - start) >> PAGE_SHIFT
    pthread_mutex_unlock(&context.nic.lock)
    return 0


cdef void deregister_preloaded(void *arg, u64 start, u64 end, void *handle) noexcept nogil:
    cdef NicContext *context = <NicContext *> arg
    pthread_mutex_lock(&context.nic.lock)
    drop_uncached(context, start, end)
    context.counts.deregistrations += 1
    context.counts.deregistered_pages += (end - start) >> PAGE_SHIFT
    wait_for_flights(context)
    pthread_mutex_unlock(&context.nic.lock)


# ---- attaching and detaching

cdef void context_ops(NicContext *context) noexcept nogil:
    cdef ioproc_ops *ops = &context.ops
    ops.version = IOPROC_ABI_VERSION
    ops.size = sizeof(ioproc_ops)
    ops.arg = context
    ops.release = nic_release
    ops.sync_range = nic_sync_range
    ops.invalidate_range = nic_invalidate_range
    ops.change_protection = nic_change_protection
    ops.invalidate_page = nic_invalidate_page
    if context.fork != FORK_POSTED:
        ops.wrprotect_page = nic_wrprotect_page
    if context.translation == PRELOAD:
        ops.update_range = nic_update_range
        ops.update_page = nic_update_page


cdef int context_attach(NicContext *context) noexcept nogil:
    """0, or a negative errno and nothing is attached.  The address space is locked."""
    cdef MM *mm = context.mm
    cdef int error = 0
    if not tables_stay(mm):
        return -ENOMEM
    atomic_add(&mm.mem.devices, 1)
    context_ops(context)
    if context.placement == AT_MM:
        error = mm_register(mm, &context.ops)
    elif context.placement == AT_INTERVAL:
        if mm.intervals == NULL:
            mm.intervals = intervals_new()
            if mm.intervals == NULL:
                return -ENOMEM
        mm.hooked += 1
    if error == 0 and context.fork == FORK_PRECOPY:
        context.precopy.wants = precopy_wants
        context.precopy.arg = context
        context.precopy.next = mm.precopy
        mm.precopy = &context.precopy
        mm.hooked += 1
    return error


cdef void context_end(NicContext *context) noexcept nogil:
    """
    No translation, no registration any more, and no access in flight; what is asked for from now on finds it detached.  The
    address space is locked, and no chain has the ops any more.
    """
    cdef MM *mm = context.mm
    cdef Precopy **link = &mm.precopy
    cdef u64 i
    cdef bint first
    pthread_mutex_lock(&context.nic.lock)
    first = not context.gone
    context.gone = True
    context_drop(context, 0, ADDRESSES_END)
    wait_for_flights(context)
    pthread_mutex_unlock(&context.nic.lock)
    if not first:
        return
    if context.fork == FORK_PRECOPY:
        while link[0] != &context.precopy:
            link = &link[0].next
        link[0] = link[0].next
        mm.hooked -= 1
    if context.placement == AT_INTERVAL:
        for i in range(context.nattachments):
            intervals_remove(mm.intervals, &context.attachments[i].interval)
        mm.hooked -= 1
    if context.has_registered:
        regcache_close(&context.registered)
    if context.bounce != NULL:
        bounce_free(context)


cdef void context_detach(NicContext *context) noexcept nogil:
    """From a process that goes on, or has ended without being asked to tell (placement "none")."""
    cdef MM *mm = context.mm
    cdef void *outer = thread_inside()      # of the garbage collector, perhaps
    mm_lock(mm)
    thread_set_inside(mm)
    if not context.gone:
        if context.placement == AT_MM and not mm.dead:
            mm_unregister(mm, &context.ops)
        elif context.placement == AT_VMA and not mm.dead:
            vma_unregister(mm, &context.ops, 0, TASK_SIZE & PAGE_MASK)
        context_end(context)
    thread_set_inside(outer)
    mm_unlock(mm)


cdef int inherit_attachments(NicContext *parent, NicContext *child) noexcept nogil:
    """What of the parent takes part does in the child; both are at rest.  Parent's lock, then the child's: it is newer."""
    cdef VMArea *vma = child.mm.first
    cdef const VMArea *like
    cdef bint done = True
    cdef u64 i = 0
    cdef u64 start
    mm_lock(parent.mm)
    mm_lock(child.mm)
    while parent.placement == AT_VMA and vma != NULL and done:
        like = vma_at(parent.mm, vma.start)
        if like != NULL and chain_has(like.chain, &parent.ops):
            start = vma.start               # it may be merged with the one before
            done = vma_register(child.mm, &child.ops, start, vma.end - start) == 0
            vma = vma_at(child.mm, start)
        vma = vma.next
    while parent.placement == AT_INTERVAL and i < parent.nattachments and done:
        done = attach_interval(child, parent.attachments[i].interval.start, parent.attachments[i].interval.end)
        i += 1
    mm_unlock(child.mm)
    mm_unlock(parent.mm)
    return DONE if done else NO_FRAME
