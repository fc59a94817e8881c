# Replay: a recorded history drives one address space per process, in one call without the GIL.
from cpython.exc cimport PyErr_CheckSignals
from ioproc.trace.regions cimport Regions, regions_above, regions_add, regions_overlap, regions_remove

cdef packed struct Event:       # the dtype EVENT of trace/format.py
    u64 t
    int pid
    int tid
    unsigned char op
    unsigned char access
    unsigned char origin
    unsigned char error          # errno, 0: success
    u32 prot
    u32 flags
    int file
    u64 addr
    u64 length
    u64 arg
    u64 ret

cdef enum Operation:
    OP_MMAP = 1
    OP_MUNMAP
    OP_MPROTECT
    OP_MREMAP
    OP_BRK
    OP_MADVISE
    OP_MSYNC
    OP_FORK
    OP_VFORK
    OP_EXEC
    OP_EXIT
    OP_SHMAT
    OP_SHMDT
    OP_FAULT
    OP_COMM
    OP_MLOCK
    OP_MUNLOCK
    OP_MAP
    OPERATIONS

# How an event of the history and the model can differ.
cdef enum Difference:
    AGREES
    RESULT                      # another errno or address than recorded
    UNMAPPED                    # a fault where the model has no mapping
    DENIED                      # a fault where the mapping allows no such access
    PRESENT                     # a fault on a page that the model has mapped already
    BEYOND                      # a fault beyond the end of a file
    UNMODELLED                  # an operation the model does not have yet
    SKIPPED                     # a failed call whose failure came from outside the address space
    DIFFERENCES

DIFFERENCE_NAMES = ("agrees", "result", "unmapped", "denied", "present", "beyond", "unmodelled", "skipped")

cdef struct Device:             # the default ops of a replay: count, and tell useful calls from useless ones
    u64 calls[9]
    u64 useful[9]
    Regions regions

cdef struct Planned:       # a row of the plan: after event `event`, this range is registered for communication
    u64 event
    u64 start
    u64 length

cdef struct Space:              # an address space and its device
    MM *mm
    NicContext *context         # on the replay's NIC, or NULL
    int users                   # processes: a vfork child uses its parent's until exec or exit
    ioproc_ops ops
    const ioproc_ops *device    # &ops, or the caller's
    Device counted

cdef struct Process:
    int pid
    Space *space                # NULL before its first event
    Process *next               # same hash bucket

cdef enum:
    SIGNALS_EVERY = 1 << 20     # events
    MLOCK_ONFAULT = 1           # flags of mlock2
    BUCKETS = 1024
    NOTED = 64

cdef struct Replay:
    const Event *events
    u64 n
    u64 at                      # the next event
    const Planned *plan
    u64 planned
    u64 next_planned
    Memory *mem
    FrameBatch batch            # kept over a run of faults: the pool's lock once for many
    FileCache **files
    int nfiles
    const ioproc_ops *device    # the caller's ops, or NULL
    int placement
    bint communicating          # there is a NIC: COMM events are its transfers
    void *face                  # the Python object
    Process *processes[BUCKETS]
    u64 ops[OPERATIONS]
    u64 differences[OPERATIONS][DIFFERENCES]
    u64 noted[NOTED]            # the first events that differ
    u64 nnoted
    u64 guessed                 # faults of unknown access
    u64 registrations
    u64 register_failures
    u64 registered_bytes        # now
    u64 registered_peak
    u64 vmas                    # now, over all processes
    u64 vmas_peak
    u64 created                 # address spaces
    # of address spaces that are gone
    HookCounts hooks
    FaultCounts faults
    u64 useful[9]

cdef enum Placement:
    PLACE_NONE
    PLACE_MM
    PLACE_VMA


cdef void device_range(Device *device, int kind, u64 start, u64 end) noexcept nogil:
    device.calls[kind] += 1
    device.useful[kind] += regions_overlap(&device.regions, start, end)

cdef void device_release(void *arg, ioproc_mm *mm) noexcept nogil:
    (<Device *> arg).calls[<int> RELEASE] += 1

cdef void device_sync_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    device_range(<Device *> arg, SYNC_RANGE, start, end)

cdef void device_invalidate_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    device_range(<Device *> arg, INVALIDATE_RANGE, start, end)

cdef void device_update_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    device_range(<Device *> arg, UPDATE_RANGE, start, end)

cdef void device_change_protection(void *arg, const ioproc_vma *vma, u64 start, u64 end, u32 prot) noexcept nogil:
    device_range(<Device *> arg, CHANGE_PROTECTION, start, end)

cdef void device_sync_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    device_range(<Device *> arg, SYNC_PAGE, addr, addr + PAGE_SIZE)

cdef void device_invalidate_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    device_range(<Device *> arg, INVALIDATE_PAGE, addr, addr + PAGE_SIZE)

cdef void device_update_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    device_range(<Device *> arg, UPDATE_PAGE, addr, addr + PAGE_SIZE)

cdef void device_wrprotect_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    device_range(<Device *> arg, WRPROTECT_PAGE, addr, addr + PAGE_SIZE)


cdef Process *process_find(Replay *replay, int pid) noexcept nogil:
    cdef Process *process = replay.processes[<u32> pid % BUCKETS]
    while process != NULL and process.pid != pid:
        process = process.next
    return process


cdef Process *process_add(Replay *replay, int pid) noexcept nogil:
    """With no address space yet; NULL: no memory."""
    cdef Process *process = <Process *> calloc(1, sizeof(Process))
    cdef Process **bucket = &replay.processes[<u32> pid % BUCKETS]
    if process == NULL:
        return NULL
    process.pid = pid
    process.next = bucket[0]
    bucket[0] = process
    return process


cdef Space *space_new(Replay *replay, MM *mm) noexcept nogil:
    """NULL: no memory."""
    cdef Space *space = <Space *> calloc(1, sizeof(Space))
    if space == NULL:
        return NULL
    space.mm = mm
    space.users = 1
    space.device = replay.device
    if replay.device == NULL:
        space.device = &space.ops
        space.ops.version = IOPROC_ABI_VERSION
        space.ops.size = sizeof(ioproc_ops)
        space.ops.arg = &space.counted
        space.ops.release = device_release
        space.ops.sync_range = device_sync_range
        space.ops.invalidate_range = device_invalidate_range
        space.ops.update_range = device_update_range
        space.ops.change_protection = device_change_protection
        space.ops.sync_page = device_sync_page
        space.ops.invalidate_page = device_invalidate_page
        space.ops.update_page = device_update_page
        space.ops.wrprotect_page = device_wrprotect_page
    return space


cdef bint process_adopt(Replay *replay, Process *process, MM *mm, MM *parent) noexcept nogil:
    """Give the process its address space, forked from `parent` or NULL.  False: no memory."""
    cdef Space *space
    cdef bint owned
    if mm == NULL:
        return False
    space = space_new(replay, mm)
    if space == NULL:
        mm_discard(mm)
        return False
    with gil:
        owned = (<Player> replay.face).own(mm, process.pid, parent, &space.context)
    if not owned:
        free(space)
        return False
    process.space = space
    replay.created += 1
    replay.vmas += mm.map_count
    if replay.vmas > replay.vmas_peak:
        replay.vmas_peak = replay.vmas
    if replay.placement == PLACE_MM:
        if mm_register(mm, space.device):
            return False
        replay.registrations += 1
    return True


cdef void counts_add(u64 *total, const u64 *more, int n) noexcept nogil:
    cdef int i
    for i in range(n):
        total[i] += more[i]


cdef void process_drop_memory(Replay *replay, Process *process) noexcept nogil:
    """exec or exit: the address space goes with its last user."""
    cdef Space *space = process.space
    cdef MM *mm
    process.space = NULL
    if space == NULL:
        return
    space.users -= 1
    if space.users:
        return
    mm = space.mm
    mm_lock(mm)
    thread_set_inside(mm)
    replay.vmas -= mm.map_count
    mm_teardown(mm)
    counts_add(<u64 *> &replay.hooks, <u64 *> &mm.hooks, sizeof(HookCounts) // 8)
    counts_add(<u64 *> &replay.faults, <u64 *> &mm.faults, sizeof(FaultCounts) // 8)
    thread_set_inside(NULL)
    mm_unlock(mm)
    counts_add(replay.useful, space.counted.useful, 9)
    replay.registered_bytes -= space.counted.regions.bytes
    free(space.counted.regions.ranges)
    free(space)
    with gil:
        (<Player> replay.face).disown(mm)


cdef void process_remove(Replay *replay, Process *process) noexcept nogil:
    cdef Process **link = &replay.processes[<u32> process.pid % BUCKETS]
    process_drop_memory(replay, process)
    while link[0] != process:
        link = &link[0].next
    link[0] = process.next
    free(process)


cdef void registered(Replay *replay, u64 bytes) noexcept nogil:
    """So many more, which may be negative."""
    replay.registered_bytes += bytes
    if replay.registered_bytes > replay.registered_peak:
        replay.registered_peak = replay.registered_bytes


cdef void attach(Replay *replay, Space *space, u64 start, u64 end) noexcept nogil:
    if vma_register(space.mm, space.device, start, end - start) == 0:
        replay.registrations += 1
    else:
        replay.register_failures += 1


cdef bint communicates(Replay *replay, Space *space, u64 start, u64 length) noexcept nogil:
    """The range is registered for communication from now on, what of it is not yet.  False: no memory."""
    cdef Regions *regions = &space.counted.regions
    cdef u64 end = start + page_align(length)
    cdef u64 before = regions.bytes
    cdef u64 at = start
    cdef u64 i
    if length == 0 or length > TASK_SIZE or start > TASK_SIZE - page_align(length):
        replay.register_failures += 1
        return True
    while at < end and replay.placement == PLACE_VMA:
        i = regions_above(regions, at)
        if i == regions.n or regions.ranges[i].start >= end:
            attach(replay, space, at, end)
            break
        if at < regions.ranges[i].start:
            attach(replay, space, at, regions.ranges[i].start)
        at = regions.ranges[i].end
    if not regions_add(regions, start, end):
        return False
    registered(replay, regions.bytes - before)
    return True


cdef void forgotten(Replay *replay, Space *space, u64 start, u64 length) noexcept nogil:
    """Unmapped memory communicates no more."""
    cdef Regions *regions = &space.counted.regions
    cdef u64 before = regions.bytes
    if regions.n and length:
        regions_remove(regions, start, start + page_align(length))
        replay.registered_bytes -= before - regions.bytes


cdef void forgotten_holes(Replay *replay, Space *space, u64 at) noexcept nogil:
    """The same for whatever is not mapped from `at` on."""
    cdef VMArea *vma
    while space.counted.regions.n and at < TASK_SIZE:
        vma = vma_first_in(space.mm, at, TASK_SIZE)
        if vma == NULL:
            forgotten(replay, space, at, TASK_SIZE - at)
            return
        if at < vma.start:
            forgotten(replay, space, at, vma.start - at)
        at = vma.end


cdef int replay_fault(Replay *replay, Space *space, const Event *event, bint *out_of_memory) noexcept nogil:
    cdef MM *mm = space.mm
    cdef u64 addr = event.addr & PAGE_MASK
    cdef VMArea *vma = vma_find(mm, addr)
    cdef Table *leaf
    cdef bint write = event.access == 2
    cdef u64 *pte
    cdef int why
    if vma == NULL or (addr < vma.start and not vma_grow(vma, addr)):
        return UNMAPPED
    if event.access == 0:
        replay.guessed += 1
        write = vma.flags & VM_WRITE != 0
    if not vma_allows(vma, write):
        return DENIED
    if vma.flags & VM_HUGETLB:
        pte = huge_entry(mm.huge, addr)
        if pte != NULL and pte_allows(pte[0], write):
            return PRESENT
        return BEYOND if huge_access(mm, addr, write, &pte) else AGREES
    leaf = leaf_find(mm.root, addr)
    if leaf != NULL:
        pte = &leaf.entry[table_index(addr, 0)]
        if pte_allows(pte[0], write):
            return PRESENT
    replay.batch.wanted = BATCH
    why = fault_or_reclaim(mm, vma, addr, &leaf, write, &replay.batch)
    if why == ACCESS_OOM:
        out_of_memory[0] = True
    return BEYOND if why == ACCESS_BUS else AGREES


cdef int replay_map(Replay *replay, Space *space, const Event *event) noexcept nogil:
    cdef FileCache *file = NULL
    cdef u64 flags = event.flags & ~<u32> (MAP_FIXED_NOREPLACE) | MAP_FIXED
    cdef u64 addr = event.addr if event.op == OP_MAP else event.ret
    cdef i64 result
    if event.error:
        return SKIPPED
    if 0 <= event.file < replay.nfiles:
        file = replay.files[event.file]
    elif not flags & MAP_ANONYMOUS:
        flags |= MAP_ANONYMOUS
    if space.mm.mem.nhuge == 0:
        flags &= ~<u64> MAP_HUGETLB         # small pages will do
    result = mm_mmap(space.mm, addr, event.length, event.prot, flags, file, event.arg)
    if result < 0 or <u64> result != addr:
        return RESULT
    forgotten(replay, space, addr, event.length)
    return AGREES


cdef int replay_mremap(Replay *replay, Space *space, const Event *event) noexcept nogil:
    cdef MM *mm = space.mm
    cdef u64 old = page_align(event.length)
    cdef u64 new = page_align(event.arg)
    cdef int flags = event.flags
    cdef u64 before
    cdef bint grown_buffer, moved_buffer
    cdef i64 result
    if event.error:
        result = mm_mremap(mm, event.addr, event.length, event.arg, flags, event.ret)
        return AGREES if result == -<i64> event.error else RESULT
    if event.ret != event.addr:
        flags |= MREMAP_MAYMOVE | MREMAP_FIXED
    elif new > old:
        flags &= ~MREMAP_MAYMOVE
    moved_buffer = regions_overlap(&space.counted.regions, event.addr, event.addr + old)
    grown_buffer = old > 0 and regions_overlap(&space.counted.regions, event.addr + old - PAGE_SIZE, event.addr + old)
    result = mm_mremap(mm, event.addr, event.length, event.arg, flags, event.ret)
    if result < 0 or <u64> result != event.ret:
        return RESULT
    # a buffer moves and grows with its mapping, as the chain of its VMA does
    before = space.counted.regions.bytes
    if event.ret != event.addr:
        regions_remove(&space.counted.regions, event.ret, event.ret + new)
        if moved_buffer:
            regions_move(&space.counted.regions, event.addr, event.ret, old if old < new else new)
        if not flags & MREMAP_DONTUNMAP:
            regions_remove(&space.counted.regions, event.addr, event.addr + old)
    elif new < old:
        regions_remove(&space.counted.regions, event.addr + new, event.addr + old)
    if grown_buffer and new > old:
        regions_add(&space.counted.regions, event.ret + old, event.ret + new)
    registered(replay, space.counted.regions.bytes - before)
    return AGREES


cdef void regions_move(Regions *regions, u64 old, u64 new, u64 length) noexcept nogil:
    """Add at `new` what is registered in [old, old + length), which does not overlap it."""
    cdef u64 at = old
    cdef u64 end = old + length
    cdef u64 i, start, stop
    while at < end:
        i = regions_above(regions, at)
        if i >= regions.n or regions.ranges[i].start >= end:
            return
        start = regions.ranges[i].start if regions.ranges[i].start > old else old
        stop = regions.ranges[i].end if regions.ranges[i].end < end else end
        at = stop
        regions_add(regions, start - old + new, stop - old + new)


cdef int replay_brk(Replay *replay, Space *space, const Event *event) noexcept nogil:
    cdef MM *mm = space.mm
    cdef u64 old = mm.brk
    if event.addr == 0 or mm.start_brk == 0:
        if mm.start_brk == 0:           # execve chose it; the first call tells
            mm.start_brk = event.ret & PAGE_MASK
            mm.brk = event.ret
        return AGREES if mm.brk == event.ret else RESULT
    if event.ret != event.addr and event.ret == old:
        return AGREES                   # refused, for a reason outside the address space
    if mm_brk(mm, event.addr) != event.ret:
        return RESULT
    if event.ret < old:
        forgotten(replay, space, page_align(event.ret), page_align(old) - page_align(event.ret))
    return AGREES


cdef int errno_difference(const Event *event, int result) noexcept nogil:
    if result == -ENOSYS:
        return UNMODELLED
    return AGREES if -result == event.error else RESULT


cdef int replay_in_memory(Replay *replay, Space *space, const Event *event, bint *out_of_memory) noexcept nogil:
    """An event inside one address space, which is locked."""
    cdef MM *mm = space.mm
    cdef int op = event.op
    cdef int result
    if op == OP_FAULT:
        return replay_fault(replay, space, event, out_of_memory)
    if op == OP_MMAP or op == OP_MAP:
        return replay_map(replay, space, event)
    if op == OP_MUNMAP:
        result = mm_munmap(mm, event.addr, event.length)
        if result == 0:
            forgotten(replay, space, event.addr, event.length)
        return errno_difference(event, result)
    if op == OP_MPROTECT:
        return errno_difference(event, mm_mprotect(mm, event.addr, event.length, event.prot))
    if op == OP_MADVISE:
        return errno_difference(event, mm_madvise(mm, event.addr, event.length, <int> event.arg))
    if op == OP_MSYNC:
        return errno_difference(event, mm_msync(mm, event.addr, event.length, <int> event.arg))
    if op == OP_MREMAP:
        return replay_mremap(replay, space, event)
    if op == OP_BRK:
        return replay_brk(replay, space, event)
    if op == OP_SHMAT:
        if event.error or not 0 <= event.file < replay.nfiles:
            return SKIPPED
        return AGREES if mm_shmat(mm, replay.files[event.file], event.ret, event.flags & 0o10000 != 0) == <i64> event.ret \
            else RESULT
    if op == OP_SHMDT:
        result = mm_shmdt(mm, event.addr)
        forgotten_holes(replay, space, event.addr)
        return errno_difference(event, result)
    if op == OP_COMM:
        if replay.placement != PLACE_NONE and event.length and not communicates(
                replay, space, event.addr & PAGE_MASK, event.length + (event.addr & (PAGE_SIZE - 1))):
            out_of_memory[0] = True
        return AGREES
    if op == OP_MLOCK:
        if event.flags & MLOCK_ONFAULT:
            return errno_difference(event, mark_locked(mm, event.addr & PAGE_MASK, page_align(
                event.length + (event.addr & (PAGE_SIZE - 1))), VM_LOCKED))
        return errno_difference(event, mm_mlock(mm, event.addr, event.length))
    if op == OP_MUNLOCK:
        return errno_difference(event, mm_munlock(mm, event.addr, event.length))
    return UNMODELLED


cdef int replay_process(Replay *replay, Process *process, const Event *event, bint *out_of_memory) noexcept nogil:
    """An event that makes, replaces or ends an address space."""
    cdef Process *child
    cdef MM *mm
    if event.op == OP_EXEC:
        if event.error:
            return SKIPPED
        process_drop_memory(replay, process)
        mm = mm_new(replay.mem)
        out_of_memory[0] = not process_adopt(replay, process, mm, NULL)
        return AGREES
    if event.op == OP_EXIT:
        process_remove(replay, process)
        return AGREES
    if event.error:
        return SKIPPED
    child = process_find(replay, <int> event.arg)
    if child == process:
        return RESULT
    if child != NULL:
        process_remove(replay, child)       # the pid was used again
    child = process_add(replay, <int> event.arg)
    if child == NULL:
        out_of_memory[0] = True
        return AGREES
    if event.op == OP_VFORK:
        child.space = process.space
        child.space.users += 1
        return AGREES
    if replay.communicating:
        with gil:
            (<Player> replay.face).forks(process.space.mm)
    mm_lock(process.space.mm)
    thread_set_inside(process.space.mm)
    mm = mm_fork(process.space.mm)
    thread_set_inside(NULL)
    mm_unlock(process.space.mm)
    out_of_memory[0] = not process_adopt(replay, child, mm, process.space.mm)
    return AGREES


cdef void replay_transfer(Replay *replay, Space *space, const Event *event) noexcept nogil:
    """A message of the NIC's; what goes wrong with it is counted there."""
    cdef u64 vmas = space.mm.map_count
    cdef u64 completed
    if space.context == NULL:
        return
    if event.length > TASK_SIZE or event.addr > TASK_SIZE - event.length:
        transfer_done(space.context, 0, NO_MAPPING)
    else:
        context_transfer(space.context, event.addr, event.length, event.access == 2, NULL, &completed)
    replay.vmas += space.mm.map_count - vmas
    if replay.vmas > replay.vmas_peak:
        replay.vmas_peak = replay.vmas


cdef int replay_step(Replay *replay, const Event *event) noexcept nogil:
    """One event: 0, or -ENOMEM."""
    cdef Process *process = process_find(replay, event.pid)
    cdef bint out_of_memory = False
    cdef int difference
    cdef u64 vmas
    cdef MM *mm
    cdef int op = event.op
    if op != OP_FAULT:
        batch_end(&replay.batch)
    if process == NULL:
        process = process_add(replay, event.pid)
        if process == NULL:
            return -ENOMEM
    if process.space == NULL and op != OP_EXEC and op != OP_EXIT:
        mm = mm_new(replay.mem)
        if not process_adopt(replay, process, mm, NULL):
            return -ENOMEM
    if OP_FORK <= op <= OP_EXIT:
        difference = replay_process(replay, process, event, &out_of_memory)
    elif op == OP_COMM and replay.communicating:
        replay_transfer(replay, process.space, event)
        difference = AGREES
    else:
        mm = process.space.mm
        mm_lock(mm)
        thread_set_inside(mm)
        vmas = mm.map_count
        difference = replay_in_memory(replay, process.space, event, &out_of_memory)
        while replay.next_planned < replay.planned and replay.plan[replay.next_planned].event <= replay.at:
            if replay.plan[replay.next_planned].event == replay.at and difference == AGREES:
                if not communicates(replay, process.space, replay.plan[replay.next_planned].start,
                                    replay.plan[replay.next_planned].length):
                    out_of_memory = True
            replay.next_planned += 1
        replay.vmas += mm.map_count - vmas
        if replay.vmas > replay.vmas_peak:
            replay.vmas_peak = replay.vmas
        thread_set_inside(NULL)
        mm_unlock(mm)
    if op < OPERATIONS:
        replay.ops[op] += 1
        replay.differences[op][difference] += 1
    if difference != AGREES and difference != SKIPPED and replay.nnoted < NOTED:
        replay.noted[replay.nnoted] = replay.at
        replay.nnoted += 1
    return -ENOMEM if out_of_memory else 0


cdef int replay_run(Replay *replay) noexcept nogil:
    """To the end, or to what stopped it: -ENOMEM, or a callback that raised (1)."""
    cdef int error
    while replay.at < replay.n:
        error = replay_step(replay, &replay.events[replay.at])
        if error:
            return error
        replay.at += 1
        if replay.at % SIGNALS_EVERY == 0:
            with gil:
                (<Player> replay.face).signals()
        if thread_raised() != NULL:
            return 1
    return 0


cdef class Player:
    """One replay: what its processes and files live in."""
    cdef Replay replay
    cdef PhysicalMemory mem
    cdef list files
    cdef dict spaces            # AddressSpace by the address of its MM
    cdef object ops
    cdef Nic nic
    cdef dict attach
    cdef set communicating      # pids that communicate: they attach as they begin
    cdef list inherited         # by the child of the fork that is going on
    cdef FileCache **caches

    def __cinit__(self, PhysicalMemory mem not None, list sizes, Ops ops, int placement, Nic nic=None, dict attach=None,
                  set communicating=None):
        cdef int i
        self.mem = mem
        self.files = [File(mem, size) for size in sizes]
        self.spaces = {}
        self.ops = ops
        self.nic = nic
        self.attach = attach
        self.communicating = communicating
        self.replay.communicating = nic is not None
        self.replay.mem = mem.mem
        batch_begin(&self.replay.batch, mem.mem, 0)
        self.replay.face = <void *> self
        self.replay.placement = placement
        if ops is not None:
            self.replay.device = &ops.ops
        self.replay.nfiles = len(sizes)
        self.caches = <FileCache **> calloc(len(sizes) + 1, sizeof(FileCache *))
        if self.caches == NULL:
            raise MemoryError("replay")
        for i in range(self.replay.nfiles):
            self.caches[i] = (<File> self.files[i]).file
        self.replay.files = self.caches

    def __dealloc__(self):
        free(self.caches)           # replay_end has taken the processes

    cdef bint own(self, MM *mm, int pid, MM *parent, NicContext **context) noexcept:
        """Give it a face, and its place on the NIC.  False: it is gone."""
        cdef AddressSpace face = None
        cdef Context attached = None
        self.signals()
        try:
            face = AddressSpace.__new__(AddressSpace, self.mem)
            self.spaces[<size_t> mm] = face
            face.replace(mm)
            if self.nic is not None:
                if parent != NULL:
                    inherit_contexts(self.inherited, face)
                    attached = self.nic.find(mm)
                if attached is None and pid in self.communicating:
                    attached = self.nic.attach(face, **self.attach)
                if attached is not None:
                    context[0] = attached.context
        except BaseException as exception:
            callback_raised(exception)
            if face is None or face.mm != mm:
                mm_discard(mm)
            self.spaces.pop(<size_t> mm, None)
            return False
        return True

    cdef void forks(self, MM *parent) noexcept:
        try:
            self.inherited = heirs((<AddressSpace> self.spaces[<size_t> parent]).owners)
        except BaseException as exception:
            self.inherited = []
            callback_raised(exception)

    cdef void disown(self, MM *mm) noexcept:
        self.signals()
        self.spaces.pop(<size_t> mm, None)

    cdef void signals(self) noexcept:
        """Ctrl-C stops the replay.  Asked before Python code runs that would swallow it, as a weak reference's callback does."""
        try:
            PyErr_CheckSignals()
        except BaseException as exception:
            callback_raised(exception)

    def run(self, events, plan):
        """All events; the processes that are left at the end stay as they are, for `finish` to count and end."""
        cdef Py_buffer event_view
        cdef Py_buffer plan_view
        cdef int stopped
        refuse_in_callback()
        PyObject_GetBuffer(events.view(np.uint8), &event_view, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(plan.view(np.uint8), &plan_view, PyBUF_SIMPLE)
            try:
                self.replay.events = <const Event *> event_view.buf
                self.replay.n = event_view.len // sizeof(Event)
                self.replay.plan = <const Planned *> plan_view.buf
                self.replay.planned = plan_view.len // sizeof(Planned)
                with nogil:
                    stopped = replay_run(&self.replay)
                    batch_end(&self.replay.batch)
                    replay_end(&self.replay)
            finally:
                PyBuffer_Release(&plan_view)
        finally:
            PyBuffer_Release(&event_view)
        out_of_memory = MemoryError(f"replay stopped in event {self.replay.at}: out of frames (more: frames=) or of memory")
        try:
            raise_pending()
        except BaseException as exception:
            if stopped < 0 and isinstance(exception, Exception):
                raise out_of_memory from exception
            if isinstance(exception, Exception):        # and not Ctrl-C
                exception.add_note(f"raised by a callback in event {self.replay.at - 1} of the replay" if stopped else
                                   "raised by a callback when the processes left at the end of the history exited")
            raise
        if stopped < 0:
            raise out_of_memory

    def result(self):
        """dict of what was counted."""
        cdef Replay *replay = &self.replay
        cdef int op, kind
        differences = {}
        for op in range(1, <int> OPERATIONS):
            row = {DIFFERENCE_NAMES[kind]: replay.differences[op][kind] for kind in range(<int> DIFFERENCES)
                   if replay.differences[op][kind]}
            if row:
                differences[op] = row
        return {
            "events": replay.at,
            "operations": {op: replay.ops[op] for op in range(1, <int> OPERATIONS) if replay.ops[op]},
            "differences": differences,
            "noted": [replay.noted[i] for i in range(replay.nnoted)],
            "guessed_access": replay.guessed,
            "address_spaces": replay.created,
            "registrations": replay.registrations,
            "register_failures": replay.register_failures,
            "registered_peak": replay.registered_peak,
            "vmas_peak": replay.vmas_peak,
            "hooks": hook_dict(replay.hooks.walks),
            "callbacks": hook_dict(replay.hooks.callbacks),
            "useful": hook_dict(replay.useful),
            "chain_nodes": replay.hooks.cells,
            "faults": {"zero": replay.faults.zero, "anon": replay.faults.anon, "file": replay.faults.file,
                       "reuse": replay.faults.reuse, "cow": replay.faults.cow, "swap": replay.faults.swap},
        }


cdef void replay_end(Replay *replay) noexcept nogil:
    """The processes that outlived the recording exit."""
    cdef int i
    for i in range(BUCKETS):
        while replay.processes[i] != NULL:
            process_remove(replay, replay.processes[i])
