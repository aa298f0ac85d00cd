"""The one implementation of `Executor`, over any transport: its life, and the interface of its calls."""

import asyncio
import enum
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio

from asyncexec.aggregate import STEP_METHODS, Aggregator, AllRanks, FirstRank, make_aggregators, tell_rank_lost
from asyncexec.broadcasting import broadcast
from asyncexec.calls import Calls
from asyncexec.codec import Codec
from asyncexec.config import ExecutorConfig, ReconfigureDistributedRequest, convert
from asyncexec.errors import (
    AsyncExecError,
    ConfigError,
    ExecutorBusy,
    ExecutorClosed,
    ExecutorFailed,
    PayloadError,
    StepTimeout,
    WorkerDied,
    WorkerError,
    WorkerStartError,
)
from asyncexec.executor import Executor
from asyncexec.future import StepFuture
from asyncexec.inspection import Report
from asyncexec.pickling import dumps
from asyncexec.registry import load_transport, transport_names
from asyncexec.reporting import Reporter
from asyncexec.runtime import WorkerSpec, load_worker_class
from asyncexec.supervision import inspect_ranks, require_health
from asyncexec.transport import RankLoss, Transport
from asyncexec.window import Call, Counters
from asyncexec.wire import Frame, FrameKind

logger = logging.getLogger("asyncexec")

_ALL = AllRanks()
_FIRST = FirstRank()


def create_executor(
    config: ExecutorConfig | Mapping[str, Any],
    worker: str | type,
    *,
    worker_kwargs: Mapping[str, Any] | None = None,
    aggregator: Aggregator | None = None,
    transport: type[Transport] | None = None,
) -> Executor:
    """An executor for `worker`, not yet started: use it with `async with`, or call `start`.

    Args:
        config: an ExecutorConfig, or a plain dict of its keys.
        worker: a class, or "module:Class".
        worker_kwargs: keyword arguments for its constructor, beside the rank context.
        aggregator: merges each step's outputs; None makes what `config.aggregator` names.
        transport: a class to use in place of the one that `config.transport` names, such as one with faults built in.

    Raises:
        ConfigError: the configuration, or the worker, cannot work; says which key is wrong and what is valid.
        TransportUnavailable: the transport is not installed, or lacks something; says what to install.
    """
    return Driver(ExecutorConfig.of(config), worker, worker_kwargs or {}, aggregator, transport)


class _State(enum.Enum):
    NEW = "has not been started"
    STARTING = "is starting"
    RUNNING = "is running"
    REINITIALIZING = "is being re-initialised"
    CLOSING = "is closing"
    CLOSED = "is closed"


class Driver(Executor):
    """See `create_executor`; the transport calls `frame_received` and `rank_lost`."""

    def __init__(
        self,
        config: ExecutorConfig,
        worker: str | type,
        worker_kwargs: Mapping[str, Any],
        aggregator: Aggregator | None,
        transport: type[Transport] | None = None,
    ) -> None:
        self._adopt(config)
        worker_class = load_worker_class(worker)
        self._codec = Codec(worker_class)
        # a rank has another __main__: from there the class itself travels
        by_value = worker_class.__module__ == "__main__"
        self._spec = WorkerSpec(
            worker_class if by_value else worker, dict(worker_kwargs), self._codec.fingerprint, config.max_frame_bytes
        )
        self._aggregators = make_aggregators(config.aggregator)
        if aggregator is not None and not isinstance(aggregator, Aggregator):
            raise ConfigError(f"aggregator is {aggregator!r}; valid: an object with the methods of Aggregator")
        if aggregator is not None:
            self._aggregators |= dict.fromkeys(STEP_METHODS, aggregator)
        if transport is None:
            transport = load_transport(config.transport)
            _refuse_unknown_tables(config)
        options = convert(
            config.options.get(config.transport, {}), transport.Options, where=f"options.{config.transport}: "
        )
        self._transport = transport(config, options, self)
        self._calls = Calls(config, self._codec, self._transport, self._time_out)
        self._state = _State.NEW
        self._aborted = False
        self._opened = False
        self._closing: asyncio.Task[None] | None = None
        self._reporter = Reporter(self._report_text)
        self._explaining: set[asyncio.Task[None]] = set()
        self._reinitializing: asyncio.Task[None] | None = None
        self._failure: AsyncExecError | None = None
        self._failure_callbacks: list[Callable[[AsyncExecError], None]] = []

    # ------------------------------------------------------------------------------------------------ lifecycle

    async def start(self) -> None:
        if self._state is not _State.NEW:
            raise ExecutorClosed(f"the executor {self._state.value}; each executor starts once")
        self._state = _State.STARTING
        self._loop = asyncio.get_running_loop()
        self._calls.begin(self._loop)
        self._thread = threading.get_ident()
        limit = self._config.timeouts.start
        try:
            with anyio.move_on_after(limit) as scope:
                await self._transport.open(self._config)
                self._opened = True
                self._check_starting()
                await self._submit(self._start_frame(), "start", self._ranks, _ALL, limit)
                self._check_starting()
                await self._reporter.open()
                self._check_starting()
            if scope.cancelled_caught:
                raise StepTimeout(f"not started after {limit:g} s", timeout=limit, waiting_for=(), method="start")
        except BaseException as error:
            self.abort()
            await self.aclose()
            await self._reporter.close()  # once more: it may have been opened behind an aclose
            if isinstance(error, WorkerError):
                raise WorkerStartError.of(error) from None
            raise
        self._state = _State.RUNNING

    def _check_starting(self) -> None:
        """After each await of `start`: meanwhile somebody may have closed the executor, or a rank been lost."""
        if self._failure is not None:
            raise self._failure
        if self._state is not _State.STARTING:
            raise ExecutorClosed("the executor was closed while it was starting")

    async def aclose(self) -> None:
        if self._state in (_State.NEW, _State.CLOSED):
            self._state = _State.CLOSED
            return
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await _outlast(self._closing)

    async def _close(self) -> None:
        """End everything.  A task of its own: who awaits it may be cancelled, the ranks end all the same."""
        if self._state is _State.RUNNING:
            self._state = _State.CLOSING
            with anyio.move_on_after(self._config.timeouts.drain):
                await self._calls.until(lambda: self._calls.are_done)
        self._state = _State.CLOSING
        try:
            await self._reporter.close()
        finally:
            await self._transport.close()
            await asyncio.gather(*self._explaining)
            self._calls.end("the executor was closed before the call was done")
            if self._reinitializing is not None:
                await asyncio.wait([self._reinitializing])
            self._state = _State.CLOSED

    def abort(self) -> None:
        if self._state not in (_State.NEW, _State.CLOSED):
            self._state = _State.CLOSING
            self._aborted = True
            self._transport.abort()
            self._calls.end("the executor was aborted")

    async def reinitialize_distributed(self, request: ReconfigureDistributedRequest) -> None:
        self._check_running()
        config = self._config.reconfigured(request)
        if request.leave:
            await self.aclose()
            return
        self._state = _State.REINITIALIZING
        self._reinitializing = self._loop.create_task(self._reinitialize(config))
        await _outlast(self._reinitializing)

    async def _reinitialize(self, config: ExecutorConfig) -> None:
        """Change the ranks' layout, or change it back.  A task of its own: who awaits it may be cancelled."""
        old, limit = self._config, self._config.timeouts.drain
        try:
            with anyio.move_on_after(limit) as scope:
                await self._calls.until(lambda: self._calls.are_done)
            if scope.cancelled_caught:
                message = f"the calls in flight were not done within {limit:g} s"
                raise StepTimeout(message, timeout=limit, waiting_for=(), method="reinitialize_distributed")
            self._check_reinitializing()
            started = range(old.world_size, config.world_size)
            try:
                await self._bring_up(config, started)
                self._check_reinitializing()
            except Exception:
                await self._transport.close(started)
                raise
            try:
                await self._take_places(config)
            except Exception as error:
                await self._take_back(old, started, error)
                raise
            self._calls.resize(config.world_size, config.max_concurrent_batches)
            self._calls.begin_epoch()
            self._adopt(config)
            leaving = range(config.world_size, old.world_size)
            for rank in leaving:
                self._tell_aggregators(rank)
            await self._transport.close(leaving)
        except WorkerError as error:
            raise WorkerStartError.of(error) from None
        except Exception:
            if self._failure is None and self._state is not _State.REINITIALIZING:
                raise ExecutorClosed("the executor was closed while it was being re-initialised") from None
            raise
        finally:
            if self._state is _State.REINITIALIZING:
                self._state = _State.RUNNING
            self._calls.look_again()  # whoever waits for a slot

    def _check_reinitializing(self) -> None:
        """After an await: meanwhile somebody may have closed the executor, or a rank been lost."""
        if self._failure is not None:
            raise self._failure
        if self._state is not _State.REINITIALIZING:
            raise ExecutorClosed(f"the executor {self._state.value}")

    async def _bring_up(self, config: ExecutorConfig, started: Sequence[int]) -> None:
        """Start the ranks that are missing; the others must not be made to wait for one that does not come up."""
        limit = config.timeouts.start
        with anyio.move_on_after(limit) as scope:
            await self._transport.open(config)
            for rank in started:
                await self._transport.inspect(rank)
        if scope.cancelled_caught:
            raise StepTimeout(f"new ranks not up after {limit:g} s", timeout=limit, waiting_for=started, method="start")

    async def _take_places(self, config: ExecutorConfig) -> None:
        """Have the ranks of `config` join each other, and their workers take their places."""
        everybody = max(config.world_size, self._config.world_size)
        self._calls.resize(everybody, config.max_concurrent_batches)
        ranks = range(config.world_size)
        await self._submit(self._start_frame(), "start", ranks, _ALL, config.timeouts.start)

    async def _take_back(self, old: ExecutorConfig, started: Sequence[int], cause: Exception) -> None:
        """Have the ranks take their old places again; `cause` is why."""
        if self._failure is not None or self._state is not _State.REINITIALIZING:
            return  # the executor has failed, or is being closed
        try:
            await self._transport.close(started)
            self._calls.resize(old.world_size, old.max_concurrent_batches)
            await self._transport.open(old)
            await self._take_places(old)
        except Exception as error:  # noqa: BLE001 - whatever it is, the ranks have no places any more
            if self._failure is None and self._state is _State.REINITIALIZING:
                failure = _going_back_failed(error, cause)
                self._fail(failure, lambda call: ExecutorFailed(failure))

    def _adopt(self, config: ExecutorConfig) -> None:
        """Work with this configuration from now on."""
        self._config = config
        self._ranks = tuple(range(config.world_size))

    def _tell_aggregators(self, lost: int) -> None:
        for aggregator in self._aggregators.values():
            tell_rank_lost(aggregator, lost)

    def _start_frame(self) -> Frame:
        try:
            body, buffers = dumps(self._spec)
        except Exception as error:
            raise ConfigError(f"the worker cannot be sent to its ranks: {type(error).__name__}: {error}") from error
        step = max(0, self._codec.method_number("execute_model"))
        return Frame(FrameKind.START, method=step, body=body, buffers=buffers)

    # ---------------------------------------------------------------------------------------------------- calls

    @property
    def config(self) -> ExecutorConfig:
        return self._config

    @property
    def max_concurrent_batches(self) -> int:
        return self._config.max_concurrent_batches

    def execute_model(self, scheduler_output: Any, *, timeout: float | None = None) -> StepFuture[Any]:
        return self._step("execute_model", (scheduler_output,), timeout, slot=True)

    def sample_tokens(self, *args: Any, timeout: float | None = None) -> StepFuture[Any]:
        return self._step("sample_tokens", args, timeout, slot=False)

    async def slot(self) -> None:
        def settled() -> bool:
            return self._calls.has_room if self._state is _State.RUNNING else self._state is not _State.REINITIALIZING

        await self._calls.until(settled)
        self._check_running()

    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        ranks: Sequence[int] | None = None,
        aggregate: Aggregator | None = None,
    ) -> Any:
        targets = self._ranks if ranks is None else tuple(ranks)
        if not targets or not set(targets) <= set(self._ranks) or len(set(targets)) < len(targets):
            raise ConfigError(f"ranks is {list(targets)}; valid: some of {list(self._ranks)}, each once")
        if method == "execute_model" and len(targets) < len(self._ranks) and self._config.pipeline_parallel_size > 1:
            raise ConfigError("execute_model needs the ranks of every pipeline stage; valid: ranks=None")
        if not isinstance(method, str) and not callable(method):
            raise ConfigError(f"method is {method!r}; valid: the name of a method, or a callable")
        if aggregate is not None and not isinstance(aggregate, Aggregator):
            raise ConfigError(f"aggregate is {aggregate!r}; valid: an object with the methods of Aggregator")
        name = method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))
        limit = self._config.timeouts.for_method(name, step=False) if timeout is None else timeout
        submitted = time.monotonic_ns()
        frame = self._encode(name, method, args, kwargs or {})
        aggregator = aggregate or (self._aggregators.get(name, _ALL) if name not in STEP_METHODS else _ALL)
        results = await self._submit(frame, name, targets, aggregator, limit, submitted=submitted)
        if aggregator is _ALL and ranks is not None:
            by_rank = dict(zip(sorted(targets), results, strict=True))
            return [by_rank[rank] for rank in targets]
        return results

    async def broadcast(
        self,
        named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
        *,
        method: str = "load_weights",
        bucket_bytes: int = 64 << 20,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._check_running()
        staging = self._transport.staging
        await broadcast(named_tensors, method, bucket_bytes, progress, staging, self.collective_rpc)

    def _step(self, method: str, args: Sequence[Any], timeout: float | None, *, slot: bool) -> StepFuture[Any]:
        submitted = time.monotonic_ns()
        frame = self._encode(method, method, args, {})
        limit = self._config.timeouts.for_method(method, step=True) if timeout is None else timeout
        aggregator = self._aggregators.get(method, _FIRST)
        return self._submit(frame, method, self._ranks, aggregator, limit, slot=slot, ordered=True, submitted=submitted)

    def _encode(
        self, name: str, target: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Frame:
        self._check_running()
        try:
            payload = self._codec.encode_call(target, args, kwargs)
        except ConfigError:
            raise
        except Exception as error:
            raise PayloadError(f"the arguments cannot be sent: {type(error).__name__}: {error}", method=name) from error
        return Frame(FrameKind.CALL, method=payload.method, body=payload.body, buffers=payload.buffers)

    def _submit(
        self,
        frame: Frame,
        method: str,
        ranks: Sequence[int],
        aggregator: Aggregator,
        timeout: float | None,
        *,
        slot: bool = False,
        ordered: bool = False,
        submitted: int = 0,
    ) -> StepFuture[Any]:
        """Give a call to the window.  Raises PayloadError where it is too large, ExecutorBusy where it must wait."""
        self._check_size(frame, method, ranks)
        output_rank = self._config.output_rank if self._config.output_rank in ranks else ranks[0]
        return self._calls.submit(
            frame, method, ranks, output_rank, aggregator, timeout, slot=slot, ordered=ordered, submitted=submitted
        )

    def _check_size(self, frame: Frame, method: str, ranks: Sequence[int]) -> None:
        if refusal := self._transport.refusal(frame, ranks):
            raise PayloadError(f"the arguments {refusal}", method=method)

    # ---------------------------------------------------------------------------------------------- observing

    @property
    def failure(self) -> AsyncExecError | None:
        return self._failure

    def add_failure_callback(self, callback: Callable[[AsyncExecError], None]) -> None:
        if self._failure is not None:
            callback(self._failure)
        else:
            self._failure_callbacks.append(callback)

    @property
    def counters(self) -> Counters:
        return self._calls.counters

    async def report(self) -> Report:
        if not self._opened:
            raise ExecutorClosed(f"the executor {self._state.value}: it has no ranks to report of")
        return await inspect_ranks(self._transport, self._ranks, self._config.timeouts.report)

    async def _report_text(self) -> str:
        config = self._config
        ranks = f"tensor parallel {config.tensor_parallel_size}, pipeline parallel {config.pipeline_parallel_size}"
        failed = f"\nfailed: {self._failure}" if self._failure else ""
        report = await self.report()
        return f"{config.transport}, {ranks}; {self._calls}{failed}\n{report.with_stacks()}\n"

    async def check_health(self, timeout: float | None = None) -> None:
        self._check_running()
        require_health(await self.report(), self._config.timeouts.health if timeout is None else timeout)

    # ----------------------------------------------------------------------------------- events of the transport

    def frame_received(self, rank: int, frame: Frame) -> None:
        """A rank's answer; called by the transport."""
        self._calls.frame_received(rank, frame)

    def rank_lost(self, rank: int, loss: RankLoss) -> None:
        """A rank ended by itself; called by the transport.  Without it no call can complete: the executor fails."""
        last = self._calls.last_sent(rank)
        died = functools.partial(_worker_died, rank, loss, f"{last.method}, call {last.call_id}" if last else "none")
        if rank >= self._config.world_size:
            # it was to have a place in a new layout, without which the executor goes on
            if last is not None:
                self._calls.fail_one(rank, last, died(last))
            return
        self._tell_aggregators(rank)
        self._fail(died(), died)

    # --------------------------------------------------------------------------------------------------- inside

    def _fail(self, cause: AsyncExecError, error_for: Callable[[Call], AsyncExecError]) -> None:
        """The executor cannot go on: fail what is in flight, end the ranks, tell who asked to be told."""
        if self._failure is not None or self._aborted:
            return
        self._failure = cause
        self._calls.fail_all(error_for)
        self._transport.abort()
        for callback in self._failure_callbacks:
            self._loop.call_soon(callback, cause)

    def _time_out(self, future: StepFuture[Any], error: StepTimeout) -> None:
        """Fail a caller whose deadline has passed, once the ranks have said what they were doing."""

        async def explain() -> None:
            try:
                error.report = await self.report()
            finally:
                future.set_exception(error)
                if self._config.on_timeout == "fail":
                    self._fail(error, lambda call: ExecutorFailed(error))

        if error.waiting_for:
            task = self._loop.create_task(explain())
            self._explaining.add(task)
            task.add_done_callback(self._explaining.discard)
        else:
            future.set_exception(error)

    def _check_running(self) -> None:
        if self._failure is not None:
            raise ExecutorFailed(self._failure)
        if self._state is _State.REINITIALIZING:
            raise ExecutorBusy(f"the executor {self._state.value}: await executor.slot() before submitting more")
        if self._state is not _State.RUNNING:
            raise ExecutorClosed(f"the executor {self._state.value}")
        self._check_thread()

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError("executors belong to the thread of their event loop; use loop.call_soon_threadsafe")


def _refuse_unknown_tables(config: ExecutorConfig) -> None:
    installed = transport_names()
    for name in config.options:
        if name not in installed:
            raise ConfigError(f"options.{name}: there is no such transport; installed: {', '.join(installed)}")


async def _outlast(task: asyncio.Task[None]) -> None:
    """Wait for a task that is bounded, also if cancelled meanwhile; the cancellation comes after it."""
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


def _going_back_failed(error: Exception, cause: Exception) -> AsyncExecError:
    failure = AsyncExecError(
        f"re-initialising failed ({type(cause).__name__}: {cause}), and so did going back to the old layout: "
        f"{type(error).__name__}: {error}"
    )
    failure.__cause__ = error
    return failure


def _worker_died(rank: int, loss: RankLoss, last_call: str, call: Call | None = None) -> WorkerDied:
    return WorkerDied(
        f"rank {rank} died: {loss.reason}",
        pid=loss.pid,
        exit_code=loss.exit_code,
        signal=loss.signal,
        last_call=last_call,
        stderr=loss.stderr,
        node=loss.node,
        method=call.method if call else "",
        call_id=call.call_id if call else 0,
        epoch=call.epoch if call else 0,
        rank=rank,
    )
