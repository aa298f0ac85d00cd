"""One pipeline stage of a Llama decoder, split over its tensor-parallel ranks.

The architecture is that of `transformers.LlamaForCausalLM` (Touvron et al. 2023, https://arxiv.org/abs/2302.13971):
RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from asyncexec.demo.attention import BatchLayout, KVCache, paged_attention
from asyncexec.demo.checkpoint import CheckpointError, ModelConfig, Weights
from asyncexec.demo.parallel import ColumnParallelLinear, RowParallelLinear, Rows, TensorParallel, VocabParallel, frozen
from asyncexec.demo.rope import inverse_frequencies, rotate, rotation


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, weights: Weights, name: str, config: ModelConfig) -> None:
        super().__init__()
        self.weight = frozen(weights.read(f"{name}.weight", (config.hidden_size,)))
        self._eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [tokens, hidden]."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self._eps)


class Attention(nn.Module):
    """Grouped-query attention with this rank's heads."""

    def __init__(self, weights: Weights, name: str, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        size, heads, kv_heads = config.head_size, config.num_attention_heads, config.kv_heads
        first, last = tp.part(heads, "attention heads")
        kv_first, kv_last = tp.kv_part(kv_heads)
        parts = [
            Rows(f"{name}.q_proj", heads * size, first * size, last * size),
            Rows(f"{name}.k_proj", kv_heads * size, kv_first * size, kv_last * size),
            Rows(f"{name}.v_proj", kv_heads * size, kv_first * size, kv_last * size),
        ]
        self._heads = [last - first, kv_last - kv_first]
        sizes = [sum(self._heads) * size, self._heads[1] * size]  # queries and keys are rotated together
        self.qkv = ColumnParallelLinear(weights, config.hidden_size, parts, bias=config.attention_bias, sizes=sizes)
        self.out = RowParallelLinear(
            weights,
            tp,
            f"{name}.o_proj",
            heads * size,
            config.hidden_size,
            start=first * size,
            stop=last * size,
            bias=config.attention_bias,
        )
        self._head_size = size

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, layout: BatchLayout) -> Tensor:
        """Attend from x [tokens, hidden], whose keys and values are added to the cache first."""
        rotated, values = (part.unflatten(-1, (-1, self._head_size)) for part in self.qkv(x))
        queries, keys = torch.split(rotate(rotated, *rope), self._heads, dim=-2)
        cache.write(layout.slots, keys, values)
        attended = paged_attention(queries, cache, layout)
        return self.out(attended.flatten(-2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)), this rank's part (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, weights: Weights, name: str, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        size = config.intermediate_size
        start, stop = tp.part(size, "intermediate columns")
        parts = [Rows(f"{name}.{which}", size, start, stop) for which in ("gate_proj", "up_proj")]
        self.gate_up = ColumnParallelLinear(weights, config.hidden_size, parts, bias=config.mlp_bias)
        self.down = RowParallelLinear(
            weights, tp, f"{name}.down_proj", size, config.hidden_size, start=start, stop=stop, bias=config.mlp_bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [tokens, hidden] to the same shape."""
        gate, up = self.gate_up(x)
        return self.down(functional.silu(gate) * up)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to its normalised input."""

    def __init__(self, weights: Weights, name: str, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(weights, f"{name}.input_layernorm", config)
        self.attention = Attention(weights, f"{name}.self_attn", config, tp)
        self.mlp_norm = RMSNorm(weights, f"{name}.post_attention_layernorm", config)
        self.mlp = Mlp(weights, f"{name}.mlp", config, tp)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, layout: BatchLayout) -> Tensor:
        """Map x [tokens, hidden] to the same shape."""
        x = x + self.attention(self.attention_norm(x), rope, cache, layout)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


def stage_layers(num_layers: int, stage: int, stages: int) -> range:
    """The contiguous layers of a pipeline stage; stages differ by one layer at most.

    Raises:
        CheckpointError: there are more stages than layers.
    """
    if stages > num_layers:
        raise CheckpointError(f"pipeline_parallel_size={stages}, but the model has only {num_layers} layers to split")
    return range(num_layers * stage // stages, num_layers * (stage + 1) // stages)


class LlamaStage(nn.Module):
    """The embedding on the first stage, the stage's layers, the final norm and output layer on the last.

    Args:
        weights: the checkpoint; only this rank's part of it is read.
        config: of the checkpoint.
        tp: this rank's place in its stage.
        stage, stages: number of this stage, from 0, and how many there are.

    Raises:
        CheckpointError: the model cannot be split this way, or a tensor is missing or has the wrong shape.
    """

    frequencies: Tensor

    def __init__(self, weights: Weights, config: ModelConfig, tp: TensorParallel, *, stage: int, stages: int) -> None:
        super().__init__()
        self.layer_numbers = stage_layers(config.num_hidden_layers, stage, stages)
        shape = (config.vocab_size, config.hidden_size)
        first, last = stage == 0, stage == stages - 1
        self.embedding = VocabParallel(weights, tp, "model.embed_tokens.weight", *shape) if first else None
        self.layers = nn.ModuleList(
            DecoderLayer(weights, f"model.layers.{number}", config, tp) for number in self.layer_numbers
        )
        self.norm = RMSNorm(weights, "model.norm", config) if last else None
        self.head: VocabParallel | None = None
        if last and config.tie_word_embeddings:  # one matrix where both are on this rank, a second copy elsewhere
            self.head = self.embedding
            if self.head is None:
                self.head = VocabParallel(weights, tp, "model.embed_tokens.weight", *shape)
        elif last:
            self.head = VocabParallel(weights, tp, "lm_head.weight", *shape)
        self.register_buffer("frequencies", inverse_frequencies(config.rope, config.head_size).to(weights.device))

    def forward(self, x: Tensor, caches: Sequence[KVCache], layout: BatchLayout) -> Tensor:
        """Run the stage's layers.

        Args:
            x: token ids, int64 [tokens], on the first stage; hidden states [tokens, hidden] on the others.
            caches: one for each of the stage's layers.
            layout: of the step.

        Returns:
            Hidden states [tokens, hidden].
        """
        if self.embedding is not None:
            x = self.embedding.embed(x)
        rope = rotation(layout.positions, self.frequencies, x.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rope, cache, layout)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] of hidden states [rows, hidden], on all ranks of the stage.

        Raises:
            RuntimeError: this is not the last stage.
        """
        if self.norm is None or self.head is None:
            raise RuntimeError("only the last pipeline stage computes logits")
        return self.head.logits(self.norm(hidden))
