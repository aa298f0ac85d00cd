"""2 GB of weights from the driver's host memory to every GPU, beside the plain rate of pinned copies to one."""

import argparse
import mmap
import statistics
import time

import torch

import gpu_workers_bench as workers
from asyncexec import Executor, create_executor, run
from asyncexec.buckets import cut, place
from rows import row

TENSORS = 125
TENSOR_BYTES = 16_000_000
MEMORY = mmap.mmap(-1, 256 << 20)


def fill_all(weights: dict[str, torch.Tensor], bucket_bytes: int) -> float:
    """Seconds that it takes to copy all weights into three buckets in turn, as a broadcast does, and nothing else."""
    memory = memoryview(MEMORY)
    began = time.perf_counter()
    for number, group in enumerate(cut(weights, bucket_bytes)):
        place(group, "", number % 3 * bucket_bytes).fill(memory)
    return time.perf_counter() - began


async def rate(executor: Executor, weights: dict[str, torch.Tensor], bucket_bytes: int) -> float:
    """Bytes per second of one broadcast, until the GPUs have nothing left to do."""
    began = time.perf_counter()
    await executor.broadcast(weights, bucket_bytes=bucket_bytes)
    await executor.collective_rpc("synchronize")
    return TENSORS * TENSOR_BYTES / (time.perf_counter() - began)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    args = parser.parse_args()
    weights = {f"layer {n}": torch.randint(0, 1 << 15, (TENSOR_BYTES // 2,), dtype=torch.int16) for n in range(TENSORS)}
    total = TENSORS * TENSOR_BYTES
    config = {
        "transport": "nccl",
        "tensor_parallel_size": args.gpus,
        "options": {"nccl": {"backend": "nccl"}},
    }
    kwargs = {"tensors": TENSORS, "nbytes": TENSOR_BYTES}
    async with create_executor(config, workers.Weights, worker_kwargs=kwargs) as executor:
        [pinned] = await executor.collective_rpc("pinned_rate", ranks=[0])
        row("pinned host-to-device copies", pinned / 1e9, "GB/s")
        filling = [fill_all(weights, 64 << 20) for _ in range(4)]
        row("copies within the driver's host memory, bucket by bucket", total / min(filling) / 1e9, "GB/s")
        rates = {mib: [await rate(executor, weights, mib << 20) for _ in range(6)] for mib in (64, 16, 256)}
        sums = [weights["layer 7"].long().sum().item()] * args.gpus
        right = await executor.collective_rpc("sum_of", ("layer 7",)) == sums
    row(f"2 GB to {args.gpus} GPUs, the first time", rates[64][0] / 1e9, "GB/s", right=right)
    for mib, found in rates.items():
        again = statistics.median(found[1:])
        row(
            f"2 GB to {args.gpus} GPUs, again, buckets of {mib} MiB",
            again / 1e9,
            "GB/s",
            all=[one / 1e9 for one in found],
        )
    again = statistics.median(rates[64][1:])
    row("over the pinned rate", again / pinned, "x", target=">= 0.8 x", met=right and again / pinned >= 0.8)


if __name__ == "__main__":
    run(main())
