"""
coverage.py's plugin for the core: Cython's own, told where the C file is, which it cannot guess for included sources.

    IOPROC_LINETRACE=1 python setup.py build_ext --inplace
    python -m coverage run -m pytest && python -m coverage report
"""
from pathlib import Path

from Cython.Coverage import Plugin


def coverage_init(registry, options):
    plugin = Plugin()
    registry.add_configurer(plugin)
    registry.add_file_tracer(plugin)
    generated = Path(__file__).parents[1] / "ioproc" / "_core.c"
    if generated.exists():
        plugin._read_source_lines(str(generated), "")
