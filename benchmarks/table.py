"""Measure everything that has a target and print the README's table, in Markdown.

``python benchmarks/table.py [--quick] [--json FILE]``: progress on stderr, the table on stdout.  A missed
target is a line of the table, not a failure.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import designs
import paired
import registration
import threads
import translation
import workloads

ROWS = []
KERNEL_SWAP_PAGES = 4096


def row(what, target, measured, ok=None, **figures):
    """Add a line; `ok` is None where there is nothing to reach."""
    verdict = {None: "reported", True: "pass", False: "**miss**"}[ok]
    ROWS.append({"what": what, "target": target, "measured": measured, "verdict": verdict, **figures})
    print(f"{what}: {measured} ({verdict})", file=sys.stderr, flush=True)


def interval(r: paired.Ratio) -> str:
    return f"{r.ratio:.2f}x [{r.low:.2f}, {r.high:.2f}]"


def against_c(what, name, limit, units=workloads.PAGES, kernel=None, **turns):
    """Compare with the C program, and with the kernel; `limit` and `kernel` are the factors to reach, 0: any."""
    samples = paired.pair(name, units, kernel is not None, **turns)
    r = paired.compare(samples["model"], samples["c"])
    row(what, f"at most {limit:.2f}x C" if limit else "reported", f"{r.a:.2f} ns, C {r.b:.2f} ns: {interval(r)}",
        r.ratio <= limit if limit else None, **r._asdict())
    if kernel is not None:
        r = paired.compare(samples["kernel"], samples["model"])
        row(f"{what}, against the running kernel", f"at least {kernel}x faster" if kernel else "reported",
            f"kernel {r.a:.0f} ns: {r.ratio:.0f}x [{r.low:.0f}, {r.high:.0f}]",
            r.ratio >= kernel if kernel else None, **r._asdict())


def against_kernel(what, name, model_units, units, **turns):
    """Compare with the kernel alone, on fewer units; a row only where the machine has the swap or the huge pages for it."""
    kernel = paired.c_command(f"kernel_{name}", units)
    if paired.works([*kernel, 1]):
        try:
            samples = paired.take_turns({"model": (paired.model_command(name, model_units),), "kernel": (kernel,)}, **turns)
        except RuntimeError as error:       # swap may fill up on the way
            print(f"{what}, against the running kernel: left out: {error}", file=sys.stderr, flush=True)
            return
        r = paired.compare(samples["kernel"], samples["model"])
        row(f"{what}, against the running kernel", "reported",
            f"kernel {r.a:.0f} ns: {r.ratio:.0f}x [{r.low:.0f}, {r.high:.0f}]", **r._asdict())


def pressure(**turns):
    against_c("fault with reclaim", "fault_reclaim", 1.5, **turns)
    for what, name in (("swap-in by a write", "swapin_write"), ("swap-in by a read", "swapin_read"),
                       ("reclaim of a page, mapped once", "reclaim"), ("the same, mapped by 16", "reclaim_16"),
                       ("MADV_PAGEOUT of a page", "pageout")):
        against_c(what, name, 0, **turns)
        if name in {"swapin_read", "pageout"}:
            against_kernel(what, name, workloads.PAGES, KERNEL_SWAP_PAGES, **turns)


def others(**turns):
    for what, name in (("truncation, per page of 16 mappers", "truncate"), ("hole, per page of 16 mappers", "punch"),
                       ("mlock of an untouched page", "mlock"), ("pin and unpin of a page", "pin")):
        against_c(what, name, 0, **turns)
    what = "huge page mapped, written to, unmapped"
    against_c(what, "hugetlb", 0, units=workloads.HUGE_PAGES, **turns)
    against_kernel(what, "hugetlb", workloads.HUGE_PAGES, 2, **turns)


def hooksites(**turns):
    counts = paired.hooksite_instructions()
    row("hook site, nothing registered", "at most 3 instructions",
        f"{counts['model']:.2f} (C {counts['c']:.2f})", counts["model"] <= 3, **counts)
    r = paired.replay_in_out(workloads.HISTORY_EVENTS, **turns)
    row("replay time, hooks compiled in / out", "upper end at most 1.05",
        f"{r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]", r.high <= 1.05, **r._asdict())


def replays(**turns):
    events = workloads.save_events(workloads.generated_history())
    try:
        samples = paired.pair("replay", (workloads.HISTORY_EVENTS, events), **turns)
    finally:
        events.unlink()
    r = paired.compare(samples["model"], samples["c"])
    row("replay, generated fault-heavy history, no device", "at least 10 million events/s",
        f"{1e3 / r.a:.1f} million/s ({r.a:.0f} ns; C {r.b:.0f} ns: {interval(r)})", 1e3 / r.a >= 10,
        **r._asdict())
    samples = paired.take_turns({"model": (paired.model_command("replay_recorded", workloads.RECORDED),)}, **turns)["model"]
    ns = float(sorted(samples)[len(samples) // 2])
    row(f"the same, recorded history ({workloads.RECORDED})", "at least 10 million events/s",
        f"{1e3 / ns:.1f} million/s ({ns:.0f} ns)", 1e3 / ns >= 10, ns=ns)


def memory():
    model, c = (paired.resident(command("memory")) for command in (paired.model_command, paired.c_command))
    for key, what, limit in (("dense_bytes", "resident memory, 1 GiB densely mapped, no contents", 48),
                             ("mapper_bytes", "each further mapper", 10)):
        row(what, f"at most {limit} bytes per page", f"{model[key]:.1f} (C {c[key]:.1f})",
            model[key] <= limit, model=model[key], c=c[key])


def scale(pages, **turns):
    for name, what in (("vma_find", "find (access a page)"), ("vma_split", "split (mprotect of a page)"),
                       ("vma_merge", "merge (back again)"), ("vma_cut", "split (munmap of a page)"),
                       ("vma_fill", "merge (mmap of it)")):
        f = paired.few_and_many(name, 1000, 1_000_000, **turns)
        c = f"; C {f['c_few_ns']:.0f}, {f['c_many_ns']:.0f} ns: {f['c_ratio']:.1f}x" if "c_ratio" in f else ""
        row(f"a million VMAs, random places: {what}", "at most 4x the cost at a thousand",
            f"{f['few_ns']:.0f}, {f['many_ns']:.0f} ns: {f['ratio']:.2f}x [{f['low']:.2f}, {f['high']:.2f}]{c}",
            f["ratio"] <= 4, **f)
    for name, what in (("vma_lookup", "look-ups alone"),
                       ("vma_lookup_dependent", "look-ups alone, each waits for the one before")):
        f = paired.few_and_many(name, 1000, 1_000_000, **turns)
        row(f"a million VMAs: {what}", "reported", f"{f['few_ns']:.0f}, {f['many_ns']:.0f} ns: {f['ratio']:.1f}x", **f)
    if (os.cpu_count() or 1) >= threads.WORKERS:
        for work in threads.WORK:
            r = paired.threads_and_processes(work)
            limited = work == "small_calls"                         # by the interpreter's lock
            row(f"{threads.WORKERS} threads on one PhysicalMemory, against as many processes: {work}",
                "reported (the GIL)" if limited else "at least 0.85", f"{r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]",
                None if limited else r.ratio >= 0.85, **r._asdict())
    f = paired.resident(paired.model_command("memory_shared", pages))
    for key, what, limit in (("page_bytes", f"{pages:,} pages mapped by 64 address spaces, half of the frames shared", 48),
                             ("mapper_bytes", "of these, each further mapper", 10)):
        row(what, f"at most {limit} bytes per page", f"{f[key]:.1f}", f[key] <= limit, bytes=f[key])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, wider intervals")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    turns = {"rounds": 4, "launches": 2} if arguments.quick else {}

    hooksites(**turns)
    against_c("one native op dispatched", "dispatch", 1.10, **turns)
    against_c("first touch of a page", "touch", 1.25, kernel=50, **turns)
    against_c("unmap of a page", "unmap", 1.25, kernel=0, **turns)
    against_c("fork, per page", "fork", 1.25, kernel=10, **turns)
    against_c("copy-on-write break", "cow", 1.25, **turns)
    against_c("copy-on-write break with contents", "cow_contents", 1.25, kernel=0, **turns)
    pressure(**turns)
    others(**turns)
    replays(**turns)
    designs.rows(row)
    translation.rows(row, **turns)
    registration.rows(row, **turns)
    memory()
    scale(1_000_000 if arguments.quick else 100_000_000, **({"rounds": 2, "launches": 1} if arguments.quick else {}))

    print("| what | must reach | measured | |\n|---|---|---|---|")
    for r in ROWS:
        print(f"| {r['what']} | {r['target']} | {r['measured']} | {r['verdict']} |")
    print(f"\nLinux {platform.release()}, {os.cpu_count()} processors, Python {platform.python_version()}; "
          "CPU time; median of paired ratios with its 95 % interval.")
    if arguments.json:
        arguments.json.write_text(json.dumps(ROWS, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
