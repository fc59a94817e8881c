"""python -m ioproc.bench: what would each hook placement, and each design of a NIC, have cost real programs?

Replays recorded histories with nothing registered, with a device on the whole address space and with it on the VMAs of the
communicating memory only, measures what a callback and a registration cost, and answers the question of 2005: one chain
of hooks for the address space, or one per VMA?  Then it replays them once for each design, with messages.
"""
from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import textwrap
import time
from mmap import PROT_READ
from pathlib import Path

from . import DESIGNS, AddressSpace, CountingOps, Ops, PhysicalMemory, workload
from . import histories as shipped
from .compare import checked, compare, pictures
from .cost import PRESETS
from .text import counted, duration, percent, plain, printable, progress, settings, table
from .trace import Op, Trace, TraceError, choose, replay
from .trace.communication import mappings

SHARES = (0.01, 0.10, 0.50, 1.00)
TALKING, MESSAGES = 0.10, 4     # of the designs' table: the share that communicates, in buffers; messages of each
KINDS = ("mappings", "buffers")
PAGE = 4096

COLUMNS = (
    ("communicates", "communicates"), ("placement", "hooks"), ("calls", "calls"), ("spread", "calls min..max"),
    ("useful_share", "useful"), ("update_page", "update"), ("invalidate_page", "inval."), ("wrprotect_page", "wrprot."),
    ("invalidate_range", "range"), ("change_protection", "prot."), ("sync_range", "sync"), ("release", "rel."),
    ("chain_nodes", "nodes"), ("registrations", "regs"), ("vmas_peak", "VMAs"), ("added", "added"),
    ("ns_per_event", "ns/event"),
)


def histories(paths, workloads=()):
    """Yield (name, Trace): the given files and workloads, or the recorded histories that come with the package."""
    if not paths and not workloads:
        for name in shipped.names():
            yield name, shipped.load(name)
        return
    asked = [*((path, Path(path).name.split(".")[0], Trace.load) for path in paths),
             *((text, text, workload.make) for text in workloads)]
    names = [name for _, name, _ in asked]
    for i, (text, name, load) in enumerate(asked):
        before = sum(one == text for one, *_ in asked[:i])
        if not name or names.count(name) > 1:
            name = f"{text} ({before + 1})" if before else text
        yield name, load(text)


def talks(trace):
    """Has it messages of its own?"""
    return any((block["op"] == Op.COMM).any() for block in trace.blocks())


def talking(trace, seed):
    """With messages: its own, or drawn."""
    return trace if talks(trace) else workload.communicate(trace, TALKING, "buffers", seed, MESSAGES)


def row(name, label, kind, share, achieved, results, vmas_none, median=0, seeds=None):
    """One line of the table, as a dict: the counts of the median replay, the time of the fastest."""
    result = results[median]
    return {
        "history": name, "communicates": label, "kind": kind, "share": share, "achieved_share": achieved,
        "placement": result.placement, "calls": result.calls,
        "calls_min": min(one.calls for one in results), "calls_max": max(one.calls for one in results), "seeds": seeds,
        "useful_share": result.useful_share,
        **result.callbacks,
        "useful": result.useful,
        "chain_nodes": result.chain_nodes, "registrations": result.registrations,
        "register_failures": result.register_failures, "registered_peak": result.registered_peak,
        "vmas_none": vmas_none, "vmas_peak": result.vmas_peak, "added": result.vmas_peak - vmas_none,
        "ns_per_event": min(one.ns_per_event for one in results), "events": result.events, "inferred": result.inferred,
        "disagreement": result.disagreement,
    }


def placements(name, trace, shares, kinds, seed, seeds):
    """All rows of one history: without a device, then a pair (whole address space, per VMA) for each choice of memory."""
    nothing = [replay(trace) for _ in range(seeds)]
    vmas = nothing[0].vmas_peak
    rows = [row(name, "-", None, 0.0, 0.0, nothing, vmas)]
    recorded = "comm" in nothing[0].operations
    candidates = None if recorded else mappings(trace)
    for kind, share in [("recorded", math.nan)] if recorded else [(kind, share) for kind in kinds for share in shares]:
        progress(f"{name}: {'as recorded' if recorded else f'{percent(100 * share)} in {kind}'}")
        plans = [None if recorded else choose(trace, share, kind, one, candidates) for one in range(seed, seed + seeds)]
        replays = [[replay(trace, placement=placement, communication=plan) for placement in ("mm", "vma")] for plan in plans]
        whole, vma = zip(*replays, strict=True)
        median = sorted(range(seeds), key=lambda i: vma[i].calls)[(seeds - 1) // 2]
        achieved, label = math.nan, "as recorded"
        if not recorded:
            plan = plans[median]
            achieved = plan.bytes / plan.candidate_bytes if plan.candidate_bytes else 0.0
            label = f"{percent(100 * achieved)} in {kind}"
        rows += [row(name, label, kind, share, achieved, results, vmas, median, None if recorded else seeds)
                 for results in (whole, vma)]
    return rows


def touch_ns(pages, ops):
    """ns for a first touch of a page, with these ops on the address space."""
    with AddressSpace(PhysicalMemory(pages)) as mm:
        for one in ops:
            mm.register_ops(one)
        addr = mm.mmap(pages * PAGE)
        begin = time.perf_counter_ns()
        mm.touch(addr, pages * PAGE, write=True)
        return (time.perf_counter_ns() - begin) / pages


def register_ns(count, kind):
    """ns to register, and to unregister, whole VMAs or buffers in the middle of one: two splits, two merges."""
    ops = CountingOps()
    with AddressSpace(PhysicalMemory(16)) as mm:
        addr = mm.mmap(4 * PAGE * count)
        spots = [addr + (4 * i + 1) * PAGE for i in range(count)]
        if kind == "mappings":
            for spot in spots:
                mm.mprotect(spot, 2 * PAGE, PROT_READ)
        begin = time.perf_counter_ns()
        for spot in spots:
            mm.register_ops(ops, spot, 2 * PAGE)
        middle = time.perf_counter_ns()
        for spot in spots:
            mm.unregister_ops(ops, spot, 2 * PAGE)
        return (middle - begin) / count, (time.perf_counter_ns() - middle) / count


def micro(quick):
    """What a call and a registration cost: the least of several turns through all configurations, after one to warm up."""
    pages, few, count, turns = (1 << 13, 1 << 11, 500, 15) if quick else (1 << 15, 1 << 11, 2000, 25)
    natives = (1, 2, 4, 8)
    tried = {
        "bare": lambda: [touch_ns(pages, [])],
        "empty": lambda: [touch_ns(pages, [Ops()])],
        **{k: lambda k=k: [touch_ns(pages, [CountingOps() for _ in range(k)])] for k in natives},
        "few": lambda: [touch_ns(few, [])],
        "python": lambda: [touch_ns(few, [Ops(update_page=lambda vma, addr: None)])],
        **{kind: lambda kind=kind: register_ns(count, kind) for kind in KINDS},
    }
    for measure in tried.values():
        measure()
    taken = [{what: measure() for what, measure in tried.items()} for _ in range(turns)]
    least = {what: [min(turn[what][i] for turn in taken) for i in range(len(taken[0][what]))] for what in tried}
    bare = least["bare"][0]
    native = {k: least[k][0] - bare for k in natives}
    python = least["python"][0] - least["few"][0]
    figures = [("page fault, nothing registered", bare, "ns per fault"),
               ("+ 1 ops without the callback", least["empty"][0] - bare, "ns per fault"),
               *((f"+ {k} native op{'s' * (k > 1)}", native[k], "ns per fault") for k in natives),
               ("+ 1 Python op", python, "ns per fault"),
               ("register a whole VMA", least["mappings"][0], "ns"),
               ("register a buffer in its middle", least["buffers"][0], "ns (two splits)"),
               ("unregister a whole VMA", least["mappings"][1], "ns"),
               ("unregister a buffer in its middle", least["buffers"][1], "ns (two merges)")]
    return {"figures": figures, "call_ns": max(native[1], 0.1), "python_ns": python,
            "register_ns": {kind: least[kind][0] for kind in KINDS}}


def registrations_ns(line, register_ns):
    """What the registrations of a line cost; recorded messages lie in buffers."""
    return line["registrations"] * register_ns.get(line["kind"], register_ns["buffers"]) if line["placement"] == "vma" else 0


def cost_ns(line, call_ns, register_ns):
    """What a placement costs a run: its calls and its registrations."""
    return line["calls"] * call_ns + registrations_ns(line, register_ns)


def pairs(rows):
    """The lines (whole address space, per VMA) of each choice of memory."""
    compared = [line for line in rows if line["placement"] != "none"]
    return list(zip(compared[::2], compared[1::2], strict=True))


def crossover(rows, kind, call_ns, register_ns):
    """Shares tried, in percent, between which per VMA becomes no cheaper than the whole address space; None: it does not."""
    below = 0.0
    for mm, vma in sorted((pair for pair in pairs(rows) if pair[0]["kind"] == kind), key=lambda pair: pair[0]["achieved_share"]):
        if cost_ns(vma, call_ns, register_ns) >= cost_ns(mm, call_ns, register_ns):
            return below, 100 * mm["achieved_share"]
        below = 100 * mm["achieved_share"]
    return None


def break_even(mm, vma, register_ns):
    """From which cost of a call on per VMA costs less, in words."""
    if vma["calls"] >= mm["calls"]:
        return "per VMA costs less at no cost of a call"
    ns = registrations_ns(vma, register_ns) / (mm["calls"] - vma["calls"])
    return "per VMA costs less " + (f"as soon as a call costs more than {duration(ns)}" if ns else "at any cost of a call")


def answer(name, trace, rows, call_ns, register_ns):
    """The mailing list's question, for one history."""
    wall = float(trace.metadata.get("untraced_s") or 0) * 1e9
    compared = pairs(rows)
    whole = compared[0][0]

    def cost(line):
        ns = cost_ns(line, call_ns, register_ns)
        return duration(ns) + (f" or {percent(100 * ns / wall)}" if wall else "")

    sentences = [f"{name}: on the whole address space a device is called {counted(whole['calls'], 'time')}, "
                 f"{whole['calls'] / max(whole['events'], 1):.2g} per event; that costs {cost(whole)}"
                 + (f" of the run's {wall / 1e9:.1f} s." if wall else ".")]
    asked = [pair for pair in compared if pair[0]["kind"] == "buffers"] or compared
    told = [pair for pair in asked if pair[1]["registrations"]] or asked
    for mm, vma in told[:1] + told[1:][-1:]:
        whole_ns, vma_ns = (cost_ns(line, call_ns, register_ns) for line in (mm, vma))
        memory = "the memory of the recorded messages" if vma["kind"] == "recorded" else f"{vma['communicates']} communicating"
        useful = "there is no call" if not mm["calls"] else f"{percent(100 * mm['useful_share'])} of these calls are useful"
        more = ("at most " if vma["added"] > 0 else "") + counted(vma["added"], "VMA", "no") + " more"
        sentences.append(f"With {memory}, {useful}; per VMA makes {counted(vma['calls'], 'call')} and "
                         f"{counted(vma['registrations'], 'registration')}, has {more}, and costs "
                         f"{cost(vma)}: {'less' if vma_ns < whole_ns else 'not less'} than on the whole address space "
                         f"({duration(whole_ns)}); {break_even(mm, vma, register_ns)}.")
    if len(asked) > 1:
        where = []
        for kind in sorted({mm["kind"] for mm, _ in compared}):
            found = crossover(rows, kind, call_ns, register_ns)
            where.append(f"in {kind}, " + ("none in range" if found is None else
                                        f"between {percent(found[0])} and {percent(found[1])}"))
        sentences.append(f"Share from which per VMA does not pay at {duration(call_ns)} a call: {'; '.join(where)}.")
    return " ".join(sentences)


def text_cell(key, value):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if key == "useful_share":
        return percent(100 * value)
    if key == "ns_per_event":
        return f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def spread(line):
    """Calls over the seeds; on the whole address space they do not depend on them."""
    if not line["seeds"] or line["placement"] != "vma":
        return None
    return f"{line['calls_min']:,}..{line['calls_max']:,}"


def print_table(rows):
    lines = [line | {"spread": spread(line)} for line in rows]
    print(table([[title for _, title in COLUMNS]] + [[text_cell(key, line[key]) for key, _ in COLUMNS] for line in lines], 2))


def design_options(made):
    """What says which designs are compared; ``python -m ioproc compare`` has the same."""
    made.add_argument("--designs", metavar="NAME,...",
                      help=f"of {', '.join(DESIGNS)}; with /FORK or :ARGUMENT=VALUE, as vma+fault/inherit:prefault=16 "
                           "(default all)")
    made.add_argument("--nic", default="", metavar="KEY=VALUE,...", help="of ioproc.Nic, as entries=64,ways=None")
    made.add_argument("--cost", default="modern", metavar="PRESET",
                      help=f"what the counts cost: {', '.join([*PRESETS, 'machine'])}, with :PARAMETER=NS (default modern)")
    made.add_argument("--plot", metavar="FILE", help="draw them, as PNG or SVG: FILE, FILE-hits and FILE-share; of several "
                                                     "histories, each with its name")


def design_arguments(options):
    """(designs, nic, cost) for `compare`; ValueError, OSError or ImportError if one of the options is wrong."""
    if options.plot:
        from . import plot

        plot.check(options.plot)
    chosen, nic, cost = checked(options.designs and options.designs.split(","), settings(options.nic), options.cost)
    return [{"name": name} | attach for name, attach in chosen], nic, cost


def parser():
    made = argparse.ArgumentParser(prog="python -m ioproc.bench", description=__doc__.split("\n\n")[0],
                                   epilog="Data on stdout, progress on stderr.  Exit status: 0; 2 usage; 3 unreadable input.")
    made.add_argument("--quick", action="store_true", help="one share and one kind, fewer seeds: about a second")
    made.add_argument("--trace", action="append", metavar="FILE", help="a history instead of the shipped ones; may repeat")
    made.add_argument("--workload", action="append", metavar="NAME[:KEY=VALUE,...]",
                      help=f"a history made by ioproc.workload instead, of {', '.join(workload.WORKLOADS)}; may repeat")
    made.add_argument("--seed", default="0", help="the first, of the choice of communicating memory (default 0)")
    made.add_argument("--seeds", metavar="N", help="how many; the median is told (default 10, with --quick 3)")
    made.add_argument("--call-ns", type=float, metavar="NS",
                      help="cost of one callback for the answers (default: of a native one that does nothing, measured)")
    design_options(made)
    form = made.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything as one JSON object")
    form.add_argument("--csv", action="store_true", help="the rows as CSV")
    return made


def whole_number(option, text, least):
    try:
        number = int(text)
    except ValueError:
        parser().error(f"{option} {text}: must be a whole number")
    if number < least:
        parser().error(f"{option} {text}: must be a whole number, at least {least}")
    return number


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.call_ns is not None and not (math.isfinite(options.call_ns) and options.call_ns >= 0):
        parser().error(f"--call-ns {options.call_ns}: must be a finite number, not below 0")
    options.seed = whole_number("--seed", options.seed, 0)
    options.seeds = whole_number("--seeds", options.seeds or ("3" if options.quick else "10"), 1)

    try:
        results = run(options, *usable(options))
    except (TraceError, MemoryError) as error:      # more pages than PhysicalMemory can have, or than this machine has room for
        return fail(error, 3)
    except OSError as error:
        return fail(f"{error.filename or options.plot}: {error.strerror}", 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    try:
        report(options, *results)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # what is left in the buffer
        if isinstance(error, BrokenPipeError):                              # whoever read our output has seen enough
            return 0
        return fail(f"standard output: {error.strerror}", 2)
    try:
        if options.plot:
            draw(results[-1], options.plot)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except OSError as error:
        return fail(f"{error.filename or options.plot}: {error.strerror}", 2)
    return 0


def fail(message, status):
    print(f"ioproc.bench: {message}", file=sys.stderr)
    return status


def usable(options):
    """[(name, trace)], and the arguments of `compare`; wrong ones end the program before the work."""
    try:
        return list(histories(options.trace or (), options.workload or ())), design_arguments(options)
    except (ValueError, ImportError) as error:
        parser().error(str(error))
    except OSError as error:            # this machine's cost has no file
        parser().error(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


def run(options, loaded, designs):
    """All that is told: [(name, trace, its rows)], costs, answers, a Comparison for each name."""
    shares, kinds = ((0.10,), ("buffers",)) if options.quick else (SHARES, KINDS)
    progress("micro-figures")
    costs = micro(options.quick)
    if options.call_ns is not None:
        costs["call_ns"] = options.call_ns
    told = [(name, trace, placements(name, trace, shares, kinds, options.seed, options.seeds)) for name, trace in loaded]
    answers = [answer(*one, costs["call_ns"], costs["register_ns"]) for one in told]
    turns = 1 if options.quick else 5
    compared = {name: compare(talking(trace, options.seed), *designs, turns=turns) for name, trace in loaded}
    progress("")
    return told, costs, answers, compared


def draw(compared, path):
    """The pictures of each comparison; one alone needs no name."""
    path = Path(path)
    for name, comparison in compared.items():
        progress(f"{name}: pictures")
        drawn = pictures(comparison, path if len(compared) == 1 else path.with_stem(f"{path.stem}-{name.replace(os.sep, '_')}"),
                         name)
        progress("")
        print(f"{name}:", *drawn, file=sys.stderr)


def report(options, told, costs, answers, compared):
    rows = [line for _, _, its_rows in told for line in its_rows]
    if options.json:
        figures = [{"what": what, "value": value, "unit": unit} for what, value, unit in costs["figures"]]
        described = {name: trace.metadata | {"files": len(trace.metadata["files"])} for name, trace, _ in told}
        print(json.dumps(plain({"histories": described, "rows": rows, "seed": options.seed, "seeds": options.seeds,
                                "micro": figures, "call_ns": costs["call_ns"], "register_ns": costs["register_ns"],
                                "answers": answers, **design_json(compared)}), indent=1, default=float))
    elif options.csv:
        keys = [key for key in rows[0] if key not in ("useful", "inferred")]
        writer = csv.DictWriter(sys.stdout, keys, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain(rows))
    else:
        print_text(options, told, costs, answers)
        print_designs(compared)


def design_json(compared):
    """What JSON has of comparisons: ``designs`` (rows), ``nic``, and ``cost``, every parameter with its source."""
    one = next(iter(compared.values()))
    rows = [{"history": name, "rank": rank if row.safe and row.sound else None} | row.figures()
            | {"attach": row.attach, "failed": row.failed}
            for name, comparison in compared.items() for rank, row in enumerate(comparison.ranked(), 1)]
    parameters = [parameter._asdict() for parameter in one.cost.parameters()]
    return {"designs": rows, "nic": one.nic, "cost": {"name": one.cost.name, "parameters": parameters}}


DESIGNS_HEADER = """\
Every design, replayed on the same history with messages (drawn, where the history tells of none: {} of the memory,
in buffers, {} messages each). UNSAFE: the device used a frame or a permission that the page table no longer gave it.
callbacks: of the device, of these useful; inval.: those that take something away; NIC faults: the driver was asked;
hits: in the NIC's translation cache; regs: registrations; pinned peak: pages; errors: transfers that failed;
VMAs: more than without a device. modelled: counts times --cost's parameters, nothing measured is in it; measured: this
replay's processor time beyond that of one without a device (<: below the noise). Cheapest modelled first."""


def print_designs(compared):
    print(DESIGNS_HEADER.format(percent(100 * TALKING), MESSAGES))
    for name, comparison in compared.items():
        print(f"\n{printable(name)}: {comparison}")


HEADER = """\
Which memory communicates is drawn, unless the history tells: {}, from seed {} on. A pair of rows is that of
the median of the calls per VMA; calls min..max are the extremes of all. The answers are those of the medians.
hooks: nowhere (none), on the whole address space (mm) or on the VMAs of that memory (vma).
Calls by kind: update_page, invalidate_page, wrprotect_page; invalidate_range, change_protection (prot.), sync_range.
useful: the range overlaps memory registered for communication at that moment; rel.: release, not among the calls;
nodes: chain cells visited; regs: registrations of the device;
VMAs: of all processes together, at the peak, and how many of them registering added;
ns/event: replay time, measured, the least; it is noisy: differences below about 30 % say nothing.
The costs in the answers are computed from the figures below."""
FOOTNOTE = """
Unregistering is measured and not charged: munmap drops it.
What a hook costs everybody else: with nothing registered one load and one test per hook site, measured in
instructions by benchmarks/bench_hooksite.py (see README's table)."""


def print_text(options, told, costs, answers):
    print(HEADER.format(counted(options.seeds, "choice"), options.seed))
    for name, trace, its_rows in told:
        inferred = its_rows[0]["inferred"]
        wall = trace.metadata.get("untraced_s")
        print(f"\n{printable(name)}: {printable(trace.metadata.get('character', 'a history'))}, {counted(len(trace), 'event')}"
              + (f", {wall:.1f} s untraced" if wall else "") + f"; {counted(its_rows[0]['vmas_none'], 'VMA')}\n"
              f"inferred: {inferred['events']:,} events, {inferred['access']:,} accesses, {inferred['file']:,} file identities, "
              f"{inferred['size']:,} sizes; {percent(100 * its_rows[0]['disagreement'])} of the events disagree\n")
        print_table(its_rows)
    print("\nWhat a hook costs here (measured; the least of several turns)\n")
    for what, value, unit in costs["figures"]:
        print(f"  {what:<34} {value:>10,.1f} {unit}")
    print(FOOTNOTE)
    call = (f"that does nothing ({duration(costs['call_ns'])} a call, measured; --call-ns NS for yours: one in Python costs "
            f"{duration(costs['python_ns'])})" if options.call_ns is None else f"of {duration(costs['call_ns'])} (--call-ns)")
    whole, buffer = (duration(costs["register_ns"][kind]) for kind in KINDS)
    print(f"\nThe answer, for a callback {call},\n"
          f"and a registration of {whole} for a mapping, {buffer} for a buffer (measured)\n")
    for line in answers:
        print(textwrap.fill(printable(line), 120) + "\n")


if __name__ == "__main__":
    sys.exit(main())
