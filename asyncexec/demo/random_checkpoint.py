"""Llama checkpoints of any shape with random weights, for tests, benchmarks and trials on GPUs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from asyncexec.demo.checkpoint import ARCHITECTURE, ModelConfig

SMALL: Mapping[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 258,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
"""The config that `write_random_checkpoint` starts from."""


def write_random_checkpoint(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Write `config.json` and safetensors as Hugging Face's LlamaForCausalLM would.

    Matrices are normal with variance 1 / input features, so that activations keep their size and every part of the
    model has a say in the output; with the usual small weights, attention would hardly matter.

    Args:
        directory: created if need be.
        dtype: of the weights.
        seed: of the weights; the same seed, shape and dtype give the same checkpoint.
        shards: number of safetensors files; with more than one there is an index, too.  One file's tensors are in
            memory at a time.
        config: keys of config.json that differ from `SMALL`.

    Returns:
        The directory.

    Raises:
        CheckpointError: the config is not one that the demo can run.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SMALL, **config}, indent=2) + "\n")
    shapes = tensor_shapes(ModelConfig.from_directory(directory))
    generator = torch.Generator().manual_seed(seed)
    names = list(shapes)
    files = {}
    for shard in range(shards):
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {name: _random(name, shapes[name], generator).to(dtype) for name in part}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(part, file))
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint with this config."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def linear(name: str, outputs: int, inputs: int, *, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        for name, outputs, inputs in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):
            linear(f"{layer}.self_attn.{name}", outputs, inputs, bias=config.attention_bias)
        for name, outputs, inputs in (
            ("gate_proj", intermediate, hidden),
            ("up_proj", intermediate, hidden),
            ("down_proj", hidden, intermediate),
        ):
            linear(f"{layer}.mlp.{name}", outputs, inputs, bias=config.mlp_bias)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * values
    if name.endswith(".bias"):
        return 0.1 * values
    return values / math.sqrt(shape[1])
