"""The process groups of one executor's ranks, for the transports that make them; torch is imported when one does."""

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from asyncexec.worker import ProcessGroups

_PR_SET_TIMERSLACK = 29
_PR_GET_TIMERSLACK = 30
_SLACK_NS = 200_000_000


def join_groups(
    backend: str, rank: int, tensor_parallel_size: int, pipeline_parallel_size: int, open_store: Callable[[], Any]
) -> ProcessGroups:
    """Meet the other ranks and make the groups; blocks until all are there.

    Args:
        backend: "nccl", "gloo", or "none" for no groups.
        rank: this one.
        tensor_parallel_size: ranks of each tensor-parallel group.
        pipeline_parallel_size: how many of these groups there are.
        open_store: returns the `torch.distributed` store that the ranks meet in; not called where there are no groups.
    """
    world_size = tensor_parallel_size * pipeline_parallel_size
    if world_size == 1 or backend == "none":
        return ProcessGroups()
    with _patient_threads():
        dist: Any = importlib.import_module("torch.distributed")
        dist.init_process_group(backend, store=open_store(), rank=rank, world_size=world_size)
        return _make_groups(dist, rank, tensor_parallel_size, pipeline_parallel_size)


def _make_groups(dist: Any, rank: int, tensor_parallel_size: int, pipeline_parallel_size: int) -> ProcessGroups:
    world = dist.group.WORLD
    if pipeline_parallel_size == 1:
        # one group serves as both: each has threads and connections of its own
        return ProcessGroups(world=world, tensor_parallel=world)
    if tensor_parallel_size == 1:
        return ProcessGroups(world=world)
    world_size = tensor_parallel_size * pipeline_parallel_size
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
