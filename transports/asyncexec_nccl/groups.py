"""The process groups of one executor's ranks."""

import contextlib
import ctypes
import importlib
from collections.abc import Iterator
from typing import Any

from asyncexec.errors import ConfigError
from asyncexec.worker import ProcessGroups

_PR_SET_TIMERSLACK = 29
_PR_GET_TIMERSLACK = 30
_SLACK_NS = 200_000_000


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
    with _patient_threads():
        return _make_groups(backend, rank, tensor_parallel_size, pipeline_parallel_size, store_descriptor)


def _make_groups(
    backend: str, rank: int, tensor_parallel_size: int, pipeline_parallel_size: int, store_descriptor: int
) -> ProcessGroups:
    world_size = tensor_parallel_size * pipeline_parallel_size
    dist: Any = importlib.import_module("torch.distributed")
    store = dist.FileStore(f"/proc/self/fd/{store_descriptor}", world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    world = dist.group.WORLD
    if pipeline_parallel_size == 1:
        # one group serves as both: each has threads and connections of its own
        return ProcessGroups(world=world, tensor_parallel=world)
    if tensor_parallel_size == 1:
        return ProcessGroups(world=world)
    stages = [range(first, first + tensor_parallel_size) for first in range(0, world_size, tensor_parallel_size)]
    # every group is made by all ranks together, members or not
    made = [(ranks, dist.new_group(list(ranks))) for ranks in stages]
    return ProcessGroups(world=world, tensor_parallel=next(group for ranks, group in made if rank in ranks))


def leave_groups(groups: ProcessGroups) -> None:
    """Leave what `join_groups` made."""
    if groups.world is not None:
        importlib.import_module("torch.distributed").destroy_process_group()


@contextlib.contextmanager
def _patient_threads() -> Iterator[None]:
    """Let the threads that are started within sleep through timeouts that lie close together.

    The event loop of Gloo's TCP transport waits with a limit of 10 ms, for ever: a hundred wake-ups a second in each
    group of each rank, though nothing happens.  Threads inherit their timer slack (prctl(2), PR_SET_TIMERSLACK), which
    puts off the end of such a limit, and not the events that it waits for.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    before = prctl(_PR_GET_TIMERSLACK)
    prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS))
    try:
        yield
    finally:
        prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(before))
