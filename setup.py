"""Build ioproc._core.  Debug switches, all environment variables set to 1:

IOPROC_DEBUG      bounds checks and the core's own assertions: a wrong index traps
IOPROC_COVERAGE   counts of executed lines, for gcov: tests/coverage.sh
IOPROC_SANITIZE   AddressSanitizer and UndefinedBehaviorSanitizer; "thread": ThreadSanitizer instead
IOPROC_NO_HOOKS   hook sites compiled out: what hooks cost everybody else is measured against this
"""
import os
import re
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SWITCHES = ("DEBUG", "COVERAGE", "SANITIZE", "NO_HOOKS")
on = {name for name in SWITCHES if os.environ.get("IOPROC_" + name, "0") not in ("", "0")}
debug, coverage, sanitize, no_hooks = (name in on for name in SWITCHES)
sanitizers = "thread" if os.environ.get("IOPROC_SANITIZE") == "thread" else "address,undefined"
state = sorted(on) + [sanitizers] * sanitize

# Files are rebuilt by their age alone: a change of switches must look like a change of a file.
stamp = Path("build/switches.txt")
changed = (not stamp.exists() or stamp.read_text().split() != state
           or stamp.stat().st_mtime < Path("setup.py").stat().st_mtime)
if changed:
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text("\n".join(state))

compile_args = ["-O3", "-std=c11", "-D_GNU_SOURCE", "-fno-strict-aliasing", "-fvisibility=hidden"]
link_args = ["-pthread"]
macros = []
if debug or sanitize:
    compile_args += ["-O1"]
if debug:
    compile_args += ["-UNDEBUG", "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"]
    macros += [("IOPROC_DEBUG", "1")]
if coverage:
    compile_args += ["-O0", "--coverage", "-fprofile-update=atomic"]
    link_args += ["--coverage"]
if sanitize:
    compile_args += ["-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-fsanitize=" + sanitizers]
    link_args += ["-fsanitize=" + sanitizers]
if no_hooks:
    macros += [("IOPROC_NO_HOOKS", "1")]

core = Extension(
    "ioproc._core",
    ["ioproc/_core.pyx"],
    include_dirs=["ioproc/include"],
    depends=["ioproc/include/ioproc.h", str(stamp)],
    define_macros=macros,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)

modules = cythonize(
    [core],
    build_dir="build",
    emit_linenums=coverage,     # counts are then those of the Cython sources' lines
    compiler_directives={
        "language_level": "3",
        "boundscheck": debug,
        "wraparound": False,
        "initializedcheck": debug,
        "nonecheck": debug,
        "cdivision": True,
        "embedsignature": True,
        "binding": True,
        "auto_pickle": False,       # live objects: there is nothing to pickle
        "autotestdict": False,
    },
    force=changed,
)

if coverage:                        # what Cython adds behind a function is of no source line
    for path in (Path(source) for module in modules for source in module.sources):
        path.write_text(re.sub("^}\n", '}\n#line 1 "cython_utility"\n', path.read_text(), flags=re.MULTILINE))

setup(ext_modules=modules)
