"""Numbers of a step on their way to the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[object], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of (nested) lists of numbers on `device`.

    On a GPU through pinned memory and behind the work enqueued before: `torch.tensor(..., device=...)` would wait for
    all of that.
    """
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
