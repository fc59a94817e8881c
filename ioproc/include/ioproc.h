/* ioproc.h: the C interface of ioproc's hooks.
 *
 * An ops structure is what a device driver registers on an address space (or on VMAs of it) to be told of page-table
 * changes.  Fill one, wrap it in a PyCapsule named IOPROC_OPS_CAPSULE, and hand the capsule to ioproc.Ops().
 *
 * Callbacks run under the lock of the address space, without Python's GIL.  They may look (ioproc_lookup_pte); they must
 * not change the address space, sleep, or call Python.  Addresses are bytes; ranges are [start, end), page aligned.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef IOPROC_H
#define IOPROC_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IOPROC_ABI_VERSION 1
#define IOPROC_OPS_CAPSULE "ioproc.ops.v1"
#define IOPROC_API_CAPSULE "ioproc._core._api"

typedef struct ioproc_mm ioproc_mm; /* an address space: opaque */

/* A VMA as a callback sees it; valid during the callback only. */
typedef struct ioproc_vma {
    uint64_t start, end; /* bytes */
    uint64_t pgoff;      /* pages: offset in the file, or in anonymous memory the page number of first mapping */
    uint64_t flags;      /* IOPROC_VM_* */
    ioproc_mm *mm;
} ioproc_vma;

#define IOPROC_VM_READ 0x1u
#define IOPROC_VM_WRITE 0x2u
#define IOPROC_VM_EXEC 0x4u
#define IOPROC_VM_SHARED 0x8u
#define IOPROC_VM_HUGETLB 0x1000000u /* 2 MiB pages: a page callback is about the whole one at addr */

/* A page-table entry; 0 is none.  The page frame number is pte >> 12. */
#define IOPROC_PTE_PRESENT 0x1u
#define IOPROC_PTE_WRITE 0x2u
#define IOPROC_PTE_USER 0x4u /* clear: PROT_NONE */
#define IOPROC_PTE_YOUNG 0x20u
#define IOPROC_PTE_DIRTY 0x40u
#define IOPROC_PTE_SPECIAL 0x100u   /* device memory: the frame number is the device's */
#define IOPROC_PTE_ZERO 0x200u      /* the shared zero page */
#define IOPROC_PTE_EXCLUSIVE 0x400u /* an anonymous page of this address space alone */
#define IOPROC_PTE_PFN_SHIFT 12

/* Any callback may be NULL.  invalidate, change_protection, wrprotect and sync run before the entries change, update after.
 * The structure must outlive its registration: the capsule is kept alive for as long. */
typedef struct ioproc_ops {
    uint32_t version; /* IOPROC_ABI_VERSION */
    uint32_t size;    /* sizeof(ioproc_ops) */
    void *arg;        /* passed back unchanged */
    void (*release)(void *arg, ioproc_mm *mm);
    void (*sync_range)(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end);
    void (*invalidate_range)(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end);
    void (*update_range)(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end);
    void (*change_protection)(void *arg, const ioproc_vma *vma, uint64_t start, uint64_t end, uint32_t newprot);
    void (*sync_page)(void *arg, const ioproc_vma *vma, uint64_t addr);
    void (*invalidate_page)(void *arg, const ioproc_vma *vma, uint64_t addr);
    void (*update_page)(void *arg, const ioproc_vma *vma, uint64_t addr);
    void (*wrprotect_page)(void *arg, const ioproc_vma *vma, uint64_t addr);
} ioproc_ops;

#define IOPROC_OPS_INIT(argument) {IOPROC_ABI_VERSION, sizeof(ioproc_ops), (argument), 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* What a callback may call, reached through the capsule IOPROC_API_CAPSULE. */
typedef struct ioproc_api {
    uint32_t version, size;
    uint64_t (*lookup_pte)(const ioproc_mm *mm, uint64_t addr);
} ioproc_api;

#ifdef Py_PYTHON_H
static const ioproc_api *ioproc_api_ptr;

/* Once, at import, with the GIL: 0, or -1 with an exception set. */
static inline int ioproc_import(void)
{
    ioproc_api_ptr = (const ioproc_api *)PyCapsule_Import(IOPROC_API_CAPSULE, 0);
    if (ioproc_api_ptr && ioproc_api_ptr->version != IOPROC_ABI_VERSION) {
        PyErr_Format(PyExc_ImportError, "ioproc has ABI version %u, this extension was compiled for %u",
                     ioproc_api_ptr->version, IOPROC_ABI_VERSION);
        ioproc_api_ptr = 0;
    }
    return ioproc_api_ptr ? 0 : -1;
}

/* The entry of the page that holds addr, 0 if none; in a callback only, for the address space it was called for. */
static inline uint64_t ioproc_lookup_pte(const ioproc_mm *mm, uint64_t addr)
{
    return ioproc_api_ptr->lookup_pte(mm, addr);
}
#endif

#ifdef __cplusplus
}
#endif
#endif
