"""The Worker protocol, and the context that tells a worker its place among the ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from asyncexec.outputs import IntermediateTensors


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """The process groups that the transport made for this executor, as `torch.distributed` groups.

    Each is None where it would hold one rank alone, where the transport's option `backend` is "none", and always on
    transports that run one rank.

    Attributes:
        world: all ranks.
        tensor_parallel: the ranks of this rank's pipeline stage.
    """

    world: Any = None
    tensor_parallel: Any = None


@dataclass(frozen=True, slots=True)
class RankContext:
    """A rank's place, handed to the worker's constructor.

    Ranks are numbered stage by stage: `rank = pipeline_parallel_rank * tensor_parallel_size + tensor_parallel_rank`.

    Attributes:
        rank: 0 to world_size - 1 over all hosts.
        local_rank: the rank's number on its own host.
        world_size: tensor_parallel_size * pipeline_parallel_size.
        tensor_parallel_rank: 0 to tensor_parallel_size - 1 within the stage.
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_rank: the stage, 0 to pipeline_parallel_size - 1.
        pipeline_parallel_size: stages that the layers are cut into.
        device: a torch device string, such as "cpu" or "cuda:0".
        groups: the process groups that the transport made.
        mark_progress: call it now and then within a long call, such as after each layer's weights were loaded: the
            health check counts a rank healthy while it makes progress.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_rank: int = 0
    pipeline_parallel_size: int = 1
    device: str = "cpu"
    groups: ProcessGroups = field(default_factory=ProcessGroups)
    mark_progress: Callable[[], None] = lambda: None

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank belongs to the first pipeline stage, which gets no intermediate tensors."""
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank belongs to the last pipeline stage, which returns the output."""
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1


class Worker(Protocol):
    """What an engine author writes: one class, put on every rank.

    It is constructed on its rank as `Worker(context, **worker_kwargs)`.  Beyond `execute_model` it may have any
    methods; `Executor.collective_rpc` calls them by name, and a few names have verbs of their own on the Executor.
    A method `shutdown()`, if there is one, is called once before the rank ends.

    A method `reinitialize_distributed(context)`, if there is one, is called when `Executor.reinitialize_distributed`
    gives the rank a new place; the process groups of the old place are gone.  It is called again, with the old sizes,
    where another rank failed.  Without it, the worker is shut down and constructed anew.

    The type hints decide how arguments and results travel, see `asyncexec.codec`.
    """

    def execute_model(self, scheduler_output: Any, intermediate: IntermediateTensors[Any] | None) -> Any:
        """Run one step.

        Args:
            scheduler_output: what the engine passed to `Executor.execute_model`.
            intermediate: the previous stage's tensors; None on the first stage.

        Returns:
            The step's output on the last stage; `IntermediateTensors` on every other.  The output may be a
            `DeferredOutput`.
        """
        ...
