"""Failures are fast, typed and explained: reports, deadlines, hangs, deaths, health."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import workers

from asyncexec import (
    Executor,
    ExecutorClosed,
    ExecutorFailed,
    FirstRank,
    RankContext,
    RankReport,
    RankUnhealthy,
    Report,
    StepTimeout,
    WorkerDied,
    WorkerError,
    create_executor,
)
from asyncexec.inspection import blame
from asyncexec_nccl import NcclTransport

pytestmark = pytest.mark.usefixtures("no_leftovers")
Layout = dict[str, Any]
PAIR: Layout = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}
QUICK = {"drain": 0.2, "stop": 0.3, "terminate": 0.3}


async def until(executor: Executor, holds: Any) -> Report:
    """Reports until one satisfies `holds`: a rank takes up its calls when it gets to them."""
    async with asyncio.timeout(20):
        while True:
            report = await executor.report()
            if holds(report):
                return report


async def test_the_report_tells_what_every_rank_does(layout: Layout, world_size: int) -> None:
    async with create_executor(layout, workers.EchoWorker) as executor:
        await executor.execute_model(1)
        # the reply leaves a moment before its rank is idle, and the ranks that need not reply may still be at it
        idle = await until(executor, lambda report: all(rank.state == "idle" for rank in report.ranks))
        assert len(idle.ranks) == world_size
        assert idle.blamed == []
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.5,)))
        busy = await until(executor, lambda report: all(rank.state == "running" for rank in report.ranks))
        for before, rank in zip(idle.ranks, busy.ranks, strict=True):
            assert (rank.method, rank.waiting_in) == ("nap", None)
            assert rank.progress > before.progress
            assert "in nap" in rank.stacks
        assert "running nap of call" in str(busy)
        await nap


async def test_a_hang_is_explained(layout: Layout, world_size: int) -> None:
    async with create_executor(layout, workers.EchoWorker) as executor:
        began = time.monotonic()
        with pytest.raises(StepTimeout) as caught:
            await executor.collective_rpc("nap", (1.0,), timeout=0.2, ranks=[world_size - 1])
        assert time.monotonic() - began < 0.7
        report = caught.value.report
        assert report is not None
        assert report.blamed == [world_size - 1]
        assert f"the others wait for: rank {world_size - 1}" in str(caught.value)
        assert "in nap" in str(caught.value)


async def test_a_stopped_rank_is_named() -> None:
    layout = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}
    async with create_executor(layout | {"timeouts": QUICK}, workers.EchoWorker) as executor:
        pids = await executor.collective_rpc("pid")
        os.kill(pids[1], signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(StepTimeout) as caught:
            await executor.collective_rpc("rank", timeout=0.2)
        assert time.monotonic() - began < 0.7
        assert caught.value.report is not None
        assert caught.value.report.blamed == [1]
        assert caught.value.report.ranks[1].state == "stopped"
        assert "T (stopped)" in caught.value.report.ranks[1].kernel
        with pytest.raises(RankUnhealthy, match="rank 1: stopped"):
            await executor.check_health()
        os.kill(pids[1], signal.SIGCONT)
        assert await executor.collective_rpc("rank") == [0, 1]


@asynccontextmanager
async def gloo(worker: type, **config: Any) -> AsyncIterator[Executor]:
    layout = {"transport": "nccl", "tensor_parallel_size": 2, "timeouts": QUICK}
    async with create_executor(layout | config, worker) as executor:
        yield executor


async def test_a_collective_that_a_peer_never_enters_blames_the_peer() -> None:
    async with gloo(workers.SumWorker) as executor:
        for culprit in (0, 1):
            with pytest.raises(StepTimeout) as caught:
                await executor.collective_rpc("sum_without", (culprit,), timeout=0.3)
            report = caught.value.report
            assert report is not None
            assert report.ranks[1 - culprit].waiting_in == "all_reduce"
            assert report.blamed == [culprit]
            await executor.collective_rpc("join_late", ranks=[culprit])
            assert await executor.collective_rpc("sums") == [(1, 1)] * 2


async def test_a_death_that_breaks_a_collective_is_the_cause_that_is_reported() -> None:
    async with gloo(workers.SumWorker) as executor:
        calls = [asyncio.ensure_future(executor.collective_rpc("sum_without_dying", (1,))) for _ in range(3)]
        for call in calls:
            with pytest.raises(WorkerDied, match="rank 1 died: killed by SIGKILL"):
                await call


async def test_a_stuck_collective_does_not_hold_up_closing() -> None:
    async with gloo(workers.SumWorker) as executor:
        stuck = asyncio.ensure_future(executor.collective_rpc("sum_without", (0,)))
        await until(executor, lambda report: report.ranks[1].waiting_in is not None)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    with pytest.raises(Exception, match="closed"):
        await stuck


async def test_after_a_timeout_the_executor_fails_if_asked_to(layout: Layout) -> None:
    config = layout | {"on_timeout": "fail", "timeouts": QUICK}
    async with create_executor(config, workers.EchoWorker) as executor:
        causes: list[Exception] = []
        executor.add_failure_callback(causes.append)
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (0.5,), timeout=0.1))
        await asyncio.sleep(0)
        behind = executor.execute_model(1)
        with pytest.raises(StepTimeout):
            await nap
        with pytest.raises(ExecutorFailed, match=r"nap took longer than 0\.1 s"):
            await behind
        with pytest.raises(ExecutorFailed):
            executor.execute_model(1)
        assert [type(cause) for cause in causes] == [StepTimeout]


async def test_health_is_progress() -> None:
    async with create_executor({"transport": "local"}, workers.EchoWorker) as executor:
        await executor.check_health()
        busy = asyncio.ensure_future(executor.collective_rpc("work", (1.0, True)))
        await until(executor, lambda report: report.ranks[0].state == "running" and report.ranks[0].seconds > 0.2)
        await executor.check_health(timeout=0.15)
        await busy
        stuck = asyncio.ensure_future(executor.collective_rpc("work", (1.0, False)))
        await until(executor, lambda report: report.ranks[0].state == "running" and report.ranks[0].seconds > 0.2)
        with pytest.raises(RankUnhealthy, match=r"no progress for 0\.15 s: rank 0: running work") as caught:
            await executor.check_health(timeout=0.15)
        assert caught.value.ranks == (0,)
        await stuck


async def test_a_death_comes_with_its_last_words(capfd: pytest.CaptureFixture[str]) -> None:
    layout = {"transport": "nccl", "options": {"nccl": {"backend": "none"}}}
    async with create_executor(layout, workers.EchoWorker) as executor:
        with pytest.raises(WorkerDied) as caught:
            await executor.collective_rpc("exit_saying", ("out of luck",))
        assert caught.value.stderr == "out of luck\nfor good"
        assert caught.value.last_call == "exit_saying, call 2"
        assert "out of luck" in str(caught.value)
        report = await executor.report()
        assert report.ranks[0].state == "dead"


async def test_an_error_in_a_collective_is_delivered_when_nobody_died() -> None:
    async with gloo(workers.SumWorker) as executor:
        with pytest.raises(WorkerError, match="TypeError"):
            await executor.collective_rpc("bad_collective")
        assert await executor.collective_rpc("sums") == [(1, 1)] * 2


async def test_reports_for_people(layout: Layout, world_size: int, caplog: pytest.LogCaptureFixture) -> None:
    async with create_executor(layout, workers.EchoWorker) as executor:
        await executor.execute_model(1)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "asyncexec", "report", str(os.getpid())), stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        text = output.decode()
        assert f"process {os.getpid()}: {layout['transport']}" in text
        assert f"rank {world_size - 1}: idle since it ran execute_model" in text
        os.kill(os.getpid(), signal.SIGUSR1)
        async with asyncio.timeout(10):
            while not caplog.records:
                await executor.report()
        assert "rank 0: idle since" in caplog.text
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "asyncexec", "report", str(os.getpid())), stderr=subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (1, f"asyncexec report: process {os.getpid()} runs no executor\n")


async def test_an_error_in_a_collective_is_not_lost_to_the_reply_of_a_later_step() -> None:
    config = {"transport": "nccl", "max_concurrent_batches": 2}
    async with create_executor(config, workers.SumWorker) as executor:
        failing = asyncio.ensure_future(executor.collective_rpc("bad_collective"))
        await asyncio.sleep(0)
        assert await executor.execute_model(1) is None
        with pytest.raises(WorkerError, match="TypeError"):
            await failing


async def test_a_cancelled_aclose_ends_the_ranks_all_the_same() -> None:
    config = {"transport": "nccl", "options": {"nccl": {"backend": "none"}}, "timeouts": QUICK}
    executor = create_executor(config, workers.EchoWorker)
    await executor.start()
    [pid] = await executor.collective_rpc("pid")
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await executor.aclose()
    assert str(pid) not in os.listdir("/proc")


async def test_closing_while_starting(layout: Layout) -> None:
    executor = create_executor(layout, workers.EchoWorker)
    starting = asyncio.ensure_future(executor.start())
    await asyncio.sleep(0)
    await executor.aclose()
    with pytest.raises(ExecutorClosed):
        await starting
    with pytest.raises(ExecutorClosed, match="is closed"):
        executor.execute_model(1)


async def test_what_a_completion_submits_does_not_overtake(layout: Layout) -> None:
    async with create_executor(layout | {"max_concurrent_batches": 1}, workers.EchoWorker) as executor:
        first, second = executor.execute_model(1), executor.execute_model(2)
        inner: list[Any] = []
        view = first.concurrent()
        await asyncio.sleep(0)
        view.add_done_callback(lambda _: inner.append(executor.sample_tokens(5)))
        assert await first == 1
        assert await second == 2
        assert await inner[0] == 205


async def test_deferred_outputs_that_fail_in_any_way_do_not_hold_up_the_later_ones() -> None:
    for transport in ("local", "nccl"):
        config = {"transport": transport, "async_scheduling": True, "options": {"nccl": {"backend": "none"}}}
        async with create_executor(config, workers.FailingLater) as executor:
            for how in ("exit", "mute", "exit"):
                with pytest.raises(WorkerError):
                    await executor.execute_model(how)
            assert await executor.execute_model("fine") == "fine"


async def test_a_rank_killed_while_it_writes_is_named_with_its_signal() -> None:
    config = {"transport": "nccl", "options": {"nccl": {"backend": "none"}}}
    async with create_executor(config, workers.EchoWorker) as executor:
        [pid] = await executor.collective_rpc("pid")
        call = asyncio.ensure_future(executor.collective_rpc("double_bytes", (b"x" * 100_000_000,)))
        await until(executor, lambda report: report.ranks[0].method == "double_bytes")
        await asyncio.sleep(0.02)  # anywhere within the copy or the reply
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait([call])
        error = call.exception()  # None if the reply was faster
        assert error is None or (isinstance(error, WorkerDied) and error.signal == "SIGKILL")


async def test_a_default_timeout_of_sockets_does_not_reach_the_ranks() -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        config = {"transport": "nccl", "pipeline_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}
        async with create_executor(config, workers.EchoWorker) as executor:
            assert await executor.execute_model(1) == 1
    finally:
        socket.setdefaulttimeout(before)


async def test_a_death_is_noticed_without_a_standard_error(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import asyncexec, workers\n"
        "async def main():\n"
        "    config = {'transport': 'nccl', 'options': {'nccl': {'backend': 'none'}}}\n"
        "    async with asyncexec.create_executor(config, workers.EchoWorker) as executor:\n"
        "        try:\n"
        "            await executor.collective_rpc('exit_saying', ('unheard',))\n"
        "        except asyncexec.WorkerDied as died:\n"
        "            print(died.exit_code)\n"
        "asyncexec.run(main())\n"
    )
    process = await asyncio.create_subprocess_shell(f"{sys.executable} {script} 2>&-", stdout=subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert output == b"1\n"


async def test_an_error_of_a_rank_that_was_not_waited_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    config = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}
    async with create_executor(config, workers.LateFailure) as executor:
        assert await executor.execute_model(1) == 1
        await executor.collective_rpc("rank")
    assert "rank 1 failed in a call that was complete without it" in caplog.text


async def test_a_hang_of_a_rank_that_no_step_waits_for_is_noticed() -> None:
    """Only the first of these ranks replies; the other's silence must not go on for ever."""
    config = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}
    async with create_executor(config | {"timeouts": QUICK}, workers.EchoWorker) as executor:
        pids = await executor.collective_rpc("pid")
        os.kill(pids[1], signal.SIGSTOP)

        async def steps() -> None:
            for n in range(100):
                assert await executor.execute_model(n, timeout=0.5) == n

        with pytest.raises(StepTimeout) as caught:
            await steps()
        assert caught.value.waiting_for == (1,)
        assert caught.value.report is not None
        assert caught.value.report.blamed == [1]
        os.kill(pids[1], signal.SIGCONT)
        assert await executor.execute_model("on") == "on"


def test_blame() -> None:
    def rank(number: int, state: Any = "running", waiting: str | None = None, call: int = 1) -> RankReport:
        return RankReport(number, state, "m", call, waiting_in=waiting)

    assert blame([rank(0, "idle"), rank(1, "idle")]) == []
    assert blame([rank(0, "idle"), rank(1)]) == [1]
    assert blame([rank(0, waiting="all_reduce"), rank(1)]) == [1]
    assert blame([rank(0, waiting="all_reduce"), rank(1, "idle")]) == [1]
    assert blame([rank(0, waiting="all_reduce"), rank(1, "stopped"), rank(2)]) == [1]
    assert blame([rank(0, "dead"), rank(1, "stopped")]) == [0]
    assert blame([rank(0, waiting="a", call=3), rank(1, waiting="a", call=2)]) == [1]


async def test_an_aggregator_that_raises_does_not_hide_a_death(caplog: pytest.LogCaptureFixture) -> None:
    class Fussy(FirstRank):
        def __init__(self) -> None:
            self.told: list[int] = []

        def rank_lost(self, rank: int) -> None:
            self.told.append(rank)
            raise RuntimeError("no rank may be lost")

    fussy = Fussy()
    async with create_executor(PAIR, workers.EchoWorker, aggregator=fussy) as executor:
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (30,), ranks=[0]))
        with pytest.raises(WorkerDied, match="rank 1 died"):
            await executor.collective_rpc("exit", (3,), ranks=[1])
        with pytest.raises(WorkerDied, match="rank 1 died"):
            await nap
    assert fussy.told == [1]
    assert "no rank may be lost" in caplog.text


async def test_a_start_that_hangs_names_the_rank() -> None:
    class Late:
        def __init__(self, context: RankContext) -> None:
            if context.rank == 1:
                time.sleep(60)

    with pytest.raises(StepTimeout) as caught:
        await create_executor(PAIR | {"timeouts": {"start": 2.0, "stop": 0.2, "terminate": 0.2}}, Late).start()
    assert caught.value.waiting_for == (1,)
    assert caught.value.report is not None
    assert caught.value.report.blamed == [1]


async def test_a_transport_that_fails_to_close_leaves_no_call_waiting() -> None:
    class Stubborn(NcclTransport):
        async def close(self, ranks: Sequence[int] | None = None) -> None:
            await super().close(ranks)
            raise OSError("it will not close")

    config = {"options": {"nccl": {"backend": "none"}}, "timeouts": {"drain": 0.1, "stop": 0.1}}
    executor = create_executor(config, workers.EchoWorker, transport=Stubborn)
    await executor.start()
    nap = asyncio.ensure_future(executor.collective_rpc("nap", (30,)))
    await asyncio.sleep(0)
    with pytest.raises(OSError, match="it will not close"):
        await executor.aclose()
    with pytest.raises(ExecutorClosed):
        await nap
    await executor.aclose()


@pytest.mark.parametrize("length", [10, 900, 5000, 100_000])
async def test_errors_are_cut_to_what_a_frame_may_be(layout: Layout, length: int) -> None:
    async with create_executor(layout | {"max_frame_bytes": 4096}, workers.EchoWorker) as executor:
        with pytest.raises(WorkerError) as caught:
            await executor.collective_rpc("fail_at_length", (length,))
        assert caught.value.remote_message.startswith("x" * min(length, 1000))
        assert 'raise ValueError("x" * length)' in caught.value.remote_traceback or length > 900
        assert await executor.execute_model("on") == "on"
