"""`Executor.reinitialize_distributed`: changes the ranks' layout, or changes it back."""

from collections.abc import Awaitable, Callable, Sequence

import anyio

from asyncexec.calls import Calls
from asyncexec.config import ExecutorConfig
from asyncexec.errors import AsyncExecError, StepTimeout, WorkerDied
from asyncexec.transport import Transport

_DEATH_LIMIT = 1.0
"""Seconds between a new rank's connection breaking and the transport's telling of its death; more than enough."""

TakePlaces = Callable[[Sequence[int], float], Awaitable[object]]
"""Has these ranks join each other, and their workers take their places, within so many seconds."""


class Reinitializer:
    """Changes the layout of one executor's ranks, all or nothing.

    Args:
        calls: which must be done first.
        transport: opens and closes ranks.
        take_places: see `TakePlaces`.
        interrupted: why the executor does not go on, as it has failed or is being closed; None while it does.
        fail: called where the ranks cannot go back to their old places either.
    """

    def __init__(
        self,
        calls: Calls,
        transport: Transport,
        take_places: TakePlaces,
        interrupted: Callable[[], AsyncExecError | None],
        fail: Callable[[AsyncExecError], None],
    ) -> None:
        self._calls = calls
        self._transport = transport
        self._take_places = take_places
        self._interrupted = interrupted
        self._fail = fail
        self._stillborn: dict[int, WorkerDied] = {}

    async def change(self, old: ExecutorConfig, new: ExecutorConfig) -> None:
        """Have the ranks of `new` take their places; those that have none any more are still to be closed.

        Raises:
            StepTimeout: calls in flight were not done in time, or new ranks not up.
            WorkerDied: a new rank did.
            WorkerError: a worker failed to take its place.
        """
        limit = old.timeouts.drain
        with anyio.move_on_after(limit) as scope:
            await self._calls.until(lambda: self._calls.are_done)
        if scope.cancelled_caught:
            message = f"the calls in flight were not done within {limit:g} s"
            raise StepTimeout(message, timeout=limit, waiting_for=(), method="reinitialize_distributed")
        self._check()
        started = range(old.world_size, new.world_size)
        self._stillborn.clear()
        try:
            await self._bring_up(new, started)
            self._check()
        except Exception as error:
            await self._take_back(old, started, error, joined=False)
            raise
        try:
            await self._join(old, new)
        except Exception as error:
            await self._take_back(old, started, error, joined=True)
            raise
        self._calls.resize(new.world_size, new.max_concurrent_batches)
        self._calls.begin_epoch()

    def rank_died(self, rank: int, death: WorkerDied) -> None:
        """A rank ended that has no place in the layout: it was to have one in the new layout."""
        self._stillborn[rank] = death
        self._calls.look_again()

    def _check(self) -> None:
        """After an await: meanwhile somebody may have closed the executor, or a rank been lost."""
        if (error := self._interrupted()) is not None:
            raise error

    async def _bring_up(self, config: ExecutorConfig, started: Sequence[int]) -> None:
        """Start the ranks that are missing; the others must not be made to wait for one that does not come up."""
        limit = config.timeouts.start
        with anyio.move_on_after(limit) as scope:
            await self._transport.open(config)
            for rank in started:
                try:
                    await self._transport.inspect(rank, stacks=False)
                except ConnectionError as error:
                    raise await self._death_of(rank, error) from None
        if scope.cancelled_caught:
            raise StepTimeout(f"new ranks not up after {limit:g} s", timeout=limit, waiting_for=started, method="start")

    async def _death_of(self, rank: int, error: Exception) -> Exception:
        """Why a new rank's connection broke: its death, of which the transport is about to tell, or just `error`."""
        with anyio.move_on_after(_DEATH_LIMIT):
            await self._calls.until(lambda: rank in self._stillborn)
        return self._stillborn.get(rank, error)

    async def _join(self, before: ExecutorConfig, config: ExecutorConfig) -> None:
        """Have the ranks of `config` join each other, and their workers take their places."""
        self._calls.resize(max(before.world_size, config.world_size), config.max_concurrent_batches)
        await self._take_places(range(config.world_size), config.timeouts.start)

    async def _take_back(self, old: ExecutorConfig, started: Sequence[int], cause: Exception, *, joined: bool) -> None:
        """Have the ranks take their old places again.

        Args:
            old: the layout in which they had these.
            started: the ranks that go.
            cause: why.
            joined: whether the others may have left their places already, and must join each other again.
        """
        if self._interrupted() is not None:
            return
        try:
            await self._transport.close(started)
            self._calls.resize(old.world_size, old.max_concurrent_batches)
            with anyio.fail_after(old.timeouts.start):
                await self._transport.open(old)
            if joined:
                await self._join(old, old)
        except Exception as error:  # noqa: BLE001 - whatever it is, the ranks have no places any more
            if self._interrupted() is None:
                self._fail(_going_back_failed(error, cause))


def _going_back_failed(error: Exception, cause: Exception) -> AsyncExecError:
    failure = AsyncExecError(
        f"re-initialising failed ({type(cause).__name__}: {cause}), and so did going back to the old layout: "
        f"{type(error).__name__}: {error}"
    )
    failure.__cause__ = error
    return failure
