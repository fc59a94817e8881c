/* First touch, for writing, of n pages, in the running kernel. */
#include "kernel.h"
#include "run.h"

static double once(long n)
{
    char *p = map_pages(n);
    double t = now_ns();
    touch_pages(p, n);
    t = now_ns() - t;
    munmap(p, n * PAGE);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
