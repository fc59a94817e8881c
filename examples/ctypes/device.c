/* A device in a C library that knows nothing of Python: the entry of the page it was last told of, and counts.
 *
 * The first member is filled in by whoever makes a device: without Python's header there is no ioproc_import().
 */
#include "ioproc.h"

typedef struct {
    const ioproc_api *api;
    uint64_t loads, invalidations;
    uint64_t addr, pte;
} device;

void update_page(void *arg, const ioproc_vma *vma, uint64_t addr)
{
    device *dev = arg;

    dev->loads++;
    dev->addr = addr;
    dev->pte = dev->api->lookup_pte(vma->mm, addr);
}

void invalidate_range(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end)
{
    device *dev = arg;

    dev->invalidations++;
    if (start <= dev->addr && dev->addr < end)
        dev->pte = 0;
}

void invalidate_page(void *arg, const ioproc_vma *vma, uint64_t addr)
{
    invalidate_range(arg, vma, addr, addr + 4096);
}
