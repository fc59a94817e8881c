"""Workloads without a recording: each is what its parameters say, and agrees with the model, whatever a device does meanwhile."""
import inspect
import json
import math
from mmap import MADV_DONTNEED
from pathlib import Path

import numpy as np
import pytest

import ioproc
import ioproc.histories
from history import BASE, PAGE, READ, RO, RW, WRITE, History, page
from ioproc.trace import Op, Trace, choose, replay
from ioproc.workload import WORKLOADS, checkpoint, communicate, make, malloc_churn, pressure, ranks, static

HISTORIES = Path(list(ioproc.histories.__path__)[0])
SMALL = {
    "static": {"arrays": 8, "array_bytes": 40_000, "messages": 300, "largest": 1 << 15},
    "malloc_churn": {"allocations": 400, "live": 24, "messages": 300},
    "checkpoint": {"memory": 1 << 20, "buffers": 5, "buffer_bytes": 90_000, "messages": 300},
    "pressure": {"memory": 1 << 20, "passes": 3, "chunk_bytes": 10_000, "buffers": 4, "buffer_bytes": 50_000, "messages": 300},
    "ranks": {"n": 5, "iterations": 20, "memory": 100_000, "buffers": 3, "buffer_bytes": 9000, "messages": 300,
              "rebuild": 4, "shared_bytes": 5000},
}
CASES = [(name, SMALL[name] | more) for name, more in (
    ("static", {}), ("checkpoint", {}), ("pressure", {}), ("ranks", {}), ("static", {"hot": 0, "sends": 1}),
    *(("malloc_churn", {"allocator": allocator}) for allocator in ("glibc", "mmap", "arena")),
    ("malloc_churn", {"mmap_threshold": 1 << 17}), ("malloc_churn", {"trim_threshold": 0}),
    ("malloc_churn", {"arena_bytes": 5000, "allocator": "arena", "object_largest": 20_000}),
    ("checkpoint", {"lasts": 1, "dirty": 1}), ("checkpoint", {"lasts": 0}), ("checkpoint", {"checkpoints": 0}),
    ("pressure", {"passes": 0}), ("ranks", {"n": 1}), ("ranks", {"rebuild": 0, "shared_bytes": 0}), ("ranks", {"iterations": 0}),
    *((name, {"messages": 0}) for name in SMALL),
)]


def said(trace):
    return trace.events[trace.events["op"] == Op.COMM]


def accessed(trace):
    """The history with what a device that faults does to the page tables, done by the program."""
    events = np.array(trace.events)
    messages = events["op"] == Op.COMM
    end = events["addr"] + events["length"]
    events["addr"] = np.where(messages, events["addr"] // PAGE * PAGE, events["addr"])
    events["length"] = np.where(messages, end - events["addr"], events["length"])
    advice = np.where(events["access"] == WRITE, ioproc.MADV_POPULATE_WRITE, ioproc.MADV_POPULATE_READ)
    events["arg"] = np.where(messages, advice, events["arg"])
    events["op"] = np.where(messages, Op.MADVISE, events["op"])
    return Trace(events, trace.metadata)


# ---- all of them

@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_it_replays_as_it_says(name, parameters):
    trace = WORKLOADS[name](**parameters)
    assert replay(trace).differences == {}
    assert replay(accessed(trace)).differences == {}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_makes_the_same_history(name):
    once, again, other = (WORKLOADS[name](**SMALL[name], seed=seed) for seed in (3, 3, 4))
    assert (once.events == again.events).all()
    assert not np.array_equal(said(once), said(other))


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_metadata_tells_how_to_make_it_again(name, tmp_path):
    trace = WORKLOADS[name](**SMALL[name], seed=np.int64(7))
    assert set(trace.metadata["workload"]) == {"name"} | set(inspect.signature(WORKLOADS[name]).parameters)
    trace.save(tmp_path / "history.ioproc.xz")
    loaded = Trace.load(tmp_path / "history.ioproc.xz")
    assert json.loads(json.dumps(loaded.metadata)) == trace.metadata
    parameters = dict(loaded.metadata["workload"])
    assert (WORKLOADS[parameters.pop("name")](**parameters).events == loaded.events).all()
    assert (eval(trace.metadata["command"]).events == loaded.events).all()


@pytest.mark.parametrize("name", WORKLOADS)
def test_messages_are_as_many_and_as_long_as_asked_for(name):
    room = {"array_bytes": 1 << 20, "object_smallest": 1 << 20, "buffer_bytes": 1 << 20, "memory": 8 << 20, "buffers": 4}
    more = {key: value for key, value in room.items() if key in inspect.signature(WORKLOADS[name]).parameters}
    trace = WORKLOADS[name](**SMALL[name] | more | {"messages": 4000, "smallest": 64, "largest": 1 << 16, "sends": 0.75})
    messages = said(trace)
    lengths = np.log2(messages["length"])
    assert len(messages) == 4000
    assert (messages["length"].min(), messages["length"].max()) >= (64, 1 << 15) and messages["length"].max() <= 1 << 16
    assert np.histogram(lengths, 5, (6, 16))[0] == pytest.approx([800] * 5, rel=0.15)      # log-uniform
    assert (messages["access"] == READ).mean() == pytest.approx(0.75, abs=0.03)
    assert set(messages["access"]) == {READ, WRITE}


@pytest.mark.parametrize("name", WORKLOADS)
def test_hot_buffers_are_used_again(name):
    def favourite(hot):
        parameters = SMALL[name] | {"messages": 2000, "hot": hot, "sends": 1}
        if name == "malloc_churn":
            parameters |= {"allocations": 0}           # else the place is hot, not the address
        messages = said(WORKLOADS[name](**parameters))
        _, counts = np.unique(messages["addr"], return_counts=True)
        return counts.max() / counts.mean()
    assert favourite(0) < 1.3 < favourite(1) < favourite(3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: static(arrays=0), "arrays = 0"), (lambda: static(arrays=1.5), "arrays = 1.5"),
    (lambda: static(messages=-1), "messages = -1"), (lambda: static(communicating=1.1), "communicating = 1.1"),
    (lambda: static(communicating="all"), "communicating = 'all'"), (lambda: static(hot=-1), "hot = -1"),
    (lambda: static(hot=math.inf), "hot = inf"), (lambda: static(hot=None), "hot = None"),
    (lambda: static(sends=math.nan), "sends = nan"), (lambda: static(smallest=0), "smallest = 0"),
    (lambda: static(smallest=100, largest=99), "largest = 99"), (lambda: static(seed=-1), "seed = -1"),
    (lambda: static(array_bytes=1 << 41), "arrays = 64, array_bytes = 2199023255552"),
    (lambda: malloc_churn("jemalloc"), "allocator = 'jemalloc'"),
    (lambda: malloc_churn("mmap", trim_threshold=1), "trim_threshold"),
    (lambda: malloc_churn(live=0), "live = 0"), (lambda: malloc_churn(object_largest=1), "object_largest = 1"),
    (lambda: malloc_churn(mmap_threshold=-1), "mmap_threshold = -1"), (lambda: malloc_churn(arena_bytes=0), "arena_bytes = 0"),
    (lambda: malloc_churn(live=1 << 30), "live = 1073741824"),
    (lambda: checkpoint(memory=1 << 20, buffers=9), "buffers = 9 of buffer_bytes = 262144: more than memory = 1048576"),
    (lambda: checkpoint(dirty=2), "dirty = 2"), (lambda: checkpoint(lasts=-1), "lasts = -1"),
    (lambda: checkpoint(checkpoints=-1), "checkpoints = -1"), (lambda: pressure(memory=1 << 41), "memory = "),
    (lambda: pressure(resident=-0.1), "resident = -0.1"), (lambda: pressure(chunk_bytes=0), "chunk_bytes = 0"),
    (lambda: ranks(0), "n = 0"), (lambda: ranks(rebuild=-1), "rebuild = -1"),
    (lambda: ranks(1 << 20, memory=1 << 30), "n = 1048576"),
])
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


def test_a_million_events_take_a_few_seconds():
    trace = malloc_churn("mmap", allocations=25_000)
    assert len(trace) > 900_000
    assert (np.diff(trace.events["t"].astype(np.int64)) > 0).all()


# ---- each of them

def test_static_allocates_once():
    result = replay(static(**SMALL["static"]), placement="mm")
    assert result.operations == {"mmap": 8, "fault": 8 * 10, "comm": 300, "exit": 1}
    assert sum(result.callbacks[kind] for kind in ioproc.HOOK_NAMES if "invalidate" in kind) == 0


@pytest.mark.parametrize(("share", "arrays"), [(0, 0), (0.01, 1), (0.25, 2), (1, 8)])
def test_static_a_share_of_the_arrays_communicates(share, arrays):
    messages = said(static(**SMALL["static"] | {"communicating": share}))
    assert len(np.unique(messages["addr"])) == arrays


def counts(**parameters):
    trace = malloc_churn(**SMALL["malloc_churn"] | parameters)
    return trace, replay(trace).operations


def test_an_allocator_that_always_maps():
    _, operations = counts(allocator="mmap")
    assert (operations["mmap"], operations["munmap"], operations["brk"]) == (424, 400, 1)


def test_an_allocator_that_never_returns_memory():
    trace, operations = counts(allocator="arena", arena_bytes=1 << 22)
    assert "munmap" not in operations and "brk" not in operations and "madvise" not in operations
    assert set(trace.events["length"][trace.events["op"] == Op.MMAP]) == {1 << 22}
    faults = trace.events["addr"][trace.events["op"] == Op.FAULT]
    assert len(np.unique(faults)) == len(faults)


def test_glibc_maps_what_is_large_and_trims_what_is_free():
    trace, operations = counts(mmap_threshold=1 << 17, trim_threshold=1 << 16)
    lengths = trace.events["length"][trace.events["op"] == Op.MMAP]
    assert lengths.min() > 1 << 17 and 0 < len(lengths) < 424
    assert len(lengths) - operations["munmap"] <= 24            # those alive at the end
    ends = trace.events["ret"][trace.events["op"] == Op.BRK].astype(np.int64)
    assert (np.diff(ends) > 0).any() and (np.diff(ends) < 0).any()
    _, never = counts(mmap_threshold=1 << 17, trim_threshold=1 << 40)
    assert never["brk"] < operations["brk"]


def test_glibc_thresholds_follow_what_is_freed_unless_they_are_set():
    _, dynamic = counts()
    _, fixed = counts(mmap_threshold=128 << 10)
    _, everything = counts(mmap_threshold=0)
    assert dynamic["munmap"] < fixed["munmap"] < everything["munmap"] == 400


def test_an_unmapped_address_is_given_out_again():
    """What fools a pin-down cache that nobody tells."""
    trace, _ = counts(allocator="mmap")
    starts, used = np.unique(trace.events["ret"][trace.events["op"] == Op.MMAP], return_counts=True)
    assert used.max() > 3


def live_objects(trace):
    """Before each message, the ranges that malloc has mapped."""
    alive = {}
    for event in trace.events.tolist():
        _, _, _, op, *_, addr, length, _, ret = event
        if op == Op.MMAP:
            alive[ret] = ret + -(-length // PAGE) * PAGE
        elif op == Op.MUNMAP:
            del alive[addr]
        elif op == Op.COMM:
            yield alive, addr, addr + length


def test_messages_lie_in_objects_that_are_alive():
    for alive, start, end in live_objects(counts(allocator="mmap")[0]):
        assert any(begin < start and end <= stop for begin, stop in alive.items())     # after malloc's header


def test_checkpoint_forks_and_copies():
    parameters = SMALL["checkpoint"] | {"messages": 0}
    result = replay(checkpoint(**parameters, lasts=1))
    assert (result.operations["fork"], result.operations["exit"]) == (4, 5)
    assert (result.faults["cow"], result.faults["reuse"]) == (4 * round(0.2 * 256), 0)
    result = replay(checkpoint(**parameters, lasts=0))
    assert (result.faults["cow"], result.faults["reuse"]) == (0, 4 * round(0.2 * 256))
    assert replay(checkpoint(**parameters | {"checkpoints": 0})).faults["cow"] == 0


def test_what_the_device_wrote_first_the_program_copies_no_more():
    written, read = (checkpoint(**SMALL["checkpoint"] | {"sends": sends, "dirty": 1}) for sends in (0, 1))
    assert replay(written).operations["fault"] < replay(read).operations["fault"]


def test_pressure_names_its_frames():
    trace = pressure(**SMALL["pressure"], resident=0.25)
    assert (trace.metadata["frames"], trace.metadata["swap_slots"]) == (64, 256)
    uses = trace.events[trace.events["op"] == Op.MADVISE]
    assert len(uses) == 3 * math.ceil(256 / 3)
    assert uses["length"].sum() == 3 * (1 << 20)
    assert len(np.unique(uses["addr"])) == math.ceil(256 / 3)


def test_pressure_swaps():
    """As a program of its own, for what it asks of memory."""
    trace = pressure(**SMALL["pressure"], resident=0.25)
    mem = ioproc.PhysicalMemory(trace.metadata["frames"], swap_slots=trace.metadata["swap_slots"])
    with ioproc.AddressSpace(mem) as mm:
        for event in accessed(trace).events:
            addr, length = int(event["addr"]), int(event["length"])
            if event["op"] == Op.MMAP:
                mm.mmap(length, addr=int(event["ret"]), flags=int(event["flags"]) | ioproc.MAP_FIXED)
            elif event["op"] == Op.FAULT:
                assert mm.touch(addr, write=True) == 1
            elif event["op"] == Op.MADVISE:
                mm.madvise(addr, length, int(event["arg"]))
        assert mem.stats["swapped_in"] > 300


def test_ranks_are_processes_of_one_layout():
    trace = ranks(**SMALL["ranks"])
    result = replay(trace)
    assert result.address_spaces == 1 + 2 * 5       # a fork's, and the one after exec
    messages = said(trace)
    assert set(messages["pid"]) == set(trace.events["arg"][trace.events["op"] == Op.FORK])
    assert len(np.unique(messages["addr"])) == 3
    assert result.operations["munmap"] == 5 * 4
    assert len(trace.metadata["files"]) == 1
    assert result.faults["file"] == 5 * 2 * 2


# ---- by name

def test_a_workload_from_a_command_line():
    trace = make("malloc_churn:allocator=mmap,allocations=10,live=3,messages=5,hot=0.5,mmap_threshold=None")
    assert (trace.events == malloc_churn("mmap", 10, 3, messages=5, hot=0.5).events).all()
    assert make("ranks:n=1,messages=3").metadata["workload"]["n"] == 1
    assert make("static").metadata["workload"]["name"] == "static"


@pytest.mark.parametrize(("text", "message"), [
    ("churn", "workload 'churn': not one of static, malloc_churn"), ("", "workload ''"),
    ("static:arays=1", "'arays': static has"),
    ("static:arrays", "'arrays': not NAME=VALUE"), ("static:arrays=x", "arrays = 'x': not a whole number"),
    ("static:arrays=0", "arrays = 0: not at least 1"), ("static:arrays=1,", "'': not NAME=VALUE"),
])
def test_no_such_workload(text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(text)


# ---- messages for a recorded history

@pytest.mark.parametrize("kind", ["buffers", "mappings"])
@pytest.mark.parametrize("name", ["hpcc", "nodejs", "redis"])
def test_a_recorded_history_agrees_as_before(name, kind):
    trace = Trace.load(HISTORIES / f"{name}.ioproc.xz")
    talking = communicate(trace, 0.2, kind)
    rest = talking.events[talking.events["op"] != Op.COMM]
    assert (rest == trace.events).all()
    assert (np.diff(talking.events["t"].astype(np.int64)) >= 0).all()
    before, after, device = (sum(row.get("present", 0) for row in replay(one).differences.values())
                             for one in (trace, talking, accessed(talking)))
    assert after == before
    assert device <= before + 3             # a page that was discarded, and read again
    assert len(said(talking)) % 4 == 0
    assert len(said(talking)) > 0.5 * 4 * len(choose(trace, 0.2, kind).plan)
    assert set(said(talking)["access"]) == {READ, WRITE}


def messages(history, share=1, **options):
    """``(event before it, first byte from BASE, length, access)`` of each."""
    trace = communicate(history.trace(), share, "mappings", **{"messages": 200, "smallest": 1, "largest": 1 << 20} | options)
    before = np.arange(len(trace)) - np.cumsum(trace.events["op"] == Op.COMM)
    return [(int(at), int(event["addr"]) - BASE, int(event["length"]), int(event["access"]))
            for at, event in zip(before, trace.events) if event["op"] == Op.COMM]


@pytest.mark.parametrize("end", [
    lambda history: history.munmap(0, 8), lambda history: history.munmap(3, 1), lambda history: history.mmap(4, 9, RO),
    lambda history: history.mprotect(7, 1, RO), lambda history: history.mremap(0, 8, 8, to=100),
    lambda history: history.mremap(0, 8, 7), lambda history: history.mremap(50, 2, 2, to=6), lambda history: history.exec(),
    lambda history: history.exit(),
])
def test_a_buffer_communicates_until_its_end(end):
    history = History().mmap(0, 8, RW).mmap(50, 2, RO).fork(2)
    history.munmap(0, 8, pid=2).munmap(0, 8, errno=22).mprotect(0, 8, RW).mmap(8, 1, RO).madvise(0, 8, MADV_DONTNEED)
    last = len(history.rows) - 1
    end(history).mmap(60, 1, RO)
    found = messages(history)
    assert {at for at, *_ in found} == set(range(last + 1))
    assert len(found) == 200
    assert all(0 <= start and start + length <= 8 * PAGE for _, start, length, _ in found)


def test_a_heap_communicates_until_it_shrinks():
    history = History().brk(0, page(0)).brk(page(4)).brk(page(6)).mmap(60, 1, RO).brk(page(5)).mmap(61, 1, RO).brk(page(3))
    assert {(at, start // PAGE // 4) for at, start, *_ in messages(history)} == \
        {*((at, 0) for at in (1, 2, 3, 4, 5)), *((at, 1) for at in (2, 3))}


def test_no_message_before_the_program_touched_the_page():
    history = History().mmap(0, 4).fault(0).fault(1).fault(2).fork(2).fault(0).mmap(60, 1, RO)
    seen = set()
    for at, start, length, access in messages(history, messages=2000):
        for number in range(start // PAGE, (start + length - 1) // PAGE + 1):
            seen.add((number, at, access))
    assert {(number, at) for number, at, _ in seen} == \
        {(0, at) for at in range(1, 7)} | {(1, at) for at in range(2, 7)} | {(2, at) for at in range(3, 7)}
    # the device writes where no fault is to come
    assert {at for number, at, access in seen if (number, access) == (0, WRITE)} == {5, 6}
    assert {at for number, at, access in seen if (number, access) == (1, WRITE)} == {2, 3, 4, 5, 6}


def test_messages_of_a_recorded_history_are_drawn_with_a_seed():
    history = History().mmap(0, 64).faults(0, 64)
    assert messages(history, seed=1) == messages(history, seed=1) != messages(history, seed=2)
    assert messages(history, share=0) == []
    trace = communicate(history.trace(), 1, "mappings", seed=5)
    assert trace.metadata["communication"] == \
        {"share": 1, "kind": "mappings", "seed": 5, "messages": 4, "smallest": 64, "largest": 1 << 20}


def test_who_has_messages_gets_no_more():
    with pytest.raises(ValueError, match="communication of its own"):
        communicate(History().mmap(0, 8).comm(0, 1).trace(), 1)
    with pytest.raises(ValueError, match="share = 2"):
        communicate(History().mmap(0, 8).trace(), 2)
    with pytest.raises(ValueError, match="kind = 'all'"):
        communicate(History().mmap(0, 8).trace(), 1, "all")
    with pytest.raises(ValueError, match="messages = -1"):
        communicate(History().mmap(0, 8).trace(), 1, messages=-1)
    with pytest.raises(TypeError, match="not a Trace"):
        communicate(HISTORIES / "redis.ioproc.xz", 1)
