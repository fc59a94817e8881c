"""Histories made by hand, event by event."""
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE

import ioproc
from ioproc.trace import EVENT, Op, TraceWriter

PAGE = 4096
READ, WRITE = 1, 2
NONE = 0
RO = PROT_READ
RW = PROT_READ | PROT_WRITE
PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS
SHARED = MAP_SHARED | MAP_ANONYMOUS
BASE = 0x10000000


def page(number):
    return BASE + number * PAGE


class History:
    """Each method adds an event of process `pid`; pages are counted from BASE, what is not said is zero."""

    def __init__(self, *files):
        self.files = [{"path": None, "size": size, "kind": "file"} for size in files]
        self.rows = []

    def add(self, op, pid=1, **fields):
        row = {"t": len(self.rows), "pid": pid, "tid": pid, "op": op, "file": -1} | fields
        self.rows.append(tuple(row.pop(name, 0) for name in EVENT.names))
        assert not row, f"no such fields: {row}"
        return self

    def mmap(self, at, pages, prot=RW, flags=PRIVATE, *, offset=0, **fields):
        return self.add(Op.MMAP, ret=page(at), length=pages * PAGE, prot=prot, flags=flags, arg=offset, **fields)

    def munmap(self, at, pages, **fields):
        return self.add(Op.MUNMAP, addr=page(at), length=pages * PAGE, **fields)

    def mprotect(self, at, pages, prot, **fields):
        return self.add(Op.MPROTECT, addr=page(at), length=pages * PAGE, prot=prot, **fields)

    def mremap(self, at, pages, new_pages, to=None, **fields):
        return self.add(Op.MREMAP, addr=page(at), length=pages * PAGE, arg=new_pages * PAGE, ret=page(at if to is None else to),
                        **{"flags": ioproc.MREMAP_MAYMOVE} | fields)

    def madvise(self, at, pages, advice=MADV_DONTNEED, **fields):
        return self.add(Op.MADVISE, addr=page(at), length=pages * PAGE, arg=advice, **fields)

    def brk(self, wish, result=None, **fields):
        return self.add(Op.BRK, addr=wish, ret=wish if result is None else result, **fields)

    def fault(self, at, access=WRITE, **fields):
        return self.add(Op.FAULT, addr=page(at) + 8, access=access, **fields)

    def faults(self, at, pages, access=WRITE, **fields):
        for number in range(at, at + pages):
            self.fault(number, access, **fields)
        return self

    def comm(self, at, pages, **fields):
        return self.add(Op.COMM, addr=page(at), length=pages * PAGE, access=READ, **fields)

    def fork(self, child, **fields):
        return self.add(Op.FORK, arg=child, **fields)

    def vfork(self, child, **fields):
        return self.add(Op.VFORK, arg=child, **fields)

    def exec(self, **fields):
        return self.add(Op.EXEC, **fields)

    def exit(self, **fields):
        return self.add(Op.EXIT, **fields)

    def trace(self):
        writer = TraceWriter()
        for row in self.rows:
            writer.append(row)
        return writer.finish({"files": self.files})
