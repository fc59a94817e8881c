"""What may come between a driver's look at the page table and what it tells the device, and between telling and clearing.

Beside test_device_races.py, which has the two races in their plainest form: every kind of operation, for every design that could
lose by it.
"""
import sys
import threading
import time

import pytest

import ioproc
from ioproc import _core
from recording import BASE, PAGE, RO, RW, pages
from threads import no_hang

DONTNEED = 4
SOON, LATE = 0.3, 60            # seconds: who has not come by then waits; is stuck


@pytest.fixture(autouse=True)
def no_deadlock():
    with no_hang(120):
        yield
        for point in ("teardown-gap", "establish", "read-begin", "inherit"):
            _core.schedule(point, None)


def once(point, call):
    """Call it where the first thread comes by the point."""
    def called():
        _core.schedule(point, None)
        call()
    _core.schedule(point, called)


class Process:
    """Four pages with "old" in them, and a device."""

    def __init__(self, design, **options):
        self.mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64, swap_slots=64), **options)
        self.context = ioproc.Nic().attach(self.mm, **ioproc.DESIGNS[design])
        self.thread = None
        pages(self.mm, 4)
        self.fill(b"old")

    def fill(self, data):
        for page in range(4):
            self.mm.write(BASE + page * PAGE, data)

    def start_access(self, page):
        """In a thread of its own; goes on when that has ended, or waits."""
        self.raised = []

        def access():
            try:
                self.context.access(BASE + page * PAGE, 1, write=True)
            except ioproc.RemoteAccessError as error:
                self.raised.append(error.cause)

        self.thread = threading.Thread(target=access)
        self.thread.start()
        self.thread.join(SOON)
        self.waited = self.thread.is_alive()

    def end_access(self):
        self.thread.join(LATE)
        assert not self.thread.is_alive()

    def caught(self, page):
        """What the oracle says of one more access."""
        try:
            self.context.access(BASE + page * PAGE, 1)
        except ioproc.RemoteAccessError:
            pass
        return {violation.kind for violation in self.context.violations()}


OPERATIONS = {      # which let go of the lock between batches
    "munmap": lambda mm: mm.munmap(BASE, 4 * PAGE),
    "mmap over it": lambda mm: pages(mm, 4),
    "MADV_DONTNEED": lambda mm: mm.madvise(BASE, 4 * PAGE, DONTNEED),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("design", ["mm+fault", "vma+fault", "mm+preload-registered", "mm+preload"])
def test_what_is_loaded_in_the_gap_is_stale(design, operation):
    """With the chain alone: the device was told, before."""
    process = Process(design, teardown_batch=1)
    process.context.access(BASE, 4 * PAGE, write=True)
    once("teardown-gap", lambda: process.start_access(3))
    OPERATIONS[operation](process.mm)
    process.end_access()
    assert not process.waited and not process.raised
    assert process.caught(3) == {"frame"}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("design", ["interval+fault", "interval+preload-registered"])
def test_nothing_is_loaded_in_the_gap(design, operation):
    process = Process(design, teardown_batch=1)
    process.context.access(BASE, 4 * PAGE, write=True)
    once("teardown-gap", lambda: process.start_access(3))
    OPERATIONS[operation](process.mm)
    process.end_access()
    assert process.waited and process.raised == (["unmapped"] if operation == "munmap" else [])
    assert process.caught(3) == set()


CHANGES = {         # what may come between looking at an entry and loading it, and what the device finds after it
    "other memory": (lambda process: (pages(process.mm, 4), process.fill(b"new")), b"new"),
    "unmapped": (lambda process: process.mm.munmap(BASE, 4 * PAGE), "unmapped"),
    "read-only": (lambda process: process.mm.mprotect(BASE, 4 * PAGE, RO), "permission"),
    "read-only and back": (lambda process: [process.mm.mprotect(BASE, 4 * PAGE, prot) for prot in (RO, RW)], b"old"),
    "forgotten": (lambda process: process.mm.madvise(BASE, 4 * PAGE, DONTNEED), b"\0\0\0"),
    "copied by fork": (lambda process: (process.mm.fork(), process.fill(b"new")), b"new"),
    "swapped out": (lambda process: process.mm.madvise(BASE, 4 * PAGE, 21), b"old"),
    "moved away": (lambda process: process.mm.mremap(BASE, 4 * PAGE, 4 * PAGE, 3, BASE + 64 * PAGE), "unmapped"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("batch", [0, 1])
def test_a_load_that_an_operation_comes_between_is_repeated(change, batch):
    process = Process("interval+fault", teardown_batch=batch)
    call, found = CHANGES[change]
    once("establish", lambda: call(process))
    try:
        process.context.rdma_write(BASE + PAGE + 100, b"device")
    except ioproc.RemoteAccessError as error:
        assert error.cause == found
    else:
        assert process.mm.read(BASE + PAGE, 3) == found and process.mm.read(BASE + PAGE + 100, 6) == b"device"
    assert process.context.stats["retries"] == 1
    assert process.caught(1) == set()


@pytest.mark.parametrize("change", ["other memory", "unmapped", "read-only", "forgotten", "copied by fork", "moved away"])
def test_without_the_retry_it_is_stale(change):
    process = Process("interval+fault")
    _core.break_interval(process.mm, process.context, retry=True)
    once("establish", lambda: CHANGES[change][0](process))
    process.context.access(BASE + PAGE, 1, write=True)
    assert process.context.stats["retries"] == 0
    assert process.caught(1) == {"permission" if change == "read-only" else "frame"}


def test_a_load_beside_an_operation_elsewhere_is_not_repeated():
    process = Process("interval+fault")
    pages(process.mm, 1, at=BASE + 16 * PAGE)
    once("establish", lambda: process.mm.munmap(BASE + 16 * PAGE, PAGE))
    process.context.access(BASE + PAGE, 1, write=True)
    assert process.context.stats["retries"] == 0


class Writers:
    """Six threads of a device that write now one thing, now another to the four pages; others that register beside them."""

    def __init__(self, context, registering=0):
        self.context, self.stop = context, threading.Event()
        self.threads = [threading.Thread(target=self.write, args=(number,)) for number in range(6)]
        self.threads += [threading.Thread(target=self.register, args=(number,)) for number in range(registering)]

    def write(self, number):
        data = [bytes([2 * number + i]) * 4 * PAGE for i in range(2)]
        try:
            while not self.stop.is_set():
                for one in data:
                    self.context.rdma_write(BASE, one)
        except ioproc.RemoteAccessError as error:
            assert error.cause == "detached"

    def register(self, number):
        while not self.stop.is_set():
            self.context.register(BASE + (8 + number) * PAGE, PAGE).deregister()

    def __enter__(self):
        self.interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        for thread in self.threads:
            thread.start()

    def __exit__(self, *exception):
        sys.setswitchinterval(self.interval)
        self.stop.set()
        for thread in self.threads:
            thread.join()


def changes(mm):
    """Does memory that only a device writes to still change?"""
    first = mm.read(BASE, 4 * PAGE)
    time.sleep(0.0005)
    return mm.read(BASE, 4 * PAGE) != first


@pytest.mark.parametrize(("design", "registering", "forks"), [
    ("mm+fault", 0, 200), ("vma+preload", 0, 200), ("interval+fault", 0, 200), ("mm+pin-cache+hooks", 0, 200),
    ("mm+fault", 3, 300)])
def test_an_operation_waits_for_the_access_in_flight(design, registering, forks):
    """What a device was writing when fork began is in the child, or is not: it does not arrive there later."""
    process = Process(design)
    pages(process.mm, 16)
    with Writers(process.context, registering):
        for _ in range(forks):
            child = process.mm.fork()
            assert not changes(child)
            child.exit()
    assert process.context.violations() == []


@pytest.mark.parametrize("design", ["mm+fault", "pin-cache", "interval+preload-registered"])
def test_detaching_waits_for_the_access_in_flight(design):
    process = Process(design)
    context = process.context
    for _ in range(60):
        with Writers(context):
            time.sleep(0.001)
            context.detach()
            assert not changes(process.mm)
        context = context.nic.attach(process.mm, **ioproc.DESIGNS[design])


def test_an_exit_is_told_to_intervals():
    """Before anything is unmapped: the device may be in the middle of it."""
    mem, nic = ioproc.PhysicalMemory(frames=600), ioproc.Nic()
    for _ in range(100):
        mm = ioproc.AddressSpace(mem)
        pages(mm, 512)
        context = nic.attach(mm, **ioproc.DESIGNS["interval+fault"], prefault=512)
        context.access(BASE, 512 * PAGE, write=True)
        begun = threading.Event()

        def device(context=context, begun=begun):
            begun.set()
            try:
                while True:
                    context.access(BASE, 512 * PAGE, write=True)
            except ioproc.RemoteAccessError as error:
                assert error.cause == "detached"

        thread = threading.Thread(target=device)
        thread.start()
        begun.wait()
        mm.exit()
        thread.join()
    assert nic.violations() == []


def test_a_stale_write_to_a_free_frame_is_lost():
    """Not even a translation that should not be reaches the next who is given the frame."""
    mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64), teardown_batch=2)
    pages(mm, 8)
    mm.touch(BASE, 8 * PAGE, write=True)
    context = ioproc.Nic().attach(mm, "mm", "fault")
    last = BASE + 7 * PAGE

    def load():
        thread = threading.Thread(target=context.access, args=(last, 1), kwargs={"write": True})
        thread.start()
        thread.join()

    once("teardown-gap", load)
    mm.munmap(BASE, 8 * PAGE)
    context.rdma_write(last, b"stale")
    assert len(context.violations()) == 1
    other = ioproc.AddressSpace(mm.mem)
    pages(other, 60)
    other.touch(BASE, 60 * PAGE, write=True)
    assert not any(other.read(BASE, 60 * PAGE))


@pytest.mark.parametrize("design", ["mm+fault", "interval+fault", "mm+pin-cache+hooks", "bounce"])
def test_a_nic_closed_while_a_process_forks(design):
    """It has listed whom to detach before the child is there, and waits for the parent's lock."""
    mm, nic = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=600)), ioproc.Nic()
    pages(mm, 4)
    nic.attach(mm, **ioproc.DESIGNS[design], fork="inherit").access(BASE, 4 * PAGE, write=True)
    closing = threading.Thread(target=nic.close)

    def told(vma, addr):
        if not closing.ident:
            closing.start()
            time.sleep(SOON)

    mm.register_ops(ioproc.Ops(wrprotect_page=told))
    child = mm.fork()
    closing.join(LATE)
    with pytest.raises(KeyError):
        nic.context(child)
    assert nic.stats["pinned"] == 0 and not closing.is_alive()
    child.exit()


@pytest.mark.parametrize("design", ["vma+fault", "interval+fault", "vma+pin-cache+hooks", "mm+preload-registered"])
def test_a_nic_closed_while_a_child_inherits_its_attachment(design):
    """Nothing of a context that is no more may be left in the child."""
    mm, nic = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=64)), ioproc.Nic()
    pages(mm, 4)
    nic.attach(mm, **ioproc.DESIGNS[design], fork="inherit").access(BASE, PAGE, write=True)
    before = nic.stats["attachments"]
    once("inherit", nic.close)
    child = mm.fork()
    assert nic.stats["attachments"] == before
    child.touch(BASE, 4 * PAGE, write=True)
    child.munmap(BASE, 4 * PAGE)
    assert child.stats["chain_nodes"] == 0
    child.exit()
