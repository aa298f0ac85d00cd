"""The step timeline: what driver and ranks did when, as a trace that Perfetto and chrome://tracing open.

    async with executor.trace("steps.json"):
        ...

`Timeline` makes events of what an executor tells its observers; `Trace` fetches the ranks' part, and writes the file.
Format: "Trace Event Format" of the Chromium project, the JSON array form.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import anyio
import anyio.lowlevel

from asyncexec.errors import AsyncExecError, ConfigError
from asyncexec.inspection import RankReport, RankSpan, Report
from asyncexec.observing import CallRecord

logger = logging.getLogger("asyncexec")

_FETCH_EVERY = 256
"""Calls after which the ranks are asked for what they noted; they keep sixteen times as much."""

_FLUSH_AFTER = 1.0
"""Seconds that something may wait to be written: what is lost at most when the driver is killed."""

_AT_ONCE = 32
"""Spans that become events in one turn of the event loop: about a quarter of a millisecond."""

_MAX_KEPT = 8192
"""Replies whose ranks have not told more about them; the rest of them is written as the driver knows it."""

_DRIVER = 1


class Timeline:
    """Makes trace events; see `Observer`.

    Args:
        due: called with the seconds after which to fetch and write.
    """

    def __init__(self, due: Callable[[float], None]) -> None:
        self.events: list[str] = []
        self.reports: list[Report] = []
        self._due = due
        self._began = time.monotonic_ns()
        self._calls = 0
        self._ended = False
        self._open: dict[tuple[int, int], CallRecord] = {}
        self._told: set[tuple[int, int, int]] = set()
        self._kept: dict[tuple[int, int, int], RankSpan] = {}
        self._offsets: dict[int, RankReport] = {}
        self._name(_DRIVER, "driver", os.getpid(), ("event loop",))

    # ------------------------------------------------------------------------------------------ as an observer

    def call_submitted(self, call: CallRecord) -> None:
        """It is unfinished until it is done."""
        if not self._ended:
            self._open[call.epoch, call.call_id] = call

    def call_done(self, call: CallRecord) -> None:
        """Write the driver's part, and keep what the replies say until the ranks say more."""
        if self._open.pop((call.epoch, call.call_id), None) is None:
            return  # the trace has ended
        self._add_call(call, _outcome(call.error))
        for reply in call.replies:
            key = (reply.rank, call.epoch, call.call_id)
            if key in self._told:
                self._told.discard(key)
            else:
                span = RankSpan(call.call_id, call.epoch, call.method, reply.started, reply.started, reply.ended)
                span.replied, span.answer = reply.ended, "REPLY"
                self._kept[key] = span
        self._calls += 1
        self._due(_FLUSH_AFTER if self._calls % _FETCH_EVERY else 0.0)

    def call_awaited(self, call: CallRecord, at: int, cancelled: bool) -> None:
        """Write how long the future was done before its task went on; of an abandoned await, when."""
        if self._ended:
            return
        if cancelled:
            self._instant(f"{call.method} {call.call_id}: await cancelled", at)
        elif call.done:
            self._phase(_id(call), "until awaited", call.done, at)

    def ranks_reported(self, report: Report) -> None:
        """Keep the notes that came along, which are gone from the ranks; `add_reports` takes its time with them."""
        self.reports.append(report)

    def executor_failed(self, cause: AsyncExecError) -> None:
        """Mark the moment."""
        self._instant(f"executor failed: {type(cause).__name__}", time.monotonic_ns())

    # -------------------------------------------------------------------------------------------- ranks, ending

    async def add_reports(self) -> None:
        """Write what the ranks noted, a few spans in a turn of the loop."""
        reports, self.reports = self.reports, []
        for rank in (rank for report in reports for rank in report.ranks):
            self._set_clock(rank)
            for n, span in enumerate(rank.spans):
                if span.received - self._offset(rank.rank) >= self._began:
                    self._add_span(rank.rank, span)
                    key = (rank.rank, span.epoch, span.call_id)
                    if self._kept.pop(key, None) is None and key[1:] in self._open and span.answer == "REPLY":
                        self._told.add(key)
                if n % _AT_ONCE == _AT_ONCE - 1:
                    await anyio.lowlevel.checkpoint()
        if len(self._kept) > _MAX_KEPT:
            self._add_kept()

    def end(self) -> None:
        """Write what is unfinished, and what ranks that are gone did not tell."""
        self._ended = True
        for call in self._open.values():
            call.done = time.monotonic_ns()
            self._add_call(call, "unfinished when the trace ended")
        self._open.clear()
        self._add_kept()

    def _add_kept(self) -> None:
        for (rank, _, _), span in self._kept.items():
            self._add_span(rank, span)
        self._kept.clear()

    def _set_clock(self, report: RankReport) -> None:
        """Use the offset that is known best, and say how well."""
        known = self._offsets.get(report.rank)
        if not report.clock:
            return
        if known is None:
            self._name_rank(report.rank)
        if known is None or known.boot != report.boot or known.clock_error > report.clock_error:
            self._offsets[report.rank] = report
            offset, error = report.clock_offset / 1e3, report.clock_error / 1e3
            self.events.append(
                f'{{"ph":"i","s":"p","name":"clock","pid":{report.rank + 2},"tid":{_tid(report.rank)},'
                f'"ts":{_us(report.clock - report.clock_offset)},"args":{{"offset_us":{offset},"error_us":{error}}}}}'
            )

    def _offset(self, rank: int) -> int:
        known = self._offsets.get(rank)
        return known.clock_offset if known is not None else 0

    # ------------------------------------------------------------------------------------------------- events

    def _add_call(self, call: CallRecord, outcome: str) -> None:
        """The driver's part: the call as an asynchronous slice with its phases, and what the event loop did for it."""
        name, call_id = f"{call.method} {call.call_id}", _id(call)
        args = {"outcome": outcome, "epoch": call.epoch, "ranks": list(call.ranks)}
        if call.error is not None:
            args["error"] = str(call.error)
        self.events.append(_begin(call_id, name, call.submitted, json.dumps(args)))
        self._phase(call_id, "queued", call.encoded, call.sent or call.done)
        self._slice(_DRIVER, 1, f"encode {call.call_id}", call.submitted, call.encoded)
        if call.sent:
            self._phase(call_id, "in flight", call.sent, call.decoded or call.done)
            self._slice(_DRIVER, 1, f"send {call.call_id}", call.sent, call.send_ended or call.sent)
            for rank in call.ranks:
                self._flow("s", call, rank, _DRIVER, 1, call.sent)
        if call.decoded:
            self._phase(call_id, "aggregate", call.decoded, call.done)
            self._slice(_DRIVER, 1, f"aggregate {call.call_id}", call.decoded, call.done)
            for reply in call.replies:
                self._flow("f", call, reply.rank, _DRIVER, 1, call.decoded)
        if outcome != "ok":
            self._instant(f"{name}: {outcome}", call.done)
        self.events.append(_end(call_id, name, call.done))

    def _add_span(self, rank: int, span: RankSpan) -> None:
        """A rank's part: on the main thread the method; on the completion thread what was left for it."""
        if rank not in self._offsets:
            self._name_rank(rank)
            self._offsets[rank] = RankReport(rank, "dead")
        offset, pid, main = self._offset(rank), rank + 2, _tid(rank)
        received, ended, replied = span.received - offset, span.ended - offset, span.replied - offset
        began = span.began - offset if span.began else ended
        name = f"{span.method} {span.call_id}"
        completing = span.completing - offset if span.completing else 0
        on_main = replied if span.replied and not completing else ended
        self._slice(pid, main, name, received, on_main, json.dumps({"epoch": span.epoch, "answer": span.answer}))
        self._slice(pid, main, "decode", received, began)
        self._slice(pid, main, "run", began, ended)
        if completing:
            ready = span.ready - offset if span.ready else completing
            self._slice(pid, main + 1, f"output of {name}", completing, replied if span.replied else ready)
            if span.ready:
                self._slice(pid, main + 1, "wait for the output (GPU)", completing, ready)
            if span.replied:
                self._slice(pid, main + 1, "reply", ready, replied)
        elif span.replied:
            self._slice(pid, main, "reply", ended, replied)
        self._flow("t" if span.answer == "REPLY" else "f", span, rank, pid, main, received)

    def _name_rank(self, rank: int) -> None:
        self._name(rank + 2, f"rank {rank}", _tid(rank), ("main thread", "completion thread"))

    def _name(self, pid: int, process: str, tid: int, threads: Iterable[str]) -> None:
        first = 1 if pid == _DRIVER else tid
        self.events.append(f'{{"ph":"M","name":"process_name","pid":{pid},"args":{{"name":"{process}"}}}}')
        self.events.append(f'{{"ph":"M","name":"process_sort_index","pid":{pid},"args":{{"sort_index":{pid}}}}}')
        for n, thread in enumerate(threads):
            self.events.append(
                f'{{"ph":"M","name":"thread_name","pid":{pid},"tid":{first + n},"args":{{"name":"{thread}"}}}}'
            )

    def _slice(self, pid: int, tid: int, name: str, began: int, ended: int, args: str = "{}") -> None:
        self.events.append(
            f'{{"ph":"X","cat":"step","name":{json.dumps(name)},"pid":{pid},"tid":{tid},"ts":{_us(began)},'
            f'"dur":{_us(max(ended - began, 0))},"args":{args}}}'
        )

    def _phase(self, call_id: str, name: str, began: int, ended: int) -> None:
        self.events += (_begin(call_id, name, began), _end(call_id, name, ended))

    def _flow(self, kind: str, call: CallRecord | RankSpan, rank: int, pid: int, tid: int, at: int) -> None:
        binding = ',"bp":"e"' if kind == "f" else ""
        self.events.append(
            f'{{"ph":"{kind}","cat":"flow","name":"step","id":"{call.epoch}.{call.call_id}.{rank}","pid":{pid},'
            f'"tid":{tid},"ts":{_us(at)}{binding}}}'
        )

    def _instant(self, name: str, at: int) -> None:
        self.events.append(
            f'{{"ph":"i","s":"t","cat":"step","name":{json.dumps(name)},"pid":{_DRIVER},"tid":1,"ts":{_us(at)}}}'
        )


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
                await timeline.add_reports()
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


def _append(file: IO[bytes], events: list[str]) -> None:
    """Write events over the closing bracket, and the bracket behind them."""
    file.seek(-2, os.SEEK_END)
    comma = ",\n" if file.tell() > 2 else ""
    file.write((comma + ",\n".join(events) + "\n]").encode())
    file.flush()


def _outcome(error: BaseException | None) -> str:
    return "ok" if error is None else type(error).__name__


def _id(call: CallRecord) -> str:
    return f"{call.epoch}.{call.call_id}"


def _tid(rank: int) -> int:
    """Of its main thread; the completion thread's is the next.  Perfetto wants them to differ between processes."""
    return 10 * (rank + 2)


def _us(nanoseconds: int) -> str:
    """Microseconds with the nanoseconds, which a float of so long a time would round."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03}"


def _begin(call_id: str, name: str, at: int, args: str = "{}") -> str:
    return (
        f'{{"ph":"b","cat":"call","id":"{call_id}","name":{json.dumps(name)},"pid":{_DRIVER},"tid":1,"ts":{_us(at)},'
        f'"args":{args}}}'
    )


def _end(call_id: str, name: str, at: int) -> str:
    return (
        f'{{"ph":"e","cat":"call","id":"{call_id}","name":{json.dumps(name)},"pid":{_DRIVER},"tid":1,"ts":{_us(at)}}}'
    )
