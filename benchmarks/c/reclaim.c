/* Reclaim of n pages that have just been used, each mapped by MAPPERS address spaces: the first turn of the clock finds them
 * used, the second takes them. */
#include "vm.h"
#include "run.h"
#ifndef MAPPERS
#define MAPPERS 1
#endif

static memory_t *mem;

static double once(long n)
{
    mm_t *mm[MAPPERS];
    if (!mem) {
        mem = memory_new(n + BATCH);
        swap_on(mem, n);
    }
    mm[0] = mm_new(mem);
    mm_map(mm[0], BASE, n * PAGE, 1);
    mm_touch(mm[0], BASE, n * PAGE, 1);
    give_back(mm[0]);
    for (int i = 1; i < MAPPERS; i++)
        mm[i] = mm_fork(mm[0]);
    double t = now_ns();
    uint64_t freed = reclaim(mem, NULL, n);
    t = now_ns() - t;
    if (freed != (uint64_t)n || mm[MAPPERS - 1]->swapped != (uint64_t)n)
        abort();
    for (int i = 0; i < MAPPERS; i++)
        mm_exit(mm[i]);
    if (mem->n_free_slots != (uint64_t)n || mem->n_free != mem->n_frames)
        abort();
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
