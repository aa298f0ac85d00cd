"""The process groups of one executor's ranks, for the transports that make them; torch is imported when one does."""

import contextlib
import ctypes
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from asyncexec.worker import ProcessGroups

_PR_SET_TIMERSLACK = 29
_PR_GET_TIMERSLACK = 30
_SLACK_NS = 200_000_000

_SETTLE_LIMIT = 2.0
"""Seconds that a GPU is given to finish what was enqueued on it, before its communicators are aborted."""


class StagePairs(NamedTuple):
    """Groups of two ranks, of neighbouring pipeline stages; the earlier stage's rank is number 0 in each.

    Attributes:
        previous: with the rank of the stage before; None on the first stage.
        next: with the rank of the stage behind; None on the last stage.
    """

    previous: Any = None
    next: Any = None


def join_groups(
    backend: str,
    rank: int,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    open_store: Callable[[], Any],
    timeout: float | None = None,
) -> ProcessGroups:
    """Meet the other ranks and make the groups; blocks until all are there.

    Args:
        backend: "nccl", "gloo", or "none" for no groups.
        rank: this one.
        tensor_parallel_size: ranks of each tensor-parallel group.
        pipeline_parallel_size: how many of these groups there are.
        open_store: returns the `torch.distributed` store that the ranks meet in; not called where there are no groups.
        timeout: seconds after which an operation of a group counts as stuck, which ends the rank; None is torch's own
            limit, of 10 or 30 minutes.
    """
    world_size = tensor_parallel_size * pipeline_parallel_size
    if world_size == 1 or backend == "none":
        return ProcessGroups()
    limit = None if timeout is None else timedelta(seconds=timeout)
    with _patient_threads():
        dist: Any = importlib.import_module("torch.distributed")
        dist.init_process_group(backend, store=open_store(), rank=rank, world_size=world_size, timeout=limit)
        return _make_groups(dist, rank, tensor_parallel_size, pipeline_parallel_size, limit)


def join_pairs(
    rank: int, tensor_parallel_size: int, pipeline_parallel_size: int, device: str, timeout: float | None = None
) -> StagePairs:
    """Make the groups of each rank with the same tensor-parallel rank of the next stage, and connect them.

    Every rank takes part in making every group, so all of them call this, after `join_groups`.
    """
    torch: Any = importlib.import_module("torch")
    dist: Any = importlib.import_module("torch.distributed")
    limit = None if timeout is None else timedelta(seconds=timeout)
    pairs: dict[int, Any] = {}  # by the rank of the earlier stage
    for first in range(tensor_parallel_size * (pipeline_parallel_size - 1)):
        pairs[first] = dist.new_group([first, first + tensor_parallel_size], timeout=limit)
    previous, following = pairs.get(rank - tensor_parallel_size), pairs.get(rank)
    probe = torch.zeros(1, device=device)
    # along the pipeline: each stage receives before it sends
    if previous is not None:
        previous.recv([probe], 0, 0).wait()
    if following is not None:
        following.send([probe], 1, 0).wait()
    if probe.is_cuda:
        torch.cuda.synchronize(device)
    return StagePairs(previous, following)


def warm_up(groups: ProcessGroups, device: str) -> None:
    """Connect everything now: the first operation of a group takes hundreds of milliseconds, and lazily so."""
    torch: Any = importlib.import_module("torch")
    dist: Any = importlib.import_module("torch.distributed")
    probe = torch.zeros(1, device=device)
    for group in (groups.world, groups.tensor_parallel):
        if group is not None:
            dist.all_reduce(probe, group=group)
    if probe.is_cuda:
        torch.cuda.synchronize(device)


def agree(group: Any, yes: bool, device: str) -> bool:
    """Whether all ranks of a group say yes; all of them ask."""
    torch: Any = importlib.import_module("torch")
    dist: Any = importlib.import_module("torch.distributed")
    votes = torch.full((1,), int(yes), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
    return bool(votes.item())


def gather(whole: Any, part: Any, group: Any) -> None:
    """Put the parts of a group's ranks together, in the order of ranks; `part` may be this rank's place in `whole`."""
    dist: Any = importlib.import_module("torch.distributed")
    # the same function; torch 2.13 gave it a new name
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    function(whole, part, group=group)


def _make_groups(
    dist: Any, rank: int, tensor_parallel_size: int, pipeline_parallel_size: int, timeout: timedelta | None
) -> ProcessGroups:
    world = dist.group.WORLD
    if pipeline_parallel_size == 1:
        # one group serves as both: each has threads and connections of its own
        return ProcessGroups(world=world, tensor_parallel=world)
    if tensor_parallel_size == 1:
        return ProcessGroups(world=world)
    world_size = tensor_parallel_size * pipeline_parallel_size
    stages = [range(first, first + tensor_parallel_size) for first in range(0, world_size, tensor_parallel_size)]
    # every group is made by all ranks together, members or not
    made = [(ranks, dist.new_group(list(ranks), timeout=timeout)) for ranks in stages]
    return ProcessGroups(world=world, tensor_parallel=next(group for ranks, group in made if rank in ranks))


def leave_groups(groups: ProcessGroups) -> None:
    """Leave what `join_groups` and `join_pairs` made.

    NCCL's communicators are aborted once the GPU has finished what was enqueued, or after 2 s: the graceful end of one
    waits for its peers, and a peer that is dead or stuck would hold up this rank for ever.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if groups.world is None and (dist is None or not dist.is_initialized()):  # joining may have ended half way
        return
    dist = importlib.import_module("torch.distributed")
    if dist.get_backend() == "nccl":
        _settle()
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _settle() -> None:
    """Wait for the GPU, for a while: from a thread that can be left behind, since CUDA's own wait has no limit."""
    torch: Any = importlib.import_module("torch")
    device = torch.cuda.current_device()
    waiting = threading.Thread(target=torch.cuda.synchronize, args=(device,), name="asyncexec-settle", daemon=True)
    waiting.start()
    waiting.join(_SETTLE_LIMIT)


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
