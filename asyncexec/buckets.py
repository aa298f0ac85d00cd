"""Named tensors for every rank, cut into buckets: what goes into one, and what a rank makes of it.

A bucket lies in the transport's staging memory, so that its call says only where.
"""

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from asyncexec.outputs import DeferredOutput
from asyncexec.tensors import is_tensor_type

_MOST_THREADS = 32
"""Threads that fill a bucket.  On hosts of 64 cores, 64 threads copied 17 GB/s, and 32 copied 59 and 33:
benchmarks/gpu/weights.py, before and after there was this limit."""

_ALIGNMENT = 512
"""Bytes: every tensor begins where any dtype may, and where copies are fast."""


class StagedTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies in its bucket.

    Attributes:
        name: its name.
        dtype: torch's name of its dtype.
        shape: its shape.
        begin, end: its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Bucket(msgspec.Struct, frozen=True):
    """A call that hands tensors in the staging memory to a method of the worker.

    Attributes:
        method: its name.
        begin: of the bucket in the staging memory.
        tensors: what is in it.
    """

    method: str
    begin: int
    tensors: list[StagedTensor]

    def __repr__(self) -> str:
        return f"{self.method} of {len(self.tensors)} tensors"

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.tensors[-1].end

    def __call__(self, worker: Any, read: Any) -> Any:
        """Run the method on a rank.

        Args:
            worker: the worker.
            read: `RankLink.read_staged`.
        """
        torch: Any = importlib.import_module("torch")
        whole, released = read(self.begin, self.nbytes)
        named = {
            one.name: whole[one.begin : one.end].view(getattr(torch, one.dtype)).reshape(one.shape)
            for one in self.tensors
        }
        getattr(worker, self.method)(named)
        return None if released is None else _Released(released)


class _Released(DeferredOutput[None]):
    """Done when the staging memory may be overwritten; the worker's own work on the GPU may go on."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        # another thread begins on GPU 0, and would set it up if this rank's is another
        importlib.import_module("torch").cuda.set_device(self._event.device)
        self._event.synchronize()


class Filling(NamedTuple):
    """A bucket, and the tensors to put there."""

    bucket: Bucket
    tensors: Sequence[Any]

    @property
    def named(self) -> dict[str, Any]:
        """The tensors by name."""
        return {one.name: tensor for one, tensor in zip(self.bucket.tensors, self.tensors, strict=True)}

    def fill(self, memory: memoryview) -> None:
        """Copy the tensors into the staging memory; blocks, with several threads at work."""
        torch: Any = importlib.import_module("torch")
        base = self.bucket.begin
        with _some_threads(torch):
            for one, tensor in zip(self.bucket.tensors, self.tensors, strict=True):
                if one.end > one.begin:
                    target = torch.frombuffer(memory[base + one.begin : base + one.end], dtype=torch.uint8)
                    target.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))


@contextlib.contextmanager
def _some_threads(torch: Any) -> Iterator[None]:
    """Leave a quarter of the cores to the ranks, and use no more threads than the memory keeps busy.

    OpenMP has the number for each thread, torch beside it for threads that begin.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, -(-3 * (os.cpu_count() or 1) // 4), _MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def nothing(worker: Any) -> None:
    """A call whose answer says that those before it are done."""


def cut(
    named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], bucket_bytes: int
) -> Iterator[list[tuple[str, Any]]]:
    """Groups of tensors in their order, each of `bucket_bytes` at most unless one tensor alone is larger.

    Raises:
        TypeError: one is no tensor in host memory.
    """
    pairs: Any = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    group: list[tuple[str, Any]] = []
    size = 0
    for name, tensor in pairs:
        if not is_tensor_type(type(tensor)) or tensor.device.type != "cpu":
            raise TypeError(f"{name!r} is {type(tensor).__qualname__}; valid: a torch tensor in host memory")
        needed = aligned(tensor.nbytes)
        if group and size + needed > bucket_bytes:
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += needed
    if group:
        yield group


def place(group: Sequence[tuple[str, Any]], method: str, begin: int) -> Filling:
    """Lay a group out from `begin` on."""
    staged: list[StagedTensor] = []
    at = 0
    for name, tensor in group:
        dtype = str(tensor.dtype).removeprefix("torch.")
        staged.append(StagedTensor(name, dtype, tuple(tensor.shape), at, at + tensor.nbytes))
        at = aligned(at + tensor.nbytes)
    return Filling(Bucket(method, begin, staged), [tensor for _, tensor in group])


def space(group: Sequence[tuple[str, Any]]) -> int:
    """Bytes that a group takes."""
    return sum(aligned(tensor.nbytes) for _, tensor in group)


def aligned(nbytes: int) -> int:
    """The bytes, rounded up to where the next tensor may begin."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
