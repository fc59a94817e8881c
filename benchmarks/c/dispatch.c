/* update_page called n times where nothing else happens, through a chain of one native ops. */
#include "vm.h"
#include "run.h"

/* What a fault does at its hook site, in a body of its own as a fault has. */
static __attribute__((noinline)) void site(mm_t *mm, vma_t *v, uint64_t addr, long n)
{
    for (long i = 0; i < n; i++, addr += PAGE) {
        FIRE(mm, v, UPDATE_PAGE, update_page, addr);
        __asm__ volatile("" ::: "memory");              /* the chain may have changed */
    }
}

static double once(long n)
{
    uint64_t calls = 0;
    ops_t ops = {.arg = &calls, .update_page = count_page};
    node_t node = {NULL, &ops};
    mm_t *mm = mm_new(memory_new(BATCH));
    mm_map(mm, BASE, PAGE, 1);
    mm->chain = &node;
    mm->hooked = 1;
    double t = now_ns();
    site(mm, mm->vmas[0], BASE, n);
    t = now_ns() - t;
    if (calls != (uint64_t)n)
        abort();
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
