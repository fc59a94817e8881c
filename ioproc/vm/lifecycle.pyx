# The beginning and end of address spaces and physical memory; fork.
from libc.stdint cimport UINT64_MAX

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)
    enum:
        HOST_MADV_HUGEPAGE "MADV_HUGEPAGE"


cdef Memory *memory_new(u64 frames, u64 swap_slots, u64 huge_pages) noexcept nogil:
    cdef Memory *mem = <Memory *> calloc(1, sizeof(Memory))
    if mem == NULL:
        return NULL
    mem.frames = <Frame *> calloc(frames + 1, sizeof(Frame))    # untouched until used, all of these
    mem.returned = <u32 *> calloc(frames, sizeof(u32))
    mem.slots = <Slot *> calloc(swap_slots + 1, sizeof(Slot))
    mem.slot_of = <u32 *> calloc(frames + 1 if swap_slots else 1, sizeof(u32))
    mem.free_slots = <u32 *> calloc(swap_slots + 1, sizeof(u32))
    pthread_mutex_init(&mem.pool_lock, NULL)
    if (mem.frames == NULL or mem.returned == NULL or mem.slots == NULL or mem.slot_of == NULL or mem.free_slots == NULL
            or pool_make(mem, 0) == NULL):
        memory_release(mem)
        return NULL
    # a big one is filled by long runs of faults: huge pages save the host's own
    if frames * sizeof(Frame) >= 64 << 20:
        madvise(<void *> page_align(<u64> mem.frames), (frames - 256) * sizeof(Frame) & PAGE_MASK, HOST_MADV_HUGEPAGE)
    mem.nframes = frames
    if not huge_pool_new(mem, huge_pages):
        memory_release(mem)
        return NULL
    mem.fresh = 1
    mem.hand = 1
    mem.nslots = swap_slots
    mem.fresh_slot = 1
    pthread_mutex_init(&mem.lock, NULL)
    pthread_mutex_init(&mem.cutting, NULL)
    return mem


cdef void memory_release(Memory *mem) noexcept nogil:
    cdef int i
    if mem.victims != NULL:
        free(mem.victims.rows)
        free(mem.victims)
    device_free(mem)
    free(mem.huge)
    free(mem.huge_stack)
    for i in range(POOLS):
        if mem.pools[i] != NULL:
            pthread_mutex_destroy(&mem.pools[i].lock)
            free(mem.pools[i])
    pthread_mutex_destroy(&mem.pool_lock)
    free(mem.frames)
    free(mem.returned)
    free(mem.slots)
    free(mem.slot_of)
    free(mem.free_slots)
    free(mem)


cdef void memory_free(Memory *mem) noexcept nogil:
    pthread_mutex_destroy(&mem.lock)
    pthread_mutex_destroy(&mem.cutting)
    memory_release(mem)


cdef MM *mm_new(Memory *mem) noexcept nogil:
    cdef MM *mm = <MM *> calloc(1, sizeof(MM))
    if mm == NULL:
        return NULL
    mm.root = table_new()
    if mm.root == NULL or not tree_begin(mm):
        free(mm.root)
        free(mm)
        return NULL
    pthread_mutex_init(&mm.lock, NULL)
    mm.mem = mem
    mm.refs = 1
    mm.max_map_count = 65530
    mm.limit_as = UINT64_MAX
    mm.limit_data = UINT64_MAX
    mm.limit_memlock = UINT64_MAX
    mm.limit_stack = UINT64_MAX
    return mm


cdef void mm_teardown(MM *mm) noexcept nogil:
    """Release each ops, then take everything away: no hook fires for that."""
    cdef FrameBatch batch
    chains_release(mm)
    bracket(mm, 0, TASK_SIZE)
    batch_begin(&batch, mm.mem, 0)
    zap_range(mm, 0, TASK_SIZE, &batch)
    batch_end(&batch)
    while mm.first != NULL:
        vma_remove(mm, mm.first)
    mm.dead = True


cdef void mm_free(MM *mm) noexcept nogil:
    """After mm_teardown."""
    table_free(mm.root, 3)
    table_free(mm.huge, 3)
    tree_end(mm)
    intervals_free(mm.intervals)
    pthread_mutex_destroy(&mm.lock)
    free(mm)


cdef void mm_put(MM *mm) noexcept nogil:
    """The last one frees it: long after mm_teardown, perhaps."""
    if atomic_sub(&mm.refs, 1) == 0:
        mm_free(mm)


cdef void mm_discard(MM *mm) noexcept nogil:
    """One that no Python object has yet."""
    mm_lock(mm)
    mm_teardown(mm)
    mm_unlock(mm)
    mm_put(mm)


cdef void mm_configure(MM *mm, const MM *like) noexcept nogil:
    """What a process keeps over fork and exec."""
    mm.max_map_count = like.max_map_count
    mm.limit_as = like.limit_as
    mm.limit_data = like.limit_data
    mm.limit_memlock = like.limit_memlock
    mm.limit_stack = like.limit_stack
    mm.nonlinear = like.nonlinear
    mm.teardown_batch = like.teardown_batch
    mm.start_brk = like.start_brk
    mm.brk = like.start_brk


cdef bint fork_vmas(MM *parent, MM *child) noexcept nogil:
    cdef VMArea *vma = parent.first
    cdef VMArea *copy
    cdef u64 flags
    cdef bint copied, done
    while vma != NULL:
        if not vma.flags & VM_DONTCOPY:
            flags = vma.flags & ~<u64> (VM_LOCKED | VM_RESERVED | VM_ROBBED)
            copy = vma_new(child, vma.start, vma.end, vma.pgoff, flags, vma.file)
            if copy == NULL:
                return False
            copy.attach = vma.attach
            # what was never written privately can be faulted in again
            copied = vma.anon != NULL and not vma.flags & VM_WIPEONFORK
            done = True
            if copied:
                pthread_mutex_lock(&parent.mem.lock)
                done = anon_fork(copy, vma)
                pthread_mutex_unlock(&parent.mem.lock)
            vma_insert(child, copy)
            if copied and HOOKED(parent):
                bracket(parent, vma.start, vma.end)
            if not done or (copied and not fork_range(parent, child, vma, copy)):
                return False
            if copied and vma.flags & VM_HUGETLB and not fork_huge_range(parent, child, vma, copy):
                return False
            if vma.flags & (VM_PFNMAP | VM_NONLINEAR) and not fork_shared_range(parent, child, vma):
                return False
        vma = vma.next
    return True


cdef MM *mm_fork(MM *parent) noexcept nogil:
    """The child, with no chain; NULL: no memory, and of the parent only pages have become copy-on-write."""
    cdef MM *child = mm_new(parent.mem)
    cdef bint done
    if child == NULL:
        return NULL
    mm_lock(child)                          # what looks through a file's mappings finds it before it is filled
    child.cut = atomic_load(&parent.cut)
    mm_configure(child, parent)
    child.attaches = parent.attaches
    child.brk = parent.brk
    done = fork_vmas(parent, child)
    mm_unlock(child)
    if not done:
        mm_discard(child)
        return NULL
    return child
