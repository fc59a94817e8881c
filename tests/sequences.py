"""Random programs of memory calls, run on one or more implementations and compared after every call.

`Side` runs the calls on one implementation (model.py, or ioproc) and collects all that can be seen;
`Program` turns the steps that hypothesis chooses into calls; `smallest` cuts a failing program down.
Everything happens in an arena of a few pages, so that calls meet: ranges overlap, VMAs split and
merge, forks share pages, ops hang everywhere.
"""
import errno

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, seed, settings

import model
from model import PAGE

ARENA, ARENA_PAGES = 0x10000000, 24
HEAP = ARENA + 16 * PAGE            # brk starts inside the arena and runs into what is mapped there
FILE_SIZES = 5 * PAGE, 2 * PAGE + 100, 1
SPACES = 6                          # address spaces alive at once
LOOK = ["present", "writable", "dirty", "young", "shared"]


class Side:
    """One implementation, running one program."""

    def __init__(self, impl, frames, max_map_count, rlimits):
        self.impl = impl
        self.mem = impl.PhysicalMemory(frames=frames)
        self.files = [impl.File(self.mem, size) for size in FILE_SIZES]
        self.options = {"max_map_count": max_map_count, "start_brk": HEAP, "rlimits": rlimits}
        self.spaces = {}            # number -> address space, those alive
        self.born = 0
        self.fired = []             # hooks of the running call
        self.running = None
        self.ops = [self._ops("all", model.CALLBACKS), self._ops("also all", model.CALLBACKS),
                    self._ops("few", ["invalidate_range", "update_page", "release"])]
        self.add(impl.AddressSpace(self.mem, **self.options))

    def add(self, mm):
        self.spaces[self.born] = mm
        self.born += 1
        return self.born - 1

    def _ops(self, name, kinds):
        def recorder(kind):
            def release(mm):
                self.fired.append((kind, name, self.number(mm)))

            def record(vma, *args):
                start, end = args[:2] if len(args) > 1 else (args[0], args[0] + PAGE)
                seen = self.running.pagemap(start, end - start)[LOOK].tolist()
                self.fired.append((kind, name, self.describe(vma), args, seen))
            return release if kind == "release" else record
        return self.impl.Ops(name=name, **{kind: recorder(kind) for kind in kinds})

    def number(self, mm):
        return next(number for number, space in self.spaces.items() if space is mm)

    def describe(self, vma):
        file = next((i for i, file in enumerate(self.files) if file is vma.file), None)
        assert (file is None) == (vma.file is None)
        return (hex(vma.start), hex(vma.end), vma.prot, vma.flags & 0x23, file, vma.offset, vma.shared)

    def run(self, number, name, args, kwargs):
        """One call on one address space: (what came of it, the hooks it fired)."""
        self.fired, self.running = [], self.spaces.get(number)
        args = [self.convert(arg) for arg in args]
        kwargs = {key: self.convert(value) for key, value in kwargs.items()}
        try:
            if name == "new":
                result = self.add(self.impl.AddressSpace(self.mem, **self.options))
            elif name == "write_file":
                file, *args = args
                result = file.write(*args)
            elif name == "fork":
                result = self.add(self.running.fork())
            else:
                result = getattr(self.running, name)(*args, **kwargs)
        except OSError as error:
            result = "OSError", errno.errorcode[error.errno]
        except MemoryError:
            result = ("MemoryError",)
        except (self.impl.SegmentationFault, self.impl.BusError) as error:
            result = type(error).__name__, hex(error.address), error.completed
        if name == "exit":
            del self.spaces[number]
        return result, self.fired

    def convert(self, arg):
        """Files and ops are named by a pair in a program: each side has its own."""
        kind, *index = arg if isinstance(arg, tuple) else (None,)
        return {"file": self.files, "ops": self.ops}[kind][index[0]] if kind else arg

    def state(self):
        """What can be seen without changing it, and the frames behind the present pages."""
        vmas, pages, frames = {}, {}, []
        for number, mm in self.spaces.items():
            vmas[number] = [self.describe(vma) for vma in mm.vmas()]
            pages[number] = {}
            for vma in mm.vmas():
                rows = mm.pagemap(vma.start, vma.end - vma.start)
                for at, (*looks, zero, pfn) in enumerate(rows[[*LOOK, "swapped", "zero", "pfn"]].tolist()):
                    if looks[0]:
                        pages[number][hex(vma.start + at * PAGE)] = *looks, zero
                        if not zero:
                            frames.append(pfn)
        return {"vmas": vmas, "pages": pages, "frames": self.mem.stats["frames_used"],
                "files": [file.read(0, file.size) for file in self.files],
                "stats": {number: mm.stats for number, mm in self.spaces.items()}}, frames

    def check_invariants(self):
        if hasattr(self.impl, "check"):
            self.impl.check(self.mem, *self.spaces.values(), files=self.files)
        else:
            for mm in self.spaces.values():
                self.impl._core.check_space(mm)
            self.impl._core.check_memory(self.mem, list(self.spaces.values()))

    def mapped_at(self, pfn):
        return sorted((self.number(mm), addr) for mm, addr in self.mem.mappings(pfn))


def brief(value):
    """A value, short enough for a listing."""
    if type(value) is bytes and len(value) > 8:
        return f"{value[:1]} * {len(value)}" if len(set(value)) == 1 else f"{value[:8]}... ({len(value)} bytes)"
    return hex(value) if type(value) is int and value > 9 else str(value)


def same(what, got, expected):
    """Assert that both are equal; say where they first are not."""
    if got == expected:
        return
    if type(expected) is dict and set(got) == set(expected):
        for key in expected:
            same(f"{what}: {key}", got[key], expected[key])
    if type(expected) in (list, bytes):
        at = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), min(len(got), len(expected)))
        what, got, expected = f"{what} [{at}]", got[at:at + 3], expected[at:at + 3]
    raise AssertionError(f"{what}: got {got}, expected {expected}")


def compare(ours, theirs):
    """Everything that can be seen must be the same on both sides, up to the names of the frames."""
    (expected, our_frames), (got, their_frames) = ours.state(), theirs.state()
    for what in expected:
        same(what, got[what], expected[what])
    pairs = set(zip(our_frames, their_frames))
    assert len(pairs) == len(set(our_frames)) == len(set(their_frames)), f"other pages share frames: {pairs}"
    for our, their in pairs:
        same("the reverse map", theirs.mapped_at(their), ours.mapped_at(our))


class Run:
    """A program running on several implementations in step; the first one says what is right."""

    def __init__(self, implementations, frames=4096, max_map_count=65530, rlimits=None):
        self.sides = [Side(impl, frames, max_map_count, rlimits) for impl in implementations]
        self.text = []

    @property
    def alive(self):
        return list(self.sides[0].spaces)

    def call(self, space, name, args, kwargs):
        """One call on the space-th address space of those alive."""
        number = self.alive[space % len(self.alive)] if self.alive else None
        if number is None and name not in ("new", "write_file"):
            return
        ours, *others = self.sides
        said = [brief(arg) for arg in args] + [f"{key}={brief(value)}" for key, value in kwargs.items()]
        self.text.append(f"mm{number}.{name}({', '.join(said)})")
        expected = ours.run(number, name, args, kwargs)
        self.text.append(f"    -> {brief(expected[0])}, hooks: {[fired[:2] for fired in expected[1]]}")
        ours.check_invariants()
        for side in others:
            got = side.run(number, name, args, kwargs)
            same("the result", got[0], expected[0])
            same("the hooks", got[1], expected[1])
            compare(ours, side)
            side.check_invariants()


def smallest(implementations, limits, calls):
    """Leave out of a failing program what it does not need to fail. The listing of what is left, and how it fails."""
    def run(calls):
        program = Run(implementations, **limits)
        try:
            for call in calls:
                program.call(*call)
        except Exception as error:
            return "\n".join([*program.text, f"{type(error).__name__}: {error}"])
        return None

    size = len(calls)
    while size:
        at = 0
        while at < len(calls):
            fewer = calls[:at] + calls[at + size:]
            if run(fewer):
                calls = fewer
            else:
                at += size
        size //= 2
    return run(calls)


# --- choosing calls ---------------------------------------------------------------------------------

spaces = st.integers(0, SPACES - 1)
addresses = st.one_of(       # in the arena, or where a VMA starts or ends: ("start", which VMA, bytes from there)
    st.integers(0, ARENA_PAGES - 1).map(lambda page: ARENA + page * PAGE),
    st.tuples(st.sampled_from(["start", "end"]), st.integers(0, 5), st.sampled_from([0, 0, PAGE, -PAGE])))
lengths = st.integers(1, 8).map(lambda pages: pages * PAGE)
short_lengths = st.integers(1, 3).map(lambda pages: pages * PAGE)
prots = st.sampled_from([3, 3, 3, 1, 1, 0, 5, 2])
files = st.integers(0, len(FILE_SIZES) - 1).map(lambda i: ("file", i))
all_ops = st.integers(0, 2).map(lambda i: ("ops", i))
FIXED = model.MAP_FIXED


def plus(addr, n):
    return addr + n if isinstance(addr, int) else (*addr[:-1], addr[-1] + n)


STEPS = []


def step(weight=1, **strategies):
    """Mark a method of `Program` as a step that may be chosen, with these arguments."""
    def mark(method):
        STEPS.extend([st.tuples(st.just(method), st.fixed_dictionaries(strategies))] * weight)
        return method
    return mark


class Program:
    """Turns steps into calls on address spaces that are alive and addresses that are interesting."""

    def __init__(self, implementations, limits):
        self.run = Run(implementations, **limits)
        self.calls = []

    @property
    def alive(self):
        return self.run.alive

    def call(self, space, name, *args, **kwargs):
        args = [self.resolve(space, arg) for arg in args]
        kwargs = {key: self.resolve(space, value) for key, value in kwargs.items()}
        self.calls.append((space, name, args, kwargs))
        self.run.call(*self.calls[-1])

    def resolve(self, space, arg):
        if not isinstance(arg, tuple) or arg[0] not in ("start", "end"):
            return arg
        edge, which, offset = arg
        alive = self.alive
        vmas = self.run.sides[0].spaces[alive[space % len(alive)]].vmas() if alive else []
        return max(PAGE, getattr(vmas[which % len(vmas)], edge) + offset) if vmas else ARENA

    # --- mapping

    @step(2, space=spaces, addr=addresses, length=lengths, prot=prots, populate=st.booleans(),
          flags=st.sampled_from([FIXED, FIXED, FIXED, 0, model.MAP_FIXED_NOREPLACE]), shared=st.booleans())
    def map_anonymous(self, space, addr, length, prot, populate, flags, shared):
        flags |= model.MAP_ANONYMOUS | (model.MAP_SHARED if shared else model.MAP_PRIVATE)
        self.call(space, "mmap", length, prot, flags | (model.MAP_POPULATE if populate else 0), addr=addr)

    @step(3, space=spaces, addr=addresses, length=lengths, prot=prots,
          extra=st.sampled_from([0, 0, 0, model.MAP_NORESERVE, model.MAP_STACK, model.MAP_POPULATE]))
    def map_private(self, space, addr, length, prot, extra):
        self.call(space, "mmap", length, prot, model.MAP_PRIVATE | model.MAP_ANONYMOUS | FIXED | extra, addr=addr)

    @step(2, space=spaces, addr=addresses, length=lengths, prot=prots, file=files, page=st.integers(0, 3),
          shared=st.booleans(), populate=st.booleans())
    def map_file(self, space, addr, length, prot, file, page, shared, populate):
        flags = FIXED | (model.MAP_SHARED if shared else model.MAP_PRIVATE)
        self.call(space, "mmap", length, prot, flags | (model.MAP_POPULATE if populate else 0),
                  addr=addr, file=file, offset=page * PAGE)

    @step(space=spaces, length=lengths, prot=prots, shared=st.booleans(), hint=st.none() | addresses)
    def map_anywhere(self, space, length, prot, shared, hint):
        kind = model.MAP_SHARED if shared else model.MAP_PRIVATE
        self.call(space, "mmap", length, prot, kind | model.MAP_ANONYMOUS, addr=hint)

    @step(2, space=spaces, addr=addresses, length=lengths)
    def munmap(self, space, addr, length):
        self.call(space, "munmap", addr, length)

    @step(space=spaces, pages=st.integers(-1, 8), odd=st.sampled_from([0, 0, 1, 4095]))
    def brk(self, space, pages, odd):
        self.call(space, "brk", HEAP + pages * PAGE + odd)

    @step(space=spaces, file=files, addr=st.none() | addresses, readonly=st.booleans())
    def shmat(self, space, file, addr, readonly):
        self.call(space, "shmat", file, addr, readonly=readonly)

    @step(space=spaces, addr=addresses)
    def shmdt(self, space, addr):
        self.call(space, "shmdt", addr)

    # --- changing

    @step(3, space=spaces, addr=addresses, length=lengths, prot=prots)
    def mprotect(self, space, addr, length, prot):
        self.call(space, "mprotect", addr, length, prot)

    @step(2, space=spaces, addr=addresses, prots=st.tuples(prots, prots), write=st.booleans())
    def mprotect_and_back(self, space, addr, prots, write):
        for prot in prots:
            self.call(space, "mprotect", addr, PAGE, prot)
            self.call(space, "touch", addr, write=write)

    @step(2, space=spaces, addr=addresses, length=lengths,
          advice=st.sampled_from([4, 4, 4, 8, 0, 1, 2, 3, 10, 11, 14, 15, 16, 17]))
    def madvise(self, space, addr, length, advice):
        self.call(space, "madvise", addr, length, advice)

    @step(space=spaces, addr=addresses, length=lengths, flags=st.sampled_from([4, 1, 0, 6, 5]))
    def msync(self, space, addr, length, flags):
        self.call(space, "msync", addr, length, flags)

    @step(2, space=spaces, addr=addresses, old=short_lengths, new=short_lengths, move=st.booleans())
    def resize(self, space, addr, old, new, move):
        self.call(space, "mremap", addr, old, new, model.MREMAP_MAYMOVE if move else 0)

    @step(4, space=spaces, addr=addresses, length=short_lengths, to=addresses, grow=st.sampled_from([0, 0, PAGE, -PAGE]),
          flags=st.sampled_from([3, 3, 3, 2]))
    def move(self, space, addr, length, to, grow, flags):
        self.call(space, "mremap", addr, length, length + grow, flags, to)

    @step(space=spaces, call=st.sampled_from([
        ("mmap", 0), ("mmap", 1 << 47), ("mmap", PAGE, 3, 0x22 | FIXED, {"addr": ARENA + 1}),
        ("mmap", PAGE, 3, 0x20), ("mmap", PAGE, 3, 0x23), ("mmap", PAGE, 3, 2, {"file": ("file", 0), "offset": 1}),
        ("mmap", PAGE, 3, 0x22 | FIXED, {"addr": model.TASK_SIZE}), ("munmap", ARENA + 1, PAGE), ("munmap", ARENA, 0),
        ("munmap", ARENA, 1 << 48), ("mprotect", ARENA + 1, PAGE, 3), ("mprotect", ARENA, 0, 3),
        ("mprotect", ARENA, PAGE, 64), ("madvise", ARENA + 1, PAGE, 4), ("madvise", ARENA, PAGE, 77),
        ("madvise", ARENA, 0, 4), ("msync", ARENA + 1, PAGE), ("msync", ARENA, 0), ("msync", ARENA, PAGE, 8),
        ("mremap", ARENA + 1, PAGE, PAGE), ("mremap", ARENA, PAGE, 0), ("mremap", ARENA, 0, PAGE),
        ("mremap", ARENA, PAGE, 1 << 48), ("mremap", ARENA, PAGE, PAGE, 8), ("mremap", ARENA, 0, PAGE, 3, ARENA + 8 * PAGE),
        ("mremap", ARENA, PAGE, PAGE, 3, ARENA + 5), ("mremap", ARENA, PAGE, PAGE, 3, model.TASK_SIZE), ("shmdt", ARENA + 1),
        ("register_ops", ("ops", 0), ARENA + 1, PAGE), ("register_ops", ("ops", 0), ARENA, 0), ("brk",), ("brk", 1),
        ("read", 0, 1), ("read", ARENA, 0), ("touch", ARENA, 0), ("mprotect", ARENA, 1, 1), ("munmap", ARENA, 1),
        ("unregister_ops", ("ops", 0), ARENA + 1, PAGE),
    ]))
    def at_the_edges(self, space, call):
        name, *args = call
        kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        self.call(space, name, *args, **kwargs)

    # --- access

    @step(2, space=spaces, addr=addresses, offset=st.integers(0, PAGE - 1), n=st.integers(1, 3 * PAGE))
    def read(self, space, addr, offset, n):
        self.call(space, "read", plus(addr, offset), n)

    @step(4, space=spaces, addr=addresses, offset=st.integers(0, PAGE - 1), byte=st.integers(1, 255),
          n=st.integers(1, 3 * PAGE))
    def write(self, space, addr, offset, byte, n):
        self.call(space, "write", plus(addr, offset), bytes([byte]) * n)

    @step(3, space=spaces, addr=addresses, length=lengths, write=st.booleans(), offset=st.sampled_from([0, 0, 5]))
    def touch(self, space, addr, length, write, offset):
        self.call(space, "touch", plus(addr, offset), length, write=write)

    @step(file=files, offset=st.integers(0, 50), data=st.binary(min_size=1, max_size=8))
    def write_file(self, file, offset, data):
        size = FILE_SIZES[file[1]]
        offset = offset * PAGE // 10 % size
        self.call(0, "write_file", file, offset, data[:size - offset])

    # --- processes and ops

    @step(2, space=spaces)
    def fork(self, space):
        if len(self.alive) < SPACES:
            self.call(space, "fork")

    @step(space=spaces)
    def exit(self, space):
        self.call(space, "exit")
        if len(self.alive) < 2:
            self.call(0, "new")

    @step(2, space=spaces, ops=all_ops)
    def register(self, space, ops):
        self.call(space, "register_ops", ops)

    @step(3, space=spaces, ops=all_ops, addr=addresses, length=lengths)
    def register_range(self, space, ops, addr, length):
        self.call(space, "register_ops", ops, addr, length)

    @step(space=spaces, ops=all_ops)
    def unregister(self, space, ops):
        self.call(space, "unregister_ops", ops)

    @step(2, space=spaces, ops=all_ops, addr=addresses, length=lengths)
    def unregister_range(self, space, ops, addr, length):
        self.call(space, "unregister_ops", ops, addr, length)

    # --- a little to start from, and the end

    def start(self, ops, write, forks):
        self.call(0, "mmap", 12 * PAGE, 3, 0x22 | FIXED, addr=ARENA + 2 * PAGE)
        if write:
            self.call(0, "write", ARENA + 3 * PAGE, b"f" * (5 * PAGE))
        if ops:
            self.call(0, "register_ops", ("ops", 1))
            self.call(0, "register_ops", ("ops", 0), ARENA + 4 * PAGE, 6 * PAGE)
        for _ in range(forks):
            self.call(0, "fork")

    def end(self):
        """Read everything readable, then end everything: contents are the same, and no frame is left."""
        for space, number in enumerate(self.alive):
            for vma in self.run.sides[0].spaces[number].vmas():
                if vma.prot:
                    self.call(space, "read", vma.start, vma.end - vma.start)
        for _ in self.alive:
            self.call(0, "exit")


def failure(implementations, limits, examples, seed_):
    """Run random programs. None, or the listing of the smallest one found on which the implementations differ."""
    failed = []

    @seed(seed_)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(begin=st.fixed_dictionaries({"ops": st.booleans(), "write": st.booleans(), "forks": st.integers(0, 2)}),
           steps=st.lists(st.one_of(STEPS), min_size=30, max_size=50))
    def search(begin, steps):
        program = Program(implementations, limits)
        try:
            program.start(**begin)
            for method, arguments in steps:
                method(program, **arguments)
            program.end()
        except Exception:
            failed[:] = program.calls
            raise

    try:
        search()
    except Exception:
        if not failed:
            raise
        return f"seed {seed_}\n" + (smallest(implementations, limits, failed) or "it passed when run again")
    return None
