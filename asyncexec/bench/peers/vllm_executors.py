"""vLLM's executors, and ours for vLLM, with a worker that does nothing; the caller blocks in both."""

import asyncio
import functools
import tempfile
from collections.abc import Awaitable, Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from asyncexec.bench import vllm_noop, vllm_ray, vllm_tiny
from asyncexec.bench.payload import Payload, SchedulerOutput
from asyncexec.bench.peer import MAX_RAY_RANKS, Peer
from asyncexec.bench.peers.ray_actors import RAY


class VllmMultiproc(Peer):
    """vLLM's MultiprocExecutor; the step is one call, as of pooling models.

    Attributes:
        kind: which executor, see `vllm_noop.make_executor`.
        one_call: whether the step is `execute_model` alone, or `sample_tokens` follows.
    """

    needs: ClassVar[dict[str, str]] = vllm_tiny.VLLM
    kind: ClassVar[str] = "mp"
    one_call: ClassVar[bool] = True
    tensors = False

    async def start(self) -> None:
        """Start the executor, in a thread: it takes seconds."""
        vllm_tiny.set_environment()
        self._executor: Any = await asyncio.to_thread(vllm_noop.make_executor, self.kind, self.ranks)
        self._executor.collective_rpc("answer_in_one_call", args=(self.one_call,))
        self._payload = functools.cache(vllm_noop.scheduler_output)

    def submit(self, value: Payload) -> Awaitable[Any]:
        """One step, as vLLM's engine core submits it with steps in flight."""
        requests = len(value.request_ids) if isinstance(value, SchedulerOutput) else 0
        future = self._executor.execute_model(self._payload(max(1, requests)), non_block=True)
        return _Blocking(future if self.one_call else self._executor.sample_tokens(None, non_block=True))

    async def pids(self) -> Sequence[int]:
        """Asked of the ranks."""
        pids: Sequence[int] = self._executor.collective_rpc("pid")
        return pids

    async def close(self) -> None:
        """End it."""
        await asyncio.to_thread(self._executor.shutdown)


class VllmMultiprocStep(VllmMultiproc):
    """The same with both halves of a step."""

    one_call = False


class VllmRayV2(VllmMultiproc):
    """vLLM's RayExecutorV2: actors of Ray, and the queues of MultiprocExecutor."""

    needs: ClassVar[dict[str, str]] = vllm_tiny.VLLM | RAY
    kind = "ray-v2"
    uses_ray = True
    max_ranks = MAX_RAY_RANKS

    async def start(self) -> None:
        """Connect to Ray first."""
        vllm_tiny.set_environment()
        self._folder = tempfile.TemporaryDirectory(prefix="asyncexec-bench-")
        self._ray = await asyncio.to_thread(vllm_ray.connect, Path(self._folder.name))
        await super().start()

    async def close(self) -> None:
        """End it, and disconnect."""
        await super().close()
        self._ray.shutdown()
        self._folder.cleanup()


class VllmRayV2Step(VllmRayV2):
    """The same with both halves of a step."""

    one_call = False


class VllmRay(VllmRayV2):
    """vLLM's RayDistributedExecutor: a compiled graph, in which both halves of a step are one execution."""

    kind = "ray"

    async def start(self) -> None:
        """Have the workers ask vLLM for their place."""
        await super().start()
        self._executor.uses_sampler = not self.one_call
        self._executor.collective_rpc("join_groups")


class VllmRayStep(VllmRay):
    """The same with both halves of a step."""

    one_call = False


class VllmAsyncExec(VllmMultiproc):
    """asyncexec's executor for vLLM."""

    kind = "asyncexec"


class VllmAsyncExecStep(VllmAsyncExec):
    """The same with both halves of a step."""

    one_call = False


class _Blocking(Awaitable[Any]):
    """Waits as vLLM's engine core does: by blocking its thread."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        running = asyncio._get_running_loop()
        asyncio._set_running_loop(None)  # the engine core's thread runs none
        try:
            return self._future.result()
        finally:
            asyncio._set_running_loop(running)
