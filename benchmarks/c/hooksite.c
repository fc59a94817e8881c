/* Hook sites passed with nothing registered: touch, fork, copy-on-write break and unmap of n pages.  Three sites for
 * each page (fork tests once for a table, unmap once for all).  Built twice, once with -DNO_HOOKS: the difference in instructions
 * (callgrind) and in time is what the sites cost. */
#include "vm.h"
#include "run.h"

static memory_t *mem;

static double once(long n)
{
    if (!mem)
        mem = memory_new(2 * n + 2 * BATCH);
    mm_t *mm = mm_new(mem);
    double t = now_ns();
    mm_map(mm, BASE, n * PAGE, 1);
    mm_touch(mm, BASE, n * PAGE, 1);
    mm_t *child = mm_fork(mm);
    mm_touch(mm, BASE, n * PAGE, 1);
    mm_unmap(mm, BASE, n * PAGE);
    t = now_ns() - t;
    mm_exit(child);
    mm_exit(mm);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
