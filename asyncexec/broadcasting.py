"""`Executor.broadcast`: fills staging memory and calls the ranks, several buckets at a time."""

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

import anyio

from asyncexec.buckets import Filling, aligned, cut, nothing, place, space
from asyncexec.errors import ConfigError

_SLOTS = 3
"""Parts of the staging memory: one is filled, the others are on their way to the GPUs."""


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
        self._has_staging = False
        self._filling: asyncio.Future[None] | None = None

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
                if self._filling is not None:
                    await asyncio.gather(self._filling, return_exceptions=True)
                    self._filling = None
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
        filled: Filling | None = None  # and not handed to the ranks yet

        def hand_over() -> None:
            nonlocal filled
            if filled is not None:
                running.append((sum(tensor.nbytes for tensor in filled.tensors), self._submit(method, filled)))
                filled = None

        async def finish_first() -> None:
            nonlocal done
            hand_over()
            size, call = running.popleft()
            await call
            done += size
            if progress is not None:
                progress(done)

        try:
            for group in cut(named_tensors, bucket_bytes):
                if not slots or space(group) > slot_bytes:  # a tensor that is larger than any bucket before
                    while running or filled is not None:
                        await finish_first()
                    slot_bytes = max(aligned(bucket_bytes), space(group))
                while len(running) + (filled is not None) >= _SLOTS:
                    await finish_first()
                filling = place(group, method, slots % _SLOTS * slot_bytes)
                slots += 1
                self._start_to_fill(filling, _SLOTS * slot_bytes)
                hand_over()  # the one before: the ranks begin while this one is filled
                await self._filled()
                filled = filling
            while running or filled is not None:
                await finish_first()
        finally:
            # one failed, or nobody wants the rest: what was sent ends by itself
            for _, call in running:
                call.add_done_callback(_retrieve)

    def _start_to_fill(self, filling: Filling, staging_bytes: int) -> None:
        """Put a bucket where the ranks find it, on a thread; where there is no such place, its call carries it."""
        memory = self._staging(staging_bytes)
        self._has_staging = memory is not None
        if memory is not None:
            self._filling = asyncio.get_running_loop().run_in_executor(None, filling.fill, memory)

    async def _filled(self) -> None:
        """Wait for that, and raise its error; where it is cancelled the thread goes on, see `broadcast`."""
        if self._filling is not None:
            await asyncio.wait([self._filling])
            filling, self._filling = self._filling, None
            filling.result()

    def _submit(self, method: str, filling: Filling) -> "asyncio.Future[None]":
        target, args = (filling.bucket, ()) if self._has_staging else (method, (filling.named,))

        async def wait(call: Awaitable[Any]) -> None:
            await call

        return asyncio.ensure_future(wait(self._call(method, target, args, bounded=True)))


def _retrieve(call: "asyncio.Future[None]") -> None:
    if not call.cancelled():
        call.exception()
