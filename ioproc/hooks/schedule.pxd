# Schedule points: where a test may stop a thread, to force a race that is otherwise one in a million.
from ioproc.hooks.chain cimport unlikely

cdef enum SchedulePoint:
    TEARDOWN_GAP                # munmap has let go of the lock between two batches
    ESTABLISH                   # a driver has read a page-table entry, let go of the lock, and tells the device next
    READ_BEGIN                  # a driver is about to wait for the end of an invalidation
    INHERIT                     # the child of a fork is attached, and what took part in the parent does not yet do so there
    SCHEDULE_POINTS

cdef extern from * nogil:
    """
    static void (*ioproc_scheduled)(int point);
    #define IOPROC_SCHEDULED() __atomic_load_n(&ioproc_scheduled, __ATOMIC_ACQUIRE)
    #define IOPROC_SET_SCHEDULED(f) __atomic_store_n(&ioproc_scheduled, (f), __ATOMIC_RELEASE)
    """
    ctypedef void (*schedule_function)(int point) noexcept nogil
    schedule_function scheduled "IOPROC_SCHEDULED"()
    void set_scheduled "IOPROC_SET_SCHEDULED"(schedule_function f)


cdef inline void schedule_point(int point) noexcept nogil:
    if unlikely(scheduled() != NULL):
        scheduled()(point)
