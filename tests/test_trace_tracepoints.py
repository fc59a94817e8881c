"""What each line of a recording of tracepoints becomes, and what normalised lines become."""
import errno

import pytest

from ioproc.trace import Access, Op, TraceError, import_recording, read_tracepoints, recognise

KERNEL = 1
START = """\
 1/1  10.000000001: PERF_RECORD_COMM exec: a b:1/1
 1/1  10.000000002: PERF_RECORD_MMAP2 1/1: [0x7ffc00000000(0x21000) @ 0x7ffffffde000 00:00 0 0]: rw-p [stack]
 1/1  10.000000003: PERF_RECORD_MMAP2 1/1: [0x555555554000(0x1000) @ 0 fe:00 1 0]: r-xp /bin/a b
 1/1  10.000000004:        exceptions:page_fault_kernel: address=0x7ffc00020e70 ip=__put_user_8 error_code=0x2
 1/1  10.000000005: PERF_RECORD_MMAP2 1/1: [0x7f0000000000(0x2000) @ 0 fe:00 2 0]: rw-p /lib/ld.so
 1/1  10.000000006:            sched:sched_process_exec: filename=/bin/a b pid=1 old_pid=1
 1/1  10.000000007:            syscalls:sys_exit_execve: 0x0
"""


@pytest.fixture
def text(tmp_path):
    def text(content):
        path = tmp_path / "tracepoints"
        path.write_text(content)
        return path
    return text


@pytest.fixture
def read(text):
    def read(content, **options):
        return read_tracepoints(text(content), **options)
    return read


def ops(trace):
    return [Op(op).name for op in trace.events["op"]]


def line(second, event, rest, ids="1/1"):
    return f" {ids}  {second}.000000000:   {event}: {rest}\n"


def call(second, name, arguments, result, ids="1/1"):
    given = ", ".join(f"a{number}: {value:#010x}" for number, value in enumerate(arguments))
    return line(second, f"syscalls:sys_enter_{name}", given, ids) + \
        line(f"{second}", f"syscalls:sys_exit_{name}", f"{result:#x}", ids).replace(".000", ".500")


def test_a_program_from_its_exec_on(text):
    trace = import_recording(tracepoints=text(START))
    assert ops(trace) == ["EXEC", "MAP", "MAP", "MAP", "FAULT"]
    assert [file["path"] for file in trace.metadata["files"]] == ["/bin/a b", "/lib/ld.so"]
    assert trace.inferred() == {"events": 0, "access": 0, "file": 0, "size": 0}
    counts = trace.metadata["import"]
    assert (counts["recorded_mappings"], counts["unmapped"], counts["recorded_accesses"]) == (3, 0, 1)
    fault = trace.events[-1]
    assert (fault["access"], fault["origin"], fault["flags"]) == (Access.WRITE, 0, KERNEL)


def test_the_issues_own_lines(read):
    calls, faults = read("""\
31889/31889  2690.072740955:      syscalls:sys_enter_mmap: addr: 0x7f6fa3424000, len: 0x00002000, prot: 0x00000003, \
flags: 0x00000812, fd: 0x00000011, off: 0x00003000
31889/31889  2690.072746133:       syscalls:sys_exit_mmap: 0x7f6fa3424000
31889/31889  2690.072747585:   exceptions:page_fault_user: address=0x7f6fa3425278 ip=0x7f6fa6908932 error_code=0x6
31889/31889  2690.072752332:   exceptions:page_fault_user: address=0x7f6fa3424d78 ip=0x7f6fa68eddf9 error_code=0x4
31889/31889  2690.072754596:   exceptions:page_fault_user: address=0x7f6fa3424e80 ip=0x7f6fa68ee085 error_code=0x7
""")
    mapping = calls.events[0]
    assert [int(mapping[name]) for name in ("t", "op", "prot", "flags", "addr", "length", "arg", "ret")] == [
        2690072746133, Op.MMAP, 3, 0x812, 0x7f6fa3424000, 0x2000, 0x3000, 0x7f6fa3424000]
    assert calls.metadata["files"][0] == {"path": None, "size": 0, "kind": "file", "handle": 17, "inode": None,
                                          "opened": None}
    assert faults.events["access"].tolist() == [Access.WRITE, Access.READ, Access.WRITE]
    assert faults.events["addr"][0] == 0x7f6fa3425278
    assert faults.events["arg"][0] == 0x7f6fa6908932


def test_times_are_of_the_epoch_where_the_header_tells(read):
    header = "# reference time: 2026-11-22 19:26:06.338309 = 1795375566.338309 (TOD) = 11682.726523325 (monotonic)\n"
    calls, _ = read(header + call(11683, "brk", [0], 0x9000))
    assert int(calls.events["t"][0]) == 1795375566338309000 + 11683_500000000 - 11682_726523325
    assert calls.metadata["clock"] == "monotonic"


def test_every_call(read):
    calls, _ = read(
        call(1, "mmap", [0, 0x3000, 3, 0x22, 0xffffffff, 0], 0x5000) + call(2, "mprotect", [0x5000, 4096, 1], 0)
        + call(3, "pkey_mprotect", [0x5000, 4096, 1, 7], 0) + call(4, "mremap", [0x5000, 4096, 8192, 1, 0x1234], 0x9000)
        + call(5, "mremap", [0x5000, 4096, 8192, 3, 0xa000], 0xa000) + call(6, "brk", [0], 0x1000)
        + call(7, "madvise", [0x5000, 4096, 4], 0) + call(8, "msync", [0x5000, 4096, 4], 0) + call(9, "mlock", [0x5000, 1], 0)
        + call(10, "mlock2", [0x5000, 1, 1], 0) + call(11, "munlock", [0x5000, 1], 0) + call(12, "shmat", [3, 0, 0], 0xb000)
        + call(13, "shmdt", [0xb000], 0) + call(14, "munmap", [0x5000, 4096], 0) + call(15, "read", [0, 1, 2], 0))
    assert ops(calls) == ["MMAP", "MPROTECT", "MPROTECT", "MREMAP", "MREMAP", "BRK", "MADVISE", "MSYNC", "MLOCK", "MLOCK",
                          "MUNLOCK", "SHMAT", "SHMDT", "MUNMAP"]
    assert calls.events["file"].tolist() == [-1] * 11 + [0] + [-1] * 2
    assert calls.events["ret"].tolist()[3:6] == [0x9000, 0xa000, 0x1000]
    assert calls.metadata["counts"]["ignored_calls"] == {"read": 1}


def test_what_takes_counts_from_its_start_and_what_gives_from_its_end(read):
    calls, _ = read(call(1, "mmap", [0, 4096, 3, 0x22, 0xffffffff, 0], 0x5000) + call(2, "munmap", [0x5000, 4096], 0)
                    + call(3, "brk", [0], 0x9000) + call(4, "brk", [0xa000], 0xa000) + call(5, "brk", [0x9000], 0x9000)
                    + call(6, "clone", [0x01200011, 0, 0, 0, 0], 7))
    assert calls.events["t"].tolist() == [1_500_000_000, 2_000_000_000, 3_500_000_000, 4_500_000_000, 5_000_000_000,
                                          6_000_000_000]


def test_failed_calls_keep_their_errno(read):
    calls, _ = read(call(1, "mmap", [0, 0, 3, 0x22, 0xffffffff, 0], (1 << 64) - errno.EINVAL)
                    + call(2, "munmap", [1, 4096], (1 << 64) - errno.EINVAL) + call(3, "mremap", [0, 1, 1, 0, 5], (1 << 64) - 12)
                    + call(4, "mlock", [0, 1], (1 << 64) - 512) + call(5, "fork", [], (1 << 64) - 11)
                    + call(6, "execve", [1, 2, 3], (1 << 64) - 2))
    assert calls.events["errno"].tolist() == [errno.EINVAL, errno.EINVAL, errno.ENOMEM, 255]
    assert calls.events["ret"].tolist() == [0] * 4
    assert (calls.metadata["counts"]["failed_forks"], calls.metadata["counts"]["failed_execs"]) == (1, 1)


@pytest.mark.parametrize(("between", "child", "expected"), [
    ("", "", "FORK"),
    (line(1, "task:task_newtask", "pid=7 comm=a comm=b clone_flags=4100 oom_score_adj=0"), "", "VFORK"),
    (line(1, "task:task_newtask", "pid=7 comm=a clone_flags=3d0f00 oom_score_adj=0"), "", None),
    (" 1/1  1.000000000: PERF_RECORD_FORK(7:7):(1:1)\n", "", "FORK"),
    (" 1/1  1.000000000: PERF_RECORD_FORK(7:7):(1:1)\n"
     + line(1, "task:task_newtask", "pid=7 comm=a clone_flags=4111 oom_score_adj=0"), "", "VFORK"),
    (" 1/1  1.000000000: PERF_RECORD_FORK(1:7):(1:1)\n", "", None),
    (line(1, "sched:sched_process_fork", "comm=a pid=1 child_comm=a child_pid=7"), line(2, "x:y", "", "7/7"), "FORK"),
    (line(1, "x:y", "z", "1/7"), "", None),
    ("", line(2, "x:y", "z", "1/7"), None),
    ("", line(2, "x:y", "z", "7/7"), "FORK"),
])
def test_clone3_is_told_from_what_else_is_seen(read, between, child, expected):
    """clone3 has its flags in memory, which no tracepoint shows."""
    enter, leave = call(1, "clone3", [0x7ffd00000000, 88], 7).splitlines(keepends=True)
    calls, _ = read(enter + between + leave + (child or line(2, "x:y", "z", "7/7" if expected else "1/7"))
                    + call(3, "brk", [0], 0x9000))
    assert ops(calls) == ([expected] if expected else []) + ["BRK"]
    if expected:
        assert (calls.events["arg"][0], calls.events["t"][0]) == (7, 1_000_000_000)


def test_a_child_runs_before_its_clone_returns(read):
    enter, leave = call(1, "clone", [0x01200011, 0, 0, 0, 0], 7).splitlines(keepends=True)
    calls, _ = read(enter + call(1, "brk", [0], 0x9000, "7/7") + leave)
    assert [(op, int(event["pid"])) for op, event in zip(ops(calls), calls, strict=True)] == [("FORK", 1), ("BRK", 7)]


def test_a_process_exits_with_its_last_thread(read):
    thread = line(1, "task:task_newtask", "pid=2 comm=a clone_flags=3d0f00 oom_score_adj=0")
    calls, _ = read(thread + line(2, "sched:sched_process_exit", "comm=a pid=1 prio=120 group_dead=false")
                    + line(3, "exceptions:page_fault_user", "address=0x1000 ip=0x1 error_code=0x4", "1/2")
                    + line(4, "sched:sched_process_exit", "comm=a pid=2 prio=120 group_dead=true", "1/2")
                    + line(5, "exceptions:page_fault_kernel", "address=0x1000 ip=0x1 error_code=0x6", "1/2")
                    + " 1/2  6.000000000: PERF_RECORD_EXIT(1:2):(1:1)\n")
    assert (ops(calls), calls.events["t"].tolist()) == (["EXIT"], [6_000_000_000])


def test_exit_group_is_an_end_where_nothing_else_tells(read):
    calls, _ = read(line(1, "syscalls:sys_enter_exit_group", "error_code: 0x00000000"))
    assert (ops(calls), calls.events["pid"].tolist()) == (["EXIT"], [1])


def test_a_thread_that_executes_becomes_its_process(read):
    calls, _ = read(line(1, "task:task_newtask", "pid=2 comm=a clone_flags=3d0f00 oom_score_adj=0")
                    + line(2, "syscalls:sys_enter_execve", "filename: 0x1, argv: 0x2, envp: 0x3", "1/2")
                    + line(3, "sched:sched_process_exit", "comm=a pid=1 prio=120")
                    + " 1/1  4.000000000: PERF_RECORD_COMM exec: b:1/1\n"
                    + line(5, "sched:sched_process_exec", "filename=/bin/b pid=1 old_pid=2")
                    + line(6, "syscalls:sys_exit_execve", "0x0") + line(7, "sched:sched_process_exit", "comm=b pid=1 prio=120"))
    assert ops(calls) == ["EXEC", "EXIT"]
    assert calls.metadata["files"][calls.events["file"][0]]["path"] == "/bin/b"
    assert calls.events["arg"][0] == 2_000_000_000


def test_what_the_old_program_did_last_stays_with_it(text):
    """The kernel reads execve's arguments from the old memory; what comes after the point of no return is the new one's."""
    trace = import_recording(tracepoints=text(
        START + call(11, "mmap", [0, 4096, 3, 0x22, 0xffffffff, 0], 0x7f1000000000)
        + line(12, "syscalls:sys_enter_execve", "filename: 0x1, argv: 0x2, envp: 0x3")
        + line(13, "exceptions:page_fault_kernel", "address=0x7f1000000000 ip=strncpy_from_user error_code=0x0")
        + START.replace("10.", "14.")))
    assert ops(trace) == ["EXEC", "MAP", "MAP", "MAP", "FAULT", "MMAP", "FAULT"] + ["EXEC", "MAP", "MAP", "MAP", "FAULT"]
    assert trace.metadata["import"]["unmapped"] == 0


def test_mapping_records_name_files_and_tell_unnamed_ones_apart(text):
    def mapped(second, path, inode, descriptor=3):
        enter, leave = call(second, "mmap", [0, 4096, 3, 1, descriptor, 0],
                            0x7f0000000000 + (second << 20)).splitlines(keepends=True)
        where = f"[{0x7f0000000000 + (second << 20):#x}(0x1000) @ 0 {inode}]"
        return f"{enter} 1/1  {second}.200000000: PERF_RECORD_MMAP2 1/1: {where}: rw-s {path}\n{leave}"

    trace = import_recording(tracepoints=text(
        START + mapped(11, "/memfd:x (deleted)", "00:01 5 0") + mapped(12, "/memfd:x (deleted)", "00:01 6 0")
        + mapped(13, "/memfd:x (deleted)", "00:01 5 0", 9) + mapped(14, "/data", "fe:00 9 1")
        + mapped(15, "/data", "fe:00 9 1", 7)))
    found = trace.events["file"][trace.events["op"] == Op.MMAP]
    assert [trace.metadata["files"][file]["path"] for file in found] == ["/memfd:x (deleted)"] * 3 + ["/data"] * 2
    assert found[0] == found[2] != found[1]
    assert found[3] == found[4]
    assert trace.inferred()["file"] == 0


def test_without_mapping_records_files_are_known_by_who_opened_them(text):
    def mapped(second, descriptor, ids="1/1"):
        return call(second, "mmap", [0, 4096, 3, 1, descriptor, 0], 0x7f0000000000 + (second << 20), ids)

    trace = import_recording(tracepoints=text(
        START + call(11, "openat", [1, 2, 3, 4], 3) + mapped(12, 3) + call(13, "dup", [3], 5) + call(14, "close", [3], 0)
        + call(15, "memfd_create", [1, 0], 3) + mapped(16, 3) + mapped(17, 5) + call(18, "clone", [0x11, 0, 0, 0, 0], 7)
        + call(19, "fcntl", [5, 1030, 9], 9, "7/7") + mapped(20, 9, "7/7") + call(21, "dup2", [3, 9], 9, "7/7")
        + mapped(22, 9, "7/7") + call(23, "close_range", [3, 9, 0], 0, "7/7") + mapped(24, 9, "7/7")
        + call(25, "fcntl", [5, 1, 9], 0) + mapped(26, 5)))
    first, second, third, fourth, fifth, sixth, last = trace.events["file"][trace.events["op"] == Op.MMAP].tolist()
    assert first == third == fourth == last
    assert second == fifth
    assert len({first, second, sixth}) == 3
    assert trace.metadata["import"]["tracepoints"]["ignored_calls"] == {}


def test_the_size_of_a_segment_is_in_its_mapping_record(text):
    enter, leave = call(11, "shmat", [3, 0, 0], 0x7f1000000000).splitlines(keepends=True)
    record = " 1/1  11.100000000: PERF_RECORD_MMAP2 1/1: [0x7f1000000000(0x5000) @ 0 00:01 3 0]: rw-s /SYSV00000000 (deleted)\n"
    trace = import_recording(tracepoints=text(START + enter + record + leave))
    event = trace.events[-1]
    assert (event["length"], event["origin"]) == (0x5000, 0)
    assert trace.metadata["files"][event["file"]] == {"path": None, "size": 0x5000, "kind": "shm"}


def test_a_fault_the_kernel_did_not_wait_for_is_left_out(text):
    """It tries with page faults disabled, and faults again when it may wait."""
    fault = "address=0x7f0000001000 ip=copy_fpstate_to_sigframe error_code=0x2"
    trace = import_recording(tracepoints=text(START + line(11, "exceptions:page_fault_kernel", fault)
                                              + line(12, "exceptions:page_fault_kernel", fault)))
    assert ops(trace)[-2:] == ["FAULT", "FAULT"]
    assert len(trace) == 6
    assert trace.metadata["import"]["unanswered"] == 1
    assert trace.events["t"][-1] == 12_000_000_000 - 10_000_000_001


@pytest.mark.parametrize(("second", "ids", "code", "address", "counted"), [
    ("12.000050000", "1/2", 6, 0x7f1000000000, "races"),            # both found it absent
    ("12.000050000", "1/1", 6, 0x7f1000000000, "repeated"),         # taken away by what no call tells
    ("13.000000000", "1/2", 4, 0x7f1000000000, "repeated"),
    ("13.000000000", "1/1", 4, 0x7e1000000000, "unmapped"),
    ("13.000000000", "1/1", 7, 0x555555554000, "not_accessible"),   # a handler of SIGSEGV
])
def test_what_the_history_does_not_explain_is_counted_and_kept(text, second, ids, code, address, counted):
    trace = import_recording(tracepoints=text(
        START + call(11, "mmap", [0, 4096, 3, 0x22, 0xffffffff, 0], 0x7f1000000000)
        + line(12, "exceptions:page_fault_user", "address=0x7f1000000000 ip=0x1 error_code=0x6")
        + f" {ids}  {second}:  exceptions:page_fault_user: address={address:#x} ip=0x1 error_code={code:#x}\n"))
    counts = trace.metadata["import"]
    assert {name for name in ("races", "repeated", "unmapped", "not_accessible", "unanswered") if counts[name]} == {counted}
    assert ops(trace)[-2:] == ["FAULT", "FAULT"]
    assert trace.events["access"][-1] == (Access.WRITE if code & 2 else Access.READ)


def test_a_shared_write_after_a_read_is_write_notify(text):
    enter, leave = call(11, "mmap", [0, 4096, 3, 1, 3, 0], 0x7f1000000000).splitlines(keepends=True)
    trace = import_recording(tracepoints=text(
        START + enter + leave + line(12, "exceptions:page_fault_user", "address=0x7f1000000000 ip=0x1 error_code=0x4")
        + line(13, "exceptions:page_fault_user", "address=0x7f1000000000 ip=0x1 error_code=0x7")))
    assert trace.metadata["import"]["write_notified"] == 1
    assert trace.events["access"][-2:].tolist() == [Access.READ, Access.WRITE]


def test_addresses_of_the_kernel_are_counted(read):
    calls, faults = read(line(1, "exceptions:page_fault_kernel", "address=0xffffc90000000000 ip=0x1 error_code=0x0"))
    assert (len(calls), len(faults), calls.metadata["counts"]["kernel_addresses"]) == (0, 0, 1)


def test_other_fields_and_events_do_no_harm(read):
    calls, faults = read("""\
# comment
 my prog  1/1 [001] 1.000000:          1 syscalls:sys_enter_brk: brk: 0x00000000
 prog     1/1 [001] 1.000001:          1 syscalls:sys_exit_brk: 0x9000
 1/1  2.000000000:  exceptions:page_fault_user: address=0x9000 ip=0x1 error_code=0x6
 0/0  2.000000000: PERF_RECORD_MMAP -1/0: [0xffffffff81000000(0x1209988) @ 0xffffffff81000000]: x [kernel.kallsyms]_text
 0/0  3.000000000:  sched:sched_process_exit: comm=swapper pid=0 prio=120
 1/1  3.000000000:  kmem:mm_page_alloc: page=0x1
 9/9  0.000000000: PERF_RECORD_MMAP2 9/9: [0x7ffc00000000(0x21000) @ 0 00:00 0 0]: rw-p [stack]
 1/1  3.000000000: PERF_RECORD_LOST lost 12
 1/1  3.000000000: PERF_RECORD_SWITCH
""")
    assert (ops(calls), ops(faults)) == (["BRK"], ["FAULT"])
    counts = calls.metadata["counts"]
    assert (counts["lost"], counts["other_records"]) == (12, 2)


def test_calls_that_began_before_or_never_ended_are_counted(read):
    calls, _ = read(line(1, "syscalls:sys_exit_munmap", "0x0") + line(2, "syscalls:sys_exit_clone", "0x0", "7/7")
                    + line(3, "syscalls:sys_enter_mmap", "a: 0x1") + line(4, "syscalls:sys_enter_munmap", "a: 0x1, b: 0x2"))
    assert len(calls) == 0
    assert calls.metadata["counts"]["cut_short"] == 3


@pytest.mark.parametrize(("broken", "reason"), [
    ("garbage", "not a line of perf script"),
    (" 1/1  5.000000000: what", "not a line of perf script"),
    (" 1/1  5.000000000:  exceptions:page_fault_user: address=0x1", "broken page fault"),
    (" 1/1  5.000000000:  syscalls:sys_exit_brk: what", "broken result"),
    (" 1/1  5.000000000:  PERF_RECORD_MMAP2 broken", "broken mapping"),
    (call(5, "munmap", [1], 0).rstrip(), "needs 2 arguments"),
    (call(5, "mmap", [1], 0).rstrip(), "needs 6 arguments"),
    (call(5, "mprotect", [4096, 4096, 1 << 32], 0).rstrip(), "out of range"),
    (call(5, "munmap", [4096, 1 << 60], 0).rstrip(), "can have succeeded"),
    ("1 1 1 pf 1 2", "not a line|a page fault has"),
    ("1 1 1 munmap 0 0", "needs 2 arguments"),
])
def test_a_broken_line_is_an_error_with_its_number_and_lenient_counts_it(read, broken, reason):
    good = line(4, "exceptions:page_fault_user", "address=0x1000 ip=0x1000 error_code=0x4")
    with pytest.raises(TraceError, match=reason) as caught:
        read(f"# comment\n\n{good}{broken}\n{good}")
    assert caught.value.line == 4 + broken.count("\n")
    calls, faults = read(f"{good}{broken}\n{good}", lenient=True)
    assert len(faults) == 2
    assert calls.metadata["counts"]["skipped_lines"] == 1


def test_lines_a_little_out_of_order_are_sorted_and_far_ones_are_an_error(read):
    fault = "exceptions:page_fault_user: address=0x1000 ip=0x1 error_code=0x4"
    calls, faults = read("".join(f" 1/1  {100 + (i ^ 3)}.000000000:  {fault}\n" for i in range(400)))
    assert (faults.events["t"][1:] > faults.events["t"][:-1]).all()
    text = "".join(f" 1/1  {1000 + i}.000000000:  {fault}\n" for i in range(5_000))
    with pytest.raises(TraceError, match="earlier") as caught:
        read(text + f" 1/1  5.000000000:  {fault}\n")
    assert caught.value.line == 5_001


def test_nothing_at_all_is_no_recording(read):
    with pytest.raises(TraceError, match="no line of tracepoints"):
        read("\n# comment\n")


def test_normalised_lines(text):
    path = text("""\
100 1 1 execve 0 0 0 0
110 1 1 brk 0 9000
120 1 1 mmap 0 2000 3 22 ffffffff 0 7f0000000000
130 1 1 pf 7f0000000010 6 0
140 1 1 pfk 0x7f0000001000 2 0x400000 0
150 1 1 clone 1200011 0 0 0 0 2
160 2 2 pf 7f0000000000 7 0
170 2 2 munmap 7f0000000000 1000 0
180 2 2 munmap 1 1000 -16
190 2 2 exit_group 0 0
200 1 1 exit 0 0
""")
    assert recognise(path) == "tracepoints"
    trace = import_recording(tracepoints=path)
    assert ops(trace) == ["EXEC", "BRK", "MMAP", "FAULT", "FAULT", "FORK", "FAULT", "MUNMAP", "MUNMAP", "EXIT", "EXIT"]
    assert trace.events["flags"][4] == KERNEL
    assert trace.events["errno"][8] == errno.EINVAL
    assert trace.metadata["import"]["unmapped"] == 0


@pytest.mark.parametrize(("content", "kind"), [
    ("strace: Process 1 attached\n4293  1795352574.558994 munmap(0x7fe2480ea000, 58168 <unfinished ...>\n", "strace"),
    ("4293  1795352574.558994 <... munmap resumed>) = 0 <0.000090>\n", "strace"),
    ("4293  1795352574.558994 +++ exited with 0 +++\n", "strace"),
    (" 4293/4293  1795352569.312583276:     7fe242888028     5646adc24d81\n", "perf"),
    (" a 27211  2216.581030: PERF_RECORD_MMAP2 27211/27211: [0x1000(0x3000) @ 0x0 00:00 0 0]: rw-p //anon\n", "perf"),
    (START, "tracepoints"),
    ("# x\n31889/31889  2690.072746133:       syscalls:sys_exit_mmap: 0x7f6fa3424000\n", "tracepoints"),
    (" a b 1/1 [001]  2690.072746:    1   exceptions:page_fault_user: address=0x1 ip=0x1 error_code=0x4\n", "tracepoints"),
    ("8292146293 31890 31890 pf 7f82a0883000 6 0\n", "tracepoints"),
])
def test_a_recording_is_recognised_by_its_content(text, content, kind):
    assert recognise(text(content)) == kind


@pytest.mark.parametrize("content", ["", "what\n", "time,tid,address,length,direction\n1.0,1,2,3,send\n", "\0" * 10_000])
def test_what_is_no_recording_is_not_recognised(text, content):
    with pytest.raises(TraceError, match="neither"):
        recognise(text(content))
