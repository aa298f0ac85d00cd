"""The choice of the next token: greedy, or drawn by temperature and top-p under a seed."""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from asyncexec.demo.messages import SamplingParams
from asyncexec.demo.upload import upload


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Choose one token for each row; on a GPU without waiting for it.

    A draw depends on the row's logits, its parameters and its position alone, not on the other rows; so neither
    batching nor a recomputation changes it, and all ranks that hold the same logits choose the same token.

    Args:
        logits: [rows, vocab].
        params: one for each row.
        positions: of the token that is chosen, in its sequence; one for each row.

    Returns:
        Token ids, int64 [rows], on the device of the logits.
    """
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, param in enumerate(params) if param.temperature > 0]
    if drawn:
        rows = upload(drawn, logits.device)
        chosen[rows] = _draw(logits[rows], [params[row] for row in drawn], [positions[row] for row in drawn])
    return chosen


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751): token ids [rows].

    The tokens are put in order of their probability; the nucleus is the shortest beginning of that order that reaches
    top_p.  Within it, a uniform number is looked up in the cumulated probabilities.
    """
    temperatures = _column([param.temperature for param in params], logits)
    top_p = _column([param.top_p for param in params], logits)
    uniform = _column([_uniform(*of) for of in zip(params, positions, strict=True)], logits)
    # The largest logit is 0 before the division, so that no temperature, however small, overflows.
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperatures
    probabilities, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulated = probabilities.cumsum(dim=-1)
    nucleus = probabilities.masked_fill(cumulated - probabilities >= top_p, 0.0).cumsum(dim=-1)
    places = (nucleus <= uniform * nucleus[:, -1:]).sum(dim=-1, keepdim=True)
    return tokens.gather(-1, places.clamp_max(tokens.shape[-1] - 1))[:, 0]


def _column(values: list[float], like: Tensor) -> Tensor:
    """The values as float64 [rows, 1] on the device of `like`."""
    return upload(values, like.device, torch.float64)[:, None]


def _uniform(params: SamplingParams, position: int) -> float:
    """A number in [0, 1) that is the same on every machine.  From the CPU: a device's generator may differ."""
    return Random(f"{params.seed}:{position}").random()
