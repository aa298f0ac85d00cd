"""One run of vLLM's engine in a process of its own; prints what `test_engine.py` compares, as one line of JSON."""

import asyncio
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from asyncexec.bench import vllm_tiny

OURS = "asyncexec.integrations.vllm.AsyncExecExecutor"


def main() -> None:
    """Arguments: a JSON table with `model`, `backend`, `tp`, `pp`, `async_scheduling`, `mode`."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    vllm_tiny.set_environment()
    vllm: Any = importlib.import_module("vllm")
    backend: Any = options["backend"]
    if backend == OURS and options["pp"] > 1:  # a dotted string is refused there by vLLM
        backend = importlib.import_module("asyncexec.integrations.vllm").AsyncExecExecutor
    if options["async_scheduling"]:
        _allow_async_scheduling()
    arguments = vllm_tiny.engine_arguments(
        options["model"],
        tensor_parallel_size=options["tp"],
        pipeline_parallel_size=options["pp"],
        distributed_executor_backend=backend,
    )
    sampling = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=64)
    if options["mode"] == "generate":
        result: Any = _generate(vllm, arguments, sampling, options["pp"])
    else:
        serve = _concurrently if options["mode"] == "concurrent" else _killed
        result = asyncio.run(serve(vllm, arguments, sampling))
    print(json.dumps(result))


def _generate(vllm: Any, arguments: dict[str, Any], sampling: Any, stages: int) -> Any:
    llm = vllm.LLM(**arguments)
    if stages > 1:
        llm.collective_rpc("execute_dummy_batch")
    return [list(output.outputs[0].token_ids) for output in llm.generate(vllm_tiny.prompts(), sampling, use_tqdm=False)]


async def _one(engine: Any, number: int, prompt: Any, sampling: Any) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(prompt, sampling, f"request-{number}"):
        tokens = list(output.outputs[0].token_ids)
    return tokens


def _engine(vllm: Any, arguments: dict[str, Any]) -> Any:
    arg_utils = importlib.import_module("vllm.engine.arg_utils")
    async_llm = importlib.import_module("vllm.v1.engine.async_llm")
    return async_llm.AsyncLLM.from_engine_args(arg_utils.AsyncEngineArgs(**arguments))


async def _concurrently(vllm: Any, arguments: dict[str, Any], sampling: Any) -> Any:
    engine = _engine(vllm, arguments)
    try:
        requests = [_one(engine, i, prompt, sampling) for i, prompt in enumerate(vllm_tiny.prompts())]
        return await asyncio.gather(*requests)
    finally:
        engine.shutdown()


async def _killed(vllm: Any, arguments: dict[str, Any], sampling: Any) -> Any:
    """SIGKILL to a rank in the middle of a request."""
    engine = _engine(vllm, arguments)
    ranks = _rank_processes()
    endless = sampling.clone()
    endless.max_tokens = 400
    requests = [asyncio.create_task(_one(engine, i, prompt, endless)) for i, prompt in enumerate(vllm_tiny.prompts(8))]
    await asyncio.sleep(0.3)
    began = time.monotonic()
    os.kill(ranks[1].pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    took = time.monotonic() - began
    engine.shutdown()
    left = await asyncio.to_thread(_left, ranks)
    return {"seconds": took, "errors": sorted({type(outcome).__name__ for outcome in outcomes}), "left": left}


def _left(ranks: list[Any]) -> list[str]:
    """The ranks that live a second later, and shared memory of theirs."""
    psutil = importlib.import_module("psutil")
    _, there = psutil.wait_procs(ranks, timeout=1.0)
    lives = [str(rank) for rank in there if rank.status() != psutil.STATUS_ZOMBIE]
    return lives + [path.name for path in Path("/dev/shm").glob("asyncexec-vllm-*")]


def _rank_processes() -> list[Any]:
    """Those below this process, by the titles that vLLM gives them, in the order in which they started."""
    psutil = importlib.import_module("psutil")
    below = psutil.Process().children(recursive=True)
    ranks = [process for process in below if any("Worker_TP" in part for part in process.cmdline())]
    return sorted(ranks, key=lambda process: process.pid)


def _allow_async_scheduling() -> None:
    """vLLM's CPU platform switches it off; its CPU workers can do it."""
    platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    original = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = staticmethod(check_and_update_config)


if __name__ == "__main__":
    main()
