/* The nine callbacks in a C library that knows nothing of Python; each writes down its last call in its row of the record. */
#include "ioproc.h"

struct row {
    uint64_t calls, a, b, c; /* addresses, and the new protection */
    uint64_t start, pte;     /* of the VMA; of the page at a */
};

struct record {
    const ioproc_api *api;
    struct row rows[9];
};

static void note(void *arg, int kind, const ioproc_vma *vma, uint64_t a, uint64_t b, uint64_t c)
{
    struct record *record = arg;
    struct row *row = &record->rows[kind];

    *row = (struct row){row->calls + 1, a, b, c, vma ? vma->start : 0, vma ? record->api->lookup_pte(vma->mm, a) : 0};
}

void plain_release(void *arg, ioproc_mm *mm) { note(arg, 0, 0, mm != 0, 0, 0); }
void plain_sync_range(void *arg, const ioproc_vma *v, uint64_t s, uint64_t e) { note(arg, 1, v, s, e, 0); }
void plain_invalidate_range(void *arg, const ioproc_vma *v, uint64_t s, uint64_t e) { note(arg, 2, v, s, e, 0); }
void plain_update_range(void *arg, const ioproc_vma *v, uint64_t s, uint64_t e) { note(arg, 3, v, s, e, 0); }
void plain_change_protection(void *arg, const ioproc_vma *v, uint64_t s, uint64_t e, uint32_t p) { note(arg, 4, v, s, e, p); }
void plain_sync_page(void *arg, const ioproc_vma *v, uint64_t a) { note(arg, 5, v, a, 0, 0); }
void plain_invalidate_page(void *arg, const ioproc_vma *v, uint64_t a) { note(arg, 6, v, a, 0, 0); }
void plain_update_page(void *arg, const ioproc_vma *v, uint64_t a) { note(arg, 7, v, a, 0, 0); }
void plain_wrprotect_page(void *arg, const ioproc_vma *v, uint64_t a) { note(arg, 8, v, a, 0, 0); }

static ioproc_ops ops = {
    IOPROC_ABI_VERSION,      sizeof(ioproc_ops),    0,                       plain_release,   plain_sync_range,
    plain_invalidate_range,  plain_update_range,    plain_change_protection, plain_sync_page, plain_invalidate_page,
    plain_update_page,       plain_wrprotect_page,
};

ioproc_ops *plain_ops(void *arg)
{
    ops.arg = arg;
    return &ops;
}
