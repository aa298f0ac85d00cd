"""The Executor: what an engine's loop talks to."""

import abc
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from asyncexec.aggregate import Aggregator
from asyncexec.config import ExecutorConfig, ReconfigureDistributedRequest
from asyncexec.errors import AsyncExecError
from asyncexec.future import StepFuture
from asyncexec.inspection import Report
from asyncexec.observing import Observer
from asyncexec.tracing import Trace
from asyncexec.window import Counters


class Executor(abc.ABC):
    """Runs one worker class on every rank, and merges what the ranks report.

    Use it as `async with create_executor(...) as executor`: entering starts the ranks, leaving ends them.  All
    methods are called on the event loop that started it.

    Every call may raise, besides what it names:

    - `ExecutorClosed`: the executor is not running; `ExecutorFailed`, with the cause, where a rank was lost.
    - `PayloadError`: the arguments cannot be encoded or are too large.  Nothing was sent.

    Every future, and every coroutine that waits for the ranks, may raise:

    - `WorkerError`: the worker raised.  The executor remains usable.
    - `StepTimeout`: the deadline passed.  The executor remains usable, unless `on_timeout` is "fail".
    - `PayloadError`: a result cannot be decoded.  The executor remains usable.
    - `ReplyLost`: an answer will not come.  The executor remains usable.
    - `AggregationError`: the aggregator raised.  The executor remains usable.
    - `WorkerDied`: a rank's process ended.  The executor has failed.
    """

    # ------------------------------------------------------------------------------------------------ lifecycle

    @abc.abstractmethod
    async def start(self) -> None:
        """Bring up the ranks and construct their workers.

        Raises:
            WorkerStartError: the first rank that failed, with its own traceback; no process is left behind.
            WorkerDied: a rank's process ended meanwhile.
            StepTimeout: not done within `timeouts.start`.
        """

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Accept no more calls, let those in flight finish within `timeouts.drain`, and end the ranks.

        Bounded by `timeouts.drain`, `stop` and `terminate` together, and the moment that the kernel needs for SIGKILL.
        May be called again, and at any time.  A cancellation meanwhile is raised once the ranks have ended.
        """

    @abc.abstractmethod
    def abort(self) -> None:
        """End the ranks now; what is in flight fails.  `aclose` afterwards waits until nothing of them is left."""

    @abc.abstractmethod
    async def reinitialize_distributed(self, request: ReconfigureDistributedRequest) -> None:
        """Change the parallel sizes of the running executor: all or nothing.

        What was submitted before finishes first, within `timeouts.drain`.  Ranks that have a place in the new layout
        stay and join each other anew, see `Worker`; those that have none are ended, missing ones are started.  Until it
        is done, submitting raises `ExecutorBusy`, and `slot` waits.  Then a new epoch begins.  A cancellation meanwhile
        is raised at the end.

        Args:
            request: the new sizes; `leave` closes the executor.

        Raises:
            ConfigError: impossible sizes.
            StepTimeout: the calls in flight were not done in time, or the ranks did not take their places within
                `timeouts.start`.
            WorkerStartError: a worker could not take its place.
            WorkerDied: a new rank ended meanwhile.

        After an error the ranks are back in their old places, and the executor goes on with them; where they cannot be
        brought back, the executor has failed.
        """

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort()
        await self.aclose()

    # ---------------------------------------------------------------------------------------------------- steps

    @property
    @abc.abstractmethod
    def config(self) -> ExecutorConfig:
        """The configuration, with what was derived filled in."""

    @property
    @abc.abstractmethod
    def max_concurrent_batches(self) -> int:
        """Steps that run at once; more wait in order."""

    @abc.abstractmethod
    def execute_model(self, scheduler_output: Any, *, timeout: float | None = None) -> StepFuture[Any]:
        """Submit one step; returns at once.

        The scheduler output is encoded before this returns and may change afterwards, but for the memory of tensors,
        arrays and byte strings of its top level, which is sent as it is.

        Args:
            scheduler_output: handed to every rank's `execute_model`.
            timeout: seconds from now; None takes `timeouts.methods` or `timeouts.step` of the configuration.

        Raises:
            ExecutorBusy: `max_queued_steps` steps wait already, or the executor is being re-initialised.
        """

    @abc.abstractmethod
    def sample_tokens(self, *args: Any, timeout: float | None = None) -> StepFuture[Any]:
        """Submit the second half of a step whose worker has its sampling in a method of that name.

        It runs behind the `execute_model` submitted before it, and takes no slot of its own.

        Args:
            args: handed to every rank's `sample_tokens`.
            timeout: seconds from now; None takes `timeouts.methods` or `timeouts.step` of the configuration.

        Raises:
            ConfigError: the worker has no such method.
            ExecutorBusy: as for `execute_model`.
        """

    @abc.abstractmethod
    async def slot(self) -> None:
        """Wait until a step submitted now would run at once: the backpressure for engines that produce faster."""

    # -------------------------------------------------------------------------------------------- collective rpc

    @abc.abstractmethod
    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        ranks: Sequence[int] | None = None,
        aggregate: Aggregator | None = None,
    ) -> Any:
        """Run a method of the worker on all ranks, in order with the steps submitted before.

        Args:
            method: its name, or a callable that is given the worker first.
            args: positional arguments, the same for every rank.
            kwargs: keyword arguments.
            timeout: seconds; None takes `timeouts.methods` or `timeouts.rpc` of the configuration.
            ranks: where to run it; None is everywhere.
            aggregate: merges the results; None returns a list of them, in the order of `ranks`.

        Raises:
            ConfigError: the worker has no such method, or there is no such rank.
        """

    @abc.abstractmethod
    async def broadcast(
        self,
        named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
        *,
        method: str = "load_weights",
        bucket_bytes: int = 64 << 20,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Hand tensors of the driver's host memory, such as new weights, to a method of every rank's worker.

        The method is called as `method(named_tensors)` for each bucket of whole tensors, in order with other calls.  It
        gets them on the rank's device, and copies what it keeps: their memory is reused when it has returned and, on a
        GPU, the work that it enqueued on the current stream is done.

        Done when every rank's method has returned for every bucket.  After an error, or a cancellation, some buckets
        may have been handed over.

        Args:
            named_tensors: torch tensors in host memory by name, or pairs; they must not change meanwhile.
            method: the method's name.
            bucket_bytes: tensors that go together; a larger tensor goes alone.
            progress: called with the bytes handed over so far, after each bucket.

        Raises:
            TypeError: something else than a tensor in host memory.
        """

    # ------------------------------------------------------------------------------------------------ observing

    @property
    @abc.abstractmethod
    def failure(self) -> AsyncExecError | None:
        """What ended the executor; None while nothing did."""

    @abc.abstractmethod
    def add_failure_callback(self, callback: Callable[[AsyncExecError], None]) -> None:
        """Have `callback(cause)` called once when the executor fails; at once if it has failed already."""

    @property
    @abc.abstractmethod
    def counters(self) -> Counters:
        """Replies that came too late, from ranks that are gone, or never."""

    @property
    @abc.abstractmethod
    def in_flight(self) -> int:
        """Calls that were sent and are not done."""

    @property
    @abc.abstractmethod
    def queued(self) -> int:
        """Calls that wait for their turn in the driver."""

    @abc.abstractmethod
    def add_observer(self, observer: Observer) -> None:
        """Have `observer` told of the calls submitted from now on."""

    @abc.abstractmethod
    def remove_observer(self, observer: Observer) -> None:
        """Tell `observer` of no further calls; nothing happens where it does not observe."""

    @abc.abstractmethod
    def trace(self, path: str | os.PathLike[str]) -> Trace:
        """Write a timeline of the steps to a file that Perfetto opens: `async with executor.trace(path): ...`.

        Its `start` and `stop` do the same without a block.  The end of the executor ends it too.  Where the variable
        ASYNCEXEC_TRACE names a file, the executor traces itself from start to end.

        Args:
            path: of the file, which is overwritten.
        """

    @abc.abstractmethod
    async def report(self) -> Report:
        """What every rank is doing, with its stacks, and whom the others wait for.

        Answered beside the ranks' main threads, within `timeouts.report`; also for an executor that has failed.
        """

    @abc.abstractmethod
    async def check_health(self, timeout: float | None = None) -> None:
        """Return if every rank is idle or makes progress, however long its call takes already.

        Progress is a call begun or ended, tensors handed on, or a mark by `RankContext.mark_progress`.

        Args:
            timeout: seconds without progress that are too many; None takes `timeouts.health` of the configuration.

        Raises:
            RankUnhealthy: names the ranks that are stopped, silent, dead or stuck, with the report.
        """

    # --------------------------------------------------------------------------------------------- model verbs
    # Thin collective calls: each runs the worker's method of the same name on every rank.

    async def sleep(self, level: int = 1) -> None:
        """Free device memory until `wake_up`; the levels are the worker's."""
        await self.collective_rpc("sleep", (level,))

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take back what `sleep` freed, or the named parts of it."""
        await self.collective_rpc("wake_up", (tags,))

    async def profile(self, is_start: bool = True) -> None:
        """Start or stop the workers' profilers."""
        await self.collective_rpc("profile", (is_start,))

    async def add_lora(self, lora_request: Any) -> bool:
        """Load an adapter; whether every rank did."""
        return all(await self.collective_rpc("add_lora", (lora_request,)))

    async def remove_lora(self, lora_id: int) -> bool:
        """Drop an adapter; whether every rank had it."""
        return all(await self.collective_rpc("remove_lora", (lora_id,)))

    async def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter from being evicted; whether every rank did."""
        return all(await self.collective_rpc("pin_lora", (lora_id,)))

    async def list_loras(self) -> set[int]:
        """The adapters that every rank has."""
        return set.intersection(*map(set, await self.collective_rpc("list_loras")))

    async def save_sharded_state(self, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        """Have every rank write its part of the weights below `path`."""
        await self.collective_rpc("save_sharded_state", (path, pattern, max_size))
