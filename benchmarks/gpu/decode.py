"""Decoding with the 1B model at batch 64 on one GPU: one step in flight, and two with deferred outputs."""

import argparse
import asyncio
import random
import time
from typing import Any

import gpu_workers_bench as workers
from asyncexec import Executor, create_executor, run
from asyncexec.demo.checkpoint import ModelConfig
from asyncexec.demo.engine import AsyncEngine
from asyncexec.demo.tokenizer import load_tokenizer
from model import BLOCK_SIZE, SHAPE, checkpoint
from rows import row

BATCH = 64
SETTLE = 16
"""Tokens of every request before the measurement begins."""

PROFILED = 24


class Watch:
    """Tells when every request has got so many tokens, and takes the times of all tokens."""

    def __init__(self) -> None:
        self.counts = [0] * BATCH
        self.times: list[float] = []
        self.reached: dict[int, asyncio.Event] = {}

    def token(self, index: int) -> None:
        self.counts[index] += 1
        self.times.append(time.perf_counter())
        if self.counts[index] in self.reached and min(self.counts) >= self.counts[index]:
            self.reached.pop(self.counts[index]).set()

    async def all_have(self, count: int) -> None:
        event = self.reached.setdefault(count, asyncio.Event())
        await event.wait()


async def decode(ahead: bool, prompt_tokens: int, steps: int) -> dict[str, float]:
    directory = checkpoint()
    model = ModelConfig.from_directory(directory)
    config = {"transport": "nccl", "async_scheduling": ahead, "options": {"nccl": {"backend": "nccl"}}}
    kwargs = {"model": str(directory), "dtype": "bfloat16", "block_size": BLOCK_SIZE}
    async with (
        create_executor(config, workers.TimedModelWorker, worker_kwargs=kwargs) as executor,
        AsyncEngine(
            executor,
            model,
            load_tokenizer(directory, model),
            block_size=BLOCK_SIZE,
            max_num_seqs=BATCH,
            max_num_batched_tokens=4096,
            async_scheduling=ahead,
        ) as engine,
    ):
        return await measure(executor, engine, prompt_tokens, steps)


async def measure(executor: Executor, engine: AsyncEngine, prompt_tokens: int, steps: int) -> dict[str, float]:
    draw, watch = random.Random(0), Watch()
    vocabulary = int(SHAPE["vocab_size"])

    async def one(index: int) -> None:
        prompt = [draw.randrange(vocabulary) for _ in range(prompt_tokens)]
        # enough for those whose prompts came first
        async for _ in engine.generate(prompt, max_tokens=steps + 300, ignore_eos=True):
            watch.token(index)

    tasks = [asyncio.ensure_future(one(index)) for index in range(BATCH)]
    await watch.all_have(SETTLE)
    await executor.collective_rpc("forget_steps")
    begin, had = time.perf_counter(), len(watch.times)
    await watch.all_have(SETTLE + steps)
    tokens, seconds = len(watch.times) - had, time.perf_counter() - begin
    [timeline] = await executor.collective_rpc("timeline")
    await executor.collective_rpc("start_profiler")
    await watch.all_have(SETTLE + steps + PROFILED)
    [(busy, kernels)] = await executor.collective_rpc("busy_share")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return figures(timeline, tokens, seconds) | {"kernel_idle": 1 - busy, "kernels": kernels}


def figures(timeline: list[tuple[float, float]], tokens: int, seconds: float) -> dict[str, float]:
    """Of the steps but the first few, which the reset disturbed."""
    timeline = timeline[5:-1]
    span = timeline[-1][1] - timeline[0][0]
    within = sum(end - begin for begin, end in timeline)
    lengths = sorted(end - begin for begin, end in timeline)
    return {
        "tokens_per_s": tokens / seconds,
        "idle": 1 - within / span,
        "step_ms": span / len(timeline),
        "gpu_step_ms": lengths[len(lengths) // 2],
        "steps": len(timeline),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    found: dict[bool, Any] = {}
    for ahead in (False, True):
        found[ahead] = run(decode(ahead, args.prompt_tokens, args.steps))
        flight = "two" if ahead else "one"
        name = f"1B decode, bf16, batch {BATCH}, {args.prompt_tokens} tokens of context, {flight} in flight"
        row(f"{name}: tokens/s", found[ahead]["tokens_per_s"], "tokens/s", **found[ahead])
        row(f"{name}: step", found[ahead]["step_ms"], "ms")
        target = {"target": "< 5 %", "met": found[ahead]["idle"] < 0.05} if ahead else {}
        row(f"{name}: GPU idle between steps (events)", 100 * found[ahead]["idle"], "%", **target)
        row(f"{name}: GPU without a kernel (profiler)", 100 * found[ahead]["kernel_idle"], "%")
    ratio = found[True]["tokens_per_s"] / found[False]["tokens_per_s"]
    row("1B decode, two in flight over one", ratio, "x", target=">= 1.1 x", met=ratio >= 1.1)


if __name__ == "__main__":
    main()
