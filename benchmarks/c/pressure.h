/* What programs ask of memory under pressure: advice to swap out, locked ranges, pins.  Over vm.h. */
#ifndef PRESSURE_H
#define PRESSURE_H
#include "vm.h"

/* MADV_PAGEOUT: what only this address space maps goes to swap, used lately or not. */
static void mm_pageout(mm_t *mm, uint64_t addr, uint64_t length)
{
    memory_t *mem = mm->mem;
    pthread_mutex_lock(&mm->lock);
    pthread_mutex_lock(&mem->object_lock);
    pthread_mutex_lock(&mem->lock);
    for (uint64_t end = addr + length, edge; addr < end; addr = edge) {
        table_t *leaf = leaf_of(mm, addr);
        edge = (addr & -LEAF_SPAN) + LEAF_SPAN;
        if (edge > end)
            edge = end;
        if (!leaf)
            continue;
        for (pte_t *p = &leaf->e[SLOT(addr, 0)]; addr < edge; addr += PAGE, p++)
            if (*p & PRESENT && !(*p & ZERO) &&
                (uint32_t)atomic_load_explicit(&mem->frames[*p >> 12].counts, memory_order_acquire) == 1)
                reclaim_frame(mem, mm, (uint32_t)(*p >> 12), 1);
    }
    pthread_mutex_unlock(&mem->lock);
    pthread_mutex_unlock(&mem->object_lock);
    pthread_mutex_unlock(&mm->lock);
}

/* mlock: the VMAs of the range, which has no holes, are locked; then its pages are faulted in. */
static long mm_mlock(mm_t *mm, uint64_t addr, uint64_t length)
{
    uint64_t end = addr + length;
    int writable = 1;
    pthread_mutex_lock(&mm->lock);
    unsigned at = vma_index(mm, addr);
    if (mm->vmas[at]->start < addr)
        vma_split(mm, at++, addr);
    for (; at < mm->n_vmas && mm->vmas[at]->start < end; at++) {
        vma_t *v = mm->vmas[at];
        if (v->end > end)
            vma_split(mm, at, end);
        if (!v->locked)
            mm->locked += (v->end - v->start) >> 12;
        v->locked = 1;
        writable &= v->writable;
    }
    pthread_mutex_unlock(&mm->lock);
    return mm_touch(mm, addr, length, writable);
}

/* A reference to the frame of each page, faulted in for writing; returns the frames' numbers. */
static uint64_t *mm_pin(mm_t *mm, uint64_t addr, uint64_t length)
{
    const pte_t need = PRESENT | WRITABLE;
    uint64_t *pfns = must(malloc(length / PAGE * sizeof *pfns)), *out = pfns, end = addr + length;
    pthread_mutex_lock(&mm->lock);
    while (addr < end) {
        vma_t *v = mm->vmas[vma_index(mm, addr)];
        table_t *leaf = leaf_of(mm, addr);
        if (!leaf)
            leaf = leaf_make(mm, addr);
        uint64_t edge = (addr & -LEAF_SPAN) + LEAF_SPAN;
        if (edge > end)
            edge = end;
        if (edge > v->end)
            edge = v->end;
        for (pte_t *p = &leaf->e[SLOT(addr, 0)]; addr < edge; addr += PAGE, p++) {
            if ((*p & need) != need)
                fault(mm, v, addr, p, 1);
            *p |= ACCESSED | DIRTY;
            *out++ = *p >> 12;
            atomic_fetch_add_explicit(&mm->mem->frames[*p >> 12].counts, REFERENCE, memory_order_acq_rel);
        }
    }
    pthread_mutex_unlock(&mm->lock);
    return pfns;
}

/* Drops one reference of each; -1, and none dropped, if one was not pinned. */
static int unpin(memory_t *mem, const uint64_t *pfns, long n)
{
    long i;
    for (i = 0; i < n; i++) {
        uint64_t cached = mem->slot_of && mem->slot_of[pfns[i]];
        if (pfns[i] >= mem->n_frames || atomic_load_explicit(&mem->frames[pfns[i]].counts, memory_order_acquire) >> 32 <= cached)
            break;
        if (atomic_fetch_sub_explicit(&mem->frames[pfns[i]].counts, REFERENCE, memory_order_acq_rel) == REFERENCE) {
            pthread_mutex_lock(&mem->lock);
            free(mem->frames[pfns[i]].contents);
            mem->frames[pfns[i]].contents = NULL;
            mem->free[mem->n_free++] = (uint32_t)pfns[i];
            pthread_mutex_unlock(&mem->lock);
        }
    }
    if (i == n)
        return 0;
    while (i--)
        atomic_fetch_add_explicit(&mem->frames[pfns[i]].counts, REFERENCE, memory_order_acq_rel);
    return -1;
}
#endif
