# fork's copy of page-table entries.
from libc.stdint cimport uint64_t as u64
from ioproc.hooks.chain cimport WRPROTECT_PAGE, likely, unlikely
from ioproc.vm.fault cimport frame_own, pte_make
from ioproc.vm.fire cimport fire_page
from ioproc.vm.frames cimport (
    Frame, FrameBatch, batch_begin, batch_end, batch_free, frame_at, frame_copy_contents, frame_map_again,
    frames_alone)
from ioproc.vm.mm cimport (
    MM, PAGE_SIZE, PTE_DIRTY, PTE_EXCLUSIVE, PTE_SWAP, PTE_UNCOUNTED, PTE_WRITE, PTE_YOUNG, Memory, Precopy, Table, VMArea,
    HOOKED, atomic_add, atomic_store)
from ioproc.vm.page_table cimport leaf_drop, leaf_make, leaf_next, pte_set, table_index
from ioproc.vm.reclaim cimport batch_take_reclaimed
from ioproc.vm.swap cimport swap_entry_copied


cdef inline Precopy *precopy_wanted(const MM *parent, u64 start, u64 end) noexcept nogil:
    cdef Precopy *who = parent.precopy
    while who != NULL and not who.wants(who.arg, start, end):
        who = who.next
    return who


cdef inline bint precopy(Precopy *who, MM *child, VMArea *copy, u64 addr, Table *leaf, const u64 *pte) noexcept nogil:
    """
    The child has a copy of a writable page at once; the parent keeps page and permission.  To make room the page itself may
    go to swap: then there is nothing to copy.  False: no frame or no memory.
    """
    cdef Memory *mem = child.mem
    cdef FrameBatch batch
    cdef Frame *frame
    cdef bint done = False
    cdef u64 pfn
    batch_begin(&batch, mem, 0)
    pfn = batch_take_reclaimed(&batch)
    if pfn:
        done = True
        frame = frame_at(mem, pfn)
        if unlikely(not pte[0] & PTE_WRITE):
            batch_free(&batch, pfn)
        elif not frame_copy_contents(frame, frame_at(mem, pte[0] >> 12)):
            batch_free(&batch, pfn)
            done = False
        else:
            atomic_store(&frame.counts, 1)
            frame_own(frame, copy, addr)
            pte_set(leaf, table_index(addr, 0), pte_make(pfn, pte[0] & 0xfff & ~<u64> PTE_YOUNG | PTE_DIRTY))
            child.rss += 1
            atomic_add(&who.pages, 1)
    batch_end(&batch)
    return done


cdef inline bint fork_tell(MM *parent, MM *child, VMArea *vma, VMArea *child_vma, u64 addr, u64 stop, Table *leaf,
                           Table *copy) noexcept nogil:
    """One table's pages that are to lose their write permission: copied at once, or wrprotect_page.  False: no room."""
    cdef Precopy *who
    cdef u64 *pte
    while addr < stop:
        pte = &leaf.entry[table_index(addr, 0)]
        if pte[0] & PTE_WRITE:
            who = precopy_wanted(parent, addr, addr + PAGE_SIZE) if parent.precopy != NULL else NULL
            if who == NULL:
                fire_page(parent, WRPROTECT_PAGE, vma, addr)
            elif not precopy(who, child, child_vma, addr, copy, pte):
                return False
        addr += PAGE_SIZE
    return True


cdef inline bint fork_range(MM *parent, MM *child, VMArea *vma, VMArea *child_vma) noexcept nogil:
    """
    Copy the entries of the parent's `vma`, which has anonymous pages and so is private: they become copy-on-write in both.
    Each entry of the parent that loses its write permission fires wrprotect_page before its table changes.  False: no
    memory for a table, or for a page that is to be copied at once.
    """
    cdef u64 addr = vma.start
    cdef u64 stop, pte, i, first, copied, frames
    cdef Memory *mem = parent.mem
    cdef u64 alone = frames_alone(mem)
    cdef Table *leaf
    cdef Table *copy
    cdef bint done = True
    while done:
        leaf = leaf_next(parent.root, &addr, vma.end, &stop)
        if leaf == NULL:
            return True
        copy = leaf_make(child.root, addr)
        if unlikely(copy == NULL):
            return False
        first = table_index(addr, 0)
        if HOOKED(parent):                  # a loop of its own: nothing registered costs a test for each table, not page
            leaf.used += 1                  # both tables stay, whatever reclaim takes out of them
            copy.used += 1
            done = fork_tell(parent, child, vma, child_vma, addr, stop, leaf, copy)
            copy.used -= 1
            leaf.used -= 1
        copied = 0
        frames = 0
        for i in range(first, first + ((stop - addr) >> 12) if done else first):
            pte = leaf.entry[i]
            if pte == 0 or unlikely(copy.entry[i] != 0):
                continue
            if pte & (PTE_WRITE | PTE_EXCLUSIVE):
                pte &= ~<u64> (PTE_WRITE | PTE_EXCLUSIVE)
                leaf.entry[i] = pte
            copy.entry[i] = pte & ~<u64> PTE_YOUNG
            copied += 1
            if likely(not pte & PTE_UNCOUNTED):
                frames += 1
                frame_map_again(frame_at(mem, pte >> 12), alone)
            elif pte & PTE_SWAP:
                child.swapped += 1
                swap_entry_copied(mem, pte)
        copy.used += copied
        if copy.used == 0:
            leaf_drop(child.root, addr)
        if unlikely(leaf.used == 0):
            leaf_drop(parent.root, addr)
        child.rss += frames
        addr = stop
    return False


cdef inline bint fork_shared_range(MM *parent, MM *child, const VMArea *vma) noexcept nogil:
    """
    Copy the entries of a shared mapping that faults could not bring back.  Nothing becomes copy-on-write, so no hook.
    False: no memory for a table.
    """
    cdef u64 addr = vma.start
    cdef u64 stop, pte, i
    cdef Table *leaf
    cdef Table *copy
    while True:
        leaf = leaf_next(parent.root, &addr, vma.end, &stop)
        if leaf == NULL:
            return True
        copy = leaf_make(child.root, addr)
        if copy == NULL:
            return False
        for i in range(table_index(addr, 0), table_index(addr, 0) + ((stop - addr) >> 12)):
            pte = leaf.entry[i]
            if pte:
                pte_set(copy, i, pte & ~<u64> (PTE_YOUNG | PTE_DIRTY))
                if not pte & PTE_UNCOUNTED:
                    child.rss += 1
                    frame_map_again(frame_at(parent.mem, pte >> 12), frames_alone(parent.mem))
        if copy.used == 0:
            leaf_drop(child.root, addr)
        addr = stop
