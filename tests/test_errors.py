"""What a user gets for a mistake: the error says which argument and which value."""
import errno
import mmap

import pytest

import ioproc
from recording import BASE, PAGE, RO, RW, pages


@pytest.fixture
def mem():
    return ioproc.PhysicalMemory(frames=64)


@pytest.fixture
def mm(mem):
    with ioproc.AddressSpace(mem) as space:
        yield space


NUMBERS = {                                 # call, and the name of the argument it gets wrong
    "mmap length": lambda mm, x: mm.mmap(x),
    "mmap prot": lambda mm, x: mm.mmap(PAGE, x),
    "mmap flags": lambda mm, x: mm.mmap(PAGE, RW, x),
    "mmap addr": lambda mm, x: mm.mmap(PAGE, addr=x),
    "mmap offset": lambda mm, x: mm.mmap(PAGE, offset=x),
    "munmap addr": lambda mm, x: mm.munmap(x, PAGE),
    "munmap length": lambda mm, x: mm.munmap(BASE, x),
    "mprotect addr": lambda mm, x: mm.mprotect(x, PAGE, RO),
    "mprotect length": lambda mm, x: mm.mprotect(BASE, x, RO),
    "mprotect prot": lambda mm, x: mm.mprotect(BASE, PAGE, x),
    "madvise addr": lambda mm, x: mm.madvise(x, PAGE, 4),
    "madvise length": lambda mm, x: mm.madvise(BASE, x, 4),
    "msync addr": lambda mm, x: mm.msync(x, PAGE),
    "msync length": lambda mm, x: mm.msync(BASE, x),
    "mremap old_addr": lambda mm, x: mm.mremap(x, PAGE, PAGE),
    "mremap old_length": lambda mm, x: mm.mremap(BASE, x, PAGE),
    "mremap new_length": lambda mm, x: mm.mremap(BASE, PAGE, x),
    "mremap new_addr": lambda mm, x: mm.mremap(BASE, PAGE, PAGE, 3, x),
    "brk addr": lambda mm, x: mm.brk(x),
    "shmat addr": lambda mm, x: mm.shmat(ioproc.File(mm.mem, PAGE), x),
    "shmdt addr": lambda mm, x: mm.shmdt(x),
    "read addr": lambda mm, x: mm.read(x, 1),
    "read n": lambda mm, x: mm.read(BASE, x),
    "write addr": lambda mm, x: mm.write(x, b"x"),
    "touch addr": lambda mm, x: mm.touch(x),
    "touch length": lambda mm, x: mm.touch(BASE, x),
    "pagemap addr": lambda mm, x: mm.pagemap(x, 1),
    "pagemap length": lambda mm, x: mm.pagemap(BASE, x),
    "register_ops addr": lambda mm, x: mm.register_ops(ioproc.Ops(), x, PAGE),
    "register_ops length": lambda mm, x: mm.register_ops(ioproc.Ops(), BASE, x),
    "mappings pfn": lambda mm, x: mm.mem.mappings(x),
    "PhysicalMemory frames": lambda mm, x: ioproc.PhysicalMemory(x),
    "AddressSpace max_map_count": lambda mm, x: ioproc.AddressSpace(mm.mem, max_map_count=x),
    "AddressSpace start_brk": lambda mm, x: ioproc.AddressSpace(mm.mem, start_brk=x),
    "File size": lambda mm, x: ioproc.File(mm.mem, x),
    "File.read offset": lambda mm, x: ioproc.File(mm.mem, PAGE).read(x, 1),
    "File.read n": lambda mm, x: ioproc.File(mm.mem, PAGE).read(0, x),
    "File.write offset": lambda mm, x: ioproc.File(mm.mem, PAGE).write(x, b"x"),
}
FLAGS = {
    "madvise advice": lambda mm, x: mm.madvise(BASE, PAGE, x),
    "msync flags": lambda mm, x: mm.msync(BASE, PAGE, x),
    "mremap flags": lambda mm, x: mm.mremap(BASE, PAGE, PAGE, x),
}


@pytest.mark.parametrize("value", [1 << 64, -(1 << 64)], ids=hex)
@pytest.mark.parametrize("call", NUMBERS | FLAGS)
def test_a_number_out_of_range(mm, call, value):
    pages(mm, 1)
    with pytest.raises(ValueError, match=f"{call.split()[1]} = ") as caught:
        (NUMBERS | FLAGS)[call](mm, value)
    assert str(value) in str(caught.value) or hex(value) in str(caught.value)


@pytest.mark.parametrize("value", ["text", 1.5, b"1", [1]], ids=repr)
@pytest.mark.parametrize("call", NUMBERS | FLAGS)
def test_no_number(mm, call, value):
    pages(mm, 1)
    with pytest.raises(TypeError) as caught:
        (NUMBERS | FLAGS)[call](mm, value)
    assert f"{call.split()[1]} = {value!r}" in str(caught.value)


def test_numpy_integers_are_numbers(mm):
    numpy = pytest.importorskip("numpy")
    addr = mm.mmap(numpy.int64(2 * PAGE))
    mm.write(numpy.uint64(addr), b"x")
    assert mm.read(numpy.uint64(addr), numpy.int32(1)) == b"x"


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda mm: ioproc.AddressSpace(3), TypeError, "mem"),
    (lambda mm: ioproc.AddressSpace(None), TypeError, "mem"),
    (lambda mm: ioproc.AddressSpace(mm.mem, rlimits={"CPU": 1}), ValueError, "'CPU'"),
    (lambda mm: ioproc.AddressSpace(mm.mem, rlimits={"AS": "all"}), TypeError, "AS.*'all'"),
    (lambda mm: ioproc.AddressSpace(mm.mem, start_brk=1), ValueError, "start_brk = 0x1"),
    (lambda mm: ioproc.PhysicalMemory(0), ValueError, "frames = 0"),
    (lambda mm: ioproc.PhysicalMemory(1 << 40), ValueError, "frames = 1099511627776"),
    (lambda mm: ioproc.File(mm.mem, 1 << 47), ValueError, "size = 140737488355328"),
    (lambda mm: ioproc.File(None, 1), TypeError, "mem"),
    (lambda mm: ioproc.VMA(), TypeError, "vmas"),
    (lambda mm: mm.mmap(PAGE, file="name"), TypeError, "file"),
    (lambda mm: mm.mmap(PAGE, file=ioproc.File(ioproc.PhysicalMemory(8), PAGE)), ValueError, "another PhysicalMemory"),
    (lambda mm: mm.shmat(ioproc.File(ioproc.PhysicalMemory(8), PAGE)), ValueError, "another PhysicalMemory"),
    (lambda mm: mm.shmat(None), TypeError, "file"),
    (lambda mm: mm.mremap(BASE, PAGE, PAGE, ioproc.MREMAP_MAYMOVE | ioproc.MREMAP_FIXED), ValueError, "new_addr = None"),
    (lambda mm: mm.read(1 << 47, 1), ValueError, "addr = 0x800000000000"),
    (lambda mm: mm.read(BASE, 1 << 48), ValueError, "length = 0x1000000000000"),
    (lambda mm: mm.write(BASE, "text"), TypeError, "bytes-like"),
    (lambda mm: mm.register_ops(None), TypeError, "ops"),
    (lambda mm: mm.register_ops(print), TypeError, "ops"),
    (lambda mm: mm.register_ops(ioproc.Ops(), BASE), TypeError, "both or neither"),
    (lambda mm: mm.register_ops(ioproc.Ops(), length=PAGE), TypeError, "both or neither"),
    (lambda mm: ioproc.Ops(update_page=3), TypeError, "update_page = 3"),
    (lambda mm: ioproc.Ops(update_pages=print), TypeError, "update_pages"),
    (lambda mm: ioproc.Ops(name=3), TypeError, "name"),
    (lambda mm: ioproc.Ops.__init__(ioproc.Ops()), RuntimeError, "twice"),
])
def test_mistakes(mm, call, error, says):
    with pytest.raises(error, match=says):
        call(mm)


# ---- accesses


@pytest.mark.parametrize("access", ["read", "write", "touch"])
def test_segmentation_faults_say_where_and_how_far(mm, access):
    pages(mm, 2)
    pages(mm, 1, BASE + 2 * PAGE, prot=0)
    start = BASE + 100
    with pytest.raises(ioproc.SegmentationFault, match=hex(BASE + 2 * PAGE)) as caught:
        if access == "read":
            mm.read(start, 3 * PAGE)
        elif access == "write":
            mm.write(start, bytes(3 * PAGE))
        else:
            mm.touch(start, 3 * PAGE)
    assert caught.value.address == BASE + 2 * PAGE
    assert caught.value.completed == (2 if access == "touch" else 2 * PAGE - 100)      # pages, bytes
    assert isinstance(caught.value, ioproc.AccessError)


def test_what_a_protection_allows(mm):
    pages(mm, 1, prot=RO)
    pages(mm, 1, BASE + PAGE, prot=mmap.PROT_WRITE)
    pages(mm, 1, BASE + 2 * PAGE, prot=mmap.PROT_EXEC)
    pages(mm, 1, BASE + 3 * PAGE, prot=0)
    readable, writable = [], []
    for i in range(5):                                          # the fifth is not mapped
        for allowed, access in ((readable, lambda at: mm.read(at, 1)), (writable, lambda at: mm.write(at, b"x"))):
            try:
                access(BASE + i * PAGE)
                allowed.append(i)
            except ioproc.SegmentationFault as fault:
                assert (fault.address, fault.completed) == (BASE + i * PAGE, 0)
    assert readable == [0, 1, 2] and writable == [1]


# ---- after exit


AFTER_EXIT = {
    "mmap": lambda mm: mm.mmap(PAGE),
    "munmap": lambda mm: mm.munmap(BASE, PAGE),
    "mprotect": lambda mm: mm.mprotect(BASE, PAGE, RO),
    "mremap": lambda mm: mm.mremap(BASE, PAGE, PAGE),
    "madvise": lambda mm: mm.madvise(BASE, PAGE, mmap.MADV_DONTNEED),
    "msync": lambda mm: mm.msync(BASE, PAGE),
    "brk": lambda mm: mm.brk(),
    "shmat": lambda mm: mm.shmat(ioproc.File(mm.mem, PAGE)),
    "shmdt": lambda mm: mm.shmdt(BASE),
    "read": lambda mm: mm.read(BASE, 1),
    "write": lambda mm: mm.write(BASE, b"x"),
    "touch": lambda mm: mm.touch(BASE),
    "fork": lambda mm: mm.fork(),
    "register_ops": lambda mm: mm.register_ops(ioproc.Ops()),
    "unregister_ops": lambda mm: mm.unregister_ops(ioproc.Ops()),
}


@pytest.mark.parametrize("call", AFTER_EXIT)
def test_after_exit_there_is_no_such_process(mm, call):
    pages(mm, 1)
    mm.exit()
    with pytest.raises(OSError, match="No such process") as caught:
        AFTER_EXIT[call](mm)
    assert caught.value.errno == errno.ESRCH


def test_looking_after_exit(mm):
    pages(mm, 1)
    mm.touch(BASE, write=True)
    mm.exit()
    assert mm.vmas() == []
    assert not mm.pagemap(BASE, PAGE)["present"].any()
    assert mm.stats["faults"] == 1 and mm.stats["rss_pages"] == 0
    assert "exited" in repr(mm)
    mm.exit()


# ---- errno


@pytest.mark.parametrize(("code", "call"), [
    (errno.EINVAL, lambda mm: mm.mmap(0)),
    (errno.ENOMEM, lambda mm: mm.mmap(1 << 47)),
    (errno.EINVAL, lambda mm: mm.mmap(PAGE, RW, ioproc.MAP_FIXED | 0x22, addr=BASE + 1)),
    (errno.EEXIST, lambda mm: mm.mmap(PAGE, RW, ioproc.MAP_FIXED_NOREPLACE | 0x22, addr=BASE)),
    (errno.EBADF, lambda mm: mm.mmap(PAGE, RW, mmap.MAP_PRIVATE)),
    (errno.EINVAL, lambda mm: mm.mmap(PAGE, RW, mmap.MAP_ANONYMOUS)),
    (errno.EINVAL, lambda mm: mm.munmap(BASE + 1, PAGE)),
    (errno.EINVAL, lambda mm: mm.munmap(BASE, 0)),
    (errno.ENOMEM, lambda mm: mm.mprotect(BASE, 3 * PAGE, RO)),
    (errno.EINVAL, lambda mm: mm.mprotect(BASE + 1, PAGE, RO)),
    (errno.EFAULT, lambda mm: mm.mremap(BASE + 8 * PAGE, PAGE, PAGE)),
    (errno.EINVAL, lambda mm: mm.mremap(BASE, PAGE, 0)),
    (errno.ENOMEM, lambda mm: mm.mremap(BASE, PAGE, 3 * PAGE, 0)),
    (errno.EINVAL, lambda mm: mm.mremap(BASE, 2 * PAGE, 2 * PAGE, 3, BASE + PAGE)),
    (errno.ENOMEM, lambda mm: mm.madvise(BASE, 3 * PAGE, mmap.MADV_DONTNEED)),
    (errno.EINVAL, lambda mm: mm.madvise(BASE, PAGE, 1000)),
    (errno.ENOMEM, lambda mm: mm.msync(BASE, 3 * PAGE)),
    (errno.EINVAL, lambda mm: mm.msync(BASE, PAGE, ioproc.MS_SYNC | ioproc.MS_ASYNC)),
    (errno.EINVAL, lambda mm: mm.shmdt(BASE)),
])
def test_system_calls_fail_as_the_kernel_does(mm, code, call):
    pages(mm, 2)
    pages(mm, 1, BASE + 3 * PAGE)
    with pytest.raises(OSError, match=".") as caught:
        call(mm)
    assert caught.value.errno == code


def test_limits(mem):
    with ioproc.AddressSpace(mem, rlimits={"AS": 4 * PAGE}) as mm:
        pages(mm, 4)
        with pytest.raises(OSError, match="Cannot allocate"):
            mm.mmap(PAGE)
    with ioproc.AddressSpace(mem, rlimits={"DATA": 2 * PAGE}) as mm:
        pages(mm, 4, prot=RO)
        pages(mm, 2, BASE + 8 * PAGE)
        with pytest.raises(OSError, match="Cannot allocate"):
            mm.mmap(PAGE)
    with ioproc.AddressSpace(mem, max_map_count=3) as mm:
        pages(mm, 9)
        mm.mprotect(BASE + 4 * PAGE, PAGE, RO)
        with pytest.raises(OSError, match="Cannot allocate"):
            mm.munmap(BASE + PAGE, PAGE)                        # would split
        mm.munmap(BASE, PAGE)                                   # does not
        mm.mmap(PAGE, RO)                                       # the kernel lets a new mapping pass the limit by one
        with pytest.raises(OSError, match="Cannot allocate"):
            mm.mmap(PAGE, RW, addr=BASE)
        assert len(mm.vmas()) == 4


def test_brk_that_cannot_be_says_where_it_stays(mm):
    start = mm.brk()
    assert mm.brk(start + 3 * PAGE) == start + 3 * PAGE
    assert mm.brk(0) == start + 3 * PAGE
    assert mm.brk(1 << 60) == start + 3 * PAGE
    mm.write(start, b"heap")


def test_what_is_not_modelled_says_so(mm):
    pages(mm, 1)
    with pytest.raises(NotImplementedError):
        mm.madvise(BASE, PAGE, mmap.MADV_MERGEABLE)
