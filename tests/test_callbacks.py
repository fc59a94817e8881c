"""Callbacks may look and may not touch; where their exceptions go."""
import gc
import mmap
import sys
import threading
import weakref

import pytest

import ioproc
from recording import BASE, PAGE, RO, device, pages


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=256)


@pytest.fixture
def mm(mem):
    with ioproc.AddressSpace(mem) as space:
        yield space


def every_hook(callback):
    return ioproc.Ops(**dict.fromkeys(ioproc.HOOK_NAMES, callback))


def run_every_hook(mm):
    """Operations that between them fire every hook the model has."""
    mm.mmap(4 * PAGE, addr=BASE)
    mm.touch(BASE)
    mm.touch(BASE, 2 * PAGE, write=True)
    mm.fork().exit()
    mm.mprotect(BASE, PAGE, RO)
    mm.madvise(BASE, PAGE, mmap.MADV_DONTNEED)
    shared = mm.mmap(PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    mm.msync(shared, PAGE)
    mm.munmap(BASE, 2 * PAGE)


# ---- looking


def test_callbacks_may_look(mem, mm):
    other = ioproc.AddressSpace(mem)
    pages(other, 1)
    other.touch(BASE, write=True)
    looked = []

    def look(*arguments):
        assert mm.vmas() == mm.vmas()
        assert len(mm.pagemap(BASE, 4 * PAGE)) == 4
        looked.append(mm.stats["map_count"])
        assert other.vmas()[0].start == BASE            # another address space, if nobody uses it just now
        pfn = int(other.pagemap(BASE, 1)["pfn"][0])
        assert mem.mappings(pfn) == [(other, BASE)]
        assert mem.stats["frames"] == 256
        assert "VMAs" in repr(mm)

    mm.register_ops(every_hook(look))
    run_every_hook(mm)
    mm.exit()
    assert len(looked) > 10


def test_looking_at_a_busy_address_space_is_refused_not_waited_for(mem, mm):
    """Waiting inside a callback would deadlock: it raises instead."""
    other = ioproc.AddressSpace(mem)
    pages(other, 1)
    pages(mm, 1)
    inside, go_on = threading.Event(), threading.Event()
    other.register_ops(ioproc.Ops(update_page=lambda vma, addr: (inside.set(), go_on.wait(60))))
    busy = threading.Thread(target=other.touch, args=(BASE,))
    busy.start()
    assert inside.wait(60)
    caught = []

    def look(vma, addr):
        with pytest.raises(RuntimeError, match="in use") as refused:
            other.vmas()
        caught.append(refused)
        assert mem.mappings(1) == []

    mm.register_ops(ioproc.Ops(update_page=look))
    mm.touch(BASE)
    go_on.set()
    busy.join(60)
    assert len(caught) == 1 and not busy.is_alive()


def test_a_vma_stays_valid_after_its_callback(mm):
    kept = []
    mm.register_ops(ioproc.Ops(update_page=lambda vma, addr: kept.append(vma)))
    pages(mm, 2)
    mm.touch(BASE)
    mm.munmap(BASE, 2 * PAGE)
    assert (kept[0].start, kept[0].end) == (BASE, BASE + 2 * PAGE)


# ---- touching

OPERATIONS = {
    "mmap": lambda mm: mm.mmap(PAGE),
    "munmap": lambda mm: mm.munmap(BASE, PAGE),
    "mprotect": lambda mm: mm.mprotect(BASE, PAGE, RO),
    "mremap": lambda mm: mm.mremap(BASE, PAGE, 2 * PAGE),
    "madvise": lambda mm: mm.madvise(BASE, PAGE, mmap.MADV_DONTNEED),
    "msync": lambda mm: mm.msync(BASE, PAGE),
    "brk": lambda mm: mm.brk(0x555555760000),
    "shmat": lambda mm: mm.shmat(ioproc.File(mm.mem, PAGE)),
    "shmdt": lambda mm: mm.shmdt(BASE),
    "read": lambda mm: mm.read(BASE, 1),
    "write": lambda mm: mm.write(BASE, b"x"),
    "touch": lambda mm: mm.touch(BASE),
    "fork": lambda mm: mm.fork(),
    "exit": lambda mm: mm.exit(),
    "register_ops": lambda mm: mm.register_ops(ioproc.Ops()),
    "register_ops of a range": lambda mm: mm.register_ops(ioproc.Ops(), BASE, PAGE),
    "unregister_ops": lambda mm: mm.unregister_ops(ioproc.Ops()),
}


@pytest.mark.parametrize("where", ["same", "other"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_callbacks_may_not_touch(mem, mm, operation, where):
    other = ioproc.AddressSpace(mem)
    target = mm if where == "same" else other
    for space in (mm, other):
        pages(space, 3)
        space.write(BASE, b"kept")
    refused = []

    def touch(*arguments):
        before = target.vmas(), target.pagemap(BASE, 3 * PAGE).tolist(), target.stats, mem.stats
        with pytest.raises(RuntimeError, match="callback"):
            OPERATIONS[operation](target)
        assert before == (target.vmas(), target.pagemap(BASE, 3 * PAGE).tolist(), target.stats, mem.stats)
        refused.append(operation)

    mm.register_ops(every_hook(touch))
    mm.touch(BASE + PAGE, write=True)
    mm.munmap(BASE + PAGE, PAGE)
    mm.fork().exit()
    mm.exit()
    assert len(refused) == 4                # update, invalidate, wrprotect, release
    assert other.read(BASE, 4) == b"kept"   # and afterwards everything works again


def test_an_uncaught_refusal_reaches_the_caller_of_the_operation(mm):
    pages(mm, 2)
    mm.register_ops(ioproc.Ops(update_page=lambda vma, addr: mm.munmap(BASE, PAGE)))
    with pytest.raises(RuntimeError, match="callback"):
        mm.touch(BASE)
    assert mm.pagemap(BASE, 1)["present"][0]


def test_other_threads_are_not_refused(mem, mm):
    """The rule is about the thread that is in a callback, not about time."""
    other = ioproc.AddressSpace(mem)
    pages(mm, 1)
    done = []

    def callback(vma, addr):
        thread = threading.Thread(target=lambda: done.append(other.mmap(PAGE)))
        thread.start()
        thread.join(60)

    mm.register_ops(ioproc.Ops(update_page=callback))
    mm.touch(BASE)
    assert len(done) == 1


# ---- exceptions


class Failure(Exception):
    pass


def failing(name, *hooks, error=Failure):
    def callback(*arguments):
        raise error(name)
    return ioproc.Ops(name=name, **dict.fromkeys(hooks, callback))


def test_the_operation_completes_and_the_rest_of_the_chain_runs(mm):
    log = []
    pages(mm, 2)
    mm.register_ops(device(log, "last", "update_page", "invalidate_range"))
    mm.register_ops(failing("bad", "update_page", "invalidate_range"))
    mm.register_ops(device(log, "first", "update_page", "invalidate_range"))
    with pytest.raises(Failure, match="bad"):
        mm.touch(BASE, write=True)
    assert mm.pagemap(BASE, 1)["writable"][0]
    assert [entry[0] for entry in log] == ["first", "last"]
    with pytest.raises(Failure, match="bad"):
        mm.munmap(BASE, 2 * PAGE)
    assert mm.vmas() == []
    assert mm.mem.stats["frames_used"] == 0
    assert [entry[0] for entry in log[2:]] == ["first", "last"]


def test_the_first_exception_is_raised_the_others_are_its_notes(mm):
    pages(mm, 1)
    mm.register_ops(failing("third", "update_page", error=ValueError))
    mm.register_ops(failing("second", "update_page", error=KeyError))
    mm.register_ops(failing("first", "update_page"))
    with pytest.raises(Failure, match="first") as caught:
        mm.touch(BASE)
    notes = caught.value.__notes__
    assert len(notes) == 2
    assert "KeyError" in notes[0] and "second" in notes[0]
    assert "ValueError" in notes[1] and "third" in notes[1]


def test_an_exception_per_page_does_not_stop_a_range(mm):
    pages(mm, 5)
    mm.register_ops(failing("bad", "update_page"))
    with pytest.raises(Failure) as caught:
        mm.touch(BASE, 5 * PAGE)
    assert mm.pagemap(BASE, 5 * PAGE)["present"].all()
    assert len(caught.value.__notes__) == 4
    assert mm.touch(BASE, 5 * PAGE) == 0        # nothing left over for the next operation


def test_the_traceback_leads_to_the_callback(mm):
    pages(mm, 1)
    mm.register_ops(failing("bad", "update_page"))
    with pytest.raises(Failure) as caught:
        mm.touch(BASE)
    assert "callback" in [entry.name for entry in caught.traceback]


def test_exceptions_that_are_not_errors(mm):
    pages(mm, 1)
    mm.register_ops(failing("stop", "update_page", error=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mm.touch(BASE)
    assert mm.vmas()


def test_a_callback_with_the_wrong_arguments_is_a_type_error(mm):
    pages(mm, 1)
    mm.register_ops(ioproc.Ops(update_page=lambda: None))
    with pytest.raises(TypeError):
        mm.touch(BASE)


def test_an_exception_in_fork(mem, mm):
    pages(mm, 2)
    mm.touch(BASE, 2 * PAGE, write=True)
    mm.register_ops(failing("bad", "wrprotect_page"))
    with pytest.raises(Failure) as caught:
        mm.fork()
    assert len(caught.value.__notes__) == 1
    del caught
    gc.collect()
    assert mem.stats["frames_used"] == 2                # the child nobody got is gone
    mm.touch(BASE, 2 * PAGE, write=True)
    mm.exit()
    assert mem.stats["frames_used"] == 0


def test_an_exception_in_release(mem):
    log = []
    mm = ioproc.AddressSpace(mem)
    pages(mm, 1)
    mm.touch(BASE, write=True)
    mm.register_ops(device(log, "last", "release"))
    mm.register_ops(failing("bad", "release"))
    with pytest.raises(Failure):
        mm.exit()
    assert log == [("last", "release")]
    assert mem.stats["frames_used"] == 0
    mm.exit()


@pytest.fixture
def unraisable(monkeypatch):
    caught = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: caught.append((u.exc_type, str(u.exc_value))))
    return caught


def test_an_exception_in_release_during_garbage_collection(mem, unraisable):
    log = []
    mm = ioproc.AddressSpace(mem)
    mm.register_ops(device(log, "last", "release"))
    mm.register_ops(failing("bad", "release"))
    gone = weakref.ref(mm)
    del mm
    gc.collect()
    assert gone() is None
    assert unraisable == [(Failure, "bad")]
    assert log == [("last", "release")]


def test_an_address_space_collected_inside_a_callback(mem, mm, unraisable):
    """Its release runs there; what that raises is not the outer operation's."""
    log = []
    pages(mm, 1)
    doomed = [ioproc.AddressSpace(mem)]
    doomed[0].register_ops(device(log, "doomed", "release"))
    doomed[0].register_ops(failing("bad", "release"))
    mm.register_ops(ioproc.Ops(update_page=lambda vma, addr: doomed.clear()))
    assert mm.touch(BASE) == 1
    assert log == [("doomed", "release")]
    assert unraisable == [(Failure, "bad")]


def test_a_finalizer_may_use_the_address_space_whenever_it_runs(mm):
    """Looking allocates objects, so garbage collection may run in the middle of it."""
    class Buffer:
        def __init__(self):
            self.address = mm.mmap(PAGE)
            self.cycle = self

        def __del__(self):
            mm.munmap(self.address, PAGE)

    pages(mm, 200)
    for i in range(0, 200, 2):
        mm.mprotect(BASE + i * PAGE, PAGE, RO)
    threshold = gc.get_threshold()
    try:
        for look in (mm.vmas, lambda: mm.pagemap(BASE, 200 * PAGE), lambda: mm.stats, lambda: mm.fork().exit(),
                     lambda: mm.mem.mappings(1)):
            gc.collect()
            before = mm.stats["map_count"]
            for _ in range(20):
                Buffer()
                gc.set_threshold(1)
                look()
                gc.set_threshold(*threshold)
            gc.collect()
            assert mm.stats["map_count"] == before
    finally:
        gc.set_threshold(*threshold)


def test_threads_do_not_mix_their_exceptions(mem):
    """Each caller gets what its own operation's callbacks raised, though all share the ops."""
    def callback(vma, addr):
        if addr // PAGE % 2:
            raise Failure(threading.current_thread().name)
    ops = ioproc.Ops(update_page=callback)
    wrong = []

    def work(mm):
        name = threading.current_thread().name
        for i in range(300):
            try:
                mm.touch(BASE + i * PAGE)
                outcome = None
            except Failure as failure:
                outcome = str(failure), getattr(failure, "__notes__", [])
            if outcome != ((name, []) if i % 2 else None):
                wrong.append((name, i, outcome))

    spaces = [ioproc.AddressSpace(mem) for _ in range(3)]
    for mm in spaces:
        pages(mm, 300)
        mm.register_ops(ops)
    threads = [threading.Thread(target=work, args=(mm,)) for mm in spaces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
