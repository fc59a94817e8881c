"""First touch and unmap of private anonymous pages."""
import workloads


def bench_touch(measure):
    measure(workloads.touch(), kernel=True)


def bench_unmap(measure):
    measure(workloads.unmap(), kernel=True)
