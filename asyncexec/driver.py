"""The one implementation of `Executor`, over any transport: window, codec, deadlines and aggregation put together."""

import asyncio
import collections
import enum
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import msgspec

from asyncexec.aggregate import Aggregator, AllRanks, make_aggregator
from asyncexec.codec import Codec
from asyncexec.config import ExecutorConfig, convert
from asyncexec.errors import (
    AsyncExecError,
    ConfigError,
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
from asyncexec.runtime import RemoteFailure, WorkerSpec, load_worker_class
from asyncexec.submission import Reply, Submission
from asyncexec.supervision import inspect_ranks, require_health
from asyncexec.transport import RankLoss, Transport
from asyncexec.window import Call, Complete, Counters, Decision, Fail, Send, Window
from asyncexec.wire import ALL_RANKS, Frame, FrameKind

logger = logging.getLogger("asyncexec")

_ALL = AllRanks()

_DEATH_LIMIT = 0.08
"""Seconds between a rank's connections breaking and the kernel telling of its death; more than enough."""


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
        aggregator: merges each step's outputs; None makes the one that `config.aggregator` names.
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
        self._config = config
        worker_class = load_worker_class(worker)
        self._codec = Codec(worker_class)
        # a rank has another __main__: from there the class itself travels
        by_value = worker_class.__module__ == "__main__"
        self._spec = WorkerSpec(
            worker_class if by_value else worker, dict(worker_kwargs), self._codec.fingerprint, config.max_frame_bytes
        )
        self._aggregator = aggregator or make_aggregator(config.aggregator)
        self._window = Window(config.world_size, config.max_concurrent_batches, config.max_queued_steps)
        if transport is None:
            transport = load_transport(config.transport)
            _refuse_unknown_tables(config)
        options = convert(
            config.options.get(config.transport, {}), transport.Options, where=f"options.{config.transport}: "
        )
        self._transport = transport(config, options, self)
        self._ranks = tuple(range(config.world_size))
        self._rank_free = [0] * config.world_size
        self._state = _State.NEW
        self._aborted = False
        self._opened = False
        self._closing: asyncio.Task[None] | None = None
        self._decisions: collections.deque[Decision] = collections.deque()
        self._carrying_out = False
        self._failed_calls: collections.deque[tuple[int, int]] = collections.deque(maxlen=256)
        self._changed: anyio.Event | None = None
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._held: dict[int, tuple[Call, WorkerError]] = {}
        self._reporter = Reporter(self._report_text)
        self._explaining: set[asyncio.Task[None]] = set()
        self._failure: AsyncExecError | None = None
        self._failure_callbacks: list[Callable[[AsyncExecError], None]] = []

    # ------------------------------------------------------------------------------------------------ lifecycle

    async def start(self) -> None:
        if self._state is not _State.NEW:
            raise ExecutorClosed(f"the executor {self._state.value}; each executor starts once")
        self._state = _State.STARTING
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        limit = self._config.timeouts.start
        try:
            with anyio.move_on_after(limit) as scope:
                await self._transport.open()
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
                await self._until(lambda: not self._window.in_flight + self._window.queued)
        self._state = _State.CLOSING
        try:
            await self._reporter.close()
        finally:
            await self._transport.close()
            await asyncio.gather(*self._explaining)
            self._end_calls("the executor was closed before the call was done")
            self._state = _State.CLOSED

    def abort(self) -> None:
        if self._state not in (_State.NEW, _State.CLOSED):
            self._state = _State.CLOSING
            self._aborted = True
            self._transport.abort()
            self._end_calls("the executor was aborted")

    def _end_calls(self, why: str) -> None:
        for call_id in list(self._held):
            self._release(call_id)
        self._carry_out(self._window.fail(lambda call: ExecutorClosed(f"{why} [{call.method}, call {call.call_id}]")))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
        await self._until(lambda: self._window.has_room or self._state is not _State.RUNNING)
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
            raise ConfigError(f"aggregate is {aggregate!r}; valid: an object with `needs_all_ranks` and `aggregate`")
        name = method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))
        limit = self._config.timeouts.for_method(name, step=False) if timeout is None else timeout
        submitted = time.monotonic_ns()
        frame = self._encode(name, method, args, kwargs or {})
        results = await self._submit(frame, name, targets, aggregate or _ALL, limit, submitted=submitted)
        if aggregate is None and ranks is not None:
            by_rank = dict(zip(sorted(targets), results, strict=True))
            return [by_rank[rank] for rank in targets]
        return results

    def _step(self, method: str, args: Sequence[Any], timeout: float | None, *, slot: bool) -> StepFuture[Any]:
        submitted = time.monotonic_ns()
        frame = self._encode(method, method, args, {})
        limit = self._config.timeouts.for_method(method, step=True) if timeout is None else timeout
        return self._submit(
            frame, method, self._ranks, self._aggregator, limit, slot=slot, ordered=True, submitted=submitted
        )

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
        if refusal := self._transport.refusal(frame, ranks):
            raise PayloadError(f"the arguments {refusal}", method=method)
        output_rank = self._config.output_rank if self._config.output_rank in ranks else ranks[0]
        wanted = ranks if aggregator.needs_all_ranks else (output_rank,)
        frame.reply_to = ALL_RANKS if aggregator.needs_all_ranks else output_rank
        encoded = time.monotonic_ns()
        submission = Submission(frame, StepFuture(self._loop), aggregator, output_rank, submitted or encoded, encoded)
        call = Call(method, ranks, wanted, slot, ordered, timeout, submission)
        decisions = self._window.submit(call, self._loop.time())
        submission.future.call_id = frame.call_id = call.call_id
        frame.epoch = call.epoch
        self._carry_out(decisions)
        self._arm_timer()
        return submission.future

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
        return self._window.counters

    async def report(self) -> Report:
        if not self._opened:
            raise ExecutorClosed(f"the executor {self._state.value}: it has no ranks to report of")
        return await inspect_ranks(self._transport, self._ranks, self._config.timeouts.report)

    async def _report_text(self) -> str:
        config = self._config
        ranks = f"tensor parallel {config.tensor_parallel_size}, pipeline parallel {config.pipeline_parallel_size}"
        calls = f"{self._window.in_flight} calls in flight, {self._window.queued} queued"
        failed = f"\nfailed: {self._failure}" if self._failure else ""
        report = await self.report()
        return f"{config.transport}, {ranks}; {calls}; {self.counters}{failed}\n{report.with_stacks()}\n"

    async def check_health(self, timeout: float | None = None) -> None:
        self._check_running()
        require_health(await self.report(), self._config.timeouts.health if timeout is None else timeout)

    # ----------------------------------------------------------------------------------- events of the transport

    def frame_received(self, rank: int, frame: Frame) -> None:
        """A rank's answer; called by the transport."""
        if frame.kind is FrameKind.REPLY:
            reply = Reply(frame, time.monotonic_ns(), self._rank_free[rank])
            self._rank_free[rank] = frame.ended_ns
            decisions = self._window.replied(rank, frame.call_id, frame.epoch, reply)
        elif frame.kind is FrameKind.ERROR:
            self._rank_raised(rank, frame)
            return
        else:
            decisions = self._window.skipped(rank, frame.call_id, frame.epoch)
        self._carry_out(decisions)

    def rank_lost(self, rank: int, loss: RankLoss) -> None:
        """A rank ended by itself; called by the transport.  Without it no call can complete: the executor fails."""
        last = self._window.last_sent(rank)
        died = functools.partial(_worker_died, rank, loss, f"{last.method}, call {last.call_id}" if last else "none")
        self._fail(died(), died)

    # --------------------------------------------------------------------------------------------------- inside

    def _rank_raised(self, rank: int, frame: Frame) -> None:
        failure = msgspec.msgpack.decode(frame.body, type=RemoteFailure)
        call = self._window.find(frame.call_id, frame.epoch)
        error = WorkerError(
            failure.type,
            failure.message,
            failure.traceback,
            method=call.method if call else self._codec.method_name(frame.method) or "a callable",
            call_id=frame.call_id,
            epoch=frame.epoch,
            rank=rank,
        )
        if call is None and (frame.epoch, frame.call_id) not in self._failed_calls:
            # the call needed the output of other ranks alone, and has completed with it
            logger.warning("rank %d failed in a call that was complete without it: %s", rank, error)
        decisions = self._window.errored(rank, frame.call_id, frame.epoch, error)
        if failure.in_collective:
            # the peer's death, which breaks a collective, is the cause to report; the kernel is about to tell of it
            held = [decision for decision in decisions if isinstance(decision, Fail) and decision.error is error]
            for decision in held:
                self._held[frame.call_id] = decision.call, error
                self._failed_calls.append((frame.epoch, frame.call_id))
                self._loop.call_later(_DEATH_LIMIT, self._release, frame.call_id)
            decisions = [decision for decision in decisions if decision not in held]
        self._carry_out(decisions)

    def _release(self, call_id: int) -> None:
        """Nobody died: an error in a collective is what it seemed to be."""
        call, error = self._held.pop(call_id, (None, None))
        if call is not None and error is not None:
            call.content.future.set_exception(error)

    def _fail(self, cause: AsyncExecError, error_for: Callable[[Call], AsyncExecError]) -> None:
        """The executor cannot go on: fail what is in flight, end the ranks, tell who asked to be told."""
        if self._failure is not None or self._aborted:
            return
        self._failure = cause
        for call, _ in self._held.values():
            call.content.future.set_exception(error_for(call))
        self._held.clear()
        self._carry_out(self._window.fail(error_for))
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

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        """Carry out decisions in order, also where carrying out one of them brings about more."""
        self._decisions.extend(decisions)
        if self._carrying_out:
            return
        self._carrying_out = True
        try:
            while self._decisions:
                self._carry_out_one(self._decisions.popleft())
        finally:
            self._carrying_out = False
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def _carry_out_one(self, decision: Decision) -> None:
        submission: Submission = decision.call.content
        if isinstance(decision, Send):
            submission.send_began = time.monotonic_ns()
            self._transport.send(submission.frame, decision.call.ranks)
            submission.send_ended = time.monotonic_ns()
        elif isinstance(decision, Complete):
            submission.complete(decision.call, self._codec)
        else:
            self._failed_calls.append((decision.call.epoch, decision.call.call_id))
            if isinstance(decision.error, StepTimeout):
                self._time_out(submission.future, decision.error)
            else:
                submission.future.set_exception(decision.error)

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that only `_carry_out` can make true."""
        while not holds():
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()

    def _arm_timer(self) -> None:
        """Have `_expire` called at the next deadline; a timer that is too early arms itself again."""
        deadline = self._window.next_deadline
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_at = self._loop.call_at(deadline, self._expire), deadline

    def _expire(self) -> None:
        self._timer = None
        self._carry_out(self._window.expire(self._loop.time()))
        self._arm_timer()

    def _check_running(self) -> None:
        if self._failure is not None:
            raise ExecutorFailed(self._failure)
        if self._state is not _State.RUNNING:
            raise ExecutorClosed(f"the executor {self._state.value}")
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
