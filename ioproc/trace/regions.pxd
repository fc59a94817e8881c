# A set of address ranges: the memory registered for communication in one process.  Sorted, disjoint, not touching.
from libc.stdint cimport uint64_t as u64
from libc.stdlib cimport realloc
from libc.string cimport memmove

cdef struct Range:
    u64 start
    u64 end

cdef struct Regions:
    Range *ranges
    u64 n
    u64 room
    u64 bytes


cdef inline u64 regions_above(const Regions *regions, u64 addr) noexcept nogil:
    """Index of the first range that ends above `addr`."""
    cdef u64 low = 0
    cdef u64 high = regions.n
    cdef u64 middle
    while low < high:
        middle = (low + high) >> 1
        if regions.ranges[middle].end > addr:
            high = middle
        else:
            low = middle + 1
    return low


cdef inline bint regions_overlap(const Regions *regions, u64 start, u64 end) noexcept nogil:
    cdef u64 i = regions_above(regions, start)
    return i < regions.n and regions.ranges[i].start < end


cdef inline bint regions_reserve(Regions *regions) noexcept nogil:
    """Room for one more.  False: no memory."""
    cdef u64 room
    cdef Range *moved
    if regions.n < regions.room:
        return True
    room = 2 * regions.room if regions.room else 16
    moved = <Range *> realloc(regions.ranges, room * sizeof(Range))
    if moved == NULL:
        return False
    regions.ranges = moved
    regions.room = room
    return True


cdef inline bint regions_remove(Regions *regions, u64 start, u64 end) noexcept nogil:
    """False: no memory, nothing changed."""
    cdef u64 first = regions_above(regions, start)
    cdef u64 last = first
    cdef Range *at
    if not regions_reserve(regions):
        return False
    at = &regions.ranges[first]
    if first < regions.n and at.start < start and at.end > end:       # a hole in the middle of one
        memmove(at + 1, at, (regions.n - first) * sizeof(Range))
        at[0].end = start
        at[1].start = end
        regions.n += 1
        regions.bytes -= end - start
        return True
    if first < regions.n and at.start < start:
        regions.bytes -= at.end - start
        at.end = start
        first += 1
        last = first
    while last < regions.n and regions.ranges[last].end <= end:
        regions.bytes -= regions.ranges[last].end - regions.ranges[last].start
        last += 1
    if last < regions.n and regions.ranges[last].start < end:
        regions.bytes -= end - regions.ranges[last].start
        regions.ranges[last].start = end
    memmove(&regions.ranges[first], &regions.ranges[last], (regions.n - last) * sizeof(Range))
    regions.n -= last - first
    return True


cdef inline bint regions_add(Regions *regions, u64 start, u64 end) noexcept nogil:
    """False: no memory."""
    cdef u64 i
    if not regions_remove(regions, start, end) or not regions_reserve(regions):
        return False
    i = regions_above(regions, start)
    regions.bytes += end - start
    if i > 0 and regions.ranges[i - 1].end == start:
        regions.ranges[i - 1].end = end
        if i < regions.n and regions.ranges[i].start == end:
            regions.ranges[i - 1].end = regions.ranges[i].end
            memmove(&regions.ranges[i], &regions.ranges[i + 1], (regions.n - i - 1) * sizeof(Range))
            regions.n -= 1
        return True
    if i < regions.n and regions.ranges[i].start == end:
        regions.ranges[i].start = start
        return True
    memmove(&regions.ranges[i + 1], &regions.ranges[i], (regions.n - i) * sizeof(Range))
    regions.ranges[i].start = start
    regions.ranges[i].end = end
    regions.n += 1
    return True
