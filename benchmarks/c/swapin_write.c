/* An access to each of n swapped-out pages: for writing; with -DREAD for reading. */
#include "vm.h"
#include "run.h"
#ifdef READ
enum { WRITE = 0 };
#else
enum { WRITE = 1 };
#endif

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
    if (reclaim(mem, NULL, n) != (uint64_t)n)
        abort();
    double t = now_ns();
    long faults = mm_touch(mm, BASE, n * PAGE, WRITE);
    t = now_ns() - t;
    if (faults != n || mem->n_free_slots != (uint64_t)n)
        abort();
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
