/* n pages that are there pinned for writing, and unpinned. */
#include "pressure.h"
#include "run.h"

static memory_t *mem;

static double once(long n)
{
    if (!mem)
        mem = memory_new(n + BATCH);
    mm_t *mm = mm_new(mem);
    mm_map(mm, BASE, n * PAGE, 1);
    mm_touch(mm, BASE, n * PAGE, 1);
    double t = now_ns();
    uint64_t *pfns = mm_pin(mm, BASE, n * PAGE);
    int failed = unpin(mem, pfns, n);
    free(pfns);
    t = now_ns() - t;
    if (failed)
        abort();
    mm_exit(mm);
    if (mem->n_free != mem->n_frames)
        abort();
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
