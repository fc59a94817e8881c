/* mlock of n pages that nobody has touched: the range is locked and its pages are faulted in. */
#include "pressure.h"
#include "run.h"

static memory_t *mem;

static double once(long n)
{
    if (!mem)
        mem = memory_new(n + BATCH);
    mm_t *mm = mm_new(mem);
    mm_map(mm, BASE, n * PAGE, 1);
    double t = now_ns();
    long faults = mm_mlock(mm, BASE, n * PAGE);
    t = now_ns() - t;
    if (faults != n || mm->locked != (uint64_t)n)
        abort();
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
