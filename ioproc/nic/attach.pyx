# Attaching a context to its address space, and detaching it.


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
    atomic_store(&context.gone, True)
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
    cdef int error = 0
    mm_lock(mm)
    thread_set_inside(mm)
    if not context.gone:
        if context.placement == AT_MM and not mm.dead:
            error = mm_unregister(mm, &context.ops)
        elif context.placement == AT_VMA and not mm.dead:
            error = vma_unregister(mm, &context.ops, 0, TASK_SIZE & PAGE_MASK)
        if error == -ENOMEM:
            chains_cut(mm, &context.ops)
        context_end(context)
    thread_set_inside(outer)
    mm_unlock(mm)


cdef int inherit_attachments(NicContext *parent, NicContext *child) noexcept nogil:
    """
    What of the parent takes part does in the child, unless somebody has detached it already.  DETACHED: the parent is, by now.
    Parent's lock, then the child's: it is newer.
    """
    cdef VMArea *vma
    cdef const VMArea *like
    cdef bint done
    cdef bint left
    cdef u64 i = 0
    cdef u64 start
    mm_lock(parent.mm)
    mm_lock(child.mm)
    left = parent.gone
    vma = child.mm.first
    done = not child.gone
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
    if not done and not child.gone:
        return NO_FRAME
    return DETACHED if left else DONE
