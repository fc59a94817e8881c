# Page faults: what an access to a page without a usable page-table entry does, and the hooks it fires.
from libc.stdint cimport uint64_t as u64
from ioproc.hooks.chain cimport INVALIDATE_PAGE, UPDATE_PAGE, likely, unlikely
from ioproc.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from ioproc.vm.fire cimport fire_page
from ioproc.vm.frames cimport (
    ONE_REFERENCE, Frame, FrameBatch, batch_free, batch_put_back, batch_take, frame_at, frame_copy_contents, frame_put,
    frame_unmap, mapcount_of, pool_take)
from ioproc.vm.mm cimport (
    MM, MMAP_MIN, OWNER_ANON, OWNER_DIRTY, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PTE_DIRTY, PTE_EXCLUSIVE, PTE_PRESENT,
    PTE_SPECIAL, PTE_SWAP, PTE_USER, PTE_WRITE, PTE_YOUNG, PTE_ZERO, VM_ACCESS, VM_GROWSDOWN, VM_HUGETLB, VM_LOCKED,
    VM_SHARED, VM_WRITE, AnonVMA, FileCache, Memory, Slot, Table, VMArea, atomic_add, atomic_load, atomic_store, check,
    page_align, vma_index)
from ioproc.vm.page_table cimport leaf_drop, leaf_end, leaf_find, leaf_make, pte_set, table_index
from ioproc.vm.reclaim cimport RECLAIM_TRIES, make_room
from ioproc.vm.rmap cimport anon_is_singular, anon_join, anon_new, anon_root
from ioproc.vm.swap cimport CACHE_DISK, CACHE_SLOT, cache_pfn, slot_cache, slot_copy, slot_put
from ioproc.vm.vma cimport STACK_GUARD_GAP, may_expand, may_lock, vma_find, vma_resize

# Why an access failed; positive, so that it never meets an errno's negative.
cdef enum Access:
    ACCESS_OK = 0
    ACCESS_SEGV = 1             # no mapping, or not allowed
    ACCESS_BUS = 2              # beyond the file's last page
    ACCESS_OOM = 3              # no frame, or no memory for a table
    ACCESS_HUGE = 4             # not here: huge pages (see huge.pyx)


cdef inline u64 pte_make(u64 pfn, u64 bits) noexcept nogil:
    return pfn << PAGE_SHIFT | bits


cdef inline u64 pte_pfn(u64 pte) noexcept nogil:
    return pte >> PAGE_SHIFT


cdef inline bint pte_allows(u64 pte, bint write) noexcept nogil:
    """The access goes through without a fault."""
    cdef u64 needed = PTE_PRESENT | PTE_USER | (PTE_WRITE if write else 0)
    return pte & needed == needed


cdef inline bint vma_allows(const VMArea *vma, bint write) noexcept nogil:
    """x86: what may be written or executed may be read."""
    return vma.flags & VM_WRITE != 0 if write else vma.flags & VM_ACCESS != 0


cdef inline bint anon_could_share(const VMArea *low, const VMArea *high) noexcept nogil:
    """Neighbours that differ at most in protection, as mprotect makes them: they may merge again some day."""
    return (low.end == high.start and low.file == high.file and low.chain == high.chain
            and (low.flags ^ high.flags) & ~<u64> VM_ACCESS == 0
            and vma_index(low, low.end) == high.pgoff)


cdef inline bint anon_prepare(VMArea *vma) noexcept nogil:
    """An AnonVMA for the first anonymous page: a neighbour's if the two could merge, else a new one."""
    cdef VMArea *near = NULL
    cdef bint done
    if likely(vma.anon != NULL):
        return True
    if vma.next != NULL and vma.next.anon != NULL and anon_is_singular(vma.next) and anon_could_share(vma, vma.next):
        near = vma.next
    elif vma.prev != NULL and vma.prev.anon != NULL and anon_is_singular(vma.prev) and anon_could_share(vma.prev, vma):
        near = vma.prev
    pthread_mutex_lock(&vma.mm.mem.lock)
    done = anon_join(vma, near) if near != NULL else anon_new(vma, NULL) != NULL
    pthread_mutex_unlock(&vma.mm.mem.lock)
    return done


cdef inline void frame_own(Frame *frame, VMArea *vma, u64 addr) noexcept nogil:
    """A frame mapped once, by an anonymous page of `vma`."""
    atomic_store(&frame.index, vma_index(vma, addr))
    atomic_store(&frame.owner, <u64> vma.anon | OWNER_ANON)


cdef inline u64 file_page(FileCache *file, u64 index, FrameBatch *batch) noexcept nogil:
    """
    The page-cache frame of a page, read in if need be (from the batch's frames, if it has some); 0: no frame or no
    memory.  Memory.lock is held.
    """
    cdef Table *leaf = leaf_make(file.pages, index << PAGE_SHIFT)
    cdef u64 at = index & 511
    cdef u64 pfn, entry
    cdef Frame *frame
    if leaf == NULL:
        return 0
    entry = leaf.entry[at]
    if cache_pfn(entry):
        return entry
    if batch != NULL and batch.n:
        pfn = batch_take(batch)
    else:
        pfn = pool_take(file.mem)
    if pfn == 0:
        leaf_drop(file.pages, index << PAGE_SHIFT)
        return 0
    frame = &file.mem.frames[pfn]
    atomic_store(&frame.counts, ONE_REFERENCE)
    atomic_store(&frame.index, index)
    atomic_store(&frame.owner, <u64> file)
    if entry == 0:
        pte_set(leaf, at, pfn)
        return pfn
    if entry & CACHE_SLOT:                  # what comes from swap is nowhere else from now on
        frame_from_slot(file.mem, entry & ~CACHE_SLOT, frame)
        atomic_store(&frame.owner, <u64> file | OWNER_DIRTY)
    else:
        frame.contents = <char *> (entry & ~CACHE_DISK)
    leaf.entry[at] = pfn
    return pfn


cdef inline void frame_from_slot(Memory *mem, u64 slot, Frame *frame) noexcept nogil:
    """The slot's only user takes its contents.  Memory.lock is held."""
    frame.contents = mem.slots[slot].contents
    mem.slots[slot].contents = NULL
    slot_put(mem, slot)
    mem.reclaim.swapped_in += 1


cdef inline u64 vma_pte_bits(const VMArea *vma) noexcept nogil:
    return PTE_PRESENT | (PTE_USER if vma.flags & VM_ACCESS else 0)


cdef inline bint map_anonymous(MM *mm, VMArea *vma, u64 addr, u64 *pte, FrameBatch *batch) noexcept nogil:
    """A write to an empty entry, which the caller counts in its table.  False: no frame or no memory."""
    cdef u64 pfn
    cdef Frame *frame
    if unlikely(vma.anon == NULL) and not anon_prepare(vma):
        return False
    pfn = batch_take(batch)
    if unlikely(pfn == 0):
        return False
    frame = frame_at(mm.mem, pfn)
    atomic_store(&frame.counts, 1)
    frame_own(frame, vma, addr)
    pte[0] = pte_make(pfn, PTE_PRESENT | PTE_USER | PTE_WRITE | PTE_YOUNG | PTE_DIRTY | PTE_EXCLUSIVE)
    mm.rss += 1
    mm.faults.anon += 1
    fire_page(mm, UPDATE_PAGE, vma, addr)
    return True


cdef inline int fault_anonymous(MM *mm, VMArea *vma, u64 addr, Table *leaf, bint write, FrameBatch *batch) noexcept nogil:
    cdef u64 index = table_index(addr, 0)
    if write:
        if not map_anonymous(mm, vma, addr, &leaf.entry[index], batch):
            return ACCESS_OOM
        leaf.used += 1
        return ACCESS_OK
    pte_set(leaf, index, PTE_ZERO | PTE_YOUNG | vma_pte_bits(vma))
    mm.faults.zero += 1
    fire_page(mm, UPDATE_PAGE, vma, addr)
    return ACCESS_OK


cdef inline int fault_file(MM *mm, VMArea *vma, u64 addr, u64 index, Table *leaf, bint write, FrameBatch *batch) noexcept nogil:
    cdef Memory *mem = mm.mem
    cdef FileCache *file = vma.file
    cdef u64 bits = PTE_YOUNG | vma_pte_bits(vma)
    cdef bint copy = write and not vma.flags & VM_SHARED
    cdef u64 pfn = 0
    cdef u64 page
    cdef Frame *frame
    cdef bint beyond
    cdef bint done = True
    if copy and not anon_prepare(vma):      # even if the fault fails below: fork and merging will see it
        return ACCESS_OOM
    if copy:                                # a write to a private mapping copies early: the page is never mapped
        pfn = batch_take(batch)
        if pfn == 0:
            return ACCESS_BUS if index >= page_align(atomic_load(&file.size)) >> PAGE_SHIFT else ACCESS_OOM
    pthread_mutex_lock(&mem.lock)
    beyond = index >= page_align(file.size) >> PAGE_SHIFT
    page = 0 if beyond else file_page(file, index, batch)
    if page != 0 and copy:                  # under the lock: nobody reclaims the page meanwhile
        done = frame_copy_contents(frame_at(mem, pfn), frame_at(mem, page))
    elif page != 0:
        atomic_add(&mem.frames[page].counts, 1)
    pthread_mutex_unlock(&mem.lock)
    if page == 0 or not done:
        if pfn:
            batch_put_back(batch, pfn)
        return ACCESS_BUS if beyond else ACCESS_OOM
    if copy:
        frame = frame_at(mem, pfn)
        atomic_store(&frame.counts, 1)
        frame_own(frame, vma, addr)
        bits |= PTE_WRITE | PTE_DIRTY | PTE_EXCLUSIVE
    elif vma.flags & VM_SHARED and vma.flags & VM_WRITE:
        bits |= PTE_WRITE | (PTE_DIRTY if write else 0)
    if not copy:
        pfn = page
    pte_set(leaf, table_index(addr, 0), pte_make(pfn, bits))
    mm.rss += 1
    mm.faults.file += 1
    fire_page(mm, UPDATE_PAGE, vma, addr)
    return ACCESS_OK


cdef inline int fault_nonlinear(MM *mm, VMArea *vma, u64 addr, Table *leaf, bint write, FrameBatch *batch) noexcept nogil:
    """The entry says which page of the file belongs here."""
    cdef u64 kept = leaf.entry[table_index(addr, 0)]
    cdef int result
    leaf.entry[table_index(addr, 0)] = 0
    leaf.used -= 1
    result = fault_file(mm, vma, addr, pte_pfn(kept), leaf, write, batch)
    if result != ACCESS_OK:
        pte_set(leaf, table_index(addr, 0), kept)
    return result


cdef inline int fault_write_protect(MM *mm, VMArea *vma, u64 addr, u64 *pte, FrameBatch *batch) noexcept nogil:
    """A write to a present page that is not writable, in a VMA that is: private, or the entry would be writable."""
    cdef u64 old = pte_pfn(pte[0])
    cdef Frame *frame
    cdef u64 pfn
    check(not vma.flags & VM_SHARED)
    if not pte[0] & PTE_ZERO:
        frame = frame_at(mm.mem, old)
        # anonymous: the page cache would count too, unless the page has just left it
        if atomic_load(&frame.counts) == 1 and atomic_load(&frame.owner) & 1:
            frame_own(frame, vma, addr)     # from now on found here, not in the parent it came from
            pte[0] |= PTE_WRITE | PTE_DIRTY | PTE_YOUNG | PTE_EXCLUSIVE
            mm.faults.reuse += 1
            fire_page(mm, UPDATE_PAGE, vma, addr)
            return ACCESS_OK
    if unlikely(vma.anon == NULL) and not anon_prepare(vma):
        return ACCESS_OOM
    pfn = batch_take(batch)
    if unlikely(pfn == 0):
        return ACCESS_OOM
    frame = frame_at(mm.mem, pfn)
    if not pte[0] & PTE_ZERO and not frame_copy_contents(frame, frame_at(mm.mem, old)):
        batch_free(batch, pfn)
        return ACCESS_OOM
    fire_page(mm, INVALIDATE_PAGE, vma, addr)
    atomic_store(&frame.counts, 1)
    frame_own(frame, vma, addr)
    if pte[0] & PTE_ZERO:
        mm.rss += 1
    else:
        frame_unmap(batch, old)
    pte[0] = pte_make(pfn, PTE_PRESENT | PTE_USER | PTE_WRITE | PTE_YOUNG | PTE_DIRTY | PTE_EXCLUSIVE)
    mm.faults.cow += 1
    fire_page(mm, UPDATE_PAGE, vma, addr)
    return ACCESS_OK


cdef inline int fault_swap(MM *mm, VMArea *vma, u64 addr, u64 *pte, bint write, FrameBatch *batch) noexcept nogil:
    """
    The page comes back: to the frame that the swap cache still has, else to a new one.  A write to a page that others may
    still want goes to a copy at once, with the hooks of a copy.
    """
    cdef Memory *mem = mm.mem
    cdef u64 number = pte_pfn(pte[0])
    cdef AnonVMA *anon
    cdef Slot *slot = &mem.slots[number]
    cdef u64 exclusive = pte[0] & PTE_EXCLUSIVE
    cdef u64 fresh = batch_take(batch)
    cdef u64 pfn = fresh
    cdef u64 uncached = 0
    cdef u64 bits = PTE_YOUNG | vma_pte_bits(vma)
    cdef bint copy
    cdef bint done = True
    cdef Frame *frame
    pthread_mutex_lock(&mem.lock)
    if vma.flags & VM_LOCKED and slot.count == 1 and slot.pfn == 0:
        exclusive = PTE_EXCLUSIVE           # locked memory leaves nothing in swap, and so is found to be ours alone
    copy = write and not exclusive and (slot.count > 1 or slot.pfn != 0)
    if slot.pfn and not copy:
        pfn = slot.pfn
        atomic_add(&mem.frames[pfn].counts, 1)
        uncached = slot_put(mem, number)
    elif pfn == 0:
        done = False
    else:
        frame = frame_at(mem, pfn)
        if slot.count == 1 and slot.pfn == 0:
            frame_from_slot(mem, number, frame)
            atomic_store(&frame.counts, 1)
        elif slot_copy(mem, number, frame):
            mem.reclaim.swapped_in += 1
            atomic_store(&frame.counts, 1)
            if not copy:
                slot_cache(mem, number, pfn)
                slot_put(mem, number)
        else:
            done = False
        if done:
            # not ours alone: whose page it was is forgotten, but the oldest AnonVMA finds every mapping it can have
            anon = vma.anon if write or exclusive else anon_root(vma.anon)
            atomic_store(&frame.index, vma_index(vma, addr))
            # of a copy its entry says that it is dirty
            atomic_store(&frame.owner, <u64> anon | OWNER_ANON | (0 if copy else OWNER_DIRTY))
    pthread_mutex_unlock(&mem.lock)
    if fresh and (not done or pfn != fresh):
        batch_put_back(batch, fresh)
    if not done:
        return ACCESS_OOM
    if copy:
        fire_page(mm, INVALIDATE_PAGE, vma, addr)
        pthread_mutex_lock(&mem.lock)
        uncached = slot_put(mem, number)
        pthread_mutex_unlock(&mem.lock)
    if uncached:
        frame_put(batch, uncached)
    if write or exclusive:                  # ours alone, now
        bits |= PTE_EXCLUSIVE | (PTE_WRITE if vma.flags & VM_WRITE else 0) | (PTE_DIRTY if write else 0)
    pte[0] = pte_make(pfn, bits)
    mm.rss += 1
    mm.swapped -= 1
    mm.faults.swap += 1
    fire_page(mm, UPDATE_PAGE, vma, addr)
    return ACCESS_OK


cdef inline int fault_page(MM *mm, VMArea *vma, u64 addr, Table *leaf, bint write, FrameBatch *batch) noexcept nogil:
    """One page fault at `addr` (page aligned) in `vma`, which allows the access.  Unless ACCESS_OK the page is as before."""
    cdef u64 *pte = &leaf.entry[table_index(addr, 0)]
    if pte[0] & PTE_PRESENT:
        return fault_write_protect(mm, vma, addr, pte, batch)
    if unlikely(pte[0] != 0):
        if pte[0] & PTE_SWAP:
            return fault_swap(mm, vma, addr, pte, write, batch)
        return fault_nonlinear(mm, vma, addr, leaf, write, batch)
    if vma.file == NULL:
        return fault_anonymous(mm, vma, addr, leaf, write, batch)
    return fault_file(mm, vma, addr, vma_index(vma, addr), leaf, write, batch)


cdef inline int fault(MM *mm, VMArea *vma, u64 addr, Table **leaf, bint write, FrameBatch *batch) noexcept nogil:
    """`fault_page`, where *leaf, the page table of `addr`, may still be NULL; it is made if need be."""
    cdef int result
    if leaf[0] == NULL:
        leaf[0] = leaf_make(mm.root, addr)
        if leaf[0] == NULL:
            return ACCESS_OOM
    result = fault_page(mm, vma, addr, leaf[0], write, batch)
    if unlikely(result != ACCESS_OK) and leaf[0].used == 0:
        leaf_drop(mm.root, addr)
        leaf[0] = NULL
    return result


cdef inline int fault_or_reclaim(MM *mm, VMArea *vma, u64 addr, Table **leaf, bint write, FrameBatch *batch) noexcept nogil:
    """`fault` that takes frames back where there is none left."""
    cdef int result = fault(mm, vma, addr, leaf, write, batch)
    cdef int tries = RECLAIM_TRIES
    while unlikely(result == ACCESS_OOM) and tries and make_room(batch):
        tries -= 1
        leaf[0] = leaf_find(mm.root, addr)
        result = fault(mm, vma, addr, leaf, write, batch)
    return result


cdef inline bint vma_grow(VMArea *vma, u64 addr) noexcept nogil:
    """A stack grows down to the page of `addr`, in the hole below it.  False: it is none, or must not."""
    cdef MM *mm = vma.mm
    cdef const VMArea *below = vma.prev
    cdef u64 start = addr & PAGE_MASK
    cdef u64 pages = (vma.start - start) >> PAGE_SHIFT
    if not vma.flags & VM_GROWSDOWN or start < MMAP_MIN:
        return False
    if (below != NULL and below.flags & VM_ACCESS and not below.flags & VM_GROWSDOWN
            and start - below.end < STACK_GUARD_GAP):
        return False
    if not anon_prepare(vma):
        return False
    if vma.end - start > mm.limit_stack or not may_expand(mm, vma.flags, pages) or pages > vma.pgoff:
        return False
    if vma.flags & VM_LOCKED and not may_lock(mm, pages):
        return False
    vma_resize(vma, start, vma.end)
    return True


cdef inline VMArea *vma_to_access(MM *mm, u64 addr, bint write) noexcept nogil:
    """The VMA of an access, or NULL if there is none or it does not allow it.  A stack has grown then all the same."""
    cdef VMArea *vma = vma_find(mm, addr)
    if vma == NULL or (unlikely(addr < vma.start) and not vma_grow(vma, addr)) or not vma_allows(vma, write):
        return NULL
    return vma


cdef inline int access_page(MM *mm, u64 addr, bint write, FrameBatch *batch, u64 **pte) noexcept nogil:
    """One access to the page of `addr`: *pte is its entry, with the accessed and dirty bits set.  0, or why not."""
    cdef Table *leaf = leaf_find(mm.root, addr)
    cdef u64 index = table_index(addr, 0)
    cdef VMArea *vma
    cdef int result
    if leaf == NULL or not pte_allows(leaf.entry[index], write):
        vma = vma_to_access(mm, addr, write)
        if vma == NULL:
            return ACCESS_SEGV
        if vma.flags & VM_HUGETLB:
            return ACCESS_HUGE
        result = fault_or_reclaim(mm, vma, addr & PAGE_MASK, &leaf, write, batch)
        if result != ACCESS_OK:
            return result
    pte[0] = &leaf.entry[index]
    pte[0][0] |= PTE_YOUNG | (PTE_DIRTY if write else 0)
    return ACCESS_OK


cdef inline int touch_range(MM *mm, u64 start, u64 end, bint write, FrameBatch *batch,
                            u64 *faulted, u64 *stopped) noexcept nogil:
    """
    One access to each page of [start, end), page aligned.  *faulted: pages that took a fault; *stopped: the first page
    not accessed, when the result says why.  One VMA lookup per VMA, one walk per page table.
    """
    cdef u64 addr = start
    cdef u64 used_bits = PTE_YOUNG | (PTE_DIRTY if write else 0)
    cdef u64 faults = 0
    cdef u64 limit, stop, mapped
    cdef u64 *pte
    cdef u64 failed = 0                     # the page that found no frame last
    cdef int tries = RECLAIM_TRIES
    cdef bint anonymous
    cdef VMArea *vma
    cdef Table *leaf
    cdef int result = ACCESS_OK
    while addr < end and result == ACCESS_OK:
        vma = vma_to_access(mm, addr, write)
        if vma == NULL:
            result = ACCESS_SEGV
            break
        if unlikely(vma.flags & VM_HUGETLB):
            result = ACCESS_HUGE
            break
        limit = vma.end if vma.end < end else end
        anonymous = write and vma.file == NULL
        while addr < limit and result == ACCESS_OK:
            leaf = leaf_make(mm.root, addr)
            if leaf == NULL:
                result = ACCESS_OOM
                break
            stop = leaf_end(addr)
            if stop > limit:
                stop = limit
            pte = &leaf.entry[table_index(addr, 0)]
            mapped = 0                      # entries set here that the table does not count yet
            while addr < stop:
                if pte_allows(pte[0], write):
                    pte[0] |= used_bits
                elif likely(anonymous and pte[0] == 0):
                    if unlikely(not map_anonymous(mm, vma, addr, pte, batch)):
                        result = ACCESS_OOM
                        break
                    mapped += 1
                else:
                    result = fault_page(mm, vma, addr, leaf, write, batch)
                    if unlikely(result != ACCESS_OK):
                        break
                    faults += 1
                addr += PAGE_SIZE
                pte += 1
            leaf.used += mapped
            faults += mapped
            if leaf.used == 0:
                leaf_drop(mm.root, addr)
            if unlikely(result == ACCESS_OOM):
                tries = tries - 1 if addr == failed else RECLAIM_TRIES
                failed = addr
                if tries and make_room(batch):
                    result = ACCESS_OK
    faulted[0] = faults
    stopped[0] = addr
    return result
