/* MADV_PAGEOUT of n written pages, in the running kernel; with -DSWAPIN the reads that bring them back.  For as much swap as
 * there is: "no swap" if the pages stay where they are. */
#include <fcntl.h>
#include <stdint.h>
#include "kernel.h"
#include "run.h"

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

static long swapped(const char *p, long n)
{
    uint64_t *entry = malloc(n * sizeof *entry);
    long i, count = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (!entry || pread(fd, entry, n * sizeof *entry, (uintptr_t)p / PAGE * sizeof *entry) != n * (long)sizeof *entry)
        perror("pagemap"), exit(1);
    for (i = 0; i < n; i++)
        count += entry[i] >> 62 & 1;
    close(fd);
    free(entry);
    return count;
}

static double once(long n)
{
    char *p = map_pages(n);
    long i;
    for (i = 0; i < n; i++)
        memset(p + i * PAGE, (int)i | 1, PAGE);         /* each with something to keep */
    double t = now_ns();
    int failed = madvise(p, n * PAGE, MADV_PAGEOUT);
    t = now_ns() - t;
    if (failed)
        perror("madvise"), exit(1);
    if (swapped(p, n) < n / 2) {
        fputs("no swap\n", stderr);
        exit(1);
    }
#ifdef SWAPIN
    t = now_ns();
    for (i = 0; i < n; i++)
        (void)((volatile char *)p)[i * PAGE];
    t = now_ns() - t;
#endif
    munmap(p, n * PAGE);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
