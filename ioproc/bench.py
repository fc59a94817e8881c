"""python -m ioproc.bench: what would each hook placement have cost real programs?

Replays recorded histories with nothing registered, with a device on the whole address space and with it on the VMAs of the
communicating memory only, measures what a callback and a registration cost, and answers the question of 2005: one chain
of hooks for the address space, or one per VMA?
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
from importlib import resources
from pathlib import Path

import numpy as np

from . import AddressSpace, CountingOps, Ops, PhysicalMemory
from .trace import Trace, TraceError, choose, replay

SHARES = (0.01, 0.10, 0.50, 1.00)
KINDS = ("mappings", "buffers")
PAGE = 4096

COLUMNS = (
    ("communicates", "communicates"), ("placement", "placement"), ("calls", "calls"), ("useful_share", "useful"),
    ("update_page", "upd.page"), ("invalidate_page", "inv.page"), ("wrprotect_page", "wrprot."),
    ("invalidate_range", "inv.range"), ("change_protection", "chg.prot"), ("sync_range", "sync"), ("release", "release"),
    ("chain_nodes", "nodes"), ("registrations", "regs"), ("vmas_peak", "VMAs"), ("added", "added"),
    ("ns_per_event", "ns/event"),
)


def histories(paths):
    """Yield (name, Trace): the given files, or the recorded histories that come with the package."""
    if paths:
        names = [Path(path).name.split(".")[0] for path in paths]
        for name, path in zip(names, paths, strict=True):
            yield name if name and names.count(name) == 1 else path, Trace.load(path)
        return
    shipped = sorted((entry for entry in resources.files("ioproc.histories").iterdir() if ".ioproc" in entry.name),
                     key=lambda entry: entry.name)
    for entry in shipped:
        with resources.as_file(entry) as path:
            yield entry.name.split(".")[0], Trace.load(path)


def measured(trace, repeats, **options):
    """The replay with the least time of several; what it counts is the same in each."""
    return min((replay(trace, **options) for _ in range(repeats)), key=lambda result: result.seconds)


def row(name, label, kind, share, achieved, result, vmas_none):
    """One line of the table, as a dict."""
    return {
        "history": name, "communicates": label, "kind": kind, "share": share, "achieved_share": achieved,
        "placement": result.placement, "calls": result.calls, "useful_share": result.useful_share,
        **result.callbacks,
        "useful": result.useful,
        "chain_nodes": result.chain_nodes, "registrations": result.registrations,
        "register_failures": result.register_failures, "registered_peak": result.registered_peak,
        "vmas_none": vmas_none, "vmas_peak": result.vmas_peak, "added": result.vmas_peak - vmas_none,
        "ns_per_event": result.ns_per_event, "events": result.events, "inferred": result.inferred,
        "disagreement": result.disagreement,
    }


def compare(name, trace, shares, kinds, seed, repeats, progress):
    """All rows of one history."""
    nothing = measured(trace, repeats)
    vmas = nothing.vmas_peak
    rows = [row(name, "-", None, 0.0, 0.0, nothing, vmas)]
    if "comm" in nothing.operations:
        plans = [("as recorded", "recorded", math.nan, math.nan, None)]
    else:
        plans = []
        for kind in kinds:
            for share in shares:
                plan = choose(trace, share, kind, seed)
                achieved = plan.bytes / plan.candidate_bytes if plan.candidate_bytes else 0.0
                plans.append((f"{percent(100 * achieved)} in {kind}", kind, share, achieved, plan))
    for label, kind, share, achieved, plan in plans:
        progress(f"{name}: {label}")
        for placement in ("mm", "vma"):
            result = measured(trace, repeats, placement=placement, communication=plan)
            rows.append(row(name, label, kind, share, achieved, result, vmas))
    return rows


def touch_ns(pages, ops, repeats):
    """ns for a first touch of a page, with these ops on the address space: the least of several runs."""
    best = math.inf
    for _ in range(repeats):
        with AddressSpace(PhysicalMemory(pages)) as mm:
            for one in ops:
                mm.register_ops(one)
            addr = mm.mmap(pages * PAGE)
            begin = time.perf_counter_ns()
            mm.touch(addr, pages * PAGE, write=True)
            best = min(best, time.perf_counter_ns() - begin)
    return best / pages


def register_ns(count, repeats):
    """ns to register, and to unregister, a buffer in the middle of a mapping: two splits, two merges."""
    ops = CountingOps()
    register, unregister = math.inf, math.inf
    for _ in range(repeats):
        with AddressSpace(PhysicalMemory(16)) as mm:
            addr = mm.mmap(4 * PAGE * count)
            spots = [addr + (4 * i + 1) * PAGE for i in range(count)]
            begin = time.perf_counter_ns()
            for spot in spots:
                mm.register_ops(ops, spot, 2 * PAGE)
            middle = time.perf_counter_ns()
            for spot in spots:
                mm.unregister_ops(ops, spot, 2 * PAGE)
            register = min(register, middle - begin)
            unregister = min(unregister, time.perf_counter_ns() - middle)
    return register / count, unregister / count


def micro(quick):
    """The cost of a call, measured as the difference it makes to a page fault."""
    pages = 1 << 13 if quick else 1 << 15
    repeats = 5 if quick else 15
    few = min(pages, 1 << 11)
    bare = touch_ns(pages, [], repeats)
    figures = [("page fault, nothing registered", bare, "ns per fault")]
    figures.append(("+ 1 ops without the callback", touch_ns(pages, [Ops()], repeats) - bare, "ns per fault"))
    native = {}
    for k in (1, 2, 4, 8):
        native[k] = touch_ns(pages, [CountingOps() for _ in range(k)], repeats) - bare
        figures.append((f"+ {k} native op{'s' * (k > 1)}", native[k], "ns per fault"))
    python = touch_ns(few, [Ops(update_page=lambda vma, addr: None)], repeats) - touch_ns(few, [], repeats)
    figures.append(("+ 1 Python op", python, "ns per fault"))
    register, unregister = register_ns(500 if quick else 2000, repeats)
    figures.append(("register a buffer on its VMA", register, "ns"))
    figures.append(("unregister it", unregister, "ns"))
    return {"figures": figures, "native_ns": max(native[8] / 8, 0.1), "python_ns": python, "register_ns": register}


def cost_ns(line, call_ns, register_ns):
    """What a placement costs a run: its calls and its registrations."""
    return line["calls"] * call_ns + (line["registrations"] * register_ns if line["placement"] == "vma" else 0)


def crossover(rows, kind, call_ns, register_ns):
    """Shares tried, in percent, between which per VMA becomes no cheaper than the whole address space; None: it does not."""
    by = {(line["achieved_share"], line["placement"]): line for line in rows if line["kind"] == kind}
    below = 0.0
    for share in sorted({share for share, _ in by}):
        if cost_ns(by[share, "vma"], call_ns, register_ns) >= cost_ns(by[share, "mm"], call_ns, register_ns):
            return below, 100 * share
        below = 100 * share
    return None


def percent(value):
    """Two digits, or whole percents, and never 1e-05."""
    return (np.format_float_positional(value, 2, fractional=False, trim="-") if value < 9.95 else f"{value:.0f}") + "%"


def duration(ns):
    """For people."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"


def answer(name, trace, rows, call_ns, register_ns):
    """The mailing list's question, for one history."""
    wall = float(trace.metadata.get("untraced_s") or 0) * 1e9
    compared = [line for line in rows if line["placement"] != "none"]
    whole = compared[0]

    def cost(line):
        ns = cost_ns(line, call_ns, register_ns)
        return duration(ns) + (f" or {percent(100 * ns / wall)}" if wall else "")

    sentences = [f"{name}: on the whole address space a device is called {whole['calls']:,} times, "
                 f"{whole['calls'] / max(whole['events'], 1):.2g} per event; that costs {cost(whole)}"
                 + (f" of the run's {wall / 1e9:.1f} s." if wall else ".")]
    vma = [line for line in compared if line["placement"] == "vma"]
    vma = [line for line in vma if line["kind"] == "buffers"] or vma
    told = [line for line in vma if line["registrations"]] or vma
    for line in told[:1] + told[1:][-1:]:
        mm = next(other for other in compared if other["placement"] == "mm" and other["communicates"] == line["communicates"])
        cheaper = cost_ns(line, call_ns, register_ns) < cost_ns(mm, call_ns, register_ns)
        memory = "the memory of the recorded messages" if line["kind"] == "recorded" else f"{line['communicates']} communicating"
        useful = "there is no call" if not mm["calls"] else f"{percent(100 * mm['useful_share'])} of these calls are useful"
        sentences.append(f"With {memory}, {useful}; per VMA makes {line['calls']:,} calls and {line['registrations']:,} "
                         f"registrations, has at most {line['added']:,} VMAs more, and costs {cost(line)}: "
                         f"{'less' if cheaper else 'not less'}.")
    if len(vma) > 1:
        where = []
        for kind in sorted({line["kind"] for line in compared}):
            found = crossover(compared, kind, call_ns, register_ns)
            where.append(f"in {kind}, " + ("none in range" if found is None else
                                           f"between {percent(found[0])} and {percent(found[1])}"))
        sentences.append(f"Share from which per VMA does not pay: {'; '.join(where)}.")
    return " ".join(sentences)


def text_cell(key, value):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if key == "useful_share":
        return percent(100 * value)
    if key == "ns_per_event":
        return f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(rows, out):
    cells = [[title for _, title in COLUMNS]] + [[text_cell(key, line[key]) for key, _ in COLUMNS] for line in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    for number, line in enumerate(cells):
        print("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip(), file=out)
        if number == 0:
            print("-" * (sum(widths) + 2 * (len(widths) - 1)), file=out)


def parser():
    made = argparse.ArgumentParser(prog="python -m ioproc.bench", description=__doc__.split("\n\n")[0],
                                   epilog="Data on stdout, progress on stderr.  Exit status: 0; 2 usage; 3 unreadable input.")
    made.add_argument("--quick", action="store_true", help="one share and one kind, fewer repetitions: a few seconds")
    made.add_argument("--trace", action="append", metavar="FILE", help="a history instead of the shipped ones; may repeat")
    made.add_argument("--seed", type=int, default=0, help="of the choice of communicating memory (default 0)")
    made.add_argument("--call-ns", type=float, metavar="NS",
                      help="cost of one callback for the answers (default: the native one measured here)")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything as one JSON object")
    form.add_argument("--csv", action="store_true", help="the rows as CSV")
    return made


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.call_ns is not None and not options.call_ns >= 0:
        parser().error(f"--call-ns {options.call_ns}: not a cost")
    if options.seed < 0:
        parser().error(f"--seed {options.seed}: not a seed")

    def progress(message):
        if sys.stderr.isatty():
            print(f"\r\x1b[K{message}", end="", file=sys.stderr, flush=True)

    try:
        status = run(options, progress)
        sys.stdout.flush()
        return status
    except TraceError as error:
        return fail(error, 3)
    except MemoryError as error:        # more pages than PhysicalMemory can have, or than this machine has room for
        return fail(error, 3)
    except BrokenPipeError:             # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def fail(message, status):
    print(f"ioproc.bench: {message}", file=sys.stderr)
    return status


def run(options, progress):
    shares, kinds, repeats = ((0.10,), ("buffers",), 1) if options.quick else (SHARES, KINDS, 3)
    loaded = list(histories(options.trace))
    progress("micro-figures")
    costs = micro(options.quick)
    call_ns = costs["native_ns"] if options.call_ns is None else options.call_ns
    rows, answers = [], []
    for name, trace in loaded:
        its_rows = compare(name, trace, shares, kinds, options.seed, repeats, progress)
        rows += its_rows
        answers.append(answer(name, trace, its_rows, call_ns, costs["register_ns"]))
    progress("")
    report(options, loaded, rows, costs, call_ns, answers)
    return 0


def plain(value):
    """What JSON and CSV can say: there is no NaN."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text):
    """A history may come from anywhere: nothing in it may steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def report(options, loaded, rows, costs, call_ns, answers):
    if options.json:
        figures = [{"what": what, "value": value, "unit": unit} for what, value, unit in costs["figures"]]
        described = {name: trace.metadata | {"files": len(trace.metadata["files"])} for name, trace in loaded}
        print(json.dumps(plain({"histories": described, "rows": rows, "micro": figures, "call_ns": call_ns,
                                "register_ns": costs["register_ns"], "answers": answers}), indent=1, default=float))
        return
    if options.csv:
        keys = [key for key in rows[0] if key not in ("useful", "inferred")]
        writer = csv.DictWriter(sys.stdout, keys, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain(rows))
        return
    print("Calls of a device, by kind: update, invalidate and wrprotect_page, invalidate_range, change_protection, sync_range.\n"
          "useful: the range overlaps memory registered for communication at that moment; nodes: chain cells visited;\n"
          "regs: registrations of the device; VMAs: at most, over all processes, and how many of them registering added;\n"
          "ns/event: replay time, measured.")
    for name, trace in loaded:
        its_rows = [line for line in rows if line["history"] == name]
        inferred = its_rows[0]["inferred"]
        wall = trace.metadata.get("untraced_s")
        print(f"\n{printable(name)}: {printable(trace.metadata.get('character', 'a history'))}, {len(trace):,} events"
              + (f", {wall:.1f} s untraced" if wall else "") + f"; {its_rows[0]['vmas_none']:,} VMAs\n"
              f"inferred: {inferred['events']:,} events, {inferred['access']:,} accesses, {inferred['file']:,} file identities, "
              f"{inferred['size']:,} sizes; {percent(100 * its_rows[0]['disagreement'])} of the events disagree\n")
        print_table(its_rows, sys.stdout)
    print("\nWhat a hook costs here (measured; the least of several runs)\n")
    for what, value, unit in costs["figures"]:
        print(f"  {what:<34} {value:>10,.1f} {unit}")
    print(f"\nThe answer, with {call_ns:.1f} ns a call and {costs['register_ns']:.0f} ns a registration\n")
    for line in answers:
        print(textwrap.fill(printable(line), 120) + "\n")


if __name__ == "__main__":
    sys.exit(main())
