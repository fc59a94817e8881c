/* n huge pages mapped, written to and unmapped, in the running kernel. */
#include "kernel.h"
#include "run.h"

static double once(long n)
{
    double t = now_ns();
    char *p = mmap(NULL, n << 21, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (p == MAP_FAILED)
        perror("mmap"), exit(1);
    for (long i = 0; i < n; i++)
        ((volatile char *)p)[i << 21] = 1;
    munmap(p, n << 21);
    return now_ns() - t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
