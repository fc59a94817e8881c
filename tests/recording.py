"""Devices that write down what they are told: ``(device, hook, *addresses)`` in one list."""
import mmap

import ioproc

PAGE = 4096
RO = mmap.PROT_READ
RW = mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
FIXED = ioproc.MAP_FIXED
BASE = 0x10000000


def device(log, name, *hooks, also=None):
    """
    Ops with `hooks` (default: all nine) that append to `log`; `also` is called afterwards with the callback's arguments.
    """
    def callback(hook):
        def called(*arguments):
            first, *rest = arguments
            log.append((name, hook, *rest))
            if also is not None:
                also(*arguments)
        return called
    return ioproc.Ops(name=name, **{hook: callback(hook) for hook in hooks or ioproc.HOOK_NAMES})


def pages(mm, count, at=BASE, prot=RW, flags=PRIVATE, **more):
    """Map `count` pages at `at`."""
    return mm.mmap(count * PAGE, prot, flags | FIXED, addr=at, **more)


def layout(mm, base=BASE):
    """The VMAs in pages relative to `base`."""
    return [((vma.start - base) // PAGE, (vma.end - base) // PAGE) for vma in mm.vmas()]
