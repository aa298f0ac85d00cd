"""A hop between two ranks without executor and worker, beside a bare send and receive of torch.distributed."""

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from asyncexec.process_groups import join_groups, join_pairs, warm_up
from asyncexec_nccl.gpu_hops import GpuHopReceiver, GpuHopSender, SideStream
from asyncexec_nccl.stream import RankStream
from rows import row

SIZES = {"1 MiB": (1 << 20, 2000), "64 MiB": (64 << 20, 300)}


def rank_main(rank: int, connection: socket.socket, path: str, results: Any) -> None:
    device = f"cuda:{rank}"
    torch.cuda.set_device(rank)
    groups = join_groups("nccl", rank, 1, 2, lambda: dist.FileStore(path, 2))  # type: ignore[attr-defined]
    pairs = join_pairs(rank, 1, 2)
    warm_up(groups, pairs, device)
    stream, side = RankStream(connection, 1 << 20), SideStream(device)
    for name, (nbytes, count) in SIZES.items():
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        hop = sending(stream, side, pairs, device, tensor) if rank == 0 else receiving(stream, side, pairs, device)
        for attempt in range(2):
            raw_time = timed(raw(rank, tensor), count)
            hop_time = timed(hop, count)
            results.put((rank, name, attempt, raw_time, hop_time))
    results.close()
    results.join_thread()
    os._exit(0)


def raw(rank: int, tensor: torch.Tensor) -> Callable[[int], object]:
    return (lambda n: dist.send(tensor, 1)) if rank == 0 else (lambda n: dist.recv(tensor, 0))


def sending(
    stream: RankStream, side: SideStream, pairs: Any, device: str, tensor: torch.Tensor
) -> Callable[[int], object]:
    sender = GpuHopSender(stream, 1 << 20, pairs.next, side, device, 0, 1)
    return lambda n: sender.send(n, {"hidden_states": tensor})


def receiving(stream: RankStream, side: SideStream, pairs: Any, device: str) -> Callable[[int], object]:
    receiver = GpuHopReceiver(stream, device, pairs.previous, side, None, 1)
    return receiver.receive


def timed(once: Callable[[int], object], count: int) -> float:
    """The median of the seconds that each takes, with the GPU waited for after each."""
    times = []
    for n in range(1, count + 1):
        began = time.perf_counter()
        once(n)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[count // 5 :])


def main() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    sockets = socket.socketpair()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        ranks = [context.Process(target=rank_main, args=(n, sockets[n], path, results)) for n in range(2)]
        for process in ranks:
            process.start()
        rows = [results.get(timeout=120) for _ in range(2 * 2 * len(SIZES))]
        for process in ranks:
            process.join(30)
    for name in SIZES:
        # both ends of a hop end together; the receiver's times are the hop's
        mine = [entry for entry in rows if entry[0] == 1 and entry[1] == name]
        raw_time, hop_time = min(entry[3] for entry in mine), min(entry[4] for entry in mine)
        row(f"bare send and receive, {name}", raw_time * 1e6, "us", all=[entry[3] * 1e6 for entry in mine])
        row(f"hop alone, {name}", hop_time * 1e6, "us", all=[entry[4] * 1e6 for entry in mine])
        ratio = hop_time / raw_time
        row(f"hop over bare, {name}", ratio, "x", target="<= 1.2 x", met=ratio <= 1.2)


if __name__ == "__main__":
    main()
