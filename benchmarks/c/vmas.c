/* Many VMAs: `vma_find | vma_split | vma_merge VMAS [repetitions | -]`, the name being the program's.  A sorted array of blocks of
 * up to 256 VMAs instead of a tree; a lock for each call; no page tables. */
#include <pthread.h>
#include <stdint.h>
#include "run.h"

enum { BLOCK = 256, VMA_PAGES = 4 };
#define PAGE 4096ul
#define BASE 0x7f0000000000ul

typedef struct {
    uint64_t start, end, pgoff, flags, links[10];           /* as much as a VMA has */
} vma_t;

typedef struct {
    unsigned n;
    uint64_t end[BLOCK];
    vma_t *vma[BLOCK];
} block_t;

static block_t **blocks;
static uint64_t *ends;                                      /* of each block's last VMA */
static unsigned n_blocks, room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *must(void *p)
{
    if (!p)
        abort();
    return p;
}

static unsigned above(const uint64_t *end, unsigned n, uint64_t addr)       /* the first that ends above addr */
{
    const uint64_t *from = end;
    while (n > 1) {
        unsigned half = n / 2;
        from += from[half - 1] <= addr ? half : 0;
        n -= half;
    }
    return from - end + (n && *from <= addr);
}

static void block_insert(unsigned at, block_t *b)
{
    if (n_blocks == room) {
        room = room ? 2 * room : 16;
        blocks = must(realloc(blocks, room * sizeof *blocks));
        ends = must(realloc(ends, room * sizeof *ends));
    }
    memmove(blocks + at + 1, blocks + at, (n_blocks - at) * sizeof *blocks);
    memmove(ends + at + 1, ends + at, (n_blocks - at) * sizeof *ends);
    blocks[at] = b;
    ends[at] = b->end[b->n - 1];
    n_blocks++;
}

static vma_t *find(uint64_t addr, unsigned *block, unsigned *at)
{
    *block = above(ends, n_blocks, addr);
    if (*block == n_blocks)
        return NULL;
    *at = above(blocks[*block]->end, blocks[*block]->n, addr);
    return blocks[*block]->vma[*at];
}

static void put(unsigned i, unsigned at, vma_t *v)
{
    block_t *b = blocks[i];
    if (b->n == BLOCK) {
        block_t *upper = must(malloc(sizeof *upper));
        b->n = BLOCK / 2;
        upper->n = BLOCK - b->n;
        memcpy(upper->end, b->end + b->n, upper->n * sizeof *b->end);
        memcpy(upper->vma, b->vma + b->n, upper->n * sizeof *b->vma);
        ends[i] = b->end[b->n - 1];
        block_insert(i + 1, upper);
        if (at > b->n) {
            at -= b->n;
            b = blocks[++i];
        }
    }
    memmove(b->end + at + 1, b->end + at, (b->n - at) * sizeof *b->end);
    memmove(b->vma + at + 1, b->vma + at, (b->n - at) * sizeof *b->vma);
    b->end[at] = v->end;
    b->vma[at] = v;
    ends[i] = b->end[b->n++];
    ends[i] = b->end[b->n - 1];
}

static void take(uint64_t addr)
{
    unsigned i, at;
    free(find(addr, &i, &at));
    block_t *b = blocks[i];
    b->n--;
    memmove(b->end + at, b->end + at + 1, (b->n - at) * sizeof *b->end);
    memmove(b->vma + at, b->vma + at + 1, (b->n - at) * sizeof *b->vma);
    if (b->n) {
        ends[i] = b->end[b->n - 1];
        return;
    }
    free(b);
    n_blocks--;
    memmove(blocks + i, blocks + i + 1, (n_blocks - i) * sizeof *blocks);
    memmove(ends + i, ends + i + 1, (n_blocks - i) * sizeof *ends);
}

static void resize(vma_t *v, uint64_t end)
{
    unsigned i, at;
    find(v->start, &i, &at);
    v->end = blocks[i]->end[at] = end;
    ends[i] = blocks[i]->end[blocks[i]->n - 1];
}

static vma_t *cut_at(vma_t *v, uint64_t addr, uint64_t flags)            /* what is above addr, with these flags */
{
    unsigned i, at;
    vma_t *high = must(malloc(sizeof *high));
    *high = *v;
    high->start = addr;
    high->flags = flags;
    resize(v, addr);
    find(addr - 1, &i, &at);
    put(i, at + 1, high);
    return high;
}

static void split(uint64_t addr)
{
    unsigned i, at;
    vma_t *v = find(addr, &i, &at);
    uint64_t flags = v->flags;
    cut_at(cut_at(v, addr, flags ^ 2), addr + PAGE, flags);
}

static void merge(uint64_t addr)
{
    unsigned i, at;
    vma_t *low = find(addr - 1, &i, &at), *high = find(addr + PAGE, &i, &at);
    uint64_t end = high->end;
    if (low->flags != high->flags)
        abort();
    take(addr + PAGE);
    take(addr);
    resize(low, end);
}

static uint64_t state = 88172645463325252u, sum;

static uint64_t number(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static void each(void (*what)(uint64_t), const uint64_t *addr, long n)
{
    for (long i = 0; i < n; i++) {
        pthread_mutex_lock(&lock);
        what(addr[i]);
        pthread_mutex_unlock(&lock);
    }
}

static void look(uint64_t addr)
{
    unsigned i, at;
    sum += find(addr, &i, &at)->flags;
}

static const char *name;
static long vmas;

static double once(long n)
{
    static uint64_t *addr;
    static uint32_t *order;
    if (!addr) {
        block_t *first = must(malloc(sizeof *first));
        addr = must(malloc(n * sizeof *addr));
        order = must(malloc(vmas * sizeof *order));
        for (long i = 0; i < vmas; i++) {
            vma_t *v = must(calloc(1, sizeof *v));
            v->start = BASE + i * VMA_PAGES * PAGE;
            v->end = v->start + VMA_PAGES * PAGE;
            v->flags = i % 2 * 2;
            order[i] = i;
            if (i)
                put(n_blocks - 1, blocks[n_blocks - 1]->n, v);
            else {
                first->n = 1;
                first->end[0] = v->end;
                first->vma[0] = v;
                block_insert(0, first);
            }
        }
    }
    for (long i = 0; i < n; i++) {
        long j = i % vmas, k = j + number() % (vmas - j);
        uint32_t t = order[j];
        order[j] = order[k];
        order[k] = t;
        addr[i] = BASE + (order[j] * VMA_PAGES + 1ul) * PAGE;
    }
    int merging = !strcmp(name, "vma_merge"), finding = !strcmp(name, "vma_find");
    if (merging) {
        each(split, addr, n);
        for (long i = n - 1; i > 0; i--) {
            long j = number() % (i + 1);
            uint64_t t = addr[i];
            addr[i] = addr[j];
            addr[j] = t;
        }
    }
    double t = now_ns();
    each(finding ? look : merging ? merge : split, addr, n);
    t = now_ns() - t;
    if (!merging && !finding)
        each(merge, addr, n);
    return t;
}

int main(int argc, char **argv)
{
    char units[32];
    name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    vmas = argc > 1 ? atol(argv[1]) : 1000;
    if (vmas < 2)
        return 2;
    snprintf(units, sizeof units, "%ld", strcmp(name, "vma_find") && vmas < 40000 ? vmas / 2 : 20000);
    if (argc > 1)
        argv[1] = units;
    return run(argc, argv, once);
}
