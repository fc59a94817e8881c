/* MADV_PAGEOUT of n pages that have just been written. */
#include "pressure.h"
#include "run.h"

static memory_t *mem;

static double once(long n)
{
    if (!mem) {
        mem = memory_new(n + BATCH);
        swap_on(mem, n);
    }
    mm_t *mm = mm_new(mem);
    mm_map(mm, BASE, n * PAGE, 1);
    mm_touch(mm, BASE, n * PAGE, 1);
    double t = now_ns();
    mm_pageout(mm, BASE, n * PAGE);
    t = now_ns() - t;
    if (mm->rss || mm->swapped != (uint64_t)n)
        abort();
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
