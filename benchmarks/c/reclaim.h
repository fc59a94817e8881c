/* Memory pressure: swap slots, reclaim through the reverse map, swap-in.  Part of vm.h.
 *
 * A clock goes over the frames; a frame that some entry has used since is passed over once.  The locks of the address spaces
 * that map a frame are tried, never waited for; our own we have.  Slots are the pool lock's. */
#ifndef RECLAIM_H
#define RECLAIM_H

static void swap_on(memory_t *mem, uint64_t slots)
{
    mem->slots = must(calloc(slots + 1, sizeof *mem->slots));
    mem->free_slots = must(malloc(slots * sizeof *mem->free_slots));
    mem->slot_of = must(calloc(mem->n_frames, sizeof *mem->slot_of));
    mem->n_slots = mem->n_free_slots = slots;
    for (uint64_t i = 0; i < slots; i++)
        mem->free_slots[i] = (uint32_t)(slots - i);
}

/* One reference fewer; frees the slot with the last.  Returns the swap cache's frame + 1 if the cache ends with it. */
static uint64_t slot_put(memory_t *mem, uint32_t number)
{
    slot_t *slot = mem->slots + number;
    uint64_t cached = slot->frame;
    if (--slot->count)
        return 0;
    if (cached)
        mem->slot_of[cached - 1] = slot->frame = 0;
    free(slot->contents);
    slot->contents = NULL;
    mem->free_slots[mem->n_free_slots++] = number;
    return cached;
}

/* A frame leaves the swap cache: one of its references that are no mappings. */
static void uncache(mm_t *mm, uint64_t cached)
{
    if (cached && atomic_fetch_sub_explicit(&mm->mem->frames[cached - 1].counts, REFERENCE, memory_order_acq_rel) == REFERENCE)
        drop_frame(mm, (uint32_t)(cached - 1));
}

static __attribute__((noinline)) void swap_drop(mm_t *mm, pte_t e)
{
    pthread_mutex_lock(&mm->mem->lock);
    uint64_t cached = slot_put(mm->mem, (uint32_t)(e >> 12));
    pthread_mutex_unlock(&mm->mem->lock);
    uncache(mm, cached);
    mm->swapped--;
}

static __attribute__((noinline)) void swap_share(mm_t *child, pte_t e)
{
    pthread_mutex_lock(&child->mem->lock);
    child->mem->slots[e >> 12].count++;
    pthread_mutex_unlock(&child->mem->lock);
    child->swapped++;
}

static __attribute__((noinline)) void spots_grow(memory_t *mem, uint64_t count)
{
    mem->room = 2 * count;
    mem->spots = must(realloc(mem->spots, mem->room * sizeof *mem->spots));
    mem->tried = must(realloc(mem->tried, mem->room * sizeof *mem->tried));
}

typedef struct { unsigned spots, tried; pte_t bits; } found_t;

/* Fills in where the frame is mapped, the address spaces locked; 0: some could not be locked, or it must stay. */
static inline int find_spots(memory_t *mem, const mm_t *self, const frame_t *f, uint64_t pfn, uint64_t mapped, found_t *found)
{
    uint64_t index = f->index & ~KEEP;
    if (unlikely(f->object->count > mem->room))
        spots_grow(mem, f->object->count);
    for (const link_t *l = f->object->users; l && found->spots < mapped; l = l->next_user) {
        vma_t *v = l->vma;
        uint64_t addr = v->start + ((index - v->pgoff) << 12);
        if (index < v->pgoff || addr >= v->end)
            continue;
        if (v->mm != self) {
            if (pthread_mutex_trylock(&v->mm->lock))
                return 0;
            mem->tried[found->tried++] = v->mm;
        }
        table_t *leaf = leaf_of(v->mm, addr);
        pte_t *p = leaf ? &leaf->e[SLOT(addr, 0)] : NULL;
        if (!p || *p >> 12 != pfn || !(*p & PRESENT) || *p & ZERO)
            continue;
        if (v->locked)
            return 0;
        found->bits |= *p;
        mem->spots[found->spots++] = (spot_t){v, addr, p};
    }
    return found->spots == mapped;
}

/* The page to a slot: each entry told, then changed.  Both locks of the memory are held, but not while callbacks run. */
static inline int swap_out(memory_t *mem, frame_t *f, uint32_t pfn, const found_t *found)
{
    uint32_t number = mem->slot_of[pfn];
    unsigned hooked = 0;
    if (!number) {
        if (!mem->n_free_slots)
            return 0;
        number = mem->free_slots[--mem->n_free_slots];
        mem->slots[number].contents = f->contents;
        mem->slots[number].object = f->object;
    } else {                                            /* it has the contents still */
        mem->slots[number].frame = mem->slot_of[pfn] = 0;
        free(f->contents);
    }
    for (unsigned i = 0; i < found->spots; i++)
        hooked |= HOOKED(mem->spots[i].vma->mm);
    if (hooked)
        pthread_mutex_unlock(&mem->lock);
    for (unsigned i = 0; i < found->spots; i++) {
        spot_t *s = mem->spots + i;
        FIRE(s->vma->mm, s->vma, INVALIDATE_PAGE, invalidate_page, s->addr);
        *s->p = (pte_t)number << 12 | SWAP | (*s->p & EXCLUSIVE);
        s->vma->mm->rss--;
        s->vma->mm->swapped++;
    }
    if (hooked)
        pthread_mutex_lock(&mem->lock);
    mem->slots[number].count += found->spots;
    mem->swapped_out++;
    return 1;
}

static inline int reclaim_frame(memory_t *mem, const mm_t *self, uint32_t pfn, int force)
{
    frame_t *f = mem->frames + pfn;
    uint64_t counts = atomic_load_explicit(&f->counts, memory_order_acquire);
    found_t found = {0, 0, 0};
    int done = 0;
    if (!(uint32_t)counts || counts >> 32 != (mem->slot_of[pfn] != 0) || !f->object)    /* free, pinned, on its way */
        return 0;
    if (find_spots(mem, self, f, pfn, (uint32_t)counts, &found)) {
        if (found.bits & ACCESSED && !force) {
            for (unsigned i = 0; i < found.spots; i++)
                *mem->spots[i].p &= ~(pte_t)ACCESSED;
        } else if (swap_out(mem, f, pfn, &found)) {
            f->contents = NULL;
            f->object = NULL;
            atomic_store_explicit(&f->counts, 0, memory_order_relaxed);
            mem->free[mem->n_free++] = pfn;
            mem->reclaimed++;
            done = 1;
        }
    }
    while (found.tried)
        pthread_mutex_unlock(&mem->tried[--found.tried]->lock);
    return done;
}

/* Up to `wanted` frames back to the pool, in two turns of the clock at most; `self`: the address space we have locked. */
static __attribute__((noinline)) uint64_t reclaim(memory_t *mem, const mm_t *self, uint64_t wanted)
{
    uint64_t freed = 0, left = 2 * mem->n_frames;
    pthread_mutex_lock(&mem->object_lock);
    pthread_mutex_lock(&mem->lock);
    for (; freed < wanted && left; left--) {
        uint32_t pfn = (uint32_t)mem->hand;
        mem->hand = mem->hand + 1 == mem->n_frames ? 0 : mem->hand + 1;
        mem->scanned++;
        freed += reclaim_frame(mem, self, pfn, 0);
    }
    pthread_mutex_unlock(&mem->lock);
    pthread_mutex_unlock(&mem->object_lock);
    return freed;
}

/* The page of a swap entry comes back: the frame the swap cache has, or a new one; a write to what others want is a copy. */
static __attribute__((noinline)) void fault_swap(mm_t *mm, vma_t *v, uint64_t addr, pte_t *p, int write)
{
    memory_t *mem = mm->mem;
    pte_t e = *p;
    uint32_t number = (uint32_t)(e >> 12), pfn;
    slot_t *slot = mem->slots + number;
    uint64_t cached = 0;
    if (unlikely(!v->object))
        object_make(mm, v);
    pthread_mutex_lock(&mem->lock);
    int shared = !(e & EXCLUSIVE) && (slot->count > 1 || slot->frame), copy = write && shared;
    object_t *object = shared && !write ? slot->object : v->object;
    if (slot->frame && !copy) {
        pfn = slot->frame - 1;
        atomic_fetch_add_explicit(&mem->frames[pfn].counts, 1, memory_order_acq_rel);
        cached = slot_put(mem, number);
    } else {
        pfn = take_frame(mm);
        frame_t *f = mem->frames + pfn;
        mem->swapped_in++;
        f->object = object;
        f->index = (v->pgoff + ((addr - v->start) >> 12)) | KEEP;
        uint64_t counts = 1;
        if (!shared) {
            f->contents = slot->contents;
            slot->contents = NULL;
            slot_put(mem, number);
        } else {
            if (slot->contents)
                f->contents = memcpy(must(malloc(PAGE)), slot->contents, PAGE);
            if (!copy) {
                counts += REFERENCE;
                mem->slot_of[pfn] = number;
                slot->frame = pfn + 1;
                slot_put(mem, number);
            }
        }
        atomic_store_explicit(&f->counts, counts, memory_order_release);
    }
    pthread_mutex_unlock(&mem->lock);
    if (copy) {
        FIRE(mm, v, INVALIDATE_PAGE, invalidate_page, addr);
        pthread_mutex_lock(&mem->lock);
        cached = slot_put(mem, number);
        pthread_mutex_unlock(&mem->lock);
    }
    uncache(mm, cached);
    *p = (uint64_t)pfn << 12 | PRESENT | ACCESSED | (write || !shared ? EXCLUSIVE | (v->writable ? WRITABLE : 0) : 0) |
         (write ? DIRTY : 0);
    mm->rss++;
    mm->swapped--;
    mm->faults_swap++;
}
#endif
