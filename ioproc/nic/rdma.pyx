# Transfers: what a context's device does with a range of its process's memory.


cdef int translate(NicContext *context, const Transfer *transfer, u64 addr, bint write, u64 *word) noexcept nogil:
    """One page for the device, by way of the driver if need be.  Nic.lock is held, and let go of meanwhile."""
    cdef NIC *nic = context.nic
    cdef bint again = False
    cdef int why
    while True:
        if unlikely(context.gone):
            return DETACHED
        word[0] = device_translate(context, addr, write, again)
        if word[0]:
            return DONE
        if not again:
            context.counts.faults += 1
        again = True
        pthread_mutex_unlock(&nic.lock)
        why = nic_fault(context, transfer, addr, write)
        pthread_mutex_lock(&nic.lock)
        if why:
            return why


cdef extern from * nogil:
    """
    /* What a device and a process write at once is theirs to settle: nothing for ThreadSanitizer. */
    #if defined(__SANITIZE_THREAD__)
    __attribute__((no_sanitize_thread, noinline))
    static void ioproc_dma(char *to, const char *from, size_t n)
    {
        volatile char *t = to;
        const volatile char *f = from;
        while (n--)
            *t++ = *f++;
    }
    #else
    static void ioproc_dma(char *to, const char *from, size_t n) { memcpy(to, from, n); }
    #endif
    static inline int ioproc_hold(uint64_t *counts)
    {
        uint64_t seen = __atomic_load_n(counts, __ATOMIC_RELAXED);
        while (seen)
            if (__atomic_compare_exchange_n(counts, &seen, seen + (1ULL << 32), 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
                return 1;
        return 0;
    }
    """
    void dma "ioproc_dma"(char *to, const char *source, size_t n)
    bint hold_frame "ioproc_hold"(u64 *counts)      # one more reference, if there is any count


cdef bint word_copy(Memory *mem, u64 word, u64 offset, char *data, u64 count, bint write) noexcept nogil:
    """
    Move bytes of one page.  A device with a stale translation moves them too, to whomever the frame is by now: if nobody's, what
    it writes is lost and what it reads is zeros.  False: no memory.
    """
    cdef FrameBatch batch
    cdef Frame *frame = NULL
    cdef char *contents
    cdef bint done = True
    if not word & (PTE_ZERO | PTE_SPECIAL):
        frame = frame_any(mem, pte_pfn(word))
        if not hold_frame(&frame.counts):
            if not write:
                memset(data, 0, count)
            return True
    contents = page_contents(mem, word, write)
    if contents == NULL and not write:
        memset(data, 0, count)
    elif contents == NULL:
        done = False
    elif write:
        dma(contents + offset, data, count)
        if frame != NULL and pte_pfn(word) <= mem.nframes:
            frame_keep_dirty(frame)
    else:
        dma(data, contents + offset, count)
    if frame != NULL:
        batch_begin(&batch, mem, 0)
        pin_put(&batch, pte_pfn(word))
        batch_end(&batch)
    return done


cdef int device_access(NicContext *context, const Transfer *transfer, u64 addr, u64 length, char *data,
                       u64 *completed) noexcept nogil:
    """The device goes over [addr, addr + length) page by page; without `data` it moves nothing.  Nic.lock is not held."""
    cdef NIC *nic = context.nic
    cdef u64 word, part, phase
    cdef int why = DONE
    cdef bint moved
    pthread_mutex_lock(&nic.lock)
    while completed[0] < length:
        part = PAGE_SIZE - ((addr + completed[0]) & (PAGE_SIZE - 1))
        if part > length - completed[0]:
            part = length - completed[0]
        why = translate(context, transfer, addr + completed[0], transfer.write, &word)
        if why:
            break
        if data != NULL:
            phase = context.phase & 1
            context.flights[phase] += 1
            pthread_mutex_unlock(&nic.lock)
            moved = word_copy(context.mm.mem, word, (addr + completed[0]) & (PAGE_SIZE - 1), data + completed[0], part,
                              transfer.write)
            pthread_mutex_lock(&nic.lock)
            context.flights[phase] -= 1
            if context.flights[phase] == 0:
                pthread_cond_broadcast(&nic.landed)
            if not moved:
                why = NO_FRAME
                break
        completed[0] += part
    pthread_mutex_unlock(&nic.lock)
    return why


cdef int access_pinned_once(NicContext *context, Transfer *transfer, u64 length, char *data, u64 *completed) noexcept nogil:
    """Register, transfer, deregister."""
    cdef Region region
    cdef int why
    memset(&region, 0, sizeof(Region))
    region.start = transfer.start & PAGE_MASK
    region.end = page_align(transfer.end)
    why = register_pinned(context, region.start, region.end, access_of(transfer.write), &region.handle)
    if why:
        return cause_of_cache(why)
    transfer.region = &region
    why = device_access(context, transfer, transfer.start, length, data, completed)
    transfer.region = NULL
    deregister_pinned(context, region.start, region.end, region.handle)
    return why


cdef u32 access_of(bint write) noexcept nogil:
    return REGION_READ | REGION_WRITE if write else REGION_READ


cdef int cause_of_cache(int error) noexcept nogil:
    """What regcache_get says: a cause of ours, or an errno."""
    return -error - CAUSE_ERRNO if -error > CAUSE_ERRNO else NO_FRAME


cdef bint context_gone(NicContext *context) noexcept nogil:
    cdef bint gone
    pthread_mutex_lock(&context.nic.lock)
    gone = context.gone
    pthread_mutex_unlock(&context.nic.lock)
    return gone


cdef int access_registered(NicContext *context, Transfer *transfer, u64 length, char *data, u64 *completed) noexcept nogil:
    """The registration cache's region is used; again with another where an invalidation takes it away meanwhile."""
    cdef Region *region
    cdef int why = STALE
    while why == STALE:
        why = regcache_get(&context.registered, transfer.start, transfer.end - transfer.start, access_of(transfer.write), &region)
        if why:
            return DETACHED if context_gone(context) else cause_of_cache(why)
        if context.translation != PRELOAD_REGISTERED:
            transfer.region = region
        why = device_access(context, transfer, transfer.start, length, data, completed)
        transfer.region = NULL
        regcache_put(&context.registered, region)
    return why


cdef int access_bounced(NicContext *context, const Transfer *transfer, u64 length, char *data, u64 *completed) noexcept nogil:
    """The processor copies between the process's memory and the NIC's buffer; the device never sees the former."""
    cdef MM *mm = context.mm
    cdef Transfer inner
    cdef FrameBatch batch
    cdef u64 done, part, touched, stopped
    cdef int why = ACCESS_OK
    inner = transfer[0]
    while completed[0] < length:
        part = context.bounce_pages << PAGE_SHIFT
        if part > length - completed[0]:
            part = length - completed[0]
        done = 0
        why = device_access(context, &inner, TASK_SIZE, part, NULL, &done)
        if why:
            return why
        done = 0
        mm_lock(mm)
        thread_set_inside(mm)
        if context.gone or mm.dead:
            thread_set_inside(NULL)
            mm_unlock(mm)
            return DETACHED
        if data != NULL:
            why = mm_copy(mm, transfer.start + completed[0], data + completed[0], part, transfer.write, &done)
        else:
            batch_begin(&batch, mm.mem, (part >> PAGE_SHIFT) + 1)
            stopped = (transfer.start + completed[0]) & PAGE_MASK
            why = touch_any(mm, stopped, page_align(transfer.start + completed[0] + part), transfer.write, &batch, &touched,
                            &stopped)
            batch_end(&batch)
            done = part
            if why:
                done = stopped - transfer.start - completed[0] if stopped > transfer.start + completed[0] else 0
        if why:
            why = refusal(mm, transfer.start + completed[0] + done, why)
        thread_set_inside(NULL)
        mm_unlock(mm)
        completed[0] += done
        pthread_mutex_lock(&context.nic.lock)
        context.counts.copied_bytes += done
        pthread_mutex_unlock(&context.nic.lock)
        if why:
            return why
    return DONE


cdef int refusal(MM *mm, u64 addr, int why) noexcept nogil:
    """Of a processor's access."""
    if why == ACCESS_SEGV and vma_at(mm, addr) != NULL:
        return NO_RIGHT
    return cause_of(why)


cdef int context_transfer(NicContext *context, u64 addr, u64 length, bint write, char *data, u64 *completed) noexcept nogil:
    """One message, by the context's design: DONE, or why it ended, after *completed bytes.  No lock is held."""
    cdef Transfer transfer
    cdef int why
    cdef int design = context.translation
    completed[0] = 0
    transfer.start = addr
    transfer.end = addr + length
    transfer.write = write
    transfer.region = NULL
    transfer.preload = False
    if length == 0:
        return DONE
    if design == PIN:
        why = access_pinned_once(context, &transfer, length, data, completed)
    elif design == BOUNCE:
        why = access_bounced(context, &transfer, length, data, completed)
    elif context.has_registered:
        why = access_registered(context, &transfer, length, data, completed)
    else:
        why = device_access(context, &transfer, addr, length, data, completed)
    transfer_done(context, completed[0], why)
    return why


cdef void transfer_done(NicContext *context, u64 completed, int why) noexcept nogil:
    pthread_mutex_lock(&context.nic.lock)
    context.counts.transfers += 1
    context.counts.bytes += completed
    context.counts.errors += why != DONE
    pthread_mutex_unlock(&context.nic.lock)
