"""What this machine needs at the least: a socket's round trip, and the plainest two-stage step that one can write."""

import asyncio
import multiprocessing
import os
import socket
import tempfile
import time
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import uvloop

from rows import microseconds, row

TOKENS = list(range(64))
COUNT = 2500
PAUSES = (0.0, 25e-6, 50e-6, 100e-6, 300e-6, 2e-3)


def echo(connection: socket.socket) -> None:
    while data := connection.recv(64):
        connection.send(data)


def round_trips() -> list[float]:
    """A byte to another process and back; both sides block."""
    ours, theirs = socket.socketpair()
    other = multiprocessing.get_context("fork").Process(target=echo, args=(theirs,), daemon=True)
    other.start()
    theirs.close()
    times = []
    for _ in range(COUNT):
        began = time.perf_counter()
        ours.send(b"x")
        ours.recv(64)
        times.append(time.perf_counter() - began)
    ours.close()
    other.join(5)
    return times[500:]


def stage(rank: int, connection: socket.socket, path: str, nbytes: int) -> None:
    """One stage: a message in, a tensor by NCCL, 64 tokens out."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(path, 2), rank=rank, world_size=2)  # type: ignore[attr-defined]
    tensor = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device="cuda")
    while data := connection.recv(1 << 16):
        tokens = msgspec.msgpack.decode(data)
        if rank == 0:
            dist.send(tensor, 1)
        else:
            dist.recv(tensor, 0)
            connection.send(msgspec.msgpack.encode(tensor[: len(tokens)].tolist()))
    os._exit(0)


async def plain_steps(nbytes: int) -> dict[float, list[float]]:
    """Seconds of a step, by the seconds of idleness before each."""
    context = multiprocessing.get_context("spawn")
    loop = asyncio.get_running_loop()
    pairs = [socket.socketpair() for _ in range(2)]
    times: dict[float, list[float]] = {pause: [] for pause in PAUSES}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        ranks = [context.Process(target=stage, args=(n, pairs[n][1], path, nbytes)) for n in range(2)]
        for process in ranks:
            process.start()
        for ours, theirs in pairs:
            theirs.close()
            ours.setblocking(False)
        for pause in (0.0, *PAUSES):
            for _ in range(1000):
                rest(pause)
                began = time.perf_counter()
                message = msgspec.msgpack.encode(TOKENS)
                pairs[0][0].send(message)
                pairs[1][0].send(message)
                msgspec.msgpack.decode(await loop.sock_recv(pairs[1][0], 1 << 16))
                times[pause].append(time.perf_counter() - began)
        for ours, _ in pairs:
            ours.close()
        for process in ranks:
            process.join(10)
    return {pause: taken[-900:] for pause, taken in times.items()}


def rest(seconds: float) -> None:
    """Let the GPUs idle; this process does not sleep, so that waking it up is no part of what is measured."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def report(name: str, seconds: list[float]) -> None:
    times: dict[str, Any] = microseconds(seconds)
    row(name, times["p50"], "us", p99=times["p99"])


def main() -> None:
    report("a byte to another process and back", round_trips())
    for pause, seconds in uvloop.run(plain_steps(1 << 20)).items():
        after = f", after {pause * 1e6:.0f} us of idleness" if pause else ""
        report(f"plainest two-stage step, 1 MiB, awaited on uvloop{after}", seconds)


if __name__ == "__main__":
    main()
