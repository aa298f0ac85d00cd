"""`Executor.broadcast`: fills staging memory and calls the ranks, several buckets at a time."""

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

import anyio

from asyncexec.buckets import Filling, aligned, cut, nothing, place, space
from asyncexec.errors import ConfigError

_SLOTS = 3
"""Parts of the staging memory: one is filled, one is copied to the GPU, one is broadcast."""


class CallRanks(Protocol):
    """Runs a callable, or a method, on every rank."""

    def __call__(
        self, name: str, target: str | Callable[..., Any], args: tuple[Any, ...], *, bounded: bool
    ) -> Awaitable[Any]:
        """Submit it now; `bounded`: whether the limit that the configuration has for `name` holds."""
        ...


class Broadcaster:
    """Hands tensors to a method of every rank's worker, one broadcast after the other: they share the staging memory.

    Args:
        staging: `Transport.staging`; where it has none, the calls carry the tensors.
        call: see `CallRanks`.
    """

    def __init__(self, staging: Callable[[int], memoryview | None], call: CallRanks) -> None:
        self._staging = staging
        self._call = call
        self._turn = anyio.Lock()
        self._in_use = False

    async def broadcast(
        self,
        named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
        method: str,
        bucket_bytes: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        """See `Executor.broadcast`."""
        if bucket_bytes < 1:
            raise ConfigError(f"bucket_bytes is {bucket_bytes}; valid: whole numbers from 1")
        async with self._turn:
            if self._in_use:
                # one that ended early has left buckets on the ranks, which may still be read: a rank answers in order
                await self._call("broadcast", nothing, (), bounded=False)
            self._in_use = True
            await self._send_all(named_tensors, method, bucket_bytes, progress)
            self._in_use = False

    async def _send_all(
        self,
        named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
        method: str,
        bucket_bytes: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        done = slots = slot_bytes = 0
        running: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

        async def finish_first() -> None:
            nonlocal done
            size, call = running.popleft()
            await call
            done += size
            if progress is not None:
                progress(done)

        try:
            for group in cut(named_tensors, bucket_bytes):
                if not slots or space(group) > slot_bytes:  # a tensor that is larger than any bucket before
                    while running:
                        await finish_first()
                    slot_bytes = max(aligned(bucket_bytes), space(group))
                while len(running) >= _SLOTS - 1:
                    await finish_first()
                filling = place(group, method, slots % _SLOTS * slot_bytes)
                slots += 1
                call = await self._send(filling, _SLOTS * slot_bytes)
                running.append((sum(tensor.nbytes for _, tensor in group), call))
            while running:
                await finish_first()
        finally:
            # one failed, or nobody wants the rest: what was sent ends by itself
            for _, call in running:
                call.add_done_callback(_retrieve)

    async def _send(self, filling: Filling, staging_bytes: int) -> "asyncio.Future[None]":
        """Put a bucket where the ranks find it, and call them."""
        method = filling.bucket.method
        memory = self._staging(staging_bytes)
        if memory is None:
            return self._submit(method, method, (filling.named,))
        try:
            await anyio.to_thread.run_sync(filling.fill, memory)
        finally:
            memory = None  # which the traceback of an error would keep mapped
        return self._submit(method, filling.bucket, ())

    def _submit(self, name: str, target: str | Callable[..., Any], args: tuple[Any, ...]) -> "asyncio.Future[None]":
        async def wait(call: Awaitable[Any]) -> None:
            await call

        return asyncio.ensure_future(wait(self._call(name, target, args, bounded=True)))


def _retrieve(call: "asyncio.Future[None]") -> None:
    if not call.cancelled():
        call.exception()
