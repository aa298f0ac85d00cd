"""Tokens per second of vLLM's engine on its own executor and on ours, in turns.

    .venv-vllm/bin/python benchmarks/vllm/tokens.py [TPxPP ...]      a tiny Llama on the CPU, 16 requests at once
    python benchmarks/vllm/tokens.py graphs eager                    16 layers of width 2048 on 2 GPUs, 64 requests

`graphs` is tensor parallelism of two with CUDA graphs, `eager` are two pipeline stages without.

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

ROUNDS = 10
TOKENS = 64
REQUESTS = 16

GPU_ROUNDS = 16
GPU_TOKENS = 128
GPU_REQUESTS = 64
GPU_MODEL: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
GPU_LAYOUTS: dict[str, dict[str, Any]] = {
    "graphs": {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "enforce_eager": False},
    "eager": {"tensor_parallel_size": 1, "pipeline_parallel_size": 2, "enforce_eager": True},
}

PARKED = 1.6
"""Seconds between two turns; the readers spin for one."""


class Engine:
    """An engine in a process of its own, which generates when it is asked to."""

    def __init__(self, kind: str, requests: int, tokens: int, arguments: dict[str, Any]) -> None:
        self._produced = requests * tokens
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--engine", json.dumps([kind, requests, tokens, arguments])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self) -> tuple[float, Any]:
        """Tokens per second of one batch, and the tokens."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("["):
                seconds, tokens = json.loads(line)
                return self._produced / seconds, tokens
        raise RuntimeError("the engine has ended")

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)


async def serve(kind: str, requests: int, tokens: int, arguments: dict[str, Any]) -> None:
    """What the process of an engine does: a batch for each line of its standard input."""
    vllm: Any = importlib.import_module("vllm")
    backend: Any = kind
    if kind == "asyncexec":
        backend = importlib.import_module("asyncexec.integrations.vllm").AsyncExecExecutor
    make_arguments = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs
    engine_args = make_arguments(distributed_executor_backend=backend, enable_prefix_caching=False, **arguments)
    engine = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(engine_args)
    sampling = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=tokens)
    if arguments["pipeline_parallel_size"] > 1:
        await engine.collective_rpc("execute_dummy_batch")

    async def one(number: int, prompt: Any) -> list[int]:
        generated: list[int] = []
        async for output in engine.generate(prompt, sampling, f"request-{number}-{time.monotonic_ns()}"):
            generated = list(output.outputs[0].token_ids)
        return generated

    while await asyncio.to_thread(sys.stdin.readline):
        began = time.perf_counter()
        generated = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(vllm_tiny.prompts(requests))))
        print(json.dumps([time.perf_counter() - began, generated]), flush=True)
    engine.shutdown()


def compare(name: str, requests: int, tokens: int, arguments: dict[str, Any], rounds: int) -> str:
    """One layout, in turns."""
    kinds = ("mp", "asyncexec")
    engines = {kind: Engine(kind, requests, tokens, arguments) for kind in kinds}  # both come up at once
    for engine in engines.values():
        engine.ask()  # the first batch is slow: let it be over, and the engine be up
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    seen = set()
    for number in range(rounds):
        for kind in kinds if number % 2 == 0 else kinds[::-1]:
            time.sleep(PARKED)
            rate, generated = engines[kind].ask()
            rates[kind].append(rate)
            seen.add(json.dumps(generated))
    for engine in engines.values():
        engine.close()
    medians = {kind: statistics.median(rates[kind]) for kind in kinds}
    step = {kind: requests / medians[kind] * 1e3 for kind in kinds}
    return (
        f"{name}: mp {medians['mp']:.0f} tokens/s ({step['mp']:.2f} ms per step), asyncexec "
        f"{medians['asyncexec']:.0f} tokens/s ({step['asyncexec']:.2f} ms per step), ratio "
        f"{ratio_of_medians(rates['asyncexec'], rates['mp'])}; "
        f"{'the same tokens' if len(seen) == 1 else 'DIFFERENT TOKENS'}"
    )


def main() -> None:
    """The layouts that were asked for, else TP=2."""
    vllm_tiny.set_environment()
    if sys.argv[1:2] == ["--engine"]:
        asyncio.run(serve(*json.loads(sys.argv[2])))
        os._exit(0)  # vLLM's threads may outlive its engine
    with tempfile.TemporaryDirectory() as folder:
        for layout in sys.argv[1:] or ["2x1"]:
            print(compare_on_gpus(layout, folder) if layout in GPU_LAYOUTS else compare_on_cpu(layout, folder))


def compare_on_cpu(layout: str, folder: str) -> str:
    """Tensor and pipeline parallelism as in "2x1"."""
    tensor, _, pipeline = layout.partition("x")
    sizes = {"tensor_parallel_size": int(tensor), "pipeline_parallel_size": int(pipeline or 1)}
    arguments = vllm_tiny.engine_arguments(vllm_tiny.make_model(Path(folder) / "tiny"), **sizes)
    return compare(f"TP={tensor} PP={pipeline or 1}", REQUESTS, TOKENS, arguments, ROUNDS)


def compare_on_gpus(layout: str, folder: str) -> str:
    """One of `GPU_LAYOUTS`; both engines share the GPUs."""
    (Path(folder) / "config.json").write_text(json.dumps(vllm_tiny.CONFIG | GPU_MODEL))
    arguments = vllm_tiny.engine_arguments(
        folder, dtype="bfloat16", gpu_memory_utilization=0.3, max_num_seqs=GPU_REQUESTS, **GPU_LAYOUTS[layout]
    )
    return compare(layout, GPU_REQUESTS, GPU_TOKENS, arguments, GPU_ROUNDS)


if __name__ == "__main__":
    main()
