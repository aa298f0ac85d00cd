"""What a worker may return besides a plain value.

A worker's method usually returns a value.  Two wrappers say that there is more to it:

- `IntermediateTensors`: the tensors for the next pipeline stage, and this rank's own report beside them;
- `DeferredOutput`: a value that is not ready yet (a copy from the GPU that is still under way).
"""

import abc
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
        output: what this rank reports to the aggregator, as if it had returned it; None is no report.
    """

    tensors: Mapping[str, Any]
    output: T | None = None

    def __getitem__(self, name: str) -> Any:
        """The tensor called `name`; raises KeyError when there is none."""
        return self.tensors[name]


class DeferredOutput(abc.ABC, Generic[T]):
    """An output whose value is not there yet.

    The rank's main thread goes on to the next call; a completion thread calls `wait()` and replies with what it
    returns, or with the error that it raises.  Deferred outputs of one rank are waited for in call order.
    """

    @abc.abstractmethod
    def wait(self) -> T:
        """Block until the value is there, and return it."""
