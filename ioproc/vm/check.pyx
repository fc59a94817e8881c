# The invariants of docs/vm.md, checked: for the tests.

cdef const char *treap_broken(const VMArea *vma, u64 *count) noexcept nogil:
    """NULL, or what is wrong at or below `vma`."""
    cdef const char *reason = NULL
    if vma == NULL:
        return NULL
    count[0] += 1
    if vma.left != NULL:
        if vma.left.parent != vma or vma.left.start >= vma.start or vma.left.priority > vma.priority:
            return "treap: left child"
        reason = treap_broken(vma.left, count)
    if reason == NULL and vma.right != NULL:
        if vma.right.parent != vma or vma.right.start <= vma.start or vma.right.priority > vma.priority:
            return "treap: right child"
        reason = treap_broken(vma.right, count)
    if reason == NULL and vma.max_gap != vma_max_gap(vma):
        return "treap: largest gap"
    return reason


cdef const char *vmas_broken(MM *mm) noexcept nogil:
    cdef const VMArea *vma = mm.first
    cdef const VMArea *prev = NULL
    cdef const AnonLink *link
    cdef const Chain *cell
    cdef u64 count = 0
    cdef u64 total = 0
    cdef u64 data = 0
    cdef const char *reason
    while vma != NULL:
        if vma.prev != prev or vma.mm != mm or vma.start >= vma.end or (vma.start | vma.end) & (PAGE_SIZE - 1):
            return "VMA list"
        if prev != NULL and prev.end > vma.start:
            return "VMAs overlap"
        if vma.gap != vma.start - (prev.end if prev != NULL else 0):
            return "gap"
        if (vma.anon == NULL) != (vma.anon_links == NULL):
            return "anon_vma without links"
        link = vma.anon_links
        while link != NULL:
            if link.vma != vma:
                return "anon_vma link"
            link = link.next
        cell = vma.chain
        while cell != NULL:
            if cell.refs == 0:
                return "dead chain cell"
            cell = cell.next
        count += 1
        total += vma_pages(vma)
        if is_data(vma.flags):
            data += vma_pages(vma)
        prev = vma
        vma = vma.next
    if mm.last != prev or count != mm.map_count or total != mm.total_pages or data != mm.data_pages:
        return "sums over the VMAs"
    count = 0
    reason = treap_broken(mm.tree, &count)
    if reason == NULL and count != mm.map_count:
        return "treap: VMAs missing"
    return reason


cdef const char *tables_broken(MM *mm, u32 *mapped) noexcept nogil:
    """Counts each frame's entries into mapped[], if that is not NULL."""
    cdef u64 addr = 0
    cdef u64 used, i, pte, stop, rss = 0
    cdef const VMArea *vma = mm.first
    cdef Table *leaf
    while True:
        leaf = leaf_next(mm.root, &addr, TASK_SIZE, &stop)
        if leaf == NULL:
            break
        used = 0
        for i in range(512):
            pte = leaf.entry[i]
            if pte:
                used += 1
                while vma != NULL and vma.end <= addr + i * PAGE_SIZE:
                    vma = vma.next
                if vma == NULL or vma.start > addr + i * PAGE_SIZE:
                    return "an entry outside every VMA"
                if not pte & PTE_PRESENT and not vma.flags & VM_NONLINEAR:
                    return "an entry neither empty nor present"
                if pte & PTE_WRITE and not vma.flags & VM_WRITE:
                    return "an entry with more rights than its VMA"
                if pte & PTE_WRITE and not vma.flags & VM_SHARED and not pte & PTE_EXCLUSIVE:
                    return "a private page writable and not exclusive"
                if not pte & PTE_UNCOUNTED:
                    rss += 1
                    if mapped != NULL:
                        mapped[pte_pfn(pte)] += 1
        if used == 0 or used != leaf.used:
            return "entries of a table"
        addr = stop
    if rss != mm.rss:
        return "rss"
    return NULL


def check_space(AddressSpace space not None):
    """Raise AssertionError if an address space breaks an invariant of its own."""
    cdef const char *reason
    space.look_begin()
    with nogil:
        reason = vmas_broken(space.mm)
        if reason == NULL:
            reason = tables_broken(space.mm, NULL)
    space.look_end()
    if reason != NULL:
        raise AssertionError(reason.decode())


def check_memory(PhysicalMemory memory not None, spaces):
    """
    Raise AssertionError if the frames' counts are not what the page tables of `spaces`, which are all that use this memory
    and not in use now, and the page caches add up to.
    """
    cdef Memory *mem = memory.mem
    cdef u32 *mapped = <u32 *> calloc(mem.nframes + 1, sizeof(u32))
    cdef AddressSpace space
    cdef const char *reason = NULL
    cdef u64 pfn
    cdef u64 used = 0
    if mapped == NULL:
        raise MemoryError("check_memory")
    try:
        for space in spaces:
            reason = tables_broken(space.mm, mapped)
            if reason != NULL:
                raise AssertionError(reason.decode())
        for pfn in range(1, mem.nframes + 1):
            if mapcount_of(mem.frames[pfn].counts) != mapped[pfn]:
                raise AssertionError(f"frame {pfn}: counts {mapcount_of(mem.frames[pfn].counts)} mappings, has {mapped[pfn]}")
            if mem.frames[pfn].counts:
                used += 1
                if mem.frames[pfn].owner == 0 and mapped[pfn]:      # a reference alone may keep what left its file
                    raise AssertionError(f"frame {pfn}: mapped without an owner")
            elif mem.frames[pfn].contents != NULL:
                raise AssertionError(f"frame {pfn}: free with contents")
        if used != mem.nframes - mem.nfree or mem.nfree != mem.nreturned + mem.nframes + 1 - mem.fresh:
            raise AssertionError(f"{used} frames used, {mem.nfree} free of {mem.nframes}")
    finally:
        free(mapped)
