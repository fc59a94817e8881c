/* A small virtual memory in plain C, independent of the package, that does the work of the model's hot paths: four
 * levels of page table, frames with map and reference counts and a reverse map through objects, lazily allocated
 * contents, copy-on-write, swap (reclaim.h), one lock per address space and one for the pool of frames, and a hook test
 * wherever the specification has a hook.  It is what the model is measured against, so it is meant to be fast, and only as general
 * as the measured programs need. */
#ifndef VM_H
#define VM_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096ul
#define ENTRIES 512u
#define LEAF_SPAN (PAGE * ENTRIES)
#define BATCH 64
#define RECLAIM_BATCH 32
#define SLAB 64
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

enum { PRESENT = 1, WRITABLE = 2, ACCESSED = 4, DIRTY = 8, EXCLUSIVE = 16, ZERO = 32, SWAP = 64 };
typedef uint64_t pte_t;                                 /* frame (SWAP: slot) number << 12 | bits */
typedef struct { pte_t e[ENTRIES]; } table_t;           /* upper levels hold pointers */

typedef struct vma vma_t;
typedef struct mm mm_t;

/* One callback table and the chain that leads to it. */
typedef struct ops {
    void *arg;
    void (*invalidate_range)(void *arg, vma_t *, uint64_t start, uint64_t end);
    void (*invalidate_page)(void *arg, vma_t *, uint64_t addr);
    void (*update_page)(void *arg, vma_t *, uint64_t addr);
    void (*wrprotect_page)(void *arg, vma_t *, uint64_t addr);
} ops_t;
typedef struct node { struct node *next; const ops_t *ops; } node_t;
enum { INVALIDATE_RANGE, INVALIDATE_PAGE, UPDATE_PAGE, WRPROTECT_PAGE, KINDS };
typedef struct { uint64_t walks[KINDS], callbacks[KINDS], nodes; } counts_t;

/* The reverse map: a frame names an object and a page index; the object lists the VMAs that may map its frames. */
typedef struct object { struct link *users; uint64_t count; } object_t;
typedef struct link { object_t *object; vma_t *vma; struct link *next_user, *prev_user, *next_object; } link_t;

typedef struct {
    _Atomic uint64_t counts;                            /* low half: mappings; high half: devices, the page cache */
    object_t *object;
    uint64_t index;                                     /* with KEEP: not dirty in any entry, and yet wanted */
    char *contents;
} frame_t;
#define KEEP (1ul << 63)
#define REFERENCE (1ul << 32)

/* A page of swap: how many entries refer to it, the swap cache's frame + 1, what to find the mappings of that frame by. */
typedef struct { char *contents; uint32_t count, frame; object_t *object; } slot_t;
typedef struct { vma_t *vma; uint64_t addr; pte_t *p; } spot_t;     /* where a frame is mapped */

typedef struct {
    pthread_mutex_t lock;                               /* free frames and tables; taken inside an address space's */
    frame_t *frames;
    uint32_t *free;
    uint64_t n_frames, n_free;
    table_t *tables;                                    /* spare tables, all zero but the link in e[0] */
    table_t *fresh;                                     /* what is left of the newest slab of tables */
    unsigned n_fresh;
    pthread_mutex_t object_lock;                        /* the reverse map; taken before `lock` */
    slot_t *slots;                                      /* swap: 1 .. n_slots */
    uint32_t *free_slots, *slot_of;                     /* slot_of: by frame, 0 but for the swap cache */
    uint64_t n_slots, n_free_slots;
    uint64_t hand, scanned, reclaimed, swapped_out, swapped_in;
    spot_t *spots;                                      /* reclaim's, under object_lock */
    mm_t **tried;
    uint64_t room;
} memory_t;

struct vma {
    uint64_t start, end, pgoff;
    int writable, locked;
    mm_t *mm;
    node_t *chain;
    object_t *object;                                   /* for new frames; made at the first write */
    link_t *links;                                      /* all objects whose frames may be mapped here */
};

struct mm {
    pthread_mutex_t lock;
    unsigned hooked;                                    /* nonzero: there is a chain here or on a VMA */
    node_t *chain;
    memory_t *mem;
    table_t *top;
    vma_t **vmas;                                       /* in address order */
    unsigned n_vmas, room;
    uint64_t faults_zero, faults_anon, faults_cow, faults_reuse, faults_swap, rss, swapped, locked;
    counts_t hooks;
    uint64_t cut;                                       /* the last truncation that was here */
    unsigned n_spare;                                   /* frames taken from the pool, a batch at a time */
    uint32_t spare[BATCH];
};

#ifdef NO_HOOKS
#define HOOKED(mm) 0
#else
#define HOOKED(mm) unlikely((mm)->hooked)
#endif
#define WALK(mm, v, first, kind, callback, ...) do { \
        (mm)->hooks.walks[kind]++; \
        for (const node_t *n_ = (first); n_; n_ = n_->next) { \
            const ops_t *o_ = n_->ops; \
            __typeof__(o_->callback) f_ = o_->callback; \
            (mm)->hooks.nodes++; \
            if (f_) { \
                (mm)->hooks.callbacks[kind]++; \
                f_(o_->arg, v, __VA_ARGS__); \
            } \
        } \
    } while (0)
/* A hook site: the address space's chain, then the VMA's. */
#define FIRE(mm, v, kind, callback, ...) do { \
        if (HOOKED(mm)) { \
            if ((mm)->chain) WALK(mm, v, (mm)->chain, kind, callback, __VA_ARGS__); \
            if ((v)->chain) WALK(mm, v, (v)->chain, kind, callback, __VA_ARGS__); \
        } \
    } while (0)

static void *must(void *p)
{
    if (!p) {
        fputs("out of memory\n", stderr);
        exit(1);
    }
    return p;
}

/* ---- frames and tables ---- */

static memory_t *memory_new(uint64_t frames)
{
    memory_t *mem = must(calloc(1, sizeof *mem));
    pthread_mutex_init(&mem->lock, NULL);
    pthread_mutex_init(&mem->object_lock, NULL);
    mem->frames = must(calloc(frames, sizeof *mem->frames));
    mem->free = must(malloc(frames * sizeof *mem->free));
    mem->n_frames = mem->n_free = frames;
    for (uint64_t i = 0; i < frames; i++)
        mem->free[i] = (uint32_t)(frames - 1 - i);
    return mem;
}

static uint64_t reclaim(memory_t *mem, const mm_t *self, uint64_t wanted);

static __attribute__((noinline)) void refill(mm_t *mm)
{
    memory_t *mem = mm->mem;
    pthread_mutex_lock(&mem->lock);
    while (unlikely(!mem->n_free)) {
        pthread_mutex_unlock(&mem->lock);
        if (!mem->n_slots || !reclaim(mem, mm, RECLAIM_BATCH))
            must(NULL);
        pthread_mutex_lock(&mem->lock);
    }
    unsigned k = mem->n_free < BATCH ? (unsigned)mem->n_free : BATCH;
    for (unsigned i = 0; i < k; i++)                    /* spare is a stack too: keep the pool's order */
        mm->spare[k - 1 - i] = mem->free[mem->n_free - 1 - i];
    mem->n_free -= k;
    mm->n_spare = k;
    pthread_mutex_unlock(&mem->lock);
}

static __attribute__((noinline)) void give_back(mm_t *mm)
{
    memory_t *mem = mm->mem;
    pthread_mutex_lock(&mem->lock);
    memcpy(mem->free + mem->n_free, mm->spare, mm->n_spare * sizeof *mm->spare);
    mem->n_free += mm->n_spare;
    pthread_mutex_unlock(&mem->lock);
    mm->n_spare = 0;
}

/* A fault has seen to it that there is one. */
static inline uint32_t take_frame(mm_t *mm)
{
    return mm->spare[--mm->n_spare];
}

static inline void drop_frame(mm_t *mm, uint32_t pfn)
{
    frame_t *f = mm->mem->frames + pfn;
    if (unlikely(f->contents)) {
        free(f->contents);
        f->contents = NULL;
    }
    if (unlikely(mm->n_spare == BATCH))
        give_back(mm);
    mm->spare[mm->n_spare++] = pfn;
}

/* A frame whose one count is our mapping is reached by nobody else while we hold our lock: a plain store will do. */
static inline void map_frame(frame_t *f)
{
    if (likely(atomic_load_explicit(&f->counts, memory_order_acquire) == 1))
        atomic_store_explicit(&f->counts, 2, memory_order_relaxed);
    else
        atomic_fetch_add_explicit(&f->counts, 1, memory_order_acq_rel);
}

static inline void unmap_frame(mm_t *mm, uint32_t pfn)
{
    frame_t *f = mm->mem->frames + pfn;
    if (atomic_load_explicit(&f->counts, memory_order_acquire) == 1)
        atomic_store_explicit(&f->counts, 0, memory_order_relaxed);
    else if (atomic_fetch_sub_explicit(&f->counts, 1, memory_order_acq_rel) != 1)
        return;
    drop_frame(mm, pfn);
}

/* Tables come from the system in slabs: zero pages, none of them lost to alignment. */
static __attribute__((noinline)) void slab_new(memory_t *mem)
{
    table_t *slab = mmap(NULL, SLAB * sizeof *slab, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(slab == MAP_FAILED ? NULL : slab);
    mem->fresh = slab;
    mem->n_fresh = SLAB;
}

static table_t *table_new(memory_t *mem)
{
    pthread_mutex_lock(&mem->lock);
    table_t *t = mem->tables;
    if (t) {
        mem->tables = (table_t *)t->e[0];
        t->e[0] = 0;
    } else {
        if (!mem->n_fresh)
            slab_new(mem);
        mem->n_fresh--;
        t = mem->fresh++;
    }
    pthread_mutex_unlock(&mem->lock);
    return t;
}

/* Every entry is zero by now. */
static void table_free(memory_t *mem, table_t *t)
{
    pthread_mutex_lock(&mem->lock);
    t->e[0] = (uint64_t)mem->tables;
    mem->tables = t;
    pthread_mutex_unlock(&mem->lock);
}

#define SLOT(addr, level) ((addr) >> (12 + 9 * (level)) & (ENTRIES - 1))

static inline table_t *leaf_of(mm_t *mm, uint64_t addr)
{
    table_t *t = mm->top;
    for (int level = 3; level && t; level--)
        t = (table_t *)t->e[SLOT(addr, level)];
    return t;
}

static __attribute__((noinline)) table_t *leaf_make(mm_t *mm, uint64_t addr)
{
    table_t *t = mm->top;
    for (int level = 3; level; level--) {
        pte_t *e = &t->e[SLOT(addr, level)];
        if (!*e)
            *e = (uint64_t)table_new(mm->mem);
        t = (table_t *)*e;
    }
    return t;
}

/* Frees the tables under `t` (of `level`, first address `base`) that [start, end) reaches into and that lie wholly
 * between `floor` and `ceiling`, where no VMA is left. */
static int tables_free(memory_t *mem, table_t *t, int level, uint64_t base, uint64_t start, uint64_t end,
                       uint64_t floor, uint64_t ceiling)
{
    uint64_t span = PAGE << (9 * level), stop = base + span * ENTRIES;
    if (level)
        for (uint64_t a = start > base ? start & -span : base; a < end && a < stop; a += span) {
            pte_t *e = &t->e[SLOT(a, level)];
            if (*e && tables_free(mem, (table_t *)*e, level - 1, a, start, end, floor, ceiling))
                *e = 0;
        }
    if (base < floor || stop > ceiling)
        return 0;
    table_free(mem, t);
    return 1;
}

/* ---- VMAs and objects ---- */

static inline unsigned vma_index(mm_t *mm, uint64_t addr)        /* of the first VMA that ends above addr */
{
    unsigned lo = 0, hi = mm->n_vmas;
    while (lo < hi) {
        unsigned mid = (lo + hi) / 2;
        if (mm->vmas[mid]->end > addr)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}

static void vma_insert(mm_t *mm, unsigned at, vma_t *v)
{
    if (mm->n_vmas == mm->room) {
        mm->room = mm->room ? 2 * mm->room : 16;
        mm->vmas = must(realloc(mm->vmas, mm->room * sizeof *mm->vmas));
    }
    memmove(mm->vmas + at + 1, mm->vmas + at, (mm->n_vmas - at) * sizeof *mm->vmas);
    mm->vmas[at] = v;
    mm->n_vmas++;
}

static void object_join(memory_t *mem, object_t *o, vma_t *v)
{
    link_t *l = must(malloc(sizeof *l));
    l->object = o;
    l->vma = v;
    l->next_object = v->links;
    v->links = l;
    pthread_mutex_lock(&mem->object_lock);
    l->prev_user = NULL;
    l->next_user = o->users;
    if (o->users)
        o->users->prev_user = l;
    o->users = l;
    o->count++;
    pthread_mutex_unlock(&mem->object_lock);
}

static void objects_leave(memory_t *mem, vma_t *v)
{
    pthread_mutex_lock(&mem->object_lock);
    for (link_t *l = v->links, *next; l; l = next) {
        next = l->next_object;
        *(l->prev_user ? &l->prev_user->next_user : &l->object->users) = l->next_user;
        if (l->next_user)
            l->next_user->prev_user = l->prev_user;
        if (!--l->object->count)
            free(l->object);
        free(l);
    }
    pthread_mutex_unlock(&mem->object_lock);
    v->links = NULL;
}

static __attribute__((noinline)) void object_make(mm_t *mm, vma_t *v)
{
    v->object = must(calloc(1, sizeof *v->object));
    object_join(mm->mem, v->object, v);
}

#include "reclaim.h"

/* ---- the verbs: each takes the address space's lock once ---- */

static mm_t *mm_new(memory_t *mem)
{
    mm_t *mm = must(calloc(1, sizeof *mm));
    pthread_mutex_init(&mm->lock, NULL);
    mm->mem = mem;
    mm->top = table_new(mem);
    return mm;
}

/* Maps [addr, addr + length), where nothing may be mapped; grows the VMA before it when it continues it. */
static void mm_map(mm_t *mm, uint64_t addr, uint64_t length, int writable)
{
    pthread_mutex_lock(&mm->lock);
    unsigned at = vma_index(mm, addr);
    vma_t *prev = at ? mm->vmas[at - 1] : NULL;
    if (prev && prev->end == addr && prev->writable == writable && !prev->locked && !prev->chain &&
        prev->pgoff + ((prev->end - prev->start) >> 12) == addr >> 12) {
        prev->end += length;
    } else {
        vma_t *v = must(calloc(1, sizeof *v));
        v->start = addr;
        v->end = addr + length;
        v->pgoff = addr >> 12;
        v->writable = writable;
        v->mm = mm;
        vma_insert(mm, at, v);
    }
    pthread_mutex_unlock(&mm->lock);
}

static inline void map_new_frame(mm_t *mm, vma_t *v, uint64_t addr, pte_t *p, const char *contents)
{
    uint32_t pfn = take_frame(mm);
    frame_t *f = mm->mem->frames + pfn;
    if (unlikely(!v->object))
        object_make(mm, v);
    f->object = v->object;
    f->index = v->pgoff + ((addr - v->start) >> 12);
    atomic_store_explicit(&f->counts, 1, memory_order_relaxed);
    if (unlikely(contents != NULL))
        f->contents = memcpy(must(malloc(PAGE)), contents, PAGE);
    *p = (uint64_t)pfn << 12 | PRESENT | WRITABLE | ACCESSED | DIRTY | EXCLUSIVE;
}

static __attribute__((noinline)) void fault_cow(mm_t *mm, vma_t *v, uint64_t addr, pte_t *p)
{
    pte_t e = *p;
    if (!(e & ZERO)) {
        uint32_t old = (uint32_t)(e >> 12);
        frame_t *f = mm->mem->frames + old;
        if (atomic_load_explicit(&f->counts, memory_order_acquire) == 1) {
            f->object = v->object;
            *p = e | WRITABLE | ACCESSED | DIRTY | EXCLUSIVE;
            mm->faults_reuse++;
        } else {
            FIRE(mm, v, INVALIDATE_PAGE, invalidate_page, addr);
            map_new_frame(mm, v, addr, p, f->contents);
            unmap_frame(mm, old);
            mm->faults_cow++;
        }
    } else {
        FIRE(mm, v, INVALIDATE_PAGE, invalidate_page, addr);
        map_new_frame(mm, v, addr, p, NULL);
        mm->rss++;
        mm->faults_cow++;
    }
}

static __attribute__((noinline)) void fault_swap(mm_t *mm, vma_t *v, uint64_t addr, pte_t *p, int write);

/* The access to one page that the entry does not allow. */
static inline void fault(mm_t *mm, vma_t *v, uint64_t addr, pte_t *p, int write)
{
    if (unlikely(!mm->n_spare))                         /* first of all: reclaim may take what the entry has */
        refill(mm);
    if (likely(!*p)) {
        if (write) {
            map_new_frame(mm, v, addr, p, NULL);
            mm->rss++;
            mm->faults_anon++;
        } else {
            *p = PRESENT | ZERO | ACCESSED;
            mm->faults_zero++;
        }
    } else if (likely(*p & PRESENT)) {
        fault_cow(mm, v, addr, p);
    } else {
        fault_swap(mm, v, addr, p, write);
    }
    FIRE(mm, v, UPDATE_PAGE, update_page, addr);
}

/* Accesses each page of the range; returns the pages that faulted, -1 where nothing is mapped or may be written. */
static long mm_touch(mm_t *mm, uint64_t addr, uint64_t length, int write)
{
    uint64_t end = addr + length;
    long faults = 0;
    pte_t need = write ? PRESENT | WRITABLE : PRESENT, mark = write ? ACCESSED | DIRTY : ACCESSED;
    pthread_mutex_lock(&mm->lock);
    for (unsigned at = vma_index(mm, addr); addr < end; at++) {
        vma_t *v = at < mm->n_vmas ? mm->vmas[at] : NULL;
        if (!v || v->start > addr || (write && !v->writable)) {
            pthread_mutex_unlock(&mm->lock);
            return -1;
        }
        uint64_t stop = end < v->end ? end : v->end;
        while (addr < stop) {
            table_t *leaf = leaf_of(mm, addr);
            if (unlikely(!leaf))
                leaf = leaf_make(mm, addr);
            uint64_t edge = (addr & -LEAF_SPAN) + LEAF_SPAN;
            if (edge > stop)
                edge = stop;
            for (pte_t *p = &leaf->e[SLOT(addr, 0)]; addr < edge; addr += PAGE, p++)
                if (likely((*p & need) != need)) {
                    fault(mm, v, addr, p, write);
                    faults++;
                } else if ((*p & mark) != mark)
                    *p |= mark;
        }
    }
    pthread_mutex_unlock(&mm->lock);
    return faults;
}

static void zap(mm_t *mm, uint64_t addr, uint64_t end)
{
    while (addr < end) {
        uint64_t edge = (addr & -LEAF_SPAN) + LEAF_SPAN;
        if (edge > end)
            edge = end;
        table_t *leaf = leaf_of(mm, addr);
        if (leaf)
            for (pte_t *p = &leaf->e[SLOT(addr, 0)]; addr < edge; addr += PAGE, p++) {
                pte_t e = *p;
                if (!e)
                    continue;
                *p = 0;
                if (likely(!(e & (ZERO | SWAP)))) {
                    unmap_frame(mm, (uint32_t)(e >> 12));
                    mm->rss--;
                } else if (e & SWAP) {
                    swap_drop(mm, e);
                }
            }
        addr = edge;
    }
}

static void vma_split(mm_t *mm, unsigned at, uint64_t addr)
{
    vma_t *low = mm->vmas[at], *high = must(malloc(sizeof *high));
    *high = *low;
    high->start = addr;
    high->pgoff += (addr - low->start) >> 12;
    high->links = NULL;
    for (link_t *l = low->links; l; l = l->next_object)
        object_join(mm->mem, l->object, high);
    low->end = addr;
    vma_insert(mm, at + 1, high);
}

static void mm_unmap(mm_t *mm, uint64_t addr, uint64_t length)
{
    uint64_t end = addr + length;
    pthread_mutex_lock(&mm->lock);
    unsigned first = vma_index(mm, addr), last;
    if (first < mm->n_vmas && mm->vmas[first]->start < end) {
        if (mm->vmas[first]->start < addr)
            vma_split(mm, first++, addr);
        last = vma_index(mm, end);
        if (last < mm->n_vmas && mm->vmas[last]->start < end)
            vma_split(mm, last++, end);
        FIRE(mm, mm->vmas[first], INVALIDATE_RANGE, invalidate_range, addr, end);
        for (unsigned i = first; i < last; i++) {
            vma_t *v = mm->vmas[i];
            zap(mm, v->start, v->end);
            objects_leave(mm->mem, v);
            free(v);
        }
        tables_free(mm->mem, mm->top, 3, 0, addr, end, first ? mm->vmas[first - 1]->end : 0,
                    last < mm->n_vmas ? mm->vmas[last]->start : 1ul << 47);
        memmove(mm->vmas + first, mm->vmas + last, (mm->n_vmas - last) * sizeof *mm->vmas);
        mm->n_vmas -= last - first;
    }
    if (mm->n_spare)
        give_back(mm);
    pthread_mutex_unlock(&mm->lock);
}

static void fork_range(mm_t *mm, mm_t *child, vma_t *v)
{
    frame_t *frames = mm->mem->frames;
    for (uint64_t addr = v->start; addr < v->end;) {
        uint64_t edge = (addr & -LEAF_SPAN) + LEAF_SPAN;
        if (edge > v->end)
            edge = v->end;
        table_t *from = leaf_of(mm, addr);
        if (from) {
            table_t *to = leaf_make(child, addr);
            if (HOOKED(mm))                             /* one test for a table */
                for (uint64_t a = addr; a < edge; a += PAGE)
                    if (from->e[SLOT(a, 0)] & WRITABLE)
                        FIRE(mm, v, WRPROTECT_PAGE, wrprotect_page, a);
            for (unsigned i = SLOT(addr, 0); addr < edge; addr += PAGE, i++) {
                pte_t e = from->e[i];
                if (!e)
                    continue;
                if (likely(!(e & (ZERO | SWAP)))) {
                    map_frame(frames + (e >> 12));
                    child->rss++;
                } else if (e & SWAP) {
                    swap_share(child, e);
                }
                if (e & (WRITABLE | EXCLUSIVE))
                    from->e[i] = e &= ~(pte_t)(WRITABLE | EXCLUSIVE);
                to->e[i] = e & ~(pte_t)ACCESSED;
            }
        }
        addr = edge;
    }
}

static mm_t *mm_fork(mm_t *mm)
{
    mm_t *child = mm_new(mm->mem);
    pthread_mutex_lock(&mm->lock);
    for (unsigned i = 0; i < mm->n_vmas; i++) {
        vma_t *v = mm->vmas[i], *w = must(malloc(sizeof *w));
        *w = *v;
        w->mm = child;
        w->locked = 0;
        w->chain = NULL;
        w->links = NULL;
        w->object = NULL;
        for (link_t *l = v->links; l; l = l->next_object)
            object_join(mm->mem, l->object, w);
        vma_insert(child, i, w);
        if (v->object || v->links)
            fork_range(mm, child, v);
    }
    pthread_mutex_unlock(&mm->lock);
    return child;
}

static void mm_exit(mm_t *mm)
{
    if (mm->n_vmas)
        mm_unmap(mm, mm->vmas[0]->start, mm->vmas[mm->n_vmas - 1]->end - mm->vmas[0]->start);
    if (mm->n_spare)
        give_back(mm);
    table_free(mm->mem, mm->top);
    pthread_mutex_destroy(&mm->lock);
    free(mm->vmas);
    free(mm);
}

/* Gives each page of the range contents. */
static void mm_fill(mm_t *mm, uint64_t addr, uint64_t length, int byte)
{
    mm_touch(mm, addr, length, 1);
    pthread_mutex_lock(&mm->lock);
    for (uint64_t a = addr; a < addr + length; a += PAGE) {
        frame_t *f = mm->mem->frames + (leaf_of(mm, a)->e[SLOT(a, 0)] >> 12);
        if (!f->contents)
            f->contents = must(malloc(PAGE));
        memset(f->contents, byte, PAGE);
    }
    pthread_mutex_unlock(&mm->lock);
}

/* Where the programs map their range: in the middle of a leaf table, as a program's mapping is. */
#define BASE 0x7fff00123000ul

/* A callback that counts its calls. */
static void count_page(void *arg, vma_t *v, uint64_t addr)
{
    (void)v, (void)addr;
    ++*(uint64_t *)arg;
}
#endif
