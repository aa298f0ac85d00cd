"""What only the nccl transport does: processes, groups, sockets, and nothing of them left behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import workers

from asyncexec import ConfigError, ExecutorConfig, Timeouts, WorkerDied, WorkerStartError, create_executor
from asyncexec.wire import Frame, FrameKind
from asyncexec_nccl.devices import collective_timeout
from asyncexec_nccl.stream import DriverStream, RankStream

pytestmark = pytest.mark.usefixtures("no_leftovers")
NONE: dict[str, Any] = {"transport": "nccl", "options": {"nccl": {"backend": "none"}}}


async def test_ranks_know_their_place() -> None:
    config = NONE | {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    async with create_executor(config, workers.EchoWorker) as executor:
        assert await executor.collective_rpc("place") == [
            {"rank": r, "local_rank": r, "world_size": 4, "tp": (r % 2, 2), "pp": (r // 2, 2), "device": "cpu"}
            for r in range(4)
        ]
        pids = await executor.collective_rpc("pid")
        assert len({os.getpid(), *pids}) == 5


async def test_each_executor_has_its_own_process_groups() -> None:
    config = {"transport": "nccl", "tensor_parallel_size": 2}
    big = config | {"pipeline_parallel_size": 2}
    async with create_executor(config, workers.SumWorker) as pair, create_executor(big, workers.SumWorker) as four:
        assert await pair.collective_rpc("sums") == [(1, 1)] * 2
        assert await four.collective_rpc("sums") == [(6, 1), (6, 1), (6, 5), (6, 5)]


async def test_nccl_without_enough_gpus_is_refused() -> None:
    config = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "nccl"}}}
    with pytest.raises(WorkerStartError, match="'nccl' for 2 ranks, and 0 GPUs are visible"):
        async with create_executor(config, workers.EchoWorker):
            pytest.fail("it started")


async def test_the_environment_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    config = NONE | {"options": {"nccl": {"backend": "none", "environment": {"EXTRA": "set"}}}}
    async with create_executor(config, workers.EchoWorker) as executor:
        for name, value in (("INHERITED", "yes"), ("EXTRA", "set")):
            assert await executor.collective_rpc("environment", (name,)) == [value]


async def test_a_rank_that_exits_while_it_starts() -> None:
    with pytest.raises(WorkerDied, match="rank 1 died: exited with status 17"):
        async with create_executor(NONE | {"tensor_parallel_size": 2}, workers.ExitsAtStart, worker_kwargs={"rank": 1}):
            pytest.fail("it started")


async def test_a_start_that_takes_too_long_is_given_up() -> None:
    config = NONE | {"tensor_parallel_size": 2, "timeouts": {"start": 1.0}}
    with pytest.raises(TimeoutError, match=r"start"):
        async with create_executor(config, workers.ExitsAtStart, worker_kwargs={"rank": -1}):
            pytest.fail("it started")


async def test_a_cancelled_start_leaves_nothing() -> None:
    executor = create_executor(NONE, workers.ExitsAtStart, worker_kwargs={"rank": -1})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await executor.start()


async def test_a_killed_rank_is_named_with_its_signal() -> None:
    async with create_executor(NONE | {"tensor_parallel_size": 2}, workers.EchoWorker) as executor:
        pids = await executor.collective_rpc("pid")
        nap = asyncio.ensure_future(executor.collective_rpc("nap", (60,)))
        await asyncio.sleep(0)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(WorkerDied, match="rank 1 died: killed by SIGKILL") as caught:
            await nap
        assert (caught.value.rank, caught.value.pid, caught.value.signal) == (1, pids[1], "SIGKILL")


async def test_a_stopped_rank_does_not_hold_up_closing() -> None:
    config = NONE | {"timeouts": {"drain": 0.2, "stop": 0.2, "terminate": 0.2}}
    executor = create_executor(config, workers.EchoWorker)
    await executor.start()
    [pid] = await executor.collective_rpc("pid")
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    await executor.aclose()
    assert time.monotonic() - began < 3


async def test_a_rank_that_closes_its_connection_is_lost() -> None:
    async with create_executor(NONE, workers.EchoWorker) as executor:
        with pytest.raises(WorkerDied, match="rank 0 died: it closed its connection"):
            await executor.collective_rpc(workers.close_sockets)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import asyncexec, workers
async def main():
    config = {{"transport": "nccl", "tensor_parallel_size": 2, "options": {{"nccl": {{"backend": "none"}}}}}}
    async with asyncexec.create_executor(config, workers.EchoWorker) as executor:
        print(*await executor.collective_rpc("pid"), flush=True)
        await executor.collective_rpc("nap", (60,))
asyncexec.run(main())
"""


async def test_ranks_end_with_a_killed_driver(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    driver = subprocess.Popen(  # noqa: ASYNC220 - over in a millisecond, and nothing else runs
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    )
    if driver.stdout is None:
        raise RuntimeError("no pipe")
    with driver.stdout as output:
        ranks = [os.pidfd_open(int(pid)) for pid in (await asyncio.to_thread(output.readline)).split()]
    driver.kill()
    await asyncio.to_thread(driver.wait)
    loop = asyncio.get_running_loop()
    for rank in ranks:
        ended = asyncio.Event()
        loop.add_reader(rank, ended.set)
        async with asyncio.timeout(2):
            await ended.wait()
        loop.remove_reader(rank)
        os.close(rank)


async def test_a_worker_of_a_script_travels_by_value(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(
        "from __future__ import annotations\n"
        "import asyncexec, msgspec\n"
        "class Output(msgspec.Struct):\n    value: int\n"
        "class Mine:\n"
        "    def __init__(self, context): self.rank = context.rank\n"
        "    def execute_model(self, scheduler_output: int, intermediate: None) -> Output:\n"
        "        return Output(scheduler_output * 2)\n"
        "async def main():\n"
        "    async with asyncexec.create_executor({'transport': 'nccl'}, Mine) as executor:\n"
        "        output = await executor.execute_model(21)\n"
        "        print(type(output) is Output, output.value)\n"
        "asyncexec.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert (output, errors) == (b"True 42\n", b"")


async def test_a_malformed_frame_ends_that_stream_alone() -> None:
    ours, theirs = socket.socketpair()
    ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    frames: list[Frame] = []
    stream = DriverStream(asyncio.get_running_loop(), ours, 10_000, frames.append, ended.set_result)
    theirs.send(b"".join(bytes(p) for p in Frame(FrameKind.REPLY, 1, body=b"good").pack()) + b"nonsense" * 10)
    assert "not a frame" in str(await ended)
    assert [bytes(frame.body) for frame in frames] == [b"good"]
    stream.send(Frame(FrameKind.STOP).pack())
    theirs.close()


async def test_a_stream_keeps_order_when_the_peer_is_slow() -> None:
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    stream = DriverStream(loop, ours, 10_000_000, lambda frame: None, lambda error: None)
    peer = RankStream(theirs, 10_000_000)
    sent = [
        Frame(FrameKind.CALL, n, body=bytes([n]) * (n * 5000), buffers=[bytes([n]) * 70_000] * n) for n in range(40)
    ]
    for frame in sent:
        stream.send(frame.pack())
    for expected in sent:
        received = await asyncio.to_thread(peer.receive)
        if received is None:
            raise RuntimeError("the stream ended")
        assert (received.call_id, bytes(received.body)) == (expected.call_id, expected.body)
        assert [bytes(buffer) for buffer in received.buffers] == list(expected.buffers)
    stream.close()
    assert await asyncio.to_thread(peer.receive) is None
    peer.close()


def test_frames_of_a_rank_are_bounded() -> None:
    with pytest.raises(ConfigError, match="max_frame_bytes"):
        ExecutorConfig(max_frame_bytes=0)


@pytest.mark.parametrize("devices", [[0], [0, 0], [0, -1], []])
async def test_every_rank_needs_a_gpu_of_its_own(devices: list[int]) -> None:
    config = {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"devices": devices}}}
    with pytest.raises(ConfigError, match="valid: 2 different numbers from 0, one for each rank"):
        async with create_executor(config, workers.EchoWorker):
            pytest.fail("it started")


def test_no_operation_of_a_group_ends_before_the_calls_deadline() -> None:
    assert collective_timeout(Timeouts()) == 1200
    assert collective_timeout(Timeouts(methods={"load": 5000.0})) == 10000
    assert collective_timeout(Timeouts(step=None)) > 365 * 86400
