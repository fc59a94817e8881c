"""
Which lines of the core were executed: a table of gcov's counts by source file, for coverage.sh.

A line counts as executed if any of its code was, an error's path or a wrapper included. Inline functions that nothing calls
have no code and are not counted.
"""
import json
import subprocess
from collections import defaultdict
from pathlib import Path


def counts(build="build"):
    """{source file: {line: executions}} of the Cython sources, added up over the copies of inlined functions."""
    lines = defaultdict(lambda: defaultdict(int))
    for data in Path(build).rglob("*.gcda"):
        report = subprocess.run(["gcov", "--json-format", "--stdout", data], check=True, capture_output=True, text=True).stdout
        for document in map(json.loads, report.splitlines()):
            for file in document["files"]:
                if file["file"].startswith("ioproc/") and file["file"].endswith((".pyx", ".pxd")):
                    for line in file["lines"]:
                        lines[file["file"]][line["line_number"]] += line["count"]
    return lines


def ranges(numbers):
    """"3-5 9" for 3, 4, 5, 9."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def main():
    rows = []
    for name, lines in sorted(counts().items()):
        missed = sorted(line for line, count in lines.items() if count == 0)
        rows.append((name, len(lines), len(missed), ranges(missed)))
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows), ""))
    print(f"{'file':32} {'lines':>6} {'missed':>6}  covered  which are missed")
    for name, n, missed, which in rows:
        print(f"{name:32} {n:6} {missed:6} {100 * (n - missed) / n:7.1f}%  {which}".rstrip())


if __name__ == "__main__":
    main()
