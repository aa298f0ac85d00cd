"""What an awaited step costs beside the bare floor: `python benchmarks/step_latency.py`.

The floor is the least that any executor of this kind does: one process encodes a 64-request scheduler output as
msgpack, writes it to two processes over Unix sockets, each echoes the bytes (asyncio protocols on uvloop), and the
first process decodes what comes back.  The executor does the same step through asyncexec on two ranks of the `nccl`
transport, whose no-op worker decodes the scheduler output and returns it.  With aggregator "first" one rank replies,
with "all" both do; the floor is measured with one reply decoded and with two.

All are measured side by side, in rounds that alternate between them, because machines are noisy; the figure is the
ratio of the medians.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from asyncexec import create_executor, run

RANKS = 2
_LENGTH = struct.Struct("<I")


class SchedulerOutput(msgspec.Struct):
    """A decode step as the field's engines send it (vLLM's v1 scheduler output has these parts)."""

    request_ids: list[str]
    new_token_ids: list[list[int]]
    new_block_ids: list[list[int] | None]
    num_computed_tokens: list[int]
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    finished_request_ids: set[str]


class EchoWorker:
    """Returns what it is given."""

    def __init__(self, context: Any) -> None:
        pass

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate: None) -> SchedulerOutput:
        return scheduler_output


def scheduler_output(requests: int) -> SchedulerOutput:
    """One token for each of `requests` requests; every 16th needs a new block of its KV cache."""
    names = [f"cmpl-{hash_of(i):032x}-0" for i in range(requests)]
    return SchedulerOutput(
        request_ids=names,
        new_token_ids=[[1000 + 37 * i] for i in range(requests)],
        new_block_ids=[[9000 + i] if i % 16 == 0 else None for i in range(requests)],
        num_computed_tokens=[470 + i for i in range(requests)],
        num_scheduled_tokens=dict.fromkeys(names, 1),
        total_num_scheduled_tokens=requests,
        finished_request_ids=set(names[:1]),
    )


def hash_of(number: int) -> int:
    """128 bits that look like a request's id, the same in every run."""
    return int.from_bytes(hashlib.md5(str(number).encode(), usedforsecurity=False).digest())


class _Echo(asyncio.Protocol):
    """Sends each message back."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        asyncio.get_running_loop().stop()


def _serve_echo(connection: socket.socket) -> None:
    async def serve() -> None:
        await asyncio.get_running_loop().create_connection(_Echo, sock=connection)
        await asyncio.Event().wait()  # until the connection is lost, which stops the loop

    try:
        run(serve())
    except RuntimeError:
        return  # the loop was stopped


class _Collector(asyncio.Protocol):
    """Gathers one message at a time."""

    def __init__(self) -> None:
        self._data = b""
        self.message: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        size = _LENGTH.unpack_from(self._data)[0] + _LENGTH.size
        if len(self._data) == size:
            self.message.set_result(self._data[_LENGTH.size :])
            self._data = b""


class Floor:
    """Two echoing processes, and the loop's end of their sockets."""

    async def __aenter__(self) -> "Floor":
        context = multiprocessing.get_context("spawn")
        self._processes, self._ends = [], []
        for _ in range(RANKS):
            ours, theirs = socket.socketpair()
            process = context.Process(target=_serve_echo, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            _, end = await asyncio.get_running_loop().create_connection(_Collector, sock=ours)
            self._ends.append(end)
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(SchedulerOutput)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for end in self._ends:
            end.transport.close()
        for process in self._processes:
            await asyncio.to_thread(process.join, 5)

    async def step(self, value: SchedulerOutput, decoded: int) -> None:
        body = self._encoder.encode(value)
        message = _LENGTH.pack(len(body)) + body
        loop = asyncio.get_running_loop()
        for end in self._ends:
            end.message = loop.create_future()
            end.transport.write(message)
        replies = [await end.message for end in self._ends]
        for reply in replies[:decoded]:
            self._decoder.decode(reply)


async def _round(step: Callable[[], Awaitable[Any]], steps: int) -> list[float]:
    """Seconds of each of `steps` awaited steps."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        await step()
        times.append(time.perf_counter() - began)
    return times


async def measure(rounds: int, steps: int, requests: int) -> dict[str, list[float]]:
    value = scheduler_output(requests)
    config = {"transport": "nccl", "tensor_parallel_size": RANKS, "options": {"nccl": {"backend": "none"}}}
    async with (
        Floor() as floor,
        create_executor(config, EchoWorker) as first,
        create_executor(config | {"aggregator": "all"}, EchoWorker) as every,
    ):
        cases: dict[str, Callable[[], Awaitable[Any]]] = {
            "floor, one decoded": lambda: floor.step(value, 1),
            "executor, first rank": lambda: first.execute_model(value),
            "floor, all decoded": lambda: floor.step(value, RANKS),
            "executor, all ranks": lambda: every.execute_model(value),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(rounds + 1):
            for name, step in cases.items():
                measured = await _round(step, steps)
                if number:  # the first round warms up
                    times[name] += measured
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each case, after one to warm up")
    parser.add_argument("--steps", type=int, default=200, help="steps of one round")
    parser.add_argument("--requests", type=int, default=64, help="requests in the scheduler output")
    parser.add_argument("--json", help="write the figures there")
    arguments = parser.parse_args()
    times = run(measure(arguments.rounds, arguments.steps, arguments.requests))
    size = len(msgspec.msgpack.encode(scheduler_output(arguments.requests)))
    figures = {
        name: {"p50_us": statistics.median(t) * 1e6, "p99_us": statistics.quantiles(t, n=100)[98] * 1e6}
        for name, t in times.items()
    }
    machine = f"{os.cpu_count()} cores, Python {sys.version.split()[0]}"
    print(f"{arguments.requests} requests, {size} bytes each way, {RANKS} ranks, {machine}")
    for name, figure in figures.items():
        print(f"  {name:22} p50 {figure['p50_us']:8.1f} us   p99 {figure['p99_us']:8.1f} us")
    p50 = {name: figure["p50_us"] for name, figure in figures.items()}
    ratios = {
        "first": p50["executor, first rank"] / p50["floor, one decoded"],
        "all": p50["executor, all ranks"] / p50["floor, all decoded"],
    }
    for name, ratio in ratios.items():
        print(f"  executor / floor, aggregator {name!r}: {ratio:.2f}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {"requests": arguments.requests, "bytes": size, "figures": figures, "ratios": ratios}, file, indent=2
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
