"""How numbers, tables and settings are told to people, and read from them."""
from __future__ import annotations

import ast
import math
import sys

import numpy as np

__all__ = ["counted", "duration", "percent", "plain", "printable", "progress", "settings", "table"]


def percent(value):
    """Two digits, or whole percents, and never 1e-05."""
    return (np.format_float_positional(value, 2, fractional=False, trim="-") if value < 9.95 else f"{value:.0f}") + "%"


def duration(ns):
    """For people."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(ns) >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"


def counted(number, what, none="0"):
    """1 call, 2 calls."""
    return f"{number:,} {what}{'s' * (number != 1)}" if number > 0 else f"{none} {what}s"


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


def table(lines, left=1):
    """Cells as lines of text with a rule below the first; the first `left` columns begin where their title does."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = ["  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
    return "\n".join([told[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *told[1:]])


def progress(message):
    """On a terminal only; the next one takes its place, and the empty one leaves nothing."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{message}", end="", file=sys.stderr, flush=True)


def settings(text, separator=","):
    """``"a=1,b=None,c=word"`` as a dict of Python values; what is no literal is a string."""
    given = {}
    for setting in text.split(separator) if text else []:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise ValueError(f"{setting!r}: not NAME=VALUE")
        try:
            given[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[name] = value
    return given
