"""Host memory that the driver fills and every rank can read: the way of large tensors that all ranks get.

On GPUs each rank copies its share of the bytes from pinned memory, on a stream of their own, and gets the others' from
their GPUs by NCCL: so every GPU's bus carries a part, and none carries all.
"""

import importlib
from typing import Any

from asyncexec.process_groups import gather
from asyncexec_nccl.devices import OutOfStep
from asyncexec_nccl.shared_memory import RankMemory

_ALIGNMENT = 512
"""Bytes: every share begins where copies are fast."""


class StagedReader:
    """A rank's half; the driver's is the memory itself.

    Args:
        memory: that the driver fills.
        device: where the bytes are to be.
        rank: this one.
        group: all ranks' process group; None where there is one rank.
    """

    def __init__(self, memory: RankMemory, device: str, rank: int, group: Any) -> None:
        self._memory = memory
        self._device = device
        self._rank = rank
        self._group = group
        self._size = 1 if group is None else importlib.import_module("torch.distributed").get_world_size(group)
        self._bytes: Any = None  # uint8 tensor over the whole memory
        self._copying: Any = None

    def read(self, begin: int, nbytes: int) -> tuple[Any, Any]:
        """The bytes from `begin` on as a uint8 tensor, and an event after which the driver may overwrite them.

        On the CPU the tensor lies over the memory itself, and there is no event: it may be overwritten once the call is
        done.  On a GPU, what is computed next waits for the bytes.

        Raises:
            OutOfStep: they cannot be had, and the other ranks may wait for this one.
        """
        if self._device == "cpu":
            return self._mapped(begin + nbytes)[begin : begin + nbytes], None
        try:
            return self._to_device(begin, nbytes)
        except Exception as error:
            if self._group is None:
                raise
            raise OutOfStep from error

    def _to_device(self, begin: int, nbytes: int) -> tuple[Any, Any]:
        torch: Any = importlib.import_module("torch")
        memory = self._mapped(begin + nbytes)
        share = -(-nbytes // self._size // _ALIGNMENT) * _ALIGNMENT
        first = min(self._rank * share, nbytes)
        source = memory[begin + first : begin + min(first + share, nbytes)]
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            whole = torch.empty(share * self._size, dtype=torch.uint8, device=self._device)
            mine = whole[self._rank * share :][:share]
            mine[: len(source)].copy_(source, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._copying)
        compute.wait_event(copied)
        whole.record_stream(compute)
        if self._group is not None:
            gather(whole, mine, self._group)
        return whole[:nbytes], copied

    def close(self) -> None:
        """Unpin the memory."""
        if self._bytes is not None and self._device != "cpu":
            importlib.import_module("torch").cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._bytes = None

    def _mapped(self, nbytes: int) -> Any:
        """The memory as a tensor, pinned where there is a GPU; mapped again when the driver made it larger."""
        if self._bytes is None or len(self._bytes) < nbytes:
            self.close()
            torch: Any = importlib.import_module("torch")
            mapped = self._memory.mapped(nbytes)
            self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)
            if self._device != "cpu":
                status = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), len(mapped), 0)
                if int(status) != 0:
                    raise MemoryError(f"{len(mapped)} bytes of shared memory cannot be pinned: CUDA error {status}")
                self._copying = torch.cuda.Stream(self._device)
        return self._bytes
