"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and its scalings."""

import math

import torch
from torch import Tensor

from asyncexec.demo.checkpoint import RopeParameters


def inverse_frequencies(rope: RopeParameters, head_size: int) -> Tensor:
    """Angle per position of each pair of elements, in radians: float32 [head_size / 2].

    Unscaled it is theta ** (-2 i / head_size).  "linear" divides it by the factor (Chen et al. 2023,
    https://arxiv.org/abs/2306.15595); "llama3" does so for long wavelengths only, see `_llama3`.
    """
    theta = 10000.0 if rope.rope_theta is None else rope.rope_theta
    frequencies = 1.0 / theta ** (torch.arange(0, head_size, 2).float() / head_size)
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies / rope.factor if rope.kind == "linear" and rope.factor else frequencies


def _llama3(frequencies: Tensor, rope: RopeParameters) -> Tensor:
    """Llama 3.1's scaling: divide low frequencies by the factor, keep high ones, interpolate between.

    Source: Meta's llama-models, `apply_scaling` in models/llama3/model.py, with the constants as parameters; they are
    described in Hugging Face's documentation of `rope_parameters`.
    """
    factor, low, high = rope.factor or 1.0, rope.low_freq_factor or 1.0, rope.high_freq_factor or 1.0
    turns = (rope.original_max_position_embeddings or 1) * frequencies / (2 * math.pi)  # over the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0) if high > low else (turns >= high).float()
    return (1 - kept) * frequencies / factor + kept * frequencies


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, shaped to rotate [tokens, heads, head_size].

    Args:
        positions: int64 [tokens].
        frequencies: from `inverse_frequencies`, float32 [head_size / 2].
        dtype: of the result; the angles are computed in float32.

    Returns:
        Two tensors [tokens, 1, head_size / 2].
    """
    angles = (positions[:, None].float() * frequencies)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_size / 2]) of x [tokens, heads, head_size]: the pairing of HF checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
