"""Random programs of memory calls and transfers: ioproc's device does exactly what model_device.py's does, and no safe design
lets it use what is stale.

IOPROC_EXAMPLES is the number of programs (shared out among the designs), IOPROC_SEED repeats a run. The report of a failure is
the smallest program found that fails.
"""
import os
import random

import hypothesis.strategies as st
import pytest

import ioproc
import model
import model_device
import sequences
from sequences import PAGE, addresses, failure, lengths, plus, short_lengths, slots, spaces, step

EXAMPLES = int(os.environ.get("IOPROC_EXAMPLES", 300))
SEED = int(os.environ.get("IOPROC_SEED", random.randrange(2**32)))
NIC = {"entries": 8, "ways": 2}
LIMITS = {"frames": 14, "swap_slots": 60}

DESIGNS = {
    **{name: {"attach": design} for name, design in ioproc.DESIGNS.items() if name != "bounce"},
    **{f"{name}/{fork}": {"attach": {**ioproc.DESIGNS[name], "fork": fork}} for fork in ("inherit", "precopy")
       for name in ("mm+fault", "vma+fault", "interval+fault", "mm+pin-cache+hooks", "mm+preload-registered")
       if (name, fork) != ("interval+fault", "precopy")},       # which is refused
    "mm+fault, few frames": {"attach": ioproc.DESIGNS["mm+fault"], **LIMITS},
    "interval+fault, few frames": {"attach": ioproc.DESIGNS["interval+fault"], **LIMITS},
    "mm+preload, few frames": {"attach": ioproc.DESIGNS["mm+preload"], **LIMITS},
    "pin, few frames": {"attach": ioproc.DESIGNS["pin"], **LIMITS},
    "mm+pin-cache+hooks, few frames": {"attach": ioproc.DESIGNS["mm+pin-cache+hooks"], **LIMITS},
    "mm+fault/precopy, few frames": {"attach": {**ioproc.DESIGNS["mm+fault"], "fork": "precopy"}, **LIMITS},
    "pin-cache/precopy, few frames": {"attach": {**ioproc.DESIGNS["pin-cache"], "fork": "precopy"}, **LIMITS},
    "mm+pin-cache+hooks/precopy, huge pages": {
        "attach": {**ioproc.DESIGNS["mm+pin-cache+hooks"], "fork": "precopy"}, "huge_pages": 5, "nic": {**NIC, "page_shift": 21}},
    "mm+fault, prefault": {"attach": {**ioproc.DESIGNS["mm+fault"], "prefault": 3}},
    "vma+fault, prefault": {"attach": {**ioproc.DESIGNS["vma+fault"], "prefault": 3}},
    "interval+fault, prefault": {"attach": {**ioproc.DESIGNS["interval+fault"], "prefault": 3}},
    "interval+fault, batches": {"attach": ioproc.DESIGNS["interval+fault"], "teardown_batch": 2},
    "mm+pin-cache+hooks, limits": {"attach": {**ioproc.DESIGNS["mm+pin-cache+hooks"], "max_regions": 2, "max_bytes": 5 * PAGE}},
    "vma+fault, few VMAs": {"attach": ioproc.DESIGNS["vma+fault"], "max_map_count": 7},
    "bounce": {"attach": {**ioproc.DESIGNS["bounce"], "bounce_bytes": 2 * PAGE}},
    "bounce, few frames": {"attach": {**ioproc.DESIGNS["bounce"], "bounce_bytes": 2 * PAGE}, **LIMITS},
    **{f"{name}, huge pages": {"attach": ioproc.DESIGNS[name], "huge_pages": 5, "nic": {**NIC, "page_shift": 21}}
       for name in ("mm+fault", "vma+fault", "interval+fault", "mm+preload", "pin", "mm+pin-cache+hooks")},
    "mm+fault, huge pages in small ones": {"attach": ioproc.DESIGNS["mm+fault"], "huge_pages": 5},
    **{f"{name}, small NIC memory": {"attach": ioproc.DESIGNS[name], "nic": {**NIC, "table_entries": 3}}
       for name in ("mm+fault", "interval+fault", "mm+preload", "pin", "vma+pin-cache+hooks")},
}


class DeviceSide(sequences.Side):
    """One implementation with a device."""

    def __init__(self, impl, limits):
        limits = dict(limits)
        self.design = limits.pop("attach")
        device = model_device if impl is model else impl
        self.error = device.RemoteAccessError
        self.nic = device.Nic(**limits.pop("nic", NIC))
        if impl is model:
            limits.pop("teardown_batch", None)
        self.contexts = {}              # home -> context, of those that are or were attached
        self.registrations = []
        super().__init__(impl, limits)

    def perform(self, number, space, name, args, kwargs):
        context = self.contexts.get(self.shares.get(number))
        try:
            match name:
                case "attach":
                    if context is None or self.is_gone(space, context):
                        self.contexts[self.shares[number]] = self.nic.attach(space, **self.design)
                case "detach":
                    return context and context.detach()
                case "register":
                    if context:
                        self.registrations.append(context.register(*args, **kwargs))
                case "deregister":
                    return self.registrations.pop(args[0] % len(self.registrations)).deregister() if self.registrations else None
                case "rdma_read" | "rdma_write" | "access":
                    return context and getattr(context, name)(*args, **kwargs)
                case "rdma_write_to" | "rdma_read_from":
                    addr, n, (_, other), there = args
                    other = self.contexts.get(self.shares[list(self.spaces)[other % len(self.spaces)]])
                    return context and other and getattr(context, name)(addr, n, other, there)
                case _:
                    result = super().perform(number, space, name, args, kwargs)
                    if name == "fork" and self.design.get("fork") == "inherit" and context and not self.is_gone(space, context):
                        self.contexts[self.shares[result]] = self.nic.context(self.spaces[result])
                    return result
        except self.error as error:
            return "RemoteAccessError", hex(error.address), error.cause, error.completed

    def is_gone(self, space, context):
        try:
            return self.nic.context(space) is not context
        except KeyError:
            return True

    def state(self):
        state, frames = super().state()
        state["device"] = {name: count for name, count in self.nic.stats.items() if count}
        return state, frames


class DeviceRun(sequences.Run):
    def __init__(self, implementations, **limits):
        self.sides = [DeviceSide(impl, limits) for impl in implementations]
        self.text = []
        self.safe = "fork" not in limits["attach"] or limits["attach"]["fork"] != "posted"
        self.safe = self.safe and limits["attach"]["translation"] != "pin-cache"

    def call(self, *call):
        super().call(*call)
        for side in self.sides:
            assert not self.safe or side.nic.stats["violations"] == 0, "a violation"


# Of the process's steps, those that change what a device sees, and how often.
SEEN = {"map_private": 2, "map_anonymous": 2, "map_file": 3, "map_device": 1, "zeromap": 1, "munmap": 4, "brk": 1, "mprotect": 4,
        "mprotect_and_back": 2, "madvise": 4, "mlock": 1, "munlock": 1, "resize": 2, "move": 3, "read": 2, "write": 6, "touch": 4,
        "write_file": 1, "truncate": 2, "punch_hole": 1, "reclaim": 4, "pin": 1, "unpin": 1, "vfork": 1, "exec": 1, "exit": 1,
        "register_range": 1, "unregister_range": 1}
EARLY = st.integers(0, 1) | spaces          # the first two are attached from the start
HOT = st.integers(1, 9).map(lambda page: sequences.ARENA + page * PAGE)
hot = HOT | HOT | HOT | addresses           # where the first mapping is, mostly


HUGE_STEPS = [name for name, *_ in sequences.STEPS if name.startswith("huge_")]
SEEN.update(dict.fromkeys(HUGE_STEPS, 0))


class DeviceProgram(sequences.Program):
    """Steps of the device among those of the process."""

    steps = [(name, SEEN[name], strategy) for name, _, strategy in sequences.STEPS if name in SEEN]
    runs = DeviceRun

    def start(self, ops, write, forks):
        self.call(0, "attach")
        super().start(ops, write, min(forks, 1))
        self.call(1, "attach")

    @step(2, steps, space=EARLY)
    def attach(self, space):
        self.call(space, "attach")

    @step(1, steps, space=spaces)
    def detach(self, space):
        self.call(space, "detach")

    @step(3, steps, space=EARLY, attach=st.booleans())
    def fork_and_attach(self, space, attach):
        if len(self.alive) < sequences.SPACES:
            self.call(space, "fork")
            if attach:
                self.call(len(self.alive) - 1, "attach")

    @step(20, steps, space=EARLY, addr=hot, offset=st.integers(0, PAGE - 1), n=st.integers(1, 3 * PAGE))
    def rdma_read(self, space, addr, offset, n):
        self.call(space, "rdma_read", plus(addr, offset), n)

    @step(25, steps, space=EARLY, addr=hot, offset=st.integers(0, PAGE - 1), n=st.integers(1, 3 * PAGE), byte=st.integers(1, 255))
    def rdma_write(self, space, addr, offset, n, byte):
        self.call(space, "rdma_write", plus(addr, offset), bytes([byte]) * n)

    @step(10, steps, space=EARLY, addr=hot, length=lengths, write=st.booleans())
    def access(self, space, addr, length, write):
        self.call(space, "access", addr, length, write=write)

    @step(25, steps, space=EARLY, page=st.integers(2, 9), before=st.booleans(), byte=st.integers(1, 255),
          change=st.sampled_from([
              ("mprotect", 1), ("mprotect", 1, 3), ("mprotect", 0, 3), ("madvise", 4), ("madvise", 8), ("madvise", 21),
              ("munmap",), ("mmap", 3, 0x32), ("mmap", 3, 0x31), ("mremap",), ("fork",), ("fork", "write"),
              ("write",), ("reclaim",)]))
    def transfers_around(self, space, page, before, byte, change):
        """The device uses a page before and after something happens to it."""
        name, *how = change
        addr = sequences.ARENA + page * PAGE
        self.call(space, "access", addr, PAGE, write=before)
        match name:
            case "mprotect":
                for prot in how:
                    self.call(space, "mprotect", addr, PAGE, prot)
            case "madvise":
                self.call(space, "madvise", addr, PAGE, *how)
            case "munmap":
                self.call(space, "munmap", addr, PAGE)
            case "mmap":
                self.call(space, "mmap", PAGE, *how, addr=addr)
            case "mremap":
                self.call(space, "mremap", addr, PAGE, PAGE, 3, addr + 2 * PAGE)
            case "fork":
                self.fork_and_attach(space, bool(how))
                if how:
                    self.call(space, "write", addr, b"parent")
            case "write":
                self.call(space, "write", addr, b"cpu")
            case "reclaim":
                self.call(space, "reclaim", 40)
        self.call(space, "rdma_read", addr + 5, 9)
        self.call(space, "rdma_write", addr + 9, bytes([byte]) * 9)
        self.call(space, "read", addr, 20)

    @step(4, steps, space=EARLY, other=EARLY, addr=hot, there=hot, n=st.integers(1, 3 * PAGE),
          call=st.sampled_from(["rdma_write_to", "rdma_read_from"]))
    def rdma_between(self, space, other, addr, there, n, call):
        self.call(space, call, addr, n, ("space", other), there)

    @step(4, steps, space=EARLY, addr=hot, length=short_lengths, access=st.sampled_from(["r", "rw"]))
    def register_memory(self, space, addr, length, access):
        self.call(space, "register", addr, length, access)

    @step(4, steps, which=st.integers(0, 9))
    def deregister(self, which):
        self.call(0, "deregister", which)

    @step(0, steps, space=EARLY, at=slots, page=st.sampled_from([0, 1, 511]), n=st.integers(1, 2 * PAGE),
          call=st.sampled_from(["rdma_read", "rdma_write", "access", "register"]), write=st.booleans())
    def huge_transfer(self, space, at, page, n, call, write):
        what = {"rdma_read": [n], "rdma_write": [b"h" * n], "access": [n, write], "register": [n, "rw" if write else "r"]}
        self.call(space, call, at + page * PAGE + 9, *what[call])

    def end(self):
        for _ in self.run.sides[0].registrations[:]:
            self.call(0, "deregister", 0)
        super().end()


@pytest.mark.parametrize("name", DESIGNS)
def test_random_programs(name):
    often = [*HUGE_STEPS, "huge_transfer"] * ("huge_pages" in DESIGNS[name])
    found = failure((model, ioproc), DESIGNS[name], max(2, EXAMPLES // len(DESIGNS)), SEED, often, DeviceProgram)
    if found:
        pytest.fail(f"IOPROC_{found.replace('seed ', 'SEED=', 1)}", pytrace=False)
