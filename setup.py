"""Build ioproc._core.  Debug switches, all environment variables set to 1:

IOPROC_DEBUG      bounds checks and the core's own assertions
IOPROC_LINETRACE  line tracing, for coverage of the core
IOPROC_SANITIZE   AddressSanitizer and UndefinedBehaviorSanitizer
IOPROC_NO_HOOKS   hook sites compiled out: what hooks cost everybody else is measured against this
"""
import os

from Cython.Build import cythonize
from setuptools import Extension, setup


def switch(name):
    return os.environ.get("IOPROC_" + name, "0") not in ("", "0")


debug, linetrace, sanitize, no_hooks = map(switch, ("DEBUG", "LINETRACE", "SANITIZE", "NO_HOOKS"))

flags = ["-O3", "-std=c11", "-D_GNU_SOURCE", "-fno-strict-aliasing", "-fvisibility=hidden"]
link = ["-pthread"]
macros = []
if debug:
    flags += ["-O1", "-UNDEBUG"]
    macros += [("IOPROC_DEBUG", "1")]
if linetrace:
    flags += ["-O1"]
    macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")]
if sanitize:
    flags += ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    link += ["-fsanitize=address,undefined"]
if no_hooks:
    macros += [("IOPROC_NO_HOOKS", "1")]

core = Extension(
    "ioproc._core",
    ["ioproc/_core.pyx"],
    include_dirs=["ioproc/include"],
    define_macros=macros,
    extra_compile_args=flags,
    extra_link_args=link,
)

setup(
    ext_modules=cythonize(
        [core],
        compiler_directives={
            "language_level": "3",
            "boundscheck": debug,
            "wraparound": False,
            "initializedcheck": debug,
            "nonecheck": debug,
            "cdivision": True,
            "embedsignature": True,
            "linetrace": linetrace,
            "binding": True,
        },
        force=debug or linetrace,
        show_all_warnings=False,
    )
)
