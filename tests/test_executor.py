"""What an executor promises, on every transport and layout alike."""

import asyncio
import gc
import threading
from typing import Any

import anyio
import numpy as np
import pytest
import uvloop
import workers

from asyncexec import (
    AggregationError,
    AllRanks,
    ConfigError,
    Executor,
    ExecutorBusy,
    ExecutorClosed,
    ExecutorFailed,
    FirstRank,
    PayloadError,
    StepTimeout,
    WorkerDied,
    WorkerError,
    WorkerStartError,
    create_executor,
)
from asyncexec.registry import load_transport
from asyncexec.testing import Recorder
from asyncexec.wire import Frame, FrameKind

pytestmark = pytest.mark.usefixtures("no_leftovers")
Layout = dict[str, Any]


def echo(layout: Layout, **config: Any) -> Executor:
    return create_executor(layout | config, "workers:EchoWorker", worker_kwargs={"greeting": "good day"})


async def test_steps_and_calls(layout: Layout, world_size: int) -> None:
    async with echo(layout) as executor:
        future = executor.execute_model({"any": "thing"})
        assert not future.done()
        assert await future == {"any": "thing"}
        assert await future == {"any": "thing"}, "a future can be awaited again"
        assert future.done()
        assert await executor.sample_tokens(7) == 107
        assert await executor.collective_rpc("rank") == list(range(world_size))
        assert await executor.collective_rpc("greet", ("you",), {"loud": True}) == ["GOOD DAY, YOU"] * world_size
        assert await executor.collective_rpc("rank", aggregate=FirstRank()) == world_size - layout.get(
            "tensor_parallel_size", 1
        )
        await executor.check_health()


async def test_values_arrive_whole(layout: Layout) -> None:
    big = np.random.default_rng(1).random(400_000)
    async with echo(layout) as executor:
        assert (await executor.collective_rpc("typed", (workers.Item(1, [2.0]),)))[0] == workers.Item(2, [2.0, 0.5])
        assert (await executor.collective_rpc("untyped", (1, {2}), {"a": (3,)}))[0] == ((1, {2}), {"a": (3,)})
        for received in await executor.collective_rpc("add_one", (big,)):
            assert np.array_equal(received, big + 1)
        assert (await executor.collective_rpc("double_bytes", (b"x" * 300_000,)))[0] == b"x" * 600_000
        assert np.array_equal(await executor.execute_model(big[:100_000]), big[:100_000])
        ranks = await executor.collective_rpc(lambda worker, offset: worker.rank() + offset, (10,))
        assert ranks == list(range(10, 10 + len(ranks)))


async def test_the_scheduler_output_may_change_after_submission(layout: Layout) -> None:
    async with echo(layout) as executor:
        value = {"tokens": [1, 2]}
        futures = [executor.execute_model(value)]
        value["tokens"].append(3)
        futures.append(executor.execute_model(value))
        assert [await future for future in futures] == [{"tokens": [1, 2]}, {"tokens": [1, 2, 3]}]


async def test_some_ranks(world_size: int, layout: Layout) -> None:
    async with echo(layout) as executor:
        assert await executor.collective_rpc("rank", ranks=[world_size - 1]) == [world_size - 1]
        backwards = list(reversed(range(world_size)))
        assert await executor.collective_rpc("rank", ranks=backwards) == backwards
        for ranks in ([], [world_size], [-1], [0, 0]):
            with pytest.raises(ConfigError, match=r"ranks is .*; valid: some of"):
                await executor.collective_rpc("rank", ranks=ranks)


async def test_steps_run_in_order_and_wait_for_a_slot(layout: Layout) -> None:
    async with echo(layout, max_concurrent_batches=2, max_queued_steps=3) as executor:
        assert executor.max_concurrent_batches == 2
        futures = [executor.execute_model(n) for n in range(5)]
        with pytest.raises(ExecutorBusy, match=r"await executor.slot"):
            executor.execute_model(5)
        assert [await future for future in futures] == list(range(5))
        for n in range(20):
            await executor.slot()
            futures.append(executor.execute_model(n))
        assert [await future for future in futures[5:]] == list(range(20))


async def test_aggregators(layout: Layout, world_size: int) -> None:
    async with echo(layout, aggregator="all") as executor:
        outputs = await executor.execute_model(1)
        assert outputs[executor_output_rank(layout)] == 1
        assert len(outputs) == world_size


@pytest.mark.parametrize("method", ["begin", "add", "finish"])
async def test_an_aggregator_that_raises_fails_its_step_alone(layout: Layout, world_size: int, method: str) -> None:
    class Broken(AllRanks):
        fails = True

    def fail(self: Broken, *args: Any) -> Any:
        if Broken.fails:
            raise ZeroDivisionError("cannot merge")
        return getattr(AllRanks, method)(self, *args)

    setattr(Broken, method, fail)
    broken = Broken()
    async with create_executor(layout, workers.EchoWorker) as executor:
        with pytest.raises(AggregationError, match="ZeroDivisionError: cannot merge"):
            await executor.collective_rpc("rank", aggregate=broken)
        Broken.fails = False
        assert await executor.collective_rpc("rank", aggregate=broken) == list(range(world_size))


async def test_aggregators_by_method(layout: Layout, world_size: int) -> None:
    by_method = {"execute_model": "all", "rank": "first"}
    async with echo(layout, aggregator=by_method) as executor:
        assert len(await executor.execute_model(1)) == world_size
        assert await executor.sample_tokens(1) == 101
        assert await executor.collective_rpc("rank") == executor_output_rank(layout)
        assert await executor.collective_rpc("pid", aggregate=AllRanks()) == await executor.collective_rpc("pid")


def test_an_object_that_is_no_aggregator_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"aggregator is .*; valid: an object with the methods of Aggregator"):
        create_executor({"transport": "local"}, workers.EchoWorker, aggregator="first")  # type: ignore[arg-type]


def executor_output_rank(layout: Layout) -> int:
    return int(layout.get("tensor_parallel_size", 1) * (layout.get("pipeline_parallel_size", 1) - 1))


async def test_every_step_is_aggregated_once_and_in_order_whoever_awaits(layout: Layout) -> None:
    aggregator = Recorder()
    async with create_executor(layout, workers.EchoWorker, aggregator=aggregator) as executor:
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.2,)))  # the steps wait behind it
        await asyncio.sleep(0)
        executor.execute_model(0)  # nobody holds this future
        cancelled = asyncio.ensure_future(asyncio.wait_for(executor.execute_model(1), 60))
        await asyncio.sleep(0)
        cancelled.cancel()
        last = executor.execute_model(2)
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await last == 2
        await nap
    assert aggregator.seen == [0, 1, 2]


@pytest.mark.parametrize("how", ["anyio", "asyncio", "task"])
async def test_abandoning_an_await_harms_nothing(layout: Layout, how: str) -> None:
    async with echo(layout) as executor:
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.2,)))
        await asyncio.sleep(0)
        future = executor.execute_model("still comes")
        if how == "anyio":
            with anyio.move_on_after(0.01) as scope:
                await future
            assert scope.cancelled_caught
        elif how == "asyncio":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await future
        else:
            task = asyncio.ensure_future(asyncio.wait_for(future, None))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not future.done()
        assert await future == "still comes"
        assert await executor.execute_model("next") == "next"
        await nap


async def test_a_deadline_fails_the_call_and_nothing_else(layout: Layout, world_size: int) -> None:
    async with echo(layout, timeouts={"methods": {"nap": 0.05}}) as executor:
        with pytest.raises(StepTimeout, match=r"nap took longer than 0.05 s") as caught:
            await executor.collective_rpc("nap", (0.3,))
        assert caught.value.waiting_for == tuple(range(world_size))
        assert isinstance(caught.value, TimeoutError)
        assert await executor.collective_rpc("rank") == list(range(world_size))
        future = executor.execute_model(1, timeout=30)
        await executor.collective_rpc("nap", (0.1,), timeout=5)
        assert await future == 1


async def test_a_worker_that_raises(layout: Layout, world_size: int) -> None:
    async with echo(layout) as executor:
        with pytest.raises(WorkerError, match="ValueError: oh no") as caught:
            await executor.collective_rpc("fail", ("oh no",))
        error = caught.value
        assert (error.remote_type, error.remote_message, error.method) == ("ValueError", "oh no", "fail")
        assert error.rank in range(world_size)
        assert "raise ValueError(message)" in error.remote_traceback
        last = world_size - 1
        with pytest.raises(WorkerError, match=f"rank {last} does not like this") as caught:
            await executor.collective_rpc("fail_on", (last,))
        assert caught.value.rank == last
        with pytest.raises(WorkerError, match=r"no surrogates: .ud800"):
            await executor.collective_rpc("fail_strangely")
        assert await executor.execute_model("usable") == "usable"
        assert executor.failure is None


async def test_what_cannot_be_sent_fails_alone(layout: Layout) -> None:
    async with echo(layout, max_frame_bytes=100_000) as executor:
        with pytest.raises(PayloadError, match=r"cannot be sent: .*lock"):
            executor.execute_model(threading.Lock())
        with pytest.raises(PayloadError, match=r"the arguments are 200\d+ bytes; max_frame_bytes is 100000"):
            executor.execute_model(np.zeros(200_000, np.uint8))
        with pytest.raises(WorkerError, match="lock"):
            await executor.collective_rpc("unpicklable")
        with pytest.raises(WorkerError, match=r"the results are 1[0-9]{5} bytes; max_frame_bytes is 100000"):
            await executor.collective_rpc("double_bytes", (b"x" * 60_000,))
        with pytest.raises(ConfigError, match="no method 'nothing'"):
            await executor.collective_rpc("nothing")
        with pytest.raises(WorkerError, match="Expected `str`, got `int`"):
            await executor.collective_rpc("greet", (3,))
        assert await executor.execute_model(1) == 1


async def test_deferred_outputs_do_not_hold_up_the_rank() -> None:
    for transport in ("local", "nccl"):
        config = {"transport": transport, "async_scheduling": True, "options": {"nccl": {"backend": "none"}}}
        async with create_executor(config, workers.DeferringWorker) as executor:
            first, second, third = (executor.execute_model(n) for n in (5, -6, 7))
            assert await first == 5, "it is there only once the second has been started"
            with pytest.raises(WorkerError, match="-6 went wrong late"):
                await second
            assert await third == 7
            assert first.timing is not None


async def test_a_deferred_output_that_nobody_wants_is_not_waited_for() -> None:
    config = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}
    async with create_executor(config, workers.ReadyOnRankZero) as executor:
        assert [await executor.execute_model(n) for n in range(3)] == [0, 1, 2]


async def test_timings_add_up(layout: Layout) -> None:
    async with echo(layout) as executor:
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.05,)))
        await asyncio.sleep(0)
        future = executor.execute_model(1)
        timings = [future.timing]
        await future
        await nap
        timings.append(future.timing)
        before, timing = timings
        assert before is None
        assert timing is not None
        parts = (timing.queued, timing.driver, timing.wire, timing.worker, timing.aggregate)
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(timing.total)
        assert timing.queued + timing.worker > 0.03, "most of it was waiting for the nap"


async def test_the_view_for_other_threads(layout: Layout) -> None:
    async with echo(layout) as executor:
        called = threading.Event()
        view = executor.execute_model("a").concurrent()
        view.add_done_callback(lambda _: called.set())
        assert await asyncio.to_thread(view.result, 30) == "a"
        assert await asyncio.to_thread(called.wait, 30)
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.1,)))
        await asyncio.sleep(0)
        future = executor.execute_model("b")
        view = future.concurrent()
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(view.result, 0.01)
        cancelled = future.concurrent()
        assert cancelled.cancel()
        assert await asyncio.to_thread(view.result, 30) == "b"
        done = future.concurrent()
        assert await asyncio.to_thread(done.result, 30) == "b"
        await nap


async def test_calls_belong_to_the_loops_thread(layout: Layout) -> None:
    async with echo(layout) as executor:
        with pytest.raises(RuntimeError, match="thread of their event loop"):
            await asyncio.to_thread(executor.execute_model, 1)


async def test_lifecycle(layout: Layout) -> None:
    executor = echo(layout)
    with pytest.raises(ExecutorClosed, match="has not been started"):
        executor.execute_model(1)
    await executor.start()
    with pytest.raises(ExecutorClosed, match="starts once"):
        await executor.start()
    waiting = executor.execute_model("finishes first")
    await asyncio.gather(executor.aclose(), executor.aclose())
    assert await waiting == "finishes first"
    with pytest.raises(ExecutorClosed, match="is closed"):
        executor.execute_model(1)
    with pytest.raises(ExecutorClosed, match="is closed"):
        await executor.slot()
    await executor.aclose()
    never_started = echo(layout)
    await never_started.aclose()
    never_started.abort()


async def test_leaving_by_an_exception_does_not_wait(layout: Layout) -> None:
    executor = echo(layout, timeouts={"stop": 0.5, "terminate": 0.5})

    async def leave() -> None:
        async with executor:
            naps.append(asyncio.ensure_future(executor.collective_rpc("nap", (0.5,))))
            await asyncio.sleep(0)
            raise ZeroDivisionError

    naps: list[asyncio.Future[Any]] = []
    with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
        await leave()
    with pytest.raises(ExecutorClosed, match="aborted"):
        await naps[0]


async def test_a_failing_call_that_nobody_awaits_makes_no_noise(
    layout: Layout, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    async with create_executor(layout, workers.FussyStages) as executor:
        executor.execute_model(0)
        assert await executor.collective_rpc(lambda worker: None)
        gc.collect()
    assert caplog.records == []
    assert [w for w in recwarn if "never" in str(w.message)] == []


async def test_steps_leave_nothing_to_the_garbage_collector(layout: Layout) -> None:
    async with create_executor(layout, workers.EchoWorker) as executor:
        await executor.execute_model(0)
        gc.collect()
        gc.disable()
        try:
            for number in range(50):
                await executor.execute_model(number)
            assert gc.collect() < 50, "each step leaves a cycle"
        finally:
            gc.enable()


async def test_a_worker_that_cannot_be_constructed(layout: Layout, world_size: int) -> None:
    rank = world_size - 1
    with pytest.raises(WorkerStartError, match=f"RuntimeError: no luck on rank {rank}") as caught:
        async with create_executor(layout, workers.FailsToStart, worker_kwargs={"rank": rank}):
            pytest.fail("it started")
    assert caught.value.rank == rank
    assert "raise RuntimeError" in caught.value.remote_traceback
    with pytest.raises(WorkerStartError, match="unexpected keyword argument 'size'"):
        async with create_executor(layout, workers.FailsToStart, worker_kwargs={"size": rank}):
            pytest.fail("it started")


def run_on(loop: str, main: Any) -> Any:
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_both_event_loops(layout: Layout, loop: str) -> None:
    async def main() -> Any:
        async with echo(layout) as executor:
            big = np.ones(100_000)
            outputs = [executor.execute_model(big) for _ in range(6)]
            sums = [float((await output).sum()) for output in outputs]
            with pytest.raises(StepTimeout):
                await executor.collective_rpc("nap", (0.1,), timeout=0.01)
            return sums

    assert run_on(loop, main()) == [100_000.0] * 6


async def test_many_executors_in_one_process(world_size: int, layout: Layout) -> None:
    async with echo(layout) as one, echo({"transport": "local"}) as two, echo(layout) as three:
        futures = [(n, executor.execute_model(n)) for n in range(30) for executor in (one, two, three)]
        for n, future in futures:
            assert await future == n


async def test_a_rank_that_exits_fails_everything(layout: Layout, world_size: int) -> None:
    if layout["transport"] == "local":
        pytest.skip("transport 'local' runs its rank in this process, which os._exit would end")
    rank = world_size - 1
    async with echo(layout) as executor:
        causes: list[Exception] = []
        executor.add_failure_callback(causes.append)
        running = [executor.collective_rpc("exit", (3,), ranks=[rank])]
        if rank > 0:
            running.append(executor.collective_rpc("nap", (60,), ranks=[0]))
        tasks = [asyncio.ensure_future(call) for call in running]
        await asyncio.sleep(0)
        for awaitable in (*tasks, *(executor.execute_model(n) for n in range(3))):
            with pytest.raises(WorkerDied, match=f"rank {rank} died: exited with status 3") as caught:
                await awaitable
            assert (caught.value.rank, caught.value.exit_code) == (rank, 3)
        assert executor.failure is not None
        late: list[Exception] = []
        executor.add_failure_callback(late.append)
        assert causes == late == [executor.failure]
        with pytest.raises(ExecutorFailed, match="exited with status 3"):
            executor.execute_model(3)


@pytest.mark.parametrize(("aggregator", "replies"), [("first", 1), ("kv", 4)])
async def test_ranks_whose_outputs_nobody_needs_send_none(aggregator: str, replies: int) -> None:
    received: list[tuple[FrameKind, int]] = []

    class Counting(load_transport("nccl")):  # type: ignore[misc]
        def __init__(self, config: Any, options: Any, events: Any) -> None:
            super().__init__(config, options, self)
            self.told = events

        def frame_received(self, rank: int, frame: Frame) -> None:
            received.append((frame.kind, rank))
            self.told.frame_received(rank, frame)

        def rank_lost(self, rank: int, loss: Any) -> None:
            self.told.rank_lost(rank, loss)

    layout = {"transport": "nccl", "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "aggregator": aggregator}
    config = layout | {"options": {"nccl": {"backend": "none"}}}
    async with create_executor(config, workers.EchoWorker, transport=Counting) as executor:
        await executor.collective_rpc("rank")
        received.clear()
        for n in range(10):
            await executor.execute_model(n)
        await executor.collective_rpc("rank", ranks=[2])
    assert len(received) == 10 * replies + 1
    assert {rank for _, rank in received} == ({2} if replies == 1 else {0, 1, 2, 3})
