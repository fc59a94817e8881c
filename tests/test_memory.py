"""Physical memory: contents, the page cache, the reverse map, running out."""
import mmap

import pytest

import ioproc
from recording import BASE, FIXED, PAGE, PRIVATE, RO, RW, SHARED, pages

OTHER = BASE + 0x1000000


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=64)


@pytest.fixture
def mm(mem):
    with ioproc.AddressSpace(mem) as space:
        yield space


def used(mem):
    stats = mem.stats
    assert stats["frames"] == stats["frames_free"] + stats["frames_used"]
    return stats["frames_used"]


def pfn(mm, addr):
    return int(mm.pagemap(addr, 1)["pfn"][0])


def mappings(mem, mm, addr):
    return set(mem.mappings(pfn(mm, addr)))


# ---- contents


def test_memory_is_zero_at_first(mm):
    pages(mm, 4)
    assert mm.read(BASE, 4 * PAGE) == bytes(4 * PAGE)
    assert mm.pagemap(BASE, 4 * PAGE)["zero"].all()
    mm.touch(BASE, 4 * PAGE, write=True)                # frames without contents
    assert mm.read(BASE, 4 * PAGE) == bytes(4 * PAGE)


def test_writes_are_read_back_across_pages_and_vmas(mm):
    pages(mm, 2)
    pages(mm, 2, BASE + 2 * PAGE, flags=SHARED)
    text = bytes(range(256)) * 32
    mm.write(BASE + 5 * 256, text)
    assert mm.read(BASE + 5 * 256, len(text)) == text
    assert mm.read(BASE, 5 * 256) == bytes(5 * 256)
    assert mm.read(BASE + 5 * 256 + len(text), 100) == bytes(100)


@pytest.mark.parametrize("data", [b"xyz", bytearray(b"xyz"), memoryview(b"xyz")], ids=lambda data: type(data).__name__)
def test_write_takes_any_buffer(mm, data):
    pages(mm, 1)
    mm.write(BASE, data)
    assert mm.read(BASE, 3) == b"xyz"


def test_nothing_written_nothing_faulted(mm):
    pages(mm, 1)
    mm.write(BASE, b"")
    assert mm.read(BASE, 0) == b""
    assert mm.touch(BASE, 0) == 0
    assert mm.stats["faults"] == 0


def test_touch_counts_faults_and_keeps_contents(mm):
    pages(mm, 4)
    mm.write(BASE, b"keep")
    assert mm.touch(BASE, 4 * PAGE) == 3
    assert mm.touch(BASE, 4 * PAGE) == 0
    assert mm.touch(BASE + PAGE - 1, 2, write=True) == 1            # two pages, one of them zero still
    assert mm.read(BASE, 4) == b"keep"
    rows = mm.pagemap(BASE, 4 * PAGE)
    assert rows["dirty"].tolist() == [True, True, False, False]
    assert rows["young"].all()


def test_forgetting_gives_zeros_again(mm):
    pages(mm, 2)
    mm.write(BASE, b"x" * 2 * PAGE)
    mm.madvise(BASE, PAGE, mmap.MADV_DONTNEED)
    assert mm.read(BASE, PAGE) == bytes(PAGE)
    assert mm.read(BASE + PAGE, 1) == b"x"
    assert used(mm.mem) == 1


def test_a_frame_comes_back_empty(mm):
    """What one process wrote, another does not find."""
    for _ in range(3):
        pages(mm, 64)
        assert mm.read(BASE, 64 * PAGE) == bytes(64 * PAGE)
        mm.touch(BASE, 64 * PAGE, write=True)
        assert mm.read(BASE, 64 * PAGE) == bytes(64 * PAGE)
        mm.write(BASE, b"s" * 64 * PAGE)
        mm.munmap(BASE, 64 * PAGE)


def test_contents_through_fork_and_copy(mem, mm):
    pages(mm, 2)
    mm.write(BASE, b"parent")
    child = mm.fork()
    grandchild = child.fork()
    child.write(BASE, b"child.")
    assert (mm.read(BASE, 6), child.read(BASE, 6), grandchild.read(BASE, 6)) == (b"parent", b"child.", b"parent")
    mm.write(BASE, b"PARENT")
    assert (mm.read(BASE, 6), child.read(BASE, 6), grandchild.read(BASE, 6)) == (b"PARENT", b"child.", b"parent")
    mm.exit()
    child.exit()
    assert grandchild.read(BASE, 6) == b"parent"
    grandchild.exit()
    assert used(mem) == 0


def test_shared_anonymous_memory_is_shared_with_the_child(mem, mm):
    pages(mm, 2, flags=SHARED)
    child = mm.fork()
    child.write(BASE, b"from the child")
    assert mm.read(BASE, 14) == b"from the child"
    mm.exit()
    assert child.read(BASE, 14) == b"from the child"
    child.exit()
    assert used(mem) == 0


def test_mremap_moves_contents_without_copying(mm):
    pages(mm, 2)
    mm.write(BASE, b"moved")
    frame = pfn(mm, BASE)
    mm.mremap(BASE, 2 * PAGE, 4 * PAGE, ioproc.MREMAP_MAYMOVE | ioproc.MREMAP_FIXED, OTHER)
    assert mm.read(OTHER, 5) == b"moved" and pfn(mm, OTHER) == frame
    assert mm.read(OTHER + 2 * PAGE, 2 * PAGE) == bytes(2 * PAGE)


# ---- files


def test_file_contents(mem):
    file = ioproc.File(mem, 3 * PAGE)
    assert file.size == 3 * PAGE
    assert file.read(0, 10 * PAGE) == bytes(3 * PAGE)
    assert used(mem) == 0                               # reading brings nothing in
    file.write(PAGE - 2, b"over")
    assert file.read(PAGE - 3, 6) == b"\0over\0"
    assert used(mem) == 2
    file.write(3 * PAGE - 1, b"grown")
    assert file.size == 3 * PAGE + 4
    assert file.read(3 * PAGE - 1, 100) == b"grown"
    assert file.read(4 * PAGE, 1) == b""
    del file
    assert used(mem) == 0


def test_the_page_cache_is_shared_between_mappings(mem, mm):
    file = ioproc.File(mem, 4 * PAGE)
    other = ioproc.AddressSpace(mem)
    for space in (mm, other):
        pages(space, 4, flags=mmap.MAP_SHARED, file=file)
    pages(mm, 2, OTHER, flags=mmap.MAP_SHARED, file=file, offset=PAGE)
    mm.write(BASE + PAGE, b"seen by all")
    assert other.read(BASE + PAGE, 11) == mm.read(OTHER, 11) == file.read(PAGE, 11) == b"seen by all"
    file.write(2 * PAGE, b"file")
    assert other.read(BASE + 2 * PAGE, 4) == b"file"
    assert mappings(mem, mm, BASE + PAGE) == {(mm, BASE + PAGE), (other, BASE + PAGE), (mm, OTHER)}
    assert used(mem) == 2
    other.exit()
    assert mappings(mem, mm, BASE + PAGE) == {(mm, BASE + PAGE), (mm, OTHER)}


def test_a_private_mapping_sees_the_file_until_it_writes(mem, mm):
    file = ioproc.File(mem, 2 * PAGE)
    pages(mm, 2, flags=mmap.MAP_PRIVATE, file=file)
    assert mm.read(BASE, 1) == b"\0"
    file.write(0, b"later")
    assert mm.read(BASE, 5) == b"later"
    mm.write(BASE, b"mine!")
    file.write(0, b"theirs")
    assert mm.read(BASE, 6) == b"mine!\0"
    assert file.read(0, 6) == b"theirs"
    mm.write(BASE + PAGE, b"early")                     # copied without ever being mapped
    assert file.read(PAGE, 5) == bytes(5)
    assert mm.stats["faults_cow"] == 1 and mm.stats["faults_file"] == 2


def test_beyond_the_end_of_the_file(mem, mm):
    file = ioproc.File(mem, PAGE + 10)
    pages(mm, 4, flags=mmap.MAP_SHARED, file=file)
    mm.write(BASE + PAGE + 10, b"in the last page")     # beyond the size, within the page
    with pytest.raises(ioproc.BusError) as caught:
        mm.read(BASE + PAGE, 2 * PAGE)
    assert (caught.value.address, caught.value.completed) == (BASE + 2 * PAGE, PAGE)
    with pytest.raises(ioproc.BusError) as caught:
        mm.touch(BASE, 4 * PAGE, write=True)
    assert (caught.value.address, caught.value.completed) == (BASE + 2 * PAGE, 2)
    file.write(3 * PAGE, b"!")                          # grown: now it can be
    assert mm.read(BASE + 2 * PAGE, PAGE + 1) == bytes(PAGE) + b"!"


def test_shmat(mem, mm):
    segment = ioproc.File(mem, 2 * PAGE)
    first, second = mm.shmat(segment), mm.shmat(segment, readonly=True)
    mm.write(first, b"shm")
    assert mm.read(second, 3) == b"shm"
    with pytest.raises(ioproc.SegmentationFault):
        mm.write(second, b"x")
    mm.shmdt(first)
    assert [vma.start for vma in mm.vmas()] == [second]
    assert mm.read(second, 3) == b"shm"


# ---- the reverse map


def test_who_maps_a_frame(mem, mm):
    pages(mm, 2)
    mm.touch(BASE, write=True)
    frame = pfn(mm, BASE)
    assert mem.mappings(frame) == [(mm, BASE)]
    assert not mm.pagemap(BASE, 1)["shared"][0]
    child = mm.fork()
    grandchild = child.fork()
    assert set(mem.mappings(frame)) == {(mm, BASE), (child, BASE), (grandchild, BASE)}
    assert mm.pagemap(BASE, 1)["shared"][0]
    child.touch(BASE, write=True)
    assert set(mem.mappings(frame)) == {(mm, BASE), (grandchild, BASE)}
    assert mappings(mem, child, BASE) == {(child, BASE)}
    grandchild.mremap(BASE, PAGE, PAGE, ioproc.MREMAP_MAYMOVE | ioproc.MREMAP_FIXED, OTHER)
    assert set(mem.mappings(frame)) == {(mm, BASE), (grandchild, OTHER)}
    mm.exit()
    assert mem.mappings(frame) == [(grandchild, OTHER)]
    grandchild.touch(OTHER, write=True)                 # the only one left: kept
    assert pfn(grandchild, OTHER) == frame and mem.mappings(frame) == [(grandchild, OTHER)]
    grandchild.exit()
    assert mem.mappings(frame) == []
    child.exit()
    assert used(mem) == 0


def test_the_reverse_map_after_splits_merges_and_moves(mem, mm):
    pages(mm, 8)
    mm.touch(BASE, 8 * PAGE, write=True)
    child = mm.fork()
    mm.mprotect(BASE + 2 * PAGE, 2 * PAGE, RO)
    mm.mprotect(BASE + 2 * PAGE, 2 * PAGE, RW)
    mm.munmap(BASE + 5 * PAGE, PAGE)
    mm.mremap(BASE + 6 * PAGE, 2 * PAGE, 2 * PAGE, ioproc.MREMAP_MAYMOVE | ioproc.MREMAP_FIXED, OTHER)
    child.munmap(BASE, PAGE)
    where = {BASE + i * PAGE: BASE + i * PAGE for i in range(5)} | {OTHER: BASE + 6 * PAGE, OTHER + PAGE: BASE + 7 * PAGE}
    for mine, its in where.items():
        expected = {(mm, mine)} | ({(child, its)} if its != BASE else set())
        assert mappings(mem, mm, mine) == expected
    mm.exit()
    assert mappings(mem, child, BASE + PAGE) == {(child, BASE + PAGE)}
    child.exit()


def test_every_entry_is_in_the_reverse_map_and_no_other(mem, mm):
    """Both directions, after a family of processes did a little of everything."""
    file = ioproc.File(mem, 4 * PAGE)
    pages(mm, 6)
    mm.touch(BASE, 3 * PAGE, write=True)
    pages(mm, 4, OTHER, flags=mmap.MAP_PRIVATE, file=file)
    mm.touch(OTHER, 2 * PAGE)
    mm.touch(OTHER + 2 * PAGE, PAGE, write=True)
    family = [mm]
    for i in range(3):
        child = family[-1].fork()
        child.touch(BASE + i * PAGE, 2 * PAGE, write=True)
        child.touch(OTHER + i * PAGE, PAGE, write=True)
        family.append(child)
    family.pop(1).exit()
    entries = {}
    for space in family:
        for vma in space.vmas():
            rows = space.pagemap(vma.start, vma.end - vma.start)
            for i, row in enumerate(rows):
                if row["present"] and not row["zero"]:
                    entries.setdefault(int(row["pfn"]), set()).add((space, vma.start + i * PAGE))
    assert entries
    for frame in range(1, 65):
        assert set(mem.mappings(frame)) == entries.get(frame, set())
    for space in family:
        assert space.stats["rss_pages"] == sum(where[0] is space for found in entries.values() for where in found)
        space.exit()
    del file, vma                   # a VMA refers to its file
    assert used(mem) == 0


def test_the_zero_page_and_free_frames_have_no_reverse_map(mem, mm):
    pages(mm, 1)
    mm.touch(BASE)
    assert mem.mappings(0) == [] and mem.mappings(64) == []
    with pytest.raises(ValueError, match="pfn = 65"):
        mem.mappings(65)


# ---- out of frames


def test_touch_stops_where_the_frames_end(mem, mm):
    pages(mm, 100)
    with pytest.raises(MemoryError):
        mm.touch(BASE, 100 * PAGE, write=True)
    assert mm.pagemap(BASE, 100 * PAGE)["present"].tolist() == [True] * 64 + [False] * 36
    assert used(mem) == 64 == mm.stats["rss_pages"]
    assert mm.touch(BASE + 64 * PAGE, 36 * PAGE) == 36              # the zero page is always there
    with pytest.raises(MemoryError):
        mm.touch(BASE + 64 * PAGE, PAGE, write=True)                # and stays mapped
    assert mm.pagemap(BASE + 64 * PAGE, 1)["zero"][0]
    mm.munmap(BASE, PAGE)
    assert mm.touch(BASE + 64 * PAGE, PAGE, write=True) == 1


def test_write_stops_where_the_frames_end(mem, mm):
    pages(mm, 100)
    with pytest.raises(MemoryError):
        mm.write(BASE + 1, b"x" * 70 * PAGE)
    assert mm.read(BASE, 64 * PAGE) == b"\0" + b"x" * (64 * PAGE - 1)
    mm.exit()
    assert used(mem) == 0


def test_cow_without_a_frame(mem, mm):
    pages(mm, 40)
    mm.write(BASE, b"p" * 40 * PAGE)
    child = mm.fork()
    with pytest.raises(MemoryError):
        child.write(BASE, b"c" * 40 * PAGE)
    assert child.read(BASE, 40 * PAGE) == b"c" * 24 * PAGE + b"p" * 16 * PAGE
    assert mm.read(BASE, 40 * PAGE) == b"p" * 40 * PAGE
    mm.exit()
    child.write(BASE, b"c" * 40 * PAGE)
    child.exit()
    assert used(mem) == 0


def test_the_page_cache_without_a_frame(mem, mm):
    """Dirty shared memory has nowhere else to go where there is no swap."""
    file = ioproc.File(mem, 100 * PAGE, memfd=True)
    pages(mm, 100, flags=mmap.MAP_SHARED, file=file)
    with pytest.raises(MemoryError):
        mm.touch(BASE, 100 * PAGE, write=True)
    with pytest.raises(MemoryError):
        file.write(0, b"x" * 100 * PAGE)
    assert file.read(0, 100 * PAGE) == b"x" * 64 * PAGE + bytes(36 * PAGE)
    mm.munmap(BASE, 100 * PAGE)
    assert used(mem) == 64                              # they are the file's
    del file
    assert used(mem) == 0


def test_the_last_frames_go_to_whoever_needs_them(mem, mm):
    """A range takes its frames in batches; what it holds back must not be missing to its own page cache."""
    file = ioproc.File(mem, PAGE)
    pages(mm, 4)
    pages(mm, 1, BASE + 4 * PAGE, flags=mmap.MAP_PRIVATE, file=file)
    mm.touch(BASE + PAGE, 3 * PAGE, write=True)
    pages(mm, 58, OTHER)
    mm.touch(OTHER, 58 * PAGE, write=True)
    assert mem.stats["frames_free"] == 3
    assert mm.touch(BASE, 5 * PAGE, write=True) == 2
    assert mem.stats["frames_free"] == 0


def test_populate_without_frames_is_no_error(mem, mm):
    mm.mmap(100 * PAGE, RW, PRIVATE | FIXED | ioproc.MAP_POPULATE, addr=BASE)
    assert mm.pagemap(BASE, 100 * PAGE)["present"].sum() == 64


def test_statistics(mem, mm):
    pages(mm, 4)
    mm.touch(BASE, 2 * PAGE)                            # zero, zero
    mm.touch(BASE + PAGE, 2 * PAGE, write=True)         # cow of the zero page, anon
    mm.fork().exit()
    mm.touch(BASE + PAGE, write=True)                   # reuse
    stats = mm.stats
    assert (stats["faults_zero"], stats["faults_anon"], stats["faults_file"], stats["faults_reuse"], stats["faults_cow"]) == (
        2, 1, 0, 1, 1)
    assert stats["faults"] == 5
    assert (stats["map_count"], stats["total_pages"], stats["rss_pages"]) == (1, 4, 2)
    assert sum(stats["hooks"].values()) == sum(stats["callbacks"].values()) == stats["chain_nodes"] == 0
