"""The demo's engine from end to end: tokens a second of its small model, and what its steps take."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from asyncexec import create_executor
from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.peer import Peer

WARM_UP = 8
"""Tokens of each request before those that are measured."""


async def measure(peer: Peer, point: Point, amount: float) -> Samples:
    """`amount` tokens for each of `requests` prompts at once, on `ranks` ranks.

    They are tensor parallel; four are two stages of two, as in `asyncexec demo`.  Two steps in flight of one stage are
    asynchronous scheduling.
    """
    from asyncexec.demo.checkpoint import ModelConfig
    from asyncexec.demo.command import BLOCK_SIZE, SHIPPED_CHECKPOINT, WORKER
    from asyncexec.demo.engine import AsyncEngine
    from asyncexec.demo.tokenizer import load_tokenizer

    stages = 2 if point.ranks >= 4 else 1
    ahead = point.in_flight > 1 and stages == 1
    sizes = {"tensor_parallel_size": point.ranks // stages, "pipeline_parallel_size": stages}
    config = {**getattr(peer, DEMO.needs), **sizes, "async_scheduling": ahead}
    kwargs = {"model": str(SHIPPED_CHECKPOINT), "dtype": "float32", "block_size": BLOCK_SIZE}
    model = ModelConfig.from_directory(SHIPPED_CHECKPOINT)
    tokenizer = load_tokenizer(SHIPPED_CHECKPOINT, model)
    async with (
        create_executor(config, WORKER, worker_kwargs=kwargs) as executor,
        AsyncEngine(executor, model, tokenizer, block_size=BLOCK_SIZE, async_scheduling=ahead) as engine,
    ):
        await _generate(engine.generate, point.requests, WARM_UP)
        engine.timings.clear()
        began = time.perf_counter()
        tokens = await _generate(engine.generate, point.requests, int(amount))
        seconds = time.perf_counter() - began
        steps = [timing.total * 1e6 for timing in engine.timings]
    return {"tokens_per_s": [tokens / seconds], "latency_us": steps}


async def _generate(generate: Callable[..., Any], requests: int, tokens: int) -> int:
    """Follow so many requests at once to their ends; how many tokens came."""

    async def follow() -> int:
        async with aclosing(generate("def ", max_tokens=tokens, ignore_eos=True)) as stream:
            return len([token async for token in stream])

    return sum(await asyncio.gather(*(follow() for _ in range(requests))))


DEMO = Case(
    "demo",
    measure,
    fresh=True,
    needs="engine_config",
    packages=dict.fromkeys(("torch", "safetensors", "tokenizers"), "pip install 'asyncexec[demo]'"),
)
