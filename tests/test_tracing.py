"""The step timeline: its file is valid, its times are in order, and it tells of what went wrong."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import workers
from chrome_trace import Event, check, ns, read

from asyncexec import ConfigError, DeferredOutput, ExecutorConfig, StepTimeout, WorkerDied, WorkerError, create_executor
from asyncexec.inspection import Activity, RankReport, RankSpan, Report
from asyncexec.observing import CallRecord, RankReply
from asyncexec.supervision import inspect_ranks
from asyncexec.tracing import Timeline
from asyncexec.wire import Frame, FrameKind, FrameParser

pytestmark = pytest.mark.usefixtures("no_leftovers")
Layout = dict[str, Any]
NCCL: Layout = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}


def phases(events: list[Event], call_id: str) -> dict[str, tuple[int, int]]:
    """The asynchronous slices of a call: when they began and ended."""
    own = [event for event in events if event["ph"] in "be" and event["id"] == call_id]
    began = {event["name"]: ns(event["ts"]) for event in own if event["ph"] == "b"}
    return {event["name"]: (began[event["name"]], ns(event["ts"])) for event in own if event["ph"] == "e"}


def outcomes(events: list[Event]) -> list[str]:
    return [event["args"]["outcome"] for event in events if event["ph"] == "b" and "outcome" in event.get("args", {})]


def calls_of(events: list[Event], rank: int) -> list[Event]:
    """The slices of whole calls on a rank's main thread."""
    return [event for event in events if event["ph"] == "X" and event["pid"] == rank + 2 and "epoch" in event["args"]]


async def test_every_step_is_there_in_order(layout: Layout, world_size: int, tmp_path: Path) -> None:
    async with create_executor(layout, "workers:EchoWorker") as executor:
        await executor.execute_model("before")
        async with executor.trace(tmp_path / "trace.json"):
            futures = [executor.execute_model(n) for n in range(10)]
            assert [await future for future in futures] == list(range(10))
            # a rank whose output is not wanted may be behind; its answer to this comes after its steps
            await executor.collective_rpc("nap", (0,))
        assert await executor.execute_model("after") == "after"
    events = read(tmp_path / "trace.json")
    assert outcomes(events) == ["ok"] * 11
    received: dict[str, int] = {}
    for rank in range(world_size):
        slices = calls_of(events, rank)[:10]
        assert [event["name"] for event in slices] == [f"execute_model {future.call_id}" for future in futures]
    for event in events:
        if event["ph"] in ("t", "f") and event["pid"] > 1:
            received[event["id"]] = ns(event["ts"])
    for future in futures:
        times = phases(events, f"1.{future.call_id}")
        submitted, done = times[f"execute_model {future.call_id}"]
        sent, decoded = times["in flight"]
        assert submitted <= times["queued"][0] <= times["queued"][1] == sent <= decoded == times["aggregate"][0]
        assert times["aggregate"][1] == done
        assert all(sent <= received[f"1.{future.call_id}.{rank}"] for rank in range(world_size))
        replied = [event for event in events if event["ph"] == "f" and event["id"].startswith(f"1.{future.call_id}.")]
        last = [e for e in replied if e["pid"] == 1]
        assert len(last) == 1
        rank = int(last[0]["id"].rsplit(".", 1)[1])
        whole = next(e for e in calls_of(events, rank) if e["name"] == f"execute_model {future.call_id}")
        assert sent <= ns(whole["ts"]) <= ns(whole["ts"]) + ns(whole["dur"]) <= decoded
    awaited = [
        times["until awaited"] for f in futures if "until awaited" in (times := phases(events, f"1.{f.call_id}"))
    ]
    assert awaited
    assert all(done <= at for done, at in awaited)


async def test_a_deferred_output_is_on_the_completion_thread(tmp_path: Path) -> None:
    local = create_executor({"transport": "local"}, Deferring)
    async with local as executor, executor.trace(tmp_path / "trace.json"):
        assert await executor.execute_model(0.01) == "there"
    events = read(tmp_path / "trace.json")
    waits = [event for event in events if event["name"] == "wait for the output (GPU)"]
    assert [event["tid"] for event in waits] == [21]
    assert waits[0]["dur"] > 9000


async def test_what_went_wrong_is_shown(tmp_path: Path) -> None:
    async with create_executor(NCCL, "workers:EchoWorker") as executor:
        async with executor.trace(tmp_path / "trace.json"):
            with pytest.raises(WorkerError):
                await executor.collective_rpc("fail", ('a "quoted" reason',))
            with pytest.raises(StepTimeout):
                await executor.collective_rpc("nap", (0.3,), timeout=0.05)
            future = executor.execute_model(1)
            waiting = asyncio.ensure_future(_outcome_of(future))
            await asyncio.sleep(0)
            waiting.cancel()
            await future
            slow = asyncio.ensure_future(executor.collective_rpc("nap", (0.5,)))
            await asyncio.sleep(0.05)
        await slow
    events = read(tmp_path / "trace.json")
    assert outcomes(events) == ["WorkerError", "StepTimeout", "ok", "unfinished when the trace ended"]
    assert any(event["name"].endswith("await cancelled") for event in events)
    assert any('a "quoted" reason' in event.get("args", {}).get("error", "") for event in events)


async def _outcome_of(future: Any) -> Any:
    return await future


async def test_a_rank_that_dies_loses_no_file(tmp_path: Path) -> None:
    async with create_executor(NCCL, "workers:EchoWorker") as executor, executor.trace(tmp_path / "trace.json"):
        assert await executor.execute_model(1) == 1
        with pytest.raises(WorkerDied):
            await executor.collective_rpc("exit", (3,))
    events = read(tmp_path / "trace.json")
    assert outcomes(events) == ["ok", "WorkerDied"]
    assert any(event["name"] == "executor failed: WorkerDied" for event in events)
    assert calls_of(events, 0), "what the reply of rank 0 said is there"


async def test_a_long_trace_is_fetched_as_it_goes(tmp_path: Path) -> None:
    async with create_executor(NCCL, "workers:EchoWorker") as executor:
        async with executor.trace(tmp_path / "trace.json"):
            for n in range(700):
                await executor.execute_model(n)
            await asyncio.sleep(0.2)
            assert len(calls_of(read(tmp_path / "trace.json"), 1)) >= 256
        await executor.report()
    events = read(tmp_path / "trace.json")
    assert [len(calls_of(events, rank)) for rank in (0, 1)] == [700, 700]


async def test_two_traces_and_reports_meanwhile(tmp_path: Path) -> None:
    async with create_executor(NCCL, "workers:EchoWorker") as executor:
        first, second = executor.trace(tmp_path / "first.json"), executor.trace(tmp_path / "second.json")
        await first.start()
        await executor.execute_model(1)
        await second.start()
        await executor.execute_model(2)
        await executor.report()
        await first.stop()
        await executor.execute_model(3)
        await first.stop()
        with pytest.raises(RuntimeError, match=r"executor\.trace again"):
            await first.start()
    await second.stop()
    for name in ("first", "second"):
        events = read(tmp_path / f"{name}.json")
        assert [len(calls_of(events, rank)) for rank in (0, 1)] == [2, 2], name


async def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    async with create_executor({"transport": "local"}, "workers:EchoWorker") as executor:
        for path in (tmp_path / "none" / "trace.json", tmp_path):
            with pytest.raises(ConfigError, match=f"trace cannot be written to '{path}'.*valid: a file"):
                await executor.trace(path).start()
        assert await executor.execute_model(1) == 1


async def test_the_variable_traces_each_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCEXEC_TRACE", str(tmp_path / "trace.json"))
    for n in range(2):
        async with create_executor(ExecutorConfig.from_environment(), "workers:EchoWorker") as executor:
            await executor.execute_model(n)
    files = os.listdir(tmp_path)
    assert len(files) == 2
    for file in files:
        assert outcomes(read(tmp_path / file)) == ["ok"]


def test_a_killed_driver_leaves_valid_json(tmp_path: Path) -> None:
    program = (
        "import asyncio\nfrom asyncexec import create_executor, run\n"
        "async def main():\n"
        "    async with create_executor({'transport': 'local'}, 'workers:EchoWorker') as executor:\n"
        "        async with executor.trace('trace.json'):\n"
        "            for n in range(600): await executor.execute_model(n)\n"
        "            await asyncio.sleep(0.3); print('now', flush=True)\n"
        "            while True: await executor.execute_model(1)\n"
        "run(main())\n"
    )
    paths = os.pathsep.join([str(Path(workers.__file__).parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    text = (tmp_path / "trace.json").read_text(encoding="utf-8")
    # killed in the middle of a write, the array lacks its end, which the format allows
    events = json.loads(text if text.endswith("]") else text[: text.rindex(",\n")] + "]")
    assert len(outcomes(events)) >= 512


async def test_another_hosts_clock_is_put_right() -> None:
    ahead = 10**12
    due: list[float] = []
    timeline = Timeline(due.append)
    now = time.monotonic_ns()
    call = CallRecord("execute_model", (0,), True, now, now, (timeline,), 7, 1, sent=now)
    timeline.call_submitted(call)
    call.replies.append(RankReply(0, now + ahead, now + ahead, now))
    call.settle(None)
    span = RankSpan(7, 1, "execute_model", now + ahead, now + ahead, now + ahead)
    report = RankReport(0, "idle", spans=[span], clock=now + ahead, boot="other", clock_offset=ahead, clock_error=500)
    timeline.ranks_reported(Report.of([report]))
    await timeline.catch_up()
    timeline.end()
    events = [json.loads(event) for event in timeline.events]
    assert [ns(event["ts"]) for event in calls_of(events, 0)] == [now]
    (clock,) = (event for event in events if event["name"] == "clock")
    assert clock["args"] == {"offset_us": ahead / 1e3, "error_us": 0.5}
    assert due == [1.0]


async def test_fetching_what_the_ranks_noted_dumps_no_stacks(layout: Layout, tmp_path: Path) -> None:
    class Reports(Timeline):
        def ranks_reported(self, report: Report) -> None:
            fetched.extend(report.ranks)

    fetched: list[RankReport] = []
    async with create_executor(layout, "workers:EchoWorker") as executor:
        executor.add_observer(Reports(lambda delay: None))
        async with executor.trace(tmp_path / "trace.json"):
            for n in range(70):
                await executor.execute_model(n)
        assert {rank.rank for rank in fetched if rank.spans} == set(range(executor.config.world_size))
        assert not any(rank.stacks for rank in fetched)
        assert all("File" in rank.stacks for rank in (await executor.report()).ranks)


VALID: list[Event] = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "driver"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "event loop"}},
    {"ph": "X", "cat": "step", "name": "send", "pid": 1, "tid": 1, "ts": 5.0, "dur": 2.5, "args": {}},
    {"ph": "s", "cat": "flow", "id": "1", "name": "step", "pid": 1, "tid": 1, "ts": 5.0},
    {"ph": "f", "cat": "flow", "id": "1", "name": "step", "pid": 1, "tid": 1, "ts": 6.0, "bp": "e"},
]


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"args": {}}),
        (1, {"tid": 2}),
        (2, {"dur": -1.0}),
        (2, {"ts": "5"}),
        (2, {"ph": "b"}),
        (3, {"id": "2"}),
        (3, {"ts": 4.9}),
        (3, {"ts": 6.5}),
        (4, {"bp": None}),
        (4, {"ts": 8.0}),
        (4, {"ph": "s"}),
    ],
)
def test_what_is_no_trace_is_told_from_one(number: int, change: Event) -> None:
    check(VALID)
    with pytest.raises((AssertionError, KeyError)):
        check([*VALID[:number], VALID[number] | change, *VALID[number + 1 :]])


async def test_the_offset_is_within_its_error() -> None:
    class Elsewhere:
        async def inspect(self, rank: int, stacks: bool) -> bytes:
            await asyncio.sleep(0.01)
            report = Activity().report(rank)
            answer = msgspec.structs.replace(report, boot="another host", clock=report.clock + 5_000_000_000)
            await asyncio.sleep(0.03)
            return msgspec.msgpack.encode(answer)

    (rank,) = (await inspect_ranks(Elsewhere(), [0], 5.0)).ranks  # type: ignore[arg-type]
    assert abs(rank.clock_offset - 5_000_000_000) <= rank.clock_error
    assert rank.clock_error >= 19_000_000


@pytest.mark.parametrize("acknowledge", [False, True])
@pytest.mark.parametrize("trace", [False, True])
def test_the_request_travels_with_the_call(acknowledge: bool, trace: bool) -> None:
    frames: list[Frame] = []
    packed = Frame(FrameKind.CALL, 3, acknowledge=acknowledge, trace=trace).pack()
    FrameParser(1 << 20, frames.append).feed(b"".join(packed))
    assert [(frame.acknowledge, frame.trace) for frame in frames] == [(acknowledge, trace)]


class _Late(DeferredOutput[str]):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self) -> str:
        time.sleep(self.seconds)
        return "there"


class Deferring:
    def __init__(self, context: Any) -> None:
        pass

    def execute_model(self, scheduler_output: float, intermediate: Any) -> Any:
        return _Late(scheduler_output)
