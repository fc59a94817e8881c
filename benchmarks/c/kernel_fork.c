/* fork with n written private pages, in the running kernel: what it takes in the parent. */
#include "kernel.h"
#include "run.h"

static double once(long n)
{
    char *p = map_pages(n);
    touch_pages(p, n);
    double t = now_ns();
    pid_t child = fork_waiting();
    t = now_ns() - t;
    end(child);
    munmap(p, n * PAGE);
    return t;
}

int main(int argc, char **argv) { return run(argc, argv, once); }
