# The C interface's other direction: what a native callback may call.
from cpython.pycapsule cimport PyCapsule_New

cdef u64 api_lookup_pte(const ioproc_mm *mm, u64 addr) noexcept nogil:
    cdef u64 *pte = pte_find((<MM *> mm).root, addr) if addr < TASK_SIZE else NULL
    if pte != NULL and pte[0]:
        return pte[0]
    return huge_lookup(<MM *> mm, addr) if addr < TASK_SIZE else 0


cdef ioproc_api api
api.version = IOPROC_ABI_VERSION
api.size = sizeof(ioproc_api)
api.lookup_pte = api_lookup_pte
_api = PyCapsule_New(&api, "ioproc._core._api", NULL)


cdef extern from * nogil:
    """
    #define IOPROC_BARRIER() __asm__ volatile("" ::: "memory")
    """
    void compiler_barrier "IOPROC_BARRIER"()


def _fire_update_page(AddressSpace mm not None, addr, count):
    """Fire update_page `count` times for the page at `addr`, changing nothing: for measuring what one dispatch costs."""
    cdef u64 at = as_u64(addr, "addr") & PAGE_MASK
    cdef u64 n = as_u64(count, "count")
    cdef VMArea *vma
    cdef u64 _i
    mm.enter()
    vma = vma_at(mm.mm, at)
    if vma != NULL:
        with nogil:
            for _i in range(n):
                fire_page(mm.mm, UPDATE_PAGE, vma, at)
                compiler_barrier()              # the chain may have changed: load it again
    mm.leave()
