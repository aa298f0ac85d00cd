"""The checkpoint that the GPU benchmark runs: a Llama of about 1.1 billion parameters with random weights."""

import os
from pathlib import Path
from typing import Any

import torch

from asyncexec.demo.random_checkpoint import write_random_checkpoint

DIRECTORY = Path(os.environ.get("ASYNCEXEC_BENCH_MODEL", "/dev/shm/asyncexec-bench-1b"))
BLOCK_SIZE = 16
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 32000,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}


def checkpoint() -> Path:
    """The directory; written where it is not there yet."""
    if not (DIRECTORY / "config.json").exists():
        torch.set_num_threads(16)
        part = DIRECTORY.with_suffix(".part")
        write_random_checkpoint(part, seed=0, shards=4, **SHAPE)
        part.rename(DIRECTORY)
    return DIRECTORY


if __name__ == "__main__":
    print(checkpoint())
