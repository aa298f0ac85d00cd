"""What an executor promises, whatever its transport: checks that raise AssertionError where a promise is broken.

from asyncexec.testing import CHECKS

@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
async def test_my_transport(check):
    await check({"transport": "mine", "tensor_parallel_size": 2})
"""

import asyncio
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from asyncexec.aggregate import FirstRank
from asyncexec.config import ExecutorConfig
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

Config = Mapping[str, Any]
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

    def aggregate(self, outputs_by_rank: Mapping[int, Any], output_rank: int) -> Any:
        """Note the output, and return it."""
        self.seen.append(outputs_by_rank[output_rank])
        return super().aggregate(outputs_by_rank, output_rank)


def _executor(config: Config, **more: Any) -> Executor:
    aggregator = more.pop("aggregator", None)
    return create_executor({**config, **more}, ConformanceWorker, aggregator=aggregator)


async def order(config: Config) -> None:
    """Replies go to their calls, and steps are aggregated in order; deferred outputs and errors among them."""
    recorder = Recorder()
    async with _executor(config, max_concurrent_batches=3, aggregator=recorder) as executor:
        inputs = [n if n % 5 else {"defer": n} if n % 2 else {"raise": str(n)} for n in range(60)]
        futures = [executor.execute_model(value) for value in inputs]
        for n, future in enumerate(futures):
            if n % 5 or n % 2:
                assert await future == n
            else:
                await _raises(WorkerError, future, str(n))
    assert recorder.seen == [n for n in range(60) if n % 5 or n % 2]


async def limits(config: Config) -> None:
    """No more steps run than there are slots, no more wait than allowed, and `slot` tells when there is room."""
    async with _executor(config, max_concurrent_batches=2, max_queued_steps=2) as executor:
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


async def cancellation(config: Config) -> None:
    """Abandoning an await, at any of its moments, harms nothing else; the step is aggregated all the same."""
    recorder = Recorder()
    async with _executor(config, max_concurrent_batches=2, aggregator=recorder) as executor:
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


async def deadlines(config: Config) -> None:
    """A call past its deadline fails with a report; its late reply goes to nobody; the next call works."""
    async with _executor(config) as executor:
        began = time.monotonic()
        error = await _raises(StepTimeout, executor.collective_rpc("nap", (0.6,), timeout=0.1), "had not answered")
        assert time.monotonic() - began < 0.1 + 0.5
        assert isinstance(error, StepTimeout)
        assert error.report is not None
        assert all(rank.state == "running" for rank in error.report.ranks if rank.rank in error.waiting_for)
        assert await executor.execute_model("next") == "next"
        assert executor.counters.late + executor.counters.lost == 0


async def errors(config: Config) -> None:
    """What a worker raises arrives typed; what cannot be sent fails alone; the executor stays usable."""
    async with _executor(config) as executor:
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


async def inspection(config: Config) -> None:
    """Reports come while the ranks' main threads are busy, and the health check tells busy from stuck."""
    world = ExecutorConfig.of(config).world_size
    async with _executor(config) as executor:
        await executor.check_health()
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.3,)))
        await asyncio.sleep(0)
        while not all(rank.method == "nap" for rank in (await executor.report()).ranks):
            pass
        began = time.monotonic()
        report = await executor.report()
        assert time.monotonic() - began < 0.3
        assert [rank.rank for rank in report.ranks] == list(range(world))
        await executor.check_health()
        await nap


async def death(config: Config) -> None:
    """A rank that is killed fails every call at once, by name, and the executor for good."""
    world = ExecutorConfig.of(config).world_size
    async with _executor(config, timeouts=_QUICK) as executor:
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
            assert (error.rank, error.signal) == (victim, "SIGKILL")
        await _raises(ExecutorFailed, executor.collective_rpc("rank"), f"rank {victim} died")
        assert causes == [executor.failure]


async def shutdown(config: Config) -> None:
    """Closing lets the calls in flight finish, is bounded by the limits, and may be done again."""
    executor = _executor(config)
    await executor.start()
    future = executor.execute_model("finishes")
    await executor.aclose()
    assert await future == "finishes"
    await executor.aclose()
    await _raises(ExecutorClosed, executor.collective_rpc("rank"), "closed")
    stuck = _executor(config, timeouts=_QUICK)
    await stuck.start()
    nap = asyncio.ensure_future(stuck.collective_rpc("nap", (3,)))
    await asyncio.sleep(0)
    began = time.monotonic()
    stuck.abort()
    await stuck.aclose()
    assert time.monotonic() - began < sum(_QUICK.values()) + 1
    await _raises(ExecutorClosed, nap, "aborted")


async def leaks(config: Config) -> None:
    """Ten executors, one after the other, leave no descriptor, task or process behind."""

    async def cycle() -> None:
        async with _executor(config) as executor:
            await executor.execute_model(1)

    await cycle()
    gc.collect()
    before = _resources()
    for _ in range(10):
        await cycle()
    gc.collect()
    assert _resources() == before


CHECKS: Mapping[str, Callable[[Config], Awaitable[None]]] = {
    check.__name__: check
    for check in (order, limits, cancellation, deadlines, errors, inspection, death, shutdown, leaks)
}
"""Every check by name; each takes an executor's configuration, and raises AssertionError."""


async def check_transport(config: Config) -> None:
    """Run every check on executors of this configuration; the first broken promise raises AssertionError."""
    for check in CHECKS.values():
        with anyio.fail_after(_BOUND):
            await check(config)


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


def _resources() -> tuple[int, int, int]:
    children = [task for task in os.listdir("/proc/self/task") if os.path.exists(f"/proc/self/task/{task}/children")]
    return len(descriptors()), len(asyncio.all_tasks()), sum(map(_children, children))


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


def _children(task: str) -> int:
    with open(f"/proc/self/task/{task}/children") as file:
        return len(file.read().split())
