"""Pipeline stages: tensors rank to rank, steps that overlap, and stages that fail."""

import time
from typing import Any

import numpy as np
import pytest
import workers

from asyncexec import WorkerError, create_executor

pytestmark = pytest.mark.usefixtures("no_leftovers")


def stages(count: int, **config: Any) -> dict[str, Any]:
    return {"transport": "nccl", "pipeline_parallel_size": count, "options": {"nccl": {"backend": "none"}}} | config


async def test_tensors_go_through_every_stage() -> None:
    async with create_executor(stages(3), workers.SleepyStages, worker_kwargs={"seconds": 0.0}) as executor:
        futures = [executor.execute_model(n) for n in range(20)]
        assert [await future for future in futures] == [3 * n for n in range(20)]


async def test_with_tensor_parallelism_each_rank_hands_on_to_its_own() -> None:
    config = stages(2, tensor_parallel_size=2, aggregator="all")
    async with create_executor(config, workers.RankTrail) as executor:
        assert await executor.execute_model(None) == [None, None, [0, 2], [1, 3]]


async def test_large_tensors_do_not_hold_up_the_sender_and_may_be_overwritten() -> None:
    size = 1_000_000
    async with create_executor(stages(2), workers.LargeHop, worker_kwargs={"size": size}) as executor:
        futures = [executor.execute_model(n) for n in range(8)]
        assert [await future for future in futures] == [float(n * size) for n in range(8)]


async def test_two_steps_in_flight_overlap() -> None:
    """Equal stages: n steps take n + 1 stage times with two in flight, and 2 n with one."""
    times = {}
    for in_flight in (1, 2):
        config = stages(2, max_concurrent_batches=in_flight)
        async with create_executor(config, workers.SleepyStages, worker_kwargs={"seconds": 0.02}) as executor:
            await executor.execute_model(0)
            began = time.monotonic()
            futures = [executor.execute_model(n) for n in range(50)]
            assert [await future for future in futures] == [2 * n for n in range(50)]
            times[in_flight] = time.monotonic() - began
    assert times[2] <= 0.6 * times[1], times


@pytest.mark.parametrize("aggregator", ["first", "all"])
@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_a_stage_that_fails_fails_its_step_alone(stage: int, aggregator: str) -> None:
    async with create_executor(stages(3, aggregator=aggregator), workers.FussyStages) as executor:
        futures = [executor.execute_model(which) for which in (None, stage, None, stage)]
        expected = "fine" if aggregator == "first" else ["passed on", "passed on", "fine"]
        for future, fails in zip(futures, (False, True, False, True), strict=True):
            if fails:
                with pytest.raises(WorkerError, match=f"stage {stage} fails") as caught:
                    await future
                assert caught.value.rank == stage
            else:
                assert await future == expected


async def test_a_stage_that_hands_nothing_on_is_told_what_is_valid() -> None:
    async with create_executor(stages(2), workers.WrongStage) as executor:
        with pytest.raises(WorkerError, match="returned int; every stage but the last returns IntermediateTensors"):
            await executor.execute_model(1)


async def test_what_is_no_tensor_cannot_be_handed_on() -> None:
    async with create_executor(stages(2), workers.HandsOn, worker_kwargs={"value": "text"}) as executor:
        with pytest.raises(WorkerError, match="intermediate tensor 'x' is a str; valid: a tensor or an array"):
            await executor.execute_model(1)
    async with create_executor(
        stages(2), workers.HandsOn, worker_kwargs={"value": np.array([1.5], np.float32)}
    ) as executor:
        assert await executor.execute_model(1) == 1.5
