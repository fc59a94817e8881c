"""An address space in units of pages, on either implementation, and the hooks it fires in the notation of the table.

Pages are numbered from BASE. A hook is written as it is tabled:
``I 1-3 of 0-4`` invalidate_range of pages 1 and 2 with the VMA of pages 0 to 3, ``u 2 of 0-4`` update_page,
``P 1-2 of 1-2 r--`` change_protection, ``S`` sync_range, ``w`` wrprotect_page, ``R`` release.
"""
import errno

import pytest

PAGE, BASE, HEAP = 4096, 0x10000000, 64
LETTERS = {"invalidate_range": "I", "update_range": "U", "sync_range": "S", "invalidate_page": "i", "update_page": "u",
           "wrprotect_page": "w", "change_protection": "P", "release": "R", "sync_page": "s"}
PROTS = {"rw-": 3, "r--": 1, "---": 0, "r-x": 5}
PRIVATE, SHARED, FIXED, ANONYMOUS, LOCKED, POPULATE = 2, 1, 0x10, 0x20, 0x2000, 0x8000
GROWSDOWN, HUGETLB = 0x100, 0x40000
DONTNEED, FREE, REMOVE, WILLNEED, RANDOM, DONTDUMP, COLD, PAGEOUT = 4, 8, 9, 3, 1, 16, 20, 21
WIPEONFORK, KEEPONFORK, POPULATE_READ, POPULATE_WRITE = 18, 19, 22, 23
ALL = 1000          # more pages than any test has: to reclaim all that can be
DEVICE = 0x100000   # a page frame number of device memory


class World:
    """An address space in units of pages, and the hooks it fires."""

    def __init__(self, impl, frames=256, swap_slots=64, huge_pages=0, **options):
        self.impl = impl
        self.others = []        # address spaces alive beside the first
        self.mem = impl.PhysicalMemory(frames=frames, swap_slots=swap_slots, huge_pages=huge_pages)
        self.file = impl.File(self.mem, 8 * PAGE)
        self.memfd = impl.File(self.mem, 8 * PAGE, memfd=True)
        self.mm = self.new(**options)
        self.fired, self.counted = [], {}

    def again(self, **options):
        """A fresh world, with another memory."""
        self.__init__(self.impl, **options)
        return self

    def new(self, **options):
        """Another address space."""
        return self.impl.AddressSpace(self.mem, start_brk=BASE + HEAP * PAGE, **options)

    def ops(self, name="", log=None, **callbacks):
        """Ops that write down all nine hooks, prefixed with their name."""
        log = self.fired if log is None else log

        def record(letter, vma, args):
            start = args[0]
            first = (start - BASE) // PAGE
            what = f"{first}-{(args[1] - BASE) // PAGE}" if letter in "IUSP" else f"{first}"
            newprot = "".join(c if args[2] & bit else "-" for c, bit in zip("rwx", (1, 2, 4))) if letter == "P" else ""
            of = f"{(vma.start - BASE) // PAGE}-{(vma.end - BASE) // PAGE}"
            log.append(f"{name} {letter} {what} of {of} {newprot}".strip())

        recorders = {kind: lambda vma, *args, letter=letter: record(letter, vma, args) for kind, letter in LETTERS.items()}
        recorders["release"] = lambda mm: log.append(f"{name} R".strip())
        return self.impl.Ops(name=name, **{**recorders, **callbacks})

    def map(self, page, n, prot="rw-", flags=PRIVATE | ANONYMOUS, mm=None, **more):
        return (mm or self.mm).mmap(n * PAGE, PROTS[prot], flags | FIXED, addr=BASE + page * PAGE, **more)

    def map_file(self, page, n, prot="rw-", flags=PRIVATE, first=0, file=None, mm=None):
        return self.map(page, n, prot, flags, file=file or self.file, offset=first * PAGE, mm=mm)

    def map_huge_file(self, page, n):
        self.huge = self.impl.File(self.mem, n * PAGE, huge=True)
        return self.map(page, n, flags=SHARED, file=self.huge)

    def map_device(self, page, n):
        return self.mm.mmap_device(n * PAGE, DEVICE, addr=BASE + page * PAGE)

    def zeromap(self, page, n):
        return self.mm.zeromap(n * PAGE, addr=BASE + page * PAGE)

    def read(self, page, mm=None):
        return (mm or self.mm).read(BASE + page * PAGE, 1)

    def write(self, page, mm=None, data=b"x"):
        (mm or self.mm).write(BASE + page * PAGE, data)

    def munmap(self, page, n):
        self.mm.munmap(BASE + page * PAGE, n * PAGE)

    def mprotect(self, page, n, prot):
        self.mm.mprotect(BASE + page * PAGE, n * PAGE, PROTS[prot])

    def madvise(self, page, n, advice, mm=None):
        (mm or self.mm).madvise(BASE + page * PAGE, n * PAGE, advice)

    def mremap(self, page, old, new, to=None, flags=None):
        address = None if to is None else BASE + to * PAGE
        flags = flags or (1 if to is None else 3)
        return self.mm.mremap(BASE + page * PAGE, old * PAGE, new * PAGE, flags, address)

    def msync(self, page, n, flags=4):
        self.mm.msync(BASE + page * PAGE, n * PAGE, flags)

    def mlock(self, page, n):
        self.mm.mlock(BASE + page * PAGE, n * PAGE)

    def munlock(self, page, n):
        self.mm.munlock(BASE + page * PAGE, n * PAGE)

    def pin(self, page, n=1, write=True, mm=None):
        return self.mem.pin(mm or self.mm, BASE + page * PAGE, n * PAGE, write=write)

    def remap(self, page, n, offset):
        self.mm.remap_file_pages(BASE + page * PAGE, n * PAGE, offset)

    def swap_out(self, page, n=1, mm=None):
        """Out at once, accessed or not."""
        (mm or self.mm).madvise(BASE + page * PAGE, n * PAGE, PAGEOUT)

    def brk(self, page):
        self.mm.brk(BASE + page * PAGE)

    def fork(self):
        self.child = self.mm.fork()
        self.others.append(self.child)
        return self.child

    def vfork(self):
        self.child = self.mm.vfork()
        self.others.append(self.child)
        return self.child

    def restart(self, **options):
        """The same in an address space with other options."""
        self.mm = self.new(**options)

    def register(self, ops, page=None, n=None):
        self.mm.register_ops(ops, *([] if page is None else [BASE + page * PAGE, n * PAGE]))

    def unregister(self, ops, page=None, n=None):
        self.mm.unregister_ops(ops, *([] if page is None else [BASE + page * PAGE, n * PAGE]))

    def register_everywhere(self, ops):
        for vma in self.mm.vmas():
            self.mm.register_ops(ops, vma.start, vma.end - vma.start)

    def vmas(self):
        return [((vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE) for vma in self.mm.vmas()]

    def page(self, page, mm=None):
        return (mm or self.mm).pagemap(BASE + page * PAGE, PAGE)[0]

    def says(self, page, mm=None):
        """A page in a word or two: "absent", "swapped", "zero", "read-only", or "writable dirty shared" as far as it is."""
        row = self.page(page, mm)
        if row["swapped"]:
            return "swapped"
        if row["zero"]:
            return "zero"
        if not row["present"]:
            return "absent"
        return " ".join(name for name in ("writable", "dirty", "shared") if row[name]) or "read-only"

    def faults(self, mm=None):
        """The faults since the last look, by kind."""
        mm = mm or self.mm
        now = {name[7:]: n for name, n in mm.stats.items() if name.startswith("faults_")}
        before, self.counted[mm] = self.counted.get(mm, {}), now
        return {kind: n - before.get(kind, 0) for kind, n in now.items() if n != before.get(kind, 0)}

    def check(self):
        """All counts are right."""
        spaces = [self.mm, *self.others]
        if hasattr(self.impl, "check"):
            self.impl.check(self.mem, *spaces, files=[self.file, self.memfd])
        else:
            for mm in spaces:
                self.impl._core.check_space(mm)
            self.impl._core.check_memory(self.mem, spaces)


def fails(code, call, *args):
    with pytest.raises(OSError) as raised:
        call(*args)
    assert errno.errorcode[raised.value.errno] == code
