"""
ioproc: page-table hooks for devices that access user memory, as a model, an instrument and a benchmark.

Start with `AddressSpace` and `Ops`; ``python -m ioproc.bench`` compares hook placements on recorded histories.
"""
import os as _os

try:
    from ._core import (
        DESIGNS,
        HOOK_NAMES,
        VMA,
        AccessError,
        AddressSpace,
        BusError,
        Context,
        CountingOps,
        File,
        Nic,
        Ops,
        PhysicalMemory,
        Registration,
        RegistrationCache,
        RemoteAccessError,
        SegmentationFault,
        TranslationCache,
        Violation,
        hit_curve,
    )
except ModuleNotFoundError as error:
    if error.name != "ioproc._core":
        raise
    raise ImportError(
        f"{_os.path.dirname(__file__)} holds ioproc's sources, not a built package: install it and run python with -P or in "
        "another folder, or build it in place with 'python setup.py build_ext --inplace'"
    ) from None
from . import histories, plot, workload
from .compare import compare
from .cost import Cost
from .trace import Trace, choose, replay

MAP_FIXED = 0x10
MAP_GROWSDOWN = 0x100
MAP_LOCKED = 0x2000
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MAP_STACK = 0x20000
MAP_HUGETLB = 0x40000
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4
PROT_GROWSDOWN = 0x1000000
MADV_WIPEONFORK = 18
MADV_KEEPONFORK = 19
MADV_COLD = 20
MADV_PAGEOUT = 21
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_DONTNEED_LOCKED = 24
MS_ASYNC = 1
MS_INVALIDATE = 2
MS_SYNC = 4

__all__ = [
    "DESIGNS", "HOOK_NAMES", "MADV_COLD", "MADV_DONTNEED_LOCKED", "MADV_KEEPONFORK", "MADV_PAGEOUT", "MADV_POPULATE_READ",
    "MADV_POPULATE_WRITE", "MADV_WIPEONFORK", "MAP_FIXED", "MAP_FIXED_NOREPLACE", "MAP_GROWSDOWN", "MAP_HUGETLB",
    "MAP_LOCKED", "MAP_NORESERVE", "MAP_POPULATE", "MAP_STACK", "MREMAP_DONTUNMAP", "MREMAP_FIXED", "MREMAP_MAYMOVE",
    "MS_ASYNC", "MS_INVALIDATE", "MS_SYNC", "PROT_GROWSDOWN", "VMA", "AccessError", "AddressSpace", "BusError", "Context",
    "Cost", "CountingOps", "File", "Nic", "Ops", "PhysicalMemory", "Registration", "RegistrationCache", "RemoteAccessError",
    "SegmentationFault", "Trace", "TranslationCache", "Violation", "choose", "compare", "get_include", "histories",
    "hit_curve", "plot", "replay", "workload",
]
__version__ = "0.1.0"


def get_include():
    """Directory of ``ioproc.h``, for the compiler's ``-I``; Cython finds the ``.pxd`` files by ``cimport ioproc``."""
    return _os.path.join(_os.path.dirname(__file__), "include")
