/* A native device for the tests: writes down every call, and under what circumstances it came. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ioproc.h"

enum { CALLS = 256 };

typedef struct {
    ioproc_ops ops; /* first: the structure's capsule points here */
    int waits;      /* callbacks wait for the flag */
    int count;
    struct {
        int kind, gil, flag;
        uint64_t a, b, c; /* addresses, and the new protection */
        uint64_t start, end, pgoff, flags, pte;
    } calls[CALLS];
} probe;

static int freed; /* probes whose last capsule is gone */
static int flag;

static void note(probe *p, int kind, const ioproc_vma *vma, uint64_t a, uint64_t b, uint64_t c)
{
    int i = __atomic_fetch_add(&p->count, 1, __ATOMIC_SEQ_CST);
    int raised = 0;

    if (p->waits) {
        time_t end = time(NULL) + 30;
        while (!(raised = __atomic_load_n(&flag, __ATOMIC_SEQ_CST)) && time(NULL) < end)
            ;
    }
    if (i >= CALLS)
        return;
    p->calls[i].kind = kind;
    p->calls[i].gil = PyGILState_Check();
    p->calls[i].flag = raised;
    p->calls[i].a = a;
    p->calls[i].b = b;
    p->calls[i].c = c;
    if (vma) {
        p->calls[i].start = vma->start;
        p->calls[i].end = vma->end;
        p->calls[i].pgoff = vma->pgoff;
        p->calls[i].flags = vma->flags;
        p->calls[i].pte = ioproc_lookup_pte(vma->mm, a);
    }
}

static void release(void *arg, ioproc_mm *mm) { note(arg, 0, NULL, mm != NULL, 0, 0); }
static void sync_range(void *arg, const ioproc_vma *v, uint64_t s, uint64_t e) { note(arg, 1, v, s, e, 0); }
static void invalidate_range(void *arg, const ioproc_vma *v, uint64_t s, uint64_t e) { note(arg, 2, v, s, e, 0); }
static void update_range(void *arg, const ioproc_vma *v, uint64_t s, uint64_t e) { note(arg, 3, v, s, e, 0); }
static void change_protection(void *arg, const ioproc_vma *v, uint64_t s, uint64_t e, uint32_t p) { note(arg, 4, v, s, e, p); }
static void sync_page(void *arg, const ioproc_vma *v, uint64_t a) { note(arg, 5, v, a, 0, 0); }
static void invalidate_page(void *arg, const ioproc_vma *v, uint64_t a) { note(arg, 6, v, a, 0, 0); }
static void update_page(void *arg, const ioproc_vma *v, uint64_t a) { note(arg, 7, v, a, 0, 0); }
static void wrprotect_page(void *arg, const ioproc_vma *v, uint64_t a) { note(arg, 8, v, a, 0, 0); }

static void *const functions[9] = {release,   sync_range,      invalidate_range, update_range,  change_protection,
                                   sync_page, invalidate_page, update_page,      wrprotect_page};

static void destroy_structure(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, IOPROC_OPS_CAPSULE));
    freed++;
}

/* structure(version, size, waits): a capsule of a whole structure with all nine callbacks */
static PyObject *structure(PyObject *module, PyObject *args)
{
    unsigned version, size;
    int waits;
    probe *p;

    if (!PyArg_ParseTuple(args, "IIi", &version, &size, &waits))
        return NULL;
    if (!(p = calloc(1, sizeof *p)))
        return PyErr_NoMemory();
    p->waits = waits;
    p->ops = (ioproc_ops)IOPROC_OPS_INIT(p);
    p->ops.version = version;
    p->ops.size = size;
    p->ops.release = release;
    p->ops.sync_range = sync_range;
    p->ops.invalidate_range = invalidate_range;
    p->ops.update_range = update_range;
    p->ops.change_protection = change_protection;
    p->ops.sync_page = sync_page;
    p->ops.invalidate_page = invalidate_page;
    p->ops.update_page = update_page;
    p->ops.wrprotect_page = wrprotect_page;
    return PyCapsule_New(&p->ops, IOPROC_OPS_CAPSULE, destroy_structure);
}

static void destroy_callback(PyObject *capsule)
{
    free(PyCapsule_GetContext(capsule));
    freed++;
}

/* callback(kind, name): a capsule of one callback; the name must be a string the module keeps */
static PyObject *callback(PyObject *module, PyObject *args)
{
    int kind;
    const char *name;
    probe *p;
    PyObject *capsule;

    if (!PyArg_ParseTuple(args, "is", &kind, &name))
        return NULL;
    if (!(p = calloc(1, sizeof *p)))
        return PyErr_NoMemory();
    capsule = PyCapsule_New(functions[kind], PyUnicode_AsUTF8(PyUnicode_InternFromString(name)), destroy_callback);
    if (capsule)
        PyCapsule_SetContext(capsule, p);
    return capsule;
}

static probe *probe_of(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, IOPROC_OPS_CAPSULE))
        return PyCapsule_GetPointer(capsule, IOPROC_OPS_CAPSULE);
    return PyCapsule_GetContext(capsule);
}

static PyObject *calls(PyObject *module, PyObject *capsule)
{
    probe *p = probe_of(capsule);
    PyObject *list = PyList_New(0);

    for (int i = 0; i < p->count && i < CALLS; i++) {
        PyObject *call = Py_BuildValue(
            "{sisNsNs(KKK)s(KKKK)sK}", "kind", p->calls[i].kind, "gil", PyBool_FromLong(p->calls[i].gil), "flag",
            PyBool_FromLong(p->calls[i].flag), "at", p->calls[i].a, p->calls[i].b, p->calls[i].c, "vma", p->calls[i].start,
            p->calls[i].end, p->calls[i].pgoff, p->calls[i].flags, "pte", p->calls[i].pte);
        if (!call || PyList_Append(list, call) < 0)
            return NULL;
        Py_DECREF(call);
    }
    return list;
}

static PyObject *freed_count(PyObject *module, PyObject *unused) { return PyLong_FromLong(freed); }

static PyObject *set_flag(PyObject *module, PyObject *value)
{
    __atomic_store_n(&flag, PyObject_IsTrue(value), __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"structure", structure, METH_VARARGS, ""}, {"callback", callback, METH_VARARGS, ""}, {"calls", calls, METH_O, ""},
    {"freed", freed_count, METH_NOARGS, ""},    {"set_flag", set_flag, METH_O, ""},       {0},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "probe", 0, -1, methods};

PyMODINIT_FUNC PyInit_probe(void)
{
    PyObject *module;

    if (ioproc_import() < 0 || !(module = PyModule_Create(&definition)))
        return NULL;
    PyModule_AddIntConstant(module, "VERSION", IOPROC_ABI_VERSION);
    PyModule_AddIntConstant(module, "SIZE", sizeof(ioproc_ops));
    return module;
}
