/* A write to each of n pages after a fork, in the running kernel (which always has contents to copy). */
#include "kernel.h"
#include "run.h"

static double once(long n)
{
    char *p = map_pages(n);
    touch_pages(p, n);
    pid_t child = fork_waiting();
    double t = now_ns();
    touch_pages(p, n);
    t = now_ns() - t;
    end(child);
    munmap(p, n * PAGE);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
