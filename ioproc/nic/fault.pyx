# NIC faults: the device has no translation for an access, and the driver loads one.


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
