"""Awaiting what Ray answers."""

import asyncio
import concurrent.futures
import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


def when_done(
    ref: Any, loop: asyncio.AbstractEventLoop, then: Callable[[concurrent.futures.Future[Any]], None]
) -> None:
    """Have `then` called on the loop with the answer of an actor call."""

    def done(answer: concurrent.futures.Future[Any]) -> None:
        try:
            loop.call_soon_threadsafe(then, answer)
        except RuntimeError:
            return  # the loop is closed: nobody is left to tell

    ref.future().add_done_callback(done)


def answer(ref: Any) -> asyncio.Future[Any]:
    """The answer of an actor call as a future of the running loop, which may be cancelled: Ray's own may not."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    when_done(ref, loop, functools.partial(_settle, future))
    return future


async def finish(awaitable: Awaitable[T]) -> T:
    """Await something that must come to its end even where the caller is cancelled; the cancellation comes after it."""
    task = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:  # which may come more than once
                cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # the cancellation is what the caller hears of
    raise cancelled


def _settle(future: asyncio.Future[Any], answered: concurrent.futures.Future[Any]) -> None:
    if future.done():
        return
    error = answered.exception()
    if error is None:
        future.set_result(answered.result())
    else:
        future.set_exception(error)
