/* Runs a measured piece of work: `PROGRAM units repetitions` prints one line with the minimum and the median in ns
 * per unit; with `-` for repetitions it takes a turn for each line of standard input and prints the ns per unit (the
 * median of TURN repetitions: the first ones find cold caches), so that a driver can alternate between programs.  CPU
 * time of the thread, not wall time: another process on the same core is not our cost. */
#ifndef RUN_H
#define RUN_H
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { TURN = 5 };

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* `once` does one repetition over n units and returns the ns of its measured part. */
static int run(int argc, char **argv, double (*once)(long n))
{
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    long n = argc > 1 ? atol(argv[1]) : 16384, reps = 20;
    if (n <= 0) {
        fprintf(stderr, "usage: %s [units [repetitions | -]]\n", name);
        return 2;
    }
    mallopt(M_TRIM_THRESHOLD, 1 << 30);                 /* the heap keeps its pages between repetitions */
    once(n);                                            /* warm: the heap has its pages, the caches their lines */
    if (argc > 2 && !strcmp(argv[2], "-")) {
        char line[64];
        while (fgets(line, sizeof line, stdin)) {
            double ns[TURN];
            for (int i = 0; i < TURN; i++)
                ns[i] = once(n) / n;
            qsort(ns, TURN, sizeof *ns, by_value);
            printf("%.5f\n", ns[TURN / 2]);
            fflush(stdout);
        }
        return 0;
    }
    if (argc > 2)
        reps = atol(argv[2]);
    double *ns = malloc((reps > 0 ? reps : 1) * sizeof *ns);
    if (!ns || reps <= 0)
        return 2;
    for (long i = 0; i < reps; i++)
        ns[i] = once(n) / n;
    qsort(ns, reps, sizeof *ns, by_value);
    printf("name=%s units=%ld repetitions=%ld min_ns=%.4f median_ns=%.4f\n", name, n, reps, ns[0], ns[reps / 2]);
    free(ns);
    return 0;
}

/* The units, of `size` bytes, in the file that argv[1] names; their number takes its place. */
static inline void *read_units(int argc, char **argv, size_t size)
{
    static char units[32];
    struct stat s;
    FILE *f = argc > 1 ? fopen(argv[1], "rb") : NULL;
    void *read = f && !fstat(fileno(f), &s) ? malloc(s.st_size + 1) : NULL;
    if (!read || fread(read, 1, s.st_size, f) != (size_t)s.st_size) {
        fprintf(stderr, "usage: %s FILE [repetitions | -]\n", argv[0]);
        exit(2);
    }
    fclose(f);
    snprintf(units, sizeof units, "%ld", (long)(s.st_size / size));
    argv[1] = units;
    return read;
}
#endif
