"""A device in Python that numba compiles: the callbacks are machine code, and run without the GIL."""
import numpy as np
from numba import carray, cfunc

import ioproc
from ioproc import lowlevel

PAGE = 4096
DEVICE = np.dtype([(name, np.uint64) for name in ("loads", "invalidations", "addr", "pte")])

lookup_pte = lowlevel.lookup_pte


@cfunc(lowlevel.numba_signature("update_page"))
def update_page(arg, vma, addr):
    device = carray(arg, 1, DEVICE)[0]
    device.loads += 1
    device.addr = addr
    device.pte = lookup_pte(carray(vma, 1)[0].mm, addr)


@cfunc(lowlevel.numba_signature("invalidate_range"))
def invalidate_range(arg, vma, start, end):
    device = carray(arg, 1, DEVICE)[0]
    device.invalidations += 1
    if start <= device.addr < end:
        device.pte = 0


@cfunc(lowlevel.numba_signature("invalidate_page"))
def invalidate_page(arg, vma, addr):
    device = carray(arg, 1, DEVICE)[0]
    device.invalidations += 1
    if addr == device.addr:
        device.pte = 0


memory = np.zeros(1, DEVICE)
device = memory[0]
ops = ioproc.Ops(update_page=update_page, invalidate_page=invalidate_page, invalidate_range=invalidate_range,
                 arg=memory, name="numba")
mem = ioproc.PhysicalMemory(frames=64)

with ioproc.AddressSpace(mem) as mm:
    mm.register_ops(ops)
    buffer = mm.mmap(4 * PAGE)
    mm.write(buffer, b"halo" * PAGE)
    print(f"after writing four pages: {device['loads']} loads, {device['invalidations']} invalidations")
    assert device["pte"] >> 12 == mm.pagemap(buffer + 3 * PAGE, 1)["pfn"][0]

    child = mm.fork()
    mm.write(buffer + 3 * PAGE, b"copied")                     # to a new frame: the child has the old one
    print(f"after fork and one write: {device['loads']} loads, {device['invalidations']} invalidations")
    assert device["pte"] >> 12 == mm.pagemap(buffer + 3 * PAGE, 1)["pfn"][0]

    child.exit()
    mm.munmap(buffer, 4 * PAGE)
    print(f"after munmap: {device['loads']} loads, {device['invalidations']} invalidations, entry {device['pte']}")
