"""The process groups of one executor's ranks."""

import importlib
from typing import Any

from asyncexec.errors import ConfigError
from asyncexec.worker import ProcessGroups


def choose_backend(backend: str, world_size: int) -> str:
    """What "auto" is on this machine: "nccl" where every rank has a GPU of its own, else "gloo".

    Raises:
        ConfigError: NCCL was asked for, and there are not enough GPUs.
    """
    torch = importlib.import_module("torch")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if backend == "auto":
        return "nccl" if gpus >= world_size else "gloo"
    if backend == "nccl" and gpus < world_size:
        raise ConfigError(f"options.nccl.backend is 'nccl' for {world_size} ranks, and {gpus} GPUs are visible")
    return backend


def join_groups(
    backend: str, rank: int, tensor_parallel_size: int, pipeline_parallel_size: int, store_descriptor: int
) -> ProcessGroups:
    """Meet the other ranks and make the groups; blocks until all are there.

    The ranks meet in a file that exists in memory only and that nobody but them can open: no port, no path.
    """
    world_size = tensor_parallel_size * pipeline_parallel_size
    if world_size == 1 or backend == "none":
        return ProcessGroups()
    dist: Any = importlib.import_module("torch.distributed")
    store = dist.FileStore(f"/proc/self/fd/{store_descriptor}", world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    tensor_parallel = None
    if tensor_parallel_size > 1:
        for stage in range(pipeline_parallel_size):
            first = stage * tensor_parallel_size
            ranks = range(first, first + tensor_parallel_size)
            group = dist.new_group(list(ranks))  # made by all ranks together, members or not
            if rank in ranks:
                tensor_parallel = group
    return ProcessGroups(world=dist.group.WORLD, tensor_parallel=tensor_parallel)


def leave_groups(groups: ProcessGroups) -> None:
    """Leave what `join_groups` made."""
    if groups.world is not None:
        importlib.import_module("torch.distributed").destroy_process_group()
