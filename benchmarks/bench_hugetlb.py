"""Huge pages: mapped, written to, unmapped."""
import workloads


def bench_hugetlb(measure):
    measure(workloads.hugetlb())
