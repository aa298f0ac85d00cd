"""Failure injected on purpose, and what came of it: `python benchmarks/torture.py [CASE ...] [--ranks 2 4]`.

With `--transport ray` the ranks are Ray's; cases that are about processes of our own are left out there.

Each case prints one line per layout: what was injected, how often, and the figures that its promise is about.  A broken
promise ends the script with an error.  The process groups' backend is Gloo only where a case needs collectives.
"""

import argparse
import asyncio
import gc
import importlib
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

from asyncexec import (
    AsyncExecError,
    ExecutorBusy,
    IntermediateTensors,
    ReconfigureDistributedRequest,
    StepFuture,
    StepTimeout,
    WorkerDied,
    WorkerError,
    create_executor,
    run,
)
from asyncexec.errors import WireError
from asyncexec.testing import Recorder
from asyncexec.wire import Frame, FrameKind, FrameParser

Layout = dict[str, Any]
QUICK = {"drain": 0.3, "stop": 0.3, "terminate": 0.3}


class Worker:
    """Echoes; can be made to fail in every way."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.sometimes = random.Random(1)  # the same on every rank

    def execute_model(self, scheduler_output: Any, intermediate: IntermediateTensors[Any] | None) -> Any:
        if self.sometimes.random() < 0.02:
            time.sleep(0.003)
        return scheduler_output if self.context.is_last_stage else IntermediateTensors({})

    def pid(self) -> int:
        return os.getpid()

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self, rank: int) -> None:
        if self.context.rank == rank:
            raise LookupError(f"rank {rank} found nothing")

    def sum_without(self, culprit: int) -> None:
        import torch
        import torch.distributed as dist

        if self.context.rank != culprit:
            dist.all_reduce(torch.tensor(1))


TRANSPORT = {"name": "nccl"}
"""Of the ranks, set by the command line."""


def layout(ranks: int, backend: str = "none", **config: Any) -> Layout:
    """As many tensor-parallel ranks; `local` for none."""
    if ranks == 0:
        return {"transport": "local"} | config
    name = TRANSPORT["name"]
    return {"transport": name, "tensor_parallel_size": ranks, "options": {name: {"backend": backend}}} | config


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def require(holds: bool, what: str) -> None:
    """End the script where a promise is broken."""
    if not holds:
        raise SystemExit(f"BROKEN: {what}")


async def cancellations(ranks: int) -> str:
    """10,000 steps, about 30% of whose awaits are cancelled or timed out at a random moment."""
    steps, noise, aggregator = 10_000, random.Random(2), Recorder()
    config = layout(ranks, max_concurrent_batches=4)
    outcomes = {"answered": 0, "abandoned": 0, "deadline": 0}
    futures: list[StepFuture[Any]] = []

    async def await_step(future: StepFuture[Any], n: int, kind: float) -> None:
        try:
            if kind < 0.2:
                with anyio.move_on_after(noise.uniform(0, 1e-3)):
                    require(await future == n, f"step {n} got another's reply")
                    outcomes["answered"] += 1
                    return
                outcomes["abandoned"] += 1
            elif kind < 0.3:
                async with asyncio.timeout(noise.uniform(0, 1e-3)):
                    require(await future == n, f"step {n} got another's reply")
                outcomes["answered"] += 1
            else:
                require(await future == n, f"step {n} got another's reply")
                outcomes["answered"] += 1
        except StepTimeout:
            outcomes["deadline"] += 1
        except TimeoutError:
            outcomes["abandoned"] += 1

    async with create_executor(config, Worker, aggregator=aggregator) as executor:
        await executor.execute_model(-1)  # on Ray, it brings up the graph
        before = len(os.listdir("/proc/self/fd")), threading.active_count(), len(asyncio.all_tasks())
        async with anyio.create_task_group() as group:
            for n in range(steps):
                kind = noise.random()
                limit = noise.uniform(1e-5, 2e-3) if kind < 0.1 else None
                if noise.random() < 0.1:
                    await executor.slot()  # now and then, so that others have to queue
                try:
                    future = executor.execute_model(n, timeout=limit)
                except ExecutorBusy:
                    await executor.slot()
                    future = executor.execute_model(n, timeout=limit)
                futures.append(future)
                group.start_soon(await_step, future, n, kind)
        await executor.execute_model(steps)
        await executor.report()
        counters = executor.counters
        after = len(os.listdir("/proc/self/fd")), threading.active_count(), len(asyncio.all_tasks())
    errors = [future.exception() for future in futures]
    never_sent = sum(isinstance(error, StepTimeout) and "waiting to be sent" in error.message for error in errors)
    require(len(aggregator.seen) == steps + 2 - never_sent, f"{steps + 2 - never_sent - len(aggregator.seen)} lost")
    require(aggregator.seen == sorted(set(aggregator.seen)), "a step was aggregated twice or out of order")
    require(counters.lost == 0, f"{counters.lost} replies lost")
    require(after[0] == before[0] and after[2] == before[2], f"fds, threads, tasks went from {before} to {after}")
    return f"{steps} steps, {outcomes}, {never_sent} never sent: no reply to the wrong call, none lost, nothing leaked"


async def kills(ranks: int) -> str:
    """SIGKILL of any rank with 1 to 4 steps in flight."""
    noise, times = random.Random(3), []
    # each kill takes an executor, which on Ray starts more slowly and is told of by Ray
    turns, limit = (30, 1.0) if TRANSPORT["name"] == "ray" else (50, 0.1)
    for turn in range(turns):
        in_flight, victim = 1 + turn % 4, noise.randrange(ranks)
        async with create_executor(layout(ranks, max_concurrent_batches=4, timeouts=QUICK), Worker) as executor:
            pids = await executor.collective_rpc("pid")
            nap = asyncio.ensure_future(executor.collective_rpc("nap", (30,)))
            await asyncio.sleep(0)
            futures = [executor.execute_model(n) for n in range(in_flight)]
            began = time.perf_counter()
            os.kill(pids[victim], signal.SIGKILL)
            waiting: list[Awaitable[Any]] = [*futures, nap]
            for awaitable in waiting:
                try:
                    await awaitable
                except WorkerDied as died:
                    require(died.rank == victim, f"rank {died.rank} was blamed for {victim}")
                else:
                    require(False, "a call of a dead executor returned")
            times.append(time.perf_counter() - began)
    p99 = quantile(times, 0.99)
    require(p99 < limit, f"p99 from kill to the last exception {p99 * 1e3:.1f} ms, promised {limit * 1e3:.0f}")
    p50 = quantile(times, 0.5)
    return f"{turns} kills: the right rank named each time, p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms"


async def raises(ranks: int) -> str:
    """A rank that raises."""
    times, noise = [], random.Random(4)
    async with create_executor(layout(ranks), Worker) as executor:
        for n in range(500):
            culprit, began = noise.randrange(max(ranks, 1)), time.perf_counter()
            try:
                await executor.collective_rpc("fail", (culprit,))
            except WorkerError as error:
                times.append(time.perf_counter() - began)
                told = (error.remote_type, error.remote_message, error.rank, error.method)
                require(told == ("LookupError", f"rank {culprit} found nothing", culprit, "fail"), f"told {told}")
                require("raise LookupError" in error.remote_traceback, "no remote traceback")
            require(await executor.execute_model(n) == n, "the next step did not work")
    p99 = quantile(times, 0.99)
    require(p99 < 0.05, f"p99 {p99 * 1e3:.1f} ms, promised 50")
    p50 = quantile(times, 0.5)
    return f"{len(times)} errors, typed and with traceback: p50 {p50 * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms"


async def hangs(ranks: int) -> str:
    """SIGSTOP of a rank, and a collective that one rank never enters: the report blames the right one."""
    noise, late, limit = random.Random(5), [], 0.2
    async with create_executor(layout(ranks, timeouts=QUICK), Worker) as executor:
        pids = await executor.collective_rpc("pid")
        for _ in range(20):
            victim = noise.randrange(ranks)
            os.kill(pids[victim], signal.SIGSTOP)
            late.append(await _time_out(executor.collective_rpc("pid", timeout=limit), victim) - limit)
            os.kill(pids[victim], signal.SIGCONT)
            await executor.collective_rpc("pid")
    stopped = max(late)
    late.clear()
    async with create_executor(layout(ranks, "gloo", timeouts=QUICK), Worker) as executor:
        await executor.collective_rpc("sum_without", (-1,))
        for _ in range(20):
            victim = noise.randrange(ranks)
            stuck = executor.collective_rpc("sum_without", (victim,), timeout=limit)
            late.append(await _time_out(stuck, victim) - limit)
            await executor.collective_rpc("sum_without", (-1,), ranks=[victim])
            await executor.collective_rpc("pid")
    require(max(stopped, *late) < 0.5, f"StepTimeout {max(stopped, *late) * 1e3:.0f} ms late, promised 500")
    worst = f"{stopped * 1e3:.0f} and {max(late) * 1e3:.0f} ms after the deadline at worst"
    return f"20 stopped ranks and 20 collectives entered by all but one: the right rank blamed each time, {worst}"


async def _time_out(call: Awaitable[Any], culprit: int) -> float:
    began = time.perf_counter()
    try:
        await call
    except StepTimeout as error:
        took = time.perf_counter() - began
        blamed = error.report.blamed if error.report else None
        require(blamed == [culprit], f"{blamed} blamed for {culprit}: {error.report}")
        return took
    raise SystemExit("BROKEN: a call that hangs returned")


async def closing(ranks: int) -> str:
    """aclose with a stopped rank; then drivers that are killed while their ranks are busy."""
    executor = create_executor(layout(ranks, timeouts=QUICK), Worker)
    await executor.start()
    pids = await executor.collective_rpc("pid")
    os.kill(pids[0], signal.SIGSTOP)
    began = time.perf_counter()
    await executor.aclose()
    took = time.perf_counter() - began
    require(took < sum(QUICK.values()) + 1, f"aclose took {took:.2f} s")
    require(not {str(pid) for pid in pids} & set(os.listdir("/proc")), "a rank is left")
    before = _traces()
    slowest = max([await _kill_driver(ranks) for _ in range(20)])
    require(_traces() <= before, f"left behind: {_traces() - before}")
    gone = f"the last rank gone after {slowest * 1e3:.0f} ms at most"
    return f"aclose with a stopped rank {took:.2f} s; 20 drivers killed: {gone}"


async def _kill_driver(ranks: int) -> float:
    """Seconds from a driver's death to that of its last rank."""
    command = [sys.executable, __file__, "--be-a-driver", str(ranks)]
    driver = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if driver.stdout is None:
        raise RuntimeError("no pipe")
    pidfds = [os.pidfd_open(int(pid)) for pid in (await driver.stdout.readline()).split()]
    began = time.perf_counter()
    driver.kill()
    for pidfd in pidfds:
        with anyio.fail_after(2):
            await anyio.wait_readable(pidfd)
        os.close(pidfd)
    took = time.perf_counter() - began
    await driver.wait()
    return took


async def _busy_driver(ranks: int) -> None:
    async with create_executor(layout(ranks), Worker) as executor:
        print(*await executor.collective_rpc("pid"), flush=True)
        await executor.collective_rpc("nap", (600,))


def _traces() -> set[str]:
    """Files where something could be left behind."""
    return {str(path) for folder in ("/dev/shm", "/tmp") for path in Path(folder).iterdir()}


async def cycles(ranks: int) -> str:
    """200 executors, one after the other."""

    async def cycle() -> None:
        async with create_executor(layout(ranks), Worker) as executor:
            require(await executor.execute_model(1) == 1, "a step did not work")

    for _ in range(10):
        await cycle()
    gc.collect()
    before, began = _resources(), time.perf_counter()
    for _ in range(200):
        await cycle()
    gc.collect()
    after, took = _resources(), time.perf_counter() - began
    require(after[:3] == before[:3], f"fds, threads, tasks went from {before[:3]} to {after[:3]}")
    growth = (after[3] - before[3]) / 2**20
    require(growth < 20, f"memory grew by {growth:.1f} MiB, promised 20")
    return f"200 cycles of {took / 200 * 1e3:.0f} ms: fds, threads and tasks as before, memory {growth:+.1f} MiB"


async def layouts(ranks: int) -> str:
    """An executor that changes its layout from 1x2 to 2x2 to 1x1 under use, ten times."""
    times: list[float] = []

    async def cycle() -> None:
        config = layout(1, timeouts=QUICK) | {"pipeline_parallel_size": 2}
        async with create_executor(config, Worker) as executor:
            for tensor_parallel, pipeline_parallel in ((1, 2), (2, 2), (1, 1)):
                if executor.config.world_size != tensor_parallel * pipeline_parallel:
                    began = time.perf_counter()
                    await executor.reinitialize_distributed(
                        ReconfigureDistributedRequest(
                            tensor_parallel_size=tensor_parallel, pipeline_parallel_size=pipeline_parallel
                        )
                    )
                    times.append(time.perf_counter() - began)
                require(await executor.execute_model(7) == 7, "a step did not work")
                pids = await executor.collective_rpc("pid")
                require(len(set(pids)) == tensor_parallel * pipeline_parallel, "ranks are missing")

    await cycle()
    gc.collect()
    before = _resources()
    for _ in range(10):
        await cycle()
    gc.collect()
    after = _resources()
    left = ray_leftovers() if TRANSPORT["name"] == "ray" else []
    require(not left, f"left on the cluster: {left}")
    if TRANSPORT["name"] != "ray":  # whose client library pools its sockets
        require(after[:3] == before[:3], f"fds, threads, tasks went from {before[:3]} to {after[:3]}")
    took = f"a change p50 {quantile(times, 0.5) * 1e3:.0f} ms, at most {max(times) * 1e3:.0f} ms"
    return f"10 executors through 1x2, 2x2, 1x1, each used: nothing left, {took}"


def ray_leftovers() -> list[str]:
    """Actors and placement groups that live."""
    state: Any = importlib.import_module("ray._private.state")
    actors = [str(actor["Pid"]) for actor in state.actors().values() if actor["State"] != "DEAD"]
    groups = importlib.import_module("ray.util").placement_group_table().values()
    return actors + [group["placement_group_id"] for group in groups if group["state"] != "REMOVED"]


def _resources() -> tuple[int, int, int, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    fds = len(os.listdir("/proc/self/fd"))
    return fds, threading.active_count(), len(asyncio.all_tasks()), pages * os.sysconf("SC_PAGESIZE")


async def mutations(ranks: int) -> str:
    """1,000,000 frames with random bytes changed, cut out or put in, and cut anywhere."""
    noise, limit, refused, given_out = random.Random(7), 1 << 16, 0, 0
    for n in range(1_000_000):
        frame = Frame(FrameKind(noise.randint(1, len(FrameKind))), n, 1, body=noise.randbytes(noise.randrange(64)))
        if noise.random() < 0.3:
            frame.buffers = [noise.randbytes(noise.randrange(99)) for _ in range(noise.randrange(4))]
        data = bytearray(b"".join(bytes(piece) for piece in frame.pack()))
        for _ in range(noise.randint(1, 4)):
            at = noise.randrange(len(data) + 1)
            data[at : at + noise.randrange(3)] = noise.randbytes(noise.randrange(3))
        frames: list[Frame] = []
        parser = FrameParser(limit, frames.append)
        try:
            for start in range(0, len(data), cut := noise.randint(1, 200)):
                piece = bytes(data[start : start + cut])
                while piece:
                    if parser.wanted is None:
                        parser.feed(piece)
                        break
                    part = piece[: len(parser.wanted)]
                    require(len(parser.wanted) <= limit, "memory above the bound was allocated")
                    parser.wanted[: len(part)] = part
                    parser.received(len(part))
                    piece = piece[len(part) :]
        except WireError:
            refused += 1
        given_out += len(frames)
        require(all(frame.size <= limit for frame in frames), "a frame above the bound was given out")
    return f"1,000,000 mutated frames: {refused} refused, {given_out} read as frames, no crash"


CASES: dict[str, tuple[Callable[[int], Awaitable[str]], bool]] = {
    # case, and whether it is for `local` too
    "cancellations": (cancellations, True),
    "kills": (kills, False),
    "raises": (raises, True),
    "hangs": (hangs, False),
    "closing": (closing, False),
    "cycles": (cycles, True),
    "layouts": (layouts, False),
}


ON_RAY = ("cancellations", "kills", "raises", "hangs", "layouts")


def _run_on_ray(cases: list[str], ranks: list[int]) -> None:
    ray: Any = importlib.import_module("ray")
    cluster = importlib.import_module("asyncexec_ray.cluster")
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _system_config=cluster.LOCAL_SYSTEM_CONFIG,
    )
    for name in cases:
        for number in ranks[:1] if name == "layouts" else ranks:
            print(f"{name} (ray, {number} ranks): {run(_bounded(CASES[name][0], number))}", flush=True)
    ray.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}, mutations (default: all)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="how many")
    parser.add_argument("--transport", choices=("nccl", "ray"), default="nccl", help="of the ranks")
    parser.add_argument("--be-a-driver", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_a_driver:
        run(_busy_driver(arguments.be_a_driver))
        return 0
    TRANSPORT["name"] = arguments.transport
    if arguments.transport == "ray":
        _run_on_ray(arguments.cases or list(ON_RAY), arguments.ranks)
        return 0
    unknown = set(arguments.cases) - {*CASES, "mutations"}
    if unknown:
        parser.error(f"no case {sorted(unknown)}; there are: {', '.join(CASES)}, mutations")
    for name in arguments.cases or [*CASES, "mutations"]:
        if name == "mutations":
            print(f"{name}: {run(mutations(0))}", flush=True)
            continue
        case, on_local = CASES[name]
        for ranks in [0] * on_local + (arguments.ranks[:1] if name == "layouts" else arguments.ranks):
            where = f"nccl, {ranks} ranks" if ranks else "local"
            print(f"{name} ({where}): {run(_bounded(case, ranks))}", flush=True)
    return 0


async def _bounded(case: Callable[[int], Awaitable[str]], ranks: int) -> str:
    with anyio.fail_after(600):
        try:
            return await case(ranks)
        except AsyncExecError as error:
            raise SystemExit(f"BROKEN: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
