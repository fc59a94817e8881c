"""Every design on the same history: what it costs, and whether it was safe."""
from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import histories, workload
from ._core import DESIGNS, AddressSpace, Nic, PhysicalMemory, Violation, design_name, hit_curve
from .cost import COMPONENTS, Cost
from .text import counted, duration, percent, printable, progress, settings, table
from .trace import Op, Replay, Trace, replay
from .trace.player import FRAMES

__all__ = ["Comparison", "Row", "by_share", "checked", "compare", "design", "pictures", "translations"]

PAGE = 4096
HERE = "safe here"
SHARES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Row:
    """What one design did on a history.

    Attributes
    ----------
    design : str
    attach : dict
        The arguments of `Nic.attach` that make it.
    stats : dict
        The counts, as `Nic.stats` has them at the end.
    modelled : dict
        ns by component and their ``"total"``, as `Cost.model` makes them of the counts.
    measured_ns : float
        Processor time of the replay, beyond that of the same replay without a device: the least of the turns, and not below 0.
        What the model's own device and driver take here, and no property of a NIC.
    noise_ns : float
        How much the replays without a device differed, from the least to the median: what is below it says nothing.
    vmas_added : int
        At the peak, of all processes together, beyond those without a device.
    disagreement : float
        The share of the history's events that went otherwise than recorded.
    first_violations : tuple of Violation
    failed : str or None
        Why the replay could not go on, as where everything is pinned; the counts are 0 then.
    """

    design: str
    attach: dict[str, Any]
    stats: dict[str, int]
    modelled: dict[str, float]
    measured_ns: float
    noise_ns: float
    vmas_added: int
    disagreement: float
    first_violations: tuple[Violation, ...]
    failed: str | None = None

    @property
    def violations(self) -> int:
        """int: device accesses that the page table no longer allowed."""
        return self.stats["violations"]

    @property
    def safe(self) -> bool:
        """bool: it came through this history, without a violation."""
        return not self.violations and self.failed is None

    @property
    def sound(self) -> bool:
        """bool: another history would not show one either.  Not `pin-cache`, nor hooks that fork does not call."""
        told = self.attach.get("fork") != "posted" or self.attach.get("placement") == "none"
        return told and self.attach.get("translation") != "pin-cache"

    @property
    def useful_share(self) -> float:
        """float: of the callbacks; nan without any."""
        return self.stats["useful"] / self.stats["callbacks"] if self.stats["callbacks"] else float("nan")

    @property
    def hit_share(self) -> float:
        """float: of the look-ups in the translation cache; nan without any."""
        return self.stats["hits"] / self.stats["lookups"] if self.stats["lookups"] else float("nan")

    @property
    def modelled_ns(self) -> float:
        """float: all components."""
        return self.modelled["total"]

    def figures(self) -> dict[str, Any]:
        """All of it flat: a row of `Comparison.to_numpy`."""
        return {"design": self.design, "safe": self.safe, "sound": self.sound, **self.stats, "useful_share": self.useful_share,
                "hit_share": self.hit_share, "vmas_added": self.vmas_added, "disagreement": self.disagreement,
                "modelled_ns": self.modelled_ns,
                **{f"{component.replace(' ', '_')}_ns": self.modelled[component] for component in COMPONENTS},
                "measured_ns": self.measured_ns, "noise_ns": self.noise_ns}


class Comparison(Sequence):
    """Designs by metrics, from `compare`: a sequence of `Row`, in the order asked for; ``str`` is the table.

    Attributes
    ----------
    rows : list of Row
    trace : Trace
    nic : dict
        Arguments of `Nic`.
    cost : Cost
    nothing : Replay
        The history without a device.
    """

    def __init__(self, rows: list[Row], trace: Trace, nic: dict[str, Any], cost: Cost, nothing: Replay) -> None:
        self.rows = rows
        self.trace = trace
        self.nic = nic
        self.cost = cost
        self.nothing = nothing

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, which: Any) -> Any:
        """A row by its number, or by the name of its design."""
        if not isinstance(which, str):
            return self.rows[which]
        for row in self.rows:
            if row.design == which:
                return row
        raise KeyError(which)

    def ranked(self) -> list[Row]:
        """
        The designs by modelled cost, cheapest first: the sound ones, those that are safe on this history only, those that
        violated, those that failed.
        """
        return sorted(self.rows, key=lambda row: (row.failed is not None, not row.safe, not row.sound, row.modelled_ns))

    def to_numpy(self) -> np.ndarray:
        """A structured array, one row for each design.

        The fields are ``design``, ``safe``, ``sound``, every count of `Nic.stats`, ``useful_share``, ``hit_share``,
        ``vmas_added``, ``disagreement``, ``modelled_ns`` and each of its components, ``measured_ns``, ``noise_ns``.
        """
        figures = [row.figures() for row in self.rows]
        kinds = {bool: "?", int: "<i8", float: "<f8"}
        length = max(len(row.design) for row in self.rows)
        kind = [(name, f"<U{length}" if name == "design" else kinds[type(value)]) for name, value in figures[0].items()]
        return np.array([tuple(row.values()) for row in figures], kind)

    def __repr__(self) -> str:
        return f"<Comparison of {counted(len(self), 'design')}: {printable(self.trace.metadata.get('command', 'a history'))}>"

    def __str__(self) -> str:
        ranked = self.ranked()
        counts = [_COLUMNS] + [[_rank(number, row), row.design, *_counts(row)] for number, row in enumerate(ranked, 1)]
        parts = [["", "", "total", *COMPONENTS]]
        for number, row in enumerate(ranked, 1):
            ns = [row.modelled[component] for component in ("total", *COMPONENTS)]
            parts.append([_rank(number, row), row.design, *("-" if row.failed else duration(one) for one in ns)])
        nic = ", ".join(f"{name}={value}" for name, value in self.nic.items()) or "as Nic() is"
        changed = max((row.disagreement - self.nothing.disagreement for row in ranked if not row.failed), default=0)
        agreed = f"; at most {percent(100 * changed)} of the events otherwise than without a device" if changed > 0 else ""
        notes = "".join(f"\n{row.design}: {row.failed}" for row in ranked if row.failed)
        if any(row.safe and not row.sound for row in ranked):
            notes = f"\n{HERE}: no violation on this history; on one that unmaps, protects or forks there may be{notes}"
        transfers = self.nothing.operations.get("comm", 0)
        silent = "" if transfers else " (ioproc.workload.communicate adds some)"
        return (f"{counted(len(self.trace), 'event')}, {counted(transfers, 'transfer')}{silent}; "
                f"NIC: {nic}; modelled for: {self.cost.name}{agreed}\n\n{table(counts, 2)}{notes}\n\n"
                f"modelled time by component\n\n{table(parts, 2)}")


_COLUMNS = ["", "design", "callbacks", "useful", "inval.", "NIC faults", "hits", "regs", "pinned peak", "violations", "errors",
            "VMAs", "modelled", "measured"]


def _rank(number, row):
    return "failed" if row.failed else "UNSAFE" if not row.safe else str(number) if row.sound else HERE


def _counts(row):
    if row.failed:
        return ["-"] * (len(_COLUMNS) - 2)
    useful, hits = ("-" if share != share else percent(100 * share) for share in (row.useful_share, row.hit_share))
    number = {name: f"{count:,}" for name, count in row.stats.items()}
    measured = duration(row.measured_ns) if row.measured_ns > row.noise_ns else f"< {duration(row.noise_ns)}"
    return [number["callbacks"], useful, number["invalidations"], number["faults"], hits, number["registrations"],
            number["pinned_peak"], number["violations"], number["errors"], f"{row.vmas_added:+,}" if row.vmas_added else "0",
            duration(row.modelled_ns), measured]


def design(of: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a design and the arguments of `Nic.attach` that make it.

    Parameters
    ----------
    of : str or mapping
        A name in `ioproc.DESIGNS`; with ``/`` and another way to fork; with arguments: ``"mm+fault"``, ``"vma+fault/inherit"``,
        ``"mm+fault:prefault=16"``.  Or the arguments themselves, and optionally a ``name``.

    Raises
    ------
    ValueError
        There is none of that name.
    """
    if isinstance(of, str):
        base, _, given = of.partition(":")
        named, slash, fork = (base, "", "") if base in DESIGNS else base.partition("/")
        if named not in DESIGNS:
            raise ValueError(f"design {of!r}: not one of {', '.join(DESIGNS)}")
        return of, DESIGNS[named] | ({"fork": fork} if slash else {}) | settings(given, ":")
    if not isinstance(of, Mapping):
        raise TypeError(f"design {of!r}: neither a name nor a dict")
    attach = dict(of)
    if "name" in attach:
        return attach.pop("name"), attach
    more = [f":{name}={value}" for name, value in attach.items() if name not in ("placement", "translation", "fork")]
    return design_name(attach.get("placement", "mm"), attach.get("translation", "fault"),
                       attach.get("fork", "revised")) + "".join(more), attach


def compare(trace_or_workload: Trace | str, designs: Iterable[str | Mapping[str, Any]] | None = None,
            nic: Mapping[str, Any] | None = None, cost: Cost | str = "modern", *, frames: int | None = None,
            swap_slots: int | None = None, turns: int = 1) -> Comparison:
    """Replay a history once for every design.

    Parameters
    ----------
    trace_or_workload : Trace or str
        With communication: recorded, made by `ioproc.workload`, or added by `ioproc.workload.communicate`.  A string is a
        workload, such as ``"malloc_churn:allocator=mmap"``, or one of `ioproc.histories`, such as ``"redis"``, with
        communication as `communicate` adds it.
    designs : iterable of str or mapping, optional
        As `design` takes them.  Default: all of `ioproc.DESIGNS`.
    nic : mapping, optional
        Arguments of `Nic`.
    cost : Cost or str
        As `Cost.of` takes it.
    frames, swap_slots : int, optional
        Physical memory.  Default: what the history's metadata asks for, else more than enough, and no swap.
    turns : int
        How often each is replayed, in turn, for the measured time, which is of the fastest.  The counts are the same each time.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError, TypeError
        A bad argument, before anything is replayed; for a design that makes no sense, with the reason.
    MemoryError
        The history does not fit `frames` without a device.

    Notes
    -----
    Progress goes to the standard error if it is a terminal.
    """
    if not isinstance(turns, int) or turns < 1:
        raise ValueError(f"turns = {turns!r}: must be a whole number, at least 1")
    chosen, nic, cost = checked(designs, nic, cost)
    trace = _named(trace_or_workload) if isinstance(trace_or_workload, str) else trace_or_workload
    if not isinstance(trace, Trace):
        raise TypeError(f"trace_or_workload = {trace!r}: neither a Trace nor the name of a workload")
    memory = {"frames": _asked(trace, "frames", FRAMES) if frames is None else frames,
              "swap_slots": _asked(trace, "swap_slots", 0) if swap_slots is None else swap_slots}
    results: dict[str, Replay | MemoryError] = {}
    spent: dict[str, list[float]] = {name: [] for name, _ in chosen}
    without: list[float] = []
    try:
        for turn in range(turns):
            progress("no device")
            nothing = replay(trace, **memory)
            without.append(1e9 * nothing.cpu_seconds)
            for number, (name, attach) in enumerate(chosen, 1):
                progress(f"{name} ({number + turn * len(chosen)}/{turns * len(chosen)})")
                try:
                    with Nic(**nic) as device:
                        results[name] = replay(trace, nic=device, attach=attach, **memory)
                    spent[name].append(1e9 * results[name].cpu_seconds)
                except MemoryError as error:        # what is pinned is not reclaimed
                    results[name] = error
        without.append(1e9 * replay(trace, **memory).cpu_seconds)
    finally:
        progress("")
    return Comparison([_row(name, attach, results[name], nothing, cost, spent[name], without) for name, attach in chosen],
                      trace, nic, cost, nothing)


def checked(designs=None, nic=None, cost="modern"):
    """What `compare` makes of these arguments: [(name, arguments of `Nic.attach`)], a dict, a `Cost`; or its errors."""
    if nic is not None and not isinstance(nic, Mapping):
        raise TypeError(f"nic = {nic!r}: not a dict of arguments of Nic")
    nic, cost = dict(nic or {}), Cost.of(cost)
    chosen = [design(one) for one in (DESIGNS if designs is None else [designs] if isinstance(designs, str) else designs)]
    names = [name for name, _ in chosen]
    if not names:
        raise ValueError("designs: there are none")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"designs: {name!r} is there twice")
    _made("nic", Nic, nic).close()
    for name, attach in chosen:
        with AddressSpace(PhysicalMemory(FRAMES)) as mm, Nic(**nic) as device:
            _made(f"design {name!r}", device.attach, {"mm": mm} | attach)
    return chosen, nic, cost


def _made(what, make, arguments):
    try:
        return make(**arguments)
    except TypeError as error:
        raise ValueError(f"{what}: {str(error).replace('__cinit__()', 'Nic()')}") from None


def _named(name):
    if name in histories.names():
        return workload.communicate(histories.load(name))
    if name.partition(":")[0] not in workload.WORKLOADS:
        raise ValueError(f"{name!r}: neither a workload ({', '.join(workload.WORKLOADS)}) nor a history "
                         f"({', '.join(histories.names())})")
    return workload.make(name)


def _asked(trace, name, default):
    value = trace.metadata.get(name)
    return value if isinstance(value, int) and 0 < value <= FRAMES else default


def _row(name, attach, result, nothing, cost, spent, without):
    noise = statistics.median(without) - min(without)
    if isinstance(result, MemoryError):
        stats = dict.fromkeys(Nic().stats, 0)
        unknown = float("nan")
        modelled = dict.fromkeys(("total", *COMPONENTS), unknown)
        return Row(name, attach, stats, modelled, unknown, noise, 0, unknown, (), str(result))
    return Row(name, attach, result.device, cost.model(result.device), max(min(spent) - min(without), 0.0), noise,
               result.vmas_peak - nothing.vmas_peak, result.disagreement, result.violations)


def by_share(trace: Trace, shares: Sequence[float] = SHARES,
             designs: Iterable[str | Mapping[str, Any]] = ("mm+fault", "vma+fault"), nic: Mapping[str, Any] | None = None,
             cost: Cost | str = "modern", *, component: str = "total", kind: str = "buffers", seed: int = 0, messages: int = 4,
             ) -> dict[str, list[tuple[float, float]]]:
    """Modelled cost against the share of the memory that communicates, of a history without communication of its own.

    Parameters
    ----------
    trace, kind, seed, messages
        As `ioproc.workload.communicate` takes them.
    shares : sequence of float
    designs, nic, cost
        As `compare` takes them.
    component : str
        Of the modelled cost: ``"total"``, or one of `ioproc.cost.COMPONENTS`.

    Returns
    -------
    dict
        By design, ``(share, ns)`` for each of the shares; what `ioproc.plot.crossover` draws.
    """
    if component not in ("total", *COMPONENTS):
        raise ValueError(f"component = {component!r}: not one of total, {', '.join(COMPONENTS)}")
    named = [design(one) for one in designs]
    series: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in named}
    for share in shares:
        talking = workload.communicate(trace, share, kind, seed, messages)
        for row in compare(talking, [{"name": name} | attach for name, attach in named], nic, cost):
            series[row.design].append((share, row.modelled[component]))
    return series


def translations(trace: Trace) -> np.ndarray:
    """The translations that a history's messages ask the NIC for, in order, as `ioproc.hit_curve` takes them.

    One for each page of each message.  A number stands for one page of one process; a process that shares another's memory
    (vfork) counts as one of its own.
    """
    messages = np.concatenate([block[block["op"] == Op.COMM] for block in trace.blocks()] or [trace.events[:0]])
    messages = messages[messages["length"] > 0]
    first = messages["addr"] // PAGE
    count = ((messages["addr"] + messages["length"] - 1) // PAGE - first + 1).astype(np.intp)
    _, process = np.unique(messages["pid"], return_inverse=True)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    pages = np.repeat((process.astype(np.uint64) << 40) + first, count) + within.astype(np.uint64)
    return np.unique(pages, return_inverse=True)[1].astype(np.uint64)


def pictures(comparison: Comparison, path: str | os.PathLike[str], title: str | None = None) -> list[Path]:
    """Draw a comparison: its costs, the hits of caches of every size, and what hooks cost, by the share that communicates.

    Parameters
    ----------
    comparison : Comparison
    path : path
        For the costs, ``.png`` or ``.svg``; the others get ``-hits`` and ``-share`` before the suffix.  The last is of the same
        history with communication drawn anew for each share, for hooks on the address space and on VMAs.
    title : str, optional
        Of the history; default its command.

    Returns
    -------
    list of Path
        What was written; a history without messages has no hits.
    """
    from . import plot

    plot.check(path)
    path, trace = Path(path), comparison.trace
    written = [path]
    name = textwrap.shorten(printable(trace.metadata.get("command", "a history")) if title is None else title, 40,
                            placeholder=" ...")
    plot.cost_bars([row for row in comparison.ranked() if not row.failed], path,
                   f"{name}, {counted(comparison.nothing.operations.get('comm', 0), 'transfer')}")
    asked = translations(trace)
    if len(asked):
        written.append(path.with_stem(f"{path.stem}-hits"))
        plot.hit_curve(hit_curve(asked), written[-1], name)
    silent = Trace(trace.events[trace.events["op"] != Op.COMM], trace.metadata)
    written.append(path.with_stem(f"{path.stem}-share"))
    series = by_share(silent, nic=comparison.nic, cost=comparison.cost, component="callbacks")
    plot.crossover(series, written[-1], title=f"{name}: callbacks and attachments to VMAs")
    return written
