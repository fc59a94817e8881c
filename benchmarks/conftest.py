import pytest

import paired
import workloads

PAIRS = []


@pytest.fixture(scope="session", autouse=True)
def _heap():
    workloads.keep_heap()


@pytest.fixture
def report(benchmark):
    """Keep figures with a benchmark (extra_info, so also in --benchmark-json) and show them at the end."""
    def keep(**figures):
        benchmark.extra_info.update(figures)
        PAIRS.append((benchmark.name, figures))

    return keep


@pytest.fixture
def measure(benchmark, report):
    """Benchmark a workload in this process, then in turns with its C counterpart (and the kernel)."""
    def run(workload, units=None, kernel=False):
        arguments = ()

        def prepare():
            nonlocal arguments
            arguments = workload.prepare()
            return arguments, {}

        benchmark.pedantic(workload.run, setup=prepare, teardown=workload.finish, rounds=31, warmup_rounds=1)
        samples = paired.pair(workload.name, units or workload.units, kernel)
        result = paired.compare(samples["model"], samples["c"])
        figures = {"units": workload.units, "model_ns": result.a, "c_ns": result.b, "ratio": result.ratio,
                   "low": result.low, "high": result.high}
        if kernel:
            result = paired.compare(samples["kernel"], samples["model"])
            figures |= {"kernel_ns": result.a, "kernel_ratio": result.ratio}
        report(**figures)

    return run


def pytest_terminal_summary(terminalreporter):
    if PAIRS:
        terminalreporter.section("model and counterparts (CPU time of a unit; median of paired ratios)")
    for name, figures in PAIRS:
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in
                 figures.items())
        terminalreporter.write_line(f"{name}: {', '.join(shown)}")
