"""Registration cache: get and put of a registered buffer, beside UCX's."""
import pytest

import paired
import registration


@pytest.mark.parametrize("regions", registration.REGIONS)
def bench_hit(benchmark, report, regions):
    workload = registration.hit(regions)
    benchmark.pedantic(workload.run, setup=lambda: (workload.prepare(), {}), rounds=31, warmup_rounds=1)
    samples = registration.measure(regions)
    figures = {"regions": regions, **{f"{name}_ns": float(sorted(ns)[len(ns) // 2]) for name, ns in samples.items()}}
    if "ucx" in samples:
        r = paired.compare(samples["hit"], samples["ucx"])
        figures |= {"ratio": r.ratio, "low": r.low, "high": r.high}
    report(**figures)
