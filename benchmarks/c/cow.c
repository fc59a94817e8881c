/* A write to each of n pages after a fork: each is copied.  With -DCONTENTS the pages have contents to copy. */
#include "vm.h"
#include "run.h"

static memory_t *mem;

static double once(long n)
{
    if (!mem)
        mem = memory_new(2 * n + 2 * BATCH);
    mm_t *mm = mm_new(mem);
    mm_map(mm, BASE, n * PAGE, 1);
#ifdef CONTENTS
    mm_fill(mm, BASE, n * PAGE, 1);
#else
    if (mm_touch(mm, BASE, n * PAGE, 1) != n)
        abort();
#endif
    mm_t *child = mm_fork(mm);
    double t = now_ns();
    long faults = mm_touch(mm, BASE, n * PAGE, 1);
    t = now_ns() - t;
    if (faults != n || mm->faults_cow != (uint64_t)n)
        abort();
    mm_exit(child);
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
