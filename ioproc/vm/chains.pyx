# Chains of an address space and of its VMAs: interned cells, attaching and detaching.


cdef Chain *cell_get(MM *mm, const ioproc_ops *ops, Chain *next) noexcept nogil:
    """The cell (ops, next), with one reference for the caller; NULL: no memory."""
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
    if next != NULL:
        next.refs += 1
    cell.interned = mm.cells
    mm.cells = cell
    mm.hooked += 1
    return cell


cdef Chain *cell_hold(Chain *cell) noexcept nogil:
    if cell != NULL:
        cell.refs += 1
    return cell


cdef void cell_put(MM *mm, Chain *cell) noexcept nogil:
    cdef Chain *next
    cdef Chain **link
    while cell != NULL:
        cell.refs -= 1
        if cell.refs:
            return
        link = &mm.cells
        while link[0] != cell:
            link = &link[0].interned
        link[0] = cell.interned
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
    result[0] = cell_get(mm, chain.ops, rest)
    cell_put(mm, rest)
    return 0 if result[0] != NULL else -ENOMEM


cdef bint ops_is_attached(const MM *mm, const ioproc_ops *ops) noexcept nogil:
    """Every chain's cells are on the list of live ones."""
    cdef const Chain *cell = mm.cells
    while cell != NULL:
        if cell.ops == ops:
            return True
        cell = cell.interned
    return False


cdef bint attached_add(MM *mm, const ioproc_ops *ops) noexcept nogil:
    """False: no memory."""
    cdef Attached *record = mm.attached
    while record != NULL:
        if record.ops == ops:
            return True
        record = record.next
    record = <Attached *> malloc(sizeof(Attached))
    if record == NULL:
        return False
    record.ops = ops
    record.next = mm.attached
    mm.attached = record
    return True


cdef void attached_prune(MM *mm) noexcept nogil:
    """Forget those that no chain points at any more."""
    cdef Attached **link = &mm.attached
    cdef Attached *gone
    while link[0] != NULL:
        if ops_is_attached(mm, link[0].ops):
            link = &link[0].next
        else:
            gone = link[0]
            link[0] = gone.next
            free(gone)


cdef int mm_register(MM *mm, const ioproc_ops *ops) noexcept nogil:
    """At the head of the address space's chain."""
    cdef Chain *cell
    if chain_has(mm.chain, ops):
        return -EEXIST
    attached_prune(mm)
    if not attached_add(mm, ops):
        return -ENOMEM
    cell = cell_get(mm, ops, mm.chain)
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
    attached_prune(mm)
    if not attached_add(mm, ops):
        return -ENOMEM
    at = addr
    while at < end:
        vma = vma_at(mm, at)
        if vma == NULL:
            return -ENOMEM
        cell = cell_get(mm, ops, vma.chain)
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


cdef void chains_release_ops(MM *mm, const ioproc_ops *ops) noexcept nogil:
    """Teardown: unlink `ops` wherever it is attached, then tell it.  The VMAs will not be used again."""
    cdef VMArea *vma = mm.first
    cdef Chain *rest
    if chain_has(mm.chain, ops) and chain_without(mm, mm.chain, ops, &rest) == 0:
        cell_put(mm, mm.chain)
        mm.chain = rest
    while vma != NULL:
        if chain_has(vma.chain, ops) and chain_without(mm, vma.chain, ops, &rest) == 0:
            cell_put(mm, vma.chain)
            vma.chain = rest
        vma = vma.next
    mm.hooks.walks[<int> RELEASE] += 1
    mm.hooks.cells += 1
    if ops.release != NULL:
        mm.hooks.callbacks[<int> RELEASE] += 1
        ops.release(ops.arg, <ioproc_mm *> mm)


cdef void chains_release(MM *mm) noexcept nogil:
    """Each ops once: the address space's chain from its head, then those on VMAs only, newest registration first."""
    cdef Attached *attached
    while mm.chain != NULL:
        chains_release_ops(mm, mm.chain.ops)
    attached = mm.attached
    while attached != NULL:
        if ops_is_attached(mm, attached.ops):
            chains_release_ops(mm, attached.ops)
        attached = attached.next
    attached_prune(mm)
