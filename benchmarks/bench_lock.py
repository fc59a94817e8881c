"""Memory that stays: mlock, pins."""
import workloads


def bench_mlock(measure):
    measure(workloads.mlock())


def bench_pin(measure):
    measure(workloads.pin())
