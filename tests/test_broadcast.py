"""Tensors of the driver for every rank, in buckets."""

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import torch

from asyncexec import (
    ConfigError,
    Executor,
    IntermediateTensors,
    RankContext,
    StepTimeout,
    WorkerError,
    create_executor,
)
from asyncexec.buckets import cut

pytestmark = pytest.mark.usefixtures("no_leftovers")


NCCL: dict[str, Any] = {"transport": "nccl", "options": {"nccl": {"backend": "none"}}}


class Receiver:
    """Keeps what it is given, and how it came."""

    def __init__(self, context: RankContext) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.buckets: list[list[str]] = []
        self.last = context.is_last_stage

    def execute_model(self, scheduler_output: str, intermediate: Any) -> Any:
        return float(self.weights[scheduler_output].sum()) if self.last else IntermediateTensors({})

    def load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        if "bad" in named_tensors:
            raise ValueError("a bad tensor")
        self.buckets.append(list(named_tensors))
        self.weights |= {name: tensor.clone() for name, tensor in named_tensors.items()}

    def facts(self, name: str) -> tuple[str, list[int], float]:
        tensor = self.weights[name]
        return str(tensor.dtype), list(tensor.shape), float(tensor.double().sum())


class SlowReceiver(Receiver):
    """Looks at its weights late."""

    def load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        time.sleep(0.05)
        super().load_weights(named_tensors)

    def replace_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        super().load_weights(named_tensors)


def tensors() -> dict[str, torch.Tensor]:
    made = {f"layer {n}": torch.full((100, n + 1), float(n)) for n in range(12)}
    made |= {"half": torch.ones(33, dtype=torch.bfloat16), "none": torch.empty(0, 3), "one": torch.tensor(5)}
    return made | {"large": torch.arange(5000.0), "turned": torch.arange(6.0).reshape(2, 3).t(), "tail": torch.ones(2)}


@pytest.mark.parametrize("bucket_bytes", [1, 2049, 1 << 20])
async def test_every_rank_gets_every_tensor(layout: dict[str, Any], world_size: int, bucket_bytes: int) -> None:
    sent, told = tensors(), list[int]()
    async with create_executor(layout, Receiver) as executor:
        for _ in range(2):  # the memory is used again
            await executor.broadcast(sent, bucket_bytes=bucket_bytes, progress=told.append)
        for name, tensor in sent.items():
            expected = (str(tensor.dtype), list(tensor.shape), float(tensor.double().sum()))
            assert await executor.collective_rpc("facts", (name,)) == [expected] * world_size
        assert await executor.execute_model("large") == float(sent["large"].sum())
    assert told[-1] == told[len(told) // 2 - 1] == sum(tensor.nbytes for tensor in sent.values())


async def test_what_is_large_goes_alone_and_the_order_is_kept() -> None:
    sent = tensors()
    groups = [[name for name, _ in group] for group in cut(sent, 2048)]
    assert [name for group in groups for name in group] == list(sent)
    assert ["large"] in groups
    assert len(groups) < len(sent)


async def test_errors_are_the_callers(layout: dict[str, Any]) -> None:
    sent = {f"fine {n}": torch.ones(100) for n in range(5)} | {"bad": torch.ones(1)}
    sent |= {f"behind {n}": torch.ones(100) for n in range(5)}
    array: Any = np.ones(3)
    async with create_executor(layout, Receiver) as executor:
        with pytest.raises(WorkerError, match="a bad tensor"):
            await executor.broadcast(sent, bucket_bytes=400)
        with pytest.raises(TypeError, match="'array' is ndarray; valid: a torch tensor in host memory"):
            await executor.broadcast({"array": array})
        await executor.broadcast({"again": torch.ones(3)})
        assert await executor.execute_model("again") == 3.0


async def test_pairs_one_by_one() -> None:
    async with create_executor({"transport": "local"}, Receiver) as executor:
        await executor.broadcast((pair for pair in [("a", torch.ones(2))]), method="load_weights")
        assert await executor.execute_model("a") == 2.0


def numbered(name: str, value: float) -> dict[str, torch.Tensor]:
    return {f"{name}{n}": torch.full((1000,), value) for n in range(6)}


async def require_no_mix(executor: Executor) -> None:
    """Whatever was loaded has its own values."""
    loaded: dict[str, float] = (await executor.collective_rpc(sums))[0]
    assert {name: total for name, total in loaded.items() if total != (1000.0 if name[0] == "a" else 2000.0)} == {}


def sums(worker: Receiver) -> dict[str, float]:
    return {name: float(tensor.sum()) for name, tensor in worker.weights.items()}


async def test_two_at_once_do_not_mix() -> None:
    async with create_executor(NCCL, SlowReceiver) as executor:
        await asyncio.gather(
            *(executor.broadcast(numbered(*one), bucket_bytes=4096) for one in (("a", 1.0), ("b", 2.0)))
        )
        await require_no_mix(executor)


@pytest.mark.parametrize("limit", [None, 0.02])
async def test_one_that_ended_early_does_not_mix_with_the_next(limit: float | None) -> None:
    """Cancelled when a bucket is done, or too slow for its deadline."""

    async def first() -> None:
        def one_is_done(_: int) -> None:
            if limit is None:
                task.cancel()

        sending = executor.broadcast(numbered("a", 1.0), bucket_bytes=4096, progress=one_is_done)
        task = asyncio.ensure_future(sending)
        await task

    config = NCCL | ({"timeouts": {"methods": {"load_weights": limit}}} if limit else {})
    async with create_executor(config, SlowReceiver) as executor:
        with pytest.raises(asyncio.CancelledError if limit is None else StepTimeout):
            await first()
        await executor.broadcast(numbered("b", 2.0), method="replace_weights", bucket_bytes=4096)
        await require_no_mix(executor)


async def test_the_limit_is_that_of_the_method() -> None:
    config = NCCL | {"timeouts": {"rpc": 0.04, "methods": {"load_weights": 30.0, "sums": 30.0}}}
    async with create_executor(config, SlowReceiver) as executor:
        await executor.broadcast(numbered("a", 1.0))
        await require_no_mix(executor)


async def test_nothing_but_empty_tensors(layout: dict[str, Any]) -> None:
    async with create_executor(layout, Receiver) as executor:
        await executor.broadcast({"a": torch.empty(0), "b": torch.empty(0, 2)})
        assert (await executor.collective_rpc("facts", ("b",)))[0] == ("torch.float32", [0, 2], 0.0)
        with pytest.raises(ConfigError, match="bucket_bytes is 0; valid: whole numbers from 1"):
            await executor.broadcast({"a": torch.empty(0)}, bucket_bytes=0)
