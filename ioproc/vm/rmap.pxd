# The reverse map: from a frame to the VMAs that may map it, by object and not by page, so that fork pays per VMA.
#
# An anonymous frame belongs to an AnonVMA, which lists the VMAs (of any address space) that may map its pages; a fork gives
# the child's VMA an AnonVMA of its own below the parent's, so that its new pages are searched for in fewer VMAs.  The
# shape also decides which VMAs may merge (see merge.pyx).  A file's frame belongs to its FileCache.
#
# The lists cross address spaces: Memory.lock is held for every function here.
from libc.stdint cimport uint64_t as u64
from libc.stdlib cimport calloc, free
from ioproc.vm.mm cimport AnonLink, AnonVMA, FileCache, VMArea


cdef inline bint anon_is_singular(const VMArea *vma) noexcept nogil:
    """The VMA's pages can only be its own AnonVMA's: nothing inherited by fork."""
    return vma.anon_links != NULL and vma.anon_links.next == NULL


cdef inline void anon_link(VMArea *vma, AnonVMA *anon, AnonLink *link) noexcept nogil:
    """At the end of nothing but the AnonVMA's list; the caller places it in the VMA's."""
    link.vma = vma
    link.anon = anon
    link.next = NULL
    link.below = NULL
    link.above = anon.links
    if anon.links != NULL:
        anon.links.below = link
    anon.links = link
    anon.nlinks += 1


cdef inline void anon_unlink(VMArea *vma) noexcept nogil:
    """Newest first, so that a parent outlives what was forked from it."""
    cdef AnonLink *link = vma.anon_links
    cdef AnonLink *next
    cdef AnonVMA *anon
    if vma.anon != NULL:
        vma.anon.active -= 1
    while link != NULL:
        next = link.next
        anon = link.anon
        if link.below != NULL:
            link.below.above = link.above
        else:
            anon.links = link.above
        if link.above != NULL:
            link.above.below = link.below
        anon.nlinks -= 1
        if anon.nlinks == 0:
            anon.parent.children -= 1
            free(anon)
        free(link)
        link = next
    vma.anon_links = NULL
    vma.anon = NULL


cdef inline bint anon_clone(VMArea *to, const VMArea *source, bint reuse) noexcept nogil:
    """
    Link `to` with every AnonVMA of `source`.  With `reuse` (fork) it may adopt one as its own: an ancestor's
    that no VMA allocates in and that was forked from at most once, so that a line of only children does not grow.
    False: no memory, `to` is unlinked.
    """
    cdef const AnonLink *old = source.anon_links
    cdef AnonLink *link
    cdef AnonLink **tail = &to.anon_links
    cdef AnonVMA *adopted = NULL
    to.anon_links = NULL
    while old != NULL:
        link = <AnonLink *> calloc(1, sizeof(AnonLink))
        if link == NULL:
            to.anon = NULL
            anon_unlink(to)
            return False
        anon_link(to, old.anon, link)
        tail[0] = link
        tail = &link.next
        if reuse and old.anon.children < 2 and old.anon.active == 0:
            adopted = old.anon                          # the last such one is the oldest: what wins
        old = old.next
    if reuse:
        to.anon = adopted
    if to.anon != NULL:
        to.anon.active += 1
    return True


cdef inline AnonVMA *anon_new(VMArea *vma, AnonVMA *parent) noexcept nogil:
    """An AnonVMA of the VMA's own, in front of its links; NULL: no memory."""
    cdef AnonVMA *anon = <AnonVMA *> calloc(1, sizeof(AnonVMA))
    cdef AnonLink *link = <AnonLink *> calloc(1, sizeof(AnonLink))
    if anon == NULL or link == NULL:
        free(anon)
        free(link)
        return NULL
    anon_link(vma, anon, link)
    link.next = vma.anon_links
    vma.anon_links = link
    anon.parent = parent if parent != NULL else anon
    anon.parent.children += 1
    anon.active = 1
    vma.anon = anon
    return anon


cdef inline AnonVMA *anon_root(AnonVMA *anon) noexcept nogil:
    while anon.parent != anon:
        anon = anon.parent
    return anon


cdef inline bint anon_fork(VMArea *child, const VMArea *parent) noexcept nogil:
    """False: no memory, the child's VMA is unlinked."""
    child.anon = NULL
    child.anon_links = NULL
    if parent.anon == NULL:
        return True
    if not anon_clone(child, parent, True):
        return False
    if child.anon != NULL:
        return True
    if anon_new(child, parent.anon) == NULL:
        anon_unlink(child)
        return False
    return True


cdef inline bint anon_join(VMArea *vma, const VMArea *near) noexcept nogil:
    """Share a neighbour's AnonVMA.  False: no memory."""
    cdef AnonLink *link = <AnonLink *> calloc(1, sizeof(AnonLink))
    if link == NULL:
        return False
    anon_link(vma, near.anon, link)
    vma.anon_links = link
    vma.anon = near.anon
    vma.anon.active += 1
    return True


cdef inline void file_link(VMArea *vma) noexcept nogil:
    cdef FileCache *file = vma.file
    file.refs += 1
    vma.file_below = NULL
    vma.file_above = file.mappings
    if file.mappings != NULL:
        file.mappings.file_below = vma
    file.mappings = vma


cdef inline void file_unlink(VMArea *vma) noexcept nogil:
    """Out of the list; the reference is dropped by the caller."""
    if vma.file_below != NULL:
        vma.file_below.file_above = vma.file_above
    else:
        vma.file.mappings = vma.file_above
    if vma.file_above != NULL:
        vma.file_above.file_below = vma.file_below
