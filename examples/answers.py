"""The arguments of the thread of 2005 answered in numbers: the tables of docs/answers.md, which says what they mean.

    python -P answers.py [--quick] [SECTION ...]

Without sections all of them: some two minutes; with --quick fewer histories and sizes, some seconds.  Counts and modelled times
are the same each time; "measured" alone measures.
"""
import argparse
import functools
import math
import os
import statistics
import sys
from collections import namedtuple

import ioproc
from ioproc import workload
from ioproc.bench import duration, histories, percent
from ioproc.trace import Trace, replay

PAGE = 4096
MODERN = ioproc.Cost.of("modern")
CONNECTX = ioproc.Cost.of("connectx-odp")

Run = namedtuple("Run", "stats vmas copies cpu")


@functools.cache
def recorded():
    return dict(histories([]))


def names(quick):
    return ["hpcc", "redis"] if quick else list(recorded())


@functools.cache
def talking(name, share):
    """A recorded history in which so much of its writable memory communicates, in buffers."""
    return workload.communicate(recorded()[name], share)


def run(trace, design, table_entries=None, **attach):
    """A history with a device of this design; None: without."""
    if design is None:
        result = replay(trace)
        return Run({}, result.vmas_peak, result.faults["cow"], result.cpu_seconds)
    with ioproc.Nic(table_entries=table_entries) as nic:
        result = replay(trace, nic=nic, attach=ioproc.DESIGNS[design] | attach)
    return Run(result.device, result.vmas_peak, result.faults["cow"], result.cpu_seconds)


def more(before, after):
    return {name: after[name] - before[name] for name in after}


@functools.cache
def run_recorded(name, share, design):
    return run(talking(name, share), design)


# ---- whole or per VMA

HOOKS = {"invalidate": "fault", "and update": "preload"}        # what the driver listens to, and the design that does


def placement(quick):
    """The whole address space or per VMA: calls, modelled time of calls and attachments, VMAs."""
    for name in names(quick):
        for share in (0.01, 1.0) if quick else (0.01, 0.1, 1.0):
            vmas = run_recorded(name, share, None).vmas
            for hooks, translation in HOOKS.items():
                whole, vma = (run_recorded(name, share, f"{where}+{translation}") for where in ("mm", "vma"))
                interval = run_recorded(name, share, "interval+fault").stats["callbacks"] if translation == "fault" else "-"
                yield {"history": name, "share": share, "hooks": hooks,
                       "calls, whole": whole.stats["callbacks"], "useful": whole.stats["useful"] / whole.stats["callbacks"],
                       "calls, per VMA": vma.stats["callbacks"],
                       "useful, per VMA": vma.stats["useful"] / vma.stats["callbacks"],
                       "attachments": vma.stats["attachments"], "VMAs more": vma.vmas - vmas,
                       "modelled, whole ns": MODERN.model(whole.stats)["callbacks"],
                       "modelled, per VMA ns": MODERN.model(vma.stats)["callbacks"],
                       "calls, interval": interval}


def saved(whole, vma):
    """Calls that per VMA saves, and what one has to cost to be worth the attachments, in ns."""
    calls = whole["callbacks"] - vma["callbacks"]
    return calls, vma["attachments"] * MODERN.vma_attach_ns / calls if calls > 0 else math.inf


def break_even(quick):
    """What a call has to cost for per VMA to cost less, given what attaching costs."""
    size = {"allocations": 2_000, "messages": 2_000} if quick else {}
    traces = {"static": workload.static(messages=size.get("messages", 10_000))}
    for allocator in ("arena", "glibc", "mmap"):
        for share in (0.05, 1.0):
            traces[f"malloc_churn, {allocator}, {percent(100 * share)}"] = workload.malloc_churn(
                allocator, communicating=share, **size)
    tried = {f"{name}, {percent(100 * share)}": functools.partial(run_recorded, name, share)
             for name in names(quick) for share in ((0.01, 1.0) if quick else (0.01, 0.1, 0.5, 1.0))}
    tried |= {name: functools.partial(run, trace) for name, trace in traces.items()}
    for name, of in tried.items():
        row = {"history": name, "attachments": of("vma+fault").stats["attachments"]}
        for hooks, translation in HOOKS.items():
            calls, ns = saved(of(f"mm+{translation}").stats, of(f"vma+{translation}").stats)
            row |= {f"{hooks}: calls saved": calls, f"{hooks}: a call ns": ns}
        yield row


def stops(quick):
    """The share of the memory up to which per VMA costs less, by what a call costs: between two of the shares tried."""
    shares = (0.01, 0.5, 1.0) if quick else (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
    for name in names(quick):
        for hooks, translation in HOOKS.items():
            row = {"history": name, "hooks": hooks}
            evens = [saved(*(run_recorded(name, share, f"{where}+{translation}").stats for where in ("mm", "vma")))[1]
                     for share in shares]
            for call in (MODERN.callback_ns, 50, 500, 5_000, 50_000):
                last = max((share for share, even in zip(shares, evens, strict=True) if even < call), default=None)
                row[f"at {duration(call)} a call"] = (
                    "always more" if last is None else "always less" if last == shares[-1] else
                    f"{percent(100 * last)} to {percent(100 * shares[shares.index(last) + 1])}")
            yield row


def too_many(quick):
    """Separate buffers of a page in one mapping, until the address space has no VMA left."""
    limit = 4096 if quick else 65530
    for design in ("mm+fault", "vma+fault", "interval+fault"):
        mm = ioproc.AddressSpace(ioproc.PhysicalMemory(limit + 64), max_map_count=limit)
        with mm, ioproc.Nic() as nic, nic.attach(mm, **ioproc.DESIGNS[design]) as ctx:
            addr = mm.mmap(2 * limit * PAGE)
            failed = None
            while ctx.stats["transfers"] < limit and failed is None:
                try:
                    ctx.access(addr + 2 * ctx.stats["transfers"] * PAGE, 1)
                except ioproc.RemoteAccessError as error:
                    failed = error.cause
            yield {"design": design, "limit": limit, "buffers": ctx.stats["transfers"] - ctx.stats["errors"],
                   "VMAs": len(mm.vmas()), "then": failed or "-"}


def measured(quick):
    """Processor time that a device adds to a replay, in turns: what the model itself takes here, and no property of a NIC."""
    turns = 3 if quick else 11
    designs = (None, "mm+fault", "vma+fault", "interval+fault", "mm+preload")
    for name in names(quick):
        trace = talking(name, 0.1)
        taken = [[run(trace, design).cpu for design in designs] for _ in range(turns)]
        for i, design in enumerate(designs[1:], 1):
            extra = sorted(1e9 * (turn[i] - turn[0]) / len(trace) for turn in taken)
            yield {"history": name, "design": design, "an event ns": statistics.median(extra),
                   "low ns": extra[len(extra) // 4], "high ns": extra[-1 - len(extra) // 4]}


# ---- update hooks

FIRST = ("mm+fault", "mm+fault:prefault=16", "mm+preload", "mm+preload-registered", "mm+pin-cache+hooks")


def added(ctx, use, *arguments, **options):
    before = ctx.stats
    use(*arguments, **options)
    return more(before, ctx.stats)


def first(quick):
    """A buffer of 64 pages beside 64 that never communicate: its first message, the second, and what the others cost."""
    for design in FIRST:
        name, _, prefault = design.partition(":prefault=")
        mm = ioproc.AddressSpace(ioproc.PhysicalMemory(256))
        with mm, ioproc.Nic() as nic, nic.attach(mm, prefault=int(prefault or 1), **ioproc.DESIGNS[name]) as ctx:
            silent, buffer = mm.mmap(64 * PAGE), mm.mmap(64 * PAGE)
            other = added(ctx, mm.touch, silent, 64 * PAGE, write=True)
            mm.touch(buffer, 64 * PAGE, write=True)
            one, two = (added(ctx, ctx.access, buffer, 64 * PAGE, write=True) for _ in range(2))
        yield {"design": design, "first: NIC faults": one["faults"],
               "first, modern ns": MODERN.model(one)["total"], "first, connectx-odp ns": CONNECTX.model(one)["total"],
               "second, modern ns": MODERN.model(two)["total"], "other pages: calls": other["callbacks"],
               "other pages: each ns": MODERN.model(other)["total"] / 64}


def update(quick):
    """Update hooks on real programs: NIC faults saved, translations loaded and never used, and what a fault must cost to pay."""
    for name in names(quick):
        for share in (0.01, 1.0) if quick else (0.01, 0.1, 1.0):
            fault, preload, registered, vma = (run_recorded(name, share, design).stats for design in (
                "mm+fault", "mm+preload", "mm+preload-registered", "vma+preload"))
            fewer = fault["faults"] - preload["faults"]
            other = {design: MODERN.model(stats)["total"] - MODERN.model(stats)["NIC faults"]
                     for design, stats in (("fault", fault), ("preload", preload))}
            yield {"history": name, "share": share,
                   "faults, fault": fault["faults"], "faults, preload": preload["faults"],
                   "faults, registered": registered["faults"], "faults, vma+preload": vma["faults"],
                   "preloaded": preload["preloaded"], "used": (preload["useful"] - preload["shootdowns"]) / preload["preloaded"],
                   "calls more": preload["callbacks"] - fault["callbacks"],
                   "modelled, fault ns": MODERN.model(fault)["total"], "modelled, preload ns": MODERN.model(preload)["total"],
                   "modelled, registered ns": MODERN.model(registered)["total"],
                   "pays from a fault of ns": (other["preload"] - other["fault"]) / fewer if fewer > 0 else math.inf}


def small(quick):
    """Update hooks where NIC memory is small: what never communicates pushes out what does."""
    for name in names(quick):
        trace = talking(name, 0.1)
        for entries in (None, 4096) if quick else (None, 16384, 4096, 1024):
            fault, preload = (run(trace, design, entries).stats for design in ("mm+fault", "mm+preload"))
            yield {"history": name, "NIC memory": entries or "no limit", "evicted, fault": fault["evicted"],
                   "faults, fault": fault["faults"], "evicted, preload": preload["evicted"], "faults, preload": preload["faults"]}


# ---- ranged callbacks

def ranged(quick):
    """Callbacks that invalidate or restrict, a range at a time, against one for each page that the device has."""
    churn = workload.malloc_churn("mmap", allocations=1_000 if quick else 10_000, messages=1_000)
    tried = {name: functools.partial(run_recorded, name, 1.0) for name in names(quick)}
    for name, of in (tried | {"malloc_churn, mmap": functools.partial(run, churn)}).items():
        for design in ("mm+fault", "mm+preload"):
            stats = of(design).stats
            pages = stats["invalidated"] + stats["downgraded"]
            yield {"history": name, "design": design, "calls": stats["invalidations"], "shootdowns": stats["shootdowns"],
                   "pages": pages, "pages a shootdown": pages / stats["shootdowns"],
                   "modelled, ranged ns": MODERN.model(stats)["invalidation"],
                   "modelled, by page ns": pages * (MODERN.invalidate_ns + MODERN.invalidate_entry_ns)}


# ---- fork

FORKS = ("posted", "revised", "inherit", "precopy")


def fork(quick):
    """A program that forked children save while it communicates: each way to fork, by design."""
    size = {"memory": 8 << 20, "buffers": 8, "messages": 2_000, "checkpoints": 2} if quick else {}
    trace = workload.checkpoint(**size)
    designs = ("mm+fault", "vma+fault", "mm+preload", "mm+preload-registered", "mm+pin-cache+hooks")
    tried = [(design, way) for design in designs for way in FORKS]
    for design, way in [*tried, ("interval+fault", "revised"), ("pin", "-"), ("pin-cache", "-"), ("pin-cache", "precopy"),
                               ("bounce", "-"), (None, "-")]:
        done = run(trace, design, **({} if way == "-" else {"fork": way}))
        stats = done.stats or dict.fromkeys(ioproc.Nic().stats, 0)
        yield {"design": design or "no device", "fork": way, "calls": stats["callbacks"], "NIC faults": stats["faults"],
               "registrations": stats["registrations"], "copied at fork": stats["precopied"], "copied at a write": done.copies,
               "violations": stats["violations"], "modelled ns": MODERN.model(stats)["total"]}


def child(quick):
    """A forked child that sends from 16 buffers of its parent's: what inheriting buys it, and costs at fork."""
    for design in ("mm+fault", "mm+preload-registered", "mm+pin-cache+hooks"):
        for way in ("revised", "inherit"):
            mm = ioproc.AddressSpace(ioproc.PhysicalMemory(4096))
            with mm, ioproc.Nic() as nic, nic.attach(mm, fork=way, **ioproc.DESIGNS[design]) as ctx:
                addr = mm.mmap(512 * PAGE)
                mm.touch(addr, 512 * PAGE, write=True)
                for buffer in range(16):
                    ctx.access(addr + 32 * buffer * PAGE, 16 * PAGE, write=True)
                before = nic.stats
                with mm.fork() as heir:
                    forking = nic.stats
                    own = nic.context(heir) if way == "inherit" else nic.attach(heir, fork=way, **ioproc.DESIGNS[design])
                    for buffer in range(16):
                        own.access(addr + 32 * buffer * PAGE, 16 * PAGE)
                    after = nic.stats
            at_fork, at_first = more(before, forking), more(forking, after)
            yield {"design": design, "fork": way, "at fork: calls": at_fork["callbacks"],
                   "at fork: registrations": at_fork["registrations"], "at fork ns": MODERN.model(at_fork)["total"],
                   "first messages: NIC faults": at_first["faults"], "first messages: registrations": at_first["registrations"],
                   "first messages ns": MODERN.model(at_first)["total"], "violations": after["violations"]}


# ---- static images

def static(quick):
    """When a device on the whole address space is called, and when it loses something: by the share of the time of the run."""
    for name in names(quick):
        trace = talking(name, 0.1)
        times = trace.events["t"]
        parts = {part: Trace(trace.events[times <= times[0] + part * (times[-1] - times[0])], trace.metadata)
                 for part in (0.01, 0.1, 0.5)}
        for design, count in (("mm+preload", "callbacks"), ("mm+fault", "callbacks"), ("mm+pin-cache+hooks", "shootdowns")):
            everything = run(trace, design).stats[count]
            yield {"history": name, "design": design, "count": count, "in all": everything,
                   **{f"by {percent(100 * part)} of its time": run(early, design).stats[count] / everything
                      for part, early in parts.items()}}


SECTIONS = {one.__name__: one for one in (placement, measured, first, update, small, ranged, fork, child, break_even, stops,
                                          too_many, static)}


def cell(column, value):
    if isinstance(value, str):
        return value
    if column.endswith(" ns"):
        return "never" if value == math.inf else duration(value)
    if isinstance(value, float):
        return f"{value:.1f}" if column.startswith("pages") else percent(100 * value)
    return f"{value:,}"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="answers.py", description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"{name}: not one of {', '.join(SECTIONS)}")
    for name in options.sections or SECTIONS:
        print(f"{name}: {SECTIONS[name].__doc__}\n", flush=True)
        for number, row in enumerate(SECTIONS[name](options.quick)):
            if number == 0:
                print(f"| {' | '.join(column.removesuffix(' ns') for column in row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(cell(column, value) for column, value in row.items())} |", flush=True)
        print()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:         # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
