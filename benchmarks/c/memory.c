/* Resident memory of n pages mapped densely, without contents, and of each further address space that maps them:
 * `memory [pages [children]]` prints both in bytes per page. */
#include "vm.h"

static long resident(void)
{
    char line[256];
    long kib = 0;
    FILE *f = must(fopen("/proc/self/smaps_rollup", "r"));
    while (!kib && fgets(line, sizeof line, f))
        sscanf(line, "Rss: %ld", &kib);
    fclose(f);
    return kib * 1024;
}

int main(int argc, char **argv)
{
    long n = argc > 1 ? atol(argv[1]) : 262144, children = argc > 2 ? atol(argv[2]) : 4;
    long before = resident();
    mm_t *mm = mm_new(memory_new(n + BATCH));
    mm_map(mm, BASE, n * PAGE, 1);
    if (mm_touch(mm, BASE, n * PAGE, 1) != n)
        abort();
    long dense = resident();
    for (long i = 0; i < children; i++)
        mm_fork(mm);
    printf("name=memory units=%ld dense_bytes=%.3f mapper_bytes=%.3f\n", n, (double)(dense - before) / n,
           (double)(resident() - dense) / n / children);
    return 0;
}
