"""Metrics for OpenTelemetry: `OpenTelemetryMetrics().observe(executor)`, see docs/metrics.md."""

from collections.abc import Iterator

from asyncexec.errors import ConfigError
from asyncexec.executor import Executor
from asyncexec.metrics.readings import BUCKETS, Executors, NamedObserver, outcome, phases
from asyncexec.observing import CallRecord

try:
    from opentelemetry.metrics import CallbackOptions, Counter, Histogram, MeterProvider, Observation, get_meter
except ModuleNotFoundError as _missing:
    raise ConfigError("these metrics need opentelemetry-api: pip install 'asyncexec[opentelemetry]'") from _missing


class OpenTelemetryMetrics:
    """Metrics of any number of executors, by one meter.

    Args:
        provider: None is the process's own; without one that was set, the API drops what is measured.
    """

    def __init__(self, provider: MeterProvider | None = None) -> None:
        meter = get_meter("asyncexec") if provider is None else provider.get_meter("asyncexec")
        self._executors = Executors()
        self._calls = meter.create_counter("asyncexec.calls", "{call}", "Calls done, by outcome.")
        self._seconds = meter.create_histogram(
            "asyncexec.call.duration", "s", "Latency of calls by phase.", explicit_bucket_boundaries_advisory=BUCKETS
        )
        meter.create_observable_gauge("asyncexec.in_flight", [self._in_flight], "{call}", "Calls sent and not done.")
        meter.create_observable_gauge("asyncexec.queued", [self._queued], "{call}", "Calls that wait for their turn.")
        meter.create_observable_gauge("asyncexec.failed", [self._failed], "1", "Whether the executor has failed.")
        meter.create_observable_counter(
            "asyncexec.undelivered_replies", [self._undelivered], "{reply}", "Replies not delivered."
        )
        meter.create_observable_gauge("asyncexec.rank.state", [self._states], "1", "1 for the state last reported.")

    def observe(self, executor: Executor, name: str = "default") -> None:
        """Export an executor's metrics with the attribute executor=`name`, until it is gone.

        Raises:
            ConfigError: another executor has this name.
        """
        self._executors.add(name, executor, _Observer(name, self._executors, self._calls, self._seconds))

    def _in_flight(self, _: CallbackOptions) -> Iterator[Observation]:
        return (Observation(reading.in_flight, {"executor": reading.name}) for reading in self._executors.read())

    def _queued(self, _: CallbackOptions) -> Iterator[Observation]:
        return (Observation(reading.queued, {"executor": reading.name}) for reading in self._executors.read())

    def _failed(self, _: CallbackOptions) -> Iterator[Observation]:
        return (Observation(int(reading.failed), {"executor": reading.name}) for reading in self._executors.read())

    def _undelivered(self, _: CallbackOptions) -> Iterator[Observation]:
        for reading in self._executors.read():
            for reason, count in reading.undelivered.items():
                yield Observation(count, {"executor": reading.name, "reason": reason})

    def _states(self, _: CallbackOptions) -> Iterator[Observation]:
        for reading in self._executors.read():
            for rank, state in reading.states.items():
                yield Observation(1, {"executor": reading.name, "rank": rank, "state": state})


class _Observer(NamedObserver):
    def __init__(self, name: str, executors: Executors, calls: Counter, seconds: Histogram) -> None:
        super().__init__(name, executors)
        self._calls = calls
        self._seconds = seconds

    def call_done(self, call: CallRecord) -> None:
        """Count it, and record its phases."""
        self._calls.add(1, {"executor": self.name, "method": call.method, "outcome": outcome(call)})
        for phase, seconds in phases(call):
            self._seconds.record(seconds, {"executor": self.name, "method": call.method, "phase": phase})
