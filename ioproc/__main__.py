"""``python -m ioproc``: record, import, look at and replay memory histories, and compare designs on them.

Data goes to the standard output, everything else to the standard error.  Exit status: 0 fine, 1 a design was unsafe that
was not to be, 2 wrong usage, 3 unreadable input.
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

from . import __version__, bench, histories, workload
from .compare import compare
from .text import plain
from .trace import PLACEMENTS, Trace, TraceError, annotate, choose, import_recording, recognise, record, replay
from .trace.format import Op
from .trace.record import RecordError, usable
from .trace.source import output_path

UNSAFE, USAGE, UNREADABLE = 1, 2, 3
OUTPUT = "history to write: compressed if it ends in .xz, .gz or .zst, else a plain file"
SHOWN = 10          # of the events that differ
FAULTS = {"read": "reads", "write": "writes", "unknown": "of unknown access", "kernel": "of them by the kernel"}
# How the access of faults is known; the names are the import's counts.
ACCESSES = {"recorded": ("recorded_accesses",), "proved": ("known_reads", "proved_reads", "known_writes"),
            "assumed": ("assumed_writes",)}
NAMES = {"strace": "strace", "perf": "perf of page faults", "tracepoints": "tracepoints"}


def main(arguments=None):
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except TraceError as error:
        return _fail(error, UNREADABLE)
    except RecordError as error:
        return _fail(error, USAGE)
    except MemoryError as error:
        return _fail(error, UNREADABLE)
    except BrokenPipeError:     # whoever read our output has seen enough
        _drop_output()
        return 0
    except OSError as error:
        if error.filename is None and options.command in ("info", "replay", "compare"):
            _drop_output()
        name = error.filename or ("standard output" if options.command in ("info", "replay", "compare") else options.command)
        return _fail(f"{name}: {error.strerror or error}", USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _drop_output():
    """What is still buffered cannot be written, and would fail once more when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message, status):
    print(f"ioproc: {message}", file=sys.stderr)
    return status


def _parser():
    parser = argparse.ArgumentParser("python -m ioproc", description="Memory histories of real programs.")
    parser.add_argument("--version", action="version", version=f"ioproc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("record", help="run a command under strace and perf, or perf alone",
                                  description="Run a command, record the history of its memory, and import it.")
    command.add_argument("-o", "--output", required=True, type=Path, help=OUTPUT)
    command.add_argument("--character", metavar="WORD", help="what kind of program it is, such as static or forking")
    command.add_argument("--with", dest="tracer", choices=("strace", "perf"), default="strace",
                         help="strace (default): system calls by strace, page faults of user mode by perf; needs no root. "
                              "perf: both as tracepoints on one clock, with the access of each fault and the kernel's faults; "
                              "needs root and a mounted tracefs")
    command.add_argument("--comm", type=Path, help="communication to add, which the command may write")
    command.add_argument("--keep", type=Path, metavar="DIR",
                         help="keep the texts that are imported: strace and perf, or tracepoints")
    command.add_argument("--untraced-runs", type=_count, default=3, metavar="N",
                         help="runs without tracing, to measure the wall time (default 3)")
    command.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...")
    command.set_defaults(run=_record)

    command = commands.add_parser(
        "import", help="make a history of what strace and perf wrote",
        description="Make a history of a recording: of strace's output, with or without perf's page faults, or of perf's "
                    "tracepoints.  What each FILE is, its content tells.")
    command.add_argument("recordings", nargs="*", type=Path, metavar="FILE",
                         help="output of strace, of perf script (of page faults, or of tracepoints), or normalised lines")
    command.add_argument("-o", "--output", required=True, type=Path, help=OUTPUT)
    command.add_argument("--character", metavar="WORD", help="what kind of program it is, such as static or forking")
    command.add_argument("--strace", type=Path, metavar="FILE",
                         help="output of strace -f -y -ttt -T -X raw; without -y, files are inferred")
    command.add_argument("--perf", type=Path, metavar="FILE",
                         help="output of perf script --ns -F pid,tid,time,addr,ip --show-mmap-events; "
                         "without --show-mmap-events, what execve maps is inferred")
    command.add_argument("--tracepoints", type=Path, metavar="FILE",
                         help="output of perf script --header --ns -F trace:pid,tid,time,event,trace --show-mmap-events "
                         "--show-task-events, or lines of t_ns pid tid op hexargs.. hexret")
    command.add_argument("--comm", type=Path, help="communication: time,tid,address,length,direction")
    command.add_argument("--lenient", action="store_true", help="skip and count broken lines")
    command.add_argument("--set", action="append", default=[], type=_setting, metavar="NAME=VALUE",
                         help="metadata, such as command, host, kernel, untraced_s")
    command.set_defaults(run=_import)

    command = commands.add_parser("info", help="say what is in a history")
    command.add_argument("history", type=Path)
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.set_defaults(run=_info)

    command = commands.add_parser("replay", help="drive the model through a history and count")
    command.add_argument("history", type=Path)
    command.add_argument("--placement", choices=PLACEMENTS, default="none", help="where a device registers (default none)")
    command.add_argument("--share", type=_share, metavar="S",
                         help="of the writable anonymous memory communicates, 0 to 1 (default: what the history tells)")
    command.add_argument("--kind", choices=("mappings", "buffers"),
                         help="how it is chosen (default mappings)")
    command.add_argument("--seed", type=_count, metavar="N", help="of the choice (default 0)")
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.set_defaults(run=_replay)

    command = commands.add_parser(
        "compare", help="replay a history once for every design of a NIC",
        description="Replay a history once for every design of a NIC: what it costs, and whether it is safe.")
    command.add_argument("history", metavar="HISTORY",
                         help=f"a file; one that comes with ioproc ({', '.join(histories.names())}); or a workload, NAME or "
                              f"NAME:KEY=VALUE,... of {', '.join(workload.WORKLOADS)}")
    command.add_argument("--share", type=_share, metavar="S",
                         help="of the writable anonymous memory communicates, in buffers, where the history has no messages "
                              f"(default {bench.TALKING})")
    command.add_argument("--messages", type=_count, metavar="N", help=f"of each buffer then (default {bench.MESSAGES})")
    command.add_argument("--seed", type=_count, metavar="N", help="of that choice (default 0)")
    bench.design_options(command)
    command.add_argument("--turns", type=_count, default=3, metavar="N", help="replays, of which the fastest is told (default 3)")
    command.add_argument("--safe", action="store_true", help="exit with status 1 if a design is not")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="machine-readable")
    form.add_argument("--csv", action="store_true", help="the rows as CSV")
    command.set_defaults(run=_compare)
    return parser


def _count(text):
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be a whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _share(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be 0 to 1")
    return value


def _setting(text):
    name, equals, value = text.partition("=")
    if not equals or not name or name in ("files", "import", "epoch_ns"):
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    if name != "untraced_s":
        return name, value
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError("untraced_s is a number of seconds")
    return name, seconds


def _writable(path):
    """Before the work, not after it."""
    try:
        output_path(path)
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror}") from None
    except TraceError as error:
        raise RecordError(f"cannot write {path}: {error.reason}") from None


def _record(options):
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        raise RecordError("no command given")
    _writable(options.output)
    usable(None, options.comm)
    trace = record(program, tracer=options.tracer, untraced_runs=options.untraced_runs, keep=options.keep)
    status = trace.metadata.get("status")
    if status:
        print(f"ioproc: the command ended with {f'status {status}' if status > 0 else f'signal {-status}'}", file=sys.stderr)
    saved = _saved(trace, options)
    if options.comm is None:
        return saved
    # What took long to record is safe by now.
    return _saved(annotate(trace, options.comm), options)


def _import(options):
    _writable(options.output)
    texts = _recognised(options)
    trace = import_recording(**texts, lenient=options.lenient, comm=options.comm, metadata=dict(options.set))
    if not np.count_nonzero(trace.events["op"] == Op.FAULT):
        print("ioproc: no page faults: only mappings are replayed", file=sys.stderr)
    return _saved(trace, options)


def _recognised(options):
    """The files of a recording by what they are."""
    texts = {kind: getattr(options, kind) for kind in ("strace", "perf", "tracepoints") if getattr(options, kind)}
    for path in options.recordings:
        kind = recognise(path)
        if kind in texts:
            raise RecordError(f"{path} and {texts[kind]} are both a recording by {NAMES[kind]}: a history is made of one run")
        texts[kind] = path
    if "tracepoints" in texts and len(texts) > 1:
        raise RecordError("a recording of tracepoints is complete: give it alone")
    if "strace" not in texts and "tracepoints" not in texts:
        raise RecordError("page faults alone are no history: give the output of strace too" if texts else
                          "give what strace and perf wrote, or a recording of tracepoints")
    return texts


def _saved(trace, options):
    if options.character is not None:
        trace.metadata["character"] = options.character
    trace.save(options.output)
    return _report(trace, options.output)


def _report(trace, path):
    counts = trace.metadata["import"]
    parts = [counts.get(name, {}) for name in NAMES]
    skipped = sum(part.get("skipped_lines", 0) for part in (*parts, trace.metadata.get("comm", {})))
    lost = sum(part.get("lost", 0) for part in parts)
    print(f"ioproc: {path}: {len(trace)} events, {skipped} broken lines skipped, "
          f"{counts['excluded_processes']} untraced processes with {counts['excluded_faults']} faults excluded"
          + (f", {lost} events lost by perf" if lost else ""),
          file=sys.stderr)
    return 0


def _info(options):
    trace = Trace.load(options.history)
    summary, programs = trace.summary(), trace.programs()
    metadata = {name: value for name, value in trace.metadata.items() if name != "files"}
    counts = metadata.get("import", {})
    counts = counts if isinstance(counts, dict) else {}
    summary |= {
        "formats": [name for name in NAMES if counts.get(name)],
        "clock": counts.get("clock", "realtime" if "strace" in counts else "unknown"),
        "programs": programs,
    }
    files = trace.metadata["files"]
    if options.json:
        print(json.dumps({**summary, "files": len(files), "metadata": metadata}))
        return 0
    for name in ("command", "character", "status", "host", "kernel", "recorded", "untraced_s"):
        if metadata.get(name) is not None:
            print(f"{name:14} {_printable(metadata[name])}")
    if summary["formats"]:
        print(f"{'read from':14} {', '.join(NAMES[name] for name in summary['formats'])}")
    print(f"{'clock':14} {_printable(summary['clock'])}{_start(metadata.get('epoch_ns'))}")
    for name in ("events", "seconds", "processes", "threads"):
        print(f"{name:14} {summary[name]}")
    for name, count in summary["operations"].items():
        print(f"  {name:12} {count}")
    print(f"{'failed calls':14} {summary['failed']}")
    faults = summary["faults"]
    print(f"{'faults':14} " + ", ".join(f"{faults[name]} {text}" for name, text in FAULTS.items()))
    known = {how: sum(count for name in names if isinstance(count := counts.get(name), int)) for how, names in ACCESSES.items()}
    print(f"{'their access':14} " + ", ".join(f"{count} {how}" for how, count in known.items()))
    for name, count in summary["inferred"].items():
        print(f"inferred {name:8} {count}")
    segments, size = sum(file["kind"] == "shm" for file in files), sum(file["size"] for file in files)
    print(f"{'files':14} {len(files) - segments}, {segments} segments, {size / (1 << 20):.1f} MiB")
    print(f"{'pid':>9} {'events':>10} {'faults':>10}   program")
    for row in sorted(programs, key=lambda row: -row["events"])[:SHOWN]:
        print(f"{row['pid']:9} {row['events']:10} {row['faults']:10}   {_printable(row['program'] or '-')}")
    if len(programs) > SHOWN:
        print(f"{'...':>9}")
    return 0


def _start(epoch):
    """When that was, if the clock is one of the real time."""
    if not isinstance(epoch, int) or not 1 << 60 < epoch < 1 << 62:
        return ""
    return time.strftime(", from %Y-%m-%d %H:%M:%S UTC", time.gmtime(epoch // 1_000_000_000))


def _replay(options):
    if options.share is None and (options.kind is not None or options.seed is not None):
        raise RecordError("--kind and --seed say how --share is chosen: give --share")
    kind, seed = options.kind or "mappings", options.seed or 0
    trace = Trace.load(options.history)
    chosen = None if options.share is None else choose(trace, options.share, kind, seed)
    result = replay(trace, placement=options.placement, communication=chosen)
    if chosen is None and options.placement != "none" and not result.operations.get("comm"):
        print("ioproc: this history tells of no communication: give --share", file=sys.stderr)
    if options.json:
        told = dataclasses.asdict(result) | {"useful_share": None if math.isnan(result.useful_share) else result.useful_share}
        if chosen is not None:
            told["communication"] = {"kind": chosen.kind, "share": chosen.share, "seed": seed, "bytes": chosen.bytes,
                                     "candidate_bytes": chosen.candidate_bytes, "registrations": len(chosen.plan)}
        print(json.dumps(told))
        return 0
    _print_differences(trace, result)
    print()
    if result.placement != "none":
        print(f"{'callback':20} {'calls':>10} {'useful':>10}")
        for name, calls in result.callbacks.items():
            if calls:
                print(f"{name:20} {calls:10} {result.useful[name] if name != 'release' else '-':>10}")
        print(f"{'useful share':20} {'-' if math.isnan(result.useful_share) else f'{result.useful_share:.2%}':>10}")
        for name in ("chain_nodes", "registrations", "register_failures", "registered_peak"):
            print(f"{name.replace('_', ' '):20} {getattr(result, name):10}")
    for name in ("vmas_peak", "address_spaces"):
        print(f"{name.replace('_', ' '):20} {getattr(result, name):10}")
    print(f"{'milliseconds':20} {1e3 * result.seconds:10.1f}")
    print(f"{'ns per event':20} {result.ns_per_event:10.0f}")
    return 0


def _compare(options):
    try:
        designs = bench.design_arguments(options)
        trace = _history(options)
        compared = compare(trace, *designs, turns=options.turns)
    except (ValueError, ImportError) as error:
        raise RecordError(str(error)) from None
    if options.json:
        print(json.dumps(plain(bench.design_json({options.history: compared}))))
    elif options.csv:
        rows = [plain(row.figures() | {"failed": row.failed}) for row in compared]
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(compared)
    if options.plot:
        bench.draw({Path(options.history).name: compared}, options.plot)
    return UNSAFE if options.safe and not all(row.safe for row in compared) else 0


def _history(options):
    """With messages: a file's, a shipped one's or a workload's own, or drawn."""
    name = options.history
    if os.path.exists(name):
        trace = Trace.load(name)
    elif name.partition(":")[0] in workload.WORKLOADS:
        trace = workload.make(name)
    elif name in histories.names():
        trace = histories.load(name)
    else:
        raise TraceError(name, f"No such file, nor a history ({', '.join(histories.names())}) nor a workload "
                               f"({', '.join(workload.WORKLOADS)})")
    drawn = {"share": options.share, "messages": options.messages, "seed": options.seed}
    drawn = {key: value for key, value in drawn.items() if value is not None}
    if not bench.talks(trace):
        return workload.communicate(trace, **{"share": bench.TALKING, "messages": bench.MESSAGES} | drawn)
    if drawn:
        raise RecordError(f"--{next(iter(drawn))}: {name} has messages of its own")
    return trace


def _print_differences(trace, result):
    inferred = np.zeros(256, np.int64)
    for block in trace.blocks():
        inferred += np.bincount(block["op"][block["origin"] != 0], minlength=256)
    print(f"{'operation':14} {'events':>10} {'inferred':>10}   not as recorded")
    for op in Op:
        name = op.name.lower()
        if name in result.operations:
            row = ", ".join(f"{count} {kind}" for kind, count in result.differences.get(name, {}).items())
            print(f"{name:14} {result.operations[name]:10} {inferred[op]:10}   {row}".rstrip())
    print(f"{'all':14} {result.events:10} {inferred.sum():10}   {result.disagreement:.4%}")
    for index in result.first_differing[:SHOWN]:
        event = trace.events[index]
        op = int(event["op"])
        print(f"  event {index}: {Op(op).name.lower() if op in set(Op) else op} of process {event['pid']}, "
              f"address {int(event['addr']):#x}")
    if len(result.first_differing) > SHOWN:
        print("  ...")


def _printable(value):
    """A history may come from anywhere: nothing in it may steer a terminal."""
    return "".join(character if character.isprintable() else "\\n" if character == "\n" else "?" for character in str(value))


if __name__ == "__main__":
    sys.exit(main())
