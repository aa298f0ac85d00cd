"""What a rank is doing: kept by its runtime, asked for through a thread of its own, put together by the driver.

Asking works while the rank's main thread is busy or stuck, as long as it does not hold the interpreter's lock.
"""

import collections
import contextlib
import faulthandler
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec

_MAX_SPANS = 4096
"""So many traced calls a rank keeps until it is asked for them."""

RankState = Literal["idle", "running", "stopped", "silent", "dead"]


class RankSpan(msgspec.Struct, array_like=True):
    """When a rank did what for one traced call: nanoseconds of its CLOCK_MONOTONIC, 0 for what did not happen.

    Attributes:
        call_id, epoch: of the call.
        method: its name.
        received: the main thread took the call up.
        began: the arguments were decoded, and the worker's method began.
        ended: it had returned.
        completing: the completion thread took the output up, which is a deferred one or behind one.
        ready: a deferred output was there.
        replied: the transport was given the answer.
        answer: "REPLY", "ERROR", "SKIPPED" or "DONE"; empty where none was owed.
    """

    call_id: int
    epoch: int
    method: str
    received: int
    began: int = 0
    ended: int = 0
    completing: int = 0
    ready: int = 0
    replied: int = 0
    answer: str = ""


class RankReport(msgspec.Struct, frozen=True):
    """One rank at one moment.

    Attributes:
        rank: which.
        state: "idle" waits for a call; "running" is in one; "stopped" is held by the kernel (SIGSTOP, a debugger);
            "silent" did not answer in time, though the kernel lets it run; "dead" has no process any more.
        method: what it runs, or ran last.
        call_id: of that call.
        seconds: since it took the call up, or since it ended the last one.
        progress: counts what the rank has got done: calls begun and ended, tensors handed on, marks of the worker.
        stalled: seconds since `progress` last grew.
        waiting_in: the collective or pipeline transfer that its main thread is in; None where it is in none.
        stacks: the Python stacks of all its threads, where they were asked for.
        kernel: what the kernel says of its process, where it was asked.
        spans: of the calls traced since the report before, oldest first; see `Executor.trace`.
        clock: its CLOCK_MONOTONIC when it answered, in nanoseconds.
        boot: of its host: the clocks of one boot are one clock.
        clock_offset: what its clock is ahead of the driver's, in nanoseconds; 0 on the driver's host.
        clock_error: that much `clock_offset` may be off, in nanoseconds: half of the question's round trip.
    """

    rank: int
    state: RankState
    method: str = ""
    call_id: int = 0
    seconds: float = 0.0
    progress: int = 0
    stalled: float = 0.0
    waiting_in: str | None = None
    stacks: str = ""
    kernel: str = ""
    spans: list[RankSpan] = []
    clock: int = 0
    boot: str = ""
    clock_offset: int = 0
    clock_error: int = 0

    def __str__(self) -> str:
        doing: str = self.state
        if self.state in ("idle", "running") and self.method:
            verb = "running" if self.state == "running" else "idle since it ran"
            doing = f"{verb} {self.method} of call {self.call_id} for {self.seconds:.3f} s"
        waiting = f", waiting in {self.waiting_in}" if self.waiting_in else ""
        kernel = f", the kernel says: {self.kernel}" if self.kernel else ""
        return f"rank {self.rank}: {doing}{waiting}, progress {self.progress}, {self.stalled:.3f} s ago{kernel}"


class Report(msgspec.Struct, frozen=True):
    """All ranks at one moment.

    Attributes:
        ranks: one report for each rank.
        blamed: the ranks that the others wait for; empty where none stands out.
    """

    ranks: list[RankReport]
    blamed: list[int]

    @classmethod
    def of(cls, ranks: Sequence[RankReport]) -> "Report":
        """Put the ranks' reports together and find whom the others wait for."""
        return cls(list(ranks), blame(ranks))

    def __str__(self) -> str:
        lines = [str(rank) for rank in self.ranks]
        if self.blamed:
            lines.append(f"the others wait for: {', '.join(f'rank {rank}' for rank in self.blamed)}")
        return "\n".join(lines)

    def with_stacks(self) -> str:
        """The report as text, with the stacks of every rank."""
        stacks = [f"--- rank {rank.rank}\n{rank.stacks.rstrip()}" for rank in self.ranks if rank.stacks]
        return "\n".join([str(self), *stacks])


def blame(ranks: Sequence[RankReport]) -> list[int]:
    """The ranks that the others wait for.

    Those that cannot run at all, if there are any.  Else, while some wait for others, those that do not wait: they
    work, or went past what the others are in.  Else, while some run, all that run.  If all wait, the one that got
    least far: it has begun the earliest call, and made the least progress.
    """
    for state in ("dead", "stopped", "silent"):
        unable = [rank.rank for rank in ranks if rank.state == state]
        if unable:
            return unable
    waiting = [rank for rank in ranks if rank.waiting_in]
    if not waiting:
        return [rank.rank for rank in ranks if rank.state == "running"]
    if len(waiting) < len(ranks):
        return [rank.rank for rank in ranks if not rank.waiting_in]
    least = min((rank.call_id, rank.progress) for rank in ranks)
    return [rank.rank for rank in ranks if (rank.call_id, rank.progress) == least] if len(ranks) > 1 else []


class Activity:
    """What a rank's main thread is doing; written by that thread, read by the one that answers questions.

    The main thread is the one that runs the current call: some transports have two that take turns.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._running = False
        self._method = ""
        self._call_id = 0
        self._since = time.monotonic_ns()
        self._transfer: str | None = None
        self._progress = 0
        self._progressed = self._since
        self._spans: collections.deque[RankSpan] = collections.deque(maxlen=_MAX_SPANS)

    def begin(self, method: str, call_id: int, now: int) -> None:
        """The main thread takes up a call; `now` is in nanoseconds of CLOCK_MONOTONIC."""
        self._thread = threading.get_ident()
        self._method, self._call_id, self._running = method, call_id, True
        self._since = self._progressed = now
        self._progress += 1

    def end(self, now: int) -> None:
        """The main thread is done with the call; likewise."""
        self._running = False
        self._since = self._progressed = now
        self._progress += 1

    @contextlib.contextmanager
    def transfer(self, name: str) -> Iterator[None]:
        """The main thread is in a pipeline transfer."""
        self._transfer = name
        self.mark()
        try:
            yield
        finally:
            self._transfer = None
            self.mark()

    def mark(self) -> None:
        """Something got done."""
        self._progress += 1
        self._progressed = time.monotonic_ns()

    def keep(self, span: RankSpan) -> None:
        """Have the next report tell of a traced call; of too many, the oldest are forgotten.  On any thread."""
        self._spans.append(span)

    def report(self, rank: int, *, deferred: bool = False, stacks: bool = True) -> RankReport:
        """What the rank is doing.

        Args:
            rank: its number.
            deferred: whether it still owes outputs.
            stacks: whether to tell the stacks of all threads of its process.
        """
        now = time.monotonic_ns()
        running = self._running or deferred
        return RankReport(
            rank,
            "running" if running else "idle",
            self._method,
            self._call_id,
            (now - self._since) / 1e9,
            self._progress,
            (now - self._progressed) / 1e9,
            (self._transfer or _collective(sys._current_frames().get(self._thread))) if running else None,
            _stacks() if stacks else "",
            spans=self._take_spans(),
            clock=now,
            boot=boot_id(),
        )

    def _take_spans(self) -> list[RankSpan]:
        spans = []
        with contextlib.suppress(IndexError):  # another thread may append meanwhile
            for _ in range(_MAX_SPANS):
                spans.append(self._spans.popleft())
        return spans


@functools.cache
def boot_id() -> str:
    """What the kernel calls the time since this host was booted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _collective(frame: FrameType | None) -> str | None:
    """The outermost function of torch.distributed on a stack: the collective that its caller waits for."""
    found: str | None = None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("torch.distributed.") and not module.endswith("_logger"):
            found = frame.f_code.co_name
        frame = frame.f_back
    return found


def _stacks() -> str:
    try:
        descriptor = os.memfd_create("asyncexec-stacks")
    except OSError as error:
        return f"no stacks: {error}"
    with os.fdopen(descriptor, "r+", errors="replace") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
