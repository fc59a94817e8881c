# Ops: the face of an ops structure, with Python callables, native functions (lowlevel.pyx knows them), or both.
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetContext, PyCapsule_GetPointer, PyCapsule_IsValid
from cpython.ref cimport Py_DECREF, Py_INCREF

HOOK_NAMES = ("release", "sync_range", "invalidate_range", "update_range", "change_protection",
              "sync_page", "invalidate_page", "update_page", "wrprotect_page")

# A native callback's C type, which the name of its capsule is as well; the capsule's context is the first argument.
cdef bytes RELEASE_SIGNATURE = b"void (void *, ioproc_mm *)"
cdef bytes RANGE_SIGNATURE = b"void (void *, const ioproc_vma *, uint64_t, uint64_t)"
cdef bytes PROTECTION_SIGNATURE = b"void (void *, const ioproc_vma *, uint64_t, uint64_t, uint32_t)"
cdef bytes PAGE_SIGNATURE = b"void (void *, const ioproc_vma *, uint64_t)"
cdef tuple SIGNATURES = (RELEASE_SIGNATURE, RANGE_SIGNATURE, RANGE_SIGNATURE, RANGE_SIGNATURE, PROTECTION_SIGNATURE,
                         PAGE_SIGNATURE, PAGE_SIGNATURE, PAGE_SIGNATURE, PAGE_SIGNATURE)

ctypedef void (*release_callback)(void *arg, ioproc_mm *mm) noexcept nogil
ctypedef void (*protection_callback)(void *arg, const ioproc_vma *vma, u64 start, u64 end, u32 newprot) noexcept nogil

cdef struct Routed:             # the argument of ops with a Python callable: each callback goes its own way
    void *face                  # the Ops object
    void *native[9]             # a native function, or NULL: the Python callable
    void *arg[9]


cdef void callback_raised(object exception) noexcept:
    """Keep the first exception for the caller of the operation; the others become its notes."""
    cdef PyObject *first = thread_raised()
    if first == NULL:
        Py_INCREF(exception)
        thread_set_raised(<PyObject *> exception)
    elif first != <PyObject *> exception:
        try:
            (<object> first).add_note(f"a later callback raised {type(exception).__name__}: {exception}")
        except BaseException:
            pass                # notes are a courtesy; the first exception stands


cdef int raise_pending() except -1:
    """In the caller of an operation: raise what its callbacks raised."""
    cdef PyObject *raised
    if ends and thread_inside() == NULL:
        end_late()
    raised = thread_raised()
    if raised == NULL:
        return 0
    thread_set_raised(NULL)
    exception = <object> raised
    Py_DECREF(exception)
    raise exception


cdef void call_python(Routed *routed, int kind, const ioproc_vma *vma, tuple arguments) noexcept:
    try:
        if vma == NULL:
            (<tuple> (<Ops> routed.face).callbacks)[kind](*arguments)
        else:
            (<tuple> (<Ops> routed.face).callbacks)[kind](vma_face(<const VMArea *> vma), *arguments)
    except BaseException as exception:
        if vma != NULL and <void *> vma.mm != thread_inside():
            name_space(exception, <MM *> vma.mm)
        callback_raised(exception)


cdef void name_space(object exception, MM *mm) noexcept:
    """The caller of the operation, or of reclaim, is in another address space."""
    try:
        exception.add_note(f"in a callback of {mm_face(mm)!r}, from which a frame was taken")
    except BaseException:
        pass


cdef void route_release(void *arg, ioproc_mm *mm) noexcept nogil:
    cdef Routed *routed = <Routed *> arg
    if routed.native[<int> RELEASE] != NULL:
        (<release_callback> routed.native[<int> RELEASE])(routed.arg[<int> RELEASE], mm)
        return
    with gil:
        call_python(routed, RELEASE, NULL, (mm_face(<MM *> mm),))


cdef void route_range(Routed *routed, int kind, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    if routed.native[kind] != NULL:
        (<range_callback> routed.native[kind])(routed.arg[kind], vma, start, end)
        return
    with gil:
        call_python(routed, kind, vma, (start, end))


cdef void route_page(Routed *routed, int kind, const ioproc_vma *vma, u64 addr) noexcept nogil:
    if routed.native[kind] != NULL:
        (<page_callback> routed.native[kind])(routed.arg[kind], vma, addr)
        return
    with gil:
        call_python(routed, kind, vma, (addr,))


cdef void route_protection(void *arg, const ioproc_vma *vma, u64 start, u64 end, u32 newprot) noexcept nogil:
    cdef Routed *routed = <Routed *> arg
    cdef int kind = CHANGE_PROTECTION
    if routed.native[kind] != NULL:
        (<protection_callback> routed.native[kind])(routed.arg[kind], vma, start, end, newprot)
        return
    with gil:
        call_python(routed, kind, vma, (start, end, newprot))


cdef void route_sync_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    route_range(<Routed *> arg, SYNC_RANGE, vma, start, end)

cdef void route_invalidate_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    route_range(<Routed *> arg, INVALIDATE_RANGE, vma, start, end)

cdef void route_update_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    route_range(<Routed *> arg, UPDATE_RANGE, vma, start, end)

cdef void route_sync_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    route_page(<Routed *> arg, SYNC_PAGE, vma, addr)

cdef void route_invalidate_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    route_page(<Routed *> arg, INVALIDATE_PAGE, vma, addr)

cdef void route_update_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    route_page(<Routed *> arg, UPDATE_PAGE, vma, addr)

cdef void route_wrprotect_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    route_page(<Routed *> arg, WRPROTECT_PAGE, vma, addr)


cdef class Ops:
    """
    The callbacks of one device: what ``AddressSpace.register_ops`` attaches.

    Parameters
    ----------
    native : capsule, ctypes structure or cffi pointer, optional
        A filled ``ioproc_ops`` (see ``ioproc.h``): in a ``PyCapsule`` named ``"ioproc.ops.v1"``, of ctypes
        (`ioproc.lowlevel.ioproc_ops` or a pointer to one) or of cffi (an ``ioproc_ops *``).  The structure is copied; the object,
        and so whatever it owns, is kept alive.  Excludes the callbacks below.
    name : str, optional
        For people: shown by ``repr``.
    arg : int, pointer of ctypes or cffi, or object with writable memory, optional
        The first argument of callbacks that are function pointers, or capsules without a context: that address, what the
        pointer points to, or the memory (a NumPy array, a ctypes structure, a bytearray).  Kept alive.
    release, sync_range, invalidate_range, ... : callable, function pointer or capsule, optional
        Each a Python callable; or a native function of type ``Ops.signature("update_page")``: a function pointer of ctypes or
        cffi, a numba ``cfunc``, or a capsule with the type as its name and the first argument as its context (Cython has one for
        each ``cdef api`` function in ``module.__pyx_capi__``).  Any may be missing.  Python callables get:

        =========================================  ==========================
        ``release``                                ``(mm)``
        ``sync_range invalidate_range              ``(vma, start, end)``
        update_range``
        ``change_protection``                      ``(vma, start, end, newprot)``
        ``sync_page invalidate_page update_page    ``(vma, addr)``
        wrprotect_page``
        =========================================  ==========================

        with addresses in bytes and ``vma`` a `VMA`.  They run under the lock of the address space: they may look
        (``mm.pagemap``, ``mm.vmas``); whatever changes or faults raises ``RuntimeError``.  An exception does not stop the
        operation or the other callbacks; it is raised to the caller of the operation once that is complete.

    Raises
    ------
    TypeError
        A callback that is neither callable nor a native function, or is one of another type, or of a type that nothing says.
    ValueError
        A ``native`` structure of another ABI version or size; a function pointer that is NULL or where no code is (any more).

    Notes
    -----
    Native callbacks run without the GIL: about the cost of an indirect call each.  A Python one takes the GIL and builds
    a `VMA`: some hundred times that.  Python code behind a pointer (``CFUNCTYPE``, ``ffi.callback``) works, takes the GIL as
    well, and loses its exceptions: give the callable itself.
    """
    cdef ioproc_ops ops
    cdef Routed routed
    cdef readonly str name
    cdef readonly tuple callbacks
    cdef object owners          # what the native functions and their arguments live in
    cdef object __weakref__

    def __cinit__(self):
        self.ops.version = IOPROC_ABI_VERSION
        self.ops.size = sizeof(ioproc_ops)

    def __init__(self, native=None, *, str name=None, arg=None, release=None, sync_range=None, invalidate_range=None,
                 update_range=None, change_protection=None, sync_page=None, invalidate_page=None, update_page=None,
                 wrprotect_page=None):
        given = (release, sync_range, invalidate_range, update_range, change_protection,
                 sync_page, invalidate_page, update_page, wrprotect_page)
        if self.callbacks is not None:
            raise RuntimeError("Ops.__init__ called twice")
        self.name = name
        if native is None:
            self.take_callbacks(given, arg)
        elif arg is not None or any(callback is not None for callback in given):
            raise TypeError("Ops: give native or single callbacks and arg, not both")
        else:
            self.take_structure(native)

    cdef int take_structure(self, object native) except -1:
        cdef const ioproc_ops *ops
        cdef int kind
        cdef void **functions
        if PyCapsule_IsValid(native, IOPROC_OPS_CAPSULE):
            ops = <const ioproc_ops *> PyCapsule_GetPointer(native, IOPROC_OPS_CAPSULE)
        else:
            ops = <const ioproc_ops *> <size_t> foreign_structure(native)
        if ops.version != IOPROC_ABI_VERSION or ops.size != sizeof(ioproc_ops):
            raise ValueError(f"native: ioproc_ops of version {ops.version} and {ops.size} bytes; this ioproc has version "
                             f"{IOPROC_ABI_VERSION} and {sizeof(ioproc_ops)} bytes")
        functions = <void **> &ops.release
        check_code({f"native.{HOOK_NAMES[kind]}": <size_t> functions[kind] for kind in range(<int> HOOKS)})
        self.ops = ops[0]
        self.owners = native
        self.callbacks = (None,) * 9
        return 0

    cdef int take_callbacks(self, tuple given, object arg) except -1:
        cdef int kind
        cdef bint python = False
        cdef bint takes_arg = False
        cdef void *context = NULL
        cdef bint several = False       # native callbacks with different arguments
        cdef bint first = True
        cdef size_t argument
        argument, memory = address_of(arg)
        memset(&self.routed, 0, sizeof(Routed))
        for kind in range(<int> HOOKS):
            callback = given[kind]
            if callback is None:
                continue
            address = native_function(callback, kind)
            if address is None:
                if not callable(callback):
                    raise TypeError(f"{HOOK_NAMES[kind]} = {callback!r} is neither callable nor a native function of type "
                                    f"{SIGNATURES[kind].decode()!r}")
                python = True
                continue
            self.routed.native[kind] = <void *> <size_t> address
            if PyCapsule_CheckExact(callback):
                self.routed.arg[kind] = PyCapsule_GetContext(callback)
            if self.routed.arg[kind] == NULL:
                self.routed.arg[kind] = <void *> argument
                takes_arg = True
            several = several or (not first and context != self.routed.arg[kind])
            context = self.routed.arg[kind]
            first = False
        if arg is not None and not takes_arg:
            raise TypeError("arg is for callbacks that are function pointers, or capsules without a context: there is none")
        check_code({HOOK_NAMES[kind]: <size_t> self.routed.native[kind] for kind in range(<int> HOOKS)})
        self.owners = (given, memory)
        self.callbacks = given
        if python or several:
            self.routed.face = <void *> self
            self.ops.arg = &self.routed
            self.route(given)
        else:
            self.ops.arg = context
            memcpy(&self.ops.release, self.routed.native, sizeof(self.routed.native))
        return 0

    cdef void route(self, tuple given):
        if given[0] is not None:
            self.ops.release = route_release
        if given[1] is not None:
            self.ops.sync_range = route_sync_range
        if given[2] is not None:
            self.ops.invalidate_range = route_invalidate_range
        if given[3] is not None:
            self.ops.update_range = route_update_range
        if given[4] is not None:
            self.ops.change_protection = route_protection
        if given[5] is not None:
            self.ops.sync_page = route_sync_page
        if given[6] is not None:
            self.ops.invalidate_page = route_invalidate_page
        if given[7] is not None:
            self.ops.update_page = route_update_page
        if given[8] is not None:
            self.ops.wrprotect_page = route_wrprotect_page

    @staticmethod
    def signature(str callback):
        """
        The C type of a callback, which is the name a capsule with such a function must have.

        Parameters
        ----------
        callback : str
            One of ``ioproc.HOOK_NAMES``.
        """
        if callback not in HOOK_NAMES:
            raise ValueError(f"callback = {callback!r}: not one of {', '.join(HOOK_NAMES)}")
        return SIGNATURES[HOOK_NAMES.index(callback)].decode()

    def __repr__(self):
        cdef list present = [name for name, there in zip(HOOK_NAMES, self.present()) if there]
        label = "" if self.name is None else f" {self.name!r}"
        return f"<ioproc.{type(self).__name__}{label}: {', '.join(present) or 'no callbacks'}>"

    cdef tuple present(self):
        return (self.ops.release != NULL, self.ops.sync_range != NULL, self.ops.invalidate_range != NULL,
                self.ops.update_range != NULL, self.ops.change_protection != NULL, self.ops.sync_page != NULL,
                self.ops.invalidate_page != NULL, self.ops.update_page != NULL, self.ops.wrprotect_page != NULL)


cdef void count_release(void *arg, ioproc_mm *mm) noexcept nogil:
    (<u64 *> arg)[0] += 1

cdef void count_sync_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    (<u64 *> arg)[1] += 1

cdef void count_invalidate_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    (<u64 *> arg)[2] += 1

cdef void count_update_range(void *arg, const ioproc_vma *vma, u64 start, u64 end) noexcept nogil:
    (<u64 *> arg)[3] += 1

cdef void count_change_protection(void *arg, const ioproc_vma *vma, u64 start, u64 end, u32 newprot) noexcept nogil:
    (<u64 *> arg)[4] += 1

cdef void count_sync_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    (<u64 *> arg)[5] += 1

cdef void count_invalidate_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    (<u64 *> arg)[6] += 1

cdef void count_update_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    (<u64 *> arg)[7] += 1

cdef void count_wrprotect_page(void *arg, const ioproc_vma *vma, u64 addr) noexcept nogil:
    (<u64 *> arg)[8] += 1


cdef class CountingOps(Ops):
    """
    Native ops that count their calls: the cheapest device there is, and the way to count every hook of an address space.

    The counts are exact on one address space; on several at once, from several threads, register one object on each.
    """
    cdef u64 count[9]

    def __init__(self, str name=None):
        Ops.__init__(self, name=name)
        self.ops.arg = self.count
        self.ops.release = count_release
        self.ops.sync_range = count_sync_range
        self.ops.invalidate_range = count_invalidate_range
        self.ops.update_range = count_update_range
        self.ops.change_protection = count_change_protection
        self.ops.sync_page = count_sync_page
        self.ops.invalidate_page = count_invalidate_page
        self.ops.update_page = count_update_page
        self.ops.wrprotect_page = count_wrprotect_page

    @property
    def counts(self):
        """dict: calls by callback name."""
        return hook_dict(self.count)


cdef dict hook_dict(const u64 *counts):
    return {name: counts[i] for i, name in enumerate(HOOK_NAMES)}
