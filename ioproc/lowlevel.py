"""
The C interface in the words of ctypes, cffi and numba, for callbacks that are function pointers (docs/hooks.md).

Types come from `ioproc.Ops.signature` and from ``ioproc.h``; a declaration of your own that agrees with them is as good.
"""
import ctypes
import re
from pathlib import Path

from . import _core, get_include

__all__ = ["API", "CDEF", "ioproc_ops", "ioproc_vma", "lookup_pte", "numba_signature", "prototype"]

API = _core._api_address
"""int: where the ``ioproc_api`` is: for C code that is not compiled with Python's header."""


def _declarations() -> str:
    text = Path(get_include(), "ioproc.h").read_text()
    text = re.search(r"^#define IOPROC_ABI_VERSION.*?(?=^#ifdef Py_PYTHON_H)", text, re.DOTALL | re.MULTILINE)[0]
    return re.sub(r"^#define (?!\w+ \d\w*( +/\*.*)?$).*\n", "", text, flags=re.MULTILINE)      # cffi reads numbers only


CDEF = _declarations()
"""str: the declarations of ``ioproc.h`` for cffi's ``ffi.cdef``."""


class ioproc_vma(ctypes.Structure):
    """A VMA as a native callback sees it, valid during the callback: ``start end pgoff flags mm``."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "end", "pgoff", "flags", "mm")]


def _parts(callback: str) -> list[str]:
    """Result and arguments."""
    return _core.Ops.signature(callback).replace("const ", "").replace(")", "").replace(" (", ", ").split(", ")


def prototype(callback: str):
    """
    Make the ctypes type of a callback's function pointers.

    ``prototype("update_page")(("my_update", library))`` is a function of a `ctypes.CDLL`, ``prototype("update_page")(f)`` a
    Python function, which gets ``(arg, vma, addr)`` with ``vma`` a pointer to `ioproc_vma`.

    Parameters
    ----------
    callback : str
        One of ``ioproc.HOOK_NAMES``.

    Returns
    -------
    type
        What `ctypes.CFUNCTYPE` makes.
    """
    types = {"void": None, "void *": ctypes.c_void_p, "ioproc_mm *": ctypes.c_void_p, "ioproc_vma *": ctypes.POINTER(ioproc_vma),
             "uint64_t": ctypes.c_uint64, "uint32_t": ctypes.c_uint32}
    return ctypes.CFUNCTYPE(*(types[part] for part in _parts(callback)))


def numba_signature(callback: str):
    """
    Make the signature of a callback for `numba.cfunc`.

    In the function ``carray(vma, 1)[0].start`` is a field of the VMA, and ``carray(arg, shape, dtype)`` the array that was given
    as `arg`.

    Parameters
    ----------
    callback : str
        One of ``ioproc.HOOK_NAMES``.

    Returns
    -------
    numba.core.typing.templates.Signature
    """
    import numba
    import numpy as np

    types = {"void": numba.void, "void *": numba.types.voidptr, "ioproc_mm *": numba.types.voidptr,
             "ioproc_vma *": numba.types.CPointer(numba.from_dtype(np.dtype(ioproc_vma))),
             "uint64_t": numba.uint64, "uint32_t": numba.uint32}
    result, *arguments = (types[part] for part in _parts(callback))
    return result(*arguments)


class ioproc_ops(ctypes.Structure):
    """The ops structure, with `version` and `size` filled in: ``ioproc_ops(arg=..., update_page=...)``."""

    _fields_ = [("version", ctypes.c_uint32), ("size", ctypes.c_uint32), ("arg", ctypes.c_void_p),
                *((name, prototype(name)) for name in _core.HOOK_NAMES)]

    def __init__(self, **fields):
        super().__init__(_core._abi_version, ctypes.sizeof(self), **fields)


lookup_pte = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64)(_core._lookup_pte_address)
"""``lookup_pte(vma.mm, addr)``: ``ioproc_lookup_pte`` of ``ioproc.h``, for ctypes and numba; in a callback only."""
