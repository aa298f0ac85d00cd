"""What the exporters have in common: the phases of a call, the executors by name, and what is read when asked."""

import weakref
from collections.abc import Iterator
from typing import NamedTuple

from asyncexec.errors import AsyncExecError, ConfigError
from asyncexec.executor import Executor
from asyncexec.inspection import Report
from asyncexec.observing import CallRecord, Observer

BUCKETS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the latency histograms' buckets, in seconds: from a bare step to a long prefill."""

STATES = ("idle", "running", "stopped", "silent", "dead")
"""The states of a rank, see `RankReport`."""


def phases(call: CallRecord) -> Iterator[tuple[str, float]]:
    """The phases of a call that is done, in seconds, those that it came to.

    "queued" is in the driver; "running" from there until all outputs were there and those of the steps before;
    "aggregation" until the future was done; "total" from submission.
    """
    yield "total", (call.done - call.submitted) / 1e9
    if call.sent:
        yield "queued", (call.sent - call.encoded) / 1e9
    if call.decoded:
        yield "running", (call.decoded - call.sent) / 1e9
        yield "aggregation", (call.done - call.decoded) / 1e9


def outcome(call: CallRecord) -> str:
    """ "ok", or the name of the error's class."""
    return "ok" if call.error is None else type(call.error).__name__


class Reading(NamedTuple):
    """One executor at one moment.

    Attributes:
        name: of the executor.
        in_flight, queued: calls.
        undelivered: replies that were not delivered, by reason: "late", "wrong_epoch", "lost".
        failed: whether the executor has failed.
        states: of the ranks, as last reported; empty where nobody has asked them.
    """

    name: str
    in_flight: int
    queued: int
    undelivered: dict[str, int]
    failed: bool
    states: dict[int, str]


class Executors:
    """The observed executors by name; those that are gone are left out."""

    def __init__(self) -> None:
        self._executors: weakref.WeakValueDictionary[str, Executor] = weakref.WeakValueDictionary()
        self._states: dict[str, dict[int, str]] = {}

    def add(self, name: str, executor: Executor, observer: Observer) -> None:
        """Have `observer` observe `executor`.

        Raises:
            ConfigError: another executor has this name.
        """
        if name in self._executors:
            raise ConfigError(f"an executor is observed as {name!r} already; valid: name= of your own for each")
        self._executors[name] = executor
        self._states[name] = {}
        executor.add_observer(observer)

    def set_states(self, name: str, report: Report) -> None:
        """Keep what the ranks were doing when they were last asked."""
        self._states[name] = {rank.rank: rank.state for rank in report.ranks}

    def read(self) -> Iterator[Reading]:
        """All executors now.  On any thread."""
        for name, executor in list(self._executors.items()):
            counters = executor.counters
            undelivered = {"late": counters.late, "wrong_epoch": counters.wrong_epoch, "lost": counters.lost}
            failed = executor.failure is not None
            yield Reading(name, executor.in_flight, executor.queued, undelivered, failed, self._states.get(name, {}))


class NamedObserver:
    """What an exporter observes one executor by; does nothing of what it is told, but for the states of the ranks.

    Args:
        name: of the executor.
        executors: keeps the states.
    """

    def __init__(self, name: str, executors: Executors) -> None:
        self.name = name
        self._executors = executors

    def call_submitted(self, call: CallRecord) -> None:
        """Nothing: what is in flight is read when asked."""

    def call_done(self, call: CallRecord) -> None:
        """For exporters."""

    def call_awaited(self, call: CallRecord, at: int, cancelled: bool) -> None:
        """Nothing."""

    def ranks_reported(self, report: Report) -> None:
        """Keep the states."""
        self._executors.set_states(self.name, report)

    def executor_failed(self, cause: AsyncExecError) -> None:
        """Nothing: it is read when asked."""
