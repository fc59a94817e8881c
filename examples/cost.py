"""What one call of an empty callback costs for each way to write one, beside an empty C function: all in one run.

    python cost.py [TURNS]

The ways take turns; shown are medians over the turns: CPU time, and its ratio to C's in the same turn with the range that holds
80 % of them.  Needs a C compiler, setuptools and Cython; cffi and numba are left out where they are not installed.
"""
import contextlib
import ctypes
import importlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

import ioproc
from ioproc import _core, lowlevel

try:
    from cffi import FFI  # not `import cffi`: the folder beside this program has the name
except ImportError:
    FFI = None
try:
    from numba import cfunc
except ImportError:
    cfunc = None

SIGNATURE = ioproc.Ops.signature("update_page")
EMPTY = "(void *arg, const ioproc_vma *vma, uint64_t addr) {}\n"

C = f"""
#include <Python.h>
#include "ioproc.h"
void empty{EMPTY}
static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "empty_c", 0, -1, 0}};

PyMODINIT_FUNC PyInit_empty_c(void)
{{
    PyObject *self = PyModule_Create(&module);
    if (self)
        PyModule_AddObject(self, "capsule", PyCapsule_New(empty, "{SIGNATURE}", 0));
    return self;
}}
"""

CYTHON = """
# cython: language_level=3
from libc.stdint cimport uint64_t
from ioproc.hooks.chain cimport ioproc_vma

cdef api void empty(void *arg, const ioproc_vma *vma, uint64_t addr) noexcept nogil:
    pass
"""


def build():
    """Compile the extension modules in the current folder."""
    Path("empty_c.c").write_text(C)
    Path("empty_cython.pyx").write_text(CYTHON)
    include = [ioproc.get_include()]
    modules = [Extension("empty_c", ["empty_c.c"], include_dirs=include, export_symbols=["empty"]),
               *cythonize([Extension("empty_cython", ["empty_cython.pyx"], include_dirs=include)], quiet=True)]
    if FFI:
        builder = FFI()
        builder.cdef(lowlevel.CDEF + "void empty(void *arg, const ioproc_vma *vma, uint64_t addr);")
        builder.set_source("empty_cffi", '#include "ioproc.h"\nstatic void empty' + EMPTY)
        builder.emit_c_code("empty_cffi.c")
        modules.append(Extension("empty_cffi", ["empty_cffi.c"], include_dirs=include))
    setup(name="empty", ext_modules=modules, script_args=["--quiet", "build_ext", "--inplace"])


def ways():
    """(what, callback, calls in a turn) for each way; C first."""
    def python(*arguments):
        pass

    empty_c, empty_cython = (importlib.import_module(name) for name in ("empty_c", "empty_cython"))
    prototype = lowlevel.prototype("update_page")
    native, slow = 200_000, 2_000
    yield "C, in a capsule", empty_c.capsule, native
    yield "C, by ctypes", prototype(("empty", ctypes.CDLL(empty_c.__file__))), native
    if FFI:
        ffi = FFI()
        ffi.cdef(lowlevel.CDEF + "void empty(void *arg, const ioproc_vma *vma, uint64_t addr);")
        yield "C, by cffi's dlopen (ABI mode)", ffi.dlopen(empty_c.__file__).empty, native
        yield "C, compiled by cffi (API mode)", importlib.import_module("empty_cffi").lib.empty, native
    yield "Cython, `cdef api`", empty_cython.__pyx_capi__["empty"], native
    if cfunc:
        yield "numba, `cfunc`", cfunc(lowlevel.numba_signature("update_page"))(lambda arg, vma, addr: None), native
    yield "Python callable", python, slow
    yield "Python behind ctypes' `CFUNCTYPE`", prototype(python), slow
    if FFI:
        yield "Python behind `ffi.callback`", ffi.callback(SIGNATURE, python), slow


def measure(turns):
    """(what, median ns, median ratio, 10 % and 90 % of the ratios) for each way."""
    def prepared(callback, calls):
        mm = ioproc.AddressSpace(ioproc.PhysicalMemory(frames=8))
        addr = mm.mmap(4096)
        mm.register_ops(ioproc.Ops(update_page=callback))

        def turn():
            begin = time.thread_time_ns()
            _core._fire_update_page(mm, addr, calls)
            return (time.thread_time_ns() - begin) / calls
        return turn

    runs = [(what, prepared(callback, calls), []) for what, callback, calls in ways()]
    for _ in range(turns):
        for _, turn, times in runs:
            times.append(turn())
    for what, _, times in runs:
        ratios = [own / c for own, c in zip(times, runs[0][2])]
        tenths = statistics.quantiles(ratios, n=10)
        yield what, statistics.median(times), statistics.median(ratios), tenths[0], tenths[-1]


def main(turns=200):
    with tempfile.TemporaryDirectory() as directory:
        here = os.getcwd()
        os.chdir(directory)
        sys.path.insert(0, directory)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                build()
            rows = list(measure(int(turns)))
        finally:
            os.chdir(here)
    print("| callback | ns a call | times C | 80 % of the turns |\n|---|---|---|---|")
    for what, ns, ratio, low, high in rows:
        digits = 2 if ratio < 10 else 0
        print(f"| {what} | {ns:.{digits}f} | {ratio:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
