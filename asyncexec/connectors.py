"""Aggregators for what the connectors of the ranks did beside the model: KV cache and encoder cache.

A connector moves caches between engines (prefill/decode disaggregation) or to slower memory (offloading).  Every rank
moves its own part, and reports beside its output what it has sent and received.  The engine needs one report: a
request's blocks are free when the last rank has sent them.

The rules are those of vLLM's aggregators of the same names, where those are defined.  Beyond them: ranks of all
pipeline stages may report, None is no report, nothing is lost when the output rank returned nothing or the step
failed, and inputs are never changed.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from asyncexec.errors import ConfigError
from asyncexec.outputs import ECConnectorOutput, KVConnectorOutput, ModelOutput


class Stats(Protocol):
    """A connector's statistics of one step."""

    def aggregate(self, other: Any) -> Any:
        """These and the statistics of a later rank together; may change and return itself, but not `other`."""
        ...


class WorkerMetadata(Protocol):
    """What a connector's workers tell its scheduler side."""

    def aggregate(self, other: Any) -> Any:
        """This and the metadata of a later rank together; may change and return itself, but not `other`."""
        ...


class CacheEvents(Protocol):
    """Events of the KV cache, counted over workers so that the engine can tell which all of them had."""

    def get_all_events(self) -> Sequence[Any]:
        """Every event, as often as it was added."""
        ...

    def add_events(self, events: Sequence[Any]) -> None:
        """Add another worker's events."""
        ...

    def increment_workers(self, count: int = 1) -> None:
        """Note that the events of so many more workers are in it."""
        ...


class PendingTransfer(msgspec.Struct, frozen=True):
    """A request that some ranks have reported finished, and others not yet.

    Attributes:
        request_id: which.
        direction: "sending" or "recving".
        expected: reports that it takes.
        reported_by: the ranks that have reported, in that order.
        missing: the ranks that have not, where every rank is expected to report; else empty.
    """

    request_id: str
    direction: Literal["sending", "recving"]
    expected: int
    reported_by: list[int]
    missing: list[int]


_Reports: TypeAlias = list[Any]
"""The reports of one step, by rank; None where a rank has none."""


class _ConnectorAggregator:
    """What both have in common: reports come in any order, are merged in that of ranks, and travel on the output."""

    needs_all_ranks: bool = True
    _attribute: str
    _report_type: type[msgspec.Struct]

    def __init__(self, empty_output: Callable[[], Any]) -> None:
        self._empty_output = empty_output
        self._held: _Merged | None = None
        self._ranks: Sequence[int] = ()
        self._width = 0
        self._whole_kind: type | None = None
        self._kind: type = self._report_type
        self._example: Any = None
        self._fields = self._report_type.__struct_fields__

    def begin(self, ranks: Sequence[int]) -> _Reports:
        """No reports yet."""
        if ranks is not self._ranks:
            self._ranks_change(ranks)
        return [None] * self._width

    def _ranks_change(self, ranks: Sequence[int]) -> None:
        self._ranks, self._width = ranks, max(ranks) + 1

    def _whole(self, report: Any) -> Any:
        """Learn of what class the reports are; one that lacks attributes, as vLLM's older ones, is filled up."""
        self._kind, self._example, names = type(report), report, self._report_type.__struct_fields__
        self._fields = tuple(name for name in names if hasattr(report, name))
        if len(self._fields) == len(names):
            self._whole_kind = self._kind
            return report
        return self._report_type(**{name: getattr(report, name) for name in self._fields})

    def finish(self, partial: _Reports, output: Any, failed: bool) -> Any:
        """The output with the merged report; as it is where no rank has reported, and nothing was held back.

        Raises:
            TypeError: there is something to report, and no attribute of the output to carry it.  It is reported by the
                next step.
        """
        merged = self._held or _Merged()
        merged.begin_step()
        try:
            if not self._merge(partial, merged) and self._held is None:
                return output
        finally:
            if not merged.is_empty:
                self._held = merged  # until it has been handed out
        if failed:
            return output
        if merged.is_empty and not hasattr(output, self._attribute):
            return output
        carrier = self._empty_output() if output is None else output
        if not hasattr(carrier, self._attribute):
            raise TypeError(
                f"the output rank returned a {type(carrier).__qualname__}, which has no attribute {self._attribute!r} "
                f"to carry what the ranks reported; valid: a ModelOutput, an object with that attribute, or None"
            )
        carrying = _with(carrier, self._attribute, self._report(merged))
        self._held = None
        self._handed_out(merged)
        return carrying

    def _merge(self, reports: _Reports, merged: "_Merged") -> bool:
        """Add the reports; returns whether there are any."""
        raise NotImplementedError

    def _report(self, merged: "_Merged") -> Any:
        raise NotImplementedError

    def _handed_out(self, merged: "_Merged") -> None:
        """The report has been made: nothing of it needs to be kept."""

    def _make(self, **values: Any) -> Any:
        """A report of the class that the ranks' reports are of."""
        if len(self._fields) < len(values):
            values = {name: values[name] for name in self._fields}
        try:
            return self._kind(**values)
        except TypeError:  # it has attributes of its own: those of a rank's report
            made = copy.copy(self._example)
            for name, value in values.items():
                object.__setattr__(made, name, value)
            return made


class KVOutputAggregator(_ConnectorAggregator):
    """Reports a request finished once, in the step in which the last rank reports it.

    A report counts in the order of steps, and within a step in that of ranks, however they arrive.  What a failed step
    would have reported is reported by the next one that does not fail.

    Args:
        expected_finished_count: ranks that report each request; None is all ranks of the step.  A rank may change it at
            run time for requests that nobody has reported yet.
        empty_output: makes the output that carries the reports where the output rank returned None.

    Raises:
        ConfigError: an expected count below 1.
    """

    _attribute = "kv_connector_output"
    _report_type = KVConnectorOutput

    def __init__(
        self, expected_finished_count: int | None = None, empty_output: Callable[[], Any] = ModelOutput
    ) -> None:
        if expected_finished_count is not None and expected_finished_count < 1:
            raise ConfigError(f"expected_finished_count is {expected_finished_count}; valid: whole numbers from 1")
        super().__init__(empty_output)
        self._count = expected_finished_count
        self._most_ranks = 0
        self._lost: set[int] = set()
        self._sending = _Countdown()
        self._recving = _Countdown()
        self._failed_recving: set[str] = set()

    def _ranks_change(self, ranks: Sequence[int]) -> None:
        self._most_ranks = max(self._most_ranks, len(ranks))
        self._lost.clear()  # steps go to ranks that are there; a new one may have a lost one's number
        super()._ranks_change(ranks)

    @property
    def _expected(self) -> int:
        """Reports that a new request takes.

        A count that was given holds as it is, also one above the number of ranks, until there are fewer ranks than
        there were: then it takes no more than these can give.
        """
        there = len(self._ranks) - len(self._lost.intersection(self._ranks))
        if self._count is None or self._count <= there or there >= self._most_ranks:
            return there if self._count is None else self._count
        return max(1, there)

    def add(self, partial: _Reports, rank: int, output: Any) -> None:
        """Keep the rank's report, if it has one."""
        try:
            report = output.kv_connector_output
        except AttributeError:
            return
        if report is not None:
            partial[rank] = report if type(report) is self._whole_kind else self._whole(report)

    def rank_lost(self, rank: int) -> None:
        """`rank` will report no more: nothing waits for it.  What waited for it alone comes with the next step."""
        if rank in self._lost:
            return
        self._lost.add(rank)
        merged = self._held = self._held or _Merged()
        self._sending.rank_lost(rank, merged.finished_sending)
        self._recving.rank_lost(rank, merged.finished_recving)

    def reset(self, request_ids: Iterable[str]) -> None:
        """These requests were aborted: they will not be reported, though some ranks may still report them.

        One that no rank has reported yet is not known here: if ranks report it after all, it is reported as any other.
        """
        for request_id in request_ids:
            self._sending.silence(request_id)
            self._recving.silence(request_id)
            self._failed_recving.discard(request_id)
            if self._held is not None:
                self._held.finished_sending.discard(request_id)
                self._held.finished_recving.discard(request_id)

    def pending(self) -> list[PendingTransfer]:
        """The requests that some ranks have reported, and what is still waited for."""
        ranks = [rank for rank in self._ranks if rank not in self._lost]
        found = []
        directions: tuple[tuple[Literal["sending", "recving"], _Countdown], ...]
        directions = (("sending", self._sending), ("recving", self._recving))
        for direction, countdown in directions:
            for request_id, expected, reported_by in countdown.waiting():
                missing = [rank for rank in ranks if rank not in reported_by]
                if len(reported_by) + len(missing) != expected:
                    missing = []  # not every rank has a part, and which have is the connector's own knowledge
                found.append(PendingTransfer(request_id, direction, expected, reported_by, missing))
        return found

    def _merge(self, reports: _Reports, merged: "_Merged") -> bool:
        expected = self._expected
        rest, found = [], False
        for rank, report in enumerate(reports):
            if report is None or rank in self._lost:
                continue
            found = True
            if report.expected_finished_count > 0:
                self._count = report.expected_finished_count
                expected = self._expected
            if report.failed_recving:  # before they count: a silenced one is forgotten with its last report
                self._failed_recving |= self._recving.heard(report.failed_recving)
            if report.finished_sending:
                self._sending.count(rank, report.finished_sending, expected, merged.finished_sending)
            if report.finished_recving:
                self._recving.count(rank, report.finished_recving, expected, merged.finished_recving)
            if report.invalid_block_ids:
                merged.invalid_block_ids |= report.invalid_block_ids
            if report.kv_connector_stats or report.kv_cache_events or report.kv_connector_worker_meta:
                rest.append(report)
        merged.expected = expected
        for report in rest:
            merged.add_stats(report.kv_connector_stats)
            merged.add_events(report.kv_cache_events)
            merged.add_worker_meta(report.kv_connector_worker_meta)
        return found

    def _report(self, merged: "_Merged") -> Any:
        return self._make(
            finished_sending=merged.finished_sending or None,
            finished_recving=merged.finished_recving or None,
            failed_recving=self._failed_recving & merged.finished_recving,
            invalid_block_ids=merged.invalid_block_ids,
            kv_connector_stats=merged.stats,
            kv_cache_events=merged.all_events,
            kv_connector_worker_meta=merged.worker_meta,
            expected_finished_count=merged.expected,
        )

    def _handed_out(self, merged: "_Merged") -> None:
        self._failed_recving -= merged.finished_recving


class ECOutputAggregator(_ConnectorAggregator):
    """Unites what the ranks' encoder-cache connectors report: any rank may have moved an item, and reports it alone.

    Args:
        empty_output: makes the output that carries the reports where the output rank returned None.
    """

    _attribute = "ec_connector_output"
    _report_type = ECConnectorOutput

    def __init__(self, empty_output: Callable[[], Any] = ModelOutput) -> None:
        super().__init__(empty_output)

    def add(self, partial: _Reports, rank: int, output: Any) -> None:
        """Keep the rank's report, if it has one."""
        report = getattr(output, self._attribute, None)
        if report is not None:
            partial[rank] = report if type(report) is self._whole_kind else self._whole(report)

    def _merge(self, reports: _Reports, merged: "_Merged") -> bool:
        there = [report for report in reports if report is not None]
        for report in there:
            merged.finished_sending.update(report.finished_sending or ())
            merged.finished_recving.update(report.finished_recving or ())
        for report in there:
            merged.add_stats(report.ec_connector_stats)
            merged.add_worker_meta(report.ec_connector_worker_meta)
        return bool(there)

    def _report(self, merged: "_Merged") -> Any:
        if merged.is_empty:
            return None
        return self._make(
            finished_sending=merged.finished_sending or None,
            finished_recving=merged.finished_recving or None,
            ec_connector_stats=merged.stats,
            ec_connector_worker_meta=merged.worker_meta,
        )


class _Countdown:
    """Which ranks have reported each request, until enough have."""

    def __init__(self) -> None:
        self._reported: dict[str, list[int]] = {}
        """By request: how many reports it takes, then the ranks that have reported."""
        self._silent: set[str] = set()

    def count(self, rank: int, request_ids: Iterable[str], expected: int, finished: set[str]) -> None:
        """Count a rank's reports; requests that are new take `expected` of them.  Those that are done are added."""
        reported = self._reported
        for request_id in request_ids:
            entry = reported.get(request_id)
            if entry is None:
                entry = reported[request_id] = [expected, rank]
            else:
                entry.append(rank)
            if len(entry) > entry[0]:
                self._done(request_id, finished)

    def rank_lost(self, rank: int, finished: set[str]) -> None:
        """Wait no longer for a rank."""
        for request_id, entry in list(self._reported.items()):
            if rank not in entry[1:]:
                entry[0] -= 1
                if len(entry) > entry[0]:
                    self._done(request_id, finished)

    def silence(self, request_id: str) -> None:
        """Take the reports that are still to come of a request, and do not tell when they are all there."""
        if request_id in self._reported:
            self._silent.add(request_id)

    def heard(self, request_ids: Set[str]) -> Set[str]:
        """Those of the requests that are not silenced."""
        return request_ids - self._silent if self._silent else request_ids

    def waiting(self) -> list[tuple[str, int, list[int]]]:
        """Each request that is waited for, the reports that it takes, and the ranks that have reported."""
        return [(name, entry[0], entry[1:]) for name, entry in self._reported.items() if name not in self._silent]

    def _done(self, request_id: str, finished: set[str]) -> None:
        del self._reported[request_id]
        if request_id in self._silent:
            self._silent.discard(request_id)
        else:
            finished.add(request_id)


class _Merged:
    """What a step has to report.

    Statistics, events and metadata merge by methods of theirs, which may change the object that they are called on:
    that one is a copy from the second rank on.
    """

    def __init__(self) -> None:
        self.finished_sending: set[str] = set()
        self.finished_recving: set[str] = set()
        self.invalid_block_ids: set[int] = set()
        self.stats: Any = None
        self.events: Any = None
        self.earlier_events: Any = None
        self.worker_meta: Any = None
        self.expected = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (
            self.finished_sending
            or self.finished_recving
            or self.invalid_block_ids
            or self.stats
            or self.events
            or self.earlier_events
            or self.worker_meta
        )

    def begin_step(self) -> None:
        """What has been added so far is of an earlier step, which could not report it."""
        if self.events:
            self.earlier_events, self.events = self.all_events, None

    @property
    def all_events(self) -> Any:
        """The events of this step and of earlier ones.  The workers are the same ones: they are counted once."""
        if not (self.earlier_events and self.events):
            return self.events or self.earlier_events
        together = copy.deepcopy(self.events)
        together.add_events(self.earlier_events.get_all_events())
        return together

    def add_stats(self, stats: Any) -> None:
        """Merge a rank's statistics, if it has any."""
        if stats:
            self.stats = _aggregated(self.stats, stats)

    def add_worker_meta(self, worker_meta: Any) -> None:
        """Merge a rank's metadata, if it has any."""
        if worker_meta:
            self.worker_meta = _aggregated(self.worker_meta, worker_meta)

    def add_events(self, events: Any) -> None:
        """Add a rank's events of this step, if it has any."""
        if not events:
            return
        if not self.events:
            self.events = events
            return
        together = copy.deepcopy(self.events)
        together.add_events(events.get_all_events())
        together.increment_workers(1)
        self.events = together


def _aggregated(first: Any, second: Any) -> Any:
    return copy.deepcopy(first).aggregate(copy.deepcopy(second)) if first else second


def _with(output: Any, attribute: str, value: Any) -> Any:
    """A shallow copy of `output` with one attribute changed, whatever kind of object it is."""
    if isinstance(output, msgspec.Struct):
        return msgspec.structs.replace(output, **{attribute: value})
    kind: type = type(output)
    if _is_all_in_dict(kind):  # as copy.copy does it, in a third of the time
        changed: Any = object.__new__(kind)
        changed.__dict__.update(output.__dict__)
    else:
        changed = copy.copy(output)
    object.__setattr__(changed, attribute, value)  # past a frozen dataclass's own
    return changed


@functools.cache
def _is_all_in_dict(kind: type) -> bool:
    """Whether a class keeps everything in `__dict__`, and copies in the ordinary way."""
    own = {"__slots__", "__copy__", "__getstate__", "__reduce__", "__reduce_ex__"}
    is_plain = kind.__dictoffset__ != 0 and all("__new__" not in vars(base) for base in kind.__mro__[:-1])
    return is_plain and not any(own & base.__dict__.keys() for base in kind.__mro__[:-1])
