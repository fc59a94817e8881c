"""Memory pressure: faults that reclaim, reclaim itself, MADV_PAGEOUT, and pages that come back from swap."""
import workloads


def bench_fault_reclaim(measure):
    measure(workloads.fault_reclaim())


def bench_reclaim(measure):
    measure(workloads.reclaim())


def bench_reclaim_16(measure):
    measure(workloads.reclaim_16())


def bench_pageout(measure):
    measure(workloads.pageout())


def bench_swapin_write(measure):
    measure(workloads.swapin_write())


def bench_swapin_read(measure):
    measure(workloads.swapin_read())
