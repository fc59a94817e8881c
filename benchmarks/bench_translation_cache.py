"""The NIC's translation cache, per page of a stream, beside the C program and the simulators that are installed."""
import pytest

import paired
import translation

PAGES = 1_000_000


@pytest.mark.parametrize("kind", translation.STREAMS)
def bench_translation_cache(benchmark, report, kind):
    path = translation.save(translation.stream(kind, PAGES))
    workload = translation.model(path)
    benchmark.pedantic(workload.run, setup=lambda: (workload.prepare(), {}), rounds=15, warmup_rounds=1)
    others = ["c"] + ["pycachesim"] * translation.installed("cachesim")
    samples = translation.measure(path, "model", *others)
    figures = {"pages": PAGES}
    for other in others:
        r = paired.compare(samples["model"], samples[other])
        figures |= {"model_ns": r.a, f"{other}_ns": r.b, f"{other}_ratio": r.ratio, f"{other}_low": r.low,
                    f"{other}_high": r.high}
    report(**figures, hits=translation.hits(path))


@pytest.mark.parametrize("kind", translation.STREAMS)
def bench_hit_curve(benchmark, kind):
    workload = translation.hit_curve(translation.save(translation.stream(kind, PAGES)))
    benchmark.pedantic(workload.run, rounds=3, warmup_rounds=1)
