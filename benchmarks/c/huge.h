/* Private huge pages: 2 MiB entries in the page tables' second level, a pool with reservations.  Over vm.h. */
#ifndef HUGE_H
#define HUGE_H
#include "vm.h"

typedef struct {
    pthread_mutex_t lock;
    frame_t *frames;
    uint32_t *free;
    uint64_t n_free, n_reserved;                        /* reserved: of those free */
} pool_t;

static pool_t *pool_new(uint64_t pages)
{
    pool_t *pool = must(calloc(1, sizeof *pool));
    pthread_mutex_init(&pool->lock, NULL);
    pool->frames = must(calloc(pages, sizeof *pool->frames));
    pool->free = must(malloc(pages * sizeof *pool->free));
    pool->n_free = pages;
    for (uint64_t i = 0; i < pages; i++)
        pool->free[i] = (uint32_t)i;
    return pool;
}

static int huge_map(mm_t *mm, pool_t *pool, uint64_t addr, uint64_t pages)
{
    pthread_mutex_lock(&pool->lock);
    int enough = pool->n_free - pool->n_reserved >= pages;
    if (enough)
        pool->n_reserved += pages;
    pthread_mutex_unlock(&pool->lock);
    if (enough)
        mm_map(mm, addr, pages * LEAF_SPAN, 1);
    return enough;
}

/* The table of 2 MiB entries for an address. */
static inline table_t *middle_of(mm_t *mm, uint64_t addr, int make)
{
    table_t *t = mm->top;
    for (int level = 3; level > 1 && t; level--) {
        pte_t *e = &t->e[SLOT(addr, level)];
        if (!*e && make)
            *e = (uint64_t)table_new(mm->mem);
        t = (table_t *)*e;
    }
    return t;
}

/* A write to each huge page of a private mapping that has its pages reserved.  No hooks: so the specification. */
static long huge_touch(mm_t *mm, pool_t *pool, uint64_t addr, uint64_t end)
{
    long faults = 0;
    pthread_mutex_lock(&mm->lock);
    vma_t *v = mm->vmas[vma_index(mm, addr)];
    for (; addr < end; addr += LEAF_SPAN) {
        pte_t *p = &middle_of(mm, addr, 1)->e[SLOT(addr, 1)];
        if (*p) {
            *p |= ACCESSED | DIRTY;
            continue;
        }
        if (!v->object)
            object_make(mm, v);
        pthread_mutex_lock(&pool->lock);
        pool->n_reserved--;
        uint32_t number = pool->free[--pool->n_free];
        pthread_mutex_unlock(&pool->lock);
        frame_t *f = pool->frames + number;
        f->object = v->object;
        f->index = v->pgoff + ((addr - v->start) >> 12);
        atomic_store_explicit(&f->counts, 1, memory_order_relaxed);
        *p = (uint64_t)number << 21 | PRESENT | WRITABLE | ACCESSED | DIRTY | EXCLUSIVE;
        mm->faults_anon++;
        faults++;
    }
    pthread_mutex_unlock(&mm->lock);
    return faults;
}

/* Unmaps the one VMA that there is at addr. */
static void huge_unmap(mm_t *mm, pool_t *pool, uint64_t addr)
{
    pthread_mutex_lock(&mm->lock);
    unsigned at = vma_index(mm, addr);
    vma_t *v = mm->vmas[at];
    uint64_t unused = (v->end - v->start) / LEAF_SPAN;
    FIRE(mm, v, INVALIDATE_RANGE, invalidate_range, v->start, v->end);
    for (addr = v->start; addr < v->end; addr += LEAF_SPAN) {
        table_t *t = middle_of(mm, addr, 0);
        pte_t *p = t ? &t->e[SLOT(addr, 1)] : NULL;
        if (!p || !*p)
            continue;
        frame_t *f = pool->frames + (*p >> 21);
        if (atomic_fetch_sub_explicit(&f->counts, 1, memory_order_acq_rel) == 1) {
            pthread_mutex_lock(&pool->lock);
            free(f->contents);
            f->contents = NULL;
            pool->free[pool->n_free++] = (uint32_t)(*p >> 21);
            pthread_mutex_unlock(&pool->lock);
        }
        *p = 0;
        unused--;
    }
    pthread_mutex_lock(&pool->lock);
    pool->n_reserved -= unused;
    pthread_mutex_unlock(&pool->lock);
    tables_free(mm->mem, mm->top, 3, 0, v->start, v->end, at ? mm->vmas[at - 1]->end : 0,
                at + 1 < mm->n_vmas ? mm->vmas[at + 1]->start : 1ul << 47);
    objects_leave(mm->mem, v);
    free(v);
    memmove(mm->vmas + at, mm->vmas + at + 1, (--mm->n_vmas - at) * sizeof *mm->vmas);
    pthread_mutex_unlock(&mm->lock);
}
#endif
