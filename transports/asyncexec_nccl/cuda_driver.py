"""What torch does not hand out of CUDA's driver: memory for another process to open, and streams that wait for it.

Addresses and streams are numbers, as `Tensor.data_ptr` and `torch.cuda.Stream.cuda_stream` give them.  The calling
thread's context must be current: torch has made it so once it has used the device on that thread.
"""

import ctypes
import functools
from typing import Any

_GRANULE = 1 << 21
"""Bytes; memory that is handed to another process is a multiple, as smaller pieces share what would be opened."""

_HANDLE_BYTES = 64
_OPEN_FOR_PEERS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_REACHED = 0  # CU_STREAM_WAIT_VALUE_GEQ: the difference counts, so that numbers may start over from 0


class CudaError(RuntimeError):
    """A function of CUDA's driver failed."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


_ADDRESS = ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuMemAlloc_v2": (ctypes.POINTER(_ADDRESS), ctypes.c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemsetD8_v2": (_ADDRESS, ctypes.c_ubyte, ctypes.c_size_t),
    "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_ADDRESS), _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, ctypes.c_size_t, ctypes.c_void_p),
    "cuStreamWaitValue32_v2": (ctypes.c_void_p, _ADDRESS, ctypes.c_uint32, ctypes.c_uint),
    "cuStreamWriteValue32_v2": (ctypes.c_void_p, _ADDRESS, ctypes.c_uint32, ctypes.c_uint),
}
"""As CUDA's driver API has them since 12.0."""


class LentMemory:
    """Memory of this process's GPU that another process may open, zeroed.

    Args:
        nbytes: at least so many.

    Attributes:
        address: where it begins.
        handle: what the other process opens it by.

    Raises:
        CudaError: there is no room, or it cannot be opened by others.
    """

    def __init__(self, nbytes: int) -> None:
        rounded = -(-nbytes // _GRANULE) * _GRANULE
        address, handle = _ADDRESS(), _Handle()
        _call("cuMemAlloc_v2", ctypes.byref(address), rounded)
        self.address: int = address.value
        try:
            _call("cuMemsetD8_v2", self.address, 0, rounded)
            _call("cuIpcGetMemHandle", ctypes.byref(handle), self.address)
        except BaseException:
            self.close()
            raise
        self.handle = bytes(handle.reserved)

    def close(self) -> None:
        """Free it; the process that opened it should have closed it before."""
        _call("cuMemFree_v2", self.address)


class BorrowedMemory:
    """Memory of another process, which may be another GPU's.

    Args:
        handle: of `LentMemory`.

    Attributes:
        address: where it begins in this process.

    Raises:
        CudaError: this GPU cannot reach the other one's memory.
    """

    def __init__(self, handle: bytes) -> None:
        address = _ADDRESS()
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), _OPEN_FOR_PEERS)
        self.address: int = address.value

    def close(self) -> None:
        """Close it."""
        _call("cuIpcCloseMemHandle", self.address)


def copy(target: int, source: int, nbytes: int, stream: int) -> None:
    """Enqueue a copy between addresses of any GPUs.  Raises CudaError."""
    _call("cuMemcpyAsync", target, source, nbytes, stream)


def wait_for(address: int, number: int, stream: int) -> None:
    """Have a stream wait until the 32-bit number at an address has reached `number`.  Raises CudaError."""
    _call("cuStreamWaitValue32_v2", stream, address, number, _REACHED)


def write(address: int, number: int, stream: int) -> None:
    """Have a stream write a 32-bit number once all before it is done, for others to see.  Raises CudaError."""
    _call("cuStreamWriteValue32_v2", stream, address, number, 0)


def _call(name: str, *args: Any) -> None:
    status = getattr(_driver(), name)(*args)
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            getattr(driver, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise CudaError(f"CUDA's driver is not there, or older than what is needed: {error}") from error
    return driver
