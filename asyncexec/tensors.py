"""The memory of tensors and NumPy arrays, to travel beside a message.

Neither torch nor NumPy is imported before a value of theirs is there.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from asyncexec.wire import Buffer


def encode_tensors(tensors: Mapping[str, Any]) -> tuple[Buffer, Sequence[Buffer]]:
    """Encode named tensors or arrays: their layouts as the body, their memory beside it.

    Raises:
        TypeError: one is neither a tensor nor an array.
    """
    layouts: list[tuple[str, bool, str, list[int]]] = []
    buffers: list[Buffer] = []
    for name, value in tensors.items():
        is_tensor = is_tensor_type(type(value))
        if not is_tensor and not is_array_type(type(value)):
            raise TypeError(
                f"intermediate tensor {name!r} is a {type(value).__qualname__}; valid: a tensor or an array"
            )
        dtype, shape, memory = (tensor_parts if is_tensor else array_parts)(value)
        layouts.append((name, is_tensor, dtype, shape))
        buffers.append(memory)
    return msgspec.msgpack.encode(layouts), buffers


def decode_tensors(body: Buffer, buffers: Sequence[Buffer], device: str) -> dict[str, Any]:
    """The reverse; tensors are put on `device`, arrays stay in host memory."""
    tensors: dict[str, Any] = {}
    for (name, is_tensor, dtype, shape), memory in zip(msgspec.msgpack.decode(body), buffers, strict=True):
        if is_tensor:
            tensor = tensor_from(dtype, shape, memory)
            tensors[name] = tensor if device == "cpu" else tensor.to(device)
        else:
            tensors[name] = array_from(dtype, shape, memory)
    return tensors


def is_tensor_type(kind: type) -> bool:
    """Whether a class is torch's tensor."""
    return kind.__name__ in ("Tensor", "Parameter") and kind.__module__.partition(".")[0] == "torch"


def is_array_type(kind: type) -> bool:
    """Whether a class is NumPy's array."""
    return kind.__name__ == "ndarray" and kind.__module__ == "numpy"


def tensor_parts(tensor: Any) -> tuple[str, list[int], Buffer]:
    """A tensor's dtype by name, its shape, and its memory on the CPU."""
    torch = importlib.import_module("torch")
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), memoryview(flat.numpy())


def tensor_from(dtype: str, shape: Sequence[int], memory: Any) -> Any:
    """A tensor over `memory`, without a copy: on the CPU, or where `memory` is if that is a tensor of bytes."""
    torch = importlib.import_module("torch")
    kind = getattr(torch, dtype)
    if isinstance(memory, torch.Tensor):
        return memory.view(kind).reshape(shape)
    return torch.frombuffer(memory, dtype=kind).reshape(shape) if len(memory) else torch.empty(shape, dtype=kind)


def array_parts(array: Any) -> tuple[str, list[int], Buffer]:
    """A NumPy array's dtype by name, its shape, and its memory."""
    if array.dtype.kind in "OV":
        raise TypeError(
            f"an array of dtype {array.dtype} has no plain memory; use a number, bool, string or time dtype"
        )
    numpy = importlib.import_module("numpy")
    return array.dtype.str, list(array.shape), memoryview(numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8))


def array_from(dtype: str, shape: Sequence[int], memory: Buffer) -> Any:
    """An array over `memory`, without a copy."""
    numpy = importlib.import_module("numpy")
    return numpy.frombuffer(memory, dtype=dtype).reshape(shape)
