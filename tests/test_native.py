"""Native callbacks through capsules: whole structures and single functions, without the GIL, owners kept alive."""
import gc
import importlib.util
import shlex
import subprocess
import sysconfig
import threading
from pathlib import Path

import pytest

import ioproc
from recording import BASE, PAGE, RO, RW, device, pages

HOOKS = ioproc.HOOK_NAMES


@pytest.fixture(scope="session")
def probe(tmp_path_factory):
    """tests/native/probe.c, compiled against the installed ioproc.h."""
    source = Path(__file__).parent / "native" / "probe.c"
    target = tmp_path_factory.mktemp("native") / ("probe" + sysconfig.get_config_var("EXT_SUFFIX"))
    compiler = shlex.split(sysconfig.get_config_var("CC"))
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-I", sysconfig.get_paths()["include"],
                    "-I", ioproc.get_include(), str(source), "-o", str(target), "-pthread"], check=True)
    spec = importlib.util.spec_from_file_location("probe", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=64)


@pytest.fixture
def mm(mem):
    with ioproc.AddressSpace(mem) as space:
        yield space


def structure(probe, *, version=None, size=None, waits=False):
    return probe.structure(version or probe.VERSION, size or probe.SIZE, waits)


def run(mm):
    """One of each hook the VM fires, except the range forms of update."""
    pages(mm, 2)
    mm.touch(BASE)                                  # update_page
    mm.touch(BASE, write=True)                      # invalidate_page, update_page
    mm.fork().exit()                                # wrprotect_page
    mm.mprotect(BASE, PAGE, RO)                     # change_protection
    mm.munmap(BASE, 2 * PAGE)                       # invalidate_range
    mm.mmap(PAGE, RW, ioproc.MAP_FIXED | 0x21, addr=BASE)
    mm.msync(BASE, PAGE)                            # sync_range
    mm.exit()


EXPECTED = [("update_page", BASE, 0, 0), ("invalidate_page", BASE, 0, 0), ("update_page", BASE, 0, 0),
            ("wrprotect_page", BASE, 0, 0), ("change_protection", BASE, BASE + PAGE, RO),
            ("invalidate_range", BASE, BASE + 2 * PAGE, 0), ("sync_range", BASE, BASE + PAGE, 0), ("release", 1, 0, 0)]


def test_a_whole_structure(probe, mm):
    capsule = structure(probe)
    ops = ioproc.Ops(capsule, name="probe")
    assert repr(ops) == f"<ioproc.Ops 'probe': {', '.join(HOOKS)}>"
    mm.register_ops(ops)
    run(mm)
    calls = probe.calls(capsule)
    assert [(HOOKS[call["kind"]], *call["at"]) for call in calls] == EXPECTED
    assert not any(call["gil"] for call in calls)


def test_what_a_native_callback_sees(probe, mm):
    capsule = structure(probe)
    mm.register_ops(ioproc.Ops(capsule))
    file = ioproc.File(mm.mem, 8 * PAGE)
    mm.mmap(3 * PAGE, RW, ioproc.MAP_FIXED | 0x1, addr=BASE, file=file, offset=2 * PAGE)
    mm.touch(BASE + PAGE)
    pfn = int(mm.pagemap(BASE + PAGE, 1)["pfn"][0])
    mm.munmap(BASE, 3 * PAGE)
    update, invalidate = probe.calls(capsule)
    start, end, pgoff, flags = update["vma"]
    assert (start, end, pgoff) == (BASE, BASE + 3 * PAGE, 2)
    assert flags & 0xf == 0x1 | 0x2 | 0x8           # read, write, shared
    assert update["pte"] >> 12 == pfn and update["pte"] & 0x3 == 0x3
    assert invalidate["pte"] == 0                   # nothing at the range's first page


def test_the_entry_is_the_old_one_before_and_the_new_one_after(probe, mm):
    capsule = structure(probe)
    mm.register_ops(ioproc.Ops(capsule))
    pages(mm, 1)
    mm.touch(BASE)
    mm.touch(BASE, write=True)
    child = mm.fork()
    child.exit()
    zero, before, after, protect = (call["pte"] for call in probe.calls(capsule))
    assert zero & 0x201 == 0x201 and before == zero         # the zero page
    assert after >> 12 == mm.pagemap(BASE, 1)["pfn"][0]
    assert after & 0x2 and protect & 0x2                    # wrprotect_page runs before the bit is cleared


@pytest.mark.parametrize("kind", range(9))
def test_single_callbacks(probe, mm, kind):
    name = HOOKS[kind]
    capsule = probe.callback(kind, ioproc.Ops.signature(name))
    ops = ioproc.Ops(**{name: capsule})
    assert name in repr(ops)
    mm.register_ops(ops)
    run(mm)
    calls = probe.calls(capsule)
    assert [(HOOKS[call["kind"]], *call["at"]) for call in calls] == [e for e in EXPECTED if e[0] == name]
    assert not any(call["gil"] for call in calls)


def test_several_capsules_each_with_its_own_argument(probe, mm):
    update = probe.callback(7, ioproc.Ops.signature("update_page"))
    release = probe.callback(0, ioproc.Ops.signature("release"))
    mm.register_ops(ioproc.Ops(update_page=update, release=release))
    run(mm)
    assert len(probe.calls(update)) == 2 and len(probe.calls(release)) == 1
    assert not any(call["gil"] for call in probe.calls(update) + probe.calls(release))


def test_native_and_python_callbacks_in_one_ops(probe, mm):
    log = []
    update = probe.callback(7, ioproc.Ops.signature("update_page"))
    mm.register_ops(ioproc.Ops(update_page=update, release=log.append))
    run(mm)
    assert len(probe.calls(update)) == 2 and log == [mm]
    assert not any(call["gil"] for call in probe.calls(update))     # the mixture does not take the GIL for the native ones


def test_native_and_python_devices_on_one_chain(probe, mm):
    log = []
    capsule = structure(probe)
    mm.register_ops(device(log, "python"))
    mm.register_ops(ioproc.Ops(capsule))
    run(mm)
    assert [(entry[1], entry[2] if len(entry) > 2 else 1) for entry in log] == [entry[:2] for entry in EXPECTED]
    assert len(probe.calls(capsule)) == len(EXPECTED)


# ---- refused


@pytest.mark.parametrize(("arguments", "what"), [({"version": 99}, "version 99"), ({"size": 8}, "8 bytes")])
def test_another_abi_is_refused(probe, arguments, what):
    with pytest.raises(ValueError, match=what):
        ioproc.Ops(structure(probe, **arguments))


def test_wrong_capsules_are_refused(probe):
    page = probe.callback(7, ioproc.Ops.signature("update_page"))
    with pytest.raises(TypeError, match="native = .*ioproc.ops.v1"):
        ioproc.Ops(page)
    with pytest.raises(TypeError, match="invalidate_range = .*uint64_t, uint64_t"):
        ioproc.Ops(invalidate_range=page)
    with pytest.raises(TypeError, match="update_page = "):
        ioproc.Ops(update_page=probe.callback(7, "void (*)(void)"))
    with pytest.raises(TypeError, match="update_page = "):
        ioproc.Ops(update_page=structure(probe))
    with pytest.raises(TypeError, match="not both"):
        ioproc.Ops(structure(probe), update_page=print)
    with pytest.raises(ValueError, match="update_pages"):
        ioproc.Ops.signature("update_pages")


def test_signatures_of_one_kind_are_alike():
    assert ioproc.Ops.signature("release") == "void (void *, ioproc_mm *)"
    assert len({ioproc.Ops.signature(name) for name in HOOKS if name.endswith("_page")}) == 1
    assert len({ioproc.Ops.signature(name) for name in HOOKS if name.endswith("_range")}) == 1


# ---- lifetimes


def test_owners_live_as_long_as_the_registration(probe, mem):
    gc.collect()
    before = probe.freed()
    mm = ioproc.AddressSpace(mem)
    pages(mm, 2)
    mm.register_ops(ioproc.Ops(structure(probe)))
    mm.register_ops(ioproc.Ops(update_page=probe.callback(7, ioproc.Ops.signature("update_page"))), BASE, PAGE)
    gc.collect()
    assert probe.freed() == before
    mm.touch(BASE, 2 * PAGE, write=True)
    mm.fork().exit()
    mm.exit()
    del mm
    gc.collect()
    assert probe.freed() == before + 2


def test_owners_go_with_unregistering(probe, mm):
    gc.collect()
    before = probe.freed()
    pages(mm, 2)
    ops = ioproc.Ops(structure(probe))
    mm.register_ops(ops)
    mm.register_ops(ops, BASE, PAGE)
    mm.unregister_ops(ops)
    mm.touch(BASE)
    mm.unregister_ops(ops, BASE, PAGE)
    assert probe.freed() == before
    del ops
    gc.collect()
    assert probe.freed() == before + 1


def test_a_refused_registration_keeps_nothing(probe, mm):
    gc.collect()
    before = probe.freed()
    with pytest.raises(OSError, match="Cannot allocate"):
        mm.register_ops(ioproc.Ops(structure(probe)), BASE, PAGE)
    gc.collect()
    assert probe.freed() == before + 1


# ---- without the GIL


def test_python_goes_on_while_a_native_callback_runs(probe, mm):
    """The callback waits for a flag that only another Python thread can set."""
    capsule = structure(probe, waits=True)
    pages(mm, 1)
    mm.register_ops(ioproc.Ops(capsule))
    probe.set_flag(False)
    timer = threading.Timer(0.05, probe.set_flag, (True,))
    timer.start()
    mm.touch(BASE)
    timer.join()
    assert [call["flag"] for call in probe.calls(capsule)] == [True]


def test_two_address_spaces_make_progress_at_the_same_time(probe, mem):
    capsule = structure(probe, waits=True)
    waiting, free = ioproc.AddressSpace(mem), ioproc.AddressSpace(mem)
    pages(waiting, 1)
    waiting.register_ops(ioproc.Ops(capsule))
    probe.set_flag(False)
    thread = threading.Thread(target=waiting.touch, args=(BASE,))
    thread.start()
    while not waiting_in_callback(probe, capsule):
        pass
    pages(free, 4)
    free.write(BASE, b"x" * 4 * PAGE)
    free.munmap(BASE, 4 * PAGE)
    assert thread.is_alive()
    probe.set_flag(True)
    thread.join(60)
    assert [call["flag"] for call in probe.calls(capsule)] == [True]
    waiting.exit()


def waiting_in_callback(probe, capsule):
    return len(probe.calls(capsule)) > 0
