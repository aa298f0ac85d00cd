"""`Executor.broadcast`: fills staging memory and calls the ranks, several buckets at a time."""

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import anyio

from asyncexec.buckets import cut, place, space

_SLOTS = 3
"""Parts of the staging memory: one is filled, one is copied to the GPU, one is broadcast."""


async def broadcast(
    named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    method: str,
    bucket_bytes: int,
    progress: Callable[[int], None] | None,
    staging: Callable[[int], memoryview | None],
    call: Callable[..., Awaitable[Any]],
) -> None:
    """Hand tensors to a method of every rank's worker.

    Args:
        named_tensors, method, bucket_bytes, progress: as `Executor.broadcast` takes them.
        staging: `Transport.staging`; where it has none, the calls carry the tensors.
        call: runs a callable, or a method with its arguments, on every rank.
    """
    done = 0
    slots = 0
    running: collections.deque[tuple[int, asyncio.Task[None]]] = collections.deque()

    async def finish_first() -> None:
        nonlocal done
        size, task = running.popleft()
        await task
        done += size
        if progress is not None:
            progress(done)

    async def run(target: Any, args: tuple[Any, ...]) -> None:
        await call(target, args)

    slot_bytes = 0
    memory: memoryview | None = None
    try:
        for group in cut(named_tensors, bucket_bytes):
            if space(group) > slot_bytes:  # the first, or a tensor that is larger than any bucket before
                while running:
                    await finish_first()
                slot_bytes = max(bucket_bytes, space(group))
            while len(running) >= _SLOTS - 1:
                await finish_first()
            memory = staging(_SLOTS * slot_bytes)
            if memory is None:
                work = run(method, (dict(group),))
            else:
                filling = place(group, method, slots % _SLOTS * slot_bytes)
                await anyio.to_thread.run_sync(filling.fill, memory)
                work = run(filling.bucket, ())
            slots += 1
            running.append((sum(tensor.nbytes for _, tensor in group), asyncio.ensure_future(work)))
        while running:
            await finish_first()
    finally:
        memory = None  # which the traceback of an error would keep mapped
        # one failed, or nobody wants the rest: what was sent ends by itself
        for _, task in running:
            task.add_done_callback(_retrieve)


def _retrieve(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.exception()
