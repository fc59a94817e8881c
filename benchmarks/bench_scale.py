"""Size: a thousand VMAs and a million, threads and processes, many mapped pages that share frames."""
import os

import pytest

import paired
import threads
import workloads

FEW, MANY = 1000, 1_000_000


@pytest.mark.parametrize("name", [name for name in workloads.WORKLOADS if name.startswith("vma_")])
def bench_vmas(benchmark, report, name):
    workload = workloads.WORKLOADS[name](FEW)
    arguments = ()

    def prepare():
        nonlocal arguments
        arguments = workload.prepare()
        return arguments, {}

    benchmark.pedantic(workload.run, setup=prepare, teardown=workload.finish, rounds=11)
    report(**paired.few_and_many(name, FEW, MANY))


@pytest.mark.skipif((os.cpu_count() or 1) < threads.WORKERS, reason="not as many processors as threads")
@pytest.mark.parametrize("work", threads.WORK)
def bench_threads(benchmark, report, work):
    result = benchmark.pedantic(paired.threads_and_processes, (work,), rounds=1)
    report(threads_s=result.b, processes_s=result.a, ratio=result.ratio, low=result.low, high=result.high)


def bench_memory_shared(benchmark, report):
    report(**benchmark.pedantic(paired.resident, (paired.model_command("memory_shared", 10_000_000),), rounds=1))
