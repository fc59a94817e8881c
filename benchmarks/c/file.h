/* Files: a page cache, shared mappings of it, truncation and holes in whole pages.  Over vm.h.
 * The address spaces that map a file outlive the calls here. */
#ifndef FILE_H
#define FILE_H
#include "vm.h"

typedef struct {
    object_t object;                                    /* first: what its frames and mappings are found by */
    memory_t *mem;
    uint32_t *pages;                                    /* frame + 1 */
    uint64_t size, room;                                /* pages */
    uint64_t cuts;
    pthread_mutex_t cutting;
} file_t;

static file_t *file_new(memory_t *mem, uint64_t pages)
{
    file_t *file = must(calloc(1, sizeof *file));
    file->object.count = 1;                             /* our own */
    file->mem = mem;
    file->pages = must(calloc(pages, sizeof *file->pages));
    file->size = file->room = pages;
    pthread_mutex_init(&file->cutting, NULL);
    return file;
}

static void file_map(mm_t *mm, uint64_t addr, file_t *file)
{
    mm_map(mm, addr, file->room * PAGE, 1);
    vma_t *v = mm->vmas[vma_index(mm, addr)];
    v->pgoff = 0;
    object_join(mm->mem, &file->object, v);
}

/* A write to each page; the VMA maps nothing but the file. */
static long file_touch(mm_t *mm, uint64_t addr, file_t *file)
{
    memory_t *mem = mm->mem;
    long faults = 0;
    pthread_mutex_lock(&mm->lock);
    vma_t *v = mm->vmas[vma_index(mm, addr)];
    for (uint64_t i = 0; i < file->size; i++, addr += PAGE) {
        table_t *leaf = leaf_of(mm, addr);
        pte_t *p = &(leaf ? leaf : leaf_make(mm, addr))->e[SLOT(addr, 0)];
        if (*p) {
            *p |= ACCESSED | DIRTY;
            continue;
        }
        if (!mm->n_spare)
            refill(mm);
        pthread_mutex_lock(&mem->lock);
        if (!file->pages[i]) {
            uint32_t pfn = take_frame(mm);
            mem->frames[pfn].object = &file->object;
            mem->frames[pfn].index = i;
            atomic_store_explicit(&mem->frames[pfn].counts, REFERENCE, memory_order_relaxed);
            file->pages[i] = pfn + 1;
        }
        *p = (uint64_t)(file->pages[i] - 1) << 12 | PRESENT | WRITABLE | ACCESSED | DIRTY;
        atomic_fetch_add_explicit(&mem->frames[*p >> 12].counts, 1, memory_order_acq_rel);
        pthread_mutex_unlock(&mem->lock);
        mm->rss++;
        faults++;
        FIRE(mm, v, UPDATE_PAGE, update_page, addr);
    }
    pthread_mutex_unlock(&mm->lock);
    return faults;
}

/* Pages [first, last) leave the page cache; the frames that are mapped stay until they are not. */
static void cache_drop(file_t *file, uint64_t first, uint64_t last)
{
    memory_t *mem = file->mem;
    for (uint64_t i = first; i < last; i++) {
        if (!file->pages[i])
            continue;
        uint32_t pfn = file->pages[i] - 1;
        frame_t *f = mem->frames + pfn;
        file->pages[i] = 0;
        f->object = NULL;
        if (atomic_fetch_sub_explicit(&f->counts, REFERENCE, memory_order_acq_rel) == REFERENCE) {
            free(f->contents);
            f->contents = NULL;
            mem->free[mem->n_free++] = pfn;
        }
    }
}

/* The entries of what is no longer in the page cache; private copies, which have an object, stay. */
static void zap_uncached(mm_t *mm, uint64_t addr, uint64_t end)
{
    for (uint64_t edge; addr < end; addr = edge) {
        table_t *leaf = leaf_of(mm, addr);
        edge = (addr & -LEAF_SPAN) + LEAF_SPAN;
        if (edge > end)
            edge = end;
        if (leaf)
            for (pte_t *p = &leaf->e[SLOT(addr, 0)]; addr < edge; addr += PAGE, p++)
                if (*p & PRESENT && !mm->mem->frames[*p >> 12].object) {
                    unmap_frame(mm, (uint32_t)(*p >> 12));
                    *p = 0;
                    mm->rss--;
                }
    }
}

/* Every mapping of pages [first, last), one address space at a time, with no lock held while its own is waited for. */
static void file_cut(file_t *file, uint64_t first, uint64_t last, int copies)
{
    memory_t *mem = file->mem;
    file->cuts++;
    for (;;) {
        mm_t *mm = NULL;
        pthread_mutex_lock(&mem->object_lock);
        for (link_t *l = file->object.users; l && !mm; l = l->next_user)
            if (l->vma->mm->cut != file->cuts && l->vma->pgoff < last &&
                first < l->vma->pgoff + ((l->vma->end - l->vma->start) >> 12))
                mm = l->vma->mm;
        pthread_mutex_unlock(&mem->object_lock);
        if (!mm)
            return;
        pthread_mutex_lock(&mm->lock);
        for (unsigned i = 0; i < mm->n_vmas; i++) {
            vma_t *v = mm->vmas[i];
            uint64_t pages = (v->end - v->start) >> 12;
            if (!v->links || v->links->object != &file->object || v->pgoff >= last || first >= v->pgoff + pages)
                continue;
            uint64_t low = first > v->pgoff ? first - v->pgoff : 0, high = last - v->pgoff < pages ? last - v->pgoff : pages;
            FIRE(mm, v, INVALIDATE_RANGE, invalidate_range, v->start + low * PAGE, v->start + high * PAGE);
            (copies ? zap : zap_uncached)(mm, v->start + low * PAGE, v->start + high * PAGE);
        }
        if (mm->n_spare)
            give_back(mm);
        mm->cut = file->cuts;
        pthread_mutex_unlock(&mm->lock);
    }
}

static void file_truncate(file_t *file, uint64_t size)
{
    pthread_mutex_lock(&file->cutting);
    pthread_mutex_lock(&file->mem->lock);
    uint64_t old = file->size;
    file->size = size;
    if (size < old)
        cache_drop(file, size, old);
    pthread_mutex_unlock(&file->mem->lock);
    if (size < old)
        file_cut(file, size, file->room, 1);
    pthread_mutex_unlock(&file->cutting);
}

static void file_punch(file_t *file, uint64_t first, uint64_t last)
{
    pthread_mutex_lock(&file->cutting);
    pthread_mutex_lock(&file->mem->lock);
    cache_drop(file, first, last < file->size ? last : file->size);
    pthread_mutex_unlock(&file->mem->lock);
    file_cut(file, first, last, 0);
    pthread_mutex_unlock(&file->cutting);
}
#endif
