"""What only the ray transport does: placement, one cluster for many executors, the compiled graph's life."""

import asyncio
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
import workers

from asyncexec import (
    ConfigError,
    Executor,
    IntermediateTensors,
    PayloadError,
    ReconfigureDistributedRequest,
    StepTimeout,
    WorkerDied,
    WorkerError,
    WorkerStartError,
    create_executor,
)
from asyncexec_ray import graph_internals
from asyncexec_ray.cluster import CLUSTER
from asyncexec_ray.messages import Place
from asyncexec_ray.placement import PlacedActor, local_ranks, sort_places

ray: Any = importlib.import_module("ray")
pytestmark = pytest.mark.usefixtures("ray_cluster", "no_leftovers")
Layout = dict[str, Any]


def layout(tp: int = 1, pp: int = 1, backend: str = "none", **options: Any) -> Layout:
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    return {"transport": "ray", "options": {"ray": {"backend": backend} | options}} | sizes


async def test_ranks_know_their_place() -> None:
    async with create_executor(layout(2, 2), workers.EchoWorker) as executor:
        assert await executor.collective_rpc("place") == [
            {"rank": r, "local_rank": r, "world_size": 4, "tp": (r % 2, 2), "pp": (r // 2, 2), "device": "cpu"}
            for r in range(4)
        ]
        assert len({os.getpid(), *await executor.collective_rpc("pid")}) == 5


async def test_every_rank_of_every_stage_reports_if_the_aggregator_asks() -> None:
    class Reports(workers.FussyStages):
        def execute_model(self, scheduler_output: Any, intermediate: Any) -> Any:
            output = super().execute_model(scheduler_output, intermediate)
            return output if self.context.is_last_stage else IntermediateTensors({}, f"from {self.context.rank}")

    async with create_executor(layout(2, 2) | {"aggregator": "all"}, Reports) as executor:
        for _ in range(3):
            assert await executor.execute_model(None) == ["from 0", "from 1", "fine", "fine"]


async def test_connectors_of_all_ranks_are_merged() -> None:
    async with create_executor(layout(2, 2) | {"aggregator": "kv"}, workers.StagedSender) as executor:
        outputs = [await executor.execute_model(ranks) for ranks in ([0], [2, 3], [], [1], [0, 1, 2, 3])]
        finished = [getattr(output.kv_connector_output, "finished_sending", None) for output in outputs]
        assert finished == [None, None, None, {"request"}, {"request"}]


async def test_process_groups_of_two_executors_at_once() -> None:
    four = create_executor(layout(2, 2, "gloo"), workers.SumWorker)
    async with create_executor(layout(2, 1, "gloo"), workers.SumWorker) as pair, four:
        assert await pair.collective_rpc("sums") == [(1, 1)] * 2
        assert await four.collective_rpc("sums") == [(6, 1), (6, 1), (6, 5), (6, 5)]


async def test_a_placement_group_of_the_user_is_used_and_kept() -> None:
    util = importlib.import_module("ray.util")
    held = util.placement_group([{"CPU": 2}] * 2)
    try:
        async with create_executor(layout(2, placement_group=held), workers.EchoWorker) as executor:
            assert await executor.execute_model(1) == 1
            assert util.placement_group_table(held)["state"] == "CREATED"
        assert util.placement_group_table(held)["state"] == "CREATED"
        with pytest.raises(ConfigError, match="2 bundles for 3 ranks"):
            await create_executor(layout(3, placement_group=held), workers.EchoWorker).start()
    finally:
        util.remove_placement_group(held)
    with pytest.raises(ConfigError, match="valid: a placement group"):
        await create_executor(layout(placement_group=7), workers.EchoWorker).start()


async def test_a_start_without_room_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    config = layout(resources={"unobtainium": 1}) | {"timeouts": {"start": 0.5}}
    with pytest.raises(TimeoutError, match="start"):
        await create_executor(config, workers.EchoWorker).start()
    assert "1 ranks with {'CPU': 1.0, 'GPU': 0, 'unobtainium': 1.0} each" in caplog.text


@pytest.mark.parametrize("driver", ["direct", "documented"])
async def test_a_layout_without_room_leaves_everything_as_it_was(driver: str) -> None:
    config = layout(1, 2, num_cpus=5, driver=driver) | {"timeouts": {"start": 4.0, "step": 10.0, "stop": 1.0}}
    async with create_executor(config, workers.Movable) as executor:
        before = await executor.execute_model(1)
        with pytest.raises(StepTimeout, match="new ranks not up after 4 s"):
            await executor.reinitialize_distributed(ReconfigureDistributedRequest(pipeline_parallel_size=4))
        assert executor.failure is None
        assert await executor.execute_model(1) == before
        assert await executor.collective_rpc("moves") == [0, 0]


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0])
async def test_a_start_that_is_cancelled_again_and_again_leaves_nothing(seconds: float) -> None:
    executor = create_executor(layout(2), workers.EchoWorker)
    starting = asyncio.ensure_future(executor.start())
    await asyncio.wait([starting], timeout=seconds)
    while not starting.done():
        starting.cancel()
        await asyncio.wait([starting], timeout=0.01)
    await executor.aclose()
    groups = importlib.import_module("ray.util").placement_group_table().values()
    assert [group["state"] for group in groups if group["state"] != "REMOVED"] == []


async def test_what_does_not_fit_a_buffer_fails_its_call_alone() -> None:
    async with create_executor(layout(2, buffer_size_bytes=10_000), workers.EchoWorker) as executor:
        with pytest.raises(
            PayloadError, match=r"the arguments are 10\d\d\d bytes; options.ray.buffer_size_bytes is 10000"
        ):
            executor.execute_model(b"x" * 10_000)
        assert await executor.execute_model(b"x" * 9_000) == b"x" * 9_000
        assert await executor.collective_rpc("double_bytes", (b"x" * 20_000,)) == [b"x" * 40_000] * 2
    config = layout(1, 2, buffer_size_bytes=10_000)
    async with create_executor(config, workers.LargeHop, worker_kwargs={"size": 2_000}) as executor:
        with pytest.raises(
            WorkerError, match=r"the intermediate tensors are 16\d\d\d bytes; .*buffer_size_bytes is 10000"
        ):
            await executor.execute_model(1)


async def test_a_result_that_does_not_fit_a_buffer_comes_all_the_same() -> None:
    class Long(workers.EchoWorker):
        def execute_model(self, scheduler_output: Any, intermediate: Any) -> Any:
            return b"x" * scheduler_output

    async with create_executor(layout(2, buffer_size_bytes=10_000), Long) as executor:
        futures = [executor.execute_model(size) for size in (1, 50_000, 2)]
        assert [len(await future) for future in futures] == [1, 50_000, 2]


async def test_an_idle_graph_is_torn_down_and_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    end_graph = graph_internals.end_graph

    def note(graph: Any) -> None:
        end_graph(graph)
        loop.call_soon_threadsafe(ended.set)

    monkeypatch.setattr(graph_internals, "end_graph", note)
    async with create_executor(layout(2, idle_teardown=0.1), workers.EchoWorker) as executor:
        for _ in range(3):
            ended.clear()
            assert await executor.execute_model("again") == "again"
            async with asyncio.timeout(20):
                await ended.wait()
            assert await executor.collective_rpc("rank") == [0, 1]


async def kill(executor: Executor, victim: int) -> None:
    pids = await executor.collective_rpc("pid")
    assert await executor.execute_model(1) == 1
    nap = asyncio.ensure_future(executor.collective_rpc("nap", (60,)))
    await asyncio.sleep(0)
    steps = [executor.execute_model(n) for n in range(2)]
    os.kill(pids[victim], signal.SIGKILL)
    waiting: list[Awaitable[Any]] = [*steps, nap]
    for awaitable in waiting:
        with pytest.raises(WorkerDied, match=f"rank {victim} died: .*Ray says") as caught:
            await awaitable
        assert (caught.value.rank, caught.value.pid) == (victim, pids[victim])
        assert caught.value.node == ray.util.get_node_ip_address()


@pytest.mark.parametrize("driver", ["direct", "documented"])
async def test_after_a_death_a_new_executor_works_on_the_same_cluster(driver: str) -> None:
    for victim in (0, 2):
        async with create_executor(layout(2, 2, driver=driver), workers.EchoWorker) as executor:
            await kill(executor, victim)
    async with create_executor(layout(2, 2, driver=driver), workers.EchoWorker) as executor:
        assert await executor.execute_model(2) == 2


async def test_the_end_of_standard_error_is_told() -> None:
    async with create_executor(layout(), workers.EchoWorker) as executor:
        with pytest.raises(WorkerDied) as caught:
            await executor.collective_rpc("exit_saying", ("famous last words",))
        assert "famous last words\nfor good" in caught.value.stderr
        assert caught.value.exit_code in (1, None)  # None on kernels that tell the parent alone


async def test_a_worker_that_fails_to_start() -> None:
    with pytest.raises(WorkerStartError, match="no luck on rank 1"):
        async with create_executor(layout(2), workers.FailsToStart, worker_kwargs={"rank": 1}):
            pytest.fail("it started")


async def test_nccl_without_gpus_is_refused() -> None:
    for name in ("backend", "tensor_transport"):
        options: dict[str, Any] = {name: "nccl"}
        with pytest.raises(ConfigError, match=f"{name} is 'nccl', and not every rank has a GPU"):
            await create_executor(layout(2, **options), workers.EchoWorker).start()


async def test_another_release_of_ray_needs_the_documented_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    with pytest.raises(ConfigError, match=r"Ray 2.60, and Ray 2.61.0 is installed; valid: 'documented'"):
        await create_executor(layout(), workers.EchoWorker).start()
    async with create_executor(layout(driver="documented"), workers.EchoWorker) as executor:
        assert await executor.execute_model(1) == 1


async def test_a_cluster_that_is_not_ours_stays() -> None:
    with pytest.raises(ConfigError, match=r"address is '10.1.2.3:1', and this process is connected to"):
        await create_executor(layout(address="10.1.2.3:1"), workers.EchoWorker).start()
    async with create_executor(layout(), workers.EchoWorker) as executor:
        assert await executor.execute_model(1) == 1
    assert ray.is_initialized()
    assert CLUSTER.made is None


def test_options_that_cannot_work() -> None:
    for options, message in (
        ({"buffer_size_bytes": 1}, "from 4096"),
        ({"idle_teardown": 0}, "above 0"),
        ({"address": "ray://somewhere:1"}, "not of a Ray Client"),
        ({"num_cpus": -1}, "num_cpus is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_executor(layout(**options), workers.EchoWorker)


def test_ranks_are_ordered_host_by_host_from_the_driver_on() -> None:
    def place(node: str, *gpus: str) -> PlacedActor:
        return PlacedActor(None, Place(node, f"host of {node}", 1, "", list(gpus), ""))

    actors = [place("b", "10"), place("c", "0"), place("b", "2"), place("a", "1"), place("c", "1"), place("a", "0")]
    places = [actor.place for actor in sort_places(actors, "c")]
    assert [(place.node, *place.gpus) for place in places] == [
        ("c", "0"),
        ("c", "1"),
        ("a", "0"),
        ("a", "1"),
        ("b", "2"),
        ("b", "10"),
    ]
    assert local_ranks(places) == [0, 1, 0, 1, 0, 1]


async def test_a_script_starts_a_cluster_of_its_own_and_its_worker_travels_by_value(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(
        "import asyncexec, asyncio, msgspec, ray\n"
        "class Output(msgspec.Struct):\n    value: int\n"
        "class Mine:\n"
        "    def __init__(self, context): self.rank = context.rank\n"
        "    def execute_model(self, scheduler_output: int, intermediate: None) -> Output:\n"
        "        return Output(scheduler_output * 2)\n"
        "async def main():\n"
        "    for _ in range(2):\n"
        "        config = {'transport': 'ray', 'options': {'ray': {'backend': 'none'}}}\n"
        "        async with asyncexec.create_executor(config, Mine) as executor:\n"
        "            output = await executor.execute_model(21)\n"
        "            print(type(output) is Output, output.value, ray.is_initialized())\n"
        "    print(ray.is_initialized())\n"
        "asyncexec.run(main())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert output.decode().splitlines()[-3:] == ["True 42 True", "True 42 True", "False"], errors.decode()


async def test_steps_without_a_graph() -> None:
    async with create_executor(layout(2, 1, driver="calls", buffer_size_bytes=4096), workers.EchoWorker) as executor:
        large = "x" * 100_000
        assert [await executor.execute_model(sent) for sent in (1, large, 3)] == [1, large, 3]
        futures = [executor.execute_model(number) for number in range(10)]
        assert await executor.collective_rpc("pid")
        assert [await future for future in futures] == list(range(10))


async def test_without_a_graph_there_is_one_stage() -> None:
    with pytest.raises(ConfigError, match="'calls'"):
        await create_executor(layout(1, 2, driver="calls"), workers.EchoWorker).start()
