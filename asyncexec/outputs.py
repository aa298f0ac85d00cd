"""What a worker may return besides a plain value.

A worker's method usually returns a value.  Two wrappers say that there is more to it:

- `IntermediateTensors`: the tensors for the next pipeline stage, and this rank's own report beside them;
- `DeferredOutput`: a value that is not ready yet (a copy from the GPU that is still under way).

`ModelOutput` is an output that carries what a rank's connectors did beside the model: `KVConnectorOutput` and
`ECConnectorOutput`, which `asyncexec.connectors` merges over the ranks.  Any other class with attributes of the same
names does as well, such as vLLM's.
"""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")


class IntermediateTensors(msgspec.Struct, Generic[T], frozen=True):
    """Named tensors that one pipeline stage hands to the next.

    Every stage but the last returns one from `execute_model`; every stage but the first receives one as
    `intermediate`.  The tensors go rank to rank (tensor-parallel rank t of a stage to rank t of the next),
    never through the driver.

    Attributes:
        tensors: name to tensor, any shape and dtype, on the rank's device.
        replicated: names of tensors that are the same on all tensor-parallel ranks of the stage.  Where they travel
            from GPU to GPU, each rank sends a part of them, and the next stage's ranks put the parts together.
        output: what this rank reports to the aggregator, as if it had returned it; None is no report.
    """

    tensors: Mapping[str, Any]
    output: T | None = None
    replicated: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Any:
        """The tensor called `name`; raises KeyError when there is none."""
        return self.tensors[name]


class DeferredOutput(Generic[T]):
    """An output whose value is not there yet; subclass it.

    The rank's main thread goes on to the next call; a completion thread calls `wait()` and replies with what it
    returns, or with the error that it raises.  Deferred outputs of one rank are waited for in call order; one that the
    driver does not want is let go of, and `wait` may not be called at all.
    """

    # no abstract base class: whether an output is one of these is asked in every step, of which ABCMeta makes much

    def wait(self) -> T:
        """Block until the value is there, and return it."""
        raise NotImplementedError


class KVConnectorOutput(msgspec.Struct, kw_only=True):
    """What one rank's KV connector did in a step; merged over the ranks, what all did.

    The names and meanings are those of vLLM's class of this name.

    Attributes:
        finished_sending: requests whose KV cache this rank has sent; merged: every rank has.
        finished_recving: requests whose KV cache this rank has received; merged: every rank has.
        failed_recving: requests whose receive failed on this rank; merged: on some rank, once all have finished it.
        invalid_block_ids: blocks that could not be loaded, to be computed again.
        kv_connector_stats: a `Stats`, or None.
        kv_cache_events: a `CacheEvents`, or None.
        kv_connector_worker_meta: a `WorkerMetadata`, or None.
        expected_finished_count: how many ranks report each request that begins from now on; 0 leaves that as it is.
    """

    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    failed_recving: set[str] = set()
    invalid_block_ids: set[int] = set()
    kv_connector_stats: Any = None
    kv_cache_events: Any = None
    kv_connector_worker_meta: Any = None
    expected_finished_count: int = 0


class ECConnectorOutput(msgspec.Struct, kw_only=True):
    """What one rank's encoder-cache connector did in a step; merged over the ranks, what any of them did.

    Attributes:
        finished_sending: hashes of the encoder outputs that have been sent.
        finished_recving: hashes of those that have been received.
        ec_connector_stats: a `Stats`, or None.
        ec_connector_worker_meta: a `WorkerMetadata`, or None.
    """

    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    ec_connector_stats: Any = None
    ec_connector_worker_meta: Any = None


class ModelOutput(msgspec.Struct, kw_only=True):
    """A step's output with the connectors' parts; subclass it for what your model returns beside tokens.

    Attributes:
        req_ids: the requests that took part, in batch order.
        sampled_token_ids: for each of them, the tokens sampled in this step.
        kv_connector_output: what the KV connector did; None where there is none, or it did nothing.
        ec_connector_output: likewise, the encoder-cache connector.
    """

    req_ids: list[str] = []
    sampled_token_ids: list[list[int]] = []
    kv_connector_output: Any = None
    ec_connector_output: Any = None
