"""Threads of a test: several at once, what they raise, and what there is to see if they never end."""
import contextlib
import faulthandler
import random
import sys
import threading
import time

import pytest

SECONDS = 1.5                       # per stress test


@contextlib.contextmanager
def no_hang(seconds):
    """All stacks, and the end of the run, rather than a hang."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def no_deadlock():
    with no_hang(120):
        yield


def together(*works, seconds=SECONDS, seed=0, barrier=None):
    """
    Run each ``work(random, going)`` in a thread of its own until the time is up; raise what they raised.  `barrier`: where they
    wait for each other, no longer once one has raised.
    """
    end = time.monotonic() + seconds
    raised = []

    def guarded(number, work):
        try:
            work(random.Random(f"{seed} {number}"), lambda: not raised and time.monotonic() < end)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            raised.append(error)
            if barrier:
                barrier.abort()

    threads = [threading.Thread(target=guarded, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
