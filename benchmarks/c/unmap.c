/* munmap of n pages that have been written. */
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
    mm_unmap(mm, BASE, n * PAGE);
    t = now_ns() - t;
    if (mm->rss)
        abort();
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
