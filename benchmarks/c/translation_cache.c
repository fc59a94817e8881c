/* A set-associative LRU cache of translations over a stream of pages: `translation_cache PAGES [repetitions | - | hits]`, PAGES a
 * file of 64-bit page numbers; `hits` prints how many hit.  A set is an array with the newest entry in front: recently used
 * pages are found early, and the one to evict is at the end.  Its geometry is a constant, which the model's is not. */
#include <stdint.h>
#include "run.h"

enum { ENTRIES = 1024, WAYS = 16, SETS = ENTRIES / WAYS };

typedef struct { uint64_t key, value; } entry_t;        /* key 0: empty */
typedef struct { entry_t way[WAYS]; } set_t;

static uint64_t *pages, hits, evictions;

static inline int get(set_t *sets, uint64_t key, uint64_t *value)
{
    entry_t *way = sets[key % SETS].way;
    for (unsigned i = 0; i < WAYS; i++)
        if (way[i].key == key) {
            entry_t found = way[i];
            memmove(way + 1, way, i * sizeof *way);
            way[0] = found;
            *value = found.value;
            return 1;
        }
    return 0;
}

static inline uint64_t put(set_t *sets, uint64_t key, uint64_t value)
{
    entry_t *way = sets[key % SETS].way;
    uint64_t evicted = way[WAYS - 1].key;
    memmove(way + 1, way, (WAYS - 1) * sizeof *way);
    way[0] = (entry_t){key, value};
    return evicted;
}

static double once(long n)
{
    set_t *sets = calloc(SETS, sizeof *sets);
    if (!sets)
        abort();
    uint64_t value, context = 1ull << 40;
    hits = evictions = 0;
    double t = now_ns();
    for (long i = 0; i < n; i++) {
        if (get(sets, context | pages[i], &value))
            hits++;
        else if (put(sets, context | pages[i], 0))
            evictions++;
    }
    t = now_ns() - t;
    free(sets);
    return t;
}

int main(int argc, char **argv)
{
    pages = read_units(argc, argv, sizeof *pages);
    if (argc > 2 && !strcmp(argv[2], "hits")) {
        once(atol(argv[1]));
        printf("%lu\n", hits);
        return 0;
    }
    return run(argc, argv, once);
}
