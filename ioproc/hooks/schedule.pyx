# The face of schedule points.

SCHEDULE_POINT_NAMES = ("teardown-gap", "establish", "read-begin", "inherit")
cdef list scheduled_calls = [None] * <int> SCHEDULE_POINTS


cdef void call_scheduled(int point) noexcept nogil:
    """The callable may use the VM: the thread is in no operation meanwhile."""
    cdef void *inside = thread_inside()
    thread_set_inside(NULL)
    with gil:
        try:
            if scheduled_calls[point] is not None:
                scheduled_calls[point]()
        except BaseException as exception:
            callback_raised(exception)
    thread_set_inside(inside)


def schedule(str point, call):
    """
    For tests: call `call()` wherever a thread comes by a point: ``"teardown-gap"``, ``"establish"``, ``"read-begin"``,
    ``"inherit"``; None ends that.  What it raises reaches the caller of the operation.
    """
    if point not in SCHEDULE_POINT_NAMES:
        raise ValueError(f"point = {point!r}: not one of {', '.join(SCHEDULE_POINT_NAMES)}")
    scheduled_calls[SCHEDULE_POINT_NAMES.index(point)] = call
    if any(one is not None for one in scheduled_calls):
        set_scheduled(call_scheduled)
    else:
        set_scheduled(NULL)
