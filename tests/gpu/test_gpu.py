"""The nccl transport on GPUs: placement, hops, deferred outputs, and what remains when a rank is killed."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import gpu_workers
import numpy as np
import pytest
import torch

from asyncexec import ExecutorFailed, ReconfigureDistributedRequest, WorkerDied, WorkerError, create_executor
from asyncexec.demo.checkpoint import ModelConfig
from asyncexec.demo.engine import AsyncEngine
from asyncexec.demo.random_checkpoint import write_random_checkpoint
from asyncexec.demo.tokenizer import ByteTokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_leftovers")]
HOP_BYTES = [1 << 26, 100_000, 0]
"""Rings that hold several steps, or a part of one; 0 has tensors go by NCCL."""

two_gpus = pytest.mark.gpu(2)
four_gpus = pytest.mark.gpu(4)


def nccl(tp: int = 1, pp: int = 1, **config: Any) -> dict[str, Any]:
    options = {"nccl": {"backend": "nccl"} | config.pop("options", {})}
    return {"transport": "nccl", "tensor_parallel_size": tp, "pipeline_parallel_size": pp, "options": options} | config


def used_memory() -> list[int]:
    """Bytes in use on each GPU, by whomever."""
    import pynvml  # type: ignore[import-not-found]

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]


async def until_freed(before: list[int], limit: float = 5.0) -> float:
    """Seconds until no GPU has 64 MiB more in use than before."""
    began = time.monotonic()
    while any(now - then > 1 << 26 for now, then in zip(used_memory(), before, strict=True)):
        assert time.monotonic() - began < limit, "memory is still in use"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


@two_gpus
async def test_executors_share_a_host() -> None:
    ours, theirs = nccl(options={"devices": [0]}), nccl(options={"devices": [1]})
    async with (
        create_executor(ours, gpu_workers.Courier) as first,
        create_executor(theirs, gpu_workers.Courier) as second,
    ):
        assert await first.collective_rpc("device") == ["cuda:0"]
        assert await second.collective_rpc("device") == ["cuda:1"]


@pytest.mark.parametrize("shared", [1 << 20, 1 << 25])  # too little for the tensors, and enough
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=two_gpus)])
async def test_large_tensors_arrive_on_the_ranks_devices(tp: int, shared: int) -> None:
    options = {"input_device": "rank", "shared_memory_bytes": shared}
    async with create_executor(nccl(tp, options=options, aggregator="all"), gpu_workers.Placed) as executor:
        for step in range(20):
            values = [torch.full((1_000_000,), step), np.ones(400_000), torch.ones(8), torch.ones(2_000_000)]
            expected = [(True, 1e6 * step), (False, 4e5), (False, 8.0), (True, 2e6)]
            assert await executor.execute_model(values) == [expected] * tp
            assert await executor.collective_rpc("rpc", (values,), ranks=[tp - 1]) == [expected]


@pytest.mark.parametrize("hop_bytes", HOP_BYTES)
@pytest.mark.parametrize(("tp", "pp"), [pytest.param(1, 2, marks=two_gpus), pytest.param(2, 2, marks=four_gpus)])
async def test_tensors_arrive_as_they_were_whatever_happens_to_single_steps(tp: int, pp: int, hop_bytes: int) -> None:
    noise = random.Random(0)
    steps: list[dict[str, Any]] = [{"step": n, "fail": noise.choice([None, None, 0, 1])} for n in range(60)]
    async with create_executor(nccl(tp, pp, options={"hop_bytes": hop_bytes}), gpu_workers.Courier) as executor:
        futures = [executor.execute_model(step) for step in steps]
        for step, future in zip(steps, futures, strict=True):
            if step["fail"] is None:
                assert await future == step["step"]
            else:
                with pytest.raises(WorkerError, match=f"stage {step['fail']} fails step {step['step']}"):
                    await future


@two_gpus
@pytest.mark.parametrize("hop_bytes", HOP_BYTES)
async def test_hops_keep_their_order_with_the_computation(hop_bytes: int) -> None:
    config = nccl(pp=2, options={"hop_bytes": hop_bytes})
    async with create_executor(config, gpu_workers.Racer) as executor:
        futures = [executor.execute_model(n) for n in range(50)]
        assert [await future for future in futures] == [[2.0 * n, 2.0 * n] for n in range(50)]


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=two_gpus)])
async def test_tensors_of_the_driver_reach_every_gpu(tp: int) -> None:
    async with create_executor(nccl(tp), gpu_workers.Receiver) as executor:
        for round_ in range(2):
            sent = {f"{n}": torch.full((1 << 17,), float(n + round_)) for n in range(40)}
            sent |= {"large": torch.full((1 << 21,), 3.0 + round_), "odd": torch.ones(3, dtype=torch.bfloat16)}
            await executor.broadcast(sent, bucket_bytes=1 << 20)
            expected = {name: float(tensor.double().sum()) for name, tensor in sent.items()}
            assert await executor.collective_rpc("sums") == [expected] * tp


async def test_deferred_outputs() -> None:
    async with create_executor(nccl(async_scheduling=True), gpu_workers.Deferring) as executor:
        futures = [executor.execute_model(list(range(n))) for n in range(1, 30)]
        for n, future in enumerate(futures, start=1):
            assert await future == [*range(n), *(2 * m for m in range(n))]
        with pytest.raises(WorkerError, match="nothing to finish"):
            await executor.execute_model([])
        assert await executor.execute_model([1]) == [1, 2]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("tp", "pp", "ahead"),
    [
        (1, 1, False),
        (1, 1, True),
        pytest.param(2, 1, False, marks=two_gpus),
        pytest.param(2, 1, True, marks=two_gpus),
        pytest.param(1, 2, False, marks=two_gpus),
        pytest.param(2, 2, False, marks=four_gpus),
    ],
)
async def test_the_demo_engine_says_on_gpus_what_it_says_on_the_cpu(
    tmp_path: Path, tp: int, pp: int, ahead: bool
) -> None:
    directory = write_random_checkpoint(tmp_path / "model", seed=0)
    outputs = [
        await generate(directory, config, ahead=ahead)
        for config in ({"transport": "local", "options": {"local": {"device": "cpu"}}}, nccl(tp, pp))
    ]
    assert outputs[0] == outputs[1]


async def generate(directory: Path, config: dict[str, Any], *, ahead: bool) -> list[list[int]]:
    draw = random.Random(1)
    prompts = [[draw.randrange(256) for _ in range(length)] for length in (1, 5, 16, 40, 90)]
    model = ModelConfig.from_directory(directory)
    worker, kwargs = "asyncexec.demo.worker:ModelWorker", {"model": str(directory)}
    async with (
        create_executor(config | {"async_scheduling": ahead}, worker, worker_kwargs=kwargs) as executor,
        AsyncEngine(executor, model, ByteTokenizer(), async_scheduling=ahead) as engine,
    ):

        async def one(prompt: list[int]) -> list[int]:
            return [t.token_id async for t in engine.generate(prompt, max_tokens=32, ignore_eos=True)]

        return await asyncio.gather(*map(one, prompts))


@two_gpus
@pytest.mark.timeout(240)
async def test_ranks_take_new_places_on_their_gpus() -> None:
    before = used_memory()
    async with create_executor(nccl(1, 2), gpu_workers.Courier) as executor:
        for tp, pp in ((1, 2), (2, 1), (1, 1), (1, 2)):
            sizes = ReconfigureDistributedRequest(tensor_parallel_size=tp, pipeline_parallel_size=pp)
            await executor.reinitialize_distributed(sizes)
            futures = [executor.execute_model({"step": n}) for n in range(10)]
            assert [await future for future in futures] == list(range(10))
    await until_freed(before)


@two_gpus
@pytest.mark.parametrize("pp", [1, 2])
async def test_a_killed_rank_leaves_nothing_on_the_gpus(pp: int) -> None:
    before = used_memory()
    executor = create_executor(nccl(2 // pp, pp), gpu_workers.Holder)
    await executor.start()
    pids = await executor.collective_rpc("pid")
    futures = [executor.execute_model(0.3) for _ in range(4)]
    await asyncio.sleep(0.5)
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    for error in await asyncio.gather(*futures[2:], return_exceptions=True):
        assert isinstance(error, WorkerDied | ExecutorFailed)
    assert time.monotonic() - killed < 1
    await asyncio.gather(*futures, return_exceptions=True)
    await executor.aclose()
    await until_freed(before)


@two_gpus
@pytest.mark.parametrize("method", ["wait_alone", "enqueue_alone"])
async def test_closing_does_not_wait_for_a_collective_that_never_ends(method: str) -> None:
    before = used_memory()
    config = nccl(2, timeouts={"drain": 0.5})
    executor = create_executor(config, gpu_workers.Holder)
    await executor.start()
    call = asyncio.ensure_future(executor.collective_rpc(method))
    await asyncio.sleep(0.3)
    began = time.monotonic()
    await executor.aclose()
    assert time.monotonic() - began < 10
    await asyncio.gather(call, return_exceptions=True)
    await until_freed(before)
