"""Replay of fault-heavy histories with no device: one generated, one recorded."""
import paired
import workloads


def bench_replay(measure):
    trace = workloads.generated_history()
    events = workloads.save_events(trace)
    try:
        measure(workloads.replay(), (workloads.HISTORY_EVENTS, events))
    finally:
        events.unlink()


def bench_replay_recorded(benchmark, report):
    workload = workloads.replay_recorded()
    benchmark.pedantic(workload.run, rounds=15, warmup_rounds=1)
    samples = paired.take_turns({"model": (paired.model_command("replay_recorded", workloads.RECORDED),)})["model"]
    ns = sorted(samples)[len(samples) // 2]
    report(events=workload.units, event_ns=float(ns), events_per_second=1e9 / float(ns))
