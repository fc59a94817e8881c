# Files: a page cache and the mappings of it; File, its face.
#
# Truncation and hole punching reach into every address space that maps the file.  What the file is afterwards stands first,
# so that nothing gone can be mapped again; then each address space, one after the other: its lock is waited for with no
# other held but Memory.cutting, which nobody waits for who has one.
from weakref import ref
from libc.errno cimport EFBIG

cdef FileCache *file_new(Memory *mem, u64 size) noexcept nogil:
    """With one reference for the caller; NULL: no memory."""
    cdef FileCache *file = <FileCache *> calloc(1, sizeof(FileCache))
    if file == NULL:
        return NULL
    file.pages = table_new()
    if file.pages == NULL:
        free(file)
        return NULL
    file.mem = mem
    file.size = size
    file.refs = 1
    return file


cdef void file_free(FileCache *file) noexcept nogil:
    """Nobody refers to it any more: its page cache goes."""
    cdef Memory *mem = file.mem
    cdef u64 addr = 0
    cdef bint more = True
    if file.huge:
        pthread_mutex_lock(&mem.lock)
        huge_file_drop(file, 0, FILE_END, True)
        pthread_mutex_unlock(&mem.lock)
    while more:
        # also: whoever found the file by a frame's owner did so under this lock
        pthread_mutex_lock(&mem.lock)
        more = file_drop_some(file, &addr, FILE_END)
        pthread_mutex_unlock(&mem.lock)
    table_free(file.pages, 3)
    free(file)


cdef void file_hold(FileCache *file) noexcept nogil:
    pthread_mutex_lock(&file.mem.lock)
    file.refs += 1
    pthread_mutex_unlock(&file.mem.lock)


cdef void file_put(FileCache *file) noexcept nogil:
    cdef bint last
    pthread_mutex_lock(&file.mem.lock)
    file.refs -= 1
    last = file.refs == 0
    pthread_mutex_unlock(&file.mem.lock)
    if last:
        file_free(file)


cdef extern from * nogil:
    """
    #define IOPROC_FILE_END (1ULL << 48)
    """
    const u64 FILE_END "IOPROC_FILE_END"    # bytes: beyond every page cache


cdef void page_forget(Memory *mem, u64 entry) noexcept nogil:
    """
    The page cache lets go of a page; its frame lives while it is mapped or pinned.  Memory.lock is held.
    """
    cdef Frame *frame = &mem.frames[cache_pfn(entry)]
    cdef u32 freed = <u32> entry
    if cache_pfn(entry) == 0:
        cache_entry_forget(mem, entry)
        return
    atomic_store(&frame.owner, 0)           # nothing finds it by its page; first, for afterwards it may be another's
    if atomic_sub(&frame.counts, ONE_REFERENCE) == 0:
        free(frame.contents)
        frame.contents = NULL
        pool_give(mem, &freed, 1)


cdef bint file_drop_some(FileCache *file, u64 *addr, u64 end) noexcept nogil:
    """
    The next pages of [*addr, end) leave the page cache, at most those of one table; *addr moves on.  False: none left.
    Memory.lock is held.
    """
    cdef u64 stop, begin, i
    cdef Table *leaf = leaf_next(file.pages, addr, end, &stop)
    if leaf == NULL:
        return False
    begin = addr[0]
    for i in range(table_index(begin, 0), table_index(begin, 0) + ((stop - begin) >> PAGE_SHIFT)):
        if leaf.entry[i]:
            page_forget(file.mem, leaf.entry[i])
            leaf.entry[i] = 0
            leaf.used -= 1
    if leaf.used == 0:
        leaf_drop(file.pages, begin)
    addr[0] = stop
    return True


cdef void file_drop(FileCache *file, u64 start, u64 end) noexcept nogil:
    """The pages of [start, end) leave the page cache.  Memory.lock is held."""
    while file_drop_some(file, &start, end if end < FILE_END else FILE_END):
        pass


cdef void file_zero(FileCache *file, u64 start, u64 end) noexcept nogil:
    """Part of a page.  Memory.lock is held."""
    cdef char *contents
    if file.huge:
        contents = huge_file_contents(file, start)
        if contents != NULL and start < end:
            memset(contents + (start & (HUGE_SIZE - 1)), 0, end - start)
        return
    contents = <char *> file_contents(file, start) if start < FILE_END else NULL
    if contents != NULL:
        memset(contents + (start & (PAGE_SIZE - 1)), 0, end - start)


cdef bint vma_maps(const VMArea *vma, u64 start, u64 end, u64 *first, u64 *last) noexcept nogil:
    """[*first, *last): where the VMA maps [start, end) of its file.  False: nowhere."""
    cdef u64 low = vma.pgoff << PAGE_SHIFT
    cdef u64 high = low + (vma.end - vma.start)
    if atomic_load(&vma.flags) & VM_NONLINEAR:        # anywhere
        first[0] = vma.start
        last[0] = vma.end
        return True
    first[0] = vma.start + (start - low if start > low else 0)
    last[0] = vma.end - (high - end if high > end else 0)
    return start < high and low < end


cdef VMArea *file_mapping(FileCache *file, const VMArea *after, const MM *mm) noexcept nogil:
    """The next mapping of the file by `mm`, the first if `after` is NULL."""
    cdef VMArea *vma
    pthread_mutex_lock(&file.mem.lock)
    vma = after.file_above if after != NULL else file.mappings
    while vma != NULL and vma.mm != mm:
        vma = vma.file_above
    pthread_mutex_unlock(&file.mem.lock)
    return vma


cdef void mm_cut(MM *mm, FileCache *file, u64 start, u64 end, bint copies) noexcept nogil:
    """Its part of `file_cut`."""
    cdef FrameBatch batch
    cdef u64 first, last
    cdef VMArea *vma = file_mapping(file, NULL, mm)
    batch_begin(&batch, mm.mem, 0)
    while vma != NULL:
        if vma_maps(vma, start, end, &first, &last):
            fire_range(mm, INVALIDATE_RANGE, vma, first, last)
            if vma.flags & VM_NONLINEAR:
                zap_nonlinear(mm, vma, first, last, start >> PAGE_SHIFT, end >> PAGE_SHIFT, &batch)
            elif copies:
                zap_range(mm, first, last, &batch)
            else:
                zap_file_range(mm, first, last, &batch)
        vma = file_mapping(file, vma, mm)
    batch_end(&batch)


cdef void file_cut(FileCache *file, u64 start, u64 end, bint copies) noexcept nogil:
    """
    Unmap the file's pages of [start, end) in every address space; with `copies` also what private mappings made of them.
    Memory.cutting is held.
    """
    cdef Memory *mem = file.mem
    cdef VMArea *vma
    cdef MM *mm
    cdef u64 first, last
    mem.cuts += 1
    while True:
        mm = NULL
        pthread_mutex_lock(&mem.lock)
        vma = file.mappings
        while vma != NULL and mm == NULL:
            # a child of one that was cut needs no cut; of one that was not, it is on the list by now
            if vma_maps(vma, start, end, &first, &last) and atomic_load(&vma.mm.cut) != mem.cuts:
                mm = vma.mm
                mm_hold(mm)
            vma = vma.file_above
        pthread_mutex_unlock(&mem.lock)
        if mm == NULL:
            return
        mm_lock(mm)
        thread_set_inside(mm)
        mm_cut(mm, file, start, end, copies)
        atomic_store(&mm.cut, mem.cuts)
        thread_set_inside(NULL)
        mm_unlock(mm)
        mm_put(mm)


cdef void file_truncate(FileCache *file, u64 size) noexcept nogil:
    """A huge file: `size` is a multiple of 2 MiB."""
    cdef Memory *mem = file.mem
    cdef u64 kept = page_align(size)
    cdef u64 old
    pthread_mutex_lock(&mem.cutting)
    pthread_mutex_lock(&mem.lock)
    old = file.size
    atomic_store(&file.size, size)
    if file.huge:                           # a larger size, too, ends what mappings have reserved behind it
        huge_file_drop(file, size, FILE_END, True)
    elif size <= old:                       # equal: a mapping may have written behind the end
        file_zero(file, size, kept)
        file_drop(file, kept, UINT64_MAX)
    pthread_mutex_unlock(&mem.lock)
    if kept < old:
        file_cut(file, kept, UINT64_MAX, True)
    pthread_mutex_unlock(&mem.cutting)


cdef void file_punch(FileCache *file, u64 start, u64 end) noexcept nogil:
    """[start, end) reads as zeros from now on; private copies stay, but not of huge pages."""
    cdef Memory *mem = file.mem
    cdef u64 first = huge_align(start) if file.huge else page_align(start)
    cdef u64 last = end & (HUGE_MASK if file.huge else PAGE_MASK)
    pthread_mutex_lock(&mem.cutting)
    pthread_mutex_lock(&mem.lock)
    if first > last:                        # inside one page
        file_zero(file, start, end)
    else:
        file_zero(file, start, first)
        file_zero(file, last, end)
        if file.huge:
            huge_file_drop(file, first, last, False)
        else:
            file_drop(file, first, last)
    pthread_mutex_unlock(&mem.lock)
    if first < last:
        file_cut(file, first, last, file.huge)
    pthread_mutex_unlock(&mem.cutting)


cdef const char *file_contents(FileCache *file, u64 at) noexcept nogil:
    """The buffer of the 4 KiB page at `at`, NULL: zeros.  Memory.lock is held."""
    cdef u64 *entry
    cdef const char *contents
    if file.huge:
        contents = huge_file_contents(file, at)
        return contents + (at & (HUGE_SIZE - 1) & PAGE_MASK) if contents != NULL else NULL
    entry = pte_find(file.pages, at)
    return cache_contents(file.mem, entry[0]) if entry != NULL else NULL


cdef u64 file_read(FileCache *file, u64 at, char *data, u64 count) noexcept nogil:
    """How many bytes there were.  Memory.lock is held."""
    cdef u64 part
    cdef u64 total = 0
    cdef const char *contents
    if at < file.size:
        total = count if count < file.size - at else file.size - at
    count = total
    while count:
        part = PAGE_SIZE - (at & (PAGE_SIZE - 1))
        if part > count:
            part = count
        contents = file_contents(file, at)
        if contents != NULL:
            memcpy(data, contents + (at & (PAGE_SIZE - 1)), part)
        else:
            memset(data, 0, part)
        at += part
        data += part
        count -= part
    return total


cdef bint file_write(FileCache *file, u64 at, const char *data, u64 count) noexcept nogil:
    """False: no frame or no memory.  Memory.lock is held, and let go of to reclaim."""
    cdef u64 pfn, part
    cdef int tries = RECLAIM_TRIES
    cdef Frame *frame
    while count:
        part = PAGE_SIZE - (at & (PAGE_SIZE - 1))
        if part > count:
            part = count
        pfn = file_page(file, at >> PAGE_SHIFT, NULL)
        if pfn == 0:
            pthread_mutex_unlock(&file.mem.lock)
            tries -= 1
            if tries and not reclaim_some(file.mem):
                tries = 0
            pthread_mutex_lock(&file.mem.lock)
            if tries == 0:
                return False
            continue
        frame = &file.mem.frames[pfn]
        if frame.contents == NULL:
            frame.contents = <char *> calloc(1, PAGE_SIZE)
            if frame.contents == NULL:
                return False
        atomic_or(&frame.owner, OWNER_DIRTY)
        memcpy(frame.contents + (at & (PAGE_SIZE - 1)), data, part)
        at += part
        data += part
        count -= part
        if at > file.size:
            atomic_store(&file.size, at)
    return True


cdef i64 as_offset(object value, str name) except? -0x7ffffffffffffff1:
    """A file's offset, length or size as a system call's, which may be negative."""
    cdef object number = as_integer(value, name)
    if not -1 << 63 <= number < 1 << 63:
        raise ValueError(f"{name} = {value}: not in -2**63 .. 2**63 - 1")
    return number


cdef u64 as_file_size(object size, str name) except? 0xfffffffffffffff1:
    cdef u64 bytes_ = as_u64(size, name)
    if bytes_ > 1ULL << 46:
        raise ValueError(f"{name} = {size}: at most 2**46 bytes")
    return bytes_


@cython.no_gc_clear             # its end needs `mem`
cdef class File:
    """
    A file with a page cache, as one in tmpfs: zeros at first, no disk below.

    Parameters
    ----------
    mem : PhysicalMemory
    size : int
        Bytes.  An access to a mapping beyond the file's last page raises `BusError`.
    memfd : bool
        Shared memory, as memfd_create(2) makes it: there is no disk below, and its pages go to swap.
    huge : bool
        A file of huge pages, as in hugetlbfs: sizes are multiples of 2 MiB, a writable mapping beyond the end makes it longer,
        and `write` is EINVAL.
    """
    cdef FileCache *file
    cdef readonly PhysicalMemory mem
    cdef object __weakref__

    def __cinit__(self, PhysicalMemory mem not None, size, memfd=False, huge=False):
        cdef u64 bytes_ = as_file_size(size, "size")
        if huge and bytes_ & (HUGE_SIZE - 1):
            raise ValueError(f"size = {size}: a huge file's is a multiple of 2 MiB")
        self.mem = mem
        self.file = file_new(mem.mem, bytes_)
        if self.file == NULL:
            raise MemoryError("File")
        self.file.memfd = memfd
        self.file.huge = huge
        faces[<size_t> self.file] = ref(self)

    def __dealloc__(self):
        if self.file != NULL:
            face_gone(self.file)
            with nogil:
                file_put(self.file)

    @property
    def size(self):
        """int: bytes."""
        return atomic_load(&self.file.size)

    def read(self, offset, n):
        """
        Bytes ``[offset, offset + n)`` of the page cache, fewer at the end of the file; as ``pread``, and faulting nothing in.
        """
        cdef u64 at = as_u64(offset, "offset")
        cdef u64 count = as_u64(n, "n")
        cdef FileCache *file = self.file
        cdef u64 size = atomic_load(&file.size)
        cdef u64 done
        cdef bytes result
        cdef char *data
        if at >= size:
            return b""
        if count > size - at:
            count = size - at
        result = PyBytes_FromStringAndSize(NULL, count)
        data = result
        with nogil:
            pthread_mutex_lock(&file.mem.lock)
            done = file_read(file, at, data, count)
            pthread_mutex_unlock(&file.mem.lock)
        return result if done == count else result[:done]       # truncated meanwhile

    def write(self, offset, data):
        """
        Write `data` at `offset` through the page cache, as ``pwrite``: every mapping of the page sees it.  The file grows
        as needed.

        Raises
        ------
        MemoryError
            Out of frames; the bytes before are written.
        """
        cdef u64 at = as_u64(offset, "offset")
        cdef const unsigned char[::1] source = data
        cdef u64 count = source.shape[0]
        cdef FileCache *file = self.file
        cdef bint done = True
        if count == 0:
            return
        if at > 1ULL << 46 or count > (1ULL << 46) - at:
            raise ValueError(f"offset = {offset}: a file has at most 2**46 bytes")
        refuse_in_callback()
        if file.huge:
            raise syscall_error(-EINVAL, "")
        thread_set_inside(file.mem)
        with nogil:
            pthread_mutex_lock(&file.mem.lock)
            done = file_write(file, at, <const char *> &source[0], count)
            pthread_mutex_unlock(&file.mem.lock)
        thread_set_inside(NULL)
        raise_pending()
        if not done:
            raise MemoryError("no frame for the page cache")

    def truncate(self, size):
        """
        Set the size, as ``ftruncate``.  A smaller one: ``invalidate_range`` for what each VMA of any address space maps beyond
        the last page, and these pages go, also the copies of private mappings; the rest of the last page becomes zeros.
        A larger one fires nothing.

        Callbacks run in the thread that calls this, under the lock of one address space after the other.  EINVAL: negative.
        """
        cdef i64 offset = as_offset(size, "size")
        cdef u64 bytes_
        if offset < 0:
            raise syscall_error(-EINVAL, "")
        bytes_ = as_file_size(size, "size")
        refuse_in_callback()
        if self.file.huge and bytes_ & (HUGE_SIZE - 1):
            raise syscall_error(-EINVAL, "")
        with nogil:
            file_truncate(self.file, bytes_)
        raise_pending()

    def punch_hole(self, offset, length):
        """
        Make ``[offset, offset + length)`` zeros, as ``fallocate`` with ``FALLOC_FL_PUNCH_HOLE``.  The pages wholly inside go:
        ``invalidate_range`` for what each VMA of any address space maps of them; copies of private mappings stay.

        Raises
        ------
        OSError
            EINVAL: `length` is 0, or one is negative.  EFBIG: the range ends beyond the largest offset of a file.
        """
        cdef i64 at = as_offset(offset, "offset")
        cdef i64 count = as_offset(length, "length")
        refuse_in_callback()
        if at < 0 or count <= 0:
            raise syscall_error(-EINVAL, "")
        if <u64> count > FILE_LIMIT - at:
            raise syscall_error(-EFBIG, "")
        with nogil:
            file_punch(self.file, at, at + count)
        raise_pending()

    def __repr__(self):
        return f"<ioproc.File: {self.size} bytes>"


cdef File file_face(FileCache *file, PhysicalMemory mem):
    """A new face for a file whose Python object is gone."""
    cdef File face = File.__new__(File, mem, 0)
    cdef FileCache *empty = face.file
    del faces[<size_t> empty]
    face.file = file
    with nogil:
        file_hold(file)
        file_put(empty)
    faces[<size_t> file] = ref(face)
    return face
