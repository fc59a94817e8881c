"""What each line that perf script writes becomes."""
import pytest

from ioproc.trace import Op, TraceError, read_perf


@pytest.fixture
def read(tmp_path):
    def read(text, **options):
        path = tmp_path / "perf"
        path.write_text(text)
        return read_perf(path, **options)
    return read


def test_faults(read):
    trace = read(" 4293/4295  1795352569.312583276:     7fe242888028     5646adc24d81\n")
    event = trace.events[0]
    assert Op(event["op"]) == Op.FAULT
    assert (event["pid"], event["tid"], event["t"]) == (4293, 4295, 1795352569312583276)
    assert (event["addr"], event["arg"]) == (0x7fe242888028, 0x5646adc24d81)


@pytest.mark.parametrize("line", [
    "halo 4293/4293  1795352569.312583276:     7fe242888028     5646adc24d81",
    "my prog 4293/4293 [001] 1795352569.312583276:  1 page-faults:u:  7fe242888028     5646adc24d81",
    " 4293/4293  1795352569.312583:     7fe242888028     5646adc24d81",
])
def test_other_fields_do_no_harm(read, line):
    assert read(line + "\n").events["addr"][0] == 0x7fe242888028


def test_mapping_records(read):
    trace = read("""\
 orted 27211  2216.581030: PERF_RECORD_MMAP2 27211/27211: [0x7f0f1fc17000(0x3000) @ 0x7f0f1fc17000 00:00 0 0]: rw-p //anon
 orted 27211  2216.581080: PERF_RECORD_MMAP2 27211/27211: [0x7f0f21c51000(0x17000) @ 0x3000 fe:00 339525 0]: r-xp /lib/gcc.so
 27211/27211  2216.581086123: PERF_RECORD_MMAP2 27211/27211: [0x7f0f21c68000(0x6000) @ 0x1a000 <c0ffee>]: r--s /lib/gcc.so
 27211/27211  2216.581086124: PERF_RECORD_COMM exec: orted:27211/27211
 27211/27211  2216.581086125: PERF_RECORD_LOST lost 12
""")
    assert trace.events["op"].tolist() == [Op.MAP] * 3
    assert trace.events["prot"].tolist() == [3, 5, 1]
    assert trace.events["flags"].tolist() == [0x22, 2, 1]
    assert trace.events["arg"].tolist() == [0x7f0f1fc17000, 0x3000, 0x1a000]
    assert [trace.metadata["files"][index]["path"] if index >= 0 else None
            for index in trace.events["file"]] == [None, "/lib/gcc.so", "/lib/gcc.so"]
    assert trace.metadata["counts"]["other_records"] == 2
    assert trace.metadata["counts"]["lost"] == 12


def test_lines_a_little_out_of_order_are_sorted(read):
    trace = read("".join(f" 1/1  {100 + (i ^ 3)}.000000000:  {i:x}000  1000\n" for i in range(400)))
    assert (trace.events["t"][1:] >= trace.events["t"][:-1]).all()
    assert len(trace) == 400


def test_lines_far_out_of_order_are_an_error(read):
    text = "".join(f" 1/1  {1000 + i}.000000000:  1000  1000\n" for i in range(40_000))
    with pytest.raises(TraceError, match="earlier") as caught:
        read(text + " 1/1  5.000000000:  1000  1000\n")
    assert caught.value.line == 40_001


@pytest.mark.parametrize("line", ["garbage", " 1/1  5.0000000:  10", " 1/1  5.000000000:  xyz  1000", " 1/1 5 1000 1000",
                                  " 1/1  5.000000000:  -1  1000", " 1/1  5.000000000:  1ffffffffffffffff  1000",
                                  " 1/1  5.000000000: PERF_RECORD_MMAP2 broken",
                                  " 1/1  5.000000000: PERF_RECORD_MMAP2 1/1: [0x1000(0x1000) @ 0xf000000000000000 a]: rw-p /a"])
def test_a_broken_line_is_an_error_with_its_number_and_lenient_counts_it(read, line):
    good = " 1/1  4.000000000:  1000  1000\n"
    with pytest.raises(TraceError) as caught:
        read(f"# comment\n\n{good}{line}\n{good}")
    assert caught.value.line == 4
    trace = read(f"{good}{line}\n{good}", lenient=True)
    assert len(trace) == 2
    assert trace.metadata["counts"]["skipped_lines"] == 1


def test_nothing_at_all_is_no_recording(read):
    with pytest.raises(TraceError, match="no line of perf"):
        read("\n")
