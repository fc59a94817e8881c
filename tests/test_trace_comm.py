"""Communication is added from a plain text."""
import pytest

from ioproc.trace import Access, Op, TraceError, annotate, import_recording

CALLS = """\
1 1.000000 execve("/bin/prog", ["prog"], 0x7ff) = 0 <0.000010>
1 1.000020 clone3({flags=0x3d0f00, stack=0x7000} => {parent_tid=[2]}, 88) = 2 <0.000010>
2 1.000100 mmap(NULL, 65536, 0x3, 0x22, -1, 0) = 0x7f0000000000 <0.000001>
2 1.000200 munmap(0x7f0000000000, 65536) = 0 <0.000001>
"""


@pytest.fixture
def trace(tmp_path):
    (tmp_path / "strace").write_text(CALLS)
    return import_recording(tmp_path / "strace")


@pytest.mark.parametrize("text", [
    "time,tid,address,length,direction\n1.00015,2,0x7f0000001000,4096,send\n1.000160000,2,139637976727552,10,recv\n",
    '{"time": 1.00015, "tid": 2, "address": 139637976731648, "length": 4096, "direction": "send"}\n'
    '{"time": "1.00016", "tid": 2, "address": "0x7f0000000000", "length": 10, "direction": "recv"}\n',
    "# from the first event on\n+140000,2,0x7f0000001000,4096,send\n\n+150000,2,0x7f0000000000,10,recv\n",
])
def test_communication_is_merged_by_time(trace, tmp_path, text):
    (tmp_path / "comm").write_text(text)
    merged = annotate(trace, tmp_path / "comm")
    assert merged.events["op"].tolist() == [Op.EXEC, Op.MMAP, Op.COMM, Op.COMM, Op.MUNMAP]
    send, receive = merged.events[2:4]
    assert (send["pid"], send["tid"], send["addr"], send["length"]) == (1, 2, 0x7f0000001000, 4096)
    assert (send["access"], receive["access"]) == (Access.READ, Access.WRITE)
    assert merged.metadata["comm"] == {"lines": 2, "skipped_lines": 0}


@pytest.mark.parametrize("line", ["1.0002,2,0x1000,4096", "1.0002,2,0x1000,4096,sideways", "1.0002,3,0x1000,4096,send",
                                  "0.5,2,0x1000,4096,send", "then,2,0x1000,4096,send", "1.0002,2,0x1000,-1,send",
                                  '{"time": 1}', "{", "+5,2,0x1000,1,send"])
def test_a_broken_line_is_an_error_with_its_number_and_lenient_counts_it(trace, tmp_path, line):
    (tmp_path / "comm").write_text(f"1.00015,2,0x1000,1,send\n{line}\n")
    with pytest.raises(TraceError) as caught:
        annotate(trace, tmp_path / "comm")
    assert caught.value.line == 2
    assert annotate(trace, tmp_path / "comm", lenient=True).metadata["comm"] == {"lines": 1, "skipped_lines": 1}
