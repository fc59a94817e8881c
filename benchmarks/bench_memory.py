"""Resident memory, in a fresh process: 1 GiB mapped densely, no contents, and each further mapper of it."""
import paired


def bench_memory(benchmark, report):
    model = benchmark.pedantic(paired.resident, (paired.model_command("memory"),), rounds=1)
    c = paired.resident(paired.c_command("memory"))
    report(**model, **{f"c_{key}": value for key, value in c.items()})
