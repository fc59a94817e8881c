/* A device in C: a direct-mapped translation table that the hooks keep coherent.
 *
 * new_device() makes a capsule for ioproc.Ops(); counts() and translation() look into the device behind it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdlib.h>

#include "ioproc.h"

#define ENTRIES 64 /* of one page each; page number modulo ENTRIES is the slot */

typedef struct {
    ioproc_ops ops;       /* first: the capsule's pointer is the device's */
    pthread_mutex_t lock; /* callbacks run under the address space's lock, the device looks things up without it */
    uint64_t loads, drops;
    struct {
        uint64_t page, pte; /* pte 0: empty */
    } table[ENTRIES];
} device;

static void drop_page(device *dev, uint64_t page)
{
    if (dev->table[page % ENTRIES].pte && dev->table[page % ENTRIES].page == page) {
        dev->table[page % ENTRIES].pte = 0;
        dev->drops++;
    }
}

static void drop_range(device *dev, uint64_t start, uint64_t end)
{
    uint64_t first = start >> IOPROC_PTE_PFN_SHIFT, last = end >> IOPROC_PTE_PFN_SHIFT;

    pthread_mutex_lock(&dev->lock);
    if (last - first < ENTRIES)
        for (uint64_t page = first; page < last; page++)
            drop_page(dev, page);
    else
        for (int slot = 0; slot < ENTRIES; slot++)
            if (dev->table[slot].page >= first && dev->table[slot].page < last)
                drop_page(dev, dev->table[slot].page);
    pthread_mutex_unlock(&dev->lock);
}

/* The callbacks.  No Python here: the GIL is not held. */

static void update_page(void *arg, const ioproc_vma *vma, uint64_t addr)
{
    device *dev = arg;
    uint64_t page = addr >> IOPROC_PTE_PFN_SHIFT;

    pthread_mutex_lock(&dev->lock);
    dev->table[page % ENTRIES].page = page;
    dev->table[page % ENTRIES].pte = ioproc_lookup_pte(vma->mm, addr);
    dev->loads++;
    pthread_mutex_unlock(&dev->lock);
}

static void invalidate_page(void *arg, const ioproc_vma *vma, uint64_t addr)
{
    drop_range(arg, addr, addr + 4096);
}

static void invalidate_range(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end)
{
    drop_range(arg, start, end);
}

static void change_protection(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end, uint32_t newprot)
{
    drop_range(arg, start, end); /* loaded again when it is next needed */
}

static void release(void *arg, ioproc_mm *mm)
{
    drop_range(arg, 0, UINT64_MAX);
}

/* The device seen from Python. */

static device *device_of(PyObject *capsule)
{
    return PyCapsule_GetPointer(capsule, IOPROC_OPS_CAPSULE);
}

static void destroy(PyObject *capsule)
{
    device *dev = device_of(capsule);

    pthread_mutex_destroy(&dev->lock);
    free(dev);
}

static PyObject *new_device(PyObject *module, PyObject *unused)
{
    device *dev = calloc(1, sizeof *dev);

    if (!dev)
        return PyErr_NoMemory();
    pthread_mutex_init(&dev->lock, NULL);
    dev->ops = (ioproc_ops)IOPROC_OPS_INIT(dev);
    dev->ops.release = release;
    dev->ops.invalidate_range = invalidate_range;
    dev->ops.change_protection = change_protection;
    dev->ops.invalidate_page = invalidate_page;
    dev->ops.wrprotect_page = invalidate_page;
    dev->ops.update_page = update_page;
    return PyCapsule_New(&dev->ops, IOPROC_OPS_CAPSULE, destroy);
}

static PyObject *counts(PyObject *module, PyObject *capsule)
{
    device *dev = device_of(capsule);
    uint64_t loads, drops;

    if (!dev)
        return NULL;
    pthread_mutex_lock(&dev->lock);
    loads = dev->loads;
    drops = dev->drops;
    pthread_mutex_unlock(&dev->lock);
    return Py_BuildValue("{sKsK}", "loads", loads, "drops", drops);
}

static PyObject *translation(PyObject *module, PyObject *args)
{
    PyObject *capsule;
    unsigned long long addr;
    uint64_t page, pte = 0;
    device *dev;

    if (!PyArg_ParseTuple(args, "OK", &capsule, &addr) || !(dev = device_of(capsule)))
        return NULL;
    page = addr >> IOPROC_PTE_PFN_SHIFT;
    pthread_mutex_lock(&dev->lock);
    if (dev->table[page % ENTRIES].page == page)
        pte = dev->table[page % ENTRIES].pte;
    pthread_mutex_unlock(&dev->lock);
    if (!pte)
        Py_RETURN_NONE;
    return Py_BuildValue("(KO)", pte >> IOPROC_PTE_PFN_SHIFT, pte & IOPROC_PTE_WRITE ? Py_True : Py_False);
}

static PyMethodDef methods[] = {
    {"new_device", new_device, METH_NOARGS, "A device: a capsule for ioproc.Ops()."},
    {"counts", counts, METH_O, "Translations loaded and dropped so far."},
    {"translation", translation, METH_VARARGS, "(frame number, writable) of an address, or None."},
    {0},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "device", 0, -1, methods};

PyMODINIT_FUNC PyInit_device(void)
{
    if (ioproc_import() < 0)
        return NULL;
    return PyModule_Create(&definition);
}
