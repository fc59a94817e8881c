/* Writes to 2n pages of private anonymous memory, around and around, in a memory of n frames: each fault brings a page back
 * from swap, and every so often reclaims a batch of frames for the next ones. */
#include "vm.h"
#include "run.h"

static memory_t *mem;

static double once(long n)
{
    if (!mem) {
        mem = memory_new(n);
        swap_on(mem, 2 * n);
    }
    mm_t *mm = mm_new(mem);
    mm_map(mm, BASE, 2 * n * PAGE, 1);
    mm_touch(mm, BASE, 2 * n * PAGE, 1);
    double t = now_ns();
    long faults = mm_touch(mm, BASE, 2 * n * PAGE, 1);
    t = now_ns() - t;
    if (faults != 2 * n || mm->faults_swap != 2 * (uint64_t)n)
        abort();
    mm_exit(mm);
    if (mem->n_free != mem->n_frames || mem->n_free_slots != mem->n_slots)
        abort();
    return t / 2;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
