"""Random programs: ioproc must do exactly what model.py does, hook for hook (see sequences.py).

IOPROC_EXAMPLES is the number of programs (shared out among the cases), IOPROC_SEED repeats a run.
The report of a failure is the smallest program found that fails, with what the model made of each call.
"""
import os
import random

import hypothesis
import ioproc
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import model
from sequences import PAGE, Calls, smallest

EXAMPLES = int(os.environ.get("IOPROC_EXAMPLES", 200))
SEED = int(os.environ.get("IOPROC_SEED", random.randrange(2**32)))

CASES = {       # share of the examples, and the limits of the machine
    "plain": (0.5, {}),
    "few frames": (0.2, {"frames": 14}),
    "few VMAs": (0.2, {"max_map_count": 9}),
    "rlimits": (0.1, {"rlimits": {"AS": 20 * PAGE, "DATA": 12 * PAGE}}),
}


@pytest.mark.parametrize("case", CASES)
def test_random_programs(case):
    share, limits = CASES[case]
    machine = type("Machine", (Calls,), {"implementations": (model, ioproc), "limits": limits})
    hypothesis.seed(SEED)(machine)      # where run_state_machine_as_test looks for it
    try:
        run_state_machine_as_test(machine, settings=settings(
            max_examples=max(1, int(EXAMPLES * share)), stateful_step_count=40, deadline=None, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck)))
    except Exception:
        if not machine.failed:
            raise
        program = smallest(machine.implementations, limits, machine.failed)
    else:
        return
    pytest.fail(f"IOPROC_SEED={SEED}\n{program}", pytrace=False)
