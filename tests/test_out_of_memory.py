"""Each allocation of the core fails, alone or with all that follow in the same call: nothing is lost, the next call works."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import ctypes, sys
import ioproc
from ioproc import _core

PAGE, HUGE, BASE = 4096, 2 << 20, 0x10000000
PRIVATE, SHARED, ANONYMOUS = 0x12, 0x11, 0x20           # with MAP_FIXED
shim = ctypes.CDLL(None)
core = [line.split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(_core.__file__)]
shim.failing_from(*(ctypes.c_void_p(int(end.split()[0], 16)) for end in (core[0][0], core[-1][1])))


def scenario(attempt):
    mem = attempt(ioproc.PhysicalMemory, 96, 64, 4) or ioproc.PhysicalMemory(96, 64, 4)
    mm = attempt(ioproc.AddressSpace, mem) or ioproc.AddressSpace(mem)
    files = [attempt(ioproc.File, mem, 16 * PAGE, memfd) or ioproc.File(mem, 16 * PAGE, memfd) for memfd in (False, True)]
    huge = attempt(ioproc.File, mem, 2 * HUGE, huge=True) or ioproc.File(mem, 2 * HUGE, huge=True)
    ops = [ioproc.CountingOps() for _ in range(3)]
    far, children, pins = BASE + (1 << 32), [], []
    for counting in ops[:2]:
        attempt(mm.register_ops, counting)
    for at in BASE, far:
        attempt(mm.mmap, 40 * PAGE, 3, PRIVATE | ANONYMOUS, addr=at)
        attempt(mm.mmap, 16 * PAGE, 3, SHARED, addr=at + 40 * PAGE, file=files[0])
        attempt(mm.mmap, 16 * PAGE, 3, PRIVATE, addr=at + 56 * PAGE, file=files[1])
        attempt(mm.mmap, 8 * PAGE, 3, SHARED | ANONYMOUS, addr=at + 72 * PAGE)
        attempt(mm.mmap_device, 4 * PAGE, 0x100000, addr=at + 80 * PAGE)
        attempt(mm.zeromap, 4 * PAGE, addr=at + 84 * PAGE)
        attempt(mm.touch, at, 40 * PAGE), attempt(mm.write, at, b"w" * 20 * PAGE)
        attempt(mm.write, at + 50 * PAGE, b"w" * 25 * PAGE), attempt(mm.write, at + 80 * PAGE, b"w" * 8 * PAGE)
        for ops_ in ops[1:]:
            attempt(mm.register_ops, ops_, at + 3 * PAGE, 9 * PAGE)
        for page in range(0, 40, 3):
            attempt(mm.mprotect, at + page * PAGE, PAGE, 7)
        attempt(mm.mlock, at + 20 * PAGE, 5 * PAGE)
        children.append(attempt(mm.fork))
        attempt(mm.write, at, b"c" * 9 * PAGE)
        attempt(mem.reclaim, 40)
        for child in filter(None, children):
            attempt(child.write, at + 4 * PAGE, b"c" * 9 * PAGE), attempt(child.read, at, 30 * PAGE)
        attempt(mm.read, at, 75 * PAGE)
        pins.append(attempt(mem.pin, mm, at + 4 * PAGE, 4 * PAGE))
        attempt(mm.madvise, at, 30 * PAGE, 8), attempt(mm.madvise, at + 2 * PAGE, 7 * PAGE, 4)
        attempt(mm.mremap, at + 2 * PAGE, 6 * PAGE, 6 * PAGE, 3, at + 200 * PAGE)
        attempt(mm.mremap, at + 56 * PAGE, 10 * PAGE, 12 * PAGE, 1)
        attempt(files[0].write, 5 * PAGE, b"f" * 5 * PAGE), attempt(files[1].truncate, 3 * PAGE)
        attempt(files[0].punch_hole, 0, 6 * PAGE), attempt(files[1].truncate, 16 * PAGE)
        attempt(mm.remap_file_pages, at + 42 * PAGE, 3 * PAGE, 9)
        attempt(mm.mmap, HUGE, 3, PRIVATE | ANONYMOUS | 0x40000, addr=at + 2 * HUGE)
        attempt(mm.mmap, HUGE, 3, SHARED, addr=at + 3 * HUGE, file=huge)
        attempt(mm.write, at + 2 * HUGE, b"h"), attempt(mm.write, at + 3 * HUGE, b"h")
        attempt(mm.brk, 0x555555756000 + 8 * PAGE), attempt(mm.msync, at + 40 * PAGE, 16 * PAGE)
        attempt(mm.shmat, files[1])
        attempt(mm.vmas), attempt(mm.pagemap, at, 90 * PAGE), attempt(mem.mappings, 3)
        attempt(mm.mmap, PAGE, 3, PRIVATE | ANONYMOUS | 0x100, addr=at + 4000 * PAGE)
        attempt(mm.touch, at + 3990 * PAGE, 3 * PAGE, True)
        child = attempt(mm.vfork)
        if child is not None:
            attempt(child.write, at, b"v"), attempt(child.exec), attempt(child.mmap, PAGE), child.exit()
        for ops_ in ops:
            attempt(mm.unregister_ops, ops_, at + 4 * PAGE, 3 * PAGE)
        attempt(mm.munmap, at + 3 * PAGE, 3 * PAGE)
    shim.failing_at(0, 0)
    spaces = [mm, *filter(None, children)]
    for space in spaces:
        _core.check_space(space)
    _core.check_memory(mem, spaces)
    for pfns in pins:
        if pfns is not None:
            mem.unpin(pfns)
    for space in spaces:
        space.exit()
    del files, huge, space, spaces, mm, children, child, attempt
    stats = mem.stats
    assert (stats["frames_used"], stats["swap_used"], stats["huge_pages_free"]) == (0, 0, 4), stats
    _core.check_memory(mem, [])


def run(n, on):
    def attempt(call, *arguments, **options):
        before = shim.failing_failed()
        try:
            return call(*arguments, **options)
        except (MemoryError, OSError, ioproc.AccessError):
            pass                        # this failed, or what it needs did
        finally:
            if shim.failing_failed() != before:
                shim.failing_at(0, 0)   # the next call has memory again
                failures.append(n)

    shim.failing_at(n, on)
    scenario(attempt)
    shim.failing_at(0, 0)


failures = []
run(0, 0)
for on in 0, 1:
    n, count = 0, -1
    while count != len(failures):
        count = len(failures)
        n += 1
        run(n, on)
assert len(failures) > 1000
"""


@pytest.mark.skipif(sys.platform != "linux" or any("san" in name for name in os.environ.get("LD_PRELOAD", "").split("/")),
                    reason="replaces the C library's malloc")
def test_each_allocation_fails_once(tmp_path):
    shim = tmp_path / "failing_malloc.so"
    source = Path(__file__).parent / "native/failing_malloc.c"
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", shim, source], check=True)
    run = subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, "LD_PRELOAD": str(shim)},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
