# The ops chain: immutable cells that point at ops, and the walk.  Knows neither address spaces nor page tables.
#
# A chain is a singly linked list of cells, newest registration first.  A cell never changes once linked, so VMAs with
# equal chains share one (interned per address space) and "equal" is one pointer comparison.
from libc.stdint cimport uint32_t as u32, uint64_t as u64

cdef extern from "ioproc.h" nogil:
    ctypedef struct ioproc_mm
    ctypedef struct ioproc_vma:
        u64 start, end, pgoff, flags
        ioproc_mm *mm
    ctypedef struct ioproc_ops:
        u32 version, size
        void *arg
        void (*release)(void *arg, ioproc_mm *mm) noexcept nogil
        void (*sync_range)(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil
        void (*invalidate_range)(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil
        void (*update_range)(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil
        void (*change_protection)(void *arg, const ioproc_vma *vma, u64 start, u64 end, u32 newprot) noexcept nogil
        void (*sync_page)(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil
        void (*invalidate_page)(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil
        void (*update_page)(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil
        void (*wrprotect_page)(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil
    ctypedef struct ioproc_api:
        u32 version, size
        u64 (*lookup_pte)(const ioproc_mm *mm, u64 addr) noexcept nogil
    u32 IOPROC_ABI_VERSION
    const char *IOPROC_OPS_CAPSULE
    # for drivers in Cython: import once with the GIL, look up in callbacks
    int ioproc_import() except -1
    u64 ioproc_lookup_pte(const ioproc_mm *mm, u64 addr)

ctypedef void (*range_callback)(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil
ctypedef void (*page_callback)(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil

cdef extern from * nogil:
    """
    #define IOPROC_LIKELY(x) __builtin_expect(!!(x), 1)
    #define IOPROC_UNLIKELY(x) __builtin_expect(!!(x), 0)
    """
    bint likely "IOPROC_LIKELY"(bint)
    bint unlikely "IOPROC_UNLIKELY"(bint)

# Hook kinds, in the order of the ops structure.
cdef enum Hook:
    RELEASE
    SYNC_RANGE
    INVALIDATE_RANGE
    UPDATE_RANGE
    CHANGE_PROTECTION
    SYNC_PAGE
    INVALIDATE_PAGE
    UPDATE_PAGE
    WRPROTECT_PAGE
    HOOKS                       # how many

cdef struct Chain:              # one cell
    const ioproc_ops *ops
    Chain *next
    u64 refs                    # VMAs, address spaces and cells that point here
    u64 *attached               # counts the live cells of the same ops
    Chain *interned             # the address space's list of its live cells
    Chain *interned_before

cdef struct HookCounts:         # counted only when a chain is walked
    u64 walks[9]                # chains walked, by kind
    u64 callbacks[9]            # callbacks run, by kind
    u64 cells                   # cells visited


cdef inline bint chain_has(const Chain *chain, const ioproc_ops *ops) noexcept nogil:
    while chain != NULL:
        if chain.ops == ops:
            return True
        chain = chain.next
    return False


# `kind` is a constant wherever these are inlined, so the choice costs nothing at run time.
cdef inline range_callback range_callback_of(const ioproc_ops *ops, int kind) noexcept nogil:
    if kind == INVALIDATE_RANGE:
        return ops.invalidate_range
    if kind == UPDATE_RANGE:
        return ops.update_range
    return ops.sync_range


cdef inline page_callback page_callback_of(const ioproc_ops *ops, int kind) noexcept nogil:
    if kind == UPDATE_PAGE:
        return ops.update_page
    if kind == INVALIDATE_PAGE:
        return ops.invalidate_page
    if kind == WRPROTECT_PAGE:
        return ops.wrprotect_page
    return ops.sync_page


cdef inline void walk_range(const Chain *chain, HookCounts *counts, int kind, const ioproc_vma *vma,
                            u64 start, u64 end) noexcept nogil:
    cdef range_callback callback
    counts.walks[kind] += 1
    while chain != NULL:
        counts.cells += 1
        callback = range_callback_of(chain.ops, kind)
        if callback != NULL:
            counts.callbacks[kind] += 1
            callback(chain.ops.arg, vma, start, end)
        chain = chain.next


cdef inline void walk_protection(const Chain *chain, HookCounts *counts, const ioproc_vma *vma,
                                 u64 start, u64 end, u32 newprot) noexcept nogil:
    counts.walks[<int>CHANGE_PROTECTION] += 1
    while chain != NULL:
        counts.cells += 1
        if chain.ops.change_protection != NULL:
            counts.callbacks[<int>CHANGE_PROTECTION] += 1
            chain.ops.change_protection(chain.ops.arg, vma, start, end, newprot)
        chain = chain.next


cdef inline void walk_page(const Chain *chain, HookCounts *counts, int kind, const ioproc_vma *vma,
                           u64 addr) noexcept nogil:
    cdef page_callback callback
    counts.walks[kind] += 1
    while chain != NULL:
        counts.cells += 1
        callback = page_callback_of(chain.ops, kind)
        if callback != NULL:
            counts.callbacks[kind] += 1
            callback(chain.ops.arg, vma, addr)
        chain = chain.next
