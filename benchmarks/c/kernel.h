/* The running kernel's side: the same operations on this process's own memory, transparent huge pages off. */
#ifndef KERNEL_H
#define KERNEL_H
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul

static char *map_pages(long n)
{
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    char *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return p;
}

static void touch_pages(char *p, long n)
{
    for (long i = 0; i < n; i++)
        ((volatile char *)p)[i * PAGE] = 1;
}

/* A child that shares all our pages and waits until it is killed. */
static pid_t fork_waiting(void)
{
    pid_t child = fork();
    if (child < 0) {
        perror("fork");
        exit(1);
    }
    if (!child)
        for (;;)
            pause();
    return child;
}

static void end(pid_t child)
{
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}
#endif
