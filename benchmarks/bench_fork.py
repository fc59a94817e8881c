"""fork, and the copy-on-write breaks after it."""
import workloads


def bench_fork(measure):
    measure(workloads.fork(), kernel=True)


def bench_cow(measure):
    measure(workloads.cow())


def bench_cow_contents(measure):
    measure(workloads.cow_contents(), kernel=True)
