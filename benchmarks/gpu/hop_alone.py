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
from asyncexec_nccl.gpu_hops import GpuHopReceiver, GpuHopSender
from asyncexec_nccl.nccl_pairs import PairReceiver, PairSender
from asyncexec_nccl.peer_copies import meet
from asyncexec_nccl.stream import RankStream
from asyncexec_nccl.transport import NcclOptions
from rows import row

SIZES = {"1 MiB": (1 << 20, 2000), "64 MiB": (64 << 20, 300)}
WAYS = ("copies", "NCCL")


def rank_main(rank: int, connections: dict[str, socket.socket], path: str, results: Any) -> None:
    device = f"cuda:{rank}"
    torch.cuda.set_device(rank)
    groups = join_groups("nccl", rank, 1, 2, lambda: dist.FileStore(path, 2))  # type: ignore[attr-defined]
    warm_up(groups, device)
    hops = {way: hop(rank, way, RankStream(connections[way], 1 << 20), device) for way in WAYS}
    for name, (nbytes, count) in SIZES.items():
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        for _ in range(2):
            results.put((rank, name, "bare", timed(raw(rank, tensor), count)))
            for way in WAYS:
                results.put((rank, name, way, timed(repeated(hops[way], tensor), count)))
    results.close()
    results.join_thread()
    os._exit(0)


def hop(rank: int, way: str, stream: RankStream, device: str) -> GpuHopSender | GpuHopReceiver:
    """This rank's end of the way from rank 0 to rank 1."""
    if way == "NCCL":
        pairs = join_pairs(rank, 1, 2, device)
        if rank == 0:
            return GpuHopSender(stream, 1 << 20, PairSender(device, pairs.next), device, 0, 1)
        return GpuHopReceiver(stream, device, PairReceiver(device, pairs.previous), None, 1)
    previous, following = (None, stream) if rank == 0 else (stream, None)
    receiver, sender = meet(previous, following, device, NcclOptions().hop_bytes)
    if sender is not None:
        return GpuHopSender(stream, 1 << 20, sender, device, 0, 1)
    if receiver is not None:
        return GpuHopReceiver(stream, device, receiver, None, 1)
    raise SystemExit("these GPUs do not reach each other's memory")


def raw(rank: int, tensor: torch.Tensor) -> Callable[[int], object]:
    return (lambda n: dist.send(tensor, 1)) if rank == 0 else (lambda n: dist.recv(tensor, 0))


def repeated(hop: GpuHopSender | GpuHopReceiver, tensor: torch.Tensor) -> Callable[[int], object]:
    if isinstance(hop, GpuHopSender):
        return lambda n: hop.send(n, {"hidden_states": tensor})
    return hop.receive


def timed(once: Callable[[int], object], count: int) -> float:
    """The median of the seconds that each takes, with the GPU waited for after each."""
    times = []
    dist.barrier()
    for n in range(1, count + 1):
        began = time.perf_counter()
        once(n)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[count // 5 :])


def main() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    sockets = {way: socket.socketpair() for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        ends = [{way: pair[n] for way, pair in sockets.items()} for n in range(2)]
        ranks = [context.Process(target=rank_main, args=(n, ends[n], path, results)) for n in range(2)]
        for process in ranks:
            process.start()
        rows = [results.get(timeout=80) for _ in range(2 * 2 * len(SIZES) * (1 + len(WAYS)))]
        for process in ranks:
            process.join(30)
    for name in SIZES:
        # both ends of a hop end together; the receiver's times are the hop's
        found = {way: [entry[3] * 1e6 for entry in rows if entry[:3] == (1, name, way)] for way in ("bare", *WAYS)}
        bare = min(found["bare"])
        row(f"bare send and receive, {name}", bare, "us", all=found["bare"])
        for way in WAYS:
            row(f"hop alone by {way}, {name}", min(found[way]), "us", all=found[way])
        for way in WAYS:
            ratio = min(found[way]) / bare
            target = {"target": "<= 1.2 x", "met": ratio <= 1.2} if way == "copies" else {}
            row(f"hop by {way} over bare, {name}", ratio, "x", **target)


if __name__ == "__main__":
    main()
