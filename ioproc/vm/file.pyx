# Files: a page cache and the mappings of it; File, its face.
from weakref import ref

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
    cdef FrameBatch batch
    cdef Table *leaf
    cdef u64 addr = 0
    cdef u64 stop
    cdef u64 i
    # nobody finds the file by a frame's owner after this
    pthread_mutex_lock(&mem.lock)
    while True:
        leaf = leaf_next(file.pages, &addr, 1ULL << 48, &stop)
        if leaf == NULL:
            break
        for i in range(512):
            if cache_pfn(leaf.entry[i]):
                atomic_store(&frame_at(mem, leaf.entry[i]).owner, 0)
            elif leaf.entry[i]:
                cache_entry_forget(mem, leaf.entry[i])
                leaf.entry[i] = 0
        addr = stop
    pthread_mutex_unlock(&mem.lock)
    batch_begin(&batch, mem, 0)
    addr = 0
    while True:
        leaf = leaf_next(file.pages, &addr, 1ULL << 48, &stop)
        if leaf == NULL:
            break
        for i in range(512):
            if leaf.entry[i]:
                frame_put(&batch, leaf.entry[i])        # a pinned one stays
        addr = stop
    batch_end(&batch)
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


cdef void file_read(FileCache *file, u64 at, char *data, u64 count) noexcept nogil:
    cdef u64 *entry
    cdef u64 part
    cdef const char *contents
    while count:
        part = PAGE_SIZE - (at & (PAGE_SIZE - 1))
        if part > count:
            part = count
        entry = pte_find(file.pages, at)
        contents = cache_contents(file.mem, entry[0]) if entry != NULL else NULL
        if contents != NULL:
            memcpy(data, contents + (at & (PAGE_SIZE - 1)), part)
        else:
            memset(data, 0, part)
        at += part
        data += part
        count -= part


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
            file.size = at
    return True


@cython.no_gc_clear             # its end needs `mem`
cdef class File:
    """
    A file with a page cache, as one in tmpfs: zeros at first, no disk below.

    Parameters
    ----------
    mem : PhysicalMemory
    size : int
        Bytes.  An access to a mapping beyond the file's last page raises `BusError`.
    """
    cdef FileCache *file
    cdef readonly PhysicalMemory mem
    cdef object __weakref__

    def __cinit__(self, PhysicalMemory mem not None, size):
        cdef u64 bytes_ = as_u64(size, "size")
        if bytes_ > 1ULL << 46:
            raise ValueError(f"size = {size}: at most 2**46 bytes")
        self.mem = mem
        self.file = file_new(mem.mem, bytes_)
        if self.file == NULL:
            raise MemoryError("File")
        faces[<size_t> self.file] = ref(self)

    def __dealloc__(self):
        if self.file != NULL:
            face_gone(self.file)
            with nogil:
                file_put(self.file)

    @property
    def size(self):
        """int: bytes."""
        return self.file.size

    def read(self, offset, n):
        """
        Bytes ``[offset, offset + n)`` of the page cache, fewer at the end of the file; as ``pread``, and faulting nothing in.
        """
        cdef u64 at = as_u64(offset, "offset")
        cdef u64 count = as_u64(n, "n")
        cdef FileCache *file = self.file
        cdef bytes result
        cdef char *data
        if at >= file.size:
            return b""
        if count > file.size - at:
            count = file.size - at
        result = PyBytes_FromStringAndSize(NULL, count)
        data = result
        with nogil:
            pthread_mutex_lock(&file.mem.lock)
            file_read(file, at, data, count)
            pthread_mutex_unlock(&file.mem.lock)
        return result

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
        thread_set_inside(file.mem)
        with nogil:
            pthread_mutex_lock(&file.mem.lock)
            done = file_write(file, at, <const char *> &source[0], count)
            pthread_mutex_unlock(&file.mem.lock)
        thread_set_inside(NULL)
        raise_pending()
        if not done:
            raise MemoryError("no frame for the page cache")

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
