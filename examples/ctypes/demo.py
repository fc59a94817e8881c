"""A device in a C library, through ctypes: the library's functions are the callbacks, and run without the GIL."""
import ctypes
import subprocess
import tempfile
from pathlib import Path

import ioproc
from ioproc import lowlevel

PAGE = 4096


class Device(ctypes.Structure):
    """As in device.c."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("api", "loads", "invalidations", "addr", "pte")]


with tempfile.TemporaryDirectory() as directory:
    source, target = Path(__file__).with_name("device.c"), Path(directory, "device.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-I", ioproc.get_include(), source, "-o", target], check=True)
    library = ctypes.CDLL(str(target))


def function(callback):
    """A function of the library, with the type of the callback it is for: ctypes cannot know it."""
    return lowlevel.prototype(callback)((callback, library))


device = Device(api=lowlevel.API)
callbacks = {name: function(name) for name in ("update_page", "invalidate_page", "invalidate_range")}
mem = ioproc.PhysicalMemory(frames=64)

with ioproc.AddressSpace(mem) as mm:
    mm.register_ops(ioproc.Ops(**callbacks, arg=device, name="ctypes"))
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
