/* n huge pages mapped privately with their reservation, first written to, and unmapped. */
#include "huge.h"
#include "run.h"

#define HUGE_BASE (BASE & -LEAF_SPAN)
static memory_t *mem;
static pool_t *pool;

static double once(long n)
{
    if (!mem) {
        mem = memory_new(BATCH);
        pool = pool_new(n);
    }
    mm_t *mm = mm_new(mem);
    double t = now_ns();
    int mapped = huge_map(mm, pool, HUGE_BASE, n);
    long faults = huge_touch(mm, pool, HUGE_BASE, HUGE_BASE + n * LEAF_SPAN);
    huge_unmap(mm, pool, HUGE_BASE);
    t = now_ns() - t;
    if (!mapped || faults != n || pool->n_free != (uint64_t)n || pool->n_reserved)
        abort();
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
