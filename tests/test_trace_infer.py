"""Each rule by which an import decides what no system call says, on a history made for it."""
import pytest

from ioproc.trace import Access, Op, Origin, TraceError, import_recording

EXEC = '1 1.000000 execve("/bin/prog", ["prog"], 0x7ff) = 0 <0.000010>\n'
HEAP = "1 1.000020 brk(NULL) = 0x555600000000 <0.000001>\n"
MAPPED = EXEC + HEAP + "1 1.000100 mmap(NULL, 65536, 0x3, 0x22, -1, 0) = 0x7f0000000000 <0.000001>\n"
READ, WRITE = Access.READ, Access.WRITE


@pytest.fixture
def history(tmp_path):
    """Import strace's lines and faults given as (microseconds, thread, address[, ip[, process]])."""
    def history(calls, faults=(), **options):
        (tmp_path / "strace").write_text(calls)
        lines = []
        for t, tid, addr, *rest in faults:
            ip, pid = (*rest, *(0x7f00ffff0000, 1)[len(rest):])
            lines.append(f" {pid}/{tid}  1.{t:06d}500:  {addr:x}  {ip:x}\n")
        (tmp_path / "perf").write_text("".join(lines) or "# none\n")
        return import_recording(tmp_path / "strace", tmp_path / "perf" if lines else None, **options)
    return history


def faults(trace):
    return [Access(int(event["access"])) for event in trace if event["op"] == Op.FAULT]


def operations(trace):
    return [Op(int(event["op"])) for event in trace]


# -- order

def test_a_fault_comes_after_the_mmap_that_it_needs_and_before_the_munmap_that_ends_it(history):
    trace = history(MAPPED + "1 1.000200 munmap(0x7f0000000000, 65536) = 0 <0.000050>\n",
                    [(102, 1, 0x7f0000000000), (200, 1, 0x7f0000001000)])
    order = [op for op in operations(trace) if op in (Op.MMAP, Op.MUNMAP, Op.FAULT)]
    assert order == [Op.MMAP, Op.FAULT, Op.FAULT, Op.MUNMAP]
    assert trace.metadata["import"]["unmapped"] == 0


def test_times_count_from_the_first_event(history):
    trace = history(MAPPED)
    assert trace.events["t"][0] == 0
    assert trace.metadata["epoch_ns"] == 1_000_010_000


# -- read or write

def test_a_lone_fault_in_writable_memory_is_taken_for_a_write(history):
    trace = history(MAPPED, [(150, 1, 0x7f0000000010)])
    assert faults(trace) == [WRITE]
    assert trace.events["origin"][-1] == Origin.ACCESS
    assert trace.metadata["import"]["assumed_writes"] == 1


def test_a_refault_proves_that_the_first_was_a_read_and_this_one_a_write(history):
    trace = history(MAPPED, [(150, 1, 0x7f0000000010), (900, 1, 0x7f0000000ff0)])
    assert faults(trace) == [READ, WRITE]
    assert trace.metadata["import"]["proved_reads"] == 1


@pytest.mark.parametrize("between", [
    "madvise(0x7f0000000000, 65536, 0x4) = 0",
    "mprotect(0x7f0000000000, 65536, 0x3) = 0",
    "mmap(0x7f0000000000, 65536, 0x3, 0x32, -1, 0) = 0x7f0000000000",
    "clone(child_stack=NULL, flags=0x1200000|17) = 2",
])
def test_a_refault_proves_nothing_across_an_invalidation_a_protection_change_or_a_fork(history, between):
    trace = history(f"{MAPPED}1 1.000500 {between} <0.000010>\n",
                    [(150, 1, 0x7f0000000000), (900, 1, 0x7f0000000000)])
    assert faults(trace) == [WRITE, WRITE]
    assert trace.metadata["import"]["proved_reads"] == 0


def test_an_invalidation_elsewhere_does_not_matter(history):
    trace = history(MAPPED + "1 1.000500 madvise(0x7f0000001000, 4096, 0x4) = 0 <0.000010>\n",
                    [(150, 1, 0x7f0000000000), (900, 1, 0x7f0000000000)])
    assert faults(trace) == [READ, WRITE]


def test_what_is_known_of_a_page_moves_with_it(history):
    trace = history(MAPPED + "1 1.000500 mremap(0x7f0000000000, 65536, 131072, 0x1) = 0x7e0000000000 <0.000010>\n",
                    [(150, 1, 0x7f0000003000), (900, 1, 0x7e0000003000)])
    assert faults(trace) == [READ, WRITE]


def test_memory_that_cannot_be_written_is_read(history):
    trace = history(EXEC + "1 1.000100 mmap(NULL, 65536, 0x1, 0x22, -1, 0) = 0x7f0000000000 <0.000001>\n",
                    [(150, 1, 0x7f0000000000)])
    assert faults(trace) == [READ]


def test_fetching_an_instruction_is_reading(history):
    calls = EXEC + "1 1.000100 mmap(NULL, 65536, 0x7, 0x22, -1, 0) = 0x7f0000000000 <0.000001>\n"
    assert faults(history(calls, [(150, 1, 0x7f0000000123, 0x7f0000000120)])) == [READ]
    assert faults(history(calls, [(150, 1, 0x7f0000000123, 0x7f0000001120)])) == [WRITE]


def test_after_a_fork_the_child_and_the_parent_write_to_what_was_written(history):
    trace = history(MAPPED + "1 1.000500 clone(child_stack=NULL, flags=0x1200000|17) = 2 <0.000010>\n",
                    [(150, 1, 0x7f0000000000), (900, 2, 0x7f0000000000, 0, 2), (901, 1, 0x7f0000000000)])
    assert faults(trace) == [WRITE, WRITE, WRITE]
    assert trace.metadata["import"]["known_writes"] == 2


@pytest.mark.parametrize(("advice", "assumed", "known", "unmapped"), [
    ([], 1, 1, 0),          # what was written is there, and its first write breaks it
    ([10], 1, 0, 1),        # MADV_DONTFORK
    ([10, 11], 1, 1, 0),    # and MADV_DOFORK
    ([18], 2, 0, 0),        # MADV_WIPEONFORK
    ([18, 19], 1, 1, 0),    # and MADV_KEEPONFORK
])
def test_what_madvise_tells_a_fork(history, advice, assumed, known, unmapped):
    calls = "".join(f"1 1.00030{number} madvise(0x7f0000000000, 4096, {value:#x}) = 0 <0.000001>\n"
                    for number, value in enumerate(advice))
    trace = history(MAPPED + calls + "1 1.000400 fork() = 2 <0.000010>\n2 1.000900 +++ exited with 0 +++\n",
                    [(150, 1, 0x7f0000000010), (500, 2, 0x7f0000000010, 1, 2)])
    counts = trace.metadata["import"]
    assert [counts[name] for name in ("assumed_writes", "known_writes", "unmapped")] == [assumed, known, unmapped]


def test_two_threads_that_fault_at_once_prove_nothing(history):
    calls = MAPPED + "1 1.000110 clone3({flags=0x3d0f00, stack=0x7000} => {parent_tid=[2]}, 88) = 2 <0.000010>\n"
    trace = history(calls, [(150, 1, 0x7f0000000000), (160, 2, 0x7f0000000000)])
    assert faults(trace) == [WRITE, WRITE]
    assert trace.metadata["import"]["races"] == 1
    assert faults(history(calls, [(150, 1, 0x7f0000000000), (650, 2, 0x7f0000000000)])) == [READ, WRITE]


def test_a_fault_where_nothing_is_mapped_has_no_access(history):
    trace = history(MAPPED, [(150, 1, 0x7f0000000000), (160, 1, 0x10)])
    assert faults(trace)[-1] in (Access.UNKNOWN, READ, WRITE)
    trace = history(MAPPED + "1 1.000200 munmap(0x7f0000000000, 65536) = 0 <0.000005>\n", [(250, 1, 0x7f0000000000)])
    assert faults(trace) == [Access.UNKNOWN]
    assert trace.metadata["import"]["unmapped"] == 1


# -- what execve maps

IMAGE, LOADER, STACK = 0x555500000000, 0x7f0000010000, 0x7ffc00000000
PROGRAM = (EXEC + HEAP
           + "1 1.000100 mmap(NULL, 4096, 0x3, 0x22, -1, 0) = 0x7f000000f000 <0.000001>\n"
           + f"1 1.000200 mprotect({LOADER + 0x30000:#x}, 8192, 0x1) = 0 <0.000001>\n"
           + f"1 1.000210 mprotect({IMAGE + 0x3000:#x}, 4096, 0x1) = 0 <0.000001>\n")
TOUCHED = [(11, 1, LOADER + 0x1000, LOADER + 0x1000), (12, 1, LOADER + 0x31000, LOADER + 0x1000),
           (13, 1, STACK, LOADER + 0x1000), (14, 1, STACK - 0x5000, LOADER + 0x1000),
           (15, 1, IMAGE + 0x1000, IMAGE + 0x1000), (16, 1, IMAGE + 0x4000, IMAGE + 0x1000),
           (17, 1, LOADER + 0x33000, LOADER + 0x1000), (18, 1, IMAGE, LOADER + 0x1000)]


def mappings(trace):
    return [(int(event["addr"]), int(event["addr"] + event["length"]), int(event["prot"]))
            for event in trace if event["op"] == Op.MAP]


def test_the_image_the_loader_and_the_stack_are_mapped_right_after_exec(history):
    trace = history(PROGRAM, TOUCHED)
    assert operations(trace)[:6] == [Op.EXEC] + [Op.MAP] * 5
    assert mappings(trace) == [
        (IMAGE, IMAGE + 0x3000, 5), (IMAGE + 0x3000, IMAGE + 0x5000, 3),
        (LOADER + 0x1000, LOADER + 0x30000, 5), (LOADER + 0x30000, LOADER + 0x34000, 3),
        (STACK - 0x5000, STACK + 0x1000, 3)]
    assert all(event["origin"] == Origin.EVENT for event in trace if event["op"] == Op.MAP)
    assert trace.metadata["files"][0]["path"] == "/bin/prog"
    assert trace.metadata["import"]["unmapped"] == 0


def test_the_vdso_is_where_instructions_are_fetched_above_the_stack(history):
    trace = history(EXEC + HEAP, [(11, 1, STACK, 0x400000), (12, 1, STACK + 0x9000, STACK + 0xc000),
                                  (13, 1, STACK + 0xc000, STACK + 0xc000), (14, 1, STACK - 0x3000, 0x400000)])
    assert mappings(trace) == [(STACK - 0x3000, STACK + 0x1000, 3), (STACK + 0x9000, STACK + 0xd000, 5)]


def test_a_childs_faults_tell_of_its_parents_program(history):
    trace = history(EXEC + HEAP + "1 1.000500 clone(child_stack=NULL, flags=0x1200000|17) = 2 <0.000010>\n",
                    [(50, 1, IMAGE, IMAGE), (900, 2, IMAGE + 0x2000, IMAGE, 2)])
    assert mappings(trace) == [(IMAGE, IMAGE + 0x1000, 5), (IMAGE + 0x1000, IMAGE + 0x3000, 3)]
    assert trace.metadata["import"]["unmapped"] == 0


def test_a_vfork_child_leaves_its_parents_program_alone(history):
    trace = history(EXEC + HEAP + """\
1 1.000500 vfork( <unfinished ...>
2 1.000600 execve("/bin/other", ["other"], 0x7ff) = 0 <0.000010>
1 1.000700 <... vfork resumed>) = 2 <0.000200>
2 1.000800 +++ exited with 0 +++
""", [(50, 1, IMAGE, IMAGE), (650, 2, 0x400000, 0x400000, 2), (750, 1, IMAGE, IMAGE)])
    assert [op for op in operations(trace) if op != Op.FAULT] == [
        Op.EXEC, Op.MAP, Op.BRK, Op.VFORK, Op.EXEC, Op.MAP, Op.EXIT]
    assert mappings(trace) == [(IMAGE, IMAGE + 0x1000, 5), (0x400000, 0x401000, 5)]


def test_mapping_records_are_better_than_inference(tmp_path):
    (tmp_path / "strace").write_text(EXEC + HEAP + "1 1.000100 mmap(NULL, 8192, 0x1, 0x2, 3, 0) = 0x7f0000002000 <0.000001>\n")
    (tmp_path / "perf").write_text(f"""\
 1/1  1.000005000: PERF_RECORD_MMAP2 1/1: [0x7ffc00000000(0x21000) @ 0x7ffffffde000 00:00 0 0]: rw-p [stack]
 1/1  1.000006000: PERF_RECORD_MMAP2 1/1: [{IMAGE:#x}(0x9000) @ 0 fe:00 260180 0]: r--p /bin/prog
 1/1  1.000012000: PERF_RECORD_MMAP2 1/1: [{IMAGE + 0x2000:#x}(0x4000) @ 0x2000 fe:00 260180 0]: r-xp /bin/prog
 1/1  1.000015000:  7ffbffffe000  1000
 1/1  1.000103000: PERF_RECORD_MMAP2 1/1: [0x7f0000002000(0x2000) @ 0 fe:00 260181 0]: r--p /lib/libc.so
""")
    trace = import_recording(tmp_path / "strace", tmp_path / "perf")
    assert mappings(trace) == [(IMAGE, IMAGE + 0x2000, 1), (IMAGE + 0x2000, IMAGE + 0x6000, 5),
                               (IMAGE + 0x6000, IMAGE + 0x9000, 1), (0x7ffbffffe000, 0x7ffc00021000, 3)]
    assert [int(event["arg"]) for event in trace if event["op"] == Op.MAP] == [0, 0x2000, 0x6000, 0]
    assert not any(event["origin"] & Origin.EVENT for event in trace)
    assert "/lib/libc.so" in [entry["path"] for entry in trace.metadata["files"]]


# -- files and segments

def files_of(trace):
    return [int(event["file"]) for event in trace if event["op"] == Op.MMAP]


LIBRARY = """\
{0} {1}.000100 mmap(NULL, 40960, 0x1, 0x802, 3, 0) = 0x7f0000000000 <0.000001>
{0} {1}.000200 mmap(0x7f0000001000, 8192, 0x5, 0x812, 3, 0x1000) = 0x7f0000001000 <0.000001>
"""


def test_a_fixed_mapping_inside_a_files_first_one_continues_it(history):
    trace = history(EXEC + LIBRARY.format(1, 1)
                    + "1 1.000300 mmap(NULL, 8192, 0x1, 0x802, 3, 0) = 0x7f0000100000 <0.000001>\n")
    first, second, other = files_of(trace)
    assert first == second != other
    assert trace.metadata["files"][first]["size"] == 40960


def test_the_same_program_maps_the_same_libraries(history):
    calls = EXEC + LIBRARY.format(1, 1) + """\
1 1.100000 clone(child_stack=NULL, flags=0x1200000|17) = 2 <0.000010>
2 1.200000 execve("/bin/{}", ["x"], 0x7ff) = 0 <0.000010>
""" + LIBRARY.format(2, 2)
    trace = history(calls.format("prog"))
    assert len(set(files_of(trace))) == 1
    assert [int(event["origin"]) for event in trace if event["op"] == Op.MMAP] == [0, 0, Origin.FILE, 0]
    assert len(set(files_of(history(calls.format("other"))))) == 2


def test_paths_of_strace_y_are_the_files(history):
    trace = history(EXEC + "1 1.000100 mmap(NULL, 4096, 0x1, 0x1, 3</d/a>, 0) = 0x7f0000000000 <0.000001>\n"
                    "1 1.000200 mmap(NULL, 8192, 0x1, 0x1, 9</d/a>, 0x4000) = 0x7f0000002000 <0.000001>\n"
                    "1 1.000300 mmap(NULL, 4096, 0x1, 0x1, 3</d/b>, 0) = 0x7f0000004000 <0.000001>\n")
    a, again, b = files_of(trace)
    assert a == again != b
    assert trace.metadata["files"][a] == {"path": "/d/a", "size": 0x6000, "kind": "file"}


def test_a_segment_ends_where_the_next_mapping_starts_and_is_the_same_in_every_process(history):
    trace = history(MAPPED + """\
1 1.000500 clone(child_stack=NULL, flags=0x1200000|17) = 2 <0.000010>
1 1.000600 shmat(77, NULL, 0) = 0x7effffffc000 <0.000010>
2 1.000700 shmat(77, NULL, 0) = 0x7e0000000000 <0.000010>
2 1.000800 shmat(78, NULL, 0) = 0x7d0000000000 <0.000010>
""")
    first, second, other = [event for event in trace if event["op"] == Op.SHMAT]
    assert first["file"] == second["file"] != other["file"]
    assert first["length"] == second["length"] == 0x4000
    assert first["origin"] == Origin.SIZE
    assert trace.metadata["files"][int(first["file"])] == {"path": None, "size": 0x4000, "kind": "shm"}


# -- who takes part

def test_processes_nobody_traced_are_excluded_and_counted(history):
    trace = history(MAPPED, [(5, 1, 0x1000), (150, 1, 0x7f0000000000), (160, 9, 0x2000, 0x3000, 9),
                             (170, 9, 0x2000, 0x3000, 9)])
    assert set(trace.events["pid"].tolist()) == {1}
    counts = trace.metadata["import"]
    assert (counts["excluded_processes"], counts["excluded_faults"], counts["faults_before_start"]) == (1, 2, 1)


def test_what_both_readers_skipped_is_in_the_metadata(tmp_path):
    (tmp_path / "strace").write_text(MAPPED + "nonsense\n")
    (tmp_path / "perf").write_text(" 1/1  1.000150000:  7f0000000000  1000\nnonsense\nnonsense\n")
    with pytest.raises(TraceError, match=r"strace:4: "):
        import_recording(tmp_path / "strace", tmp_path / "perf")
    counts = import_recording(tmp_path / "strace", tmp_path / "perf", lenient=True).metadata["import"]
    assert (counts["strace"]["skipped_lines"], counts["perf"]["skipped_lines"]) == (1, 2)
