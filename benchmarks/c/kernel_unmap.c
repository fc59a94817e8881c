/* munmap of n written pages, in the running kernel. */
#include "kernel.h"
#include "run.h"

static double once(long n)
{
    char *p = map_pages(n);
    touch_pages(p, n);
    double t = now_ns();
    munmap(p, n * PAGE);
    return now_ns() - t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
