"""Metrics: what the exporters say of executors, and that the dashboard asks for what there is."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest

from asyncexec import ConfigError, Executor, WorkerDied, WorkerError, create_executor
from asyncexec.metrics.opentelemetry import OpenTelemetryMetrics
from asyncexec.metrics.prometheus import PrometheusMetrics

pytestmark = pytest.mark.usefixtures("no_leftovers")
DASHBOARD = Path(__file__).parents[1] / "docs" / "dashboards" / "asyncexec.json"
NCCL: dict[str, Any] = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}


def echo(config: dict[str, Any]) -> Executor:
    return create_executor(config, "workers:EchoWorker")


async def work(executor: Executor) -> None:
    for n in range(3):
        await executor.execute_model(n)
    with pytest.raises(WorkerError):
        await executor.collective_rpc("fail", ("",))
    await executor.collective_rpc("rank")  # behind it: now no rank is in the failed call any more
    await executor.report()


async def test_prometheus() -> None:
    registry = CollectorRegistry()
    metrics = PrometheusMetrics(registry)
    async with echo({"transport": "local"}) as one, echo(NCCL) as two:
        metrics.observe(one, "one")
        metrics.observe(two, "two")
        await work(one)
        await work(two)

        def value(metric: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"asyncexec_{metric}", labels)

        for name in ("one", "two"):
            step = {"executor": name, "method": "execute_model"}
            assert value("calls_total", **step, outcome="ok") == 3
            assert value("calls_total", executor=name, method="fail", outcome="WorkerError") == 1
            total = value("call_seconds_sum", **step, phase="total")
            parts = [value("call_seconds_sum", **step, phase=phase) for phase in ("queued", "running", "aggregation")]
            assert total is not None
            assert 0 < sum(part or 0.0 for part in parts) <= total
            assert value("in_flight", executor=name) == value("queued", executor=name) == 0
            assert value("undelivered_replies_total", executor=name, reason="late") == 0
            assert value("failed", executor=name) == 0
        # rank 1 may be in the failed call still
        assert (
            sum(value("rank_state", executor="two", rank="1", state=state) or 0 for state in ("idle", "running")) == 1
        )
        assert value("rank_state", executor="two", rank="1", state="dead") == 0
        with pytest.raises(ConfigError, match="observed as 'one' already"):
            metrics.observe(two, "one")
        slow = two.execute_model(1)
        assert value("in_flight", executor="two") == 1
        await slow
        with pytest.raises(WorkerDied):
            await two.collective_rpc("exit", (1,))
        assert value("failed", executor="two") == 1
        assert value("calls_total", executor="two", method="exit", outcome="WorkerDied") == 1


async def test_opentelemetry() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    metrics = OpenTelemetryMetrics(provider)
    async with echo(NCCL) as executor:
        metrics.observe(executor, "engine")
        await work(executor)
        data = reader.get_metrics_data()
        assert data is not None
        points: dict[str, list[Any]] = {
            metric.name: list(metric.data.data_points) for metric in data.resource_metrics[0].scope_metrics[0].metrics
        }
        with pytest.raises(ConfigError, match="observed as 'engine' already"):
            metrics.observe(executor, "engine")
    provider.shutdown()
    assert {name.removeprefix("asyncexec.") for name in points} == {
        "calls", "call.duration", "in_flight", "queued", "failed", "undelivered_replies", "rank.state"
    }  # fmt: skip
    counts = {
        (point.attributes["method"], point.attributes["outcome"]): point.value for point in points["asyncexec.calls"]
    }
    assert counts == {("execute_model", "ok"): 3, ("fail", "WorkerError"): 1, ("rank", "ok"): 1}
    durations = {
        point.attributes["phase"]: point.count
        for point in points["asyncexec.call.duration"]
        if point.attributes["method"] == "execute_model"
    }
    assert durations == dict.fromkeys(("total", "queued", "running", "aggregation"), 3)
    states = {(point.attributes["rank"], point.attributes["state"]) for point in points["asyncexec.rank.state"]}
    assert {rank for rank, _ in states} == {0, 1}
    assert {state for _, state in states} <= {"idle", "running"}  # one may be in the failed call still


async def test_who_no_longer_observes_is_not_told() -> None:
    metrics = PrometheusMetrics(CollectorRegistry())
    async with echo({"transport": "local"}) as executor:
        observer = _Counting()
        executor.add_observer(observer)
        metrics.observe(executor)
        await executor.execute_model(1)
        executor.remove_observer(observer)
        await executor.execute_model(2)
        executor.remove_observer(observer)
    assert observer.told == ["submitted", "done", "awaited"]


@pytest.mark.parametrize(
    ("module", "package"), [("prometheus", "prometheus_client"), ("opentelemetry", "opentelemetry")]
)
def test_a_missing_package_is_named(module: str, package: str) -> None:
    program = f"import sys\nsys.modules[{package!r}] = None\nimport asyncexec.metrics.{module}\n"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    assert f"pip install 'asyncexec[{module}]'" in process.stderr


async def test_the_dashboard_asks_for_what_there_is() -> None:
    registry = CollectorRegistry()
    metrics = PrometheusMetrics(registry)
    async with echo({"transport": "local"}) as executor:
        metrics.observe(executor)
        await work(executor)
        exported = set(re.findall(r"^(asyncexec_\w+)", generate_latest(registry).decode(), re.MULTILINE))
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"asyncexec_\w+", query)}
    assert len(asked) >= 6
    assert asked <= exported


class _Counting:
    def __init__(self) -> None:
        self.told: list[str] = []

    def call_submitted(self, call: Any) -> None:
        self.told.append("submitted")

    def call_done(self, call: Any) -> None:
        self.told.append("done")

    def call_awaited(self, call: Any, at: int, cancelled: bool) -> None:
        self.told.append("awaited")

    def ranks_reported(self, report: Any) -> None:
        self.told.append("reported")

    def executor_failed(self, cause: Any) -> None:
        self.told.append("failed")
