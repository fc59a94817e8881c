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
from model import HUGE, PAGE

ARENA, ARENA_PAGES = 0x10000000, 24
HEAP = ARENA + 16 * PAGE            # brk starts inside the arena and runs into what is mapped there
FILES = [(5 * PAGE, False), (2 * PAGE + 100, False), (1, False), (6 * PAGE, True), (PAGE + 7, True)]     # size, memfd
DEVICE = 0x100000                   # a page frame number of device memory
HUGE_ARENA, HUGE_SLOTS = 0x20000000, 6      # for huge pages, of which few are enough
SPACES = 6                          # address spaces alive at once
LOOK = ["present", "swapped", "writable", "dirty", "young", "shared"]


class Side:
    """One implementation, running one program."""

    def __init__(self, impl, limits):
        self.impl = impl
        options = {"start_brk": HEAP, "rlimits": {"STACK": 8 << 20}, **limits}     # else a stack may grow over half the world
        memory = {name: options.pop(name) for name in ("frames", "swap_slots", "huge_pages") if name in limits}
        self.mem = impl.PhysicalMemory(**{"frames": 4096, **memory})
        self.files = [impl.File(self.mem, size, memfd=memfd) for size, memfd in FILES]
        if "huge_pages" in limits:
            self.files.append(impl.File(self.mem, 2 * HUGE, huge=True))
        self.options = options
        self.spaces = {}            # number -> address space, those alive
        self.shares = {}            # number -> the number of the one whose memory it has: another's after vfork
        self.born = 0
        self.pins = []              # page frame numbers, per call that pinned them
        self.fired = []             # hooks of the running call
        self.ops = {}               # (number, which) -> Ops: each address space has its own, so that it can be looked at
        self.core = getattr(impl, "_core", None)
        if self.core:
            self.core.watch_victims(self.mem)
        self.add(impl.AddressSpace(self.mem, **self.options))

    def add(self, mm, shares=None):
        self.spaces[self.born] = mm
        self.shares[self.born] = self.born if shares is None else self.shares[shares]
        self.born += 1
        return self.born - 1

    def named_ops(self, number, which):
        """The ops of an address space: two that hear all nine hooks, one that hears three."""
        home = self.shares[number]
        if (home, which) not in self.ops:
            kinds = ["invalidate_range", "update_page", "release"] if which == 2 else model.CALLBACKS
            self.ops[home, which] = self.impl.Ops(name=str(which), **{kind: self.recorder(kind, home, which) for kind in kinds})
        return self.ops[home, which]

    def recorder(self, kind, home, which):
        def release(mm):
            self.fired.append((kind, which, home, self.shares[self.number(mm)]))

        def record(vma, *args):
            start, end = args[:2] if len(args) > 1 else (args[0], args[0] + PAGE)
            mm = next(mm for number, mm in self.spaces.items() if self.shares[number] == home)
            rows = mm.pagemap(start, end - start)[LOOK]
            seen = (rows if len(rows) < 512 else rows[::61]).tolist()
            self.fired.append((kind, which, home, self.describe(vma), args, seen))
        return release if kind == "release" else record

    def number(self, mm):
        return next(number for number, space in self.spaces.items() if space is mm)

    def home(self, mm):
        return self.shares[self.number(mm)] if mm else None     # the child of a fork that failed

    def describe(self, vma):
        file = next((i for i, file in enumerate(self.files) if file is vma.file), None)
        assert (file is None) == (vma.file is None)
        return (hex(vma.start), hex(vma.end), vma.prot, vma.flags & 0x40023, file, vma.offset, vma.shared)

    def run(self, number, name, args, kwargs):
        """One call on one address space: (what came of it, the hooks it fired)."""
        self.fired = []
        space = self.spaces.get(number)
        try:
            args = [self.convert(number, arg) for arg in args]
            kwargs = {key: self.convert(number, value) for key, value in kwargs.items()}
            result = self.perform(number, space, name, args, kwargs)
        except OSError as error:
            result = "OSError", errno.errorcode[error.errno]
        except (MemoryError, ValueError) as error:
            result = (type(error).__name__.replace("OutOfFrames", "MemoryError"),)
        except (self.impl.SegmentationFault, self.impl.BusError) as error:
            result = type(error).__name__, hex(error.address), error.completed
        if name == "exit":
            del self.spaces[number]
        fired = self.fired
        if name in ("truncate", "punch_hole") or name == "madvise" and args[-1] == model.MADV_REMOVE:
            # several VMAs, in any order: which is first decides whether its pages are still mapped elsewhere
            fired = sorted([(*hook[:-1], [look[:-1] for look in hook[-1]]) for hook in fired], key=str)
        return result, fired

    def perform(self, number, space, name, args, kwargs):
        if name == "new":
            return self.add(self.impl.AddressSpace(self.mem, **self.options))
        if name in ("fork", "vfork"):
            child = getattr(space, name)()
            return self.add(child, number if name == "vfork" else None)
        if name in ("truncate", "punch_hole", "write_file"):
            file, *args = args
            return getattr(file, name.replace("_file", ""))(*args)
        if name == "reclaim":
            return self.mem.reclaim(*args)
        if name == "pin":
            self.pins.append(self.mem.pin(space, *args, **kwargs))
            return len(self.pins[-1])
        if name == "unpin":
            return self.mem.unpin(self.pins.pop(args[0] % len(self.pins))) if self.pins else None
        result = getattr(space, name)(*args, **kwargs)
        if name == "exec":
            self.shares[number] = self.born
            self.born += 1
        return result

    def convert(self, number, arg):
        """Files and ops are named by a pair in a program: each side has its own."""
        kind, index = arg if isinstance(arg, tuple) else (None, None)
        return self.files[index] if kind == "file" else self.named_ops(number, index) if kind == "ops" else arg

    # --- what reclaim took: per frame (file, page number, mappings); the file of an anonymous page is None

    def victims(self):
        """The core's, per run of reclaim during the last call, in terms that hold on each side."""
        def named(what):        # an address in a space, or a file
            return (self.home(what[0]), what[1]) if isinstance(what, tuple) else self.files.index(what)

        runs = [[]]
        for kind, *what in self.core.victims(self.mem) if self.core else ():
            if kind == "batch":
                runs.append([])
            elif kind == "file":    # shared anonymous memory is named by where it is mapped
                runs[-1].append((named(what[0]), what[1], [named(where) for where in what[2]]))
            else:
                runs[-1].append((None, 0, [named(where) for where in what[0]]))
        return runs

    def set_victims(self, runs):
        """Tell the model what to reclaim."""
        homes = {home: self.spaces[number].mm for number, home in self.shares.items() if number in self.spaces}

        def found(what):
            # one that the model does not have is the child that this very call makes
            return (homes.get(what[0]), what[1]) if isinstance(what, tuple) else None if what is None else self.files[what]

        self.mem.victims = [[(found(file), number, [found(where) for where in mappings])
                             for file, number, mappings in run] for run in runs]

    def age(self, other):
        """Which accessed bits a search for victims clears is no rule: the model takes it from the other side."""
        for number, mm in self.spaces.items():
            for vma in mm.vmas():
                young = other.spaces[number].pagemap(vma.start, vma.end - vma.start)["young"]
                for page, pte in mm.mm._present(vma.start, vma.end).items():
                    pte.young = pte.young and bool(young[(page - vma.start) // PAGE])

    def reclaimed(self):
        """What the model has reclaimed during the last call."""
        log, self.mem.log = self.mem.log, []
        return [(self.files.index(file) if file in self.files else None, number,
                 [(self.home(mm.face), addr) for mm, addr in mappings]) for file, number, mappings in log]

    def state(self):
        """What can be seen without changing it, and the frames behind the present pages."""
        vmas, pages, frames = {}, {}, []
        for number, mm in self.spaces.items():
            vmas[number] = [self.describe(vma) for vma in mm.vmas()]
            pages[number] = {}
            for vma in mm.vmas():
                rows = mm.pagemap(vma.start, vma.end - vma.start)
                there = (rows["present"] | rows["swapped"]).nonzero()[0]
                if vma.flags & model.MAP_HUGETLB:
                    there = there[there % 512 == 0]
                for at, (*looks, zero, pfn) in zip(there.tolist(), rows[there][[*LOOK, "zero", "pfn"]].tolist()):
                    pages[number][hex(vma.start + at * PAGE)] = *looks, zero
                    if looks[0] and not zero and pfn < DEVICE:
                        frames.append(pfn)
        frames += [pfn for pins in self.pins for pfn in pins.tolist() if pfn]
        return {"vmas": vmas, "pages": pages, "memory": self.mem.stats, "file sizes": [file.size for file in self.files],
                "files": [file.read(0, file.size) for file in self.files[:len(FILES)]],
                "huge file": [file.read(at, 64) for file in self.files[len(FILES):] for at in range(0, file.size, HUGE)],
                "stats": {number: mm.stats for number, mm in self.spaces.items()}}, frames

    def check_invariants(self):
        spaces = list({self.shares[number]: mm for number, mm in self.spaces.items()}.values())
        if not self.core:
            self.impl.check(self.mem, *spaces, files=self.files)
        else:
            for mm in spaces:
                self.core.check_space(mm)
            self.core.check_memory(self.mem, spaces)

    def mapped_at(self, pfn):
        return sorted((self.home(mm), addr) for mm, addr in self.mem.mappings(pfn))


def steadily(hooks):
    """Without what a look during reclaim may find either way: accessed bits, and who else maps the page still."""
    steady = LOOK.index("young")
    return [hook if hook[0] == "release" else (*hook[:-1], [look[:steady] for look in hook[-1]]) for hook in hooks]


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
    for counts, model_counts in (got["memory"], expected["memory"]), *zip(got["stats"].values(), expected["stats"].values()):
        for name in set(counts) - set(model_counts):
            del counts[name]        # the core counts more
    for what in expected:
        same(what, got[what], expected[what])
    pairs = set(zip(our_frames, their_frames))
    assert len(pairs) == len(set(our_frames)) == len(set(their_frames)), f"other pages share frames: {pairs}"
    for our, their in pairs:
        same("the reverse map", theirs.mapped_at(their), ours.mapped_at(our))


class Run:
    """A program running on several implementations in step; the first one, the model, says what is right."""

    def __init__(self, implementations, **limits):
        self.sides = [Side(impl, limits) for impl in implementations]
        self.text = []

    @property
    def alive(self):
        return list(self.sides[0].spaces)

    def call(self, space, name, args, kwargs):
        """One call on the space-th address space of those alive."""
        number = self.alive[space % len(self.alive)] if self.alive else None
        if number is None and name not in ("new", "write_file", "truncate", "punch_hole", "reclaim", "unpin"):
            return
        model_side, *others = self.sides
        said = [brief(arg) for arg in args] + [f"{key}={brief(value)}" for key, value in kwargs.items()]
        self.text.append(f"mm{number}.{name}({', '.join(said)})")
        # The others first: the model has no policy, and reclaims what they reclaimed.
        got = [side.run(number, name, args, kwargs) for side in others]
        went = [side.victims() for side in others]
        if others:
            model_side.set_victims(went[0][1:])
        expected = model_side.run(number, name, args, kwargs)
        self.text.append(f"    -> {brief(expected[0])}, hooks: {[fired[:2] for fired in expected[1]]}")
        model_side.check_invariants()
        reclaimed = model_side.reclaimed()
        for side, (result, hooks), runs in zip(others, got, went):
            expected_hooks = expected[1]
            same("the result", result, expected[0])
            if len(runs) > 1:
                model_side.age(side)
                hooks, expected_hooks = steadily(hooks), steadily(expected[1])
            same("the hooks", hooks, expected_hooks)
            same("what was reclaimed", [(None if isinstance(file, tuple) else file, *what) for file, *what in sum(runs, [])],
                 reclaimed)
            same("runs of reclaim that the model does not need", model_side.mem.victims, [])
            compare(model_side, side)
            side.check_invariants()


def smallest(implementations, limits, calls, runs=Run):
    """Leave out of a failing program what it does not need to fail. The listing of what is left, and how it fails."""
    def run(calls):
        program = runs(implementations, **limits)
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
prots = st.sampled_from([3, 3, 3, 1, 1, 0, 5, 2, 7])
files = st.integers(0, len(FILES) - 1).map(lambda i: ("file", i))
all_ops = st.integers(0, 2).map(lambda i: ("ops", i))
slots = st.integers(0, HUGE_SLOTS - 1).map(lambda slot: HUGE_ARENA + slot * HUGE)
odd_pages = st.sampled_from([0, 0, 0, 0, PAGE, -PAGE])
FIXED = model.MAP_FIXED


def plus(addr, n):
    return addr + n if isinstance(addr, int) else (*addr[:-1], addr[-1] + n)


STEPS = []      # (name, weight, strategy)


def step(weight=1, among=STEPS, **strategies):
    """Mark a method of `Program` as a step that may be chosen, with these arguments."""
    def mark(method):
        among.append((method.__name__, weight, st.tuples(st.just(method), st.fixed_dictionaries(strategies))))
        return method
    return mark


def steps(often, among=STEPS):
    """Any step; those named in `often` four times as often as else."""
    known = {name: strategy for name, _, strategy in among}     # one_of would take each once, whatever its weight
    names = [name for name, weight, _ in among for _ in range(max(weight, 1) * 4 if name in often else weight)]
    return st.sampled_from(names).flatmap(known.get)


class Program:
    """Turns steps into calls on address spaces that are alive and addresses that are interesting."""

    steps = STEPS
    runs = Run

    def __init__(self, implementations, limits):
        self.run = self.runs(implementations, **limits)
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
          flags=st.sampled_from([FIXED, FIXED, FIXED, 0, model.MAP_FIXED_NOREPLACE, FIXED | model.MAP_LOCKED]),
          shared=st.booleans())
    def map_anonymous(self, space, addr, length, prot, populate, flags, shared):
        flags |= model.MAP_ANONYMOUS | (model.MAP_SHARED if shared else model.MAP_PRIVATE)
        self.call(space, "mmap", length, prot, flags | (model.MAP_POPULATE if populate else 0), addr=addr)

    @step(3, space=spaces, addr=addresses, length=lengths, prot=prots,
          extra=st.sampled_from([0, 0, 0, 0, model.MAP_NORESERVE, model.MAP_STACK, model.MAP_POPULATE, model.MAP_GROWSDOWN,
                                 model.MAP_LOCKED]))
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

    @step(space=spaces, length=lengths, prot=prots, hint=st.none() | addresses, page=st.integers(0, 3))
    def map_device(self, space, length, prot, hint, page):
        self.call(space, "mmap_device", length, DEVICE + page, prot, addr=hint)

    @step(space=spaces, length=lengths, prot=prots, hint=st.none() | addresses)
    def zeromap(self, space, length, prot, hint):
        self.call(space, "zeromap", length, prot, addr=hint)

    @step(2, space=spaces, addr=addresses, length=short_lengths, page=st.integers(0, 6))
    def remap_file_pages(self, space, addr, length, page):
        self.call(space, "remap_file_pages", addr, length, page)

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
          advice=st.sampled_from([4, 4, 4, 8, 8, 0, 1, 2, 3, 9, 9, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 21, 22, 23]))
    def madvise(self, space, addr, length, advice):
        self.call(space, "madvise", addr, length, advice)

    @step(2, space=spaces, addr=addresses, length=lengths)
    def mlock(self, space, addr, length):
        self.call(space, "mlock", addr, length)

    @step(2, space=spaces, addr=addresses, length=lengths)
    def munlock(self, space, addr, length):
        self.call(space, "munlock", addr, length)

    @step(space=spaces, addr=addresses, length=lengths, flags=st.sampled_from([4, 1, 0, 6, 5]))
    def msync(self, space, addr, length, flags):
        self.call(space, "msync", addr, length, flags)

    @step(2, space=spaces, addr=addresses, old=short_lengths, new=short_lengths, move=st.booleans())
    def resize(self, space, addr, old, new, move):
        self.call(space, "mremap", addr, old, new, model.MREMAP_MAYMOVE if move else 0)

    @step(4, space=spaces, addr=addresses, length=short_lengths, to=addresses, grow=st.sampled_from([0, 0, PAGE, -PAGE]),
          flags=st.sampled_from([3, 3, 3, 2, 5, 7]))
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
        ("unregister_ops", ("ops", 0), ARENA + 1, PAGE), ("mlock", ARENA + 1, PAGE), ("mlock", ARENA, 0), ("munlock", ARENA, 0),
        ("mlock", ARENA, (1 << 64) - PAGE), ("mlock", ARENA, (1 << 64) - 1), ("mprotect", ARENA, 2 * PAGE, 0x01000003),
        ("mmap", PAGE, 3, 0x121), ("mremap", ARENA, PAGE, PAGE, 5), ("mremap", ARENA, PAGE, 2 * PAGE, 5),
        ("remap_file_pages", ARENA, 1, 0), ("remap_file_pages", ARENA + 7, PAGE + 7, 1),
        ("remap_file_pages", ARENA, PAGE, 1 << 52), ("remap_file_pages", ARENA, PAGE, (1 << 64) - 1),
        ("mmap_device", 0, DEVICE), ("zeromap", 0), ("pin", ARENA + 1, PAGE),
        ("pin", ARENA, 0), ("read", 1 << 47, 1), ("read", (1 << 47) - 2, 5), ("write", (1 << 64) - 3, b"abcdef"),
        ("touch", 1 << 63, PAGE), ("touch", (1 << 64) - PAGE, PAGE),
        ("mmap", PAGE, 3, 1, {"file": ("file", 0), "offset": 1 << 63}),
        ("madvise", ARENA, PAGE, 22), ("punch_hole", ("file", 0), 0, 0), ("punch_hole", ("file", 0), PAGE, 1 << 60),
        ("reclaim", 0), ("mmap", PAGE, 3, 0x1022),
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

    @step(2, file=files, offset=st.integers(0, 60), data=st.binary(min_size=1, max_size=8))
    def write_file(self, file, offset, data):
        self.call(0, "write_file", file, offset * PAGE // 10, data)

    @step(2, file=files, pages=st.integers(0, 7), odd=st.sampled_from([0, 0, 1, 100, 4095]))
    def truncate(self, file, pages, odd):
        self.call(0, "truncate", file, pages * PAGE + odd)

    @step(file=files, page=st.integers(0, 6), odd=st.sampled_from([0, 0, 1, 4000]), n=st.integers(1, 3 * PAGE) | short_lengths)
    def punch_hole(self, file, page, odd, n):
        self.call(0, "punch_hole", file, page * PAGE + odd, n)

    # --- memory pressure

    @step(3, n=st.sampled_from([1, 1, 2, 5, 40]))
    def reclaim(self, n):
        self.call(0, "reclaim", n)

    @step(2, space=spaces, addr=addresses, length=short_lengths, write=st.booleans())
    def pin(self, space, addr, length, write):
        self.call(space, "pin", addr, length, write=write)

    @step(2, which=st.integers(0, 9))
    def unpin(self, which):
        self.call(0, "unpin", which)

    @step(space=spaces, addr=addresses, below=st.integers(1, 5), write=st.booleans())
    def touch_below(self, space, addr, below, write):
        self.call(space, "touch", plus(addr, -below * PAGE), write=write)

    @step(space=spaces, addr=addresses, length=lengths, prot=prots)
    def protect_stack(self, space, addr, length, prot):
        self.call(space, "mprotect", addr, length, prot | model.PROT_GROWSDOWN)

    # --- processes and ops

    @step(2, space=spaces)
    def fork(self, space):
        if len(self.alive) < SPACES:
            self.call(space, "fork")

    @step(space=spaces)
    def vfork(self, space):
        if len(self.alive) < SPACES:
            self.call(space, "vfork")

    @step(space=spaces)
    def exec(self, space):
        self.call(space, "exec")

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

    # --- huge pages: only in programs that ask for them

    @step(0, space=spaces, at=slots, n=st.integers(1, 2), prot=prots, shared=st.booleans(), file=st.booleans(),
          first=st.integers(0, 1), extra=st.sampled_from([0, 0, 0, model.MAP_NORESERVE, model.MAP_POPULATE, model.MAP_LOCKED]))
    def huge_map(self, space, at, n, prot, shared, file, first, extra):
        flags = extra | FIXED | (model.MAP_SHARED if shared else model.MAP_PRIVATE)
        kwargs = {"file": ("file", len(FILES)), "offset": first * HUGE} if file else {}
        flags |= 0 if file else model.MAP_ANONYMOUS | model.MAP_HUGETLB
        self.call(space, "mmap", n * HUGE, prot, flags, addr=at, **kwargs)

    @step(0, space=spaces, at=slots, page=st.sampled_from([0, 1, 500]), length=lengths)
    def huge_cover(self, space, at, page, length):
        self.call(space, "mmap", length, 3, model.MAP_PRIVATE | model.MAP_ANONYMOUS | FIXED, addr=at + page * PAGE)

    @step(0, space=spaces, at=slots, n=st.integers(1, 3), write=st.booleans())
    def huge_touch(self, space, at, n, write):
        self.call(space, "touch", at + 5, n * HUGE - 10, write=write)

    @step(0, space=spaces, at=slots, byte=st.integers(1, 255))
    def huge_write(self, space, at, byte):
        self.call(space, "write", at + 5, bytes([byte]) * 9)

    @step(0, space=spaces, at=slots)
    def huge_read(self, space, at):
        self.call(space, "read", at + 3, 9)

    @step(0, space=spaces, at=slots, n=st.integers(1, 2), odd=odd_pages,
          call=st.sampled_from(["munmap", "munmap", "mlock", "munlock", "msync"]))
    def huge_range(self, space, at, n, odd, call):
        self.call(space, call, at, n * HUGE + odd)

    @step(0, space=spaces, at=slots, n=st.integers(1, 2), odd=odd_pages, prot=prots)
    def huge_protect(self, space, at, n, odd, prot):
        self.call(space, "mprotect", at, n * HUGE + odd, prot)

    @step(0, space=spaces, at=slots, n=st.integers(1, 2), odd=odd_pages,
          advice=st.sampled_from([4, 4, 9, 9, 10, 11, 22, 23, 8, 20, 21, 3, 16, 17, 18, 19]))
    def huge_advice(self, space, at, n, odd, advice):
        self.call(space, "madvise", at, n * HUGE + odd, advice)

    @step(0, space=spaces, at=slots, old=st.integers(1, 2), new=st.integers(1, 2), to=slots, odd=odd_pages,
          flags=st.sampled_from([0, 1, 3, 3, 3, 7]))
    def huge_move(self, space, at, old, new, to, odd, flags):
        self.call(space, "mremap", at, old * HUGE, new * HUGE + odd, flags, to)

    @step(0, pages=st.integers(0, 4), odd=st.sampled_from([0, 0, 0, PAGE]))
    def huge_truncate(self, pages, odd):
        self.call(0, "truncate", ("file", len(FILES)), pages * HUGE + odd)

    @step(0, page=st.integers(0, 3), odd=odd_pages, n=st.integers(1, 2))
    def huge_hole(self, page, odd, n):
        self.call(0, "punch_hole", ("file", len(FILES)), page * HUGE + odd, n * HUGE)

    @step(0, space=spaces, at=slots, page=st.integers(0, 511), write=st.booleans())
    def huge_pin(self, space, at, page, write):
        self.call(space, "pin", at + page * PAGE, 2 * PAGE, write=write)

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
                size = HUGE if vma.flags & model.MAP_HUGETLB else vma.end - vma.start
                for at in range(vma.start, vma.end, size) if vma.prot else ():
                    self.call(space, "read", at, size if size < HUGE else 64)
        for _ in self.alive:
            self.call(0, "exit")
        for _ in self.run.sides[0].pins[:]:
            self.call(0, "unpin", 0)


def failure(implementations, limits, examples, seed_, often=(), kind=Program):
    """Run random programs. None, or the listing of the smallest one found on which the implementations differ."""
    failed = []

    @seed(seed_)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(begin=st.fixed_dictionaries({"ops": st.booleans(), "write": st.booleans(), "forks": st.integers(0, 2)}),
           chosen=st.lists(steps(often, kind.steps), min_size=30, max_size=50))
    def search(begin, chosen):
        program = kind(implementations, limits)
        try:
            program.start(**begin)
            for method, arguments in chosen:
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
        return f"seed {seed_}\n" + (smallest(implementations, limits, failed, kind.runs) or "it passed when run again")
    return None
