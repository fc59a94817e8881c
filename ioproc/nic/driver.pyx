# The driver: what it knows of a transfer, and the ops of a context.  fault.pyx, register.pyx and attach.pyx are the rest of it.
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
    elif not newprot & VM_WRITE or vma.flags & (VM_HUGETLB | VM_SHARED) == VM_HUGETLB:      # whose entries wait for a write fault
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
    context_preload(<NicContext *> arg, start, end)

cdef void nic_update_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    context_preload(<NicContext *> arg, addr, addr + PAGE_SIZE)

cdef void context_preload(NicContext *context, u64 start, u64 end) noexcept nogil:
    """What an update hook is for: to look at the new entries.  No memory: the device will fault."""
    cdef u64 addr = start
    cdef u64 pte
    pthread_mutex_lock(&context.nic.lock)
    context.counts.callbacks += 1
    while addr < end:
        pte = lookup_any(context.mm, addr)
        if pte_allows(pte, False):
            context.counts.preloaded += context_load(context, addr, word_of(pte, False) | WORD_PRELOADED,
                                                     pte_is_huge(context, pte))
        addr += PAGE_SIZE
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


cdef bint precopy_wants(void *arg, u64 start, u64 end) noexcept nogil:
    """Whether fork is to copy the page [start, end): one of which something is registered, or the device may write to."""
    cdef NicContext *context = <NicContext *> arg
    cdef Region *region
    cdef u32 number
    cdef bint wants = False
    if context.has_registered:
        pthread_mutex_lock(&context.registered.lock)
        region = region_below(&context.registered, end - 1)
        wants = region != NULL and start < region.end
        wants = wants or pending_in(&context.registered, start, end) != NULL    # its pages may be pinned by now
        pthread_mutex_unlock(&context.registered.lock)
    if wants:
        return True
    pthread_mutex_lock(&context.nic.lock)
    while start < end and not wants:
        number = entry_find(context, start)
        wants = number != 0 and context.nic.entries[number].word & PTE_WRITE != 0
        start += PAGE_SIZE
    pthread_mutex_unlock(&context.nic.lock)
    return wants
