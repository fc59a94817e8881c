# Taking page-table entries away, changing their protection, moving them.  Callers fire the hooks.
from libc.stdint cimport uint64_t as u64
from ioproc.hooks.chain cimport likely, unlikely
from ioproc.hooks.schedule cimport TEARDOWN_GAP, schedule_point
from ioproc.vm.frames cimport FrameBatch, frame_at, frame_keep_dirty, frame_unmap, mapcount_of
from ioproc.vm.huge cimport huge_align, zap_huge_range
from ioproc.vm.mm cimport (
    MM, OWNER_ANON, OWNER_DIRTY, PAGE_SHIFT, PAGE_SIZE, PTE_DIRTY, PTE_EXCLUSIVE, PTE_PRESENT, PTE_SWAP, PTE_UNCOUNTED, PTE_USER,
    PTE_WRITE, PTE_YOUNG, VM_ACCESS, VM_SHARED, VM_WRITE, Frame, Memory, Table, VMArea, atomic_load, atomic_store,
    mm_lock_to_look, mm_unlock_looked)
from ioproc.vm.page_table cimport TABLES_STAY, leaf_drop, leaf_find, leaf_make, leaf_next, pte_set, table_index
from ioproc.vm.swap cimport swap_entry_dropped


cdef inline void zap_range(MM *mm, u64 start, u64 end, FrameBatch *batch) noexcept nogil:
    """Unmap every page of [start, end); tables left empty go too."""
    cdef u64 addr = start
    cdef u64 begin, stop, pte, i, cleared, frames, swapped
    cdef Table *leaf
    if unlikely(mm.huge != NULL):
        zap_huge_range(mm, start, end)
    while True:
        leaf = leaf_next(mm.root, &addr, end, &stop)
        if leaf == NULL:
            return
        begin = addr
        cleared = 0
        frames = 0
        swapped = 0
        for i in range(table_index(addr, 0), table_index(addr, 0) + ((stop - addr) >> 12)):
            pte = leaf.entry[i]
            if pte:
                leaf.entry[i] = 0
                cleared += 1
                if likely(not pte & PTE_UNCOUNTED):
                    frames += 1
                    if unlikely(pte & (PTE_DIRTY | PTE_EXCLUSIVE) == PTE_DIRTY):
                        frame_keep_dirty(frame_at(mm.mem, pte >> 12))
                    frame_unmap(batch, pte >> 12)
                elif pte & PTE_SWAP:
                    swapped += 1
                    swap_entry_dropped(batch, pte)
        leaf.used -= cleared
        mm.rss -= frames
        mm.swapped -= swapped
        if leaf.used == 0:
            leaf_drop(mm.root, begin)
        addr = stop


cdef inline void zap_in_batches(MM *mm, u64 start, u64 end, FrameBatch *batch) noexcept nogil:
    """
    `zap_range` as 2.6.12 did it, if the address space is to: the lock is let go of between batches, for drivers that only
    look.  Whatever would change the address space still waits (the kernel's mmap_sem).
    """
    cdef u64 stop
    while mm.teardown_batch and end - start > mm.teardown_batch << PAGE_SHIFT:
        stop = start + (mm.teardown_batch << PAGE_SHIFT)
        if mm.huge != NULL and mm.huge.used & ~TABLES_STAY:
            stop = huge_align(stop)         # no huge page is taken away in parts
        if stop >= end:
            break
        zap_range(mm, start, stop, batch)
        start = stop
        mm.paused = True
        mm_unlock_looked(mm)
        schedule_point(TEARDOWN_GAP)
        mm_lock_to_look(mm)
        mm.paused = False
    zap_range(mm, start, end, batch)


cdef inline void zap_file_range(MM *mm, u64 start, u64 end, FrameBatch *batch) noexcept nogil:
    """The same for pages of the page cache only: copies that a private mapping made stay."""
    cdef u64 addr = start
    cdef u64 begin, stop, pte, i
    cdef Table *leaf
    while True:
        leaf = leaf_next(mm.root, &addr, end, &stop)
        if leaf == NULL:
            return
        begin = addr
        for i in range(table_index(addr, 0), table_index(addr, 0) + ((stop - addr) >> 12)):
            pte = leaf.entry[i]
            if pte & PTE_PRESENT and not atomic_load(&frame_at(mm.mem, pte >> 12).owner) & OWNER_ANON:
                leaf.entry[i] = 0
                leaf.used -= 1
                mm.rss -= 1
                frame_unmap(batch, pte >> 12)
        if leaf.used == 0:
            leaf_drop(mm.root, begin)
        addr = stop


cdef inline void protect_range(MM *mm, VMArea *vma, u64 start, u64 end) noexcept nogil:
    """
    Give the present entries of [start, end), which lies in `vma`, the protection of `vma`.  A private page may be written
    at once only where it is exclusively ours; the others wait for a write fault.
    """
    cdef u64 addr = start
    cdef u64 stop, pte, i
    cdef bint writable = vma.flags & VM_WRITE != 0
    cdef u64 user = PTE_USER if vma.flags & VM_ACCESS else 0
    cdef u64 exclusive = 0 if vma.flags & VM_SHARED else PTE_EXCLUSIVE
    cdef Table *leaf
    while True:
        leaf = leaf_next(mm.root, &addr, end, &stop)
        if leaf == NULL:
            return
        for i in range(table_index(addr, 0), table_index(addr, 0) + ((stop - addr) >> 12)):
            pte = leaf.entry[i]
            if pte & PTE_PRESENT:
                pte = pte & ~<u64> (PTE_WRITE | PTE_USER) | user
                if writable and pte & exclusive == exclusive:
                    pte |= PTE_WRITE
                leaf.entry[i] = pte
        addr = stop


cdef inline void drop_empty_tables(Table *root, u64 start, u64 length) noexcept nogil:
    """What a move left empty, where it came from or where it went."""
    cdef u64 addr = start
    cdef u64 stop
    cdef Table *leaf
    while True:
        leaf = leaf_next(root, &addr, start + length, &stop)
        if leaf == NULL:
            return
        if leaf.used == 0:
            leaf_drop(root, addr)
        addr = stop


cdef inline bint move_prepare(Table *root, u64 old, u64 new, u64 length) noexcept nogil:
    """Make the tables that `move_range` needs.  False: no memory, nothing changed."""
    cdef u64 addr = old
    cdef u64 stop
    while leaf_next(root, &addr, old + length, &stop) != NULL:
        # a source table straddles two at most
        if leaf_make(root, addr - old + new) == NULL or leaf_make(root, stop - PAGE_SIZE - old + new) == NULL:
            drop_empty_tables(root, new, length)
            return False
        addr = stop
    return True


cdef inline void move_range(Table *root, u64 old, u64 new, u64 length) noexcept nogil:
    """Move the entries of [old, old + length) to the empty range at `new`, whose tables `move_prepare` made."""
    cdef u64 addr = old
    cdef u64 stop, i, to
    cdef Table *leaf
    while True:
        leaf = leaf_next(root, &addr, old + length, &stop)
        if leaf == NULL:
            break
        while addr < stop:
            i = table_index(addr, 0)
            if leaf.entry[i]:
                to = addr - old + new
                pte_set(leaf_find(root, to), table_index(to, 0), leaf.entry[i])
                leaf.entry[i] = 0
                leaf.used -= 1
            addr += PAGE_SIZE
    # not before: a table empty as a source may be the target of what comes later
    drop_empty_tables(root, old, length)
    drop_empty_tables(root, new, length)


cdef inline bint frame_unwanted(Memory *mem, u64 pfn) noexcept nogil:
    """Only its entries say from now on whether the page must be kept.  False: others may want what swap had."""
    cdef Frame *frame = frame_at(mem, pfn)
    cdef u64 owner = atomic_load(&frame.owner)
    if owner & OWNER_DIRTY:
        if mapcount_of(atomic_load(&frame.counts)) != 1 or (mem.nslots and mem.slot_of[pfn]):
            return False
        atomic_store(&frame.owner, owner & ~<u64> OWNER_DIRTY)
    return True


cdef inline void free_range(MM *mm, u64 start, u64 end, FrameBatch *batch) noexcept nogil:
    """
    MADV_FREE: the anonymous pages of [start, end) become old and clean, so that reclaim may throw them away; what is in
    swap goes at once.
    """
    cdef u64 addr = start
    cdef u64 begin, stop, pte, i
    cdef Table *leaf
    while True:
        leaf = leaf_next(mm.root, &addr, end, &stop)
        if leaf == NULL:
            return
        for i in range(table_index(addr, 0), table_index(addr, 0) + ((stop - addr) >> 12)):
            pte = leaf.entry[i]
            if pte & PTE_PRESENT and not pte & PTE_UNCOUNTED:
                if frame_unwanted(mm.mem, pte >> 12):
                    leaf.entry[i] = pte & ~<u64> (PTE_YOUNG | PTE_DIRTY)
            elif pte & PTE_SWAP:
                leaf.entry[i] = 0
                leaf.used -= 1
                mm.swapped -= 1
                swap_entry_dropped(batch, pte)
        begin = addr
        addr = stop
        if leaf.used == 0:
            leaf_drop(mm.root, begin)
