"""What an executor promises, whatever its transport: checks that raise AssertionError where a promise is broken.

from asyncexec.testing import CHECKS

@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
async def test_my_transport(check):
    await check({"transport": "mine", "tensor_parallel_size": 2})

A check takes an executor's configuration, or a factory where executors are made in another way.
"""

import asyncio
import functools
import gc
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, TypeAlias

import anyio

from asyncexec.aggregate import Aggregator, FirstRank
from asyncexec.driver import create_executor
from asyncexec.errors import (
    ExecutorBusy,
    ExecutorClosed,
    ExecutorFailed,
    PayloadError,
    StepTimeout,
    WorkerDied,
    WorkerError,
)
from asyncexec.executor import Executor
from asyncexec.outputs import DeferredOutput, IntermediateTensors
from asyncexec.worker import RankContext

ExecutorFactory: TypeAlias = Callable[..., Executor]
"""Called as `factory(worker, aggregator=..., **changes)`, gives an executor that is not started yet.

- `worker`: the worker's class.
- `aggregator`: an `Aggregator`, or None for the configuration's.
- `changes`: keys of the configuration to set for this executor.
"""

Target: TypeAlias = Mapping[str, Any] | ExecutorFactory
"""What a check is given: an executor's configuration as a dict, or a factory of executors."""

_BOUND = 60.0
"""Seconds that one check may take; what hangs is a failure, not a wait."""

_QUICK = {"drain": 1.0, "stop": 1.0, "terminate": 0.5}


class ConformanceWorker:
    """The worker of the checks."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: Any, intermediate: IntermediateTensors[Any] | None) -> Any:
        """Return the scheduler output, later if it is a mapping that says so, or raise if it says that."""
        if not self.context.is_last_stage:
            return IntermediateTensors({}, output=None)
        if isinstance(scheduler_output, dict) and "raise" in scheduler_output:
            raise LookupError(scheduler_output["raise"])
        if isinstance(scheduler_output, dict) and "defer" in scheduler_output:
            return _Later(scheduler_output["defer"])
        return scheduler_output

    def rank(self) -> int:
        """This rank's number."""
        return self.context.rank

    def nap(self, seconds: float) -> int:
        """Block the rank's main thread."""
        time.sleep(seconds)
        return self.context.rank

    def fail(self) -> None:
        """Raise."""
        raise LookupError("as asked")

    def signal(self, number: int) -> None:
        """Send a signal to this rank's own process."""
        os.kill(os.getpid(), number)

    def pid(self) -> int:
        """This rank's process."""
        return os.getpid()

    def lock(self) -> Any:
        """Return what cannot be encoded."""
        return threading.Lock()


class _Later(DeferredOutput[Any]):
    def __init__(self, value: Any) -> None:
        self.value = value

    def wait(self) -> Any:
        time.sleep(0.002)
        return self.value


class Recorder(FirstRank):
    """The output rank's output, and a note of it.

    Attributes:
        seen: the outputs of every step that was aggregated, in that order.
    """

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def begin(self, ranks: Sequence[int]) -> list[Any]:
        """No output yet."""
        return []

    def add(self, partial: list[Any], rank: int, output: Any) -> None:
        """Keep it until it is the step's turn."""
        partial.append(output)

    def finish(self, partial: list[Any], output: Any, failed: bool) -> Any:
        """Note the output, and return it."""
        self.seen += partial
        return output


def _executor(target: Target, aggregator: Aggregator | None = None, **changes: Any) -> Executor:
    if isinstance(target, Mapping):
        return create_executor({**target, **changes}, ConformanceWorker, aggregator=aggregator)
    return target(ConformanceWorker, aggregator=aggregator, **changes)


async def order(target: Target) -> None:
    """Replies go to their calls, and steps are aggregated in order; deferred outputs and errors among them."""
    recorder = Recorder()
    async with _executor(target, max_concurrent_batches=3, aggregator=recorder) as executor:
        inputs = [n if n % 5 else {"defer": n} if n % 2 else {"raise": str(n)} for n in range(60)]
        futures = [executor.execute_model(value) for value in inputs]
        for n, future in enumerate(futures):
            if n % 5 or n % 2:
                assert await future == n
            else:
                await _raises(WorkerError, future, str(n))
    assert recorder.seen == [n for n in range(60) if n % 5 or n % 2]


async def limits(target: Target) -> None:
    """No more steps run than there are slots, no more wait than allowed, and `slot` tells when there is room."""
    async with _executor(target, max_concurrent_batches=2, max_queued_steps=2) as executor:
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.1,)))
        await asyncio.sleep(0)
        futures = [executor.execute_model(n) for n in range(4)]
        try:
            executor.execute_model(4)
        except ExecutorBusy:
            pass
        else:
            raise AssertionError("a fifth step was accepted with two slots and room for two to wait")
        await executor.slot()
        assert sum(future.done() for future in futures) >= 1
        assert [await future for future in futures] == list(range(4))
        await nap


async def cancellation(target: Target) -> None:
    """Abandoning an await, at any of its moments, harms nothing else; the step is aggregated all the same."""
    recorder = Recorder()
    async with _executor(target, max_concurrent_batches=2, aggregator=recorder) as executor:
        for turns in range(6):
            task = asyncio.ensure_future(_await(executor.execute_model(("abandoned", turns))))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            with anyio.move_on_after(0):
                await executor.execute_model(("scoped", turns))
            assert await executor.execute_model(("kept", turns)) == ("kept", turns)
    expected = [(kind, turns) for turns in range(6) for kind in ("abandoned", "scoped", "kept")]
    assert recorder.seen == expected, recorder.seen


async def cancellation_at_every_await(target: Target) -> None:
    """Whatever is awaited can be cancelled at each of its suspensions: nothing is left, and the executor works on."""
    recorder = Recorder()
    async with _executor(target, max_concurrent_batches=2, aggregator=recorder) as executor:

        async def use() -> None:
            future = executor.execute_model("used")
            await executor.slot()
            await future
            await executor.collective_rpc("rank")
            await executor.report()
            await executor.check_health()

        moments = 0
        while not await _cancelled_at(moments, use()):
            moments += 1
            assert await executor.execute_model("next") == "next"
        assert moments >= 4, "a wait has gone unnoticed"
        assert recorder.seen == ["used", "next"] * moments + ["used"], recorder.seen
        assert executor.counters.late + executor.counters.lost == 0

    async def live() -> None:
        executor = _executor(target, timeouts=_QUICK)
        try:
            await executor.start()
            await executor.execute_model(1)
        finally:
            await executor.aclose()

    ended = False
    for moment in itertools.count():

        async def once(moment: int = moment) -> None:
            nonlocal ended
            ended = await _cancelled_at(moment, live())

        await _require_no_leak(once, f"cancelled at suspension {moment}")
        if ended:
            return


async def deadlines(target: Target) -> None:
    """A call past its deadline fails with a report; its late reply goes to nobody; the next call works."""
    async with _executor(target) as executor:
        began = time.monotonic()
        error = await _raises(StepTimeout, executor.collective_rpc("nap", (0.6,), timeout=0.1), "had not answered")
        assert time.monotonic() - began < 0.1 + 0.5
        assert isinstance(error, StepTimeout)
        assert error.report is not None
        assert all(rank.state == "running" for rank in error.report.ranks if rank.rank in error.waiting_for)
        assert await executor.execute_model("next") == "next"
        assert executor.counters.late + executor.counters.lost == 0


async def errors(target: Target) -> None:
    """What a worker raises arrives typed; what cannot be sent fails alone; the executor stays usable."""
    async with _executor(target) as executor:
        error = await _raises(WorkerError, executor.collective_rpc("fail"), "LookupError: as asked")
        assert isinstance(error, WorkerError)
        assert (error.remote_type, error.method) == ("LookupError", "fail")
        assert "raise LookupError" in error.remote_traceback
        await _raises(WorkerError, executor.collective_rpc("lock"), "lock")
        try:
            executor.execute_model(threading.Lock())
        except PayloadError:
            pass
        else:
            raise AssertionError("a lock was sent")
        assert await executor.execute_model(1) == 1


async def inspection(target: Target) -> None:
    """Reports come while the ranks' main threads are busy, and the health check tells busy from stuck."""
    async with _executor(target) as executor:
        world = executor.config.world_size
        await executor.check_health()
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.3,)))
        await asyncio.sleep(0)
        while not all(rank.method == "nap" for rank in (await executor.report()).ranks):
            pass
        began = time.monotonic()
        report = await executor.report()
        assert time.monotonic() - began < 0.3
        assert [rank.rank for rank in report.ranks] == list(range(world))
        assert all("nap" in rank.stacks for rank in report.ranks)
        await executor.check_health()
        await nap


async def death(target: Target) -> None:
    """A rank that is killed fails every call at once, by name, and the executor for good."""
    async with _executor(target, timeouts=_QUICK) as executor:
        world = executor.config.world_size
        if await executor.collective_rpc("pid", ranks=[0]) == [os.getpid()]:
            return  # its rank cannot be killed without this process
        causes: list[Exception] = []
        executor.add_failure_callback(causes.append)
        victim = world - 1
        others = [rank for rank in range(world) if rank != victim]
        busy = [asyncio.ensure_future(executor.collective_rpc("nap", (60,), ranks=others))] if others else []
        dying = asyncio.ensure_future(executor.collective_rpc("signal", (int(signal.SIGKILL),), ranks=[victim]))
        await asyncio.sleep(0)
        waiting: list[Awaitable[Any]] = [dying, *busy, *(executor.execute_model(n) for n in range(3))]
        for awaitable in waiting:
            error = await _raises(WorkerDied, awaitable, f"rank {victim} died")
            assert isinstance(error, WorkerDied)
            assert error.rank == victim
            assert error.signal in ("SIGKILL", None)  # older kernels tell the parent alone, which may not be us
        await _raises(ExecutorFailed, executor.collective_rpc("rank"), f"rank {victim} died")
        assert causes == [executor.failure]


async def shutdown(target: Target) -> None:
    """Closing lets the calls in flight finish, is bounded by the limits, and may be done again."""
    executor = _executor(target)
    await executor.start()
    future = executor.execute_model("finishes")
    await executor.aclose()
    assert await future == "finishes"
    await executor.aclose()
    await _raises(ExecutorClosed, executor.collective_rpc("rank"), "closed")
    stuck = _executor(target, timeouts=_QUICK)
    await stuck.start()
    nap = asyncio.ensure_future(stuck.collective_rpc("nap", (3,)))
    await asyncio.sleep(0)
    began = time.monotonic()
    stuck.abort()
    await stuck.aclose()
    assert time.monotonic() - began < sum(_QUICK.values()) + 1
    await _raises(ExecutorClosed, nap, "aborted")


async def leaks(target: Target) -> None:
    """Ten executors, one after the other, leave no descriptor, thread, task or process behind."""

    async def ten_executors() -> None:
        for _ in range(10):
            async with _executor(target) as executor:
                await executor.execute_model(1)

    async with _executor(target) as executor:  # what is loaded and kept at the first use
        await executor.execute_model(1)
    await _require_no_leak(ten_executors, "ten executors")


CHECKS: Mapping[str, Callable[[Target], Awaitable[None]]] = {
    check.__name__: check
    for check in (
        order,
        limits,
        cancellation,
        cancellation_at_every_await,
        deadlines,
        errors,
        inspection,
        death,
        shutdown,
        leaks,
    )
}
"""Every check by name; each takes an executor's configuration or a factory, and raises AssertionError."""


async def check_transport(target: Target) -> None:
    """Run every check on executors of this configuration, or that this factory makes.

    Raises:
        AssertionError: the first broken promise.
    """
    for check in CHECKS.values():
        with anyio.fail_after(_BOUND):
            await check(target)


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def _raises(kind: type[Exception], awaitable: Awaitable[Any], text: str) -> Exception:
    try:
        result = await awaitable
    except kind as error:
        caught = error
    else:
        raise AssertionError(f"{result!r} came in place of {kind.__name__}")
    assert text in str(caught), f"{text!r} is not in: {caught}"
    return caught


async def _cancelled_at(moment: int, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work`, cancelled at its suspension of this number, counted from 0; returns whether it ended before."""
    task = asyncio.ensure_future(_Suspensions(moment, work).run())
    await asyncio.wait([task])
    if task.cancelled():
        return False
    task.result()
    return True


class _Suspensions:
    """Passes a coroutine's suspensions on, and has its task cancelled at one of them."""

    def __init__(self, moment: int, work: Coroutine[Any, Any, None]) -> None:
        self._moment = moment
        self._work = work

    async def run(self) -> None:
        await self

    def __await__(self) -> Generator[Any, Any, None]:
        resume: Callable[[], Any] = functools.partial(self._work.send, None)
        for count in itertools.count():
            try:
                suspended = resume()
            except StopIteration:
                return
            if count == self._moment and (task := asyncio.current_task()) is not None:
                task.cancel()
            try:
                answer = yield suspended
            except BaseException as error:  # noqa: BLE001 - the coroutine's to handle, as if it were awaited directly
                resume = functools.partial(self._work.throw, error)
            else:
                resume = functools.partial(self._work.send, answer)


async def _require_no_leak(work: Callable[[], Awaitable[None]], name: str) -> None:
    """Something may have been there before that has ended since, but nothing may be there in addition.

    Where there is more, the work is done again: what a client library starts once, when it first needs it, is no leak.
    """
    left: dict[str, tuple[list[str], list[str]]] = {}
    for _ in range(3):
        before = _resources()
        await work()
        gc.collect()
        after = _resources()
        left = {kind: (before[kind], after[kind]) for kind in after if len(after[kind]) > len(before[kind])}
        if not left:
            return
    raise AssertionError(f"{name}: left behind, again and again: {left}")


def _resources() -> dict[str, list[str]]:
    # workers of thread pools are the loop's, which keeps them for their next use
    threads = [thread.name for thread in threading.enumerate() if not thread.name.startswith(("AnyIO", "asyncio_"))]
    return {
        "descriptors": list(descriptors().values()),
        "threads": threads,
        "tasks": [task.get_name() for task in asyncio.all_tasks()],
        "child processes": [child for task in os.listdir("/proc/self/task") for child in _children(task)],
    }


def descriptors() -> dict[str, str]:
    """This process's open descriptors and what they are, without TCP sockets.

    Client libraries pool these: how many there are at a time, and for how long, is theirs to choose.
    """
    found: dict[str, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            if not (target.startswith("socket:") and _is_internet_socket(int(name))):
                found[name] = target
        except OSError:  # it has been closed meanwhile, such as the one that listed the others
            continue
    return found


def _is_internet_socket(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        return copy.family in (socket.AF_INET, socket.AF_INET6)


def _children(task: str) -> list[str]:
    try:
        with open(f"/proc/self/task/{task}/children") as file:
            return file.read().split()
    except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
        return []
