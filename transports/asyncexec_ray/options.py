"""The table `options.ray`."""

from typing import Any, Literal

import msgspec

from asyncexec.errors import ConfigError


class RayOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `options.ray`.

    Attributes:
        address: of a running cluster, such as "10.0.0.1:6379".  None uses the one that this process is connected to,
            else the one that runs on this host, else starts one for as long as executors use it.
        strategy: of the placement group.
        placement_group: one that you hold, as an object; its first bundles are used, one per rank, and it is kept.
        num_cpus: for each rank.  None is 1, or all that a bundle of yours has.
        num_gpus: for each rank.  None is 1 where the cluster has one for every rank, else 0; or all that a bundle of
            yours has.
        resources: further resources of each rank, by name.
        runtime_env: of the ranks, as Ray defines it.
        backend: of the process groups.  "auto" is "nccl" where every rank has a GPU, else "gloo"; "none" makes no
            groups, for workers that make their own.
        tensor_transport: of the tensors between pipeline stages, over Ray's channels: "nccl" from GPU to GPU (needs
            cupy), "shm" through host memory.  "auto" is "nccl" where every rank has a GPU, else "shm".
        driver: how the graph is driven.  "direct" reads and writes its channels, see `graph_internals`; "documented"
            uses what Ray documents alone, is slower, and serves ranks on several hosts in either case.  "calls" has no
            graph: steps are ordinary actor calls, which are slower still, but no rank waits actively, and a step may
            have any size; it takes one pipeline stage.
        buffer_size_bytes: the largest step, and the largest intermediate tensors of one stage.  What is larger fails
            its call.  A graph has a few buffers of this size for each rank.
        idle_teardown: seconds without a step after which the graph is torn down, since its ranks wait actively; the
            next step compiles it again.  None keeps it.  Ray frees the buffers of a graph only when the driver
            disconnects: each time costs as much of the object store.
    """

    address: str | None = None
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    placement_group: Any = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: dict[str, float] = {}
    runtime_env: dict[str, Any] = {}
    backend: Literal["auto", "nccl", "gloo", "none"] = "auto"
    tensor_transport: Literal["auto", "nccl", "shm"] = "auto"
    driver: Literal["direct", "documented", "calls"] = "direct"
    buffer_size_bytes: int = 1 << 20
    idle_teardown: float | None = 60.0

    def __post_init__(self) -> None:
        if self.buffer_size_bytes < 4096:
            raise ConfigError(f"buffer_size_bytes is {self.buffer_size_bytes}; valid: whole numbers from 4096")
        if self.idle_teardown is not None and not self.idle_teardown > 0:
            raise ConfigError(f"idle_teardown is {self.idle_teardown}; valid: seconds above 0, or None")
        if self.address is not None and "://" in self.address:
            raise ConfigError(f"address is {self.address!r}; valid: host:port of a cluster, not of a Ray Client")
        for name in ("num_cpus", "num_gpus"):
            amount = getattr(self, name)
            if amount is not None and amount < 0:
                raise ConfigError(f"{name} is {amount}; valid: numbers from 0, or None")
