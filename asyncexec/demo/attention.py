"""Causal attention over a paged KV cache.

The cache of each layer is divided into blocks of `block_size` tokens, and a request's tokens lie in any blocks, listed
by its block table (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).  A cache slot, block * block_size + offset, is
the place of one token.  Queries of all requests of a step lie one after another in flat tensors [tokens, ...].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from asyncexec.demo.messages import ScheduledRequest
from asyncexec.demo.upload import upload


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's keys and values on one rank, each [num_blocks, block_size, kv_heads, head_size]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Self:
        """An empty cache.  Zeros, because a masked score still multiplies its value, and 0 * nan is nan."""
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, kv_heads, head_size] at their slots, int64 [tokens]."""
        self.keys.flatten(0, 1).index_copy_(0, slots, keys)
        self.values.flatten(0, 1).index_copy_(0, slots, values)

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks [..., n], each [..., n * block_size, kv_heads, head_size]."""
        shape = (*blocks.shape[:-1], -1, *self.keys.shape[2:])
        rows = blocks.flatten()  # whole blocks by index_select: several times faster on CPUs than self.keys[blocks]
        return self.keys.index_select(0, rows).view(shape), self.values.index_select(0, rows).view(shape)


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """A request that runs several tokens: a prompt or a chunk of one.

    Attributes:
        begin, end: its rows in the flat tensors.
        blocks: its block table, int64 [blocks].
        length: tokens of the sequence up to and including these.
        mask: which of the `length` tokens each row may see, bool [end - begin, length]; None where the rows are the
            whole sequence, so that the plain causal mask holds.
    """

    begin: int
    end: int
    blocks: Tensor
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The requests that run one token each.

    Attributes:
        rows: their rows in the flat tensors, int64 [requests].
        blocks: their block tables, padded at the end, int64 [requests, blocks].
        mask: which cached tokens each may see, bool [requests, 1, 1, blocks * block_size].
    """

    rows: Tensor
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the tokens of a step are: computed once, used by every layer.

    Attributes:
        positions: of each token in its sequence, int64 [tokens].
        slots: each token's cache slot, int64 [tokens].
        last_rows: row of the last token of each request that samples, int64 [sampling requests].
        prefills: the requests of several tokens.
        decodes: the requests of one token; None where there are none.
    """

    positions: Tensor
    slots: Tensor
    last_rows: Tensor
    prefills: list[PrefillRequest] = field(default_factory=list)
    decodes: DecodeBatch | None = None

    @classmethod
    def build(cls, requests: Sequence[ScheduledRequest], block_size: int, device: torch.device) -> Self:
        """Lay out a step.

        Raises:
            ValueError: a request without tokens, or with too few blocks for its tokens.
        """
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        prefills: list[PrefillRequest] = []
        decodes: list[tuple[int, ScheduledRequest]] = []
        for request in requests:
            count, length = len(request.token_ids), request.start + len(request.token_ids)
            if not count or length > len(request.block_ids) * block_size:
                raise ValueError(
                    f"the request in slot {request.slot} has {count} tokens from position {request.start} and "
                    f"{len(request.block_ids)} blocks of {block_size}; it needs a token, and blocks for all tokens"
                )
            begin = len(positions)
            for position in range(request.start, length):
                positions.append(position)
                slots.append(request.block_ids[position // block_size] * block_size + position % block_size)
            if count == 1:
                decodes.append((begin, request))
            else:
                prefills.append(_prefill(request, begin, length, block_size, device))
            if request.sample:
                last_rows.append(len(positions) - 1)
        return cls(
            positions=upload(positions, device),
            slots=upload(slots, device),
            last_rows=upload(last_rows, device),
            prefills=prefills,
            decodes=_decode_batch(decodes, block_size, device) if decodes else None,
        )


def _prefill(
    request: ScheduledRequest, begin: int, length: int, block_size: int, device: torch.device
) -> PrefillRequest:
    mask = None
    if request.start:
        positions = torch.arange(length, device=device)
        mask = positions <= positions[request.start :, None]
    blocks = upload(request.block_ids[: -(-length // block_size)], device)
    return PrefillRequest(begin, begin + len(request.token_ids), blocks, length, mask)


def _decode_batch(decodes: list[tuple[int, ScheduledRequest]], block_size: int, device: torch.device) -> DecodeBatch:
    lengths = upload([request.start + 1 for _, request in decodes], device)
    width = _rounded(max(request.start // block_size + 1 for _, request in decodes))
    tables = [(request.block_ids + [0] * width)[:width] for _, request in decodes]
    return DecodeBatch(
        rows=upload([row for row, _ in decodes], device),
        blocks=upload(tables, device),
        mask=(torch.arange(width * block_size, device=device) < lengths[:, None])[:, None, None, :],
    )


def _rounded(width: int) -> int:
    """A width of block tables, rounded up by an eighth at most: on GPUs, new shapes take tens of milliseconds."""
    step = 1 << max(0, width.bit_length() - 4)
    return -(-width // step) * step


def paged_attention(queries: Tensor, cache: KVCache, layout: BatchLayout) -> Tensor:
    """Attention of a step's queries over their own sequences; their keys and values are in the cache already.

    Args:
        queries: [tokens, heads, head_size]; each key-value head serves heads / kv_heads neighbouring heads.
        cache: of the layer.
        layout: of the step.

    Returns:
        [tokens, heads, head_size].
    """
    if layout.decodes is not None and not layout.prefills:  # the rows are in order already
        return _attend_decodes(queries, cache, layout.decodes)
    out = torch.empty_like(queries)
    for request in layout.prefills:
        out[request.begin : request.end] = _attend_prefill(queries[request.begin : request.end], cache, request)
    if layout.decodes is not None:
        out[layout.decodes.rows] = _attend_decodes(queries[layout.decodes.rows], cache, layout.decodes)
    return out


def _attend_prefill(queries: Tensor, cache: KVCache, request: PrefillRequest) -> Tensor:
    keys, values = cache.gather(request.blocks)
    groups = queries.shape[1] // keys.shape[1]
    out = functional.scaled_dot_product_attention(
        queries.transpose(0, 1),
        keys[: request.length].transpose(0, 1).repeat_interleave(groups, dim=0),
        values[: request.length].transpose(0, 1).repeat_interleave(groups, dim=0),
        attn_mask=request.mask,
        is_causal=request.mask is None,
    )
    return out.transpose(0, 1)


def _attend_decodes(queries: Tensor, cache: KVCache, decodes: DecodeBatch) -> Tensor:
    """One query per sequence sees all its tokens, so the heads of a group can stand where query positions do."""
    keys, values = cache.gather(decodes.blocks)
    requests, heads, head_size = queries.shape
    grouped = queries.view(requests, keys.shape[2], -1, head_size)  # [requests, kv_heads, heads per kv head, head_size]
    out = functional.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=decodes.mask
    )
    return out.reshape(requests, heads, head_size)
