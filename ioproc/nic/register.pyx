# Registrations: what the registration cache, or a transfer of its own, asks for; and the bounce buffer, registered once.


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


# ---- the bounce buffer

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
    cdef FrameBatch batch
    cdef u64 i, pfn
    cdef bint done = True
    context.bounce = <u64 *> calloc(pages, sizeof(u64))
    if context.bounce == NULL:
        return False
    batch_begin(&batch, mem, 0)
    while context.bounce_pages < pages and done:    # without Nic.lock: reclaim may call this NIC back
        pfn = batch_take_reclaimed(&batch)
        done = pfn != 0
        if done:
            atomic_store(&frame_at(mem, pfn).counts, ONE_REFERENCE)
            context.bounce[context.bounce_pages] = pfn
            context.bounce_pages += 1
    batch_end(&batch)
    pthread_mutex_lock(&context.nic.lock)
    for i in range(context.bounce_pages):
        done = done and load_bounce(context, TASK_SIZE + (i << PAGE_SHIFT))
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
