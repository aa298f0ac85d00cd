"""The step timeline: what driver and ranks did when, as a trace that Perfetto and chrome://tracing open.

    async with executor.trace("steps.json"):
        ...

`Timeline` makes events of what an executor tells its observers; `Trace` fetches the ranks' part, and writes the file.
Format: "Trace Event Format" of the Chromium project, the JSON array form.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import anyio
import anyio.lowlevel
import msgspec

from asyncexec.errors import AsyncExecError, ConfigError
from asyncexec.inspection import RankReport, RankSpan, Report
from asyncexec.observing import CallRecord

logger = logging.getLogger("asyncexec")

_FETCH_EVERY = 64
"""Calls after which the ranks are asked for what they noted; they keep 4096, in case the driver is late."""

_FLUSH_AFTER = 1.0
"""Seconds that something may wait to be written: what is lost at most when the driver is killed."""

_AT_ONCE = 4
"""Calls or spans that become events in one turn of the event loop, which a step may have to wait for: about 50 us."""

_MAX_KEPT = 8192
"""Replies whose ranks have not told more about them; the rest of them is written as the driver knows it."""

_DRIVER = 1
_NONE: dict[str, Any] = {}
_encode = msgspec.json.Encoder().encode


class Timeline:
    """Makes trace events; see `Observer`.

    Args:
        due: called with the seconds after which to fetch and write.
    """

    def __init__(self, due: Callable[[float], None]) -> None:
        self.events: list[bytes] = []
        self.reports: list[Report] = []
        self._due = due
        self._began = time.monotonic_ns()
        self._calls = 0
        self._happened: list[tuple[CallRecord, int, bool]] = []
        self._ended = False
        self._open: dict[tuple[int, int], CallRecord] = {}
        self._told: set[tuple[int, int, int]] = set()
        self._kept: dict[tuple[int, int, int], RankSpan] = {}
        self._clocks: dict[int, RankReport] = {}
        self._name(_DRIVER, "driver", 1, ("event loop",))

    # ------------------------------------------------------------------------------------------ as an observer

    def call_submitted(self, call: CallRecord) -> None:
        """It is unfinished until it is done."""
        if not self._ended:
            self._open[call.epoch, call.call_id] = call

    def call_done(self, call: CallRecord) -> None:
        """Keep it: `catch_up` writes it, beside the next steps."""
        if not self._ended:
            self._happened.append((call, 0, False))
            self._calls += 1
            self._due(_FLUSH_AFTER if self._calls % _FETCH_EVERY else 0.0)

    def call_awaited(self, call: CallRecord, at: int, cancelled: bool) -> None:
        """Keep it too."""
        if not self._ended:
            self._happened.append((call, at, cancelled))

    def ranks_reported(self, report: Report) -> None:
        """Keep the notes that came along, which are gone from the ranks; `catch_up` takes its time with them."""
        self.reports.append(report)

    def executor_failed(self, cause: AsyncExecError) -> None:
        """Mark the moment."""
        self._instant(f"executor failed: {type(cause).__name__}", time.monotonic_ns())

    # -------------------------------------------------------------------------------------------- ranks, ending

    async def catch_up(self) -> None:
        """Write what driver and ranks noted, a little in each turn of the loop."""
        happened, self._happened = self._happened, []
        reports, self.reports = self.reports, []
        for n, (call, at, cancelled) in enumerate(happened, start=1):
            self._add_happened(call, at, cancelled)
            if n % _AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
        for rank in (rank for report in reports for rank in report.ranks):
            self._set_clock(rank)
            for n, span in enumerate(rank.spans, start=1):
                self._take_span(rank.rank, span)
                if n % _AT_ONCE == 0:
                    await anyio.lowlevel.checkpoint()
        if len(self._kept) > _MAX_KEPT:
            self._add_kept()

    def end(self) -> None:
        """Write what is unfinished, and what ranks that are gone did not tell."""
        self._ended = True
        for happened in self._happened:
            self._add_happened(*happened)
        for call in self._open.values():
            self._add_call(call, "unfinished when the trace ended", time.monotonic_ns())
        self._add_kept()

    def _add_happened(self, call: CallRecord, at: int, cancelled: bool) -> None:
        """Write the driver's part of a call that is done, or of an await that is."""
        if not at:
            self._add_call(call, _outcome(call.error), call.done)
            self._keep_replies(call)
            self._open.pop((call.epoch, call.call_id), None)
        elif cancelled:
            self._instant(f"{call.method} {call.call_id}: await cancelled", at)
        else:
            self._asynchronous(_id(call), "until awaited", call.done, at)

    def _keep_replies(self, call: CallRecord) -> None:
        """Keep what the replies say until the ranks say more, unless they have."""
        for reply in call.replies:
            key = (reply.rank, call.epoch, call.call_id)
            if key in self._told:
                self._told.discard(key)
            else:
                span = RankSpan(call.call_id, call.epoch, call.method, reply.started, reply.started, reply.ended)
                span.replied, span.answer = reply.ended, "REPLY"
                self._kept[key] = span

    def _take_span(self, rank: int, span: RankSpan) -> None:
        """Write what a rank noted, in place of what its reply says."""
        if span.received - self._offset(rank) < self._began:
            return  # of another trace
        self._add_span(rank, span)
        key = (rank, span.epoch, span.call_id)
        if self._kept.pop(key, None) is None and key[1:] in self._open and span.answer == "REPLY":
            self._told.add(key)

    def _add_kept(self) -> None:
        for (rank, _, _), span in self._kept.items():
            self._add_span(rank, span)
        self._kept.clear()

    def _set_clock(self, report: RankReport) -> None:
        """Use the offset that is known best, and say how well."""
        known = self._clocks.get(report.rank)
        if not report.clock:
            return
        if known is None:
            self._name_rank(report.rank)
        if known is None or known.boot != report.boot or known.clock_error > report.clock_error:
            self._clocks[report.rank] = report
            place = {"pid": report.rank + 2, "tid": _tid(report.rank), "ts": (report.clock - report.clock_offset) / 1e3}
            args = {"offset_us": report.clock_offset / 1e3, "error_us": report.clock_error / 1e3}
            self._add({"ph": "i", "s": "p", "cat": "clock", "name": "clock", **place, "args": args})

    def _offset(self, rank: int) -> int:
        known = self._clocks.get(rank)
        return known.clock_offset if known is not None else 0

    # ------------------------------------------------------------------------------------------------- events

    def _add_call(self, call: CallRecord, outcome: str, done: int) -> None:
        """The driver's part: the call as an asynchronous slice with its phases, and what the event loop did for it."""
        name, call_id = f"{call.method} {call.call_id}", _id(call)
        args: dict[str, Any] = {"outcome": outcome, "epoch": call.epoch, "ranks": call.ranks}
        if call.error is not None:
            args["error"] = str(call.error)
        self._mark("b", call_id, name, call.submitted, args)
        self._asynchronous(call_id, "queued", call.encoded, call.sent or done)
        self._slice(_DRIVER, 1, f"encode {call.call_id}", call.submitted, call.encoded)
        if call.sent:
            self._asynchronous(call_id, "in flight", call.sent, call.decoded or done)
            self._slice(_DRIVER, 1, f"send {call.call_id}", call.sent, call.send_ended or call.sent)
            for rank in call.ranks:
                self._flow("s", f"{call_id}.{rank}", _DRIVER, 1, call.sent)
        if call.decoded:
            self._asynchronous(call_id, "aggregate", call.decoded, done)
            self._slice(_DRIVER, 1, f"aggregate {call.call_id}", call.decoded, done)
            for reply in call.replies:
                self._flow("f", f"{call_id}.{reply.rank}", _DRIVER, 1, call.decoded)
        self._mark("e", call_id, name, done)
        if outcome != "ok":
            self._instant(f"{name}: {outcome}", done)

    def _add_span(self, rank: int, span: RankSpan) -> None:
        """A rank's part: on the main thread the method; on the completion thread what was left for it."""
        if rank not in self._clocks:
            self._name_rank(rank)
            self._clocks[rank] = RankReport(rank, "dead")
        offset, pid, main = self._offset(rank), rank + 2, _tid(rank)
        received, ended, replied = span.received - offset, span.ended - offset, span.replied - offset
        began = span.began - offset if span.began else ended
        name = f"{span.method} {span.call_id}"
        on_main = replied if span.replied and not span.completing else ended
        self._slice(pid, main, name, received, on_main, {"epoch": span.epoch, "answer": span.answer})
        self._slice(pid, main, "decode", received, began)
        self._slice(pid, main, "run", began, ended)
        if span.completing:
            completing = span.completing - offset
            ready = span.ready - offset if span.ready else completing
            self._slice(pid, main + 1, f"output of {name}", completing, replied if span.replied else ready)
            if span.ready:
                self._slice(pid, main + 1, "wait for the output (GPU)", completing, ready)
            if span.replied:
                self._slice(pid, main + 1, "reply", ready, replied)
        elif span.replied:
            self._slice(pid, main, "reply", ended, replied)
        goes_on = "t" if span.answer == "REPLY" else "f"
        self._flow(goes_on, f"{span.epoch}.{span.call_id}.{rank}", pid, main, received)

    def _name_rank(self, rank: int) -> None:
        self._name(rank + 2, f"rank {rank}", _tid(rank), ("main thread", "completion thread"))

    def _name(self, pid: int, process: str, tid: int, threads: Iterable[str]) -> None:
        self._add({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}})
        self._add({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        for n, thread in enumerate(threads):
            self._add({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid + n, "args": {"name": thread}})

    def _slice(self, pid: int, tid: int, name: str, began: int, ended: int, args: Any = _NONE) -> None:
        times = {"ts": began / 1e3, "dur": max(ended - began, 0) / 1e3}
        self._add({"ph": "X", "cat": "step", "name": name, "pid": pid, "tid": tid, **times, "args": args})

    def _asynchronous(self, call_id: str, name: str, began: int, ended: int) -> None:
        self._mark("b", call_id, name, began)
        self._mark("e", call_id, name, ended)

    def _mark(self, kind: str, call_id: str, name: str, at: int, args: Any = _NONE) -> None:
        place = {"cat": "call", "id": call_id, "name": name, "pid": _DRIVER, "tid": 1}
        self._add({"ph": kind, **place, "ts": at / 1e3, "args": args})

    def _flow(self, kind: str, flow_id: str, pid: int, tid: int, at: int) -> None:
        place = {"cat": "flow", "id": flow_id, "name": "step", "pid": pid, "tid": tid}
        self._add({"ph": kind, **place, "ts": at / 1e3, "bp": "e"})

    def _instant(self, name: str, at: int) -> None:
        self._add({"ph": "i", "s": "t", "cat": "step", "name": name, "pid": _DRIVER, "tid": 1, "ts": at / 1e3})

    def _add(self, event: dict[str, Any]) -> None:
        self.events.append(_encode(event))


class Trace:
    """Writes a trace of one executor to a file; made by `Executor.trace`.  Each starts once.

    The file is valid JSON after every write, also if the driver is killed: then the last second is missing.

    Args:
        path: of the file, which is overwritten.
        attach: have the timeline observe from now on, and the ranks keep notes.
        detach: no longer; may be called again.
        fetch: asks the ranks, which is told to the timeline.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        attach: Callable[["Trace", Timeline], None],
        detach: Callable[["Trace", Timeline], None],
        fetch: Callable[[], Awaitable[None]],
    ) -> None:
        self.path = Path(path)
        self._attach = attach
        self._detach = detach
        self._fetch = fetch
        self._file: IO[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending = False
        self._due = anyio.Event()
        self._timer: asyncio.Handle | None = None
        self._error: OSError | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Trace the calls submitted from now on.

        Raises:
            ConfigError: the file cannot be written.
            RuntimeError: this trace has been started before.
        """
        if self._task is not None:
            raise RuntimeError("each trace starts once: call executor.trace again")
        try:
            self._file = await anyio.to_thread.run_sync(_create, self.path)
        except OSError as error:
            raise ConfigError(
                f"the trace cannot be written to {str(self.path)!r}: {error.strerror or error}; "
                "valid: a file in a directory that exists and may be written to"
            ) from error
        self._loop = asyncio.get_running_loop()
        self._timeline = Timeline(self._set_due)
        self._task = self._loop.create_task(self._keep(self._file))
        self._attach(self, self._timeline)

    async def stop(self) -> None:
        """Fetch what the ranks have noted, within `timeouts.report`, and end the file.  May be called again.

        Calls in flight go on undisturbed; the trace shows them as unfinished.

        Raises:
            AsyncExecError: not everything could be written.
        """
        if self._task is None:
            return
        self._ending = True
        self._due.set()
        await asyncio.wait([self._task])
        if self._error is not None:
            reason = self._error.strerror or self._error
            raise AsyncExecError(f"the trace {str(self.path)!r} is incomplete: {reason}") from self._error

    def _set_due(self, delay: float) -> None:
        if not delay:
            self._due.set()
        elif self._timer is None:
            self._timer = self._loop.call_later(delay, self._set_due, 0.0)

    async def _keep(self, file: IO[bytes]) -> None:
        """Fetch and write whenever it is due, until the end."""
        timeline = self._timeline
        try:
            while True:
                ending = self._ending
                with contextlib.suppress(AsyncExecError):  # closed meanwhile: there is nobody to ask
                    await self._fetch()
                await timeline.catch_up()
                if ending:
                    self._detach(self, timeline)
                    timeline.end()
                events, timeline.events = timeline.events, []
                if events:
                    await anyio.to_thread.run_sync(_append, file, events)
                if ending:
                    return
                await self._due.wait()
                self._due = anyio.Event()
                self._stop_timer()
        except OSError as error:
            self._error = error
            self._detach(self, timeline)
            logger.warning("the trace %s is incomplete: %s", self.path, error)
        finally:
            self._stop_timer()
            with contextlib.suppress(OSError):  # the same error again, for what was buffered
                file.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _create(path: Path) -> IO[bytes]:
    file = path.open("wb")
    file.write(b"[\n\n]")
    file.flush()
    return file


def _append(file: IO[bytes], events: list[bytes]) -> None:
    """Write events over the closing bracket, and the bracket behind them."""
    file.seek(-2, os.SEEK_END)
    comma = b",\n" if file.tell() > 2 else b""
    file.write(comma + b",\n".join(events) + b"\n]")
    file.flush()


def _outcome(error: BaseException | None) -> str:
    return "ok" if error is None else type(error).__name__


def _id(call: CallRecord) -> str:
    return f"{call.epoch}.{call.call_id}"


def _tid(rank: int) -> int:
    """Of its main thread; the completion thread's is the next.  Perfetto wants them to differ between processes."""
    return 10 * (rank + 2)
