# fork's copy of page-table entries.
from libc.stdint cimport uint64_t as u64
from ioproc.hooks.chain cimport WRPROTECT_PAGE, likely, unlikely
from ioproc.vm.fire cimport fire_page
from ioproc.vm.frames cimport frame_at, frame_map_again
from ioproc.vm.mm cimport (
    MM, PAGE_SIZE, PTE_DIRTY, PTE_EXCLUSIVE, PTE_SWAP, PTE_UNCOUNTED, PTE_WRITE, PTE_YOUNG, Memory, Table, VMArea, HOOKED)
from ioproc.vm.page_table cimport leaf_drop, leaf_make, leaf_next, pte_set, table_index
from ioproc.vm.swap cimport swap_entry_copied


cdef inline bint fork_range(MM *parent, MM *child, VMArea *vma) noexcept nogil:
    """
    Copy the entries of the parent's `vma`, which has anonymous pages and so is private: they become copy-on-write in both.
    Each entry of the parent that loses its write permission fires wrprotect_page before its table changes.  False: no
    memory for a table.
    """
    cdef u64 addr = vma.start
    cdef u64 stop, pte, i, first, copied, frames
    cdef Memory *mem = parent.mem
    cdef Table *leaf
    cdef Table *copy
    while True:
        leaf = leaf_next(parent.root, &addr, vma.end, &stop)
        if leaf == NULL:
            return True
        copy = leaf_make(child.root, addr)
        if unlikely(copy == NULL):
            return False
        first = table_index(addr, 0)
        if HOOKED(parent):                  # a loop of its own: nothing registered costs a test for each table, not page
            for i in range(first, first + ((stop - addr) >> 12)):
                if leaf.entry[i] & PTE_WRITE:
                    fire_page(parent, WRPROTECT_PAGE, vma, addr + (i - first) * PAGE_SIZE)
        copied = 0
        frames = 0
        for i in range(first, first + ((stop - addr) >> 12)):
            pte = leaf.entry[i]
            if pte == 0:
                continue
            if pte & (PTE_WRITE | PTE_EXCLUSIVE):
                pte &= ~<u64> (PTE_WRITE | PTE_EXCLUSIVE)
                leaf.entry[i] = pte
            copy.entry[i] = pte & ~<u64> PTE_YOUNG
            copied += 1
            if likely(not pte & PTE_UNCOUNTED):
                frames += 1
                frame_map_again(frame_at(mem, pte >> 12))
            elif pte & PTE_SWAP:
                child.swapped += 1
                swap_entry_copied(mem, pte)
        copy.used += copied
        if copied == 0:
            leaf_drop(child.root, addr)
        child.rss += frames
        addr = stop


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
                    frame_map_again(frame_at(parent.mem, pte >> 12))
        if copy.used == 0:
            leaf_drop(child.root, addr)
        addr = stop
