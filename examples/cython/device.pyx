# cython: language_level=3
"""A device in Cython that writes completions to one page of a process: it follows where that page is."""
from cpython.pycapsule cimport PyCapsule_GetContext, PyCapsule_New, PyCapsule_SetContext
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint32_t, uint64_t

from ioproc.hooks.chain cimport (
    IOPROC_ABI_VERSION, IOPROC_OPS_CAPSULE, ioproc_import, ioproc_lookup_pte, ioproc_mm, ioproc_ops, ioproc_vma)

cdef extern from "ioproc.h":
    enum:
        IOPROC_PTE_WRITE
        IOPROC_PTE_PFN_SHIFT

ioproc_import()                     # before the first ioproc_lookup_pte


cdef struct Queue:                  # what the callbacks use
    uint64_t addr
    uint64_t pte                    # one aligned word: read and written whole
    uint64_t calls


cdef class CompletionQueue:
    """
    CompletionQueue(addr)

    Register ``ioproc.Ops(queue.capsule())``, and `frame` is where the page of `addr` is now, or None.
    """
    cdef ioproc_ops ops
    cdef Queue queue

    def __cinit__(self, uint64_t addr):
        self.queue.addr = addr & ~<uint64_t> 0xfff
        self.ops.version = IOPROC_ABI_VERSION
        self.ops.size = sizeof(ioproc_ops)
        self.ops.arg = &self.queue
        self.ops.release = release
        self.ops.invalidate_range = invalidate_range
        self.ops.change_protection = change_protection
        self.ops.invalidate_page = invalidate_page
        self.ops.update_page = update_page
        self.ops.wrprotect_page = wrprotect_page

    def capsule(self):
        """For ``ioproc.Ops``.  The capsule keeps the device alive, and a registration keeps the capsule alive."""
        capsule = PyCapsule_New(&self.ops, IOPROC_OPS_CAPSULE, let_go)
        PyCapsule_SetContext(capsule, <void *> self)
        Py_INCREF(self)
        return capsule

    @property
    def addr(self):
        return self.queue.addr

    @property
    def calls(self):
        return self.queue.calls

    @property
    def frame(self):
        return self.queue.pte >> IOPROC_PTE_PFN_SHIFT if self.queue.pte else None

    @property
    def writable(self):
        return self.queue.pte & IOPROC_PTE_WRITE != 0


cdef void let_go(object capsule) noexcept:
    Py_DECREF(<object> PyCapsule_GetContext(capsule))


# The callbacks: noexcept nogil, because they run without the GIL.

cdef void release(void *arg, ioproc_mm *mm) noexcept nogil:
    (<Queue *> arg).pte = 0


cdef void invalidate_range(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end) noexcept nogil:
    cdef Queue *queue = <Queue *> arg
    queue.calls += 1
    if start <= queue.addr < end:
        queue.pte = 0


cdef void change_protection(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end, uint32_t newprot) noexcept nogil:
    invalidate_range(arg, vma, start, end)


cdef void invalidate_page(void *arg, const ioproc_vma *vma, uint64_t addr) noexcept nogil:
    invalidate_range(arg, vma, addr, addr + 4096)


cdef void update_page(void *arg, const ioproc_vma *vma, uint64_t addr) noexcept nogil:
    cdef Queue *queue = <Queue *> arg
    queue.calls += 1
    if addr == queue.addr:
        queue.pte = ioproc_lookup_pte(vma.mm, addr)


cdef void wrprotect_page(void *arg, const ioproc_vma *vma, uint64_t addr) noexcept nogil:
    cdef Queue *queue = <Queue *> arg
    queue.calls += 1
    if addr == queue.addr:
        queue.pte &= ~<uint64_t> IOPROC_PTE_WRITE
