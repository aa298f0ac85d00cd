"""What every peer is given to carry: the scheduler output of a decode step, or an array."""

import hashlib
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray


class SchedulerOutput(msgspec.Struct):
    """A decode step as the field's engines send it (vLLM's v1 scheduler output has these parts)."""

    request_ids: list[str]
    new_token_ids: list[list[int]]
    new_block_ids: list[list[int] | None]
    num_computed_tokens: list[int]
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    finished_request_ids: set[str]


Array: TypeAlias = NDArray[np.uint8]
Payload: TypeAlias = SchedulerOutput | Array


def array(mib: int) -> Array:
    """Bytes of memory that has been touched."""
    return np.ones(mib << 20, dtype=np.uint8)


def scheduler_output(requests: int) -> SchedulerOutput:
    """One token for each of `requests` requests; every 16th needs a new block of its KV cache."""
    names = [f"cmpl-{_request_id(number)}-0" for number in range(requests)]
    return SchedulerOutput(
        request_ids=names,
        new_token_ids=[[1000 + 37 * i] for i in range(requests)],
        new_block_ids=[[9000 + i] if i % 16 == 0 else None for i in range(requests)],
        num_computed_tokens=[470 + i for i in range(requests)],
        num_scheduled_tokens=dict.fromkeys(names, 1),
        total_num_scheduled_tokens=requests,
        finished_request_ids=set(names[:1]),
    )


def _request_id(number: int) -> str:
    """128 bits as hexadecimal digits, the same in every run."""
    return hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()


def echo(value: Any) -> Any:
    """What the ranks of every peer do: return what they are given, or the size of an array."""
    return value.nbytes if isinstance(value, np.ndarray) else value
