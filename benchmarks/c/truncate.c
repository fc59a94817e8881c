/* Truncation to nothing of a file that 16 address spaces map, written to by each; with -DPUNCH a hole as long as the file.  The
 * unit is a page of one of them: n of all. */
#include "file.h"
#include "run.h"

enum { MAPPERS = 16 };
static memory_t *mem;
static file_t *file;
static mm_t *mm[MAPPERS];

static double once(long n)
{
    n /= MAPPERS;
    if (!mem) {
        mem = memory_new(n + (MAPPERS + 1) * BATCH);
        file = file_new(mem, n);
        for (int i = 0; i < MAPPERS; i++) {
            mm[i] = mm_new(mem);
            file_map(mm[i], BASE, file);
        }
    }
    file_truncate(file, n);
    for (int i = 0; i < MAPPERS; i++)
        if (file_touch(mm[i], BASE, file) != n)
            abort();
    double t = now_ns();
#ifdef PUNCH
    file_punch(file, 0, n);
#else
    file_truncate(file, 0);
#endif
    t = now_ns() - t;
    for (int i = 0; i < MAPPERS; i++)
        if (mm[i]->rss)
            abort();
    if (mem->n_free != mem->n_frames)
        abort();
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
