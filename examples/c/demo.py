"""A device in C follows a process through writes, fork and munmap; the callbacks run without the GIL."""
from device import counts, new_device, translation

import ioproc

PAGE = 4096
mem = ioproc.PhysicalMemory(frames=64)
device = new_device()

with ioproc.AddressSpace(mem) as mm:
    mm.register_ops(ioproc.Ops(device, name="nic0"))
    buffer = mm.mmap(4 * PAGE)
    mm.write(buffer, b"halo" * PAGE)
    print("after writing four pages:", counts(device))
    frame, writable = translation(device, buffer)
    assert frame == mm.pagemap(buffer, 1)["pfn"][0] and writable

    child = mm.fork()                   # copy-on-write: nobody may write to these frames through the device now
    print("after fork:", counts(device), translation(device, buffer))

    mm.write(buffer, b"x")              # copied: the device is told the new frame
    assert translation(device, buffer) == (mm.pagemap(buffer, 1)["pfn"][0], True)
    print("after one write:", counts(device))

    mm.munmap(buffer, 4 * PAGE)
    print("after munmap:", counts(device), translation(device, buffer))
    child.exit()
