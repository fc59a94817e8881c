/* First touch, for writing, of n pages of private anonymous memory. */
#include "vm.h"
#include "run.h"

static memory_t *mem;

static double once(long n)
{
    if (!mem)
        mem = memory_new(n + BATCH);
    mm_t *mm = mm_new(mem);
    mm_map(mm, BASE, n * PAGE, 1);
    double t = now_ns();
    long faults = mm_touch(mm, BASE, n * PAGE, 1);
    t = now_ns() - t;
    if (faults != n)
        abort();
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
