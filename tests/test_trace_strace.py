"""What each line that strace writes becomes."""
import errno
import gzip
import lzma

import pytest

from ioproc.trace import EVENT, Op, TraceError, read_strace

SECOND = 1_000_000_000


@pytest.fixture
def read(tmp_path):
    def read(text, **options):
        path = tmp_path / "strace"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_strace(path, **options)
    return read


def only(trace, *fields):
    assert len(trace) == 1
    values = [int(trace.events[0][field]) for field in fields]
    return values if len(values) > 1 else values[0]


@pytest.mark.parametrize(("call", "op", "fields"), [
    ("mmap(NULL, 8192, 0x3, 0x22, -1, 0) = 0x7f0000000000", Op.MMAP,
     {"addr": 0, "length": 8192, "prot": 3, "flags": 0x22, "file": -1, "arg": 0, "ret": 0x7f0000000000}),
    ("mmap(0x7f0000003000, 12, 0x5, 0x812, 3, 0x18000) = 0x7f0000003000", Op.MMAP,
     {"addr": 0x7f0000003000, "length": 12, "file": 0, "arg": 0x18000}),
    ("munmap(0x7f0000000000, 58168) = 0", Op.MUNMAP, {"addr": 0x7f0000000000, "length": 58168}),
    ("mprotect(0x7f0000000000, 4096, 0) = 0", Op.MPROTECT, {"length": 4096, "prot": 0}),
    ("pkey_mprotect(0x7f0000000000, 4096, 0x1, 2) = 0", Op.MPROTECT, {"length": 4096, "prot": 1}),
    ("mremap(0x7f0000000000, 4096, 8192, 0x1) = 0x7f0000100000", Op.MREMAP,
     {"length": 4096, "arg": 8192, "flags": 1, "ret": 0x7f0000100000}),
    ("mremap(0x7f0000000000, 4096, 8192, 0x3, 0x7f0000200000) = 0x7f0000200000", Op.MREMAP,
     {"flags": 3, "ret": 0x7f0000200000}),
    ("brk(NULL)       = 0x56036e364000", Op.BRK, {"addr": 0, "ret": 0x56036e364000}),
    ("brk(0x56036e385000) = 0x56036e385000", Op.BRK, {"addr": 0x56036e385000, "ret": 0x56036e385000}),
    ("madvise(0x7f0000000000, 8368128, 0x4) = 0", Op.MADVISE, {"length": 8368128, "arg": 4}),
    ("msync(0x7f0000000000, 4096, 0x4) = 0", Op.MSYNC, {"arg": 4}),
    ("mlock(0x7f0000000000, 4096) = 0", Op.MLOCK, {"length": 4096}),
    ("mlock2(0x7f0000000000, 4096, 0x1) = 0", Op.MLOCK, {"flags": 1}),
    ("munlock(0x7f0000000000, 4096) = 0", Op.MUNLOCK, {"length": 4096}),
    ("shmat(786480, NULL, 0x1000) = 0x7f0000000000", Op.SHMAT, {"flags": 0x1000, "file": 0, "ret": 0x7f0000000000}),
    ("shmdt(0x7f0000000000) = 0", Op.SHMDT, {"addr": 0x7f0000000000}),
])
def test_calls(read, call, op, fields):
    trace = read(f"42  1795352574.559014 {call} <0.000022>\n")
    event = trace.events[0]
    assert (event["op"], event["pid"], event["tid"], event["errno"]) == (op, 42, 42, 0)
    assert {name: int(event[name]) for name in fields} == fields


def test_a_call_that_gives_memory_counts_when_it_ends_and_one_that_takes_when_it_starts(read):
    trace = read("1 100.000010 mmap(NULL, 4096, 0x3, 0x22, -1, 0) = 0x1000 <0.000020>\n"
                 "1 100.000100 munmap(0x1000, 4096) = 0 <0.000020>\n"
                 "1 100.000200 brk(NULL) = 0x9000 <0.000001>\n"
                 "1 100.000300 brk(0xa000) = 0xa000 <0.000005>\n"
                 "1 100.000400 brk(0x9000) = 0x9000 <0.000005>\n")
    assert [int(t) - 100 * SECOND for t in trace.events["t"]] == [30_000, 100_999, 201_000, 305_000, 400_999]


def test_halves_of_calls_are_put_together_per_thread(read):
    trace = read("""\
4292  1795352568.983354 mmap(NULL, 55743, 0x1, 0x2, 3, 0 <unfinished ...>
4293  1795352568.983386 mmap(NULL, 55744, 0x1, 0x2, 3, 0 <unfinished ...>
4292  1795352568.983431 <... mmap resumed>) = 0x7f8b6a016000 <0.000048>
4293  1795352568.983443 <... mmap resumed>) = 0x7fe24b30c000 <0.000050>
4293  1795352574.558994 munmap(0x7fe24b30c000, 58168 <unfinished ...>
4292  1795352574.559014 munmap(0x7f8b6a016000, 58168) = 0 <0.000022>
4293  1795352574.559094 <... munmap resumed>) = 0 <0.000090>
""")
    assert [(int(e["pid"]), Op(e["op"]), int(e["length"])) for e in trace] == [
        (4292, Op.MMAP, 55743), (4293, Op.MMAP, 55744), (4293, Op.MUNMAP, 58168), (4292, Op.MUNMAP, 58168)]
    assert (trace.events["t"][1:] >= trace.events["t"][:-1]).all()


def test_what_another_thread_unmapped_is_gone_before_it_is_mapped_again(read):
    trace = read("""\
7  1.000000 clone(child_stack=0x9000, flags=0x3d0f00) = 8 <0.000010>
8  1.000100 munmap(0x5000, 4096 <unfinished ...>
7  1.000110 mmap(NULL, 4096, 0x3, 0x22, -1, 0) = 0x5000 <0.000020>
8  1.000150 <... munmap resumed>) = 0 <0.000050>
""")
    assert trace.events["op"].tolist() == [Op.MUNMAP, Op.MMAP]
    assert trace.events["pid"].tolist() == [7, 7]
    assert trace.events["tid"].tolist() == [8, 7]


@pytest.mark.parametrize(("line", "op"), [
    ("clone(child_stack=NULL, flags=0x1200000|17, child_tidptr=0x7f7e6c03aa10) = 4244", Op.FORK),
    ("clone(child_stack=NULL, flags=0x1200011, child_tidptr=0x7f7e6c03aa10) = 4244", Op.FORK),
    ("clone3({flags=0x4100, exit_signal=17, stack=0x7f0000, stack_size=0x9000}, 88) = 4244", Op.VFORK),
    ("fork() = 4244", Op.FORK),
    ("vfork() = 4244", Op.VFORK),
])
def test_a_new_process(read, line, op):
    assert only(read(f"4240  1.5 {line} <0.000822>\n".replace("1.5", "1.500000")), "op", "arg") == [op, 4244]


def test_a_fork_comes_before_what_the_child_does_although_it_returns_later(read):
    trace = read("""\
1  1.000000 clone(child_stack=NULL, flags=0x1200000|17 <unfinished ...>
2  1.000100 brk(NULL) = 0x9000 <0.000001>
1  1.000200 <... clone resumed>, child_tidptr=0x7f7e6c03aa10) = 2 <0.000643>
""")
    assert [(int(e["op"]), int(e["pid"]), int(e["arg"])) for e in trace] == [(Op.FORK, 1, 2), (Op.BRK, 2, 0)]


def test_a_thread_belongs_to_its_process_even_if_it_calls_before_its_clone_returns(read):
    trace = read("""\
1  1.000000 clone3({flags=0x3d0f00, stack=0x7000} <unfinished ...>
2  1.000100 brk(NULL) = 0x9000 <0.000001>
1  1.000200 <... clone3 resumed> => {parent_tid=[2]}, 88) = 2 <0.000196>
2  1.000300 brk(NULL) = 0x9000 <0.000001>
""")
    assert [(int(e["pid"]), int(e["tid"])) for e in trace] == [(1, 2), (1, 2)]


def test_a_process_ends_with_its_last_thread(read):
    trace = read("""\
1  1.000000 clone3({flags=0x3d0f00, stack=0x7000} => {parent_tid=[2]}, 88) = 2 <0.000196>
2  1.000300 exit(0)         = ?
2  1.000400 +++ exited with 0 +++
1  1.000500 --- SIGCHLD {si_signo=17, si_code=0x1, si_pid=4244, si_uid=1001, si_status=0} ---
1  1.000600 exit_group(0 <unfinished ...>
1  1.000700 <... exit_group resumed>) = ?
1  1.000800 +++ killed by SIGSEGV (core dumped) +++
""")
    assert only(trace, "op", "pid", "t") == [Op.EXIT, 1, SECOND + 800_000]
    assert trace.metadata["counts"]["signals"] == 1


def test_exec_names_its_program_and_a_failed_one_is_no_event(read):
    trace = read('1  1.000000 execve("/a/b\\"\\303\\251", ["b"], 0x7ff /* 47 vars */) = 0 <0.000670>\n'
                 '1  1.100000 execve("/a/c", ["c"], 0x7ff /* 47 vars */) = -1 ENOENT (No such file) <0.000007>\n')
    assert only(trace, "op", "file") == [Op.EXEC, 0]
    assert trace.metadata["files"][0]["path"] == '/a/b"é'
    assert trace.metadata["counts"]["failed_execs"] == 1


def test_exec_by_a_thread_continues_under_the_process(read):
    trace = read("""\
1  1.000000 clone3({flags=0x3d0f00, stack=0x7000} => {parent_tid=[3]}, 88) = 3 <0.000196>
3  1.000100 execve("/bin/true", ["true"], 0x7ffcdabdb048 /* 35 vars */ <unfinished ...>
1  1.000200 +++ superseded by execve in pid 3 +++
1  1.000300 <... execve resumed>) = 0 <0.000605>
1  1.000400 brk(NULL) = 0x9000 <0.000001>
1  1.000500 +++ exited with 0 +++
""")
    assert [(int(e["op"]), int(e["pid"])) for e in trace] == [(Op.EXEC, 1), (Op.BRK, 1), (Op.EXIT, 1)]
    assert trace.metadata["files"][0]["path"] == "/bin/true"


@pytest.mark.parametrize(("flags", "expected"), [
    ("0x3d0f00", [(Op.BRK, 1), (Op.BRK, 1), (Op.EXIT, 1)]),
    ("0x11", [(Op.FORK, 1), (Op.BRK, 2), (Op.EXIT, 2), (Op.BRK, 1), (Op.EXIT, 1)]),
])
def test_a_child_that_has_ended_before_its_clone_returns(read, flags, expected):
    trace = read(f"1 1.000100 clone3({{flags={flags}, exit_signal=0}} <unfinished ...>\n"
                 "2 1.000200 brk(NULL) = 0x9000 <0.000001>\n"
                 "2 1.000300 +++ exited with 0 +++\n"
                 "1 1.000400 <... clone3 resumed> => {parent_tid=[0]}, 88) = 2 <0.000400>\n"
                 "1 1.000500 brk(NULL) = 0x9000 <0.000001>\n"
                 "1 1.000600 +++ exited with 0 +++\n")
    assert [(int(e["op"]), int(e["pid"])) for e in trace] == expected


def test_failed_calls_keep_their_errno(read):
    trace = read("1 1.000000 mmap(NULL, 0, 0x3, 0x22, -1, 0) = -1 EINVAL (Invalid argument) <0.000005>\n"
                 "1 1.000100 munmap(0x5001, 4096) = -1 EINVAL (Invalid argument) <0.000005>\n"
                 "1 1.000200 mprotect(0x5000, 4096, 0x3) = -1 ENOMEM (Cannot allocate memory) <0.000005>\n")
    assert trace.events["errno"].tolist() == [errno.EINVAL, errno.EINVAL, errno.ENOMEM]
    assert trace.events["ret"].tolist() == [0, 0, 0]


def test_paths_of_strace_y(read):
    trace = read("1 1.000000 mmap(NULL, 9, 0x1, 0x2, 3</lib/a, (b).so>, 0) = 0x1000 <0.000005>\n"
                 "1 1.000100 mmap(NULL, 9, 0x1, 0x1, 4</dev/shm/x\\76>(deleted), 0) = 0x3000 <0.000005>\n"
                 "1 1.000200 mmap(NULL, 9, 0x1, 0x1, 4</memfd:x (deleted)>, 0) = 0x5000 <0.000005>\n")
    assert [entry["path"] for entry in trace.metadata["files"]] == [
        "/lib/a, (b).so", "/dev/shm/x> (deleted)", "/memfd:x (deleted)"]


def test_calls_of_no_consequence_are_counted_by_name(read):
    trace = read("1 1.000000 wait4(-1, [{WIFEXITED(s) && WEXITSTATUS(s) == 0}], 0x1, NULL) = 4244 <0.000073>\n"
                 "1 1.000100 set_mempolicy(0, NULL, 0) = 0 <0.000013>\n")
    assert len(trace) == 0
    assert trace.metadata["counts"]["ignored_calls"] == {"wait4": 1, "set_mempolicy": 1}


def test_a_call_cut_short_by_death_is_counted_not_applied(read):
    trace = read("1 1.000000 munmap(0x5000, 4096 <unfinished ...>\n1 1.000100 +++ killed by SIGKILL +++\n")
    assert trace.events["op"].tolist() == [Op.EXIT]
    assert trace.metadata["counts"]["cut_short"] == 1


@pytest.mark.parametrize(("line", "reason"), [
    ("garbage", "not a line of strace"),
    ("1795352574.559014 munmap(0x7f0000000000, 58168) = 0 <0.000022>", "not a line of strace"),
    ("1  1.000000 munmap(0x7f0000000000, 58168)", "neither a call with its result"),
    ("1  1.000000 munmap(0x7f0000000000, 58168) = 0", "record with strace -T"),
    ("1  1.000000 munmap(0x7f0000000000) = 0 <0.000022>", "munmap needs 2 arguments"),
    ("1  1.000000 munmap(0x7f00000z0000, 1) = 0 <0.000022>", "not a number"),
    ("1  1.000000 munmap(0x1ffffffffffffffff, 1) = 0 <0.000022>", "out of range"),
    ("1  1.000000 mprotect(0x5000, 4096, PROT_NONE) = 0 <0.000022>", "-X raw"),
    ("1  1.000000 mprotect(0x5000, 4096, 0x100000000) = 0 <0.000022>", "out of range"),
    ("1  1.000000 mmap(NULL, 1, 0x3, 0x22, -1) = 0x5000 <0.000022>", "six arguments"),
    ("1  1.000000 clone(child_stack=NULL, flags=CLONE_VM|17) = 4 <0.000022>", "-X raw"),
    ("1  1.000000 <... mmap resumed>) = 0x5000 <0.000022>", "was not started"),
    ("1  1.000000 mprotect(0x5000, 0xfffffffffffff000, 0x1) = 0 <0.000022>", "can have succeeded"),
    ("1  1.000000 --- SIGCHLD {si_sig", "broken signal"),
    ("1  1.000000 +++ exited wi", "broken end"),
])
def test_a_broken_line_is_an_error_with_its_number_and_lenient_counts_it(read, line, reason):
    good = "1  0.500000 brk(NULL) = 0x9000 <0.000001>\n"
    with pytest.raises(TraceError, match=reason) as caught:
        read(f"{good}{line}\n{good}")
    assert caught.value.line == 2
    assert str(caught.value).startswith(f"{caught.value.path}:2: ")
    trace = read(f"{good}{line}\n{good}", lenient=True)
    assert len(trace) == 2
    assert trace.metadata["counts"]["skipped_lines"] == 1


def test_nothing_at_all_is_no_recording(read):
    with pytest.raises(TraceError, match="no line of strace"):
        read("")
    with pytest.raises(TraceError, match="no line of strace"):
        read("what\never\n", lenient=True)


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_input(tmp_path, suffix, compress):
    path = tmp_path / f"strace{suffix}"
    data = compress(b"1 1.000000 brk(NULL) = 0x9000 <0.000001>\n" * 5000)
    path.write_bytes(data)
    assert len(read_strace(path)) == 5000
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(TraceError, match="damaged or truncated"):
        read_strace(path)
    path.write_bytes(b"1 1.000000 brk(NULL) = 0x9000 <0.000001>\n")
    with pytest.raises(TraceError, match="damaged or truncated"):
        read_strace(path)


def test_a_line_without_end_does_not_fill_memory(read):
    with pytest.raises(TraceError, match="no end"):
        read(b"1" * 3_000_000)


def test_events_have_the_documented_type(read):
    assert read("1 1.000000 brk(NULL) = 0x9000 <0.000001>\n").events.dtype == EVENT
    assert EVENT.itemsize == 64
