"""``python -m ioproc``: record, import and look at memory histories.

Data goes to the standard output, everything else to the standard error.  Exit status: 0 fine, 2 wrong
usage, 3 unreadable input.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .trace import Trace, TraceError, import_recording, record
from .trace.record import RecordError

USAGE, UNREADABLE = 2, 3


def main(arguments=None):
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except TraceError as error:
        return _fail(error, UNREADABLE)
    except RecordError as error:
        return _fail(error, USAGE)
    except BrokenPipeError:     # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror}", USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message, status):
    print(f"ioproc: {message}", file=sys.stderr)
    return status


def _parser():
    parser = argparse.ArgumentParser("python -m ioproc", description="Memory histories of real programs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("record", help="run a command under strace and perf")
    command.add_argument("-o", "--output", required=True, type=Path, help="history to write (.xz, .gz, .zst)")
    command.add_argument("--comm", type=Path, help="communication to add, which the command may write")
    command.add_argument("--keep", type=Path, metavar="DIR", help="keep what strace and perf wrote")
    command.add_argument("--untraced-runs", type=_count, default=3, metavar="N",
                         help="runs without tracing, to measure the wall time (default 3)")
    command.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...")
    command.set_defaults(run=_record)

    command = commands.add_parser("import", help="make a history of what strace and perf wrote")
    command.add_argument("-o", "--output", required=True, type=Path, help="history to write (.xz, .gz, .zst)")
    command.add_argument("--strace", required=True, type=Path, help="output of strace -f -ttt -T -X raw")
    command.add_argument("--perf", type=Path, help="output of perf script --ns -F pid,tid,time,addr,ip")
    command.add_argument("--comm", type=Path, help="communication: time,tid,address,length,direction")
    command.add_argument("--lenient", action="store_true", help="skip and count broken lines")
    command.add_argument("--set", action="append", default=[], type=_setting, metavar="NAME=VALUE",
                         help="metadata, such as command, host, kernel, untraced_s")
    command.set_defaults(run=_import)

    command = commands.add_parser("info", help="say what is in a history")
    command.add_argument("history", type=Path)
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.set_defaults(run=_info)
    return parser


def _count(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
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
    if path.is_dir() or not path.parent.is_dir():
        raise RecordError(f"cannot write {path}")


def _record(options):
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        raise RecordError("no command given")
    _writable(options.output)
    trace = record(program, untraced_runs=options.untraced_runs, comm=options.comm, keep=options.keep)
    trace.save(options.output)
    return _report(trace, options.output)


def _import(options):
    _writable(options.output)
    trace = import_recording(options.strace, options.perf, lenient=options.lenient, comm=options.comm,
                             metadata=dict(options.set))
    trace.save(options.output)
    return _report(trace, options.output)


def _report(trace, path):
    counts = trace.metadata["import"]
    skipped = sum(part.get("skipped_lines", 0)
                  for part in (counts["strace"], counts["perf"], trace.metadata.get("comm", {})))
    print(f"ioproc: {path}: {len(trace)} events, {skipped} broken lines skipped, "
          f"{counts['excluded_processes']} untraced processes with {counts['excluded_faults']} faults excluded"
          + (f", {counts['perf']['lost']} faults lost by perf" if counts["perf"].get("lost") else ""),
          file=sys.stderr)
    return 0


def _info(options):
    trace = Trace.load(options.history)
    summary = trace.summary()
    metadata = {name: value for name, value in trace.metadata.items() if name != "files"}
    if options.json:
        print(json.dumps({**summary, "files": len(trace.metadata["files"]), "metadata": metadata}))
        return 0
    for name in ("command", "host", "kernel", "recorded", "untraced_s"):
        if metadata.get(name) is not None:
            print(f"{name:14} {_printable(metadata[name])}")
    for name in ("events", "seconds", "processes", "threads"):
        print(f"{name:14} {summary[name]}")
    for name, count in summary["operations"].items():
        print(f"  {name:12} {count}")
    for name, count in summary["inferred"].items():
        print(f"inferred {name:8} {count}")
    return 0


def _printable(value):
    """A history may come from anywhere: nothing in it may steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


if __name__ == "__main__":
    sys.exit(main())
