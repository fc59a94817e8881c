# Mappings whose entries are made at once, not by faults: device memory (remap_pfn_range) and 2.6.12's private /dev/zero.


cdef bint map_now(MM *mm, u64 start, u64 end, u64 pte, u64 step) noexcept nogil:
    """Fill the empty range with `pte`, `pte` + `step` and so on, between the two hooks.  False: no memory for a table."""
    cdef VMArea *vma = vma_at(mm, start)
    cdef u64 addr = start
    cdef u64 stop
    cdef Table *leaf
    fire_range(mm, INVALIDATE_RANGE, vma, start, end)
    while addr < end:
        leaf = leaf_make(mm.root, addr)
        if leaf == NULL:
            return False
        stop = leaf_end(addr)
        if stop > end:
            stop = end
        while addr < stop:
            pte_set(leaf, table_index(addr, 0), pte)
            pte += step
            addr += PAGE_SIZE
    fire_range(mm, UPDATE_RANGE, vma, start, end)
    return True


cdef i64 mm_mmap_device(MM *mm, u64 addr, u64 length, u64 prot, u64 pfn) noexcept nogil:
    # a file of its own, without a page: what is not mapped is beyond its end
    cdef FileCache *device = file_new(mm.mem, 0)
    cdef VMArea *vma
    cdef u64 pte
    cdef i64 result
    if device == NULL:
        return -ENOMEM
    result = mm_mmap(mm, addr, length, prot, MAP_SHARED, device, pfn << PAGE_SHIFT)
    file_put(device)
    if result < 0:
        return result
    vma = vma_at(mm, <u64> result)          # merged with nobody: nobody else has its file
    vma_set_flags(vma, vma.flags | VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP)
    pte = pte_make(pfn, vma_pte_bits(vma) | PTE_SPECIAL | PTE_YOUNG)
    if vma.flags & VM_WRITE:
        pte |= PTE_WRITE
    if not map_now(mm, vma.start, vma.end, pte, PAGE_SIZE):
        unmap_range(mm, vma.start, vma.end)
        return -ENOMEM
    return result


cdef i64 mm_zeromap(MM *mm, u64 addr, u64 length, u64 prot) noexcept nogil:
    cdef i64 result = mm_mmap(mm, addr, length, prot, MAP_PRIVATE | MAP_ANONYMOUS, NULL, 0)
    cdef u64 start = <u64> result
    cdef u64 end = start + page_align(length)
    if result >= 0 and not map_now(mm, start, end, PTE_ZERO | PTE_YOUNG | vma_pte_bits(vma_at(mm, start)), 0):
        unmap_range(mm, start, end)
        return -ENOMEM
    return result


cdef char *device_contents(Memory *mem, u64 pfn, bint write) noexcept nogil:
    """The bytes of a page of device memory, which begin to exist when they are written; NULL: zeros, or no memory."""
    cdef u64 addr = pfn << PAGE_SHIFT
    cdef u64 *slot
    cdef Table *leaf
    cdef char *contents = NULL
    pthread_mutex_lock(&mem.lock)
    if write and mem.device == NULL:
        mem.device = table_new()
    if mem.device != NULL:
        slot = pte_find(mem.device, addr)
        if slot != NULL:
            contents = <char *> slot[0]
    if write and contents == NULL and mem.device != NULL:
        leaf = leaf_make(mem.device, addr)
        if leaf != NULL:
            contents = <char *> calloc(1, PAGE_SIZE)
            if contents != NULL:
                pte_set(leaf, table_index(addr, 0), <u64> contents)
            else:
                leaf_drop(mem.device, addr)
    pthread_mutex_unlock(&mem.lock)
    return contents


cdef void device_free(Memory *mem) noexcept nogil:
    cdef u64 addr = 0
    cdef u64 stop, i
    cdef Table *leaf
    if mem.device == NULL:
        return
    while True:
        leaf = leaf_next(mem.device, &addr, 1ULL << 48, &stop)
        if leaf == NULL:
            break
        for i in range(512):
            free(<void *> leaf.entry[i])
        addr = stop
    table_free(mem.device, 3)
