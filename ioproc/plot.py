"""Pictures of results, as PNG or SVG by the file's suffix.  Needs matplotlib: ``pip install 'ioproc[plot]'``.

Colours are Okabe and Ito's, which people who see red and green alike can tell apart; lines differ in their marks as well.
"""
from __future__ import annotations

import io
import os
from itertools import combinations, cycle
from pathlib import Path

import numpy as np

from .cost import COMPONENTS
from .trace.source import output_path

__all__ = ["check", "cost_bars", "crossings", "crossover", "hit_curve"]

ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
COMPONENT_COLORS = dict(zip(COMPONENTS, (SKY, GREEN, VERMILION, BLUE, YELLOW, PURPLE), strict=True))
LINES = tuple(zip((BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK), "os^Dv<>", strict=True))
UNITS = (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 1))
SUFFIXES = (".png", ".svg")


def check(path: str | os.PathLike) -> None:
    """See that a picture could be made, before the work whose result it is to show.

    Raises
    ------
    ValueError
        A suffix that is neither ``.png`` nor ``.svg``.
    OSError
        Nothing can be written there.
    ImportError
        matplotlib is missing.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"path = {str(path)!r}: must end in {' or '.join(SUFFIXES)}")
    output_path(path)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ioproc[plot]'") from error


def _axes(path, title, height=4.2, **rows):
    """A picture with its axes, as many as `rows` say, one below the other."""
    check(path)
    from matplotlib.figure import Figure  # not pyplot: no display, nothing global

    figure = Figure(figsize=(7.2, height), layout="constrained")
    found = figure.subplots(**rows, squeeze=False)[:, 0]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title)
    return figure, *found


def _save(figure, path):
    """The whole picture or none; the same picture is the same file."""
    from matplotlib import rc_context

    suffix, picture = Path(path).suffix.lower()[1:], io.BytesIO()
    with rc_context({"svg.hashsalt": "ioproc", "svg.fonttype": "none"}):
        figure.savefig(picture, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    Path(path).write_bytes(picture.getvalue())


def _unit(ns):
    """The largest unit in which the value is at least 1, and its size in ns."""
    return next((unit for unit in UNITS if ns >= unit[1]), UNITS[-1])


def _duration(ns):
    unit, size = _unit(ns)
    return f"{ns / size:.3g} {unit}"


def cost_bars(comparison, path: str | os.PathLike, title: str | None = None) -> None:
    """Modelled cost by design, as bars of components, top down in the order given.

    Parameters
    ----------
    comparison : iterable
        Rows with ``design`` (its name), ``modelled`` (ns by component, as `Cost.model` returns it), ``violations`` and
        ``sound``; designs with violations are drawn pale and marked unsafe, others that are not sound ``safe here``.  A bar
        far longer than most is cut, and says so.
    path : path
        A file to write, ``.png`` or ``.svg``.
    title : str, optional

    Raises
    ------
    ValueError, ImportError
        As `check`; no rows.
    """
    check(path)
    rows = list(comparison)
    if not rows:
        raise ValueError("comparison: has no rows")
    totals = np.array([row.modelled["total"] for row in rows])
    longest = max(totals) or 1
    if longest > 8 * np.median(totals) > 0:         # else the others could still be read beside it
        longest = 4 * np.median(totals)
    unit, size = _unit(longest)
    figure, axes = _axes(path, title, height=1.7 + 0.3 * len(rows))
    places, begin = np.arange(len(rows)), np.zeros(len(rows))
    for component, color in COMPONENT_COLORS.items():
        length = np.minimum([row.modelled[component] / size for row in rows], longest / size - begin)
        if not length.any():
            continue
        bars = axes.barh(places, length, 0.75, begin, color=color, edgecolor="white", linewidth=0.5, label=component)
        for bar, row in zip(bars, rows, strict=True):
            bar.set_alpha(1 if row.sound and not row.violations else 0.35)
        begin += length
    for place, row, total in zip(places, rows, totals, strict=True):
        if total > longest:
            axes.text(0.9 * longest / size, place, "//", color="white", weight="bold", va="center")
        told = ("… " if total > longest else "") + _duration(total) + (
            "  UNSAFE" if row.violations else "" if row.sound else "  safe here")
        axes.annotate(told, (min(total, longest) / size, place), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize="small", color=VERMILION if row.violations else BLACK)
    axes.set_yticks(places, [row.design for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.25 * longest / size)
    axes.set_xlabel(f"modelled cost, {unit}")
    axes.grid(axis="x", color="0.9")
    if begin.any():
        legend = figure.legend(loc="outside lower center", ncols=3, frameon=False)
        for handle in legend.legend_handles:
            handle.set_alpha(1)
    _save(figure, path)


def hit_curve(curve, path: str | os.PathLike, title: str | None = None) -> None:
    """Share of look-ups that hit an LRU translation cache, against its size.

    Parameters
    ----------
    curve : array or dict
        What `ioproc.hit_curve` returned: hits for every size from 0 to the number of distinct pages; or several, by label.
    path, title
        As for `cost_bars`.

    Raises
    ------
    ValueError, ImportError
        As `check`; a curve without sizes above 0.
    """
    check(path)
    curves = curve if isinstance(curve, dict) else {None: curve}
    if not curves:
        raise ValueError("curve: has no curves")
    curves = {label: np.asarray(hits) for label, hits in curves.items()}
    for label, hits in curves.items():
        if hits.ndim != 1 or len(hits) < 2:
            raise ValueError(f"curve {label or ''}: must have the hits of the sizes 0, 1, ..., not of the shape {hits.shape}")
    figure, axes = _axes(path, title)
    # A few thousand points say as much as millions.
    sizes = np.unique(np.geomspace(1, max(map(len, curves.values())), 2000).astype(np.int64))
    for (label, hits), (color, mark) in zip(curves.items(), cycle(LINES)):
        distinct = len(hits) - 1
        lookups = hits[-1] + distinct                   # each page misses once in a cache that holds all
        axes.plot(sizes, 100 * hits[np.minimum(sizes, distinct)] / lookups, color=color, drawstyle="steps-post", label=label,
                  marker=mark, markevery=0.12, markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda entries, _: f"{entries:,.0f}")
    axes.set_ylim(0, 100)
    axes.set_xlabel("cache size, entries (fully associative, LRU)")
    axes.set_ylabel("look-ups that hit, %")
    axes.grid(color="0.9")
    if None not in curves:
        axes.legend(frameon=False)
    _save(figure, path)


def _series(series):
    """{label: (shares, ns)} in the order of the shares."""
    if not series:
        raise ValueError("series: has no lines")
    lines = {}
    for label, points in series.items():
        line = np.array(sorted(points), float).reshape(-1, 2)
        if not len(line) or not np.isfinite(line).all() or (line < 0).any() or (line[:, 0] > 1).any():
            raise ValueError(f"series {label!r}: must have pairs of a share from 0 to 1 and ns not below 0")
        lines[label] = line.T
    return lines


def crossings(series: dict) -> list[tuple[float, float, str, str]]:
    """Where the line that is lowest changes, between straight lines from point to point.

    Parameters
    ----------
    series : dict
        By label, pairs of a share (0 to 1) and ns.

    Returns
    -------
    list
        (share, ns, label of the lowest line before, of the lowest behind), by share.
    """
    lines = _series(series)
    shares = np.unique(np.concatenate([line[0] for line in lines.values()]))
    shares = shares[(shares >= max(line[0][0] for line in lines.values()))
                    & (shares <= min(line[0][-1] for line in lines.values()))]
    cost = {label: np.interp(shares, *line) for label, line in lines.items()}
    # Every share at which two lines meet: between two of them the order does not change.
    meet = set(shares.tolist())
    for one, other in combinations(cost.values(), 2):
        above = one - other
        for i in np.flatnonzero(above[:-1] * above[1:] < 0):
            meet.add(float(shares[i] + (shares[i + 1] - shares[i]) * above[i] / (above[i] - above[i + 1])))
    edges = sorted(meet)
    lowest = [min(lines, key=lambda label: np.interp(middle, *lines[label]))
              for middle in [(a + b) / 2 for a, b in zip(edges, edges[1:])]]
    return [(edges[i + 1], float(np.interp(edges[i + 1], *lines[after])), before, after)
            for i, (before, after) in enumerate(zip(lowest, lowest[1:])) if before != after]


def crossover(series: dict, path: str | os.PathLike, title: str | None = None) -> None:
    """Cost against the share of memory that communicates; where the cheapest line changes is marked.

    Parameters
    ----------
    series : dict
        By label, pairs of a share (0 to 1) and ns.  Below, lines are shown as differences to the first.
    path, title
        As for `cost_bars`.

    Raises
    ------
    ValueError, ImportError
        As `check`; no lines, or a point that is none.
    """
    check(path)
    lines, found = _series(series), crossings(series)
    first, (base_shares, base) = next(iter(lines.items()))
    unit, size = _unit(max(ns.max() for _, ns in lines.values()))
    few, fewer = _unit(max(abs(np.interp(base_shares, *line) - base).max() for line in lines.values()))
    figure, whole, apart = _axes(path, title, 5.4, nrows=2, sharex=True, height_ratios=(3, 2))
    for (label, (shares, ns)), (color, mark) in zip(lines.items(), cycle(LINES)):
        # Straight between the points, also where the axis is a logarithm.
        fine = np.unique(np.concatenate([shares, np.linspace(shares[0], shares[-1], 500)]))
        cost = np.interp(fine, shares, ns)
        style = {"color": color, "marker": mark, "markersize": 5, "markevery": np.searchsorted(fine, shares).tolist()}
        whole.plot(100 * fine, cost / size, label=label, **style)
        apart.plot(100 * fine, (cost - np.interp(fine, base_shares, base)) / fewer, **style)
    for share, ns, _, after in found:
        difference = (ns - np.interp(share, base_shares, base)) / fewer
        for axes, at in ((whole, ns / size), (apart, difference)):
            axes.axvline(100 * share, color="0.6", linestyle=":", zorder=0)
            axes.plot(100 * share, at, "o", color=BLACK, markersize=11, fillstyle="none")
        side, place = (-10, "right") if after == first else (10, "left")        # where the lines that meet here are not
        apart.annotate(f"{100 * share:.2g} %: from here\n{after} costs less", (100 * share, difference), xytext=(side, 8),
                       textcoords="offset points", va="bottom", ha=place, fontsize="small",
                       bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    if not found and len(lines) > 1:
        cheapest = min(lines, key=lambda label: lines[label][1][-1])
        apart.text(0.02, 0.95, f"no crossover in this range:\n{cheapest} costs less throughout", transform=apart.transAxes,
                   va="top", fontsize="small")
    if min(shares[0] for shares, _ in lines.values()) > 0:
        apart.set_xscale("log")
        apart.xaxis.set_major_formatter(lambda percent, _: f"{percent:g}")
    whole.set_ylim(bottom=0)
    whole.set_ylabel(f"modelled cost, {unit}")
    apart.set_ylabel(f"modelled cost beyond\nthat of\n{first}, {few}")
    apart.set_xlabel("share of the memory that communicates, %")
    for axes in (whole, apart):
        axes.grid(color="0.9")
    whole.legend(frameon=False)
    _save(figure, path)
