"""The blocking executor: calls from any thread, and futures that complete whether or not anybody waits."""

import asyncio
import concurrent.futures
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncexec import ExecutorConfig
from asyncexec.blocking import BlockingExecutor
from asyncexec.driven import DrivenFuture, DrivenLoop
from asyncexec.errors import ExecutorClosed, StepTimeout, WorkerDied, WorkerError

CONFIG: dict[str, Any] = {
    "transport": "nccl",
    "tensor_parallel_size": 2,
    "max_concurrent_batches": 64,
    "options": {"nccl": {"backend": "none", "rank_environments": [{"PLACE": "first"}, {"PLACE": "second"}]}},
}


class Worker:
    def __init__(self, context: Any) -> None:
        self.rank = context.rank
        self.noted: list[int] = []

    def echo(self, value: Any) -> Any:
        return self.rank, value

    def nap(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def size(self, value: list[Any]) -> int:
        return len(value)

    def note(self, value: int) -> None:
        self.noted.append(value)

    def note_both(self, value: int, before: int = 0) -> list[int]:
        self.noted += [before, value] if before else [value]
        return self.noted

    def notes(self) -> list[int]:
        return self.noted

    def place(self) -> str:
        return os.environ["PLACE"]


@pytest.fixture
def executor(no_leftovers: None) -> Iterator[BlockingExecutor]:
    executor = BlockingExecutor(ExecutorConfig.from_dict(CONFIG), Worker, {})
    executor.start()
    yield executor
    executor.close()


def test_results_of_all_ranks_or_of_one(executor: BlockingExecutor) -> None:
    assert executor.submit("echo", ("x",)).result() == [(0, "x"), (1, "x")]
    assert executor.submit("echo", ("x",), output_rank=1, is_step=True).result() == (1, "x")
    assert executor.submit("place").result() == ["first", "second"]


def test_notices_are_run_in_order_and_not_answered(executor: BlockingExecutor) -> None:
    for number in range(100):
        executor.notify("note", (number,))
    assert executor.submit("notes").result() == [list(range(100))] * 2


def test_what_is_held_goes_with_the_next_call_or_before_it(executor: BlockingExecutor) -> None:
    executor.hold("note", (1,), joins="note_both")
    assert executor.submit("note_both", (2,), output_rank=1).result() == [1, 2]
    executor.hold("note", (3,), joins="note_both")
    executor.hold("note", (4,), joins="note_both")  # before it, the one before
    assert executor.submit("note_both", (5,), output_rank=1).result() == [1, 2, 3, 4, 5]
    executor.hold("note", (6,), joins="note_both")
    executor.notify("note", (7,))
    assert executor.submit("note_both", (8,), output_rank=1).result() == list(range(1, 9))
    executor.hold("note", (9,), joins="note_both")
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: executor.submit("notes").result()).result() == [list(range(1, 10))] * 2


def test_what_is_held_and_cannot_be_sent_fails_the_next_call_alone(executor: BlockingExecutor) -> None:
    executor.hold("note", ("no number",), joins="note_both")
    with pytest.raises(WorkerError, match="Expected `int`"):
        executor.submit("note_both", (1,)).result()
    assert executor.submit("notes").result() == [[], []]


def test_a_future_completes_though_nobody_waits(executor: BlockingExecutor) -> None:
    called = threading.Event()
    future = executor.submit("echo", (1,))
    future.add_done_callback(lambda done: called.set())
    assert called.wait(10)
    assert future.done()


def test_a_deadline_passes_though_nobody_waits(executor: BlockingExecutor) -> None:
    called = threading.Event()
    future = executor.submit("nap", (1.0,), timeout=0.05)
    future.add_done_callback(lambda done: called.set())
    assert called.wait(0.9)
    assert isinstance(future.exception(), TimeoutError)


def test_futures_are_those_of_the_standard_library(executor: BlockingExecutor) -> None:
    """Whatever asks for more than the result may come before it is there, or after."""
    futures = [executor.submit("echo", (number,)) for number in range(10)]
    assert {future.result()[0][1] for future in concurrent.futures.as_completed(futures, 10)} == set(range(10))
    assert concurrent.futures.wait(futures, 0).not_done == set()
    future = executor.submit("nap", (0.05,))
    assert (future.done(), future.running(), future.cancelled()) == (False, True, False)
    assert not future.cancel()
    assert "pending" in repr(future)
    called: list[Any] = []
    future.add_done_callback(called.append)
    future.result()
    future.add_done_callback(called.append)
    assert called == [future, future]
    assert (future.done(), future.running(), future.exception()) == (True, False, None)
    assert "finished" in repr(future)


def test_a_future_may_become_done_while_others_begin_to_look() -> None:
    """It gets what its base class has at the first look, on whichever thread."""

    def meet_and(look: Callable[[Any], Any], of: Any) -> None:
        together.wait(10)
        look(of)

    together = threading.Barrier(4)
    loop = DrivenLoop()
    loop.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for number in range(1000):
                future: DrivenFuture[int] = DrivenFuture(loop)
                called: list[Any] = []
                looks: list[Callable[[Any], Any]] = [future.add_done_callback, concurrent.futures.wait, repr]
                arguments: list[Any] = [called.append, [future], future]
                looking = [pool.submit(meet_and, look, of) for look, of in zip(looks, arguments, strict=True)]
                together.wait(10)
                future.set_result(number)
                for look in looking:
                    look.result(10)
                assert called == [future]
                assert future.result() == number
    finally:
        sys.setswitchinterval(interval)
        loop.end()


def test_done_becomes_true_though_nobody_waits(executor: BlockingExecutor) -> None:
    executor.submit("echo", (1,)).result()
    future = executor.submit("echo", (1,))
    deadline = time.monotonic() + 10
    while not future.done() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert future.done()


def test_an_error_is_raised_as_often_as_it_is_asked_for(executor: BlockingExecutor) -> None:
    future = executor.submit("nap", ("not a number",))
    for _ in range(2):
        with pytest.raises(WorkerError, match="Expected"):
            future.result(10)
    assert isinstance(future.exception(), WorkerError)


def test_several_threads_may_wait_for_one_future(executor: BlockingExecutor) -> None:
    future = executor.submit("nap", (0.2,))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = [pool.submit(future.result, 10) for _ in range(4)]
        assert len({tuple(result.result(10)) for result in results}) == 1


def test_a_deadline_passes_while_a_thread_waits_for_another_call(executor: BlockingExecutor) -> None:
    late = executor.submit("nap", (0.5,), timeout=0.05)
    following = executor.submit("echo", (1,))
    answered: list[float] = []
    began = time.monotonic()
    late.add_done_callback(lambda done: answered.append(time.monotonic() - began))
    assert following.result(10) == [(0, 1), (1, 1)]
    assert isinstance(late.exception(), StepTimeout)
    assert answered[0] < 0.4


async def test_futures_can_be_awaited_by_another_loop(executor: BlockingExecutor) -> None:
    futures = [asyncio.wrap_future(executor.submit("echo", (number,))) for number in range(5)]
    assert [result[1] for result in await asyncio.wait_for(asyncio.gather(*futures), 10)] == [(1, n) for n in range(5)]


def test_a_large_argument_is_written_though_nobody_waits(executor: BlockingExecutor) -> None:
    """More than the sockets take at once."""
    called = threading.Event()
    executor.submit("nap", (0.1,))
    future = executor.submit("size", ([bytes(1000)] * 5000,))
    future.add_done_callback(lambda done: called.set())
    assert called.wait(20)
    assert future.result() == [5000, 5000]


def test_a_wait_may_be_given_up_and_taken_up_again(executor: BlockingExecutor) -> None:
    future = executor.submit("nap", (0.3,))
    with pytest.raises(TimeoutError):
        future.result(0.01)
    assert len(set(future.result())) == 2


def test_many_threads_get_their_own_replies(executor: BlockingExecutor) -> None:
    def work(number: int) -> bool:
        values = [(number, i) for i in range(300)]
        return all(executor.submit("echo", (value,)).result() == [(0, value), (1, value)] for value in values)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_a_callback_may_submit_but_not_wait(executor: BlockingExecutor) -> None:
    caught: list[BaseException] = []
    answered = threading.Event()

    def callback(done: Any) -> None:
        following = executor.submit("echo", (2,))
        try:
            following.result()
        except RuntimeError as error:
            caught.append(error)
        following.add_done_callback(lambda done: answered.set())

    executor.submit("echo", (1,)).add_done_callback(callback)
    assert answered.wait(10)
    assert "callback" in str(caught[0])


def test_a_death_reaches_the_thread_that_waits(executor: BlockingExecutor) -> None:
    pids = executor.submit("nap", (0.0,)).result()
    future = executor.submit("nap", (60.0,))
    threading.Timer(0.1, os.kill, (pids[1], signal.SIGKILL)).start()
    with pytest.raises(WorkerDied):
        future.result(10)
    assert isinstance(executor.failure, WorkerDied)


def test_close_twice(executor: BlockingExecutor) -> None:
    executor.close()
    executor.close()
    with pytest.raises(ExecutorClosed):
        executor.submit("echo", (1,))


async def test_a_thread_that_runs_a_loop_of_its_own_may_wait_too(executor: BlockingExecutor) -> None:
    """As a notebook's does."""
    for number in range(20):
        executor.notify("note", (number,))
        assert executor.submit("echo", (number,), output_rank=1, is_step=True).result(10) == (1, number)
    with pytest.raises(TimeoutError):
        executor.submit("nap", (0.3,)).result(0.01)
    assert executor.submit("notes").result() == [list(range(20))] * 2


def test_what_other_threads_put_into_the_loop_in_a_turn_that_ends_is_run() -> None:
    """The turn reads what the other thread wrote to wake the loop, and ends without its callback."""
    loop = DrivenLoop()
    loop.start()
    called = threading.Event()

    def in_a_turn() -> None:
        other = threading.Thread(target=loop.call_soon_threadsafe, args=(called.set,))
        other.start()
        other.join(10)

    loop.call_soon_threadsafe(in_a_turn)  # behind it the turn reads the pipe
    assert called.wait(10)
    loop.end()


def test_the_end_wakes_a_watcher_that_a_leaving_thread_has_left_asleep() -> None:
    ending = threading.Event()

    class Loop(DrivenLoop):
        @property
        def _ending(self) -> bool:
            return ending.is_set()

        @_ending.setter
        def _ending(self, value: bool) -> None:
            if value:
                ending.set()

        def _release(self) -> None:
            if threading.current_thread() is waiting:
                ending.wait(10)
            super()._release()

    loop = Loop()
    future: DrivenFuture[int] = DrivenFuture(loop)
    waiting = threading.Thread(target=future.result)
    loop.start()
    waiting.start()
    loop.call_soon_threadsafe(future.set_result, 1)
    loop.end()
    waiting.join(10)
    assert not loop._watcher.is_alive()
    assert loop.is_closed()
