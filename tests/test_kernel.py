"""The VM against the running kernel: random programs, compared after every operation.

``IOPROC_KERNEL_PROGRAMS`` sets how many programs, ``IOPROC_KERNEL_SEED`` which; see docs/kernel-differential.md.
"""

import itertools
import os
import random
import time
import types

import pytest

import ioproc
import model
from kernel import machine, versions
from kernel.cases import CASES
from kernel.differential import Difference, compare
from kernel.programs import BASE, PAGE, Program, R, W, generate, shrink

PROGRAMS = int(os.environ.get("IOPROC_KERNEL_PROGRAMS", 300))
SEED = os.environ.get("IOPROC_KERNEL_SEED") or str(random.SystemRandom().randrange(10**6))
FIXED_ANON = 0x32  # MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS

pytestmark = pytest.mark.skipif(versions.unsupported() is not None, reason=str(versions.unsupported()))


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    return machine.build(tmp_path_factory.mktemp("executor"))


@pytest.fixture
def kernel(executor):
    with machine.Kernel(executor) as kernel:
        yield kernel


@pytest.fixture
def can_swap(kernel):
    return not versions.no_swap(kernel.sees)


def difference(vm, program, kernel):
    """Return the `Difference` that a program shows, or None."""
    try:
        huge_pages = versions.huge_pages() if program.huge else 0
        compare(vm, program, kernel.run(program), kernel.sees, versions.differing(), huge_pages)
    except Difference as found:
        return found
    return None


def shrunk(vm, program, executor):
    """Return the difference of the smallest program like this one, or None if it is gone when the program is run again."""
    with machine.Kernel(executor) as kernel:
        again = difference(vm, program, kernel)
        smaller = again and shrink(program, lambda smaller: difference(vm, smaller, kernel))
        return again and (difference(vm, smaller, kernel) or again)


def compare_all(vm, programs, executor, capsys, note=""):
    """Compare programs until one differs; print what was compared.

    The VM always does the same, the kernel nearly: something else on the machine (compaction, say) may hold a reference to a
    page for a moment, and a write fault copies it then.  So a difference counts if it comes again.
    """
    begin, operations, index, transient = time.monotonic(), 0, -1, 0
    huge_pages = versions.huge_pages()
    with machine.Kernel(executor) as kernel:
        for index, (program, outcomes) in enumerate(kernel.run_all(programs)):
            try:
                operations += compare(vm, program, outcomes, kernel.sees, versions.differing(), huge_pages)
            except Difference as found:
                if smaller := shrunk(vm, program, executor):
                    pytest.fail(f"seed {SEED}, program {index}: {smaller}", pytrace=False)
                transient += 1
                if transient > 2 + index // 1000:
                    pytest.fail(f"seed {SEED}, program {index}: not seen again when it was repeated: {found}", pytrace=False)
                note += f"; program {index} once differed, not when repeated"
    with capsys.disabled():
        print(f"\n{vm.__name__} against Linux {'.'.join(map(str, versions.running()))}, seed {SEED}: {index + 1} programs, "
              f"{operations} operations, all equal; {time.monotonic() - begin:.0f} s; "
              f"seen: {', '.join(sorted(kernel.sees)) or 'only what anyone may see'}{note}")


@pytest.mark.parametrize("vm, share", [(ioproc, 1), (model, 0.25)], ids=["ioproc", "model"])
def test_random_programs(vm, share, executor, kernel, capsys):
    no_swap = versions.no_swap(kernel.sees)
    options = {"swap": not no_swap, "lock_limit": "pfn" not in kernel.sees}
    programs = (generate(SEED, index, **options) for index in range(max(1, int(PROGRAMS * share))))
    compare_all(vm, programs, executor, capsys, f"; not with swap: {no_swap}" if no_swap else "; with swap")


@pytest.mark.parametrize("vm, share", [(ioproc, 0.25), (model, 0.1)], ids=["ioproc", "model"])
def test_huge_pages(vm, share, executor, capsys):
    if not (pages := versions.huge_pages()):
        pytest.skip("no free huge pages (vm.nr_hugepages)")
    programs = (generate(SEED, index, huge=True) for index in range(max(1, int(PROGRAMS * share))))
    compare_all(vm, programs, executor, capsys, f"; {pages} huge pages")


@pytest.mark.parametrize("vm", [ioproc, model], ids=["ioproc", "model"])
@pytest.mark.parametrize("program", CASES.values(), ids=CASES)
def test_a_case(program, vm, kernel, can_swap):
    if program.swaps and not can_swap:
        pytest.skip(versions.no_swap(kernel.sees))
    if program.huge and not versions.huge_pages():
        pytest.skip("no free huge pages (vm.nr_hugepages)")
    found = difference(vm, program, kernel) and difference(vm, program, kernel)
    assert not found, found


def test_the_limit_on_mappings(executor, capsys):
    """Few programs: each begins by making the 65,000 mappings that the kernel allows beyond the window's."""
    programs = (generate(SEED, index, length=25, mappings=True) for index in range(max(1, PROGRAMS // 30)))
    compare_all(ioproc, programs, executor, capsys)


def test_the_kernel_repeats_itself(kernel, can_swap):
    """Without this a difference would mean nothing.  (Frame numbers are not part of an outcome.)"""
    def outcome(program):
        return [(o.result, o.faults,
                 {p: (s.vmas, [row[1:] for row in s.pages.values()], s.locked, s.swapped) for p, s in o.states.items()})
                for o in kernel.run(program)]

    for index in range(20):
        program = generate(SEED, index, swap=can_swap)
        assert outcome(program) == outcome(program), program


def test_a_wrong_rule_is_found_and_shrunk(executor):
    class Forgetful(model.AddressSpace):
        def madvise(self, addr, length, advice):
            if advice != 4:
                super().madvise(addr, length, advice)

    wrong = types.SimpleNamespace(**{**vars(model), "AddressSpace": Forgetful, "__name__": "wrong"})
    with machine.Kernel(executor) as kernel:
        programs = (generate("wrong", index) for index in itertools.count())
        program = next(program for program in programs if difference(wrong, program, kernel))
    found = shrunk(wrong, program, executor)
    assert len(str(found).splitlines()) < 10
    assert "madvise" in str(found)


def test_a_listing_can_be_read():
    program = Program((("mmap", 0, BASE, 4 * PAGE, R | W, FIXED_ANON, -1, 0), ("write", 0, BASE + 1, 7),
                       ("mremap", 0, BASE, PAGE, 2 * PAGE, 3, BASE + 8 * PAGE)), (5000,))
    assert str(program) == (
        "files of 5000 bytes\n"
        "  0  0: mmap(A+0p, 4p, R|W, PRIVATE|FIXED|ANON)\n"
        "  1  0: write(A+0p+1, 7)\n"
        "  2  0: mremap(A+0p, 1p, 2p, MAYMOVE|FIXED, A+8p)"
    )


def test_the_table_of_versions():
    assert versions.differing((6, 18)) == []
    assert len(versions.differing(versions.OLDEST)) == len(versions.TABLE)
    assert [row.since for row in versions.TABLE] == sorted((row.since for row in versions.TABLE), reverse=True)


@pytest.mark.parametrize("version", sorted({row.since for row in versions.TABLE} | {versions.OLDEST}))
def test_a_narrowed_comparison_still_passes(version, kernel):
    """What an older kernel leaves out must leave the rest comparable."""
    for index in range(10):
        program = generate(SEED, index)
        compare(model, program, kernel.run(program), kernel.sees, versions.differing(version))
