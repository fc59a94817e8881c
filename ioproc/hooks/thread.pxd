# What a thread is doing inside the VM: callbacks may look and may not touch, and their exceptions must reach the caller.
from cpython.object cimport PyObject

cdef extern from * nogil:
    """
    /* `inside`: the address space whose operation this thread is in; Python code that runs meanwhile is a callback.
       `raised`: the first exception of a callback, owned. */
    static __thread struct { void *inside; PyObject *raised; } ioproc_thread __attribute__((tls_model("initial-exec")));
    #define IOPROC_INSIDE() (ioproc_thread.inside)
    #define IOPROC_SET_INSIDE(mm) (ioproc_thread.inside = (mm))
    #define IOPROC_RAISED() (ioproc_thread.raised)
    #define IOPROC_SET_RAISED(e) (ioproc_thread.raised = (e))
    """
    void *thread_inside "IOPROC_INSIDE"()
    void thread_set_inside "IOPROC_SET_INSIDE"(void *mm)
    PyObject *thread_raised "IOPROC_RAISED"()
    void thread_set_raised "IOPROC_SET_RAISED"(PyObject *exception)
