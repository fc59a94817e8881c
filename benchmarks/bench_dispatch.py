"""One native op called through the chain."""
import workloads


def bench_dispatch(measure):
    measure(workloads.dispatch())
