"""Programs that random ones meet seldom, or that once showed a difference.  They are compared like any other."""

from kernel.programs import (
    ANONYMOUS,
    BASE,
    BRK,
    DONTNEED,
    FREE,
    MAP_FIXED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    POPULATE,
    PRIVATE,
    SHARED,
    Program,
    R,
    W,
)

MOVE = MREMAP_MAYMOVE | MREMAP_FIXED


def at(page):
    return BASE + page * PAGE


def anonymous(page, pages, prot=R | W, kind=PRIVATE, flags=MAP_FIXED, process=0):
    return "mmap", process, at(page), pages * PAGE, prot, kind | ANONYMOUS | flags, -1, 0


def of_file(page, pages, offset=0, kind=PRIVATE, process=0):
    return "mmap", process, at(page), pages * PAGE, R | W, kind | MAP_FIXED, 0, offset * PAGE


def protect(page, pages, prot, process=0):
    return "mprotect", process, at(page), pages * PAGE, prot


def move(page, old, new, target, process=0):
    return "mremap", process, at(page), old * PAGE, new * PAGE, MOVE, at(target)


def write(page, process=0):
    return "write", process, at(page), 7


def read(page, process=0):
    return "read", process, at(page)


CASES = {
    "two VMAs of a forked process never become one again": Program((
        anonymous(0, 4), write(0), ("fork", 0), write(1, 1), protect(2, 2, R, 1), ("fork", 1), ("exit", 1), ("fork", 2),
        protect(2, 2, R | W, 3), protect(2, 2, R, 2), protect(2, 2, R | W, 2),
    )),
    "forked VMAs do not take in what was never written": Program((
        anonymous(0, 2), write(0), ("fork", 0), anonymous(2, 2, process=1), anonymous(2, 2), write(2, 1), ("exit", 0),
    )),
    "a neighbour's anon_vma is shared at the first fault": Program((
        anonymous(0, 2), protect(1, 1, R), write(0), protect(1, 1, R | W), anonymous(4, 4), protect(5, 1, R), write(4), write(6),
        protect(5, 1, R | W),
    )),
    "a moved VMA remembers where its pages were": Program((
        anonymous(0, 4), write(1), move(1, 1, 1, 10), anonymous(11, 1), move(10, 1, 1, 1), anonymous(20, 2), move(20, 1, 1, 24),
        anonymous(25, 1),
    )),
    "a move of several VMAs keeps the holes": Program((
        anonymous(0, 2), write(0), anonymous(2, 1, R), anonymous(4, 2), write(5), move(0, 6, 6, 16), move(16, 7, 7, 1),
        move(15, 4, 4, 1),
    )),
    "a move that shrinks needs a VMA as long as the new length": Program((
        anonymous(1, 2), move(2, 8, 6, 10), move(1, 8, 2, 10),
    )),
    "a shared mapping is duplicated, and onto itself it is gone": Program((
        anonymous(0, 3, kind=SHARED), write(0), move(0, 0, 2, 8), read(8), move(0, 0, 2, 0),
    )),
    "a write beyond the file's end leaves an anon_vma": Program((
        of_file(0, 8), protect(1, 2, R), write(4), write(0), protect(1, 8, R | W), ("fork", 0), read(0), read(0, 1),
    ), files=(PAGE,)),
    "fork copies the file pages of a VMA that has private ones": Program((
        of_file(0, 4), read(0), write(1), of_file(8, 4), read(8), ("fork", 0), write(0, 1), read(0), write(1),
    ), files=(4 * PAGE,)),
    "write permission comes back at once for exclusive pages only": Program((
        anonymous(0, 3), write(0), read(1), protect(0, 3, R), protect(0, 3, R | W), write(0), write(1), ("fork", 0),
        protect(0, 3, R), protect(0, 3, R | W), write(0), write(0, 1), ("exit", 1), write(1),
    )),
    "shared pages become writable at once": Program((
        anonymous(0, 2, R, SHARED), read(0), protect(0, 2, R | W), write(0), write(1), ("fork", 0), write(0, 1), read(0),
    )),
    "the last user of a page keeps it": Program((
        anonymous(0, 1), write(0), ("fork", 0), ("fork", 1), write(0, 2), ("exit", 0), write(0, 1),
    )),
    "accounting keeps memory apart": Program((
        anonymous(0, 1, R), anonymous(1, 1), protect(1, 1, R), anonymous(2, 1), write(2), protect(2, 1, R), protect(0, 3, R | W),
        protect(0, 3, R),
    )),
    "the first brk area is its own": Program((
        anonymous(13, 7), ("brk", 0, BRK + 3 * PAGE), ("munmap", 0, at(21), 2 * PAGE), ("brk", 0, BRK + 2 * PAGE),
        ("brk", 0, BRK + 1), ("brk", 0, BRK + 6 * PAGE),
    ), start_brk=BRK),
    "two attaches of a segment do not merge": Program((
        ("shmat", 0, at(29), 0, 0), ("shmat", 0, at(5), 0, 0), move(6, 3, 1, 30), ("shmdt", 0, at(29)), ("shmdt", 0, at(5)),
    ), segments=(4 * PAGE,)),
    "shmdt leaves what mremap made longer than the segment": Program((
        ("shmat", 0, at(0), 0, 0), ("mremap", 0, at(3), PAGE, 3 * PAGE, 0, 0), protect(0, 3, R), ("shmdt", 0, at(0)),
        ("shmat", 0, at(10), 0, 0), ("mremap", 0, at(10), 4 * PAGE, 6 * PAGE, 0, 0), ("shmdt", 0, at(10)),
    ), segments=(4 * PAGE,)),
    "a segment's VMA is not merged away, and moves alone": Program((
        ("shmat", 0, at(0), 0, 0), protect(0, 1, R), protect(0, 2, R | W), protect(1, 1, R), protect(0, 2, R | W),
        anonymous(4, 2), move(3, 3, 3, 20), move(4, 2, 2, 24), ("shmdt", 0, at(0)),
    ), segments=(4 * PAGE,)),
    "madvise goes on after a hole, and stops at a refusal": Program((
        anonymous(0, 2, flags=MAP_FIXED | POPULATE), anonymous(4, 2, flags=MAP_FIXED | POPULATE), anonymous(6, 1, kind=SHARED),
        write(6), ("madvise", 0, at(0), 6 * PAGE, DONTNEED), ("madvise", 0, at(4), 4 * PAGE, FREE), ("fork", 0), write(4),
    )),
    "partial effects of mprotect": Program((
        anonymous(0, 2), anonymous(3, 2), protect(0, 5, R), ("mprotect", 0, at(0), 0, 0x10), ("mprotect", 0, at(0), PAGE, 0x10),
        ("mprotect", 0, at(2), PAGE, 0x01000000), ("mprotect", 0, at(2), 2 * PAGE, 0x01000000),
        ("mprotect", 0, at(2), 2 * PAGE, 0x02000000), ("mprotect", 0, at(3), (1 << 64) - PAGE, R),
    )),
}
