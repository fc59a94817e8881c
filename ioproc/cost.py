"""What the device's counts cost in nanoseconds, under named parameters each of which has a source.

Modelled time is a sum of products, one for each parameter: a count of ``nic.stats`` times the parameter.  It says what a
design would cost on hardware nobody here has; time that was measured is never mixed in.  ``print(Cost.of("modern"))``
lists the parameters.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import numbers
import os
import time
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

__all__ = ["COMPONENTS", "GRADES", "OPTIONS", "PRESETS", "Cost", "Figure", "Parameter"]

PAGE = 4096
COMPONENTS = ("callbacks", "translation", "NIC faults", "registration", "invalidation", "copies")
GRADES = {
    "T": "read in the source named", "S": "quoted second hand", "D": "derived from figures of the grades before",
    "O": "measured by ioproc", "A": "assumed: no figure is known", "M": "from memory: in options, never a default",
    "-": "given by the user",
}


class Figure(NamedTuple):
    """A value with where it is from."""

    value: float
    grade: str
    source: str


class Parameter(NamedTuple):
    """A row of `Cost.parameters`: the parameter, and the counts of ``nic.stats`` and the component it goes to."""

    name: str
    value: float
    unit: str
    grade: str
    source: str
    component: str
    counts: tuple[str, ...]


UTLB = "UTLB, Princeton TR-580-98 (1998), Myrinet"
TEZUKA = "Tezuka et al., IPPS 1998, Myrinet"
ASPLOS = "Lesokhin et al., ASPLOS 2017, InfiniBand"
UCX = "UCX's defaults for InfiniBand"
SVA = "VFIO I/O page fault RFC v2 (2021), Kunpeng 920"
NP_RDMA = "NP-RDMA, arXiv 2310.11062 (2023)"
PART = "PART, IEEE TPDS 2022"
VESELY = "Vesely et al., ISPASS 2016"
IO_URING = "io_uring fixed buffers, Linux 6.18, AMD EPYC"
OPEN_MX = "Open-MX, CAC 2009: pinning and unpinning"
WU = "Wu, Wyckoff, Panda 2003, InfiniBand"

ODP_PAGE = Figure(round((350_000 - 220_000) / 1023, 1), "D", f"{ASPLOS}: (350 us for 4 MiB - 220 us for 4 KiB) / 1,023 pages")
# A registration loads translations as well as pinning: figures of both together are split.
REGISTERED_PAGE = Figure(round(0.06 * PAGE - ODP_PAGE.value, 2), "D", f"{UCX}: 16 us + 0.06 ns/byte, of which load_ns is apart")


def _parameter(unit, component, counts, *figure):
    figure = Figure(*figure)
    return field(default=figure.value, metadata={"unit": unit, "component": component, "counts": tuple(counts.split()),
                                                 "figure": figure})


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What each thing that a device and its driver do costs.

    The defaults are those of the preset ``"modern"``.  Every parameter is a number of ns, finite and not below 0;
    `parameters` tells the unit, the counts it is multiplied with, and the source of each.  `of` makes one from a description,
    which it keeps as `name`; ``dataclasses.replace`` makes a variant.

    Raises
    ------
    TypeError, ValueError
        A parameter that is no number, or not finite, or below 0.
    """

    callback_ns: float = _parameter(
        "ns", "callbacks", "callbacks", 4.1, "O", "benchmarks/table.py: one native op dispatched")
    vma_attach_ns: float = _parameter(
        "ns", "callbacks", "attachments", 655, "O", "python -m ioproc.bench: register a buffer in the middle of a VMA")
    cache_hit_ns: float = _parameter(
        "ns/page", "translation", "hits", 0, "A", "beside the transfer itself, in every design alike")
    walk_ns: float = _parameter(
        "ns/page", "translation", "walks", 100, "D", f"{NP_RDMA}: adds 0.1 to 2 us where nothing faults; the least")
    load_ns: float = _parameter(
        "ns/page", "translation", "preloaded", ODP_PAGE.value, "D", f"as nic_fault_page_ns: {ODP_PAGE.source}")
    nic_fault_ns: float = _parameter(
        "ns", "NIC faults", "faults", 10_500, "D", f"{SVA}: 10.5 us per fault")
    nic_fault_page_ns: float = _parameter(
        "ns/page", "NIC faults", "prefaulted", *ODP_PAGE)
    retry_ns: float = _parameter(
        "ns", "NIC faults", "retries", 1_800, "D", f"{SVA}: handler 1.6 to 2.0 us; the middle")
    register_ns: float = _parameter(
        "ns", "registration", "registrations", 16_000, "T", f"{UCX}: 16 us + 0.06 ns/byte")
    register_page_ns: float = _parameter(
        "ns/page", "registration", "registered_pages", *REGISTERED_PAGE)
    deregister_ns: float = _parameter(
        "ns", "registration", "deregistrations", 0, "A", "UCX charges the registration alone")
    deregister_page_ns: float = _parameter(
        "ns/page", "registration", "deregistered_pages", 25, "T", f"{IO_URING}: unregister")
    regcache_ns: float = _parameter(
        "ns", "registration", "regcache_hits regcache_misses", 135, "D",
        f"{UCX}: 90 to 180 ns for a look-up in the registration cache; the middle")
    invalidate_ns: float = _parameter(
        "ns", "invalidation", "shootdowns", 4_200, "S", f"{VESELY}: device TLB shootdown, one entry")
    invalidate_entry_ns: float = _parameter(
        "ns/entry", "invalidation", "invalidated downgraded", 0, "S", f"{VESELY}: 4.4 us for a full flush: flat in the entries")
    copy_byte_ns: float = _parameter(
        "ns/byte", "copies", "copied_bytes", 0.053, "O", "the preset 'machine' on a Xeon of 2023: 32 MiB through 1 MiB")
    precopy_page_ns: float = _parameter(
        "ns/page", "copies", "precopied", 760, "O", "benchmarks/table.py: copy-on-write break with contents, the C program")

    name: str = field(default="modern", compare=False)
    figures: tuple[tuple[str, Figure], ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self):
        for parameter in _parameters():
            value = getattr(self, parameter.name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(f"{parameter.name} = {value!r}: must be a number of {parameter.metadata['unit']}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{parameter.name} = {value!r}: must be finite and not below 0 {parameter.metadata['unit']}")

    @classmethod
    def of(cls, cost: Cost | str) -> Cost:
        """The cost that a description means.

        Parameters
        ----------
        cost : Cost or str
            A `Cost` is returned as it is.  A string is a preset, then any number of options and of parameters in ns:
            ``"modern"``, ``"connectx-odp+iotlb-2018"``, ``"myrinet-2005+pin-opteron-2006,copy_byte_ns=1"``.
            ``"machine"`` measures this machine, once, in about a tenth of a second.

        Raises
        ------
        ValueError
            An unknown preset, option or parameter, or a value that is none.
        OSError
            ``"machine"`` where the kernel has no io_uring fixed buffers, or does not let us.
        """
        if isinstance(cost, Cost):
            return cost
        if not isinstance(cost, str):
            raise TypeError(f"cost = {cost!r}: must be a Cost or a string")
        names, *given = cost.split(",")
        preset, *options = names.split("+")
        if preset != "machine" and preset not in PRESETS:
            raise ValueError(f"cost = {cost!r}: no preset {preset!r}; there are {', '.join([*PRESETS, 'machine'])}")
        figures = dict(_machine() if preset == "machine" else PRESETS[preset])
        for option in options:
            if option not in OPTIONS:
                raise ValueError(f"cost = {cost!r}: no option {option!r}; there are {', '.join(OPTIONS)}")
            figures |= OPTIONS[option]
        for assignment in given:
            name, _, value = assignment.partition("=")
            if name not in _names():
                raise ValueError(f"cost = {cost!r}: no parameter {name!r}; there are {', '.join(_names())}")
            try:
                figures[name] = Figure(float(value), "-", "given")
            except ValueError:
                raise ValueError(f"cost = {cost!r}: {name} must be a number of ns, not {value!r}") from None
        return cls(**{name: figure.value for name, figure in figures.items()}, name=cost, figures=tuple(figures.items()))

    def parameters(self) -> list[Parameter]:
        """Every parameter: name, value, unit, grade, source, component, counts."""
        rows, figures = [], dict(self.figures)
        for parameter in _parameters():
            value, about = getattr(self, parameter.name), parameter.metadata
            known = (figures.get(parameter.name), about["figure"])
            figure = next((one for one in known if one and one.value == value), Figure(value, "-", "given"))
            rows.append(Parameter(parameter.name, value, about["unit"], figure.grade, figure.source, about["component"],
                                  about["counts"]))
        return rows

    def model(self, stats) -> dict[str, float]:
        """Modelled time.

        Parameters
        ----------
        stats : mapping
            Counts by name, as ``nic.stats`` or ``ctx.stats``.  One that is missing is 0; others are not looked at.

        Returns
        -------
        dict
            ns for each of `COMPONENTS`, and their ``"total"``.  A component is the sum over its parameters of the
            parameter times its counts, and nothing else.
        """
        ns = dict.fromkeys(COMPONENTS, 0.0)
        for parameter in _parameters():
            count = sum(stats.get(name, 0) for name in parameter.metadata["counts"])
            ns[parameter.metadata["component"]] += count * getattr(self, parameter.name)
        return ns | {"total": sum(ns.values())}

    def __str__(self):
        rows = [("parameter", "value", "unit", "grade", "source")]
        rows += [(one.name, f"{one.value:,.4g}" if one.value < 1000 else f"{one.value:,.0f}", one.unit, one.grade, one.source)
                 for one in self.parameters()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) if i == 1 else cell.ljust(width)
                                   for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)


def _parameters():
    return [one for one in fields(Cost) if "figure" in one.metadata]


def _names():
    return [one.name for one in _parameters()]


# What a preset does not name is as in "modern".
PRESETS: dict[str, dict[str, Figure]] = {
    "modern": {},
    "myrinet-2005": {
        "register_ns": Figure(0, "A", "in register_page_ns"),
        "register_page_ns": Figure(round((1 / 78.7 - 1 / 108.8) * 1000 * PAGE - ODP_PAGE.value), "D",
                                   f"{TEZUKA}: (1/78.7 - 1/108.8) us/byte, all misses against all hits; less load_ns"),
        "deregister_page_ns": Figure(0, "A", "in register_page_ns"),
        "cache_hit_ns": Figure(500, "T", f"{UTLB}: 0.5 us in the best case"),
        "walk_ns": Figure(2_000, "D", f"{UTLB}: less than 2 us on average under load, taken for a miss"),
    },
    "qsnet": {
        "register_ns": Figure(0, "A", "no registration: the Elan faults (the thread of 2005)"),
        "register_page_ns": Figure(0, "A", "no pinning: the Elan faults (the thread of 2005)"),
        "deregister_page_ns": Figure(0, "A", "no pinning: the Elan faults (the thread of 2005)"),
        "nic_fault_ns": Figure(38_000, "T", f"{PART}: minor fault; another NIC that traps to software, no figure of the Elan"),
    },
    "connectx-odp": {
        "nic_fault_ns": Figure(220_000, "S", f"{ASPLOS}: 220 us for 4 KiB"),
    },
    "np-rdma": {
        "nic_fault_ns": Figure(4_600, "D", f"{NP_RDMA}: 3.5 to 5.7 us for a minor fault; the middle"),
        "cache_hit_ns": Figure(100, "T", f"{NP_RDMA}: adds 0.1 to 2 us where nothing faults; the least"),
    },
}

# Figures nobody has checked since they were remembered: on request, on top of any preset.
OPTIONS: dict[str, dict[str, Figure]] = {
    "pin-opteron-2006": {
        "register_ns": Figure(4_200, "M", OPEN_MX), "register_page_ns": Figure(720, "M", OPEN_MX),
        "deregister_page_ns": Figure(0, "M", "in register_page_ns"),
    },
    "pin-xeon-2009": {
        "register_ns": Figure(1_300, "M", OPEN_MX), "register_page_ns": Figure(150, "M", OPEN_MX),
        "deregister_page_ns": Figure(0, "M", "in register_page_ns"),
    },
    "infiniband-2003": {
        "register_ns": Figure(7_420, "M", WU),
        "register_page_ns": Figure(round(770 - ODP_PAGE.value), "M", f"{WU}: 770 ns, of which load_ns is apart"),
        "deregister_ns": Figure(1_100, "M", WU), "deregister_page_ns": Figure(230, "M", WU),
    },
    "iotlb-2018": {"walk_ns": Figure(330, "M", "pcie-bench, SIGCOMM 2018: IOTLB miss")},
}


# This machine.  What the kernel does for io_uring's fixed buffers is what it does for a registration, but for the NIC's part,
# which is load_ns: it pins the pages and keeps where they are.
_IO_URING_SETUP, _IO_URING_REGISTER = 425, 427
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS = 0, 1
_PARAMS_BYTES = 120
_PAGES, _TURNS = (1, 4, 16, 64, 256, 1024), 50


class _Buffer(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _registrations_ns():
    """Least ns to register, to unregister, and for a call that does neither, by the sizes in `_PAGES`."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long

    def tried(done, call):
        if done < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"cost 'machine' measures io_uring's fixed buffers, but {call}: {os.strerror(error)}; "
                                 "take another preset")
        return done

    ring = tried(syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(_PARAMS_BYTES)), "io_uring_setup")
    memory = mmap.mmap(-1, _PAGES[-1] * PAGE)
    start = (ctypes.c_char * len(memory)).from_buffer(memory)
    least = np.full((len(_PAGES), 3), np.inf)
    try:
        with contextlib.suppress(OSError):      # a kernel without them
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        ctypes.memset(start, 1, len(memory))
        for _ in range(_TURNS):
            for i, pages in enumerate(_PAGES):
                buffer = ctypes.byref(_Buffer(ctypes.addressof(start), pages * PAGE))
                times = [time.perf_counter_ns()]
                tried(syscall(_IO_URING_REGISTER, ring, _REGISTER_BUFFERS, buffer, 1), "io_uring_register")
                times.append(time.perf_counter_ns())
                tried(syscall(_IO_URING_REGISTER, ring, _UNREGISTER_BUFFERS, None, 0), "io_uring_register")
                times.append(time.perf_counter_ns())
                syscall(_IO_URING_REGISTER, ring, _REGISTER_BUFFERS, buffer, 0)     # no buffers: refused
                times.append(time.perf_counter_ns())
                least[i] = np.minimum(least[i], np.diff(times))
    finally:
        os.close(ring)
        del start
        memory.close()
    return least.T


def _line(pages, ns):
    """(ns, ns/page) of a straight line through the times, each weighed by its size; neither below 0."""
    slope, start = np.polyfit(pages, ns, 1, w=1 / ns)
    return max(float(start), 0.0), max(float(slope), 0.0)


def _copy_ns():
    """Least ns/byte to copy memory that is not in a cache into a buffer that is."""
    source, bounce = np.ones(32 << 20, np.uint8), np.ones(1 << 20, np.uint8)
    least = math.inf
    for _ in range(10):
        begin = time.perf_counter_ns()
        for offset in range(0, len(source), len(bounce)):
            np.copyto(bounce, source[offset:offset + len(bounce)])
        least = min(least, (time.perf_counter_ns() - begin) / len(source))
    return least


@functools.cache
def _machine():
    register, unregister, nothing = _registrations_ns()
    here = f"io_uring fixed buffers, Linux {os.uname().release}, 1 to {_PAGES[-1]:,} pages, least of {_TURNS}"
    fixed, page = _line(_PAGES, register)
    unfixed, unpage = _line(_PAGES, unregister)
    call = float(nothing.min())
    return {
        "register_ns": Figure(max(fixed - call, 0.0), "O", f"{here}; less the {call:.0f} ns of a call that does nothing"),
        "register_page_ns": Figure(page, "O", here),
        "deregister_ns": Figure(max(unfixed - call, 0.0), "O", f"{here}; less the {call:.0f} ns of a call that does nothing"),
        "deregister_page_ns": Figure(unpage, "O", here),
        "copy_byte_ns": Figure(_copy_ns(), "O", "this machine: 32 MiB copied through a buffer of 1 MiB"),
    }
