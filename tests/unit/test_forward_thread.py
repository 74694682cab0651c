"""The thread in which models run."""

from __future__ import annotations

import pickle
import threading
import weakref

import pytest

from cluster.errors import ScoringError
from reward_service.forward_thread import ForwardThread, StuckError
from tests.reward_support import LONG_S


async def test_the_forward_thread_hands_over_errors_and_results() -> None:
    thread = ForwardThread()

    def fail() -> None:
        raise KeyError("x")

    assert await thread.call(lambda: threading.current_thread().name, timeout_s=LONG_S) == "forward"
    with pytest.raises(KeyError):
        await thread.call(fail, timeout_s=LONG_S)
    assert await thread.call(lambda: None, timeout_s=LONG_S) is None  # type: ignore[func-returns-value]
    thread.close()


async def test_a_call_that_overruns_is_abandoned_and_the_next_one_runs() -> None:
    thread, release = ForwardThread(max_stuck=2), threading.Event()
    with pytest.raises(ScoringError, match="took too long"):
        await thread.call(lambda: release.wait(LONG_S), timeout_s=0.01)
    assert await thread.call(lambda: 1, timeout_s=LONG_S) == 1
    release.set()


async def test_too_many_stuck_calls_refuse_all_others() -> None:
    thread, release = ForwardThread(max_stuck=1), threading.Event()
    with pytest.raises(ScoringError):
        await thread.call(lambda: release.wait(LONG_S), timeout_s=0.01)
    with pytest.raises(StuckError) as caught:
        await thread.call(lambda: 1, timeout_s=LONG_S)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    release.set()


async def test_a_time_out_of_the_function_itself_is_its_own_error() -> None:
    def time_out() -> None:
        raise TimeoutError("from inside")

    with pytest.raises(TimeoutError, match="from inside"):
        await ForwardThread().call(time_out, timeout_s=LONG_S)


async def test_what_a_call_held_is_freed_when_it_is_over() -> None:
    """A model that was swapped out must not live on in the thread that ran it last."""

    class Model:
        def score(self) -> int:
            return 7

    thread = ForwardThread()
    model = Model()
    gone = weakref.ref(model)
    assert await thread.call(model.score, timeout_s=LONG_S) == 7
    del model
    assert gone() is None
    thread.close()
