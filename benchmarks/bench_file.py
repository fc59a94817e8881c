"""Files that 16 address spaces map: truncation and holes."""
import workloads


def bench_truncate(measure):
    measure(workloads.truncate())


def bench_punch(measure):
    measure(workloads.punch())
