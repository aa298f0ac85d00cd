"""Results on their way from the GPU to the host, without holding up the rank's main thread.

    copies = HostCopier(context.device)                     # once, in the worker's constructor
    return copies.to_host([token_ids], finish)              # at the end of a step: returns at once

torch is imported when a worker that has a GPU makes a `HostCopier`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from asyncexec.outputs import DeferredOutput

T = TypeVar("T")


class HostCopier:
    """Copies tensors from a GPU into pinned host memory, on a stream of its own.

    Args:
        device: the rank's device, a torch device string, such as "cuda:0".
    """

    def __init__(self, device: str) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._device = device
        self._stream = self._torch.cuda.Stream(device)
        self._computed = self._torch.cuda.Event()

    def to_host(self, tensors: Sequence[Any], finish: Callable[[list[Any]], T]) -> DeferredOutput[T]:
        """Copy tensors once the work enqueued so far has computed them.

        The caller may go on at once: their memory is kept until it has been copied.  It must not be written to.

        Args:
            tensors: on the device, any shape and dtype.
            finish: makes the output of the copies, pinned tensors in the same order; it runs on the completion thread,
                beside the next step.

        Returns:
            The output; its `wait` sleeps until the copies are there, and raises what `finish` raises, or the error of
            the GPU.
        """
        cuda = self._torch.cuda
        self._computed.record(cuda.current_stream(self._device))
        self._stream.wait_event(self._computed)
        copies = []
        with cuda.stream(self._stream):
            for tensor in tensors:
                copy = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(copy.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._stream)
            copied = cuda.Event(blocking=True)  # who waits for it sleeps: a wait that spins would take a core
            copied.record(self._stream)
        return _Copied(self._device, copied, copies, finish)


class _Copied(DeferredOutput[T]):
    def __init__(self, device: str, copied: Any, copies: list[Any], finish: Callable[[list[Any]], T]) -> None:
        self._device = device
        self._copied = copied
        self._copies = copies
        self._finish = finish

    def wait(self) -> T:
        # another thread begins on GPU 0, and would set it up if this rank's is another
        importlib.import_module("torch").cuda.set_device(self._device)
        self._copied.synchronize()
        return self._finish(self._copies)
