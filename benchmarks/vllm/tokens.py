"""Tokens per second of vLLM's engine on its own executor and on ours, in turns: a tiny Llama, 16 requests at once.

    .venv-vllm/bin/python benchmarks/vllm/tokens.py [TPxPP ...]

Both engines live in processes of their own and take turns, each a moment after the other: by then the readers of vLLM's
executor have stopped spinning.  Prints the medians and the ratio with its 95% interval, which is above 1 where ours is
faster.  Each layout takes a minute and a half.
"""

import asyncio
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from asyncexec.bench import vllm_tiny
from asyncexec.bench.ratios import ratio_of_medians

ROUNDS = 8
TOKENS = 64
REQUESTS = 16
PARKED = 1.6
"""Seconds between two turns; the readers spin for one."""


class Engine:
    """An engine in a process of its own, which generates when it is asked to."""

    def __init__(self, kind: str, model: str, tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
        arguments = json.dumps([kind, model, tensor_parallel_size, pipeline_parallel_size])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--engine", arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self) -> tuple[float, Any]:
        """Tokens per second of one batch, and the tokens."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("["):
                seconds, tokens = json.loads(line)
                return REQUESTS * TOKENS / seconds, tokens
        raise RuntimeError("the engine has ended")

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)


async def serve(kind: str, model: str, tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
    """What the process of an engine does: a batch for each line of its standard input."""
    vllm: Any = importlib.import_module("vllm")
    backend: Any = kind
    if kind == "asyncexec":
        backend = importlib.import_module("asyncexec.integrations.vllm").AsyncExecExecutor
    arguments = vllm_tiny.engine_arguments(
        model,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        distributed_executor_backend=backend,
        enable_prefix_caching=False,
    )
    engine_args = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs(**arguments)
    engine = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(engine_args)
    sampling = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=TOKENS)
    if pipeline_parallel_size > 1:
        await engine.collective_rpc("execute_dummy_batch")

    async def one(number: int, prompt: Any) -> list[int]:
        tokens: list[int] = []
        async for output in engine.generate(prompt, sampling, f"request-{number}-{time.monotonic_ns()}"):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    while await asyncio.to_thread(sys.stdin.readline):
        began = time.perf_counter()
        tokens = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(vllm_tiny.prompts(REQUESTS))))
        print(json.dumps([time.perf_counter() - began, tokens]), flush=True)
    engine.shutdown()


def compare(model: str, tensor_parallel_size: int, pipeline_parallel_size: int) -> str:
    """One layout, in turns."""
    kinds = ("mp", "asyncexec")
    engines = {kind: Engine(kind, model, tensor_parallel_size, pipeline_parallel_size) for kind in kinds}
    for engine in engines.values():
        engine.ask()  # the first batch is slow: let it be over, and the engine be up
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    seen = set()
    for number in range(ROUNDS):
        for kind in kinds if number % 2 == 0 else kinds[::-1]:
            time.sleep(PARKED)
            rate, tokens = engines[kind].ask()
            rates[kind].append(rate)
            seen.add(json.dumps(tokens))
    for engine in engines.values():
        engine.close()
    medians = {kind: statistics.median(rates[kind]) for kind in kinds}
    return (
        f"TP={tensor_parallel_size} PP={pipeline_parallel_size}: mp {medians['mp']:.0f} tokens/s, asyncexec "
        f"{medians['asyncexec']:.0f} tokens/s, ratio {ratio_of_medians(rates['asyncexec'], rates['mp'])}; "
        f"{'the same tokens' if len(seen) == 1 else 'DIFFERENT TOKENS'}"
    )


def main() -> None:
    """The layouts that were asked for, else TP=2."""
    vllm_tiny.set_environment()
    if sys.argv[1:2] == ["--engine"]:
        asyncio.run(serve(*json.loads(sys.argv[2])))
        os._exit(0)  # vLLM's threads may outlive its engine
    with tempfile.TemporaryDirectory() as folder:
        model = vllm_tiny.make_model(Path(folder) / "model")
        for layout in sys.argv[1:] or ["2x1"]:
            tensor, _, pipeline = layout.partition("x")
            print(compare(model, int(tensor), int(pipeline or 1)), flush=True)


if __name__ == "__main__":
    main()
