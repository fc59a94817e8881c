"""A device in C, compiled by cffi (API mode): the compiled library's functions are the callbacks, and run without the GIL."""
import importlib
import sys
import tempfile

import cffi

import ioproc
from ioproc import lowlevel

PAGE = 4096
DEVICE = "typedef struct { uint64_t loads, invalidations, addr, pte; } device;"
SOURCE = """
#include "ioproc.h"
""" + DEVICE + """

static void attach(const ioproc_api *api)
{
    ioproc_api_ptr = api; /* in place of ioproc_import(), which needs the GIL: cffi calls without */
}

static void update_page(device *dev, const ioproc_vma *vma, uint64_t addr)
{
    dev->loads++;
    dev->addr = addr;
    dev->pte = ioproc_lookup_pte(vma->mm, addr);
}

static void invalidate_range(device *dev, const ioproc_vma *vma, uint64_t start, uint64_t end)
{
    dev->invalidations++;
    if (start <= dev->addr && dev->addr < end)
        dev->pte = 0;
}

static void invalidate_page(device *dev, const ioproc_vma *vma, uint64_t addr)
{
    invalidate_range(dev, vma, addr, addr + 4096);
}
"""

builder = cffi.FFI()
builder.cdef(lowlevel.CDEF + DEVICE + """
    void attach(const ioproc_api *api);
    void update_page(device *dev, const ioproc_vma *vma, uint64_t addr);
    void invalidate_range(device *dev, const ioproc_vma *vma, uint64_t start, uint64_t end);
    void invalidate_page(device *dev, const ioproc_vma *vma, uint64_t addr);
""")
builder.set_source("_device", SOURCE, include_dirs=[ioproc.get_include()])
with tempfile.TemporaryDirectory() as directory:
    builder.compile(directory)
    sys.path.insert(0, directory)
    ffi, lib = (getattr(importlib.import_module("_device"), name) for name in ("ffi", "lib"))
    sys.path.remove(directory)

lib.attach(ffi.cast("ioproc_api *", lowlevel.API))
device = ffi.new("device *")
ops = ioproc.Ops(update_page=lib.update_page, invalidate_page=lib.invalidate_page, invalidate_range=lib.invalidate_range,
                 arg=device, name="cffi")
mem = ioproc.PhysicalMemory(frames=64)

with ioproc.AddressSpace(mem) as mm:
    mm.register_ops(ops)
    buffer = mm.mmap(4 * PAGE)
    mm.write(buffer, b"halo" * PAGE)
    print(f"after writing four pages: {device.loads} loads, {device.invalidations} invalidations")
    assert device.pte >> 12 == mm.pagemap(buffer + 3 * PAGE, 1)["pfn"][0]

    child = mm.fork()
    mm.write(buffer + 3 * PAGE, b"copied")                     # to a new frame: the child has the old one
    print(f"after fork and one write: {device.loads} loads, {device.invalidations} invalidations")
    assert device.pte >> 12 == mm.pagemap(buffer + 3 * PAGE, 1)["pfn"][0]

    child.exit()
    mm.munmap(buffer, 4 * PAGE)
    print(f"after munmap: {device.loads} loads, {device.invalidations} invalidations, entry {device.pte}")
