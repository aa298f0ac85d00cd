"""The one implementation of `Executor`, over any transport: its life, and the interface of its calls."""

import asyncio
import enum
import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from asyncexec.aggregate import STEP_METHODS, Aggregator, AllRanks, FirstRank, make_aggregators, tell_rank_lost
from asyncexec.broadcasting import Broadcaster
from asyncexec.calls import Calls
from asyncexec.codec import Codec
from asyncexec.config import TRACE_VARIABLE, ExecutorConfig, ReconfigureDistributedRequest, convert
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
from asyncexec.observing import Observer
from asyncexec.pickling import dumps
from asyncexec.registry import load_transport, transport_names
from asyncexec.reinitializing import Reinitializer
from asyncexec.reporting import Reporter
from asyncexec.runtime import WorkerSpec, load_worker_class
from asyncexec.supervision import inspect_ranks, require_health
from asyncexec.tracing import Timeline, Trace
from asyncexec.transport import RankLoss, Transport
from asyncexec.window import Call, Counters
from asyncexec.wire import Frame, FrameKind

logger = logging.getLogger("asyncexec")

_ALL = AllRanks()
_FIRST = FirstRank()

_own_traces = itertools.count(1)
"""Numbers the executors of this process that trace themselves, for each needs a file of its own."""


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


_RUNNING = _State.RUNNING


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
        self._broadcaster = Broadcaster(self._transport.staging, self._call_all)
        self._state = _State.NEW
        self._aborted = False
        self._opened = False
        self._closing: asyncio.Task[None] | None = None
        self._reporter = Reporter(self._report_text)
        self._explaining: set[asyncio.Task[None]] = set()
        self._reinitializer = Reinitializer(
            self._calls,
            self._transport,
            self._take_places,
            self._interrupted,
            lambda failure: self._fail(failure, lambda call: ExecutorFailed(failure)),
        )
        self._reinitializing: asyncio.Task[None] | None = None
        self._failure: AsyncExecError | None = None
        self._failure_callbacks: list[Callable[[AsyncExecError], None]] = []
        self._traces: list[Trace] = []

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
            if scope.cancelled_caught:
                raise StepTimeout(f"not started after {limit:g} s", timeout=limit, waiting_for=(), method="start")
            self._opened = True
            self._check_starting()
            rest = max(0.0, scope.deadline - anyio.current_time())
            await self._take_places(self._ranks, rest)
            self._check_starting()
            await self._reporter.open()
            self._check_starting()
            if path := os.environ.get(TRACE_VARIABLE):
                await self.trace(_own_trace(path)).start()
                self._check_starting()
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
            await self._stop_traces()  # while there are ranks to ask
        finally:
            try:
                await self._transport.close()
            finally:
                await asyncio.gather(*self._explaining, return_exceptions=True)
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
        old = self._config
        try:
            await self._reinitializer.change(old, config)
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

    def _take_places(self, ranks: Sequence[int], limit: float) -> StepFuture[Any]:
        """Have these ranks join each other, and their workers take their places, within so many seconds."""
        return self._submit(self._start_frame(), "start", ranks, _ALL, limit)  # which tells who is late

    def _interrupted(self) -> AsyncExecError | None:
        """What keeps the executor from being re-initialised."""
        if self._failure is None and self._state is not _State.REINITIALIZING:
            return ExecutorClosed(f"the executor {self._state.value}")
        return self._failure

    def _adopt(self, config: ExecutorConfig) -> None:
        """Work with this configuration from now on."""
        self._config = config
        self._ranks, self._output_rank = tuple(range(config.world_size)), config.output_rank

    def _tell_aggregators(self, lost: int) -> None:
        for aggregator in {id(aggregator): aggregator for aggregator in self._aggregators.values()}.values():
            try:
                tell_rank_lost(aggregator, lost)
            except Exception:
                logger.exception("%r raised when it was told that rank %d is lost", aggregator, lost)

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
        if method == "execute_model" and kwargs:
            raise ConfigError(
                f"kwargs is {dict(kwargs)!r}; valid: execute_model takes its scheduler output by position"
            )
        if not isinstance(method, str) and not callable(method):
            raise ConfigError(f"method is {method!r}; valid: the name of a method, or a callable")
        if aggregate is not None and not isinstance(aggregate, Aggregator):
            raise ConfigError(f"aggregate is {aggregate!r}; valid: an object with the methods of Aggregator")
        name = method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))
        limit = self._config.timeouts.for_method(name, step=False) if timeout is None else timeout
        submitted = time.monotonic_ns()
        frame = self._encode(name, method, args, kwargs or {})
        if aggregate is None:
            aggregate = self._aggregators.get(name, _ALL) if name not in STEP_METHODS else _ALL
        results = await self._submit(frame, name, targets, aggregate, limit, submitted=submitted)
        if aggregate is _ALL and ranks is not None:
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
        await self._broadcaster.broadcast(named_tensors, method, bucket_bytes, progress)

    def _call_all(
        self, name: str, target: str | Callable[..., Any], args: Sequence[Any], *, bounded: bool
    ) -> StepFuture[Any]:
        limit = self._config.timeouts.for_method(name, step=False) if bounded else None
        return self._submit(self._encode(name, target, args, {}), name, self._ranks, _ALL, limit)

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
            return self._codec.encode_call(target, args, kwargs)
        except ConfigError:
            raise
        except Exception as error:
            raise PayloadError(f"the arguments cannot be sent: {type(error).__name__}: {error}", method=name) from error

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
        output_rank = self._output_rank if self._output_rank in ranks else ranks[0]
        return self._calls.submit(
            frame, method, ranks, output_rank, aggregator, timeout, slot=slot, ordered=ordered, submitted=submitted
        )

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

    @property
    def in_flight(self) -> int:
        return self._calls.in_flight

    @property
    def queued(self) -> int:
        return self._calls.queued

    def add_observer(self, observer: Observer) -> None:
        self._observe((*self._calls.observers, observer) if self._calls.observers else (observer,))

    def remove_observer(self, observer: Observer) -> None:
        self._observe(tuple(other for other in self._calls.observers or () if other is not observer))

    def _observe(self, observers: tuple[Observer, ...]) -> None:
        self._calls.observers = observers or None
        self._calls.traces = any(isinstance(observer, Timeline) for observer in observers)

    def trace(self, path: str | os.PathLike[str]) -> Trace:
        def attach(trace: Trace, timeline: Timeline) -> None:
            self._traces.append(trace)
            self.add_observer(timeline)

        def detach(trace: Trace, timeline: Timeline) -> None:
            if trace in self._traces:
                self._traces.remove(trace)
            self.remove_observer(timeline)

        async def fetch() -> None:
            if self._failure is None and not self._aborted:  # else the ranks have been killed
                await self._inspect(stacks=False)

        return Trace(path, attach, detach, fetch)

    async def _stop_traces(self) -> None:
        for trace in tuple(self._traces):
            try:
                await trace.stop()
            except AsyncExecError:
                logger.debug("said already, and again to who stops it", exc_info=True)

    async def report(self) -> Report:
        return await self._inspect(stacks=True)

    async def _inspect(self, *, stacks: bool) -> Report:
        if not self._opened:
            raise ExecutorClosed(f"the executor {self._state.value}: it has no ranks to report of")
        report = await inspect_ranks(self._transport, self._ranks, self._config.timeouts.report, stacks=stacks)
        for observer in self._calls.observers or ():
            observer.ranks_reported(report)
        return report

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
            self._reinitializer.rank_died(rank, died())
            return
        self._fail(died(), died)
        self._tell_aggregators(rank)

    # --------------------------------------------------------------------------------------------------- inside

    def _fail(self, cause: AsyncExecError, error_for: Callable[[Call], AsyncExecError]) -> None:
        """The executor cannot go on: fail what is in flight, end the ranks, tell who asked to be told."""
        if self._failure is not None or self._aborted:
            return
        self._failure = cause
        self._calls.fail_all(error_for)
        self._transport.abort()
        for observer in self._calls.observers or ():
            observer.executor_failed(cause)
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
        if self._failure is None and self._state is _RUNNING:
            self._check_thread()
            return
        if self._failure is not None:
            raise ExecutorFailed(self._failure)
        if self._state is _State.REINITIALIZING:
            raise ExecutorBusy(f"the executor {self._state.value}: await executor.slot() before submitting more")
        raise ExecutorClosed(f"the executor {self._state.value}")

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError("executors belong to the thread of their event loop; use loop.call_soon_threadsafe")


def _refuse_unknown_tables(config: ExecutorConfig) -> None:
    installed = transport_names()
    for name in config.options:
        if name not in installed:
            raise ConfigError(f"options.{name}: there is no such transport; installed: {', '.join(installed)}")


def _own_trace(path: str) -> Path:
    """The file that ASYNCEXEC_TRACE names; for further executors of this process, one beside it with a number."""
    file, number = Path(path), next(_own_traces)
    return file if number == 1 else file.with_stem(f"{file.stem}.{number}")


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
        if not task.cancelled():
            task.exception()  # whoever else waits for the task hears of it
        raise cancelled
    task.result()


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
