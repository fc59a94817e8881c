# The C interface's other direction: what a native callback may call.  And native callbacks in capsules or as function pointers
# of ctypes, cffi or numba: their types, where they point, and whether code is there.
import ctypes
import re
import sys
from types import BuiltinFunctionType

from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from cpython.pycapsule cimport PyCapsule_GetName, PyCapsule_New

cdef u64 api_lookup_pte(const ioproc_mm *mm, u64 addr) noexcept nogil:
    cdef u64 *pte = pte_find((<MM *> mm).root, addr) if addr < TASK_SIZE else NULL
    if pte != NULL and pte[0]:
        return pte[0]
    return huge_lookup(<MM *> mm, addr) if addr < TASK_SIZE else 0


cdef ioproc_api api
api.version = IOPROC_ABI_VERSION
api.size = sizeof(ioproc_api)
api.lookup_pte = api_lookup_pte
_api = PyCapsule_New(&api, "ioproc._core._api", NULL)
_api_address = <size_t> &api                    # for ioproc.lowlevel
_lookup_pte_address = <size_t> &api_lookup_pte
_abi_version = IOPROC_ABI_VERSION


cdef extern from * nogil:
    """
    #define IOPROC_BARRIER() __asm__ volatile("" ::: "memory")
    """
    void compiler_barrier "IOPROC_BARRIER"()


def _fire_update_page(AddressSpace mm not None, addr, count):
    """Fire update_page `count` times for the page at `addr`, changing nothing: for measuring what one dispatch costs."""
    cdef u64 at = as_u64(addr, "addr") & PAGE_MASK
    cdef u64 n = as_u64(count, "count")
    cdef VMArea *vma
    cdef u64 _i
    mm.enter()
    vma = vma_at(mm.mm, at)
    if vma != NULL:
        with nogil:
            for _i in range(n):
                fire_page(mm.mm, UPDATE_PAGE, vma, at)
                compiler_barrier()              # the chain may have changed: load it again
    mm.leave()


# ---- native callbacks.  Those of cffi and numba are known by their modules, which are not imported here.
# A type is a string as C has it, without const.

# Structures by the names and offsets of their fields: somebody's own declaration is as good as ours.
cdef dict STRUCTURES = {
    (("start", 0), ("end", 8), ("pgoff", 16), ("flags", 24), ("mm", 32)): "ioproc_vma",
    (("version", 0), ("size", 4), ("arg", 8), *[(name, 16 + 8 * i) for i, name in enumerate(HOOK_NAMES)]): "ioproc_ops",
}


cdef str structure_type(str name, object fields):
    """A structure with `fields`, names and offsets; None: it is opaque, and what its name says."""
    if fields is None:
        return name.removeprefix("struct ")
    fields = tuple(fields)
    return STRUCTURES.get(fields) or f"struct {{{'; '.join([field for field, _ in fields])}}}"


cdef str function_type(str result, list arguments):
    return f"{result} ({', '.join(arguments)})"


cdef str integer_type(bint signed, bits):
    return f"{'' if signed else 'u'}int{bits}_t"


cdef str ctypes_type(object ctype):
    if ctype is None:
        return "void"
    if isinstance(ctype, type):
        if issubclass(ctype, ctypes.c_void_p):
            return "void *"
        if issubclass(ctype, ctypes._Pointer):
            return ctypes_type(ctype._type_) + " *"
        if issubclass(ctype, ctypes._CFuncPtr) and hasattr(ctype, "_argtypes_"):
            return function_type(ctypes_type(ctype._restype_), [ctypes_type(argument) for argument in ctype._argtypes_])
        if issubclass(ctype, ctypes.Structure):
            fields = getattr(ctype, "_fields_", None)
            return structure_type(ctype.__name__, fields and [(field[0], getattr(ctype, field[0]).offset) for field in fields])
        if issubclass(ctype, ctypes._SimpleCData) and ctype._type_ in "BHILQbhilq":
            return integer_type(ctype._type_.islower(), 8 * ctypes.sizeof(ctype))
    return getattr(ctype, "__name__", repr(ctype))


cdef object cffi_fields(object ctype):
    """(name, field) of a structure's fields; None: it is opaque."""
    try:
        sys.modules["_cffi_backend"].sizeof(ctype)      # cffi 2.1 aborts the process when asked for the fields of an opaque one
    except ValueError:
        return None
    return ctype.fields


cdef str cffi_type(object ctype):
    if ctype.kind == "pointer":
        return cffi_type(ctype.item) + " *"
    if ctype.kind == "function":
        return function_type(cffi_type(ctype.result), [cffi_type(argument) for argument in ctype.args] + ["..."] * ctype.ellipsis)
    if ctype.kind == "struct":
        fields = cffi_fields(ctype)
        return structure_type(ctype.cname, fields and [(name, field.offset) for name, field in fields])
    if ctype.kind == "primitive" and ctype.cname.startswith(("u", "size_t")):
        return integer_type(False, 8 * sys.modules["_cffi_backend"].sizeof(ctype))
    return ctype.cname


cdef str numba_type(object ntype):
    if str(ntype) == "none":
        return "void"
    if str(ntype) == "void*":
        return "void *"
    if hasattr(ntype, "signed"):
        return integer_type(ntype.signed, ntype.bitwidth)
    if hasattr(ntype, "fields"):
        return structure_type(ntype.name, [(name, field.offset) for name, field in ntype.fields.items()])
    if str(ntype).endswith("*"):
        return numba_type(ntype.dtype) + " *"
    return str(ntype)


cdef list parts(str function):
    return function.replace("const ", "").replace(" const", "").replace(" (", ", ").replace(")", "").split(", ")


cdef int check_type(str given, int kind, str what) except -1:
    """Refuse a function of another type than the callback's; for ``void *``, on either side, any pointer will do."""
    cdef str needed = SIGNATURES[kind].decode()
    cdef list has = parts(given)
    cdef list wants = parts(needed)
    cdef bint fits = len(has) == len(wants)
    for one, other in zip(has, wants):
        fits = fits and (one == other or "void *" in (one, other) and one.endswith("*") and other.endswith("*"))
    if not fits:
        raise TypeError(f"{what} is a {given!r}; needed is {needed!r}")
    return 0


cdef bint is_cffi(object thing):
    cffi = sys.modules.get("_cffi_backend")
    return cffi is not None and isinstance(thing, cffi.FFI.CData)


cdef object cffi_address(object pointer):
    cffi = sys.modules["_cffi_backend"]
    return int(cffi.cast(cffi.new_primitive_type("uintptr_t"), pointer))


cdef object ctypes_address(object pointer):
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


cdef object native_function(object callback, int kind):
    """The address in a capsule or function pointer of ctypes, cffi or numba, which must be of the callback's type; None: it is
    none of them."""
    cdef str name = HOOK_NAMES[kind]
    cffi = sys.modules.get("_cffi_backend")
    if PyCapsule_CheckExact(callback):
        if PyCapsule_GetName(callback) == NULL:
            raise TypeError(f"{name} = {callback!r} has no name, so nothing says its type")
        given = PyCapsule_GetName(callback).decode("utf-8", "replace")
        address = <size_t> PyCapsule_GetPointer(callback, PyCapsule_GetName(callback))
    elif isinstance(callback, ctypes._CFuncPtr):
        if type(callback)._flags_ & ctypes._FUNCFLAG_PYTHONAPI:
            raise TypeError(f"{name} = {callback!r} needs the GIL, and callbacks run without it: use CFUNCTYPE or CDLL")
        if callback.argtypes is None:
            raise TypeError(f"{name} = {callback!r} has no argtypes, so nothing says its type: set argtypes and restype, or use "
                            f"ioproc.lowlevel.prototype({name!r})")
        given = function_type(ctypes_type(callback.restype), [ctypes_type(argument) for argument in callback.argtypes])
        address = ctypes_address(callback)
    elif is_cffi(callback):
        given = cffi_type(cffi.typeof(callback))
        address = cffi_address(callback)
    elif cffi is not None and isinstance(callback, BuiltinFunctionType) and isinstance(callback.__self__, cffi.Lib):
        # a compiled cffi library has this in place of the pointer
        return native_function(cffi.FFI().addressof(callback.__self__, callback.__name__), kind)
    elif str(type(callback).__module__).startswith("numba.") and hasattr(callback, "address"):
        given = function_type(numba_type(callback._sig.return_type), [numba_type(argument) for argument in callback._sig.args])
        address = callback.address
    else:
        return None
    check_type(given, kind, f"{name} = {callback!r}")
    if not address:
        raise ValueError(f"{name} = {callback!r} is NULL")
    return address


cdef size_t foreign_structure(object native) except? 0:
    """The address of an ``ioproc_ops`` of ctypes or cffi."""
    cdef dict fields = {}
    cdef object address = 0
    if isinstance(native, ctypes.Structure):
        native = ctypes.pointer(native)
    if isinstance(native, ctypes._Pointer):
        given = ctypes_type(type(native))
        fields = {field[0]: ctypes_type(field[1]) for field in getattr(native._type_, "_fields_", ())}
        address = ctypes_address(native)
    elif is_cffi(native):
        ctype = sys.modules["_cffi_backend"].typeof(native)
        given = cffi_type(ctype)
        if given == "ioproc_ops *":
            fields = {name: cffi_type(field.type) for name, field in cffi_fields(ctype.item) or ()}
            address = cffi_address(native)
    else:
        raise TypeError(f"native = {native!r} is neither a capsule named {IOPROC_OPS_CAPSULE.decode()!r} nor an ioproc_ops of "
                        "ctypes or cffi")
    if given != "ioproc_ops *":
        raise TypeError(f"native = {native!r} is a {given!r}; needed is 'ioproc_ops *'")
    for kind, name in enumerate(HOOK_NAMES):
        if name in fields:
            check_type(fields[name], kind, f"native.{name}")
    if not address:
        raise ValueError(f"native = {native!r} is NULL")
    return address


cdef tuple address_of(object arg):
    """The `arg` of Ops: its address, and what keeps that valid."""
    if arg is None or isinstance(arg, int):
        return as_u64(arg or 0, "arg"), None
    if is_cffi(arg) and cffi_type(sys.modules["_cffi_backend"].typeof(arg)).endswith(("*", "]")):
        return cffi_address(arg), arg
    if isinstance(arg, (ctypes._Pointer, ctypes.c_void_p, type(ctypes.byref(ctypes.c_int())))):
        return ctypes_address(arg), arg
    try:
        memory = memoryview(arg)
    except TypeError:
        memory = None
    if memory is None or memory.readonly or not memory.contiguous:
        raise TypeError(f"arg = {arg!r} is neither an address, nor a pointer of ctypes or cffi, nor contiguous writable memory")
    return <size_t> PyMemoryView_GET_BUFFER(memory).buf, memory         # the view also pins the size of a bytearray


cdef object EXECUTABLE = re.compile(rb"^(\w+)-(\w+) ..x", re.MULTILINE)

cdef int check_code(dict functions) except -1:
    """Refuse addresses where no code is: of a library that was closed, of memory that was freed."""
    cdef list code
    if not any(functions.values()):
        return 0
    try:
        with open("/proc/self/maps", "rb") as maps:
            code = [(int(start, 16), int(end, 16)) for start, end in EXECUTABLE.findall(maps.read())]
    except OSError:
        return 0                # nobody can tell
    for what, address in functions.items():
        if address and not any([start <= address < end for start, end in code]):
            raise ValueError(f"{what}: there is no code at {address:#x} (any more)")
    return 0
