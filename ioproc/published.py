"""Published results beside what ioproc gives for them, with the inputs each was given.

    python -m ioproc.published [--json]

A result counts as reproduced only if ioproc's inputs do not depend on it and the answer is within a factor of 1.5.  Inputs out of
the same paper make a consistency check: the arithmetic holds, and nothing is proved.  Where the data at hand do not
determine an answer, the row says so.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass

from . import AddressSpace, Cost, Nic, PhysicalMemory

__all__ = ["FACTOR", "Result", "results"]

FACTOR = 1.5
PAGE, MB = 4096, 1 << 20


@dataclass(frozen=True)
class Result:
    """A published result, and ours.

    Attributes
    ----------
    result, source, inputs : str
        What, who found it, and what ours was made from.
    published, ours : float
        In `unit`; ``ours`` is None where the data do not determine it.
    independent : bool
        Whether the inputs are independent of the result.
    """

    result: str
    source: str
    unit: str
    published: float
    ours: float | None
    inputs: str
    independent: bool

    @property
    def verdict(self) -> str:
        """What may be said of it: see the module."""
        if self.ours is None:
            return "not reproducible from the data given"
        within = 1 / FACTOR <= self.ours / self.published <= FACTOR
        if self.independent:
            return "reproduced" if within else "not reproduced"
        return "consistency check" if within else "inconsistent"


def transfer(length, prefault=1, buffers=1, **design):
    """Counts of a NIC that sends, and with two buffers receives, memory that was never used, on an address space of its own."""
    with AddressSpace(PhysicalMemory(2 * buffers * length // PAGE + 64)) as mm, Nic(1024) as nic:
        context = nic.attach(mm, prefault=prefault, **design)
        for write in (False, True)[:buffers]:
            addr = mm.mmap(length)
            mm.touch(addr, length, write=True)
            context.access(addr, length, write=write)
        return nic.stats


def premap():
    """Transfers through I/O page faults; the driver maps one page a fault, or 512."""
    source = "VFIO I/O page fault RFC v2 (2021)"
    yield Result("NIC faults of a transfer of 1 MB, one page a fault", source, "faults", 518,
                 transfer(MB, 1, buffers=2)["faults"],
                 "the model: mm+fault, 4 KiB pages; only the 518 tell that there are two buffers, and nothing what the 6 are",
                 False)
    yield Result("NIC faults of a transfer of 10 MB, 512 pages a fault", source, "faults", 13,
                 transfer(10 * MB, 512, buffers=2)["faults"],
                 "the model: mm+fault, 4 KiB pages, prefault 512, the two buffers of the row before: structural", True)


def batching():
    """4 MiB of NIC faults one by one, against one batch."""
    source = "Lesokhin et al., ASPLOS 2017"
    alone, batch = (transfer(4 * MB, pages) for pages in (1, 1024))
    for cost, inputs, independent in (
            ("connectx-odp", "the model: mm+fault, prefault 1 and 1024; cost connectx-odp, of the same paper", False),
            ("modern", "the model as before; cost modern: 10.5 us a fault (VFIO RFC), 127 ns a further page (this paper)", True)):
        one, other = (Cost.of(cost).model(stats)["NIC faults"] for stats in (alone, batch))
        yield Result("4 MiB of NIC faults, one by one against batched", source, "x", 220_000 / 350, one / other, inputs,
                     independent)


def pin_down_cache():
    """How much longer transfers take with a pin-down cache that never hits than with one that always does."""
    wire = 1000 / 108.8                             # ns/byte
    counts = transfer(4 * MB, placement="none", translation="pin")
    miss = {name: counts[name] for name in ("registrations", "registered_pages", "preloaded", "deregistered_pages")}
    for cost, inputs, independent in (
            ("myrinet-2005", "cost myrinet-2005, whose pinning is derived from these bandwidths", False),
            ("modern+pin-opteron-2006", "720 ns a page (Open-MX, an Opteron of 2006, from memory)", True)):
        yield Result("pin-down cache, 108.8 MB/s if all hit and 78.7 MB/s if all miss: time added by the misses",
                     "Tezuka et al., IPPS 1998", "%", 100 * (108.8 / 78.7 - 1),
                     100 * Cost.of(cost).model(miss)["total"] / (4 * MB * wire), f"the model: pin; 108.8 MB/s; {inputs}",
                     independent)


def shootdown():
    """An invalidation for each page, against one of their range."""
    def invalidation(step):
        with AddressSpace(PhysicalMemory(1024)) as mm, Nic(1024) as nic:
            context = nic.attach(mm)
            addr = mm.mmap(512 * PAGE)
            mm.touch(addr, 512 * PAGE, write=True)
            context.access(addr, 512 * PAGE)
            for at in range(addr, addr + 512 * PAGE, step):
                mm.munmap(at, step)
            return Cost().model(nic.stats)["invalidation"]

    yield Result("512 pages invalidated one by one against at once", "Vesely et al., ISPASS 2016", "x", 512 * 4.2 / 4.4,
                 invalidation(PAGE) / invalidation(512 * PAGE),
                 "the model: mm+fault, munmap page by page and at once; 4.2 us a shootdown, of the same paper", False)


def faults_in_software():
    """What NP-RDMA saves over on-demand paging by the NIC."""
    yield Result("a minor fault, on-demand paging against NP-RDMA", "NP-RDMA, arXiv 2310.11062", "x", 500,
                 Cost.of("connectx-odp").nic_fault_ns / Cost.of("np-rdma").nic_fault_ns,
                 "220 us (ASPLOS 2017) over 3.5 to 5.7 us, the middle; the ODP time of the paper itself is not given", True)


def pinning_here():
    """What pinning a page costs against unpinning it, on this machine."""
    try:
        here = Cost.of("machine")
        ours, inputs = here.register_page_ns / here.deregister_page_ns, "measured here, now (Cost.of('machine'))"
    except OSError as error:
        ours, inputs = None, f"not measured: {error.strerror}"
    yield Result("io_uring fixed buffers, a page registered against unregistered", "Linux 6.18, AMD EPYC", "x", 82 / 25, ours,
                 inputs, True)


def smaller_buffers():
    yield Result("pinned buffers of MPI, without on-demand paging against with", "Li et al., SC 2016", "x", 11, None,
                 "the buffers' sizes and the applications' communication are not at hand", True)


def results() -> list[Result]:
    """All rows; takes a second."""
    made = (premap, batching, pin_down_cache, shootdown, faults_in_software, pinning_here, smaller_buffers)
    return [row for rows in made for row in rows()]


def table(rows) -> str:
    """The rows as a table in Markdown."""
    lines = ["| result | source | published | ours | verdict | inputs |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours = "-" if row.ours is None else f"{row.ours:.3g} {row.unit}"
        lines.append(f"| {row.result} | {row.source} | {row.published:.3g} {row.unit} | {ours} | {row.verdict} | {row.inputs} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m ioproc.published", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the rows as JSON, not as a table in Markdown")
    asked = parser.parse_args(arguments)
    rows = results()
    try:
        print(json.dumps([asdict(row) | {"verdict": row.verdict} for row in rows], indent=1) if asked.json else table(rows))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # what is left in the buffer
        if isinstance(error, BrokenPipeError):                              # whoever read our output has seen enough
            return 0
        print(f"ioproc.published: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
