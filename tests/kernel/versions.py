"""What differs between kernel versions: one table, read by the tests.

The model is of Linux 6.18, where every row below behaves as modelled; that is measured.  On an older kernel a row narrows
what is compared, in one of three ways:

``boundaries``
    Where a VMA ends and the next, alike in all that /proc shows, begins is not compared (whether they merged).
an operation's name
    A program is compared up to its first operation of that name that the row's condition meets.
``zero``
    Whether a page is the zero page is not compared.
"""

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass

OLDEST = (6, 2)
"""The oldest kernel on which anything is compared."""


@dataclass(frozen=True)
class Row:
    """One difference: the first kernel that does as modelled, what older ones do, and what that narrows."""

    name: str
    since: tuple
    before: str
    narrows: str
    applies: Callable = lambda arguments: True


MREMAP_FIXED, MAP_GROWSDOWN, MAP_STACK = 2, 0x100, 0x20000
TABLE = (
    Row("moves of several VMAs", (6, 17), "EFAULT; and some calls that fail do so with the other of EFAULT and EINVAL",
        "mremap", lambda a: a[3] & MREMAP_FIXED),
    Row("merges of faulted with unfaulted memory", (6, 16), "some neighbours stay apart, depending on which was written",
        "boundaries"),
    Row("failures on the way", (6, 13), "mmap(MAP_FIXED) that fails may have unmapped the range",
        "mmap", lambda a: a[3] & 0xF not in (1, 2)),
    Row("memory that was never written is not accounted once read-only", (6, 7),
        "stays accounted, and apart from memory that never was", "boundaries"),
    Row("stacks have no huge pages", (6, 7), "MAP_STACK does nothing", "mmap", lambda a: a[3] & MAP_STACK),
    Row("the zero page can be told from others (PAGEMAP_SCAN)", (6, 7), "it cannot", "zero"),
    Row("get_user_pages leaves stacks as they are", (6, 5), "pins, mlock and populating below one make it grow",
        "mmap", lambda a: a[3] & MAP_GROWSDOWN),
)


def running():
    """Return the running kernel's version as a pair of integers."""
    return tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", platform.release()).groups())


def differing(version=None):
    """Return the rows of `TABLE` in which a kernel (the running one) is not as modelled."""
    return [row for row in TABLE if (version or running()) < row.since]


def unsupported():
    """Return why nothing can be compared on this machine, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the model is of Linux on x86-64"
    if running() < OLDEST:
        return f"Linux older than {OLDEST[0]}.{OLDEST[1]}"
    if os.sysconf("SC_PAGE_SIZE") != 4096:
        return "pages are not 4096 bytes"
    with open("/proc/sys/vm/overcommit_memory") as f:
        if f.read().strip() != "0":
            return "vm.overcommit_memory is not 0: MAP_NORESERVE and accounting differ, and with them merges"
    return None


def _meminfo():
    with open("/proc/meminfo") as f:
        return {line.split(":")[0]: int(line.split()[1]) for line in f}


def no_swap(sees):
    """Return why pages cannot be swapped out in the programs, or None; `sees` is what `machine.Kernel` may see."""
    info = _meminfo()
    if info["SwapTotal"] == 0:
        return "no swap is on"
    if info["SwapFree"] < info["SwapTotal"] * 3 // 4 + 4096:
        return "swap is too full: when half of it is used the kernel frees slots earlier"
    if "pfn" not in sees:
        return "only CAP_SYS_ADMIN sees when a page has been written to swap"
    return None


def huge_pages():
    """Return how many huge pages are there for a program."""
    info = _meminfo()
    return max(info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0), 0) if info.get("Hugepagesize") == 2048 else 0
