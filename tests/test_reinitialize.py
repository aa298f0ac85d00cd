"""Running executors change their parallel sizes: all or nothing."""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import workers

from asyncexec import (
    ConfigError,
    Executor,
    ExecutorBusy,
    ExecutorClosed,
    ExecutorConfig,
    ExecutorFailed,
    KVOutputAggregator,
    ReconfigureDistributedRequest,
    StepTimeout,
    WorkerDied,
    WorkerStartError,
    create_executor,
)
from asyncexec_nccl import NcclTransport

pytestmark = pytest.mark.usefixtures("no_leftovers")
QUICK = {"drain": 0.3, "stop": 0.5, "terminate": 0.3}


Layouts = Callable[..., dict[str, Any]]


@pytest.fixture(params=["nccl", "ray"])
def make(request: pytest.FixtureRequest) -> Layouts:
    """Configurations of one transport by their sizes."""
    name = request.param
    if name == "ray":
        request.getfixturevalue("ray_cluster")

    def config(tp: int, pp: int, backend: str = "none", **more: Any) -> dict[str, Any]:
        sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        return {"transport": name, "options": {name: {"backend": backend}}} | sizes | more

    return config


def sizes(tp: int, pp: int) -> ReconfigureDistributedRequest:
    return ReconfigureDistributedRequest(tensor_parallel_size=tp, pipeline_parallel_size=pp)


async def require_layout(executor: Executor, tp: int, pp: int) -> None:
    """All ranks know their places, and a step passes through all stages."""
    places = await executor.collective_rpc("place")
    assert [(p["tp"], p["pp"], p["world"]) for p in places] == [(r % tp, r // tp, tp * pp) for r in range(tp * pp)]
    assert await executor.execute_model(7) == 7 + sum(range(pp)) * 10
    assert executor.config.world_size == tp * pp


async def test_ranks_come_stay_and_go(make: Layouts) -> None:
    async with create_executor(make(1, 2), workers.Movable) as executor:
        pids = await executor.collective_rpc("pid")
        await require_layout(executor, 1, 2)
        assert executor.max_concurrent_batches == 2
        await executor.reinitialize_distributed(sizes(2, 2))
        await require_layout(executor, 2, 2)
        more = await executor.collective_rpc("pid")
        assert more[:2] == pids
        assert await executor.collective_rpc("moves") == [1, 1, 0, 0], "the workers that stayed were told"
        await executor.reinitialize_distributed(sizes(1, 1))
        await require_layout(executor, 1, 1)
        assert executor.max_concurrent_batches == 1
        assert await executor.collective_rpc("pid") == pids[:1]
        for pid in more[1:]:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert executor.counters.late + executor.counters.lost + executor.counters.wrong_epoch == 0
        assert executor.execute_model(0).call_id > 0


async def test_process_groups_are_made_anew(make: Layouts) -> None:
    async with create_executor(make(2, 1, "gloo"), workers.MovableSum) as executor:
        assert await executor.collective_rpc("total") == [3, 3]
        await executor.reinitialize_distributed(sizes(3, 1))
        assert await executor.collective_rpc("total") == [6, 6, 6]
        await executor.reinitialize_distributed(sizes(2, 1))
        assert await executor.collective_rpc("total") == [3, 3]


async def test_workers_without_the_method_are_constructed_anew(make: Layouts) -> None:
    async with create_executor(make(1, 1), workers.EchoWorker) as executor:
        pids = await executor.collective_rpc("pid")
        await executor.execute_model(1)
        await executor.reinitialize_distributed(sizes(2, 1))
        assert (await executor.collective_rpc("pid"))[:1] == pids
        assert await executor.sample_tokens(5) == 5, "a new worker has run no step"


@pytest.mark.parametrize("at", ["a rank that stays", "a new rank"])
async def test_a_worker_that_cannot_move_leaves_everything_as_it_was(make: Layouts, at: str) -> None:
    kwargs = {"refuses": (0 if at == "a rank that stays" else 2, 3)}
    async with create_executor(make(2, 1, timeouts=QUICK), workers.Movable, worker_kwargs=kwargs) as executor:
        pids = await executor.collective_rpc("pid")
        for _ in range(2):
            with pytest.raises(WorkerStartError, match="this rank refuses"):
                await executor.reinitialize_distributed(sizes(3, 1))
            await require_layout(executor, 2, 1)
            assert await executor.collective_rpc("pid") == pids
        await executor.reinitialize_distributed(sizes(4, 1))
        await require_layout(executor, 4, 1)


async def test_a_new_rank_that_dies_leaves_everything_as_it_was(make: Layouts) -> None:
    config = make(1, 1, timeouts=QUICK)
    async with create_executor(config, workers.Movable, worker_kwargs={"dies": 1}) as executor:
        with pytest.raises(WorkerDied, match="rank 1 died: exited with status 9"):
            await executor.reinitialize_distributed(sizes(2, 1))
        await require_layout(executor, 1, 1)
        assert executor.failure is None


async def test_a_new_rank_that_dies_before_it_is_up_is_named() -> None:
    class DiesAtOnce(NcclTransport):
        async def open(self, config: ExecutorConfig) -> None:
            await super().open(config)
            if config.world_size == 2:
                self._ranks[1].process.signal(signal.SIGKILL)

    config = {"options": {"nccl": {"backend": "none"}}, "timeouts": QUICK}
    async with create_executor(config, workers.Movable, transport=DiesAtOnce) as executor:
        for _ in range(5):
            with pytest.raises(WorkerDied, match="rank 1 died: killed by SIGKILL"):
                await executor.reinitialize_distributed(sizes(2, 1))
        await require_layout(executor, 1, 1)


async def test_a_rank_that_cannot_go_back_fails_the_executor(make: Layouts) -> None:
    kwargs = {"refuses": (0, 2), "for_good": True}
    async with create_executor(make(1, 1, timeouts=QUICK), workers.Movable, worker_kwargs=kwargs) as executor:
        with pytest.raises(WorkerStartError, match="this rank refuses"):
            await executor.reinitialize_distributed(sizes(2, 1))
        with pytest.raises(ExecutorFailed, match="and so did going back"):
            executor.execute_model(1)


async def test_an_old_rank_that_dies_meanwhile_fails_the_executor(make: Layouts) -> None:
    async with create_executor(make(2, 1, timeouts=QUICK), workers.Movable, worker_kwargs={"slow": 30.0}) as executor:
        pids = await executor.collective_rpc("pid")
        moving = asyncio.ensure_future(executor.reinitialize_distributed(sizes(1, 1)))
        while (await executor.report()).ranks[0].method != "start":
            pass
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(WorkerDied, match="rank 0 died"):
            await moving
        assert isinstance(executor.failure, WorkerDied)


async def test_what_was_submitted_before_finishes_first_and_the_rest_waits(make: Layouts) -> None:
    async with create_executor(make(2, 1), workers.Movable) as executor:
        steps = [executor.execute_model(n) for n in range(5)]
        moving = asyncio.ensure_future(executor.reinitialize_distributed(sizes(1, 1)))
        await asyncio.sleep(0)
        with pytest.raises(ExecutorBusy, match="is being re-initialised"):
            executor.execute_model(9)
        await executor.slot()
        assert executor.config.world_size == 1
        await moving
        assert [await step for step in steps] == list(range(5))
        assert await executor.execute_model(9) == 9


async def test_calls_that_do_not_end_keep_the_layout(make: Layouts) -> None:
    async with create_executor(make(2, 1, timeouts=QUICK), workers.Movable) as executor:
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.8,)))
        await asyncio.sleep(0)
        with pytest.raises(StepTimeout, match=r"not done within 0\.3 s"):
            await executor.reinitialize_distributed(sizes(1, 1))
        await nap
        await require_layout(executor, 2, 1)


async def test_a_cancellation_waits_until_it_is_done(make: Layouts) -> None:
    async with create_executor(make(1, 1), workers.Movable) as executor:
        moving = asyncio.ensure_future(executor.reinitialize_distributed(sizes(2, 1)))
        await asyncio.sleep(0.01)
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
        await require_layout(executor, 2, 1)


async def test_closing_meanwhile_ends_everything(make: Layouts) -> None:
    async with create_executor(make(1, 1, timeouts=QUICK), workers.Movable, worker_kwargs={"slow": 30.0}) as executor:
        moving = asyncio.ensure_future(executor.reinitialize_distributed(sizes(2, 1)))
        await asyncio.sleep(0.2)
        await executor.aclose()
        with pytest.raises(ExecutorClosed):
            await moving


@pytest.mark.parametrize("how", ["close", "abort", "death"])
async def test_an_end_while_calls_finish_starts_no_ranks(make: Layouts, how: str) -> None:
    async with create_executor(make(1, 1, timeouts=QUICK | {"drain": 30.0}), workers.Movable) as executor:
        [pid] = await executor.collective_rpc("pid")
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (60.0,)))
        await asyncio.sleep(0)
        moving = asyncio.ensure_future(executor.reinitialize_distributed(sizes(2, 1)))
        await asyncio.sleep(0)
        if how == "death":
            os.kill(pid, signal.SIGKILL)
        elif how == "abort":
            executor.abort()
        else:
            await executor.aclose()
        for awaitable in (nap, moving):
            with pytest.raises(WorkerDied if how == "death" else ExecutorClosed):
                await awaitable


async def test_leaving_closes_the_executor(make: Layouts) -> None:
    async with create_executor(make(2, 1), workers.Movable) as executor:
        await executor.reinitialize_distributed(ReconfigureDistributedRequest(leave=True))
        with pytest.raises(ExecutorClosed):
            executor.execute_model(1)


async def test_impossible_sizes_are_refused(layout: dict[str, Any]) -> None:
    async with create_executor(layout, workers.EchoWorker) as executor:
        with pytest.raises(ConfigError, match="tensor_parallel_size is 0"):
            await executor.reinitialize_distributed(sizes(0, 1))
        if layout["transport"] == "local":
            with pytest.raises(ConfigError, match="runs one rank"):
                await executor.reinitialize_distributed(sizes(2, 1))
        assert await executor.execute_model(1) == 1


async def test_the_aggregator_waits_no_longer_for_ranks_that_left(make: Layouts) -> None:
    aggregator = KVOutputAggregator()
    async with create_executor(make(2, 1), workers.Sender, aggregator=aggregator) as executor:
        await executor.execute_model([0])
        assert [transfer.missing for transfer in aggregator.pending()] == [[1]]
        await executor.reinitialize_distributed(sizes(1, 1))
        output = await executor.execute_model([])
        assert output.kv_connector_output.finished_sending == {"request"}
