"""What hooks cost everybody else: the package built with hooks and without, nothing registered in either."""
import paired
import workloads


def bench_hooksite(measure):
    measure(workloads.hooksite())


def bench_hooksite_instructions(benchmark, report):
    counts = benchmark.pedantic(paired.hooksite_instructions, rounds=1)
    report(instructions=counts["model"], c_instructions=counts["c"])


def bench_hooksite_replay(benchmark, report):
    result = benchmark.pedantic(paired.replay_in_out, (workloads.HISTORY_EVENTS,), rounds=1)
    report(in_ns=result.a, out_ns=result.b, ratio=result.ratio, low=result.low, high=result.high)
