"""The demo engine with a KV connector on its ranks: each report reaches the engine once, whoever awaits the steps."""

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from asyncexec import IntermediateTensors, KVConnectorOutput, RankContext, StepFuture, create_executor
from asyncexec.demo.checkpoint import ModelConfig
from asyncexec.demo.engine import AsyncEngine
from asyncexec.demo.messages import StepInput, StepOutput
from asyncexec.demo.random_checkpoint import write_random_checkpoint
from asyncexec.demo.tokenizer import ByteTokenizer
from asyncexec.demo.worker import ModelWorker

RANKS = 4
LONGEST_TRANSFER = 9


class ConnectedOutput(StepOutput, frozen=True):
    kv_connector_output: Any = None


def finishes(transfer: int, rank: int) -> int:
    """The step in which a rank has sent its part of a transfer, one of which begins in every step."""
    return transfer + random.Random(f"{transfer} {rank}").randrange(LONGEST_TRANSFER)


def connected_worker() -> type:
    """A worker with a connector that sends one request's cache after the other; it travels by value."""

    class ConnectedWorker(ModelWorker):
        def __init__(self, context: RankContext, *, model: str) -> None:
            super().__init__(context, model=model)
            self._rank, self._steps = context.rank, 0

        def execute_model(self, scheduler_output: StepInput, intermediate: Any) -> Any:
            output = super().execute_model(scheduler_output, intermediate)
            now, self._steps = self._steps, self._steps + 1
            began = range(max(0, now - LONGEST_TRANSFER), now + 1)
            done = {f"transfer-{n}" for n in began if finishes(n, self._rank) == now}
            report = KVConnectorOutput(finished_sending=done) if done else None
            if isinstance(output, IntermediateTensors):
                return IntermediateTensors(output.tensors, output=ConnectedOutput([], report))
            assert isinstance(output, StepOutput)
            return ConnectedOutput(output.token_ids, report)

    return ConnectedWorker


@pytest.mark.timeout(300)
async def test_every_finished_transfer_is_reported_once_whoever_awaits_the_steps(tmp_path: Path) -> None:
    directory = write_random_checkpoint(tmp_path / "model", seed=0)
    config = {"transport": "nccl", "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "aggregator": "kv"}
    kwargs = {"model": str(directory)}
    noise, futures, onlookers = random.Random(1), list[StepFuture[Any]](), list[asyncio.Task[Any]]()

    async def look(future: StepFuture[Any]) -> Any:
        return await future

    async with create_executor(config, connected_worker(), worker_kwargs=kwargs) as executor:
        step = executor.execute_model

        def observed(*args: Any, **more: Any) -> StepFuture[Any]:
            """Submit a step, and have some tasks await it that are cancelled at random moments."""
            futures.append(step(*args, **more))
            for _ in range(3):
                onlookers.append(task := asyncio.ensure_future(look(futures[-1])))
                if noise.random() < 0.7:
                    asyncio.get_running_loop().call_later(noise.uniform(0, 0.01), task.cancel)
            return futures[-1]

        executor.execute_model = observed  # type: ignore[method-assign]
        async with AsyncEngine(executor, ModelConfig.from_directory(directory), ByteTokenizer()) as engine:

            async def generate(number: int) -> None:
                count = 0
                async for _ in engine.generate([number + 1] * 5, max_tokens=60, ignore_eos=True):
                    count += 1
                    if number % 3 == 2 and count == 10:
                        return  # which aborts the request

            await asyncio.gather(*map(generate, range(9)))
        await asyncio.wait(onlookers)
        reported = Counter[str]()
        for future in futures:
            report = getattr(await future, "kv_connector_output", None)
            reported.update(report.finished_sending or () if report else ())
    assert sum(task.cancelled() for task in onlookers) > 20
    last_step = {f"transfer-{n}": max(finishes(n, rank) for rank in range(RANKS)) for n in range(len(futures))}
    assert reported == Counter(name for name, last in last_step.items() if last < len(futures))
    assert reported.total() > 50
