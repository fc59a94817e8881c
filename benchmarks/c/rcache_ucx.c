/* UCX's registration cache: `rcache_ucx REGIONS [repetitions | -]`: get and put of a registered buffer, a random one of so many.
 * Registering does nothing; UCX does not watch the memory (no UCM events), and has its defaults otherwise.  Needs the headers and
 * libucs of the package libucx-cu12 (../registration.py compiles it). */
#include <stdint.h>
#include <ucs/memory/rcache.h>
#include "run.h"

enum { GETS = 200000, LENGTH = 16384, STRIDE = 32768 };
#define BASE 0x7f0000000000ul

static ucs_status_t reg(void *context, ucs_rcache_t *rcache, void *arg, ucs_rcache_region_t *region, uint16_t flags)
{
    (void)context, (void)rcache, (void)arg, (void)region, (void)flags;
    return UCS_OK;
}

static void dereg(void *context, ucs_rcache_t *rcache, ucs_rcache_region_t *region)
{
    (void)context, (void)rcache, (void)region;
}

static void merge(void *context, ucs_rcache_t *rcache, void *arg, ucs_rcache_region_t *region)
{
    (void)context, (void)rcache, (void)arg, (void)region;
}

static void dump(void *context, ucs_rcache_t *rcache, ucs_rcache_region_t *region, char *buf, size_t max)
{
    (void)context, (void)rcache, (void)region, (void)max;
    *buf = 0;
}

static ucs_rcache_t *cache;
static long regions;

static void get_and_put(uintptr_t addr)
{
    ucs_rcache_region_t *region;
    if (ucs_rcache_get(cache, (void *)addr, LENGTH, 4096, PROT_READ | PROT_WRITE, NULL, &region) != UCS_OK)
        abort();
    ucs_rcache_region_put(cache, region);
}

static double once(long n)
{
    static const ucs_rcache_ops_t ops = {.mem_reg = reg, .mem_dereg = dereg, .merge = merge, .dump_region = dump};
    static uint64_t *addr, state = 88172645463325252u;
    if (!cache) {
        ucs_rcache_params_t params;
        ucs_rcache_set_default_params(&params);
        params.region_struct_size = sizeof(ucs_rcache_region_t);
        params.ucm_events = 0;
        params.ops = &ops;
        if (ucs_rcache_create(&params, "benchmark", NULL, &cache) != UCS_OK)
            abort();
        for (long i = 0; i < regions; i++)
            get_and_put(BASE + i * STRIDE);
        addr = malloc(n * sizeof *addr);
        if (!addr)
            abort();
    }
    for (long i = 0; i < n; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        addr[i] = BASE + state % regions * STRIDE;
    }
    double t = now_ns();
    for (long i = 0; i < n; i++)
        get_and_put(addr[i]);
    return now_ns() - t;
}

int main(int argc, char **argv)
{
    char gets[32];
    regions = argc > 1 ? atol(argv[1]) : 1000;
    if (regions < 1)
        return 2;
    snprintf(gets, sizeof gets, "%d", GETS);
    if (argc > 1)
        argv[1] = gets;
    return run(argc, argv, once);
}
