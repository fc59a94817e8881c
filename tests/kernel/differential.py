"""Runs a program on a modelled VM and compares it, operation by operation, with what the kernel did."""

import errno

from kernel.machine import EXCLUSIVE, FILE, SIGNALLED, SKIPPED, STRAY, SWAPPED, ZERO
from kernel.programs import (
    BASE,
    HUGE,
    HUGE_BASE,
    HUGETLB,
    LOCKED,
    MAX_PROCESSES,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    PAGE,
    POPULATE,
    POPULATE_READ,
    POPULATE_WRITE,
    describe,
)

AROUND = 16
"""Pages that a read fault of a file page may map (64 KiB: fault_around_bytes as it is by default)."""


class Difference(Exception):
    """The first operation of a program after which the VM is not in the kernel's state.

    Attributes
    ----------
    index : int
        The operation.
    what : list of str
        What differs.
    """

    def __init__(self, program, index, what):
        self.index, self.what = index, what
        lines = [f"after operation {index}, {describe(program.ops[index])}:", *(f"  {w}" for w in what)]
        super().__init__("\n".join(lines + [str(program)]))


class Modelled:
    """The processes of a program as address spaces of a VM.

    Parameters
    ----------
    vm : module
        ioproc, or one with the same names.
    program : Program
        Only what it begins with is used here.
    huge_pages : int
        Size of the pool of huge pages.
    """

    def __init__(self, vm, program, huge_pages=0):
        self.vm = vm
        self.base, self.window_pages = program.window
        self.end = self.base + self.window_pages * PAGE
        self.step = 512 if program.huge else 1
        pool, kind = ({"huge_pages": huge_pages}, {"huge": True}) if program.huge else ({}, {"memfd": True})
        self.memory = vm.PhysicalMemory(frames=4096, swap_slots=1024, **pool)
        self.files = [vm.File(self.memory, size, **kind) for size in program.files]
        self.segments = [vm.File(self.memory, size, memfd=True) for size in program.segments]
        limits = {"AS": program.limit_as * PAGE, "DATA": program.limit_data * PAGE, "MEMLOCK": program.limit_memlock,
                  "STACK": program.limit_stack}
        self.options = {"rlimits": {name: limit for name, limit in limits.items() if limit}}
        if program.start_brk:
            self.options["start_brk"] = program.start_brk
        if program.mappings:
            self.options["max_map_count"] = program.mappings
        self.spaces = {}
        self.started = 0
        self.pinned = {}
        self.faults = 0
        self.spawn()

    def close(self):
        """End every process, empty every file and drop every reference; return what is in use nevertheless."""
        for space in self.spaces.values():
            space.exit()
        self.spaces.clear()
        for slot in list(self.pinned):
            self.unpin(slot)
        for file in self.files + self.segments:
            file.truncate(0)
        stats = self.memory.stats
        used = {"frames": stats["frames_used"], "swap slots": stats["swap_used"]}
        if self.step > 1:
            used["huge pages"] = stats["huge_pages"] - stats["huge_pages_free"]
        return [f"{n} {what} in use after the end" for what, n in used.items() if n]

    def perform(self, op):
        """Perform an operation and return its result as the executor gives it."""
        name, process, *a = op
        self.faults = 0
        if name in ("fread", "fwrite", "truncate", "punch", "unpin", "spawn"):
            try:
                return getattr(self, name)(*a) or 0
            except OSError as error:
                return -error.errno
        if process not in self.spaces or name == "fork" and self.started == MAX_PROCESSES:
            return SKIPPED
        space = self.spaces[process]
        before = space.stats["faults"]
        try:
            result = getattr(self, name)(space, *a)
        except self.vm.SegmentationFault:
            return SIGNALLED - 11
        except self.vm.BusError:
            return SIGNALLED - 7
        except OSError as error:
            return -error.errno
        if name == "exit":
            del self.spaces[process]
        else:
            self.faults = space.stats["faults"] - before
        return 0 if result is None else result

    # each of these is an operation of no process

    def fread(self, file, offset):
        file = self.files[file]
        return file.read(offset, 1)[0] if offset < file.size else SKIPPED

    def fwrite(self, file, offset, value):
        file = self.files[file]
        if offset >= file.size:
            return SKIPPED
        file.write(offset, bytes([value]))
        return 0

    def truncate(self, file, size):
        self.files[file].truncate(size)

    def punch(self, file, offset, length):
        self.files[file].punch_hole(offset, length)

    def unpin(self, slot):
        for pfns in self.pinned.pop(slot, ()):
            self.memory.unpin(pfns)

    def spawn(self):
        if self.started == MAX_PROCESSES:
            return SKIPPED
        self.spaces[self.started] = self.vm.AddressSpace(self.memory, **self.options)
        self.started += 1
        return 0

    # and each of these one of a process

    def placed(self, space, addr, length):
        length = -(-length // PAGE) * PAGE
        if self.base <= addr and addr + length <= self.end:
            return addr
        space.munmap(addr, length)
        return STRAY

    def mmap(self, space, addr, length, prot, flags, file, offset):
        file = self.files[file] if file >= 0 else None
        return self.placed(space, space.mmap(length, prot, flags, addr=addr or None, file=file, offset=offset), length)

    def munmap(self, space, addr, length):
        space.munmap(addr, length)

    def mprotect(self, space, addr, length, prot):
        space.mprotect(addr, length, prot)

    def mremap(self, space, addr, length, new_length, flags, target):
        target = target if flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) else None
        return self.placed(space, space.mremap(addr, length, new_length, flags, target), new_length)

    def madvise(self, space, addr, length, advice):
        space.madvise(addr, length, advice)

    def msync(self, space, addr, length, flags):
        space.msync(addr, length, flags)

    def brk(self, space, addr):
        return space.brk(addr)

    def mlock(self, space, addr, length):
        space.mlock(addr, length)

    def munlock(self, space, addr, length):
        space.munlock(addr, length)

    def pin(self, space, addr, length, write, slot):
        self.pinned.setdefault(slot, []).append(self.memory.pin(space, addr, length, write=bool(write)))

    def remap(self, space, addr, length, offset):
        space.remap_file_pages(addr, length, offset)

    def shmat(self, space, addr, segment, readonly):
        segment = self.segments[segment]
        return self.placed(space, space.shmat(segment, addr or None, bool(readonly)), segment.size)

    def shmdt(self, space, addr):
        space.shmdt(addr)

    def read(self, space, addr):
        return space.read(addr, 1)[0]

    def write(self, space, addr, value):
        space.write(addr, bytes([value]))

    def fork(self, space):
        self.spaces[self.started] = space.fork()
        self.started += 1

    def exit(self, space):
        space.exit()

    def vmas(self, process):
        """Return the VMAs of the window as `machine.State` has them."""
        found = []
        numbered = [*enumerate(self.files), *enumerate(self.segments, 2)]
        for v in self.spaces[process].vmas():
            if v.start < self.end and v.end > self.base:
                file = next((i for i, f in numbered if v.file is f), -2 if v.shared or v.flags & HUGETLB else -1)
                found.append((v.start, v.end, v.offset if file >= 0 else 0, v.prot & 7, int(v.shared), file))
        return found

    def pages(self, process):
        """Return {page: (pfn, shared, zero, swapped)} of the pages of the window that are somewhere."""
        table = self.spaces[process].pagemap(self.base, self.window_pages * PAGE)[::self.step]
        rows = table[["pfn", "shared", "zero", "swapped"]].tolist()
        return {i * self.step: rows[i] for i in (table["present"] | table["swapped"]).nonzero()[0].tolist()}

    def follow_fault_around(self, op, state):
        """Read the file pages that the kernel mapped beside the one that faulted, where it may map them.

        How many neighbours a fault of the page cache maps is not modelled; that they are the right ones is checked.
        """
        name, process, *a = op
        if name in ("read", "write"):
            first, last = a[0] // PAGE, a[0] // PAGE
        elif name in ("mmap", "mlock", "madvise", "mprotect", "pin", "remap"):
            first, last = a[0] // PAGE, (a[0] + a[1] - 1) // PAGE
        elif name == "mremap":
            target = a[4] or a[0]
            first, last = target // PAGE, (target + a[2] - 1) // PAGE
        else:
            return
        space = self.spaces[process]
        mapped = self.pages(process)
        for page, row in state.pages.items():
            number = self.base // PAGE + page
            if page in mapped or not row[3] & FILE or self.step > 1:
                continue
            vma = next((v for v in space.vmas() if v.start <= number * PAGE < v.end), None)
            if vma is None or not (vma.file or vma.shared):
                continue
            # which pages may have faulted: the block begins at a multiple of its size or with the VMA
            start = vma.start // PAGE
            for faulted in range(max(first, start, number - AROUND + 1), min(last + 1, number + AROUND)):
                block = max(faulted // AROUND * AROUND, start)
                if block <= number < block + AROUND and number // 512 == faulted // 512:
                    space.touch(number * PAGE, 1, False)
                    break


def _vma_line(v):
    start, end, offset, prot, shared, file = v
    perms = "".join(c if prot & bit else "-" for c, bit in (("r", 1), ("w", 2), ("x", 4))) + "ps"[shared]
    of = {-1: "", -2: " shared anonymous"}.get(file, f" file{file}+{offset // PAGE}p")
    of = of.replace("file2", "segment0").replace("file3", "segment1")
    if start >= HUGE_BASE:
        return f"H+{(start - HUGE_BASE) / HUGE:g}M-H+{(end - HUGE_BASE) / HUGE:g}M {perms}{of}"
    return f"A+{(start - BASE) // PAGE}p-A+{(end - BASE) // PAGE}p {perms}{of}"


def _joined(vmas):
    """Join neighbours that look alike, whether or not they are one VMA."""
    found = []
    for v in vmas:
        last = found[-1] if found else None
        if last and last[1] == v[0] and last[3:] == v[3:] and (v[5] < 0 or last[2] + last[1] - last[0] == v[2]):
            found[-1] = (last[0], v[1], *last[2:])
        else:
            found.append(v)
    return found


def _compare_vmas(process, kernel, modelled, boundaries):
    lines = [(v[0], v[1], v[2] if v[5] >= 0 else 0, *v[3:]) for v in kernel]
    if not boundaries:
        lines, modelled = _joined(lines), _joined(modelled)
    if lines == modelled:
        return []
    return [f"process {process}: VMAs\n      kernel: {', '.join(map(_vma_line, lines))}"
            f"\n      VM:     {', '.join(map(_vma_line, modelled))}"]


def _compare_pages(process, kernel, modelled, sees):
    """Return what differs in one process's pages."""
    found = []
    for page in sorted(kernel.keys() | modelled.keys()):
        where = f"process {process}: page A+{page}p"
        if page not in modelled or page not in kernel:
            found.append(f"{where}: an entry in the {'kernel' if page in kernel else 'VM'} only")
            continue
        _, mapcount, _, state = kernel[page]
        _, shared, zero, swapped = modelled[page]
        if bool(state & SWAPPED) != bool(swapped):
            found.append(f"{where}: swapped out in the {'VM' if swapped else 'kernel'} only")
        elif swapped:
            continue
        elif "zero" in sees and bool(state & ZERO) != bool(zero):
            found.append(f"{where}: the zero page in the {'kernel' if state & ZERO else 'VM'} only")
        elif not zero and bool(shared) == bool(state & EXCLUSIVE):
            found.append(f"{where}: mapped more than once in the {'VM' if shared else 'kernel'} only")
        elif not zero and "mapcount" in sees and (mapcount > 1) != bool(shared):
            found.append(f"{where}: mapped {mapcount} times in the kernel, in the VM shared={bool(shared)}")
    return found


def _compare_frames(states, pages, known, keeps):
    """Match the kernel's frames with the VM's, one to one, and with the matches of before where frames stay.

    ``known`` has the matches of the frames mapped before the operation, and is brought up to date.
    """
    found, forward, backward = [], {}, {}
    for process, state in states.items():
        for page, (pfn, _, _, bits) in state.pages.items():
            if bits & (ZERO | SWAPPED) or page not in pages[process]:
                continue
            frame = pages[process][page][0]
            where = f"process {process}: page A+{page}p"
            if forward.setdefault(pfn, frame) != frame or backward.setdefault(frame, pfn) != pfn:
                found.append(f"{where}: not the frame that the other mappings of its frame have")
            elif keeps and known.get(pfn, frame) != frame:
                found.append(f"{where}: the VM has another frame than before, the kernel has not")
            elif keeps and pfn not in known and frame in known.values():
                found.append(f"{where}: the kernel has another frame than before, the VM has not")
    known.clear()
    known.update(forward)
    return found


def _populates(op, locked):
    """Return whether an operation may fault in many pages: it may give a frame back, and take it again for another."""
    name, _, *a = op
    return (name in ("mlock", "remap", "pin") or name == "mmap" and a[3] & (POPULATE | LOCKED)
            or name == "madvise" and a[2] in (POPULATE_READ, POPULATE_WRITE) or name in ("mprotect", "mremap") and locked)


def compare(vm, program, outcomes, sees, differing=(), huge_pages=0):
    """Run a program on a VM and raise `Difference` at the first operation that ends unlike the kernel's.

    Parameters
    ----------
    vm : module
        ioproc, or one with the same names.
    program : Program
    outcomes : list of Outcome
        What the kernel did.
    sees : set of str
        `Kernel.sees`: what the kernel let us see.
    differing : list of versions.Row
        In what this kernel is not as modelled.
    huge_pages : int
        How many huge pages the kernel had for it.

    Returns
    -------
    int
        The number of operations compared.
    """
    modelled = Modelled(vm, program, huge_pages)
    narrowed = {row.narrows for row in differing}
    boundaries, sees = "boundaries" not in narrowed, set(sees) - narrowed
    known, miscounted = {}, set()
    try:
        for index, (op, outcome) in enumerate(zip(program.ops, outcomes)):
            if any(row.narrows == op[0] and row.applies(op[2:]) for row in differing):
                return index
            try:
                result = modelled.perform(op)
            except Exception as error:
                raise Difference(program, index, [f"the VM raised {error!r}"]) from error
            if result != outcome.result:
                raise Difference(program, index, [f"result: kernel {_result(outcome.result)}, VM {_result(result)}"])
            found = []
            if op[0] in ("read", "write") and result >= 0 and modelled.faults != outcome.faults:
                found.append(f"faults: kernel {outcome.faults}, VM {modelled.faults}")
            if outcome.states.keys() != modelled.spaces.keys():
                raise Difference(program, index, ["other processes are alive"])
            if op[1] in outcome.states:
                modelled.follow_fault_around(op, outcome.states[op[1]])
            if op[0] == "mremap" and op[5] & MREMAP_DONTUNMAP:
                # of a locked VMA: the kernel counts the old one, which is no longer locked
                miscounted.add(op[1])
            pages = {}
            for process, state in outcome.states.items():
                pages[process] = modelled.pages(process)
                stats = modelled.spaces[process].stats
                if process not in miscounted and state.locked != stats["locked_pages"]:
                    found.append(f"process {process}: locked: kernel {state.locked}p, VM {stats['locked_pages']}p")
                if state.swapped != stats["swap_pages"]:
                    found.append(f"process {process}: swapped: kernel {state.swapped}p, VM {stats['swap_pages']}p")
                found += _compare_vmas(process, state.vmas, modelled.vmas(process), boundaries)
                found += _compare_pages(process, state.pages, pages[process], sees)
            if "pfn" in sees:
                keeps = not _populates(op, outcome.states[op[1]].locked if op[1] in outcome.states else 0)
                found += _compare_frames(outcome.states, pages, known, keeps)
            if found:
                raise Difference(program, index, found)
    finally:
        left = modelled.close()
    if left:
        raise Difference(program, len(program.ops) - 1, left)
    return len(program.ops)


def _result(value):
    if value <= SKIPPED:
        return "skipped (no such process)"
    if value <= SIGNALLED:
        return {11: "SIGSEGV", 7: "SIGBUS"}.get(SIGNALLED - value, f"signal {SIGNALLED - value}")
    if value == STRAY:
        return "an address outside the window"
    if value < 0:
        return errno.errorcode.get(-value, value)
    return hex(value)
