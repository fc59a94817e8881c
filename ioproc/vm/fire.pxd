# Hook sites.  Nothing registered costs one load and one test; both placements are walked only past that test.
#
# Order: the address space's chain, with the range whole; then each VMA's chain, clipped to the VMA, in address order; then
# the interval notifiers, which hear of what invalidates or restricts, in a bracket that the end of the operation closes.
from libc.stdint cimport uint32_t as u32, uint64_t as u64
from ioproc.hooks.chain cimport INVALIDATE_PAGE, INVALIDATE_RANGE, ioproc_vma, walk_page, walk_protection, walk_range
from ioproc.hooks.interval cimport intervals_end, intervals_start
from ioproc.vm.mm cimport HOOKED, MM, PAGE_SIZE, VM_HUGETLB, VMArea


cdef inline void bracket(MM *mm, u64 start, u64 end) noexcept nogil:
    """range_start, if this address space has interval notifiers."""
    if mm.intervals != NULL:
        intervals_start(mm.intervals, start, end)
        if mm.no_brackets:
            intervals_end(mm.intervals, 1)
        else:
            mm.brackets += 1


cdef inline void fire_page_slow(MM *mm, int kind, VMArea *vma, u64 addr) noexcept nogil:
    if mm.chain != NULL:
        walk_page(mm.chain, &mm.hooks, kind, <ioproc_vma *> vma, addr)
    if vma.chain != NULL:
        walk_page(vma.chain, &mm.hooks, kind, <ioproc_vma *> vma, addr)
    if kind == INVALIDATE_PAGE:
        bracket(mm, addr, addr + (1 << 21 if vma.flags & VM_HUGETLB else PAGE_SIZE))


cdef inline void fire_page(MM *mm, int kind, VMArea *vma, u64 addr) noexcept nogil:
    if HOOKED(mm):
        fire_page_slow(mm, kind, vma, addr)


cdef inline void fire_range_slow(MM *mm, int kind, VMArea *first, u64 start, u64 end) noexcept nogil:
    cdef VMArea *vma = first
    if mm.chain != NULL:
        walk_range(mm.chain, &mm.hooks, kind, <ioproc_vma *> first, start, end)
    while vma != NULL and vma.start < end:
        if vma.chain != NULL:
            walk_range(vma.chain, &mm.hooks, kind, <ioproc_vma *> vma,
                       vma.start if vma.start > start else start, vma.end if vma.end < end else end)
        vma = vma.next
    if kind == INVALIDATE_RANGE:
        bracket(mm, start, end)


cdef inline void fire_range(MM *mm, int kind, VMArea *first, u64 start, u64 end) noexcept nogil:
    """`first`: the first VMA that overlaps [start, end)."""
    if HOOKED(mm):
        fire_range_slow(mm, kind, first, start, end)


cdef inline void fire_protection(MM *mm, VMArea *vma, u64 start, u64 end, u32 newprot) noexcept nogil:
    """[start, end) lies in `vma`."""
    if HOOKED(mm):
        if mm.chain != NULL:
            walk_protection(mm.chain, &mm.hooks, <ioproc_vma *> vma, start, end, newprot)
        if vma.chain != NULL:
            walk_protection(vma.chain, &mm.hooks, <ioproc_vma *> vma, start, end, newprot)
        bracket(mm, start, end)
