"""Metrics for Prometheus: `PrometheusMetrics().observe(executor)`, see docs/metrics.md."""

from collections.abc import Iterator

from asyncexec.errors import ConfigError
from asyncexec.executor import Executor
from asyncexec.metrics.readings import BUCKETS, STATES, Executors, NamedObserver, outcome, phases
from asyncexec.observing import CallRecord

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as _missing:
    raise ConfigError("Prometheus metrics need prometheus_client: pip install 'asyncexec[prometheus]'") from _missing


class PrometheusMetrics:
    """Metrics of any number of executors in one registry.

    Args:
        registry: None is the process's own, which `prometheus_client.start_http_server` serves.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = REGISTRY if registry is None else registry
        self._executors = Executors()
        self._calls = Counter(
            "asyncexec_calls", "Calls done, by outcome.", ("executor", "method", "outcome"), registry=registry
        )
        self._seconds = Histogram(
            "asyncexec_call_seconds",
            "Latency of calls by phase.",
            ("executor", "method", "phase"),
            buckets=BUCKETS,
            registry=registry,
        )
        registry.register(_Gauges(self._executors))

    def observe(self, executor: Executor, name: str = "default") -> None:
        """Export an executor's metrics with the label executor=`name`, until it is gone.

        Raises:
            ConfigError: another executor has this name.
        """
        self._executors.add(name, executor, _Observer(name, self._executors, self._calls, self._seconds))


class _Observer(NamedObserver):
    def __init__(self, name: str, executors: Executors, calls: Counter, seconds: Histogram) -> None:
        super().__init__(name, executors)
        self._calls = calls
        self._seconds = seconds
        self._phases: dict[tuple[str, str], Histogram] = {}

    def call_done(self, call: CallRecord) -> None:
        """Count it, and put its phases into the histograms."""
        self._calls.labels(self.name, call.method, outcome(call)).inc()
        for phase, seconds in phases(call):
            key = call.method, phase
            if (histogram := self._phases.get(key)) is None:
                histogram = self._phases[key] = self._seconds.labels(self.name, *key)
            histogram.observe(seconds)


class _Gauges(Collector):
    """What is read when Prometheus asks."""

    def __init__(self, executors: Executors) -> None:
        self._executors = executors

    def collect(self) -> Iterator[Metric]:
        """All executors now."""
        label = ("executor",)
        in_flight = GaugeMetricFamily("asyncexec_in_flight", "Calls sent and not done.", labels=label)
        queued = GaugeMetricFamily("asyncexec_queued", "Calls that wait for their turn.", labels=label)
        failed = GaugeMetricFamily("asyncexec_failed", "Whether the executor has failed.", labels=label)
        lost = CounterMetricFamily(
            "asyncexec_undelivered_replies", "Replies not delivered.", labels=("executor", "reason")
        )
        states = GaugeMetricFamily(
            "asyncexec_rank_state", "1 for the state last reported.", labels=("executor", "rank", "state")
        )
        for reading in self._executors.read():
            in_flight.add_metric([reading.name], reading.in_flight)
            queued.add_metric([reading.name], reading.queued)
            failed.add_metric([reading.name], reading.failed)
            for reason, count in reading.undelivered.items():
                lost.add_metric([reading.name, reason], count)
            for rank, now in reading.states.items():
                for state in STATES:
                    states.add_metric([reading.name, str(rank), state], now == state)
        yield from (in_flight, queued, failed, lost, states)
