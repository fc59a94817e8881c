"""Programs that random ones meet seldom, or that once showed a difference.  They are compared like any other."""

from kernel.programs import (
    ANONYMOUS,
    BASE,
    BRK,
    COLD,
    DONTNEED,
    FLAG_ADVICE,
    FREE,
    GROWSDOWN,
    HUGE,
    HUGE_BASE,
    HUGETLB,
    LOCKED,
    MAP_FIXED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    NORESERVE,
    PAGE,
    PAGEOUT,
    POPULATE,
    POPULATE_READ,
    POPULATE_WRITE,
    PRIVATE,
    PROT_GROWSDOWN,
    REMOVE,
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


def advise(page, pages, advice, process=0):
    return "madvise", process, at(page), pages * PAGE, advice


def lock(page, pages, process=0):
    return "mlock", process, at(page), pages * PAGE


def unlock(page, pages, process=0):
    return "munlock", process, at(page), pages * PAGE


def duplicate(page, pages, target, process=0):
    return "mremap", process, at(page), pages * PAGE, pages * PAGE, MOVE | MREMAP_DONTUNMAP, at(target)


def pin(page, pages=1, for_write=0, slot=0, process=0):
    return "pin", process, at(page), pages * PAGE, for_write, slot


def stack(page, pages, prot=R | W):
    return anonymous(page, pages, prot, flags=MAP_FIXED | GROWSDOWN)


def remap(page, pages, offset):
    return "remap", 0, at(page), pages * PAGE, offset


UNPIN = "unpin", 0, 0
WIPE, KEEP = FLAG_ADVICE["WIPEONFORK"], FLAG_ADVICE["KEEPONFORK"]


def huge(page, pages=1, prot=R | W, kind=PRIVATE | ANONYMOUS | HUGETLB, flags=0, process=0, file=-1, offset=0):
    addr, length = int(HUGE_BASE + page * HUGE), int(pages * HUGE)
    return "mmap", process, addr, length, prot, kind | MAP_FIXED | flags, file, offset * HUGE


def on_huge(name, page, pages, *rest, process=0):
    return name, process, int(HUGE_BASE + page * HUGE), int(pages * HUGE), *rest


def hread(page, process=0):
    return "read", process, HUGE_BASE + page * HUGE


def hwrite(page, process=0):
    return "write", process, HUGE_BASE + page * HUGE + PAGE, 9


CASES = {
    "two VMAs of a forked process never become one again": Program((
        anonymous(0, 4), write(0), ("fork", 0), write(1, 1), protect(2, 2, R, 1), ("fork", 1), ("exit", 1), ("fork", 2),
        protect(2, 2, R | W, 3), protect(2, 2, R, 2), protect(2, 2, R | W, 2),
    )),
    "forked VMAs do not take in what was never written": Program((
        anonymous(0, 2), write(0), ("fork", 0), anonymous(2, 2, process=1), anonymous(2, 2), write(2, 1), ("exit", 0),
    )),
    "a neighbour's anon_vma is shared at the first fault": Program((
        anonymous(0, 2), protect(1, 1, R), write(0), protect(1, 1, R | W), anonymous(4, 4), protect(5, 1, R), write(4),
        write(6),
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
        anonymous(0, 1, R), anonymous(1, 1), protect(1, 1, R), anonymous(2, 1), write(2), protect(2, 1, R),
        protect(0, 3, R | W),
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
    # swap
    "an exclusive page is writable again as soon as it is swapped in": Program((
        anonymous(0, 3), write(0), write(1), write(2), advise(0, 3, PAGEOUT), read(0), write(0), write(1), protect(2, 1, R),
        read(2),
        protect(2, 1, R | W), write(2), advise(0, 3, PAGEOUT), protect(0, 3, 0), protect(0, 3, R | W), write(1),
    )),
    "readers of a swapped page that a fork shared get one frame": Program((
        anonymous(0, 2), write(0), advise(0, 1, PAGEOUT), ("fork", 0), read(0), read(0, 1), write(0), write(0, 1),
    )),
    "a write to a swapped page that a fork shared copies in one fault": Program((
        anonymous(0, 2), write(0), advise(0, 1, PAGEOUT), ("fork", 0), write(0), read(0, 1), write(0, 1), write(0),
    )),
    "the last user of a swap slot keeps the page, but a read does not make it writable": Program((
        anonymous(0, 2), write(0), advise(0, 1, PAGEOUT), ("fork", 0), ("exit", 1), read(0), write(0),
    )),
    "a child writes while the parent's entry is swapped": Program((
        anonymous(0, 2), write(0), advise(0, 1, PAGEOUT), ("fork", 0), read(0, 1), write(0, 1), write(0),
        advise(0, 1, PAGEOUT, 1),
        write(0, 1),
    )),
    "a frame whose swap slot others use goes back to it": Program((
        anonymous(0, 2), write(0), advise(0, 1, PAGEOUT), ("fork", 0), read(0), advise(0, 1, PAGEOUT), read(0, 1),
        advise(0, 1, PAGEOUT), advise(0, 1, PAGEOUT, 1), write(0), write(0, 1),
    )),
    "a page that two map is not swapped out": Program((
        anonymous(0, 2), write(0), ("fork", 0), advise(0, 1, PAGEOUT), ("exit", 1), advise(0, 1, PAGEOUT), read(0),
    )),
    "swap entries move, are copied and are freed": Program((
        anonymous(0, 4), write(0), write(1), write(2), write(3), advise(0, 4, PAGEOUT), move(0, 1, 1, 8), duplicate(1, 1, 9),
        advise(2, 1, FREE), read(2), ("fork", 0), read(8), read(9, 1), advise(3, 1, DONTNEED), read(3), ("exit", 0),
        write(3, 1),
    )),
    "a page given up by MADV_FREE vanishes instead": Program((
        anonymous(0, 3), write(0), write(1), advise(0, 2, FREE), read(1), advise(0, 2, PAGEOUT), read(0), write(1),
    )),
    "MADV_FREE does not lose what only swap has": Program((
        anonymous(0, 2), write(0), advise(0, 1, PAGEOUT), read(0), ("fork", 0), advise(0, 1, FREE, 1), ("exit", 1),
        advise(0, 1, PAGEOUT), read(0),
    )),
    "pages of files leave empty entries, and their contents stay": Program((
        of_file(0, 4, kind=SHARED), of_file(4, 4), write(0), write(5), read(6), advise(0, 8, PAGEOUT), read(0), write(5),
        read(6),
        anonymous(8, 2, kind=SHARED), write(8), advise(8, 2, PAGEOUT), ("fork", 0), read(8, 1), ("fread", 0, 0, 0),
    ), files=(4 * PAGE,)),
    "swapped private pages go with a truncation and stay with a hole": Program((
        of_file(0, 4), write(0), write(1), write(2), advise(0, 4, PAGEOUT), ("punch", 0, 0, 0, 4 * PAGE), read(0),
        ("truncate", 0, 0, 2 * PAGE), read(1), ("truncate", 0, 0, 4 * PAGE), read(2),
    ), files=(4 * PAGE,)),
    "a truncation reaches what is swapped out of a file": Program((
        of_file(0, 4, kind=SHARED), write(0), write(1), advise(0, 4, PAGEOUT), ("truncate", 0, 0, 100), ("read", 0, at(0) + 50),
        ("read", 0, at(0)), ("truncate", 0, 0, 2 * PAGE), read(1),
    ), files=(4 * PAGE,)),
    "locked memory stays, and mlock swaps in": Program((
        anonymous(0, 4), write(0), write(1), write(3), lock(1, 2), advise(0, 4, PAGEOUT), advise(3, 1, COLD), unlock(1, 2),
        advise(0, 4, PAGEOUT), lock(0, 4), write(0),
    )),
    # mlock
    "mlock over a hole locks what is before it and populates nothing": Program((
        anonymous(0, 2), anonymous(4, 2), lock(0, 6), lock(2, 1), unlock(0, 6), lock(3, 2),
    )),
    "mlock populates up to what cannot be read": Program((
        anonymous(0, 2), anonymous(2, 2, 0), anonymous(4, 2), lock(0, 6), protect(2, 2, R), protect(2, 2, R | W),
    )),
    "mlock writes to private memory and reads the rest": Program((
        anonymous(0, 1, R), anonymous(2, 1), read(2), anonymous(4, 1, kind=SHARED), of_file(6, 2), of_file(8, 4, kind=SHARED),
        lock(0, 1), lock(2, 1), lock(4, 1), lock(6, 2), lock(8, 4), write(2), write(4), ("fork", 0), lock(2, 1, 1), write(2),
    ), files=(2 * PAGE,)),
    "mlock's odd arguments": Program((
        anonymous(0, 2), ("mlock", 0, at(0) + 1, 0), ("mlock", 0, at(0), 0), ("mlock", 0, at(1) - 1, 2),
        ("mlock", 0, at(0), (1 << 64) - 1),
        ("mlock", 0, at(0), (1 << 64) - PAGE), ("munlock", 0, at(0) + 10, 10), ("munlock", 0, at(5), 0),
        ("munlock", 0, at(0), (1 << 64) - PAGE),
    ), limit_memlock=8 * PAGE),
    "RLIMIT_MEMLOCK": Program((
        anonymous(0, 8), lock(0, 2), lock(2, 2), lock(0, 3), lock(1, 3), unlock(1, 2), lock(1, 2),
        ("mremap", 0, at(0), PAGE, 4 * PAGE, 1, 0),
        anonymous(20, 1, flags=MAP_FIXED | LOCKED), ("mmap", 0, at(20), PAGE, R, 0x30 | LOCKED, -1, 0),
        ("munmap", 0, at(0), 2 * PAGE),
        anonymous(20, 2, flags=MAP_FIXED | LOCKED), anonymous(20, 2, flags=MAP_FIXED | LOCKED), lock(8, 9), lock(8, 1),
    ), limit_memlock=3 * PAGE + 100),
    "locked memory grows populated": Program((
        anonymous(0, 2), lock(0, 2), ("mremap", 0, at(0), 2 * PAGE, 4 * PAGE, 0, 0), move(0, 4, 6, 10), move(10, 6, 2, 0),
        anonymous(2, 2), anonymous(8, 2, R, flags=MAP_FIXED | LOCKED), protect(8, 2, R | W), advise(8, 2, DONTNEED),
        advise(8, 2, 24),
    )),
    # references as a driver takes them
    "a referenced page is copied after a fork": Program((
        anonymous(0, 2), write(0), pin(0), write(0), ("fork", 0), write(0), write(0, 1), UNPIN, ("exit", 1), write(0),
    )),
    "a referenced page is copied even by its last user": Program((
        anonymous(0, 2), write(0), pin(0), pin(0, slot=1), ("fork", 0), ("exit", 1), UNPIN, write(0), write(0),
    )),
    "a page no longer referenced is kept": Program((
        anonymous(0, 2), write(0), pin(0), ("fork", 0), ("exit", 1), UNPIN, write(0),
    )),
    "an exclusive page is not copied because of a reference": Program((
        anonymous(0, 1), write(0), pin(0), protect(0, 1, R), protect(0, 1, R | W), write(0), move(0, 1, 1, 8), write(8),
    )),
    "references to the zero page and to pages of files": Program((
        anonymous(0, 2), pin(0, 2), write(0), pin(1, for_write=1), write(1), of_file(4, 4), pin(4), write(4), pin(5, 2, 1),
        pin(5, 1, 1),
        write(5), of_file(8, 2, kind=SHARED), pin(8, 2), ("truncate", 0, 0, 0), ("truncate", 0, 0, 2 * PAGE), read(8), UNPIN,
    ), files=(2 * PAGE,)),
    "a reference outlives the mapping": Program((
        anonymous(0, 2), write(0), pin(0), ("munmap", 0, at(0), PAGE), anonymous(0, 1), write(0), UNPIN, pin(0, 3), pin(8),
        pin(1, 2, 1),
    )),
    # files cut and with holes
    "a truncation takes private copies too": Program((
        of_file(0, 4, kind=SHARED), of_file(4, 4), ("fork", 0), write(0), write(1), read(4, 1), write(5, 1), write(7, 1),
        read(7),
        ("truncate", 0, 0, PAGE + 100), read(2), read(5, 1), ("read", 0, at(1) + 200), ("truncate", 0, 0, 0), read(5, 1),
        ("truncate", 0, 0, 4 * PAGE), read(5, 1), read(1),
    ), files=(4 * PAGE,)),
    "a file that grows shows what was written beyond its end": Program((
        of_file(0, 2, kind=SHARED), ("write", 0, at(0) + 150, 5), ("truncate", 0, 0, 100), ("read", 0, at(0) + 150),
        ("write", 0, at(0) + 150, 6), ("truncate", 0, 0, 200), ("read", 0, at(0) + 150),
    ), files=(PAGE,)),
    "a hole leaves private copies, and zeroes parts of pages": Program((
        of_file(0, 4, kind=SHARED), of_file(4, 4), write(0), write(1), write(5), read(6), ("punch", 0, 0, PAGE, 2 * PAGE),
        read(1),
        read(5), read(6), ("write", 0, at(2) + 50, 3), ("punch", 0, 0, PAGE + 100, PAGE), ("read", 0, at(2) + 50),
        ("punch", 0, 0, 0, 0),
        ("punch", 0, 0, 8 * PAGE, PAGE),
    ), files=(4 * PAGE,)),
    "MADV_REMOVE": Program((
        of_file(0, 4, kind=SHARED), of_file(4, 4), write(0), write(1), advise(1, 1, REMOVE), read(1), advise(4, 1, REMOVE),
        protect(0, 4, R), advise(0, 1, REMOVE), advise(3, 3, REMOVE), lock(0, 1), advise(0, 2, REMOVE), anonymous(8, 2),
        advise(8, 1, REMOVE), anonymous(10, 2, kind=SHARED), write(10), ("fork", 0), read(10, 1), advise(10, 4, REMOVE),
        read(10, 1),
    ), files=(4 * PAGE,)),
    "MADV_REMOVE of a segment": Program((
        ("shmat", 0, at(0), 0, 0), write(0), advise(0, 1, REMOVE), read(0), ("shmat", 0, at(8), 0, 1), advise(8, 1, REMOVE),
    ), segments=(2 * PAGE,)),
    "unrelated processes share a file": Program((
        ("spawn", 0), of_file(0, 4, kind=SHARED), of_file(8, 3, 1, SHARED, 1), write(1), read(8, 1), write(9, 1), read(2),
        ("truncate", 0, 0, 2 * PAGE), read(9, 1), read(8, 1), ("exit", 0), write(8, 1),
    ), files=(4 * PAGE,)),
    # MREMAP_DONTUNMAP
    "a VMA that was moved away is as new": Program((
        anonymous(0, 2), write(0), duplicate(0, 2, 10), anonymous(2, 2), write(2), write(0), anonymous(12, 2), write(10),
        anonymous(34, 2), write(34), anonymous(30, 2), write(30), duplicate(30, 2, 40), anonymous(32, 2), write(31),
        anonymous(20, 6), write(20), write(25), duplicate(22, 2, 10), write(22),
    )),
    "DONTUNMAP of every kind": Program((
        of_file(0, 2, kind=SHARED), of_file(2, 2), anonymous(4, 2, kind=SHARED), anonymous(6, 2), write(0), write(2),
        write(4), write(6),
        lock(6, 2), duplicate(0, 8, 16), read(0), read(2), read(4), read(6), write(18), anonymous(8, 2), unlock(22, 2),
    ), files=(2 * PAGE,)),
    "DONTUNMAP's errors": Program((
        anonymous(0, 4), ("mremap", 0, at(0), 4 * PAGE, 2 * PAGE, 7, at(10)), ("mremap", 0, at(0), PAGE, PAGE, 4, at(10)),
        duplicate(0, 4, 2), duplicate(0, 0, 10), ("mremap", 0, at(0), PAGE, PAGE, 5, at(2) + 1), duplicate(8, 1, 10),
        ("mremap", 0, at(0), 4 * PAGE, 4 * PAGE, 5, at(20)), ("mremap", 0, at(0), 4 * PAGE, 4 * PAGE, 5, at(2)),
    )),
    "DONTUNMAP needs room": Program((
        anonymous(0, 4), write(0), duplicate(0, 4, 10), duplicate(0, 4, 20), move(0, 4, 4, 30),
    ), limit_as=10),
    # stacks
    "a stack grows, and remembers that it did": Program((
        stack(20, 2), write(19), read(16), ("fork", 0), write(12, 1), write(14), stack(10, 4), write(9),
        protect(9, 1, R | PROT_GROWSDOWN),
        protect(20, 1, R | PROT_GROWSDOWN), write(8), read(8), protect(5, 4, R | W | PROT_GROWSDOWN), anonymous(22, 1),
    )),
    "a stack keeps away from what can be accessed": Program((
        stack(20, 2), anonymous(10, 2, 0), write(19), write(12), write(11), protect(10, 2, R), stack(30, 2), write(29),
        anonymous(28, 1, 0),
        write(29), ("munmap", 0, at(10), 2 * PAGE), write(11), ("munmap", 0, at(28), PAGE), write(28), write(27),
    )),
    "RLIMIT_STACK and the others": Program((
        stack(20, 2), write(19), write(18), write(17), stack(30, 6), write(29), anonymous(24, 2, R), stack(10, 1, 0), read(9),
        ("mmap", 0, at(17), PAGE, R, 0x22, -1, 0), ("mmap", 0, at(36), PAGE, R, 0x22, -1, 0),
    ), limit_stack=4 * PAGE),
    "a locked stack": Program((stack(20, 2), lock(20, 2), write(19), write(18), pin(18), lock(17, 2)), limit_memlock=3 * PAGE),
    "a stack within limits": Program((stack(20, 2), write(19), write(15), write(18)), limit_as=5),
    "a stack is not data": Program((stack(20, 2), write(19), write(15), anonymous(30, 4), anonymous(34, 2)), limit_data=5),
    "nothing but an access makes a stack grow": Program((
        stack(20, 2), pin(19), pin(19, 2, 1), lock(19, 2), advise(19, 1, POPULATE_WRITE), write(19), pin(19),
    )),
    "stacks are private and anonymous": Program((
        anonymous(20, 2), ("mmap", 0, at(20), PAGE, R, SHARED | ANONYMOUS | MAP_FIXED | GROWSDOWN, -1, 0),
        ("mmap", 0, at(20), PAGE, R, PRIVATE | MAP_FIXED | GROWSDOWN, 0, 0), stack(20, 1), stack(21, 1), stack(19, 1),
        write(18),
        ("munmap", 0, at(19), PAGE), write(19), move(19, 3, 3, 8), write(7), duplicate(7, 4, 20), write(19), write(6),
    ), files=(PAGE,)),
    # advice
    "wiped in the child": Program((
        anonymous(0, 4), write(0), write(1), write(3), advise(0, 2, WIPE), ("fork", 0), read(0, 1), write(0), write(1, 1),
        ("fork", 1),
        read(1, 2), advise(0, 2, KEEP), advise(0, 2, KEEP, 1), ("fork", 0), read(0, 3), of_file(8, 1), advise(2, 8, WIPE),
        advise(8, 1, KEEP),
    ), files=(PAGE,)),
    "a wiped VMA is as new": Program((
        anonymous(0, 2), write(0), advise(0, 2, WIPE), ("fork", 0), anonymous(2, 2, process=1), advise(2, 2, WIPE, 1),
        write(3, 1),
    )),
    "populating stops at the first that fails": Program((
        anonymous(0, 2), write(0), anonymous(2, 2, R), anonymous(4, 2, 0), of_file(8, 4, kind=SHARED), ("fork", 0),
        advise(0, 6, POPULATE_READ),
        advise(0, 4, POPULATE_WRITE), advise(0, 8, POPULATE_WRITE, 1), advise(8, 4, POPULATE_READ),
        advise(8, 4, POPULATE_WRITE),
        advise(5, 4, POPULATE_READ), write(0), write(1),
    ), files=(2 * PAGE,)),
    "remap_file_pages": Program((
        of_file(0, 6, kind=SHARED), write(0), write(1), remap(2, 2, 0), remap(0, 1, 5), remap(0, 6, 0), protect(1, 1, R),
        remap(0, 4, 2),
        remap(1, 1, 4), of_file(8, 2), remap(8, 1, 0), remap(20, 1, 0), anonymous(10, 2, kind=SHARED), write(10),
        remap(10, 1, 1),
        ("remap", 0, at(10) + 1, PAGE + 1, 0), ("remap", 0, at(10), 0, 0), remap(11, 2, 0), remap(10, 1, 1 << 52),
        remap(10, 1, (1 << 64) - 1),
        lock(10, 2), remap(10, 1, 1), remap(0, 1, 7),
    ), files=(8 * PAGE,)),
    # huge pages: a few, for there may be few
    "a huge page is read, written, copied and kept": Program((
        huge(0), hread(0), hwrite(0), ("fork", 0), hread(0, 1), hwrite(0, 1), hwrite(0), ("exit", 1),
        on_huge("mprotect", 0, 1, R), hread(0),
        on_huge("mprotect", 0, 1, R | W), hwrite(0), on_huge("munmap", 0, 1),
    ), huge=True),
    "huge pages are not cut": Program((
        huge(0, 2), hwrite(0), on_huge("munmap", 0, 0.5), on_huge("munmap", 0.5, 1), on_huge("mprotect", 0, 0.5, R),
        on_huge("madvise", 0, 0.5, DONTNEED), on_huge("madvise", 0.5, 0.5, DONTNEED), on_huge("madvise", 0, 1, DONTNEED),
        on_huge("madvise", 0, 1, FREE), on_huge("madvise", 0, 1, PAGEOUT), huge(0.5, 1, kind=PRIVATE | ANONYMOUS), huge(0.5),
        huge(4, 0.5),
        huge(4.5, 0.5, kind=PRIVATE | ANONYMOUS), on_huge("munmap", 4.5, 0.5), on_huge("mprotect", 0, 1, R),
        on_huge("mprotect", 0, 1, R | W),
    ), huge=True),
    "huge pages of a file": Program((
        huge(0, 2, kind=SHARED, file=0), hread(0), hwrite(1), ("truncate", 0, 0, HUGE), hread(1),
        ("truncate", 0, 0, 2 * HUGE), hread(1),
        ("truncate", 0, 0, HUGE // 2), ("punch", 0, 0, 0, HUGE), hread(0), on_huge("madvise", 1, 1, REMOVE), ("spawn", 0),
        huge(0, 1, kind=SHARED, process=1, file=0), hwrite(0, 1), hread(0), ("truncate", 0, 0, 0), hread(0, 1),
    ), files=(2 * HUGE,), huge=True),
    "private huge pages of a file": Program((
        huge(0, 1, kind=PRIVATE, file=0), huge(2, 1, R, kind=SHARED, file=0), hread(0), hread(2), hwrite(0), hread(2),
        ("punch", 0, 0, 0, HUGE),
        hread(2), hread(0),
    ), files=(HUGE,), huge=True),
    "huge pages run out": Program((
        huge(0, 8), huge(0, 8, flags=NORESERVE), *(hwrite(page) for page in range(8)), ("fork", 0), hwrite(0, 1), hwrite(0),
        hread(0, 1),
    ), huge=True),
    "the owner of a reserved huge page takes it back": Program((
        huge(0, 1), hwrite(0), huge(2, 7, flags=NORESERVE | POPULATE), ("fork", 0), hwrite(0, 1), hwrite(0), hread(0, 1),
    ), huge=True),
    "moving and locking huge pages": Program((
        huge(0), hwrite(0), on_huge("mremap", 0, 1, HUGE, 3, HUGE_BASE + 4 * HUGE), hread(4),
        on_huge("mremap", 4, 1, 2 * HUGE, 1, 0),
        on_huge("mremap", 4, 1, PAGE, 0, 0), on_huge("mremap", 4, 1, HUGE, 7, HUGE_BASE), on_huge("mlock", 4, 1),
        on_huge("munlock", 4, 1),
        on_huge("munmap", 4, 1), huge(0, flags=POPULATE), huge(1, prot=R, flags=LOCKED), hread(1),
    ), huge=True),
}
