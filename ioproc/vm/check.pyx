# The invariants of docs/vm.md, checked: for the tests.

cdef const char *tree_broken(const MM *mm, const Node *node, u64 level, const VMArea **at) noexcept nogil:
    """NULL, or what is wrong at or below `node`, whose VMAs are those from *at on; *at moves behind them."""
    cdef const char *reason
    cdef const VMArea *vma
    cdef const Node *child
    cdef u64 i
    if node.n > NODE_ENTRIES or (node != mm.tree and node.n < NODE_FEW) or (node == mm.tree and level and node.n < 2):
        return "tree: entries of a node"
    for i in range(node.n, <u64> NODE_ENTRIES + 1):
        if node.entry[i].end != UINT64_MAX or node.entry[i].child != NULL:
            return "tree: an entry that is not used"
    for i in range(node.n):
        if level == 0:
            vma = at[0]
            if vma == NULL or node.entry[i].child != vma:
                return "tree: not the VMAs of the list"
            if node.entry[i].end != vma.end:
                return "tree: end"
            if node.gap[i] != vma_gap(vma):
                return "tree: gap"
            at[0] = vma.next
        else:
            child = <const Node *> node.entry[i].child
            reason = tree_broken(mm, child, level - 1, at)
            if reason != NULL:
                return reason
            if node.entry[i].end != node_end(child):
                return "tree: end of a node"
            if node.gap[i] != node_gap(child):
                return "tree: largest gap"
    return NULL


cdef const char *vmas_broken(MM *mm) noexcept nogil:
    cdef const VMArea *vma = mm.first
    cdef const VMArea *prev = NULL
    cdef const AnonLink *link
    cdef const Chain *cell
    cdef u64 count = 0
    cdef u64 total = 0
    cdef u64 data = 0
    cdef u64 locked = 0
    cdef const char *reason
    while vma != NULL:
        if vma.prev != prev or vma.mm != mm or vma.start >= vma.end or (vma.start | vma.end) & (PAGE_SIZE - 1):
            return "VMA list"
        if prev != NULL and prev.end > vma.start:
            return "VMAs overlap"
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
        if vma.flags & VM_LOCKED:
            locked += vma_pages(vma)
        prev = vma
        vma = vma.next
    if mm.last != prev or count != mm.map_count or total != mm.total_pages:
        return "sums over the VMAs"
    if data != mm.data_pages or locked != mm.locked_pages:
        return "sums over the VMAs"
    if mm.made != count or mm.nspare < tree_reserve_size(mm, 0):
        return "reserve of nodes"
    vma = mm.first
    reason = tree_broken(mm, mm.tree, mm.height - 1, &vma)
    if reason == NULL and vma != NULL:
        return "tree: VMAs missing"
    return reason


cdef const char *tables_broken(MM *mm, u32 *mapped, u32 *slots) noexcept nogil:
    """Counts each frame's entries into mapped[] and each swap slot's into slots[], if those are not NULL."""
    cdef u64 addr = 0
    cdef u64 used, i, pte, stop
    cdef u64 rss = 0
    cdef u64 swapped = 0
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
                if pte & PTE_PRESENT and pte & PTE_SWAP:
                    return "an entry present and swapped"
                if not pte & (PTE_PRESENT | PTE_SWAP) and not vma.flags & VM_NONLINEAR:
                    return "an entry neither present nor swapped"
                if pte & PTE_WRITE and not vma.flags & VM_WRITE:
                    return "an entry with more rights than its VMA"
                if pte & PTE_WRITE and not vma.flags & VM_SHARED and not pte & PTE_EXCLUSIVE:
                    return "a private page writable and not exclusive"
                if pte & PTE_SWAP:
                    swapped += 1
                    if slots != NULL:
                        slots[pte_pfn(pte)] += 1
                elif not pte & PTE_UNCOUNTED:
                    rss += 1
                    if mapped != NULL:
                        mapped[pte_pfn(pte)] += 1
        if used != leaf.used or (used == 0 and not mm.root.used & TABLES_STAY):
            return "entries of a table"
        addr = stop
    if rss != mm.rss:
        return "rss"
    if swapped != mm.swapped:
        return "swap entries"
    return NULL


cdef const char *huge_broken(MM *mm, u32 *mapped, u64 *reserved) noexcept nogil:
    """The same for huge pages; mapped[] may be NULL.  Adds what private mappings have reserved to *reserved."""
    cdef const VMArea *vma = mm.first
    cdef u64 at = 0
    cdef u64 used, i, pte, stop
    cdef Table *leaf
    while vma != NULL:
        if vma.flags & VM_HUGETLB and (vma.start | vma.end) & (HUGE_SIZE - 1):
            return "a huge page cut"
        if vma.flags & VM_RESERVED:
            reserved[0] += (vma.end - vma.start) >> HUGE_SHIFT
        vma = vma.next
    while mm.huge != NULL:
        leaf = leaf_next(mm.huge, &at, TASK_SIZE >> 9, &stop)
        if leaf == NULL:
            break
        used = 0
        for i in range(512):
            pte = leaf.entry[i]
            if pte == 0:
                continue
            used += 1
            vma = vma_at(mm, (at + (i << PAGE_SHIFT)) << 9)
            if vma == NULL or not vma.flags & VM_HUGETLB:
                return "an entry outside every hugetlb VMA"
            if vma.flags & VM_RESERVED and (pte & HUGE_SPENT or huge_frame(mm.mem, pte_pfn(pte)).owner & OWNER_ANON):
                reserved[0] -= 1
            if pte == HUGE_SPENT:
                if not vma.flags & VM_RESERVED:
                    return "a reservation spent that was not made"
                continue
            if not pte & PTE_PRESENT or (pte & PTE_WRITE and not vma.flags & VM_WRITE):
                return "a huge entry's rights"
            if mapped != NULL:
                mapped[mm.mem.nframes + 1 + ((pte_pfn(pte) - mm.mem.huge_pfn) >> 9)] += 1
        if used != leaf.used or (used == 0 and not mm.huge.used & TABLES_STAY):
            return "entries of a table of huge pages"
        at = stop
    return NULL


def check_space(AddressSpace space not None):
    """Raise AssertionError if an address space breaks an invariant of its own."""
    cdef const char *reason
    cdef u64 reserved = 0
    space.look_begin()
    with nogil:
        reason = vmas_broken(space.mm)
        if reason == NULL:
            reason = tables_broken(space.mm, NULL, NULL)
        if reason == NULL:
            reason = huge_broken(space.mm, NULL, &reserved)
    space.look_end()
    if reason != NULL:
        raise AssertionError(reason.decode())


def check_memory(PhysicalMemory memory not None, spaces):
    """
    Raise AssertionError if the frames' counts are not what the page tables of `spaces`, which are all that use this memory
    and not in use now, and the page caches add up to.
    """
    cdef Memory *mem = memory.mem
    cdef u32 *mapped = <u32 *> calloc(mem.nframes + 1 + mem.nhuge, sizeof(u32))
    cdef u32 *slots = <u32 *> calloc(mem.nslots + 1, sizeof(u32))
    cdef AddressSpace space
    cdef set seen = set()
    cdef const char *reason = NULL
    cdef u64 pfn, number
    cdef u64 used = 0
    cdef u64 swap_used = 0
    cdef u64 reserved = 0
    try:
        if mapped == NULL or slots == NULL:
            raise MemoryError("check_memory")
        for space in spaces:
            if <size_t> space.mm in seen:           # one after vfork
                continue
            seen.add(<size_t> space.mm)
            reason = tables_broken(space.mm, mapped, slots)
            if reason == NULL:
                reason = huge_broken(space.mm, mapped, &reserved)
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
        if used + frames_free(mem) != mem.nframes:
            raise AssertionError(f"{used} frames used, {frames_free(mem)} free of {mem.nframes}")
        used = 0
        for number in range(mem.nhuge):
            used += mem.huge[number].counts != 0
            if mapcount_of(mem.huge[number].counts) != mapped[mem.nframes + 1 + number]:
                raise AssertionError(f"huge page {number}: counts {mapcount_of(mem.huge[number].counts)} mappings, "
                                     f"has {mapped[mem.nframes + 1 + number]}")
            if mem.huge[number].counts == 0 and (mem.huge[number].contents != NULL or mem.huge[number].owner):
                raise AssertionError(f"huge page {number}: free with contents")
        if used != mem.nhuge - mem.huge_free:
            raise AssertionError(f"{used} huge pages used, {mem.huge_free} free of {mem.nhuge}")
        if not reserved <= mem.huge_reserved <= mem.huge_free:      # the others are files'
            raise AssertionError(f"{mem.huge_reserved} huge pages reserved, {reserved} by private mappings, {mem.huge_free} free")
        for number in range(1, mem.nslots + 1):
            slot = mem.slots[number]
            swap_used += slot.count != 0
            # a page cache's is the one that no entry refers to
            if slot.count != slots[number] and not (slot.count == 1 and slots[number] == 0):
                raise AssertionError(f"swap slot {number}: counts {slot.count} entries, has {slots[number]}")
            if slot.count == 0 and (slot.contents != NULL or slot.pfn):
                raise AssertionError(f"swap slot {number}: free with contents")
            if slot.pfn and mem.slot_of[slot.pfn] != number:
                raise AssertionError(f"swap slot {number}: its frame {slot.pfn} does not know")
        if swap_used != mem.swap_used or mem.swap_used != mem.fresh_slot - 1 - mem.nfree_slots:
            raise AssertionError(f"{swap_used} swap slots used, not {mem.swap_used}")
    finally:
        free(mapped)
        free(slots)


def find_vmas(AddressSpace space not None, const u64[::1] addresses, bint dependent=False):
    """
    How many of the addresses are in a VMA: one look-up in the tree each.  `dependent`: one look-up only starts when the one
    before it is done, as far as the processor is concerned.
    """
    cdef MM *mm = space.mm
    cdef const VMArea *vma
    cdef u64 found = 0
    cdef u64 wait = 0
    cdef Py_ssize_t i
    space.look_begin()
    with nogil:
        for i in range(addresses.shape[0]):
            mm.cached = NULL
            vma = vma_at(mm, addresses[i] + wait)
            if vma != NULL:
                found += 1
                if dependent:
                    wait = vma.flags >> 63
    space.look_end()
    return found
