"""Random programs: ioproc must do exactly what model.py does, hook for hook (see sequences.py).

IOPROC_EXAMPLES is the number of programs (shared out among the cases), IOPROC_SEED repeats a run.
The report of a failure is the smallest program found that fails, with what the model made of each call.
"""
import os
import random

import pytest

import ioproc
import model
from sequences import HUGE, PAGE, STEPS, Run, failure

EXAMPLES = int(os.environ.get("IOPROC_EXAMPLES", 300))
SEED = int(os.environ.get("IOPROC_SEED", random.randrange(2**32)))

USE = ["read", "write", "touch"]
HUGE_STEPS = [name for name, *_ in STEPS if name.startswith("huge_")]
CASES = {       # share of the examples, the limits of the machine, and which steps come more often
    "plain": (0.15, {}, []),
    "few frames": (0.1, {"frames": 14}, []),
    "few frames, swap": (0.15, {"frames": 10, "swap_slots": 200}, USE),
    "few frames, few slots": (0.1, {"frames": 8, "swap_slots": 4}, USE),
    "files under pressure": (0.1, {"frames": 6, "swap_slots": 12}, [*USE, "map_file", "write_file", "truncate", "punch_hole"]),
    "forks and swap": (0.1, {"frames": 12, "swap_slots": 60}, [*USE, "fork", "exit", "reclaim"]),
    "few VMAs": (0.05, {"max_map_count": 9}, []),
    "very few VMAs": (0.05, {"max_map_count": 4}, []),      # too few for most mremap calls
    "rlimits": (0.05, {"rlimits": {"AS": 20 * PAGE, "DATA": 12 * PAGE, "MEMLOCK": 6 * PAGE, "STACK": 5 * PAGE}}, []),
    "huge pages": (0.1, {"huge_pages": 5}, [*HUGE_STEPS, "fork", "exit", "unpin"]),
    "2.6.12's mappings": (0.05, {"nonlinear": True}, ["map_file", "remap_file_pages", *USE]),
}


@pytest.mark.parametrize("case", CASES)
def test_random_programs(case):
    share, limits, often = CASES[case]
    found = failure((model, ioproc), limits, max(1, int(EXAMPLES * share)), SEED, often)
    if found:
        pytest.fail(f"IOPROC_{found.replace('seed ', 'SEED=', 1)}", pytrace=False)


A, H = 0x10000000, 0x10010000       # the arena, and where brk starts in it
ONCE_WRONG = {      # programs on which the two did not agree, or which are hard to find
    "mremap to a length beyond the VMA": [
        (0, "mmap", 4 * PAGE, 3, 0x32, {"addr": A}), (0, "mremap", A + 3 * PAGE, 3 * PAGE, 2 * PAGE, 3, A + 0x12000)],
    "brk shrink where nothing is mapped": [(0, "brk", H + 0x6001), (0, "munmap", H + 0x2000, 0x6000), (0, "brk", H + 0x3000)],
    "brk does not extend what ends at its start": [(0, "mmap", PAGE, 3, 0x32, {"addr": H - PAGE}), (0, "brk", H + PAGE)],
    "MADV_FREE of pages shared after fork": [
        (0, "mmap", PAGE, 3, 0x32, {"addr": A}), (0, "write", A, b"x"), (0, "fork"), (1, "madvise", A, PAGE, 8)],
    "MADV_FREE of the zero page": [(0, "mmap", PAGE, 3, 0x32, {"addr": A}), (0, "read", A, 1), (0, "madvise", A, PAGE, 8)],
    "release order after leaving the address space's chain": [
        (0, "mmap", PAGE, 3, 0x32, {"addr": A}), (0, "register_ops", ("ops", 1)), (0, "register_ops", ("ops", 0), A, PAGE),
        (0, "register_ops", ("ops", 1), A, PAGE), (0, "unregister_ops", ("ops", 1)), (0, "exit")],
    "msync of a segment attached for reading": [
        (0, "register_ops", ("ops", 0)), (0, "shmat", ("file", 0), A, {"readonly": True}), (0, "msync", A, PAGE)],
    "a child's pages beside new memory": [
        (0, "mmap", 4 * PAGE, 3, 0x32, {"addr": A}), (0, "write", A, bytes(4 * PAGE)), (0, "fork"),
        (1, "mmap", PAGE, 3, 0x32, {"addr": A + 4 * PAGE}), (1, "madvise", A + 4 * PAGE, PAGE, 1),
        (1, "madvise", A + 3 * PAGE, PAGE, 1), (1, "mremap", A + PAGE, 2 * PAGE, 2 * PAGE, 3, A + 8 * PAGE),
        (1, "mmap", PAGE, 3, 0x32, {"addr": A + 2 * PAGE}), (1, "mremap", A + 8 * PAGE, PAGE, PAGE, 3, A + PAGE)],
    "a write to what another has read back from swap": [
        (0, "mmap", PAGE, 3, 0x32, {"addr": A}), (0, "write", A, b"x"), (0, "fork"), (0, "reclaim", 40), (0, "read", A, 1),
        (1, "write", A, b"y")],
    "truncation to the size that it has": [
        (0, "truncate", ("file", 3), 100), (0, "mmap", PAGE, 3, 0x11, {"addr": A, "file": ("file", 3)}),
        (0, "write", A + 150, b"x"), (0, "truncate", ("file", 3), 100), (0, "truncate", ("file", 3), 200)],
    "a pin of what may be written but not read": [
        (0, "mmap", PAGE, 2, 0x8032, {"addr": A}), (0, "pin", A, PAGE, {"write": False})],
    "locking part of a huge page": [
        (0, "mmap", 2 * HUGE, 3, 0x40032, {"addr": 2 * HUGE}), (0, "mlock", 2 * HUGE + PAGE, HUGE),
        (0, "munlock", 2 * HUGE, PAGE)],
    "a huge mapping over another that is the last of its file": [
        (0, "mmap", 2 * HUGE, 3, 0x40031, {"addr": 2 * HUGE}), (0, "mmap", 2 * HUGE, 3, 0x40031, {"addr": 2 * HUGE}),
        (0, "mmap", 2 * HUGE, 3, 0x40031, {"addr": 2 * HUGE})],
    "a huge page that its owner took back": [
        (0, "mmap", 3 * HUGE, 3, 0x48032, {"addr": 2 * HUGE}), (0, "fork"), (0, "write", 2 * HUGE, b"x"),
        (0, "munmap", 3 * HUGE, 2 * HUGE), (1, "munmap", 3 * HUGE, 2 * HUGE), (1, "read", 2 * HUGE, 1)],
    "what is reserved behind the end of a file that grows": [
        (0, "truncate", ("file", 5), 0),
        (0, "mmap", 2 * HUGE, 1, 0x11, {"addr": 0x20000000, "file": ("file", 5), "offset": HUGE}),
        (0, "truncate", ("file", 5), HUGE)],
    "a pinned huge page whose file is cut": [
        (0, "mmap", HUGE, 3, 0x12, {"addr": 0x20400000, "file": ("file", 5), "offset": HUGE}),
        (0, "pin", 0x20400000, PAGE, {"write": False}), (0, "truncate", ("file", 5), 0), (0, "unpin", 0)],
    "the last page of a file mapped over itself": [
        (0, "mmap", 3 * PAGE, 3, 0x31, {"addr": A}), (0, "read", A, 3 * PAGE), (0, "munmap", A, 2 * PAGE),
        (0, "remap_file_pages", A + 2 * PAGE, PAGE, 0)],
    "an abandoned anon_vma": [
        (0, "mmap", PAGE, 3, 0x32, {"addr": A}), (0, "write", A, b"x"), (0, "fork"), (1, "fork"), (1, "exit"), (1, "fork"),
        *[(space, call, *args) for space in (0, 1, 2) for call, *args in [
            ("mmap", PAGE, 3, 0x32, {"addr": A + PAGE}), ("write", A + PAGE, b"x"), ("write", A, b"y"),
            ("mprotect", A, PAGE, 1), ("mprotect", A + PAGE, PAGE, 1)]]],
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_known_programs(name):
    run = Run((model, ioproc), swap_slots=10, huge_pages=3)
    for space, call, *args in ONCE_WRONG[name]:
        kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        run.call(space, call, args, kwargs)
