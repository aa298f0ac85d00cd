"""Linear layers and embeddings that are split over the tensor-parallel ranks of a stage.

The splits are Megatron-LM's (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): a column-parallel layer computes
some of the output features from the whole input, a row-parallel layer computes a partial sum of all output features
from some of the input, and one all-reduce adds the partial sums up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from asyncexec.demo.checkpoint import CheckpointError, Weights


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place among the tensor-parallel ranks, and what they do together.

    Attributes:
        rank: 0 to size - 1.
        size: number of ranks.
        group: the ranks' process group; None where there is only one.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' `x` [rows, columns] side by side: [rows, size * columns]."""
        if self.group is None:
            return x
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x, group=self.group)
        return torch.cat(gathered, dim=-1)

    def part(self, total: int, what: str) -> tuple[int, int]:
        """This rank's share [start, stop) of `total` things.

        Raises:
            CheckpointError: they cannot be shared out evenly; the message calls them `what`.
        """
        if total % self.size:
            raise CheckpointError(f"{total} {what} cannot be split evenly over tensor_parallel_size={self.size}")
        share = total // self.size
        return self.rank * share, (self.rank + 1) * share

    def kv_part(self, kv_heads: int) -> tuple[int, int]:
        """This rank's key-value heads [start, stop); where there are fewer heads than ranks, ranks share a head.

        Raises:
            CheckpointError: neither number is a multiple of the other.
        """
        if kv_heads >= self.size or self.size % kv_heads:
            return self.part(kv_heads, "key-value heads")
        head = self.rank * kv_heads // self.size
        return head, head + 1


@dataclass(frozen=True, slots=True)
class Rows:
    """Which output features of a checkpoint's matrix a rank holds: [start, stop) of `total`.

    Attributes:
        name: the matrix's name in the checkpoint, without ".weight".
    """

    name: str
    total: int
    start: int
    stop: int


class ColumnParallelLinear(nn.Module):
    """One or several linear layers with the same input, of each a part of the output features, as one product.

    The output is cut into `sizes`; None is one tensor for each part.
    """

    def __init__(
        self,
        weights: Weights,
        in_features: int,
        parts: Sequence[Rows],
        *,
        bias: bool,
        sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        matrices = [
            weights.read(f"{part.name}.weight", (part.total, in_features), start=part.start, stop=part.stop)
            for part in parts
        ]
        self.weight = frozen(torch.cat(matrices))
        self.bias: nn.Parameter | None = None
        if bias:
            vectors = [
                weights.read(f"{part.name}.bias", (part.total,), start=part.start, stop=part.stop) for part in parts
            ]
            self.bias = frozen(torch.cat(vectors))
        self._sizes = list(sizes) if sizes else [part.stop - part.start for part in parts]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map x [tokens, in_features] to one [tokens, size] for each of the sizes."""
        return torch.split(functional.linear(x, self.weight, self.bias), self._sizes, dim=-1)


class RowParallelLinear(nn.Module):
    """A linear layer of which this rank holds the input features [start, stop); every rank gets the whole output."""

    def __init__(
        self,
        weights: Weights,
        tp: TensorParallel,
        name: str,
        in_features: int,
        out_features: int,
        *,
        start: int,
        stop: int,
        bias: bool,
    ) -> None:
        super().__init__()
        self._tp = tp
        shape = (out_features, in_features)
        self.weight = frozen(weights.read(f"{name}.weight", shape, dim=1, start=start, stop=stop).contiguous())
        self.bias = frozen(weights.read(f"{name}.bias", (out_features,))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's x [tokens, stop - start] to the same [tokens, out_features] on all ranks."""
        out = self._tp.all_reduce(functional.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


class VocabParallel(nn.Module):
    """A matrix [vocab, hidden] split along the vocabulary, used as token embedding, as output layer, or as both.

    A vocabulary that the ranks cannot share evenly is padded with rows of zeros at its end.
    """

    def __init__(self, weights: Weights, tp: TensorParallel, name: str, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._tp = tp
        self._vocab_size = vocab_size
        share = -(-vocab_size // tp.size)
        self._start = tp.rank * share
        start, stop = min(self._start, vocab_size), min(self._start + share, vocab_size)
        weight = weights.read(name, (vocab_size, hidden_size), start=start, stop=stop)
        self.weight = frozen(functional.pad(weight, (0, 0, 0, share - weight.shape[0])))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings [tokens, hidden] of the ids [tokens], each 0 to vocab - 1, on all ranks."""
        if self._tp.size == 1:
            return functional.embedding(token_ids, self.weight)
        local = token_ids - self._start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._tp.all_reduce(rows.masked_fill(elsewhere[:, None], 0))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocab] of the hidden states [tokens, hidden], on all ranks."""
        return self._tp.all_gather(functional.linear(hidden, self.weight))[:, : self._vocab_size]


def frozen(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a parameter that is never trained."""
    return nn.Parameter(tensor, requires_grad=False)
