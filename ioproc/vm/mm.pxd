# The data model: what an address space, a VMA, a file and a frame are.  Everything else in vm/ is what happens to them.
#
# Locks: MM.lock covers an address space with its VMAs, page tables and chains.  Memory.lock covers what address spaces
# share: the frame pool, page caches and the reverse map's lists.  Order: Memory.cutting, then MM.lock, then Memory.lock.
from libc.stdint cimport int64_t as i64, uint32_t as u32, uint64_t as u64
from ioproc.hooks.chain cimport Chain, HookCounts, ioproc_ops, unlikely
from ioproc.hooks.interval cimport Intervals, intervals_end
from ioproc.pthread cimport (
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_trylock, pthread_mutex_unlock, pthread_self, sched_yield)

cdef enum:
    PAGE_SHIFT = 12
    PAGE_SIZE = 4096

# x86-64, 47-bit user addresses.
cdef extern from * nogil:
    """
    #include <stddef.h>
    #define IOPROC_TASK_SIZE 0x7ffffffff000ULL
    #define IOPROC_MMAP_BASE 0x7ffff7fff000ULL
    #define IOPROC_MMAP_MIN 0x10000ULL
    #define IOPROC_PAGE_MASK (~0xfffULL)
    """
    const u64 TASK_SIZE "IOPROC_TASK_SIZE"
    const u64 MMAP_BASE "IOPROC_MMAP_BASE"          # addresses are given out below it, highest first
    const u64 MMAP_MIN "IOPROC_MMAP_MIN"
    const u64 PAGE_MASK "IOPROC_PAGE_MASK"

# VMA flags.  The low three bits are the protection (PROT_*); MAY* say what mprotect may give.
cdef enum:
    VM_READ = 0x1
    VM_WRITE = 0x2
    VM_EXEC = 0x4
    VM_SHARED = 0x8
    VM_MAYREAD = 0x10
    VM_MAYWRITE = 0x20
    VM_MAYEXEC = 0x40
    VM_ACCESS = 0x7
    VM_MAYACCESS = 0x70
    VM_GROWSDOWN = 0x100
    VM_PFNMAP = 0x400           # device memory: entries that no frame stands behind
    VM_LOCKED = 0x2000
    VM_IO = 0x4000
    VM_SEQ_READ = 0x8000
    VM_RAND_READ = 0x10000
    VM_DONTCOPY = 0x20000
    VM_DONTEXPAND = 0x40000
    VM_ACCOUNT = 0x100000
    VM_NORESERVE = 0x200000
    VM_SYSV_SHM = 0x400000      # an attached shared-memory segment: what shmdt looks for
    VM_RESERVED = 0x80000       # hugetlb, private: its pages are reserved (see huge.pxd)
    VM_ROBBED = 0x8000000       # hugetlb: the owner of a reservation has taken a page away here
    VM_HUGETLB = 0x1000000
    VM_NONLINEAR = 0x800000     # 2.6.12's remap_file_pages: pages in any order
    VM_WIPEONFORK = 0x2000000
    VM_DONTDUMP = 0x4000000
    VM_HUGEPAGE = 0x20000000
    VM_NOHUGEPAGE = 0x40000000
    VM_SPECIAL = VM_PFNMAP | VM_IO | VM_DONTEXPAND      # never merges

# Page-table entries: the x86 bits, and the software's.
cdef enum:
    PTE_PRESENT = 0x1
    PTE_WRITE = 0x2
    PTE_USER = 0x4              # clear: PROT_NONE
    PTE_YOUNG = 0x20
    PTE_DIRTY = 0x40
    PTE_SPECIAL = 0x100         # no frame of ours: device memory; not present: the page offset that VM_NONLINEAR has here
    PTE_ZERO = 0x200            # the shared zero page: not counted, no reverse map
    PTE_EXCLUSIVE = 0x400       # an anonymous page no other address space can map
    PTE_SWAP = 0x800            # not present: the page is in the swap slot where else its frame's number is
    PTE_UNCOUNTED = PTE_ZERO | PTE_SPECIAL | PTE_SWAP       # rss and the counts of frames know nothing of it

# Frame.owner, beside the pointer.
cdef enum:
    OWNER_ANON = 1              # an AnonVMA, else a FileCache
    OWNER_DIRTY = 2             # the page has to be kept even if no entry is dirty
    OWNER_BITS = 3

cdef struct Frame:              # 32 bytes
    u64 counts                  # low half: page-table entries that map it; high half: other references (page cache, pins)
    u64 owner                   # reverse map: AnonVMA * with OWNER_ANON, or FileCache *; 0: nobody maps it
    u64 index                   # page offset in the owner
    char *contents              # PAGE_SIZE bytes, or NULL: zeros

cdef struct Slot:               # a page of swap
    char *contents              # PAGE_SIZE bytes, or NULL: zeros
    u32 count                   # page-table entries that refer to it, or 1: a page cache
    u32 pfn                     # the swap cache: the frame that has the same contents, 0: none

cdef struct ReclaimCounts:
    u64 scanned                 # frames looked at
    u64 reclaimed               # frames freed
    u64 swapped_out             # pages
    u64 swapped_in
    u64 written_back            # dirty pages of files
    u64 discarded               # clean pages of files, pages that MADV_FREE gave up

cdef struct Victims:            # for tests: what reclaim took (see _core.victims)
    u64 *rows                   # pairs: what, where
    u64 n
    u64 room
    bint failed                 # no memory for a row

cdef enum:
    POOLS = 16
    POOL_FRAMES = 1 << 15

cdef struct Pool:               # free frames of the threads that come here: warm in their caches, out of others' way
    pthread_mutex_t lock
    u64 n
    u32 pfn[POOL_FRAMES]        # a stack

cdef struct Memory:
    Frame *frames               # frames[0] is the zero page
    u64 nframes                 # usable ones: 1 .. nframes
    Slot *slots                 # slots[0] is not used
    u32 *slot_of                # by pfn: the slot of a frame in the swap cache
    u32 *free_slots             # those that were used, a stack
    u64 nslots
    u64 devices                 # ever attached: they may hold any frame for a moment, without a lock
    Pool *pools[POOLS]          # made when the first of its threads comes
    # so far what never changes: what does is not on its cache line
    pthread_mutex_t pool_lock   # for what no pool has: the next three
    u64 fresh                   # the lowest never used
    u32 *returned               # free ones that were used, a stack; touched only as frames come back
    u64 nreturned
    u64 hand                    # of reclaim's clock: the next frame it looks at
    u64 fresh_slot              # the lowest never used
    u64 nfree_slots             # in free_slots
    u64 swap_used
    ReclaimCounts reclaim
    Victims *victims            # NULL: nobody asks
    Frame *huge                 # huge pages: contents are 2 MiB
    u64 nhuge
    u64 huge_pfn                # the frame number of the first; the others' follow
    u64 huge_free
    u64 huge_reserved           # of those free
    u32 *huge_stack             # the free ones
    Table *device               # what was written to device memory: pfn -> PAGE_SIZE bytes; NULL: nothing
    u64 cuts                    # truncations and holes so far
    pthread_mutex_t cutting     # one of them at a time
    pthread_mutex_t lock

cdef struct Table:              # one node of a page table: an entry is a PTE or a Table *
    u64 entry[512]
    u64 used                    # nonzero entries

cdef struct AnonLink:           # a VMA may map anonymous pages of an AnonVMA (anon_vma_chain)
    VMArea *vma
    AnonVMA *anon
    AnonLink *next              # of the VMA: its own AnonVMA first, the oldest ancestor's last
    AnonLink *above             # of the AnonVMA
    AnonLink *below

cdef struct AnonVMA:            # anon_vma: the anonymous pages of a VMA and of what was split from it
    AnonLink *links
    AnonVMA *parent             # of the VMA it was forked from; its own at the root
    u64 nlinks
    u64 children                # the root counts itself
    u64 active                  # VMAs that allocate their pages here

cdef struct FileCache:          # a file's page cache and its mappings
    Table *pages                # page offset -> pfn
    u64 size                    # bytes
    u64 refs                    # Python objects and VMAs
    bint anonymous              # made by MAP_SHARED | MAP_ANONYMOUS
    bint huge                   # of huge pages: `pages` is indexed like MM.huge
    bint memfd                  # shared memory with a file descriptor: no disk below
    VMArea *mappings
    Memory *mem

cdef struct VMArea:
    u64 start                   # to `mm`: ioproc_vma of the C interface
    u64 end
    u64 pgoff
    u64 flags
    MM *mm
    FileCache *file
    Chain *chain
    AnonVMA *anon
    AnonLink *anon_links
    VMArea *file_above             # the file's list of mappings
    VMArea *file_below
    VMArea *prev                   # address order
    VMArea *next
    u64 attach                  # which shmat() it comes from; 0: none

cdef enum:
    NODE_ENTRIES = 31

cdef struct Entry:
    u64 end                     # of the last VMA in it; UINT64_MAX: not used
    void *child                 # a VMArea *, above the leaves a Node *

cdef struct Node:               # of the tree over the VMAs
    Entry entry[32]             # in address order; the last is never used
    u64 gap[32]                 # the largest gap below a VMA of the entry
    u64 n                       # entries

cdef struct FaultCounts:
    u64 zero                    # zero page mapped
    u64 anon                    # new anonymous page
    u64 file                    # page-cache page mapped, or copied early
    u64 reuse                   # write-protect fault, page kept
    u64 cow                     # write-protect fault, page copied
    u64 swap                    # swapped page mapped again, or copied

cdef struct Attached:           # an ops structure that was registered here: for the order of release
    const ioproc_ops *ops
    u64 cells                   # live ones that point at it; 0: no longer attached
    bint unreleased             # teardown
    Attached *next              # newest first

cdef struct Precopy:            # who wants fork to copy a page at once, so that the parent keeps it and may write to it
    bint (*wants)(void *arg, u64 start, u64 end) noexcept nogil
    void *arg
    u64 pages                   # copied because of it, of 4 KiB
    Precopy *next

cdef struct MM:
    pthread_mutex_t lock
    u64 hooked                  # live chain cells, on it or on a VMA, and devices that listen otherwise.  All a hook site tests
    Table *root                 # page table
    VMArea *replaced            # by the mapping call that is going on, and its to free; NULL between calls
    Table *huge                 # that of huge pages (see huge.pxd); NULL: never needed
    Memory *mem
    Node *tree                  # the root
    u64 height                  # nodes from the root to a leaf
    Node *spare                 # empty ones, linked by their first child, so that no insertion can fail
    u64 nspare
    u64 made                    # VMAs, in the tree or not (yet)
    VMArea *first
    VMArea *last
    VMArea *cached                 # the last one found
    u64 map_count
    u64 total_pages             # mapped, present or not
    u64 data_pages              # private writable
    u64 locked_pages            # VM_LOCKED
    u64 rss                     # page-table entries that map a counted frame
    u64 swapped                 # swap entries
    u64 start_brk
    u64 brk
    u64 max_map_count
    u64 attaches                # shmat() calls so far, here or before the fork
    u64 limit_as                # bytes
    u64 limit_data
    u64 limit_memlock
    u64 limit_stack
    Chain *chain
    Chain *cells                # live cells, to intern
    Attached *attached
    HookCounts hooks
    FaultCounts faults
    u64 owner                   # the thread that holds the lock, 0: nobody
    bint nonlinear              # remap_file_pages as in 2.6.12
    u64 refs                    # Python objects, and who found it by what it maps
    u64 cut                     # the last of Memory.cuts that was here
    bint dead                   # exited
    u64 users                   # processes: more than one after vfork
    u64 teardown_batch          # pages taken away before the lock is let go of for a moment; 0: never
    bint paused                 # let go of: others wait, but for a driver that only looks
    Intervals *intervals        # interval notifiers; NULL: never one
    u64 brackets                # range_starts of the operation that is going on
    bint no_brackets            # for tests: each ends at once
    Precopy *precopy
    void *face                  # the Python object of the first, borrowed; under the GIL

cdef extern from * nogil:
    """
    static inline uint64_t ioproc_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void ioproc_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline uint64_t ioproc_add(uint64_t *p, uint64_t v) { return __atomic_add_fetch(p, v, __ATOMIC_ACQ_REL); }
    static inline uint64_t ioproc_sub(uint64_t *p, uint64_t v) { return __atomic_sub_fetch(p, v, __ATOMIC_ACQ_REL); }
    static inline void ioproc_or(uint64_t *p, uint64_t v) { __atomic_or_fetch(p, v, __ATOMIC_ACQ_REL); }
    #ifdef IOPROC_DEBUG
    #include <assert.h>
    #define IOPROC_CHECK(x) assert(x)
    #else
    #define IOPROC_CHECK(x) ((void)0)
    #endif
    #ifdef IOPROC_NO_HOOKS
    #define IOPROC_HOOKED(mm) 0
    #else
    #define IOPROC_HOOKED(mm) __builtin_expect((mm)->hooked != 0, 0)
    #endif
    """
    u64 atomic_load "ioproc_load"(const u64 *p)
    void atomic_store "ioproc_store"(u64 *p, u64 v)
    u64 atomic_add "ioproc_add"(u64 *p, u64 v)       # both return the new value
    u64 atomic_sub "ioproc_sub"(u64 *p, u64 v)
    void atomic_or "ioproc_or"(u64 *p, u64 v)
    void check "IOPROC_CHECK"(bint)                  # debug builds only
    bint HOOKED "IOPROC_HOOKED"(MM *mm)


cdef inline void mm_lock_to_look(MM *mm) noexcept nogil:
    """In the middle of an operation, perhaps, that let go of the lock for a moment."""
    pthread_mutex_lock(&mm.lock)
    atomic_store(&mm.owner, <u64> pthread_self())


cdef inline void mm_unlock_looked(MM *mm) noexcept nogil:
    atomic_store(&mm.owner, 0)
    pthread_mutex_unlock(&mm.lock)


cdef inline void mm_lock(MM *mm) noexcept nogil:
    mm_lock_to_look(mm)
    while unlikely(mm.paused):
        mm_unlock_looked(mm)
        sched_yield()
        mm_lock_to_look(mm)


cdef inline bint mm_trylock(MM *mm) noexcept nogil:
    if pthread_mutex_trylock(&mm.lock) != 0:
        return False
    if unlikely(mm.paused):
        pthread_mutex_unlock(&mm.lock)
        return False
    atomic_store(&mm.owner, <u64> pthread_self())
    return True


cdef inline void mm_unlock(MM *mm) noexcept nogil:
    """The end of an operation, which closes the brackets that it opened (range_end)."""
    cdef u64 brackets = mm.brackets
    mm.brackets = 0
    if unlikely(brackets != 0):
        intervals_end(mm.intervals, brackets)
    mm_unlock_looked(mm)


cdef inline bint mm_is_mine(const MM *mm) noexcept nogil:
    """This thread holds the lock: nobody else could have written its name there."""
    return atomic_load(&mm.owner) == <u64> pthread_self()


cdef inline void mm_hold(MM *mm) noexcept nogil:
    """For who found it under Memory.lock by a VMA it still had then; `mm_put` ends that."""
    atomic_add(&mm.refs, 1)


cdef inline u64 page_align(u64 length) noexcept nogil:
    return (length + PAGE_SIZE - 1) & PAGE_MASK


cdef inline u64 vma_index(const VMArea *vma, u64 addr) noexcept nogil:
    """Page offset of `addr` in the VMA's file or anonymous memory."""
    return vma.pgoff + ((addr - vma.start) >> PAGE_SHIFT)
