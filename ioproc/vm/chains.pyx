# Chains of an address space and of its VMAs: interned cells, attaching and detaching.


cdef Chain *cell_get(MM *mm, const ioproc_ops *ops, u64 *attached, Chain *next) noexcept nogil:
    """The cell (ops, next), with one reference for the caller; NULL: no memory.  `attached`: the count of the ops's cells."""
    cdef Chain *cell = mm.cells
    while cell != NULL:
        if cell.ops == ops and cell.next == next:
            cell.refs += 1
            return cell
        cell = cell.interned
    cell = <Chain *> calloc(1, sizeof(Chain))
    if cell == NULL:
        return NULL
    cell.ops = ops
    cell.next = next
    cell.refs = 1
    cell.attached = attached
    attached[0] += 1
    if next != NULL:
        next.refs += 1
    cell.interned = mm.cells
    if mm.cells != NULL:
        mm.cells.interned_before = cell
    mm.cells = cell
    mm.hooked += 1
    return cell


cdef Chain *cell_hold(Chain *cell) noexcept nogil:
    if cell != NULL:
        cell.refs += 1
    return cell


cdef void cell_put(MM *mm, Chain *cell) noexcept nogil:
    cdef Chain *next
    while cell != NULL:
        cell.refs -= 1
        if cell.refs:
            return
        if cell.interned_before != NULL:
            cell.interned_before.interned = cell.interned
        else:
            mm.cells = cell.interned
        if cell.interned != NULL:
            cell.interned.interned_before = cell.interned_before
        cell.attached[0] -= 1
        mm.hooked -= 1
        next = cell.next
        free(cell)
        cell = next


cdef int chain_without(MM *mm, Chain *chain, const ioproc_ops *ops, Chain **result) noexcept nogil:
    """*result: `chain`, which has `ops`, less it, with a reference for the caller.  0 or -ENOMEM."""
    cdef Chain *rest
    cdef int error
    if chain.ops == ops:
        result[0] = cell_hold(chain.next)
        return 0
    error = chain_without(mm, chain.next, ops, &rest)
    if error:
        return error
    result[0] = cell_get(mm, chain.ops, chain.attached, rest)
    cell_put(mm, rest)
    return 0 if result[0] != NULL else -ENOMEM


cdef Attached *attached_find(const MM *mm, const ioproc_ops *ops) noexcept nogil:
    """The record of an ops that some chain has, or NULL."""
    cdef Attached *record = mm.attached
    while record != NULL and (record.ops != ops or record.cells == 0):
        record = record.next
    return record


cdef Attached *attached_take_gone(MM *mm) noexcept nogil:
    """The records of ops that no chain has any more, for the caller to free."""
    cdef Attached **link = &mm.attached
    cdef Attached *gone = NULL
    cdef Attached *record
    while link[0] != NULL:
        record = link[0]
        if record.cells:
            link = &record.next
        else:
            link[0] = record.next
            record.next = gone
            gone = record
    return gone


cdef void attached_free(Attached *record) noexcept nogil:
    cdef Attached *next
    while record != NULL:
        next = record.next
        free(record)
        record = next


cdef Attached *attached_make(MM *mm, const ioproc_ops *ops) noexcept nogil:
    """The one record of an ops about to be registered: the newest, unless it is attached already.  NULL: no memory."""
    cdef Attached **link = &mm.attached
    cdef Attached *record
    while link[0] != NULL and link[0].ops != ops:
        link = &link[0].next
    record = link[0]
    if record == NULL:
        record = <Attached *> calloc(1, sizeof(Attached))
        if record == NULL:
            return NULL
        record.ops = ops
    elif record.cells:
        return record
    else:
        link[0] = record.next
    record.next = mm.attached
    mm.attached = record
    return record


cdef int mm_register(MM *mm, const ioproc_ops *ops) noexcept nogil:
    """At the head of the address space's chain."""
    cdef Chain *cell
    cdef Attached *record
    if chain_has(mm.chain, ops):
        return -EEXIST
    record = attached_make(mm, ops)
    if record == NULL:
        return -ENOMEM
    cell = cell_get(mm, ops, &record.cells, mm.chain)
    if cell == NULL:
        return -ENOMEM
    cell_put(mm, mm.chain)              # the cell holds it now
    mm.chain = cell
    return 0


cdef int mm_unregister(MM *mm, const ioproc_ops *ops) noexcept nogil:
    cdef Chain *rest
    cdef int error
    if not chain_has(mm.chain, ops):
        return -EINVAL
    error = chain_without(mm, mm.chain, ops, &rest)
    if error == 0:
        cell_put(mm, mm.chain)
        mm.chain = rest
    return error


cdef int range_check(u64 addr, u64 length, u64 *end) noexcept nogil:
    """What a range of VMAs to (un)register must be: aligned, not empty, in user space."""
    if addr & (PAGE_SIZE - 1) or length == 0 or addr > TASK_SIZE or length > TASK_SIZE - addr:
        return -EINVAL
    end[0] = addr + page_align(length)
    return 0


cdef int vma_register(MM *mm, const ioproc_ops *ops, u64 addr, u64 length) noexcept nogil:
    """On the VMAs of the range, split at its edges; at a hole: those before it, then -ENOMEM (as mbind)."""
    cdef u64 end
    cdef u64 at
    cdef VMArea *vma
    cdef Chain *cell
    cdef Attached *record
    cdef int error = range_check(addr, length, &end)
    if error:
        return error
    at = addr
    while at < end:
        vma = vma_at(mm, at)
        if vma == NULL:
            break
        if chain_has(vma.chain, ops):
            return -EEXIST
        at = vma.end
    record = attached_make(mm, ops)
    if record == NULL:
        return -ENOMEM
    at = addr
    while at < end:
        vma = vma_at(mm, at)
        if vma == NULL:
            return -ENOMEM
        cell = cell_get(mm, ops, &record.cells, vma.chain)
        if cell == NULL:
            return -ENOMEM
        addr = at
        at = vma.end if vma.end < end else end
        error = vma_modify(mm, &vma, addr, at, vma.flags, cell)
        cell_put(mm, cell)
        if error:
            return error
    return 0


cdef int vma_unregister(MM *mm, const ioproc_ops *ops, u64 addr, u64 length) noexcept nogil:
    """From the VMAs of the range that have it, split at its edges and perhaps merged; none: -EINVAL."""
    cdef u64 end
    cdef u64 start, stop
    cdef VMArea *vma
    cdef Chain *rest
    cdef bint found = False
    cdef int error = range_check(addr, length, &end)
    if error:
        return error
    while addr < end:
        vma = vma_first_in(mm, addr, end)
        if vma == NULL:
            break
        start = vma.start if vma.start > addr else addr
        stop = vma.end if vma.end < end else end
        addr = stop
        if chain_has(vma.chain, ops):
            found = True
            error = chain_without(mm, vma.chain, ops, &rest)
            if error:
                return error
            error = vma_modify(mm, &vma, start, stop, vma.flags, rest)
            cell_put(mm, rest)
            if error:
                return error
    return 0 if found else -EINVAL


cdef void chains_cut(MM *mm, const ioproc_ops *ops) noexcept nogil:
    """
    From every chain, in place: where there is no memory to make them anew.  Equal chains may be two afterwards, which keeps
    VMAs apart.
    """
    cdef Chain *cell = mm.cells
    cdef VMArea *vma = mm.first
    chain_cut(mm, &mm.chain, ops)
    while vma != NULL:
        chain_cut(mm, &vma.chain, ops)
        vma = vma.next
    while cell != NULL:
        chain_cut(mm, &cell.next, ops)
        cell = cell.interned


cdef void chain_cut(MM *mm, Chain **link, const ioproc_ops *ops) noexcept nogil:
    cdef Chain *cell = link[0]
    if cell != NULL and cell.ops == ops:
        link[0] = cell_hold(cell.next)
        cell_put(mm, cell)


cdef void release_ops(MM *mm, const ioproc_ops *ops) noexcept nogil:
    mm.hooks.walks[<int> RELEASE] += 1
    mm.hooks.cells += 1
    if ops.release != NULL:
        mm.hooks.callbacks[<int> RELEASE] += 1
        ops.release(ops.arg, <ioproc_mm *> mm)


cdef void chains_release(MM *mm) noexcept nogil:
    """
    Teardown: each ops once, unlinked before it is told: the address space's chain from its head, then those on VMAs only,
    newest registration first.
    """
    cdef Attached *record = mm.attached
    cdef VMArea *vma = mm.first
    cdef Chain *cell
    while record != NULL:
        record.unreleased = record.cells != 0
        record = record.next
    while vma != NULL:
        cell_put(mm, vma.chain)
        vma.chain = NULL
        vma = vma.next
    while mm.chain != NULL:
        cell = mm.chain
        mm.chain = cell_hold(cell.next)
        record = attached_find(mm, cell.ops)
        cell_put(mm, cell)
        record.unreleased = False
        release_ops(mm, record.ops)
    record = mm.attached
    while record != NULL:
        if record.unreleased:
            release_ops(mm, record.ops)
        record = record.next
    attached_free(mm.attached)
    mm.attached = NULL
