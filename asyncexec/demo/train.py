"""Train the small checkpoint that ships with the demo: `python -m asyncexec.demo.train --out DIR`.

About one million parameters, a byte-level vocabulary, and text that every machine with Python has: the sources of the
standard library.  The result is an ordinary Hugging Face checkpoint (`config.json`, `model.safetensors`) of the Llama
architecture.  The default settings are for one CPU core and about 45 minutes.  The settings that made the checkpoint
which ships, in two minutes on a GPU, are in `tiny/README.md`.

The model here is the plain batch form, written for training alone; the one that generates, with tensor parallelism and
a paged cache, is in `asyncexec.demo.llama`.  The tests hold both to the same reference.
"""

import argparse
import json
import math
import re
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from asyncexec.demo.checkpoint import RopeParameters
from asyncexec.demo.rope import inverse_frequencies, rotate

BOS, EOS = 256, 257
VOCAB_SIZE = 258
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 128, 6, 4, 2, 32, 320
MAX_POSITIONS = 1024
ROPE_THETA = 10000.0
RMS_EPS = 1e-5

SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo",
    "__pycache__",
}  # fmt: skip
"""Folders of the standard library that hold tables, test data or other people's packages."""


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions over whole sequences, [batch, length, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within each row; cos and sin are [length, head_dim / 2]."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = HEADS // KV_HEADS
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [batch, length, hidden] to the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm transformer block; its attributes carry the names of the Hugging Face checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=RMS_EPS)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=RMS_EPS)
        self.mlp = Mlp()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x [batch, length, hidden] to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class TrainedLlama(nn.Module):
    """The whole model."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=RMS_EPS)
        frequencies = inverse_frequencies(RopeParameters(rope_theta=ROPE_THETA), HEAD_DIM)
        angles = torch.outer(torch.arange(MAX_POSITIONS), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits [batch, length, vocab] of the token ids [batch, length]."""
        length = token_ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.norm(x), self.embed_tokens.weight)


def standard_library() -> Iterator[Path]:
    """The `.py` files of this Python's standard library in a fixed order, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield path


def read_corpus(paths: Iterator[Path]) -> np.ndarray[Any, np.dtype[np.int16]]:
    """All files one after another as token ids, each followed by the end-of-text id.

    Runs of one byte (rulers, columns of tables) are cut to 16: a model this small cannot count how far to go, and
    would fill pages with spaces.
    """
    pieces = []
    for path in paths:
        text = re.sub(rb"(.)\1{16,}", lambda run: run[1] * 16, path.read_bytes())
        pieces += [np.frombuffer(text, np.uint8).astype(np.int16), np.array([EOS], np.int16)]
    return np.concatenate(pieces)


class Windows:
    """Random windows of the corpus, each from the beginning of a line: that is how prompts begin, too.

    Every other window starts with the beginning-of-text id, so that prompts work with it and without.
    """

    def __init__(self, corpus: np.ndarray[Any, np.dtype[np.int16]], seed: int) -> None:
        self._corpus = corpus
        self._starts = np.flatnonzero((corpus[:-1] == ord("\n")) & (corpus[1:] > ord("\n"))) + 1
        self._random = np.random.default_rng(seed)

    def batch(self, count: int, length: int) -> Tensor:
        """Token ids, int64 [count, length + 1]: inputs and, one further, targets."""
        starts = self._starts[self._starts < len(self._corpus) - length - 1]
        rows = self._corpus[self._random.choice(starts, count)[:, None] + np.arange(length + 1)].astype(np.int64)
        rows[::2] = np.concatenate([np.full((len(rows[::2]), 1), BOS), rows[::2, :-1]], axis=1)
        return torch.from_numpy(rows)


def window_length(step: int, steps: int) -> int:
    """Short windows first, they are cheaper per byte; the whole context for the last fifth of the steps."""
    return 256 if step < steps * 4 // 5 else MAX_POSITIONS


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to a twentieth of the peak."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def save(model: TrainedLlama, out: Path) -> None:
    """Write `config.json` and `model.safetensors` in bfloat16 under Hugging Face's names."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": INTERMEDIATE,
        "hidden_act": "silu", "rms_norm_eps": RMS_EPS, "rope_theta": ROPE_THETA, "tie_word_embeddings": True,
        "max_position_embeddings": MAX_POSITIONS, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def train(arguments: argparse.Namespace) -> None:
    """Train, print the progress and save every 500 steps and at the end."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    windows = Windows(read_corpus(standard_library()), arguments.seed)
    model = TrainedLlama().to(arguments.device)
    optimizer = make_optimizer(model)
    started, mean = time.perf_counter(), torch.zeros((), device=arguments.device)
    for step in range(arguments.steps):
        length = window_length(step, arguments.steps)
        rows = windows.batch(max(1, arguments.bytes_per_step // length), length).to(arguments.device)
        with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
            logits = model(rows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.peak)
        optimizer.step()
        mean = loss.detach() if step == 0 else torch.lerp(mean, loss.detach(), 0.02)
        if step % 50 == 0 or step == arguments.steps - 1:
            rate = (step + 1) * arguments.bytes_per_step / (time.perf_counter() - started)
            print(f"step {step:5d}/{arguments.steps}  loss {mean:.3f} nats/byte  {rate:,.0f} bytes/s", flush=True)
        if step % 500 == 499 or step == arguments.steps - 1:
            save(model, arguments.out)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m asyncexec.demo.train", description="Train the demo's small checkpoint."
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for config.json and model.safetensors")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--bytes-per-step", type=int, default=2048)
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
