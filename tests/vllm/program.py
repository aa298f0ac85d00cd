"""One run of vLLM's engine in a process of its own; prints what `test_engine.py` compares, as one line of JSON."""

import asyncio
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from asyncexec.bench import vllm_tiny

OURS = "asyncexec.integrations.vllm.AsyncExecExecutor"


def main() -> None:
    """Arguments: a JSON table with `model`, `backend`, `tp`, `pp`, `async_scheduling`, `mode`, `rank`, `additional`."""
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
        additional_config=options["additional"],
    )
    sampling = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=64)
    if options["mode"] == "generate":
        result: Any = _generate(vllm, arguments, sampling, options["pp"])
    elif options["mode"] == "verbs":
        result = _verbs(vllm, arguments, sampling)
    elif options["mode"] == "concurrent":
        result = asyncio.run(_concurrently(vllm, arguments, sampling))
    else:
        result = asyncio.run(_killed(vllm, arguments, sampling, options["rank"]))
    print(json.dumps(result))


def _generate(vllm: Any, arguments: dict[str, Any], sampling: Any, stages: int) -> Any:
    llm = vllm.LLM(**arguments)
    if stages > 1:
        llm.collective_rpc("execute_dummy_batch")
    return [list(output.outputs[0].token_ids) for output in llm.generate(vllm_tiny.prompts(), sampling, use_tqdm=False)]


def _verbs(vllm: Any, arguments: dict[str, Any], sampling: Any) -> Any:
    """The verbs that vLLM's CPU workers know, on the whole engine; and the tokens after them."""
    folder = Path(tempfile.mkdtemp())
    llm = vllm.LLM(
        **arguments,
        enable_lora=True,
        max_lora_rank=8,
        profiler_config={"profiler": "torch", "torch_profiler_dir": str(folder / "traces")},
    )
    core = llm.llm_engine.engine_core
    request = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 5, vllm_tiny.make_adapter(folder))

    sampling.max_tokens = 16

    def tokens(**options: Any) -> Any:
        outputs = llm.generate(vllm_tiny.prompts(4), sampling, use_tqdm=False, **options)
        return [list(output.outputs[0].token_ids) for output in outputs]

    seen: dict[str, Any] = {"before": tokens()}
    seen["loras"] = [core.add_lora(request), sorted(core.list_loras()), core.pin_lora(5)]
    seen["with adapter"] = tokens(lora_request=request)
    seen["loras"] += [core.remove_lora(5), sorted(core.list_loras())]
    llm.sleep(1)
    seen["sleeping"] = [core.is_sleeping()]
    llm.wake_up()
    seen["sleeping"].append(core.is_sleeping())
    llm.start_profile()
    tokens()
    llm.stop_profile()
    seen["traces"] = len(list((folder / "traces").iterdir()))
    core.save_sharded_state(str(folder), None, None)
    seen["shards"] = sorted(path.name for path in folder.glob("*.safetensors"))
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    core.execute_dummy_batch()
    seen["after"] = tokens()
    return seen


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


async def _killed(vllm: Any, arguments: dict[str, Any], sampling: Any, rank: int) -> Any:
    """SIGKILL to a rank while every request is in the middle of its tokens."""
    engine = _engine(vllm, arguments | {"worker_extension_cls": "custom.Extension"})
    ranks = [importlib.import_module("psutil").Process(pid) for pid in await engine.collective_rpc("process_id")]
    started = list({*_descendants(), *ranks})
    meetings = _meetings()
    endless = sampling.clone()
    endless.max_tokens = 400
    killed = float("inf")

    async def one(number: int, prompt: Any, generating: asyncio.Event) -> tuple[str, float]:
        try:
            async for output in engine.generate(prompt, endless, f"request-{number}"):
                if len(output.outputs[0].token_ids) > 5:
                    generating.set()
        except Exception as error:  # noqa: BLE001 - which one it is, the test tells
            return type(error).__name__, time.monotonic() - killed
        return "finished", 0.0

    generating = [asyncio.Event() for _ in range(8)]
    prompts = vllm_tiny.prompts(len(generating))
    requests = [asyncio.create_task(one(i, prompts[i], event)) for i, event in enumerate(generating)]
    await asyncio.gather(*(event.wait() for event in generating))
    killed = time.monotonic()
    os.kill(ranks[rank].pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*requests)
    engine.shutdown()
    left = await asyncio.to_thread(_left, started, meetings)
    return {
        "seconds": max(seconds for _, seconds in outcomes),
        "errors": sorted({name for name, _ in outcomes}),
        "meetings": len(meetings),
        "left": left,
    }


def _meetings() -> list[str]:
    """Where the ranks of this engine met; it has TMPDIR to itself."""
    return [path.name for path in Path(tempfile.gettempdir()).glob("vllm-asyncexec-*")]


def _left(started: list[Any], meetings: list[str]) -> list[str]:
    """Processes that live a second later, files where they met, shared memory of theirs."""
    psutil = importlib.import_module("psutil")
    _, there = psutil.wait_procs(started, timeout=1.0)
    left = [str(process) for process in there if process.status() != psutil.STATUS_ZOMBIE]
    for meeting in meetings:
        left += map(str, Path(tempfile.gettempdir()).glob(meeting))
        left += map(str, Path("/dev/shm").glob(f"*{meeting}-*"))
    return left


def _descendants() -> list[Any]:
    """All processes below this one; without multiprocessing's tracker, which ends with this one."""
    below = importlib.import_module("psutil").Process().children(recursive=True)
    return [process for process in below if not any("resource_tracker" in part for part in process.cmdline())]


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
