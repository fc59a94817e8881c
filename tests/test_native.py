"""Native callbacks, in capsules and as function pointers: types checked, without the GIL, owners kept alive."""
import _ctypes
import ctypes
import functools
import gc
import importlib.util
import shlex
import subprocess
import sys
import sysconfig
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import ioproc
from ioproc import lowlevel
from recording import BASE, PAGE, RO, RW, device, pages

try:
    import cffi
except ImportError:
    cffi = None
try:
    import numba
except ImportError:
    numba = None

HOOKS = ioproc.HOOK_NAMES


NATIVE = Path(__file__).parent / "native"


def compile_library(source, target):
    """Compile a file against the installed ioproc.h."""
    compiler = shlex.split(sysconfig.get_config_var("CC"))
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-I", sysconfig.get_paths()["include"],
                    "-I", ioproc.get_include(), str(source), "-o", str(target), "-pthread"], check=True)
    return target


@pytest.fixture(scope="session")
def probe(tmp_path_factory):
    """tests/native/probe.c, an extension module."""
    target = tmp_path_factory.mktemp("native") / ("probe" + sysconfig.get_config_var("EXT_SUFFIX"))
    compile_library(NATIVE / "probe.c", target)
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


def new_capsule(address, name, keep=[]):        # noqa: B006
    """A capsule without a context.  Python's function keeps the name's address only."""
    keep.append(name and ctypes.c_char_p(name.encode()))
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return prototype(("PyCapsule_New", ctypes.pythonapi))(address, keep[-1], None)


def structure(probe, *, version=None, size=None, waits=False):
    return probe.structure(version or probe.VERSION, size or probe.SIZE, waits)


def run(mm, ops=None):
    """One of each hook the VM fires, except the range forms of update; `ops` is registered on the VMA."""
    pages(mm, 2)
    if ops is not None:
        mm.register_ops(ops, BASE, 2 * PAGE)
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


def test_capsules_of_cython(mm, plain):
    """Cython's name for the same type, and no context: then the argument is ``arg``."""
    record = new_record()
    callbacks = {}
    for name in HOOKS:
        words = ioproc.Ops.signature(name).replace("const ioproc_vma *", "ioproc_vma const *")
        callbacks[name] = new_capsule(ctypes.cast(plain["plain_" + name], ctypes.c_void_p).value, words)
    mm.register_ops(ioproc.Ops(**callbacks, arg=record))
    run(mm)
    assert rows(record) == HEARD_WHOLE


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
    with pytest.raises(TypeError, match="update_page = .* has no name"):
        ioproc.Ops(update_page=new_capsule(1, None))
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


# ---- function pointers


ROW = np.dtype([(name, "u8") for name in ("calls", "a", "b", "c", "start", "pte")])     # as in plain.c
RECORD = np.dtype([("api", "u8"), ("rows", ROW, 9)])
KINDS = ["ctypes-prototype", "ctypes-argtypes", "ctypes-cast", "ctypes-python", "cffi-dlopen", "cffi-compiled", "cffi-addressof",
         "cffi-python", "numba"]
PYTHON = ["ctypes-python", "cffi-python"]


@pytest.fixture(scope="session")
def plain_path(tmp_path_factory):
    """tests/native/plain.c, a library that is not Python's."""
    return compile_library(NATIVE / "plain.c", tmp_path_factory.mktemp("plain") / "plain.so")


@pytest.fixture(scope="session")
def plain(plain_path):
    return ctypes.CDLL(str(plain_path))


@pytest.fixture(scope="session")
def ffi():
    if cffi is None:
        pytest.skip("cffi is not installed")
    ffi = cffi.FFI()
    ffi.cdef(lowlevel.CDEF)
    ffi.cdef(declarations())
    return ffi


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The (ffi, lib) of a cffi module with plain.c; the compiler compares CDEF with ioproc.h."""
    if cffi is None:
        pytest.skip("cffi is not installed")
    builder = cffi.FFI()
    builder.cdef(lowlevel.CDEF)
    builder.cdef(declarations())
    builder.set_source("plain_cffi", '#include "plain.c"', include_dirs=[str(NATIVE), ioproc.get_include()])
    spec = importlib.util.spec_from_file_location("plain_cffi", builder.compile(str(tmp_path_factory.mktemp("cffi"))))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ffi, module.lib


def declarations():
    functions = [ioproc.Ops.signature(name).replace(" (", f" plain_{name}(") + ";" for name in HOOKS]
    return "\n".join([*functions, "ioproc_ops *plain_ops(void *arg);"])


def new_record():
    record = np.zeros(1, RECORD)
    record["api"] = lowlevel.API
    return record


def rows(record):
    """What each callback heard: {name: (calls, a, b, c)}, those that heard nothing left out."""
    return {name: tuple(int(x) for x in row)[:4] for name, row in zip(HOOKS, record["rows"][0]) if row["calls"]}


def note(record, kind, vma_start, pte, a, b=0, c=0):
    """A Python callback's note in its row."""
    row = record["rows"][0][kind]
    record["rows"][0][kind] = (row["calls"] + 1, a, b, c, vma_start, pte)


def ctypes_python(record, kind):
    def called(arg, vma, *addresses):
        if kind == 0:
            note(record, 0, 0, 0, vma is not None)
        else:
            note(record, kind, vma[0].start, lowlevel.lookup_pte(vma[0].mm, addresses[0]), *addresses)
    return lowlevel.prototype(HOOKS[kind])(called)


def cffi_python(ffi, record, kind):
    def called(arg, vma, *addresses):
        if kind == 0:
            note(record, 0, 0, 0, vma != ffi.NULL)
        else:
            api = ffi.cast("ioproc_api *", lowlevel.API)
            note(record, kind, vma.start, api.lookup_pte(vma.mm, addresses[0]), *addresses)
    return ffi.callback(ioproc.Ops.signature(HOOKS[kind]), called)


@functools.cache
def numba_callback(kind):
    """A cfunc; the record is an array of words to it: one, then six a row."""
    lookup_pte = lowlevel.lookup_pte
    row = 1 + 6 * kind

    def first(arg):
        words = numba.carray(arg, 1 + 6 * 9, np.uint64)
        words[row] += 1
        return words

    first = numba.njit(first)

    def release(arg, mm):
        first(arg)[row + 1] = 1

    def page(arg, vma, addr):
        words = first(arg)
        words[row + 1] = addr
        words[row + 4] = numba.carray(vma, 1)[0].start
        words[row + 5] = lookup_pte(numba.carray(vma, 1)[0].mm, addr)

    def range_(arg, vma, start, end):
        words = first(arg)
        words[row + 1] = start
        words[row + 2] = end
        words[row + 4] = numba.carray(vma, 1)[0].start
        words[row + 5] = lookup_pte(numba.carray(vma, 1)[0].mm, start)

    def protection(arg, vma, start, end, newprot):
        words = first(arg)
        words[row + 1] = start
        words[row + 2] = end
        words[row + 3] = newprot
        words[row + 4] = numba.carray(vma, 1)[0].start
        words[row + 5] = lookup_pte(numba.carray(vma, 1)[0].mm, start)

    bodies = {"release": release, "change_protection": protection}
    body = bodies.get(HOOKS[kind], page if HOOKS[kind].endswith("page") else range_)
    return numba.cfunc(lowlevel.numba_signature(HOOKS[kind]))(body)


@pytest.fixture
def make(request, plain):
    """``make(kind_of_pointer, record)``: Ops with all nine callbacks."""
    def callback(pointer, record, kind):
        name = HOOKS[kind]
        match pointer:
            case "ctypes-prototype":
                return lowlevel.prototype(name)(("plain_" + name, plain))
            case "ctypes-argtypes":
                function = plain["plain_" + name]               # item access: a new object each
                function.argtypes, function.restype = lowlevel.prototype(name)._argtypes_, None
                return function
            case "ctypes-cast":
                return ctypes.cast(plain["plain_" + name], lowlevel.prototype(name))
            case "ctypes-python":
                return ctypes_python(record, kind)
            case "cffi-dlopen":
                ffi = request.getfixturevalue("ffi")
                return getattr(ffi.dlopen(plain._name), "plain_" + name)
            case "cffi-compiled":
                return getattr(request.getfixturevalue("compiled")[1], "plain_" + name)
            case "cffi-addressof":
                ffi, lib = request.getfixturevalue("compiled")
                return ffi.addressof(lib, "plain_" + name)
            case "cffi-python":
                return cffi_python(request.getfixturevalue("ffi"), record, kind)
            case "numba":
                if numba is None:
                    pytest.skip("numba is not installed")
                return numba_callback(kind)
    return lambda pointer, record: ioproc.Ops(**{name: callback(pointer, record, kind) for kind, name in enumerate(HOOKS)},
                                              arg=record)


HEARD = {"update_page": (2, BASE, 0, 0), "invalidate_page": (1, BASE, 0, 0), "wrprotect_page": (1, BASE, 0, 0),
         "change_protection": (1, BASE, BASE + PAGE, RO)}
HEARD_WHOLE = HEARD | {"invalidate_range": (1, BASE, BASE + 2 * PAGE, 0), "sync_range": (1, BASE, BASE + PAGE, 0),
                       "release": (1, 1, 0, 0)}
HEARD_VMA = HEARD | {"invalidate_range": (2, BASE + PAGE, BASE + 2 * PAGE, 0)}      # once for each of two VMAs


@pytest.mark.parametrize("pointer", KINDS)
def test_pointers(mem, make, pointer):
    """Each kind of pointer, all nine callbacks, in both placements, then both at once."""
    record = new_record()
    ops = make(pointer, record)
    assert repr(ops) == f"<ioproc.Ops: {', '.join(HOOKS)}>"
    mm = ioproc.AddressSpace(mem)
    mm.register_ops(ops)
    run(mm)
    assert rows(record) == HEARD_WHOLE
    record["rows"] = 0
    run(ioproc.AddressSpace(mem), ops)
    assert rows(record) == HEARD_VMA
    record["rows"] = 0
    mm = ioproc.AddressSpace(mem)
    mm.register_ops(ops)
    run(mm, ops)
    assert {name: row[0] for name, row in rows(record).items()} == {
        name: HEARD_WHOLE[name][0] + HEARD_VMA.get(name, (0,))[0] for name in HEARD_WHOLE}


@pytest.mark.parametrize("pointer", KINDS)
def test_pointers_look_at_entries(mm, make, pointer):
    record = new_record()
    mm.register_ops(make(pointer, record))
    pages(mm, 3)
    mm.touch(BASE + PAGE, write=True)
    row = record["rows"][0][HOOKS.index("update_page")]
    assert row["start"] == BASE and row["a"] == BASE + PAGE
    assert row["pte"] >> 12 == mm.pagemap(BASE + PAGE, 1)["pfn"][0] and row["pte"] & 0x3 == 0x3


def test_whole_structures(mem, plain, ffi, compiled):
    """Of ctypes, by value and by pointer, with Python behind it; made by a C library; made by cffi."""
    plain.plain_ops.restype = ctypes.POINTER(lowlevel.ioproc_ops)
    plain.plain_ops.argtypes = [ctypes.c_void_p]
    record = new_record()
    here = record.ctypes.data
    own = lowlevel.ioproc_ops(arg=here)
    for kind, name in enumerate(HOOKS):
        setattr(own, name, ctypes_python(record, kind))
    lib = ffi.dlopen(plain._name)
    filled = ffi.new("ioproc_ops *", [1, ffi.sizeof("ioproc_ops"), ffi.cast("void *", here),
                                      *[getattr(lib, "plain_" + name) for name in HOOKS]])
    compiled_ffi, compiled_lib = compiled
    made = compiled_lib.plain_ops(compiled_ffi.cast("void *", here))
    for native in (own, ctypes.pointer(own), plain.plain_ops(here), filled, lib.plain_ops(ffi.cast("void *", here)), made):
        record["rows"] = 0
        mm = ioproc.AddressSpace(mem)
        mm.register_ops(ioproc.Ops(native))
        run(mm)
        assert rows(record) == HEARD_WHOLE


def test_pointers_capsules_and_python_in_one_ops(probe, plain, mm):
    """Each with its own argument."""
    record, log = new_record(), []
    capsule = probe.callback(0, ioproc.Ops.signature("release"))
    mm.register_ops(ioproc.Ops(update_page=lowlevel.prototype("update_page")(("plain_update_page", plain)), arg=record,
                               wrprotect_page=lambda vma, addr: log.append(addr), release=capsule))
    run(mm)
    assert rows(record) == {"update_page": HEARD["update_page"]} and log == [BASE]
    assert len(probe.calls(capsule)) == 1 and not probe.calls(capsule)[0]["gil"]


# ---- the argument


def test_arguments(mm, ffi):
    """What update_page gets as its first argument, for each way to give one."""
    got = []
    callback = lowlevel.prototype("update_page")(lambda arg, vma, addr: got.append(arg))
    words = np.zeros(4, "u8")
    cell = ctypes.c_uint64()
    structure = lowlevel.ioproc_vma()
    array = (ctypes.c_int * 4)()
    cdata = ffi.new("int[4]")
    growing = bytearray(8)
    ways = [(None, None), (0, None), (0x1234, 0x1234), (2**64 - 1, 2**64 - 1),
            (words, words.ctypes.data), (words[2:], words.ctypes.data + 16),
            (cell, ctypes.addressof(cell)), (ctypes.byref(cell), ctypes.addressof(cell)),
            (ctypes.pointer(cell), ctypes.addressof(cell)), (ctypes.c_void_p(77), 77), (ctypes.c_void_p(), None),
            (structure, ctypes.addressof(structure)), (array, ctypes.addressof(array)),
            (cdata, int(ffi.cast("uintptr_t", cdata))), (cdata + 1, int(ffi.cast("uintptr_t", cdata)) + 4), (ffi.NULL, None),
            (growing, ctypes.addressof(ctypes.c_char.from_buffer(growing)))]
    pages(mm, 1)
    for arg, expected in ways:
        ops = ioproc.Ops(update_page=callback, arg=arg)
        mm.register_ops(ops)
        mm.touch(BASE)
        mm.madvise(BASE, PAGE, 4)               # MADV_DONTNEED
        mm.unregister_ops(ops)
        assert got.pop() == expected and not got


def test_wrong_arguments(probe, plain):
    callback = lowlevel.prototype("update_page")(("plain_update_page", plain))
    for arg in (object(), "text", b"read only", 1.5, np.zeros((4, 4))[:, 1], memoryview(b"x")):
        with pytest.raises(TypeError, match="arg = .* neither an address"):
            ioproc.Ops(update_page=callback, arg=arg)
    for arg in (-1, 2**64):
        with pytest.raises((ValueError, OverflowError), match="arg"):
            ioproc.Ops(update_page=callback, arg=arg)
    released = memoryview(bytearray(8))
    released.release()
    with pytest.raises(ValueError, match="released"):
        ioproc.Ops(update_page=callback, arg=released)
    for callbacks in ({}, {"update_page": print}, {"release": probe.callback(0, ioproc.Ops.signature("release"))}):
        with pytest.raises(TypeError, match="arg is for"):
            ioproc.Ops(**callbacks, arg=5)
    with pytest.raises(TypeError, match="not both"):
        ioproc.Ops(lowlevel.ioproc_ops(), arg=5)


def test_a_bytearray_keeps_its_size(plain):
    memory = bytearray(8)
    ops = ioproc.Ops(update_page=lowlevel.prototype("update_page")(("plain_update_page", plain)), arg=memory)
    with pytest.raises(BufferError):
        memory.extend(bytes(1 << 20))
    del ops
    memory.extend(bytes(1 << 20))


# ---- wrong types


def ctypes_pointer(result, *arguments):
    return ctypes.CFUNCTYPE(result, *arguments)(lambda *arguments: None)


class OtherVMA(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("end", ctypes.c_uint64)]


class SameVMA(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("start", "end", "pgoff", "flags")] + [("mm", ctypes.c_void_p)]


OPAQUE = type("ioproc_vma", (ctypes.Structure,), {})
PVOID, VMA, U64, U32 = ctypes.c_void_p, ctypes.POINTER(lowlevel.ioproc_vma), ctypes.c_uint64, ctypes.c_uint32


@pytest.mark.parametrize("arguments, has", [
    ([None], r"void \(\)"),
    ([None, PVOID, VMA], r"void \(void \*, ioproc_vma \*\)"),
    ([None, PVOID, VMA, U64, U64], r"uint64_t, uint64_t\)"),
    ([ctypes.c_int, PVOID, VMA, U64], r"int32_t \("),
    ([PVOID, PVOID, VMA, U64], r"void \* \("),
    ([None, PVOID, VMA, U32], "uint32_t"),
    ([None, PVOID, VMA, ctypes.c_int64], "int64_t"),
    ([None, PVOID, VMA, PVOID], r"void \*\)"),
    ([None, PVOID, VMA, ctypes.c_double], "c_double"),
    ([None, PVOID, lowlevel.ioproc_vma, U64], "ioproc_vma, "),
    ([None, PVOID, ctypes.POINTER(OtherVMA), U64], r"struct {start; end} \*"),
    ([None, PVOID, ctypes.POINTER(type("other", (ctypes.Structure,), {})), U64], r"other \*"),
    ([None, PVOID, ctypes.POINTER(VMA), U64], r"ioproc_vma \* \*"),
    ([None, U64, VMA, U64], r"void \(uint64_t"),
    ([None, ctypes.py_object, VMA, U64], "py_object"),
])
def test_wrong_ctypes(arguments, has):
    with pytest.raises(TypeError, match=f"update_page = .* is a '.*{has}.*needed is 'void .void .*, uint64_t.'"):
        ioproc.Ops(update_page=ctypes_pointer(*arguments))


@pytest.mark.parametrize("arguments", [
    [None, PVOID, PVOID, U64], [None, ctypes.POINTER(ctypes.c_char), VMA, ctypes.c_ulonglong],
    [None, VMA, ctypes.POINTER(SameVMA), U64], [None, np.ctypeslib.ndpointer(), ctypes.POINTER(OPAQUE), ctypes.c_size_t],
])
def test_right_ctypes(arguments):
    ioproc.Ops(update_page=ctypes_pointer(*arguments))


def test_ctypes_of_another_callback():
    for one in HOOKS:
        callback = lowlevel.prototype(one)(lambda *arguments: None)
        for other in HOOKS:
            if ioproc.Ops.signature(one) == ioproc.Ops.signature(other):
                ioproc.Ops(**{other: callback})
            else:
                with pytest.raises(TypeError, match=f"{other} = "):
                    ioproc.Ops(**{other: callback})


def test_a_library_function_must_say_its_type(plain_path):
    function = ctypes.CDLL(str(plain_path)).plain_update_page
    with pytest.raises(TypeError, match="update_page = .* no argtypes.*prototype..update_page"):
        ioproc.Ops(update_page=function)
    function.argtypes = [PVOID, VMA, U64]
    with pytest.raises(TypeError, match=r"int32_t \("):        # the restype that ctypes assumes
        ioproc.Ops(update_page=function)
    function.restype = None
    ioproc.Ops(update_page=function)
    needs_gil = ctypes.PyDLL(str(plain_path)).plain_update_page
    needs_gil.argtypes, needs_gil.restype = function.argtypes, None
    with pytest.raises(TypeError, match="update_page = .* needs the GIL"):
        ioproc.Ops(update_page=needs_gil)
    with pytest.raises(TypeError, match="update_page = .* needs the GIL"):
        ioproc.Ops(update_page=ctypes.PYFUNCTYPE(None, PVOID, VMA, U64)(lambda *arguments: None))


@pytest.mark.parametrize("ctype, has", [
    ("void (*)(void)", r"void \(\)"), ("void (*)(void *, ioproc_vma *)", r"ioproc_vma \*\)"),
    ("void (*)(void *, ioproc_vma *, uint64_t, ...)", r"\.\.\."), ("int (*)(void *, ioproc_vma *, uint64_t)", r"int \("),
    ("void (*)(void *, ioproc_vma *, int64_t)", "int64_t"), ("void (*)(void *, ioproc_vma *, uint32_t)", "uint32_t"),
    ("void (*)(void *, ioproc_mm *, uint64_t)", r"ioproc_mm \*"), ("void (*)(void *, struct vma *, uint64_t)", r"vma \*"),
    ("void (*)(void *, ioproc_ops *, uint64_t)", r"ioproc_ops \*"),
    ("void (*)(uintptr_t, ioproc_vma *, uint64_t)", "uint64_t, ioproc"),
    ("void (*)(void *, ioproc_vma *, double)", "double"), ("void *", r"void \*"), ("int *", r"int \*"), ("uintptr_t", "uint64_t"),
])
def test_wrong_cffi(ffi, ctype, has):
    with pytest.raises(TypeError, match=f"update_page = .* is a '.*{has}.*needed is 'void .void .*, uint64_t.'"):
        ioproc.Ops(update_page=ffi.cast(ctype, ioproc._core._lookup_pte_address))


@pytest.mark.parametrize("ctype", [
    "void (*)(void *, const ioproc_vma *, uint64_t)", "void (*)(struct device *, void *, unsigned long)",
    "void (*)(char *, const struct ioproc_vma *, size_t)", "void (*)(void *, struct same *, unsigned long long)",
])
def test_right_cffi(ffi, ctype):
    own = cffi.FFI()
    own.cdef("typedef struct ioproc_vma ioproc_vma; struct device { int x; };"
             "struct same { unsigned long start, end, pgoff; uint64_t flags; void *mm; };")
    ioproc.Ops(update_page=own.cast(ctype, ioproc._core._lookup_pte_address))


@pytest.mark.skipif(numba is None, reason="numba is not installed")
def test_wrong_and_right_numba():
    types = numba and numba.types
    record = numba.from_dtype(np.dtype(lowlevel.ioproc_vma))
    other = numba.from_dtype(np.dtype([("start", "u8")]))
    for signature, has in [
            (types.void(), r"void \(\)"), (types.void(types.voidptr, types.voidptr), r"void \*\)"),
            (types.int32(types.voidptr, types.voidptr, types.uint64), r"int32_t \("),
            (types.void(types.voidptr, types.voidptr, types.int64), "int64_t"),
            (types.void(types.voidptr, types.voidptr, types.float64), "float64"),
            (types.void(types.uint64, types.voidptr, types.uint64), r"void \(uint64_t"),
            (types.void(types.voidptr, types.CPointer(other), types.uint64), r"struct {start} \*")]:
        body = {0: lambda: None, 2: lambda a, b: None, 3: lambda a, b, c: None}[len(signature.args)]
        if signature.return_type != types.void:
            body = lambda a, b, c: 0            # noqa: E731
        with pytest.raises(TypeError, match=f"update_page = .* is a '.*{has}.*needed is 'void .void .*, uint64_t.'"):
            ioproc.Ops(update_page=numba.cfunc(signature)(body))
    for signature in [types.void(types.CPointer(types.uint64), types.CPointer(record), types.uint64),
                      types.void(types.CPointer(types.void), types.voidptr, types.uintp)]:
        ioproc.Ops(update_page=numba.cfunc(signature)(lambda a, b, c: None))


def test_wrong_structures(ffi):
    class Different(ctypes.Structure):
        _fields_ = [("version", U32), ("size", U32)]

    class Swapped(ctypes.Structure):            # the right fields, a function of another type
        _fields_ = [(name, dict(lowlevel.ioproc_ops._fields_)["update_page" if name == "sync_range" else name])
                    for name, _ in lowlevel.ioproc_ops._fields_]

    class Untyped(ctypes.Structure):
        _fields_ = [(name, PVOID if name == "release" else ctype) for name, ctype in lowlevel.ioproc_ops._fields_]

    with pytest.raises(TypeError, match=r"native = .*'struct {version; size} \*'; needed is 'ioproc_ops \*'"):
        ioproc.Ops(Different())
    for wrong, field in ((Swapped, "sync_range"), (Untyped, "release")):
        with pytest.raises(TypeError, match=f"native.{field} is a "):
            ioproc.Ops(wrong())
    with pytest.raises(TypeError, match=r"native = .*'ioproc_vma \*'; needed"):
        ioproc.Ops(ffi.new("ioproc_vma *"))
    with pytest.raises(TypeError, match="native = .*'ioproc_ops'; needed"):
        ioproc.Ops(ffi.new("ioproc_ops *")[0])
    other = cffi.FFI()
    other.cdef(lowlevel.CDEF.replace("(*sync_page)(void *arg, const ioproc_vma *vma, uint64_t addr)",
                                     "(*sync_page)(void *arg, uint64_t addr)"))
    with pytest.raises(TypeError, match=r"native.sync_page is a 'void \(void \*, uint64_t\)'"):
        ioproc.Ops(other.new("ioproc_ops *", [1, 88]))
    for native in (ffi.new("ioproc_ops *", [2, 88]), ffi.new("ioproc_ops *", [1, 80])):
        with pytest.raises(ValueError, match="native: ioproc_ops of version"):
            ioproc.Ops(native)
    for native in (3, "ioproc_ops", ctypes.c_void_p(3)):
        with pytest.raises(TypeError, match="native = "):
            ioproc.Ops(native)


# ---- dead owners


def test_null(ffi):
    for null in (lowlevel.prototype("update_page")(), ffi.cast("void (*)(void *, ioproc_vma *, uint64_t)", 0)):
        with pytest.raises(ValueError, match="update_page = .* NULL"):
            ioproc.Ops(update_page=null)
    for null in (ctypes.POINTER(lowlevel.ioproc_ops)(), ffi.cast("ioproc_ops *", 0)):
        with pytest.raises(ValueError, match="native = .* NULL"):
            ioproc.Ops(null)


def test_closed_libraries(plain_path, tmp_path, ffi):
    """Their functions, in every wrapping that survives them."""
    prototype = lowlevel.prototype("update_page")

    library = ctypes.CDLL(str(compile_library(NATIVE / "plain.c", tmp_path / "one.so")))
    function = prototype(("plain_update_page", library))
    address = ctypes.cast(function, PVOID).value
    capsule = new_capsule(address, ioproc.Ops.signature("update_page"))
    library.plain_ops.restype, library.plain_ops.argtypes = PVOID, [PVOID]
    structure = lowlevel.ioproc_ops.from_buffer_copy(ctypes.string_at(library.plain_ops(None), 88))
    for open_ in (function, prototype(address), capsule):
        ioproc.Ops(update_page=open_)
    ioproc.Ops(structure)
    _ctypes.dlclose(library._handle)
    for closed in (function, prototype(address), capsule):
        with pytest.raises(ValueError, match=f"update_page: there is no code at {address:#x}"):
            ioproc.Ops(update_page=closed)
    with pytest.raises(ValueError, match="native.release: there is no code"):
        ioproc.Ops(structure)

    library = ffi.dlopen(str(compile_library(NATIVE / "plain.c", tmp_path / "two.so")))
    function = library.plain_update_page
    ioproc.Ops(update_page=function)
    ffi.dlclose(library)
    with pytest.raises(ValueError, match="update_page: there is no code"):
        ioproc.Ops(update_page=function)
    own = cffi.FFI()
    own.cdef("void plain_update_page(void *, void *, uint64_t);")
    function = own.dlopen(str(compile_library(NATIVE / "plain.c", tmp_path / "three.so"))).plain_update_page
    ioproc.Ops(update_page=function)
    del own
    gc.collect()                                # closed with its FFI, though somebody has a function of it
    with pytest.raises(ValueError, match="update_page: there is no code"):
        ioproc.Ops(update_page=function)


def test_data_is_no_code():
    memory = ctypes.create_string_buffer(64)
    with pytest.raises(ValueError, match="update_page: there is no code"):
        ioproc.Ops(update_page=lowlevel.prototype("update_page")(ctypes.addressof(memory)))


# ---- kept alive


class Called:
    """A Python callback that can be weakly referenced."""

    def __init__(self, log):
        self.log = log

    def __call__(self, arg, vma, addr):
        self.log.append(addr)


def wrappers(ffi):
    return [lowlevel.prototype("update_page"), lambda f: ffi.callback(ioproc.Ops.signature("update_page"), f)]


def of_ctypes_structure(function, arg):
    native = lowlevel.ioproc_ops(update_page=lowlevel.prototype("update_page")(function))
    native.kept = arg
    return ioproc.Ops(native)


def test_pointers_live_as_long_as_the_registration(mem, ffi):
    ways = [lambda f, arg, wrap=wrap: ioproc.Ops(update_page=wrap(f), arg=arg) for wrap in wrappers(ffi)]
    for way in [*ways, of_ctypes_structure]:
        log = []
        called, arg = Called(log), (ctypes.c_char * 8)()
        alive = weakref.ref(called), weakref.ref(arg)
        mm = ioproc.AddressSpace(mem)
        mm.register_ops(way(called, arg))
        del called, arg
        gc.collect()
        pages(mm, 1)
        mm.touch(BASE)
        assert log == [BASE] and all(ref() is not None for ref in alive)
        mm.exit()
        gc.collect()
        assert not any(ref() for ref in alive)


def test_a_refused_ops_keeps_nothing():
    called = Called([])
    alive = weakref.ref(called)
    with pytest.raises(TypeError):
        ioproc.Ops(sync_range=lowlevel.prototype("update_page")(called))
    del called
    gc.collect()
    assert alive() is None


@pytest.mark.skipif(numba is None, reason="numba is not installed")
def test_numba_code_and_array_live_as_long_as_the_registration(mm):
    words = np.zeros(1 + 6 * 9, "u8")
    function = numba_callback.__wrapped__(HOOKS.index("update_page"))
    alive, memory = weakref.ref(function), weakref.ref(words)
    mm.register_ops(ioproc.Ops(update_page=function, arg=words))
    del function, words
    gc.collect()
    pages(mm, 1)
    mm.touch(BASE)
    assert memory()[1 + 6 * 7] == 1 and alive() is not None


def test_an_address_space_that_its_own_pointers_refer_to_is_collected(mem, ffi):
    for wrap in wrappers(ffi):
        mm = ioproc.AddressSpace(mem)
        pages(mm, 1)
        called = Called([])
        called.space = mm
        alive = weakref.ref(called)
        mm.register_ops(ioproc.Ops(update_page=wrap(called)))
        mm.touch(BASE)
        assert called.log == [BASE]
        del called, mm
        gc.collect()
        assert alive() is None
    assert mem.stats["frames_used"] == ioproc.PhysicalMemory(frames=64).stats["frames_used"]


# ---- Python code behind pointers


@pytest.mark.parametrize("pointer", PYTHON)
def test_exceptions_behind_pointers(mm, request, pointer, monkeypatch, capfd):
    """Printed where they happen; the operation, the rest of the chain and exceptions of plain callables go on as ever."""
    printed, log = [], []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: printed.append(args.exc_type))

    def fail(arg, vma, addr):
        raise LookupError("behind a pointer")

    def touches(arg, vma, addr):
        mm.touch(BASE)

    def plain_python(vma, addr):
        log.append(addr)
        raise KeyError("plain")

    if pointer == "ctypes-python":
        wrap = lowlevel.prototype("update_page")
    else:
        wrap = wrappers(request.getfixturevalue("ffi"))[1]
    pages(mm, 1)
    for ops in (ioproc.Ops(update_page=lambda vma, addr: log.append("first")), ioproc.Ops(update_page=wrap(fail))):
        mm.register_ops(ops)
    mm.touch(BASE)
    assert log == ["first"]
    mm.register_ops(ioproc.Ops(update_page=plain_python))
    mm.register_ops(ioproc.Ops(update_page=wrap(touches)))      # may not: RuntimeError, printed too
    with pytest.raises(KeyError, match="plain"):
        mm.touch(BASE, write=True)
    assert log == ["first", BASE, "first"] and mm.pagemap(BASE, 1)["dirty"][0]
    errors = capfd.readouterr().err + "".join(kind.__name__ for kind in printed)
    assert errors.count("LookupError") >= 2 and "RuntimeError" in errors


@pytest.mark.skipif(numba is None, reason="numba is not installed")
def test_exceptions_in_compiled_functions(mm, monkeypatch):
    """numba takes the GIL to print them; the array was written before."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: printed.append(str(args.exc_value)))

    @numba.cfunc(lowlevel.numba_signature("update_page"))
    def fails(arg, vma, addr):
        numba.carray(arg, 1, np.uint64)[0] += 1
        raise LookupError("compiled")

    calls = np.zeros(1, "u8")
    mm.register_ops(ioproc.Ops(update_page=fails, arg=calls))
    pages(mm, 4)
    mm.touch(BASE, 4 * PAGE, write=True)
    assert calls[0] == 4 and printed == ["compiled"] * 4 and mm.pagemap(BASE, 4 * PAGE)["dirty"].all()


@pytest.mark.parametrize("pointer", KINDS)
def test_pointers_from_several_threads(mem, make, pointer):
    """Address spaces of their own, and one that all of them use; registering and unregistering goes on meanwhile."""
    rounds, threads = (20, 3) if pointer in PYTHON else (200, 3)
    mem = ioproc.PhysicalMemory(frames=4096)
    shared = ioproc.AddressSpace(mem)
    record, coming_and_going = new_record(), make(pointer, new_record())
    shared.register_ops(make(pointer, record))
    own = [new_record() for _ in range(threads)]
    failed = []

    def work(number):
        try:
            at = BASE + number * 64 * PAGE
            space = ioproc.AddressSpace(mem)
            space.register_ops(make(pointer, own[number]))
            for mm in (space, shared):
                for i in range(rounds):
                    pages(mm, 4, at=at)
                    mm.touch(at, 4 * PAGE, write=True)
                    mm.munmap(at, 4 * PAGE)
                    if number == 0 and mm is shared and i % 8 == 0:
                        mm.register_ops(coming_and_going)
                        mm.unregister_ops(coming_and_going)
            space.exit()
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not failed and not any(worker.is_alive() for worker in workers)
    shared.exit()
    for number, each in enumerate(own):
        assert rows(each)["update_page"][0] == 4 * rounds and rows(each)["invalidate_range"][0] == rounds, number
        assert rows(each)["release"][0] == 1
    assert rows(record)["update_page"][0] == 4 * rounds * threads
    assert rows(record)["invalidate_range"][0] == rounds * threads


def test_other_libraries_are_not_imported():
    """ioproc needs neither cffi nor numba, and finds their pointers without importing them."""
    subprocess.run([sys.executable, "-c", "import sys, ioproc, ioproc.lowlevel\n"
                    "ioproc.Ops(update_page=print, sync_page=ioproc.lowlevel.prototype('sync_page')(print))\n"
                    "assert not {'cffi', '_cffi_backend', 'numba'} & set(sys.modules)"], check=True)
