/* fork of an address space with n pages of private anonymous memory, all written. */
#include "vm.h"
#include "run.h"

static memory_t *mem;

static double once(long n)
{
    if (!mem)
        mem = memory_new(n + BATCH);
    mm_t *mm = mm_new(mem);
    mm_map(mm, BASE, n * PAGE, 1);
    if (mm_touch(mm, BASE, n * PAGE, 1) != n)
        abort();
    double t = now_ns();
    mm_t *child = mm_fork(mm);
    t = now_ns() - t;
    if (child->rss != (uint64_t)n)
        abort();
    mm_exit(child);
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
