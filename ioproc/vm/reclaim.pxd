# Reclaim: frames are taken back through the reverse map, from whichever address spaces map them.
#
# A clock goes over the frames; one that was accessed since it came by gets a second chance.  Nothing here waits for an
# address space: the locks of all that map a frame are tried, and the frame is left alone if one is not free.  Callers
# hold no pointer into a page table: reclaim may free tables that it leaves empty, the caller's own too.
from libc.stdint cimport uint32_t as u32, uint64_t as u64
from libc.stdlib cimport free, malloc, realloc
from ioproc.hooks.chain cimport INVALIDATE_PAGE, unlikely
from ioproc.pthread cimport pthread_mutex_lock, pthread_mutex_unlock, pthread_self
from ioproc.vm.fire cimport fire_page
from ioproc.vm.frames cimport (
    BATCH, ONE_REFERENCE, FrameBatch, batch_return, batch_take, frames_free, mapcount_of, pool_give, references_of)
from ioproc.vm.huge cimport huge_entry
from ioproc.vm.mm cimport (
    HOOKED, MM, OWNER_ANON, OWNER_BITS, OWNER_DIRTY, PAGE_SHIFT, PTE_DIRTY, PTE_EXCLUSIVE, PTE_UNCOUNTED, PTE_YOUNG,
    VM_HUGETLB, VM_LOCKED, AnonLink, AnonVMA, FileCache, Frame, Memory, Table, Victims, VMArea, atomic_load, atomic_or,
    atomic_store, atomic_sub, mm_trylock, mm_unlock, vma_index)
from ioproc.vm.page_table cimport leaf_drop, leaf_find, pte_find, table_index
from ioproc.vm.swap cimport CACHE_DISK, CACHE_SLOT, slot_give, slot_take, swap_pte

cdef enum:
    RECLAIM_BATCH = 32          # frames a fault reclaims at once, at most
    RECLAIM_TRIES = 16          # of one fault
    FEW_SPOTS = 32

cdef struct Spot:               # where a frame is mapped
    VMArea *vma
    u64 addr
    u64 *pte

cdef struct Scan:               # one frame: where it is mapped, and the locks taken to find out
    Memory *mem
    Spot *spots
    MM **locked
    u64 nspots
    u64 nlocked
    u64 room                    # of both
    u64 me                      # this thread: what it has locked is not tried
    u64 nfreed
    u32 freed[BATCH]            # on their way to the pool
    Spot few_spots[FEW_SPOTS]
    MM *few_locked[FEW_SPOTS]

cdef enum Victim:               # rows for the tests
    VICTIM_BATCH                # a run of reclaim begins
    VICTIM_ANON
    VICTIM_FILE                 # file, page number
    VICTIM_PAGE                 # page number of the file before
    VICTIM_VIA                  # address space with a VMA of the file; the next row is its start
    VICTIM_SPOT                 # address space; the next row is the address
    VICTIM_ADDRESS


cdef inline void victim_note(Memory *mem, int what, u64 value) noexcept nogil:
    cdef Victims *victims = mem.victims
    cdef u64 *rows
    if victims.n == victims.room:
        rows = <u64 *> realloc(victims.rows, 2 * (victims.room + 64) * 16)
        if rows == NULL:
            victims.failed = True
            return
        victims.rows = rows
        victims.room = 2 * (victims.room + 64)
    victims.rows[2 * victims.n] = what
    victims.rows[2 * victims.n + 1] = value
    victims.n += 1


cdef inline void victim_note_frame(Scan *scan, u64 owner, u64 index) noexcept nogil:
    cdef Memory *mem = scan.mem
    cdef const VMArea *vma
    cdef u64 i
    if owner & OWNER_ANON or owner == 0:
        victim_note(mem, VICTIM_ANON, 0)
    else:
        victim_note(mem, VICTIM_FILE, owner & ~<u64> OWNER_BITS)
        victim_note(mem, VICTIM_PAGE, index)
        vma = (<const FileCache *> (owner & ~<u64> OWNER_BITS)).mappings
        if vma != NULL:
            victim_note(mem, VICTIM_VIA, <u64> vma.mm)
            victim_note(mem, VICTIM_ADDRESS, vma.start)
    for i in range(scan.nspots):
        victim_note(mem, VICTIM_SPOT, <u64> scan.spots[i].vma.mm)
        victim_note(mem, VICTIM_ADDRESS, scan.spots[i].addr)


cdef inline void scan_begin(Scan *scan, Memory *mem) noexcept nogil:
    scan.mem = mem
    scan.me = <u64> pthread_self()
    scan.spots = scan.few_spots
    scan.locked = scan.few_locked
    scan.room = FEW_SPOTS
    scan.nspots = 0
    scan.nlocked = 0
    scan.nfreed = 0


cdef inline void scan_drop_room(Scan *scan) noexcept nogil:
    if scan.spots != scan.few_spots:
        free(scan.spots)
        free(scan.locked)
    scan.spots = scan.few_spots
    scan.locked = scan.few_locked
    scan.room = FEW_SPOTS


cdef inline void scan_end(Scan *scan) noexcept nogil:
    scan_drop_room(scan)
    if scan.nfreed:
        pool_give(scan.mem, scan.freed, scan.nfreed)


cdef inline bint scan_reserve(Scan *scan, u64 count) noexcept nogil:
    cdef Spot *spots
    cdef MM **locked
    if count <= scan.room:
        return True
    scan_drop_room(scan)
    spots = <Spot *> malloc(count * sizeof(Spot))
    locked = <MM **> malloc(count * sizeof(MM *))
    if spots == NULL or locked == NULL:
        free(spots)
        free(locked)
        return False
    scan.spots = spots
    scan.locked = locked
    scan.room = count
    return True


cdef inline void scan_unlock(Scan *scan) noexcept nogil:
    while scan.nlocked:
        scan.nlocked -= 1
        mm_unlock(scan.locked[scan.nlocked])
    scan.nspots = 0


cdef inline bint scan_vma(Scan *scan, VMArea *vma, u64 index, u64 pfn) noexcept nogil:
    """Where `vma` maps the frame, if that can be told without waiting, and it does.  False: it is locked memory."""
    cdef MM *mm = vma.mm
    cdef u64 addr
    cdef u64 *pte
    cdef Spot *spot = &scan.spots[scan.nspots]
    if index < vma.pgoff or index >= vma_index(vma, vma.end):
        return True
    if atomic_load(&mm.owner) != scan.me:
        if not mm_trylock(mm):
            return True
        scan.locked[scan.nlocked] = mm
        scan.nlocked += 1
    addr = vma.start + ((index - vma.pgoff) << PAGE_SHIFT)
    pte = huge_entry(mm.huge, addr) if vma.flags & VM_HUGETLB else pte_find(mm.root, addr)
    if pte == NULL or pte[0] >> PAGE_SHIFT != pfn or pte[0] & PTE_UNCOUNTED:
        return True
    if vma.flags & VM_LOCKED:
        return False
    spot.vma = vma
    spot.addr = addr
    spot.pte = pte
    scan.nspots += 1
    return True


cdef inline bint scan_frame(Scan *scan, const Frame *frame, u64 owner, u64 pfn) noexcept nogil:
    """Every entry that maps the frame, its address space locked.  False: leave the frame alone."""
    cdef u64 index = atomic_load(&frame.index)
    cdef AnonLink *link
    cdef VMArea *vma
    cdef u64 count = 0
    cdef u64 mapped = mapcount_of(atomic_load(&frame.counts))
    if mapped == 0:                         # an anonymous one is being freed at this moment
        return owner & ~<u64> OWNER_BITS != 0 and not owner & OWNER_ANON
    if owner & OWNER_ANON:
        link = (<AnonVMA *> (owner & ~<u64> OWNER_BITS)).links
        if not scan_reserve(scan, (<AnonVMA *> (owner & ~<u64> OWNER_BITS)).nlinks):
            return False
        while link != NULL and scan.nspots < mapped:
            if not scan_vma(scan, link.vma, index, pfn):
                return False
            link = link.above
    elif owner:
        vma = (<FileCache *> (owner & ~<u64> OWNER_BITS)).mappings
        while vma != NULL:
            count += 1
            vma = vma.file_above
        if not scan_reserve(scan, count):
            return False
        vma = (<FileCache *> (owner & ~<u64> OWNER_BITS)).mappings
        while vma != NULL and scan.nspots < mapped:
            if not scan_vma(scan, vma, index, pfn):
                return False
            vma = vma.file_above
    # a frame found nowhere is not ours to take, though its count be 0 by now: who unmapped it frees it
    return scan.nspots == mapcount_of(atomic_load(&frame.counts)) and (scan.nspots > 0 or mapped == 0)


cdef inline void spot_unmap(Spot *spot, u64 slot) noexcept nogil:
    cdef MM *mm = spot.vma.mm
    cdef Table *leaf
    fire_page(mm, INVALIDATE_PAGE, spot.vma, spot.addr)
    mm.rss -= 1
    if slot:
        spot.pte[0] = swap_pte(slot, spot.pte[0] & PTE_EXCLUSIVE)
        mm.swapped += 1
        return
    spot.pte[0] = 0
    leaf = leaf_find(mm.root, spot.addr)
    leaf.used -= 1
    if leaf.used == 0:
        leaf_drop(mm.root, spot.addr)


cdef inline void scan_unmap(Scan *scan, u64 slot) noexcept nogil:
    """
    The entries become swap entries; without a slot, empty; each told first.  Hooks run without Memory.lock: the locked
    address spaces keep the frame and its VMAs as they are.
    """
    cdef bint hooked = False
    cdef u64 i
    for i in range(scan.nspots):
        hooked = hooked or HOOKED(scan.spots[i].vma.mm)
    if hooked:
        pthread_mutex_unlock(&scan.mem.lock)
    for i in range(scan.nspots):
        spot_unmap(&scan.spots[i], slot)
    if hooked:
        pthread_mutex_lock(&scan.mem.lock)


cdef inline u64 scan_bits(const Scan *scan) noexcept nogil:
    """The accessed and dirty bits of all entries together."""
    cdef u64 bits = 0
    cdef u64 i
    for i in range(scan.nspots):
        bits |= scan.spots[i].pte[0]
    return bits


cdef inline void frame_back_to_pool(Scan *scan, Frame *frame, u64 pfn) noexcept nogil:
    """Its contents are elsewhere.  The pool has it when the scan ends, or when there are enough of them."""
    frame.contents = NULL
    atomic_store(&frame.counts, 0)
    atomic_store(&frame.owner, 0)
    if unlikely(scan.nfreed == BATCH):
        pool_give(scan.mem, scan.freed, scan.nfreed)
        scan.nfreed = 0
    scan.freed[scan.nfreed] = <u32> pfn
    scan.nfreed += 1
    scan.mem.reclaim.reclaimed += 1


cdef inline bint reclaim_anonymous(Scan *scan, Frame *frame, u64 owner, u64 pfn) noexcept nogil:
    cdef Memory *mem = scan.mem
    cdef u64 slot = mem.slot_of[pfn] if mem.nslots else 0
    cdef bint cached = slot != 0            # the slot has the contents still
    cdef bint unwanted = not (owner & OWNER_DIRTY or scan_bits(scan) & PTE_DIRTY)      # MADV_FREE, and not written since
    if slot == 0 and not unwanted:
        slot = slot_take(mem)
        if slot == 0:
            return False
        mem.slots[slot].pfn = 0
        mem.slots[slot].count = 0
    # first, for hooks may run: others who have entries of the slot may fault or give them up meanwhile
    if slot:
        mem.slots[slot].count += <u32> scan.nspots
    if cached:
        mem.slots[slot].pfn = 0
        mem.slot_of[pfn] = 0
        atomic_sub(&frame.counts, ONE_REFERENCE)
    scan_unmap(scan, slot)
    if slot and not cached:
        mem.slots[slot].contents = frame.contents
    else:
        free(frame.contents)
    if slot:
        mem.reclaim.swapped_out += scan.nspots != 0
    else:
        mem.reclaim.discarded += 1
    frame_back_to_pool(scan, frame, pfn)
    return True


cdef inline bint file_is_shmem(const FileCache *file) noexcept nogil:
    """Its pages go to swap: there is no disk below."""
    return file.anonymous or file.memfd


cdef inline bint reclaim_cached(Scan *scan, Frame *frame, u64 owner, u64 pfn) noexcept nogil:
    """A page of a file, or of shared memory."""
    cdef Memory *mem = scan.mem
    cdef FileCache *file = <FileCache *> (owner & ~<u64> OWNER_BITS)
    cdef bint dirty = owner & OWNER_DIRTY or scan_bits(scan) & PTE_DIRTY
    cdef u64 addr = frame.index << PAGE_SHIFT
    cdef u64 slot = 0
    cdef u64 entry = 0
    cdef u64 left
    cdef Table *leaf
    if dirty and file_is_shmem(file):
        slot = slot_take(mem)
        if slot == 0:
            return False
    if dirty:
        atomic_or(&frame.owner, OWNER_DIRTY)         # the entries' dirty bits go
    scan_unmap(scan, 0)
    left = atomic_sub(&frame.counts, scan.nspots)
    if left != ONE_REFERENCE or (not dirty and atomic_load(&frame.owner) & OWNER_DIRTY):
        if slot:                            # somebody mapped it again meanwhile, wrote to it, or cut it off the file
            slot_give(mem, slot)
        if left == 0:
            free(frame.contents)
            frame_back_to_pool(scan, frame, pfn)
        return left == 0
    if slot:
        mem.slots[slot].contents = frame.contents
        mem.slots[slot].count = 1
        mem.slots[slot].pfn = 0
        mem.reclaim.swapped_out += 1
        entry = CACHE_SLOT | slot
    else:
        if frame.contents != NULL:
            entry = CACHE_DISK | <u64> frame.contents
        if dirty:
            mem.reclaim.written_back += 1
        else:
            mem.reclaim.discarded += 1
    leaf = leaf_find(file.pages, addr)
    leaf.entry[table_index(addr, 0)] = entry
    if entry == 0:
        leaf.used -= 1
        if leaf.used == 0:
            leaf_drop(file.pages, addr)
    frame_back_to_pool(scan, frame, pfn)
    return True


cdef inline bint reclaim_frame(Scan *scan, u64 pfn, bint force) noexcept nogil:
    """
    Take the frame back if nothing speaks against it; with `force` even if it was accessed lately.  Memory.lock is held, and
    let go of while hooks run.  True: the frame is free.
    """
    cdef Memory *mem = scan.mem
    cdef Frame *frame = &mem.frames[pfn]
    cdef u64 owner = atomic_load(&frame.owner)
    cdef u64 counts = atomic_load(&frame.counts)
    cdef bint done = False
    cdef bint anonymous = owner & OWNER_ANON or owner == 0
    cdef bint cached = mem.nslots and mem.slot_of[pfn] if anonymous else True
    cdef u64 i
    # free or on its way; referenced by more than its cache
    if counts == 0 or references_of(counts) != <u64> cached:
        return False
    # once more with all locks: an address space may have pinned the frame and unmapped it
    if scan_frame(scan, frame, owner, pfn) and references_of(atomic_load(&frame.counts)) == <u64> cached:
        if scan_bits(scan) & PTE_YOUNG and not force:
            for i in range(scan.nspots):
                scan.spots[i].pte[0] &= ~<u64> PTE_YOUNG
        else:
            if anonymous:
                done = reclaim_anonymous(scan, frame, owner, pfn)
            else:
                done = reclaim_cached(scan, frame, owner, pfn)
            if unlikely(mem.victims != NULL) and done:
                victim_note_frame(scan, owner, frame.index)
    scan_unlock(scan)
    return done


cdef inline u64 reclaim(Memory *mem, u64 n) noexcept nogil:
    """Up to `n` frames back to the pool; how many.  Two turns of the clock at most: the first may only clear accessed bits."""
    cdef Scan scan
    cdef u64 freed = 0
    cdef u64 left, pfn
    scan_begin(&scan, mem)
    pthread_mutex_lock(&mem.lock)
    if unlikely(mem.victims != NULL):
        victim_note(mem, VICTIM_BATCH, 0)
    left = 2 * (atomic_load(&mem.fresh) - 1)
    while freed < n and left:
        left -= 1
        if mem.hand >= atomic_load(&mem.fresh):
            mem.hand = 1
        pfn = mem.hand
        mem.hand += 1
        mem.reclaim.scanned += 1
        freed += reclaim_frame(&scan, pfn, False)
        if left & 1023 == 0:                # a long search does not keep others out
            pthread_mutex_unlock(&mem.lock)
            pthread_mutex_lock(&mem.lock)
    pthread_mutex_unlock(&mem.lock)
    scan_end(&scan)
    return freed


cdef inline bint reclaim_some(Memory *mem) noexcept nogil:
    """There was no frame: is it worth another try?  A few at once, or a small part of a small memory."""
    cdef u64 part = mem.nframes >> 4
    if reclaim(mem, 1 if part == 0 else part if part < RECLAIM_BATCH else RECLAIM_BATCH):
        return True
    return frames_free(mem) != 0            # another thread gave some back


cdef inline bint make_room(FrameBatch *batch) noexcept nogil:
    """The same for an operation that may hold free frames itself, which the page cache has none of: these go back first."""
    if batch.n or batch.nfreed:
        batch_return(batch)
        return True
    return reclaim_some(batch.mem)


cdef inline u64 batch_take_reclaimed(FrameBatch *batch) noexcept nogil:
    """`batch_take`, with reclaim where there is no frame.  0: there is none to be had."""
    cdef int tries = RECLAIM_TRIES
    cdef u64 pfn = batch_take(batch)
    while unlikely(pfn == 0) and tries and reclaim_some(batch.mem):
        tries -= 1
        pfn = batch_take(batch)
    return pfn
