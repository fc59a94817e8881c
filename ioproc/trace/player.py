"""Replay a history through the model and count what its hooks would have done."""
from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from .._core import HOOK_NAMES, AddressSpace, Nic, Ops, PhysicalMemory, Player
from .communication import REGISTRATION, Communication
from .format import Op, Trace

__all__ = ["PLACEMENTS", "Replay", "replay"]

PLACEMENTS = ("none", "mm", "vma")
FRAMES = 1 << 24
LARGEST_FILE = 1 << 46      # of the model; what a damaged history claims beyond it is not there


@dataclass(frozen=True)
class Replay:
    """What one replay counted.

    Attributes
    ----------
    placement : str
    events : int
        Replayed.
    seconds, cpu_seconds : float
        Measured, of the replay itself; of the clock, and of this thread.
    operations : dict
        Events by operation.
    inferred : dict
        Of these, what the history does not tell and the import inferred: ``events``, ``access``, ``file``, ``size``.
    guessed : int
        Faults of unknown access: taken for a write where the mapping is writable.
    differences : dict
        Events that went otherwise than recorded, by operation and class (docs/replay.md says what each class is):
        ``result unmapped denied present beyond unmodelled``; and ``skipped``: calls that failed for a reason outside the
        address space.
    first_differing : list of int
        Indices of the first ones.
    disagreement : float
        Share of the events that differ, ``skipped`` aside.
    callbacks, useful : dict
        Callbacks run, and those whose range overlaps memory registered for communication at that moment, by callback name.
        `useful` is counted by the default device only.
    calls, useful_share : int, float
        Their sum without ``release``, and the useful part of it (nan without calls, or with other `ops`).
    chain_nodes : int
        Cells of chains visited.
    registrations, register_failures : int
    registered_peak : int
        Bytes registered for communication at a time, at most.
    vmas_peak : int
        VMAs of all processes together, at most.
    address_spaces : int
    faults : dict
        By kind: ``zero anon file reuse cow swap``.
    device : dict or None
        With a NIC: its counts (`ioproc.Nic.stats`) that this replay added.
    violations : list of Violation
        The first ones.
    """

    placement: str
    events: int
    seconds: float
    cpu_seconds: float
    operations: dict[str, int]
    inferred: dict[str, int]
    guessed: int
    differences: dict[str, dict[str, int]]
    first_differing: list[int]
    disagreement: float
    callbacks: dict[str, int]
    useful: dict[str, int]
    calls: int
    useful_share: float
    chain_nodes: int
    registrations: int
    register_failures: int
    registered_peak: int
    vmas_peak: int
    address_spaces: int
    faults: dict[str, int]
    device: dict[str, int] | None = None
    violations: tuple = ()

    @property
    def ns_per_event(self) -> float:
        """float: measured."""
        return self.seconds / self.events * 1e9 if self.events else float("nan")


def replay(trace: Trace, *, placement: str = "none", communication: Communication | None = None, ops: Ops | None = None,
           frames: int = FRAMES, swap_slots: int = 0, nic: Nic | None = None, attach: dict | None = None) -> Replay:
    """Drive one address space per process through a history, in one call without the GIL.

    Addresses the history returned are imposed; what differs from the record is counted, never hidden.

    Parameters
    ----------
    trace : Trace
    placement : {"none", "mm", "vma"}
        Where the device registers: nowhere, on every address space, or on the VMAs of communicating memory.
    communication : Communication, optional
        The memory that communicates, registered when it becomes writable (`ioproc.trace.choose`).  The history's own ``comm``
        events count besides: their memory is registered at its first communication.
    ops : Ops, optional
        The device, instead of one that counts useful and useless calls.  A callback that raises stops the replay after
        the event it happened in; the exception's notes say which.
    frames, swap_slots : int
        Physical memory; what is never used costs nothing.
    nic : Nic, optional
        A NIC instead of `placement`, `communication` and `ops`: processes that communicate are attached to it as they begin, and
        the history's ``comm`` events are their transfers, without bytes (`ioproc.Context.access`).
    attach : dict, optional
        Arguments of `ioproc.Nic.attach`: the design, one of ``ioproc.DESIGNS`` or as you like.

    Returns
    -------
    Replay

    Raises
    ------
    MemoryError
        Out of frames; the message says at which event.
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"trace = {trace!r}: not a Trace; see Trace.load")
    if placement not in PLACEMENTS:
        raise ValueError(f"placement = {placement!r}: not one of {', '.join(PLACEMENTS)}")
    if communication is not None and not isinstance(communication, Communication):
        raise TypeError(f"communication = {communication!r}: not a Communication; see ioproc.trace.choose")
    if ops is not None and not isinstance(ops, Ops):
        raise TypeError(f"ops = {ops!r}: not an Ops")
    if nic is not None and (placement != "none" or communication is not None or ops is not None):
        raise ValueError("nic: not with placement, communication or ops, whose place it takes")
    if attach is not None and nic is None:
        raise ValueError("attach: there is no nic to attach to")
    if nic is not None:
        if not isinstance(nic, Nic):
            raise TypeError(f"nic = {nic!r}: not a Nic")
        with AddressSpace(PhysicalMemory(FRAMES)) as mm, Nic() as other:
            other.attach(mm, **(attach or {}))      # its errors, before the work
    plan = np.empty(0, REGISTRATION) if communication is None else _checked(communication.plan)
    sizes = [min(int(file.get("size") or 0), LARGEST_FILE) for file in trace.metadata["files"]]
    events = np.ascontiguousarray(trace.events)
    communicating = set() if nic is None else set(np.unique(events["pid"][events["op"] == Op.COMM]).tolist())
    before = nic.stats if nic is not None else {}
    player = Player(PhysicalMemory(frames, swap_slots), sizes, ops, PLACEMENTS.index(placement), nic, attach or {}, communicating)
    begin, cpu_begin = time.perf_counter(), time.thread_time()
    player.run(events, plan)
    seconds, cpu_seconds = time.perf_counter() - begin, time.thread_time() - cpu_begin
    counted = player.result()
    device = None
    if nic is not None:
        device = {name: n - (0 if name.endswith("_peak") else before[name]) for name, n in nic.stats.items()}
    names = {op: Op(op).name.lower() for op in counted["operations"]}
    differences = {names[op]: {kind: n for kind, n in row.items() if kind != "agrees"}
                   for op, row in counted["differences"].items()}
    differing = sum(n for row in differences.values() for kind, n in row.items() if kind != "skipped")
    calls = sum(counted["callbacks"][name] for name in HOOK_NAMES if name != "release")
    useful = sum(counted["useful"].values())
    return Replay(
        placement=placement,
        events=counted["events"],
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        operations={names[op]: n for op, n in counted["operations"].items()},
        inferred=trace.inferred(),
        guessed=counted["guessed_access"],
        differences={op: row for op, row in differences.items() if row},
        first_differing=counted["noted"],
        disagreement=differing / max(counted["events"], 1),
        callbacks=counted["callbacks"],
        useful=counted["useful"],
        calls=calls,
        useful_share=useful / calls if calls and ops is None else float("nan"),
        chain_nodes=counted["chain_nodes"],
        registrations=counted["registrations"],
        register_failures=counted["register_failures"],
        registered_peak=counted["registered_peak"],
        vmas_peak=counted["vmas_peak"],
        address_spaces=counted["address_spaces"],
        faults=counted["faults"],
        device=device,
        violations=tuple(nic.violations()) if nic is not None else (),
    )


def _checked(plan):
    plan = np.ascontiguousarray(plan)
    if plan.dtype != REGISTRATION or plan.ndim != 1:
        raise TypeError("communication.plan: not a one-dimensional array of dtype ioproc.trace.REGISTRATION")
    if (plan["event"][1:] < plan["event"][:-1]).any():
        raise ValueError("communication.plan: not in the order of its events")
    return plan
