# The C interface's other direction: what a native callback may call.
from cpython.pycapsule cimport PyCapsule_New

cdef u64 api_lookup_pte(const ioproc_mm *mm, u64 addr) noexcept nogil:
    cdef u64 *pte = pte_find((<MM *> mm).root, addr) if addr < TASK_SIZE else NULL
    return pte[0] if pte != NULL else 0


cdef ioproc_api api
api.version = IOPROC_ABI_VERSION
api.size = sizeof(ioproc_api)
api.lookup_pte = api_lookup_pte
_api = PyCapsule_New(&api, "ioproc._core._api", NULL)
