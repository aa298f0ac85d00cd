"""2 GB of weights from the driver's host memory to every GPU, beside the plain rate of pinned copies to one."""

import argparse
import time

import torch

import gpu_workers_bench as workers
from asyncexec import create_executor, run
from rows import row

TENSORS = 125
TENSOR_BYTES = 16_000_000


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--bucket-mib", type=int, default=64)
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
        staged = torch.empty(64 << 20, dtype=torch.uint8)
        source = torch.ones(64 << 20, dtype=torch.uint8)
        copies = []
        for _ in range(20):
            began = time.perf_counter()
            staged.copy_(source)
            copies.append(time.perf_counter() - began)
        row("copies within the driver's host memory", (64 << 20) / sorted(copies)[10] / 1e9, "GB/s")
        rates = []
        for _ in range(6):
            began = time.perf_counter()
            await executor.broadcast(weights, bucket_bytes=args.bucket_mib << 20)
            await executor.collective_rpc("synchronize")
            rates.append(total / (time.perf_counter() - began))
        sums = [weights["layer 7"].long().sum().item()] * args.gpus
        right = await executor.collective_rpc("sum_of", ("layer 7",)) == sums
    row(f"2 GB to {args.gpus} GPUs, the first time", rates[0] / 1e9, "GB/s", right=right)
    best = sorted(rates[1:])[len(rates) // 2]
    row(f"2 GB to {args.gpus} GPUs, again (median)", best / 1e9, "GB/s", all=[rate / 1e9 for rate in rates])
    row("over the pinned rate", best / pinned, "x", target=">= 0.8 x", met=right and best / pinned >= 0.8)


if __name__ == "__main__":
    run(main())
