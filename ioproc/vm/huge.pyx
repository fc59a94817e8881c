# Huge pages: mapping and reserving, faults, fork, protection, moves.

cdef enum:
    MAP_HUGETLB = 0x40000
    MAP_HUGE_SHIFT = 26


cdef bint huge_pool_new(Memory *mem, u64 count) noexcept nogil:
    cdef u64 i
    mem.huge = <Frame *> calloc(count + 1, sizeof(Frame))
    mem.huge_stack = <u32 *> malloc((count + 1) * sizeof(u32))
    if mem.huge == NULL or mem.huge_stack == NULL:
        return False
    mem.huge_pfn = (mem.nframes + HUGE_PAGES) & ~<u64> (HUGE_PAGES - 1)
    mem.nhuge = count
    mem.huge_free = count
    for i in range(count):
        mem.huge_stack[i] = <u32> (count - 1 - i)       # taken from the end: lowest first
    return True


cdef i64 huge_address(MM *mm, u64 addr, u64 length, bint fixed) noexcept nogil:
    """`address_find` for what must be aligned to 2 MiB."""
    cdef u64 found
    if length > TASK_SIZE:
        return -ENOMEM
    if fixed:
        return -EINVAL if addr & (HUGE_SIZE - 1) else address_find(mm, addr, length, True)
    addr = huge_align(addr)
    if addr != 0 and addr <= TASK_SIZE - length and vma_first_in(mm, addr, addr + length) == NULL:
        return <i64> addr
    found = gap_find(mm, length + HUGE_SIZE - PAGE_SIZE, MMAP_BASE)
    return <i64> ((found + HUGE_SIZE - PAGE_SIZE) & HUGE_MASK) if found else -ENOMEM


cdef i64 mmap_huge_anonymous(MM *mm, u64 addr, u64 length, u64 prot, u64 flags, u64 offset) noexcept nogil:
    """MAP_ANONYMOUS | MAP_HUGETLB, private too: a huge file that nobody else has."""
    cdef u64 shift = flags >> MAP_HUGE_SHIFT & 0x3f
    cdef FileCache *file
    cdef i64 result
    length = huge_align(length)
    if (shift != 0 and shift != HUGE_SHIFT) or length == 0:
        return -EINVAL
    file = file_new(mm.mem, length)
    if file == NULL:
        return -ENOMEM
    file.huge = True
    file.anonymous = True
    result = mm_mmap(mm, addr, length, prot, flags & ~<u64> (MAP_ANONYMOUS | MAP_HUGETLB), file, offset)
    file_put(file)
    return result


cdef bint huge_reserve_file(FileCache *file, u64 start, u64 end) noexcept nogil:
    """Reserve what the file has not yet in [start, end), bytes.  False: too few pages, nothing changed.  Memory.lock is held."""
    cdef Memory *mem = file.mem
    cdef u64 needed = 0
    cdef u64 at = start
    cdef u64 *entry
    cdef Table *leaf
    while at < end:
        entry = huge_entry(file.pages, at)
        needed += entry == NULL or entry[0] == 0
        if needed > mem.huge_free - mem.huge_reserved:
            return False
        at += HUGE_SIZE
    at = start
    while at < end:
        leaf = leaf_make(file.pages, at >> 9)
        if leaf == NULL:
            return False                    # those before it stay the file's
        if leaf.entry[table_index(at >> 9, 0)] == 0:
            pte_set(leaf, table_index(at >> 9, 0), HUGE_RESERVED)
            mem.huge_reserved += 1
        at += HUGE_SIZE
    return True


cdef int huge_reserve(VMArea *vma) noexcept nogil:
    """What a new mapping needs of the pool; a writable one makes its file long enough."""
    cdef FileCache *file = vma.file
    cdef Memory *mem = file.mem
    cdef u64 offset = vma.pgoff << PAGE_SHIFT
    cdef u64 end = offset + (vma.end - vma.start)
    cdef bint done = True
    if offset & (HUGE_SIZE - 1):
        return -EINVAL
    pthread_mutex_lock(&mem.lock)
    if vma.flags & VM_NORESERVE:
        pass
    elif vma.flags & VM_SHARED:
        done = huge_reserve_file(file, offset, end)
    elif (end - offset) >> HUGE_SHIFT <= mem.huge_free - mem.huge_reserved:
        mem.huge_reserved += (end - offset) >> HUGE_SHIFT
        vma.flags |= VM_RESERVED
    else:
        done = False
    if done and vma.flags & VM_WRITE and file.size < end:
        atomic_store(&file.size, end)
    pthread_mutex_unlock(&mem.lock)
    return 0 if done else -ENOMEM


cdef void huge_unreserve(VMArea *vma) noexcept nogil:
    """The owner's mapping goes; its pages have gone."""
    cdef MM *mm = vma.mm
    cdef u64 unused = (vma.end - vma.start) >> HUGE_SHIFT
    cdef u64 at = vma.start
    cdef u64 *pte
    while at < vma.end:
        pte = huge_entry(mm.huge, at)
        if pte != NULL and pte[0] == HUGE_SPENT:
            unused -= 1
            pte[0] = 0
            entry_dropped(mm.huge, at >> 9)
        at += HUGE_SIZE
    pthread_mutex_lock(&mm.mem.lock)
    mm.mem.huge_reserved -= unused
    pthread_mutex_unlock(&mm.mem.lock)


cdef void entry_dropped(Table *root, u64 at) noexcept nogil:
    """An entry has become empty."""
    cdef Table *leaf = leaf_find(root, at)
    leaf.used -= 1
    if leaf.used == 0:
        leaf_drop(root, at)


cdef void huge_file_drop(FileCache *file, u64 start, u64 end, bint all) noexcept nogil:
    """Pages of [start, end) leave the page cache; with `all` what is only reserved is given back too.  Memory.lock is held."""
    cdef Memory *mem = file.mem
    cdef u64 at = start >> 9
    cdef u64 stop, begin, i, pfn
    cdef Table *leaf
    while True:
        leaf = leaf_next(file.pages, &at, end >> 9, &stop)
        if leaf == NULL:
            return
        begin = at
        while at < stop:
            i = table_index(at, 0)
            at += PAGE_SIZE
            pfn = leaf.entry[i]
            if pfn == 0 or (pfn == HUGE_RESERVED and not all):
                continue
            leaf.entry[i] = 0
            leaf.used -= 1
            if pfn == HUGE_RESERVED:
                mem.huge_reserved -= 1
                continue
            atomic_store(&huge_frame(mem, pfn).owner, 0)
            if atomic_sub(&huge_frame(mem, pfn).counts, ONE_REFERENCE) == 0:
                huge_give(mem, pfn)
        if leaf.used == 0:
            leaf_drop(file.pages, begin)


# ---- faults

cdef void huge_own(Frame *frame, VMArea *vma, u64 addr) noexcept nogil:
    atomic_store(&frame.index, vma_index(vma, addr))
    atomic_store(&frame.owner, <u64> vma.anon | OWNER_ANON)


cdef bint huge_take_back(MM *mm, VMArea *vma, u64 addr, u64 pfn) noexcept nogil:
    """
    The pool is empty, and the owner of a reservation is to write to the page it was spent on: whoever else maps it since a
    fork loses it for good, and is told.  False: some of them are in use, and are not waited for.
    """
    cdef Memory *mem = mm.mem
    cdef Frame *frame = huge_frame(mem, pfn)
    cdef Spot *spot
    cdef Scan scan
    cdef bint done
    cdef u64 i
    scan_begin(&scan, mem)
    pthread_mutex_lock(&mem.lock)
    done = scan_frame(&scan, frame, atomic_load(&frame.owner), pfn)
    pthread_mutex_unlock(&mem.lock)
    if done:
        for i in range(scan.nspots):
            spot = &scan.spots[i]
            if spot.vma.mm != mm:
                fire_page(spot.vma.mm, INVALIDATE_PAGE, spot.vma, spot.addr)
                spot.pte[0] = 0
                spot.vma.flags |= VM_ROBBED
                entry_dropped(spot.vma.mm.huge, spot.addr >> 9)
                atomic_sub(&frame.counts, 1)
    scan_unlock(&scan)
    scan_end(&scan)
    return done and mapcount_of(atomic_load(&frame.counts)) == 1


cdef bint huge_copy(Memory *mem, u64 pfn, const Frame *frame, bint reserved) noexcept nogil:
    """The contents of another for a page that was just taken, now counted once.  False: no memory, and it went back."""
    cdef Frame *copy = huge_frame(mem, pfn)
    copy.counts = 1
    if frame.contents != NULL:
        copy.contents = <char *> malloc(HUGE_SIZE)
        if copy.contents == NULL:
            huge_put(mem, pfn, 1, reserved)
            return False
        memcpy(copy.contents, frame.contents, HUGE_SIZE)
    return True


cdef int huge_write_fault(MM *mm, VMArea *vma, u64 addr, u64 *pte, bint told) noexcept nogil:
    """
    A write to a private page that is mapped read-only.  `told`: devices may know the entry; else this very fault made it.
    """
    cdef Memory *mem = mm.mem
    cdef u64 old = pte_pfn(pte[0])
    cdef Frame *frame = huge_frame(mem, old)
    cdef u64 pfn = 0
    cdef bint anonymous = atomic_load(&frame.owner) & OWNER_ANON != 0
    cdef bint reserved = not anonymous and vma.flags & VM_RESERVED and not pte[0] & HUGE_SPENT
    cdef bint alone = anonymous and mapcount_of(atomic_load(&frame.counts)) == 1
    if not alone:
        pthread_mutex_lock(&mem.lock)
        pfn = huge_take(mem, reserved)
        pthread_mutex_unlock(&mem.lock)
        if pfn == 0:
            if not anonymous or not vma.flags & VM_RESERVED or not huge_take_back(mm, vma, addr, old):
                return ACCESS_BUS
    if not anon_prepare(vma):               # not before there is a page: fork would see it
        if pfn:
            huge_frame(mem, pfn).counts = 1
            huge_put(mem, pfn, 1, reserved)
        return ACCESS_OOM
    if pfn == 0:
        huge_own(frame, vma, addr)
        pte[0] |= PTE_WRITE | PTE_DIRTY | PTE_YOUNG | PTE_EXCLUSIVE
        mm.faults.reuse += told
    elif not huge_copy(mem, pfn, frame, reserved):
        return ACCESS_OOM
    else:
        if told:
            fire_page(mm, INVALIDATE_PAGE, vma, addr)
        huge_own(huge_frame(mem, pfn), vma, addr)
        huge_put(mem, old, 1, False)
        pte[0] = pte_make(pfn, PTE_PRESENT | PTE_USER | PTE_WRITE | PTE_YOUNG | PTE_DIRTY | PTE_EXCLUSIVE)
        mm.faults.cow += told
    if told:
        fire_page(mm, UPDATE_PAGE, vma, addr)
    return ACCESS_OK


cdef u64 huge_page(VMArea *vma, u64 addr, u64 spent, bint *cached) noexcept nogil:
    """
    The page for an entry that maps none, counted as mapped: the page cache's, put there first if the mapping is shared, else a
    new one of the mapping's own.  0: there is none.  Memory.lock is held.
    """
    cdef FileCache *file = vma.file
    cdef Memory *mem = file.mem
    cdef u64 at = vma_index(vma, addr) << PAGE_SHIFT
    cdef Table *leaf
    cdef u64 *entry = huge_entry(file.pages, at)
    cdef u64 pfn = 0
    cached[0] = True
    if entry != NULL and entry[0] > HUGE_RESERVED:
        pfn = entry[0]
        atomic_add(&huge_frame(mem, pfn).counts, 1)
    elif vma.flags & VM_SHARED:
        leaf = leaf_make(file.pages, at >> 9)
        if leaf == NULL:
            return 0
        entry = &leaf.entry[table_index(at >> 9, 0)]
        pfn = huge_take(mem, entry[0] == HUGE_RESERVED)
        if pfn:
            huge_frame(mem, pfn).counts = ONE_REFERENCE + 1
            huge_frame(mem, pfn).index = at >> PAGE_SHIFT
            atomic_store(&huge_frame(mem, pfn).owner, <u64> file)
            leaf.used += entry[0] == 0
            entry[0] = pfn
        elif leaf.used == 0:
            leaf_drop(file.pages, at >> 9)
    elif vma.anon != NULL:                  # else it has just left the page cache
        cached[0] = False
        pfn = huge_take(mem, vma.flags & VM_RESERVED and spent != HUGE_SPENT)
        if pfn:
            huge_frame(mem, pfn).counts = 1
            huge_own(huge_frame(mem, pfn), vma, addr)
    return pfn


cdef bint huge_is_cached(FileCache *file, u64 at) noexcept nogil:
    cdef u64 *entry
    cdef bint cached
    pthread_mutex_lock(&file.mem.lock)
    entry = huge_entry(file.pages, at)
    cached = entry != NULL and entry[0] > HUGE_RESERVED
    pthread_mutex_unlock(&file.mem.lock)
    return cached


cdef int huge_fault(MM *mm, VMArea *vma, u64 addr, bint write) noexcept nogil:
    """
    A fault at `addr`, aligned to 2 MiB, in a hugetlb VMA that allows the access.  Like the prefault of old it fires nothing where
    nothing was mapped; a write to what is mapped fires as for a small page, once.
    """
    cdef Memory *mem = mm.mem
    cdef u64 at = vma_index(vma, addr) << PAGE_SHIFT
    cdef bint shared = vma.flags & VM_SHARED != 0
    cdef bint cached = False
    cdef u64 bits = PTE_YOUNG | vma_pte_bits(vma)
    cdef u64 pfn = 0
    cdef int why = ACCESS_BUS
    cdef Table *leaf
    cdef u64 *pte
    if mm.huge == NULL:
        mm.huge = table_new()
    leaf = leaf_make(mm.huge, addr >> 9) if mm.huge != NULL else NULL
    if leaf == NULL:
        return ACCESS_OOM
    pte = &leaf.entry[table_index(addr >> 9, 0)]
    if pte[0] & PTE_PRESENT:
        return huge_write_fault(mm, vma, addr, pte, True)
    if vma.flags & VM_ROBBED:               # whatever the pool has: who lost a page gets no other
        if leaf.used == 0:
            leaf_drop(mm.huge, addr >> 9)
        return ACCESS_BUS
    # fork copies the entries of a VMA with an AnonVMA: one that only shows the page cache needs none
    if not shared and not huge_is_cached(vma.file, at) and not anon_prepare(vma):
        why = ACCESS_OOM
    else:
        pthread_mutex_lock(&mem.lock)
        if at < vma.file.size:
            pfn = huge_page(vma, addr, pte[0], &cached)
        pthread_mutex_unlock(&mem.lock)
    if pfn == 0:
        if leaf.used == 0:
            leaf_drop(mm.huge, addr >> 9)
        return why
    leaf.used += pte[0] == 0
    if shared and vma.flags & VM_WRITE:
        bits |= PTE_WRITE | (PTE_DIRTY if write else 0)
    elif cached:
        bits |= pte[0] & HUGE_SPENT
    else:
        bits |= PTE_EXCLUSIVE | (PTE_WRITE | PTE_DIRTY if write else 0)
    pte[0] = pte_make(pfn, bits)
    if cached:
        mm.faults.file += 1
    else:
        mm.faults.anon += 1
    if write and not shared and cached:
        return huge_write_fault(mm, vma, addr, pte, False)
    return ACCESS_OK


cdef int huge_access(MM *mm, u64 addr, bint write, u64 **pte) noexcept nogil:
    """As `access_page`; *pte maps 2 MiB."""
    cdef VMArea *vma = vma_at(mm, addr)
    cdef int why
    pte[0] = huge_entry(mm.huge, addr)
    if pte[0] == NULL or not pte_allows(pte[0][0], write):
        why = huge_fault(mm, vma, addr & HUGE_MASK, write)
        if why:
            return why
        pte[0] = huge_entry(mm.huge, addr)
    pte[0][0] |= PTE_YOUNG | (PTE_DIRTY if write else 0)
    return ACCESS_OK


cdef int access_any(MM *mm, u64 addr, bint write, FrameBatch *batch, u64 *pte) noexcept nogil:
    """One access to the page of `addr`, huge or not: *pte is what its entry is, or would be for 4 KiB of a huge page."""
    cdef u64 *entry
    cdef int why = access_page(mm, addr, write, batch, &entry)
    if why == ACCESS_HUGE:
        why = huge_access(mm, addr, write, &entry)
        pte[0] = huge_lookup(mm, addr)
    elif why == ACCESS_OK:
        pte[0] = entry[0]
    return why


cdef int touch_any(MM *mm, u64 start, u64 end, bint write, FrameBatch *batch, u64 *faulted, u64 *stopped) noexcept nogil:
    """`touch_range` over pages huge or not; a huge one takes one fault."""
    cdef int why = touch_range(mm, start, end, write, batch, faulted, stopped)
    return why if likely(why != ACCESS_HUGE) else touch_from_huge(mm, end, write, batch, faulted, stopped)


cdef int touch_from_huge(MM *mm, u64 end, bint write, FrameBatch *batch, u64 *faulted, u64 *stopped) noexcept nogil:
    """What is left of the range at *stopped, which a huge page maps; counts on in *faulted."""
    cdef u64 faults = faulted[0]
    cdef u64 *pte
    cdef bint present
    cdef int why = ACCESS_HUGE
    while why == ACCESS_HUGE:
        pte = huge_entry(mm.huge, stopped[0])
        present = pte != NULL and pte_allows(pte[0], write)
        why = huge_access(mm, stopped[0], write, &pte)
        if why:
            break
        faults += not present
        faulted[0] = 0
        stopped[0] = (stopped[0] & HUGE_MASK) + HUGE_SIZE
        if stopped[0] < end:
            why = touch_range(mm, stopped[0], end, write, batch, faulted, stopped)
            faults += faulted[0]
    faulted[0] = faults
    return why


# ---- fork, protection, moves

cdef bint precopy_huge(Precopy *who, MM *child, VMArea *copy, u64 addr, Table *leaf, u64 pte) noexcept nogil:
    """As `precopy`; nothing makes room in the pool."""
    cdef Memory *mem = child.mem
    cdef u64 pfn
    pthread_mutex_lock(&mem.lock)
    pfn = huge_take(mem, False)
    pthread_mutex_unlock(&mem.lock)
    if pfn == 0 or not huge_copy(mem, pfn, huge_frame(mem, pte_pfn(pte)), False):
        return False
    huge_own(huge_frame(mem, pfn), copy, addr)
    pte_set(leaf, table_index(addr >> 9, 0), pte_make(pfn, pte & 0xfff & ~<u64> (PTE_YOUNG | HUGE_SPENT) | PTE_DIRTY))
    atomic_add(&who.pages, HUGE_SIZE >> PAGE_SHIFT)
    return True


cdef bint fork_huge_range(MM *parent, MM *child, VMArea *vma, VMArea *child_vma) noexcept nogil:
    """As `fork_range`: private pages become copy-on-write in both.  One wrprotect_page for each that was writable."""
    cdef u64 at = vma.start >> 9
    cdef u64 stop, pte, i
    cdef Table *leaf
    cdef Table *copy
    cdef Precopy *who
    if parent.huge == NULL:
        return True
    if child.huge == NULL:
        child.huge = table_new()
        if child.huge == NULL:
            return False
    while True:
        leaf = leaf_next(parent.huge, &at, vma.end >> 9, &stop)
        if leaf == NULL:
            return True
        while at < stop:
            i = table_index(at, 0)
            pte = leaf.entry[i]
            if pte & PTE_PRESENT:
                copy = leaf_make(child.huge, at)
                if copy == NULL:
                    return False
                who = precopy_wanted(parent, at << 9, (at << 9) + HUGE_SIZE) if pte & PTE_WRITE else NULL
                if who != NULL:
                    if not precopy_huge(who, child, child_vma, at << 9, copy, pte):
                        return False
                else:
                    if pte & PTE_WRITE:
                        fire_page(parent, WRPROTECT_PAGE, vma, at << 9)
                    pte &= ~<u64> (PTE_WRITE | PTE_EXCLUSIVE)
                    leaf.entry[i] = pte
                    pte_set(copy, i, pte & ~<u64> HUGE_SPENT)
                    atomic_add(&huge_frame(parent.mem, pte_pfn(pte)).counts, 1)
            at += PAGE_SIZE


cdef void protect_huge_range(MM *mm, VMArea *vma, u64 start, u64 end) noexcept nogil:
    """As `protect_range`, but a private page waits for a write fault even if it is ours alone."""
    cdef u64 at = start >> 9
    cdef u64 stop, i
    cdef u64 rights = vma_pte_bits(vma)
    cdef Table *leaf
    if vma.flags & VM_SHARED and vma.flags & VM_WRITE:
        rights |= PTE_WRITE
    while mm.huge != NULL:
        leaf = leaf_next(mm.huge, &at, end >> 9, &stop)
        if leaf == NULL:
            return
        while at < stop:
            i = table_index(at, 0)
            if leaf.entry[i] & PTE_PRESENT:
                leaf.entry[i] = leaf.entry[i] & ~<u64> (PTE_WRITE | PTE_USER) | rights
            at += PAGE_SIZE


cdef int huge_move_prepare(MM *mm, u64 old, u64 new, u64 length) noexcept nogil:
    """As `move_prepare`, and the old place becomes a VMA of its own.  0, or a negative errno."""
    cdef int error = unmap_prepare(mm, old, old + length)
    if error == 0 and mm.huge != NULL and not move_prepare(mm.huge, old >> 9, new >> 9, length >> 9):
        return -ENOMEM
    return error


cdef void huge_move(MM *mm, VMArea *vma, u64 old, u64 new, u64 length) noexcept nogil:
    """The entries of `vma`, all of it, and what it has reserved."""
    vma.flags &= ~<u64> VM_RESERVED         # the VMA at the new place has it
    if mm.huge != NULL:
        move_range(mm.huge, old >> 9, new >> 9, length >> 9)


# ---- contents

cdef char *huge_contents(Memory *mem, u64 pfn, bint write) noexcept nogil:
    """Of the 4 KiB page `pfn` in a huge page; the buffer of the whole is made at the first write.  NULL: zeros, or no memory."""
    cdef Frame *frame = huge_frame(mem, pfn)
    cdef char *contents
    pthread_mutex_lock(&mem.lock)
    if write and frame.contents == NULL:
        frame.contents = <char *> calloc(1, HUGE_SIZE)
    contents = frame.contents
    pthread_mutex_unlock(&mem.lock)
    return contents + ((pfn & (HUGE_PAGES - 1)) << PAGE_SHIFT) if contents != NULL else NULL


cdef char *huge_file_contents(FileCache *file, u64 at) noexcept nogil:
    """The buffer of the huge page at `at`, NULL: zeros.  Memory.lock is held."""
    cdef u64 *entry = huge_entry(file.pages, at) if at < FILE_END else NULL
    return huge_frame(file.mem, entry[0]).contents if entry != NULL and entry[0] > HUGE_RESERVED else NULL
