"""Hugging Face checkpoints of Llama models: the config, and the slices of the weights that a rank needs."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ARCHITECTURE = "LlamaForCausalLM"
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The supported rope types and the parameters that each needs."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used as asked: the message names the path, what is wrong and what would be valid."""


class RopeParameters(msgspec.Struct, frozen=True, kw_only=True):
    """How rotary frequencies are scaled; the fields are those of Hugging Face's `rope_scaling` / `rope_parameters`.

    Attributes:
        rope_type: "default" (no scaling), "linear" or "llama3".
        rope_theta: base of the frequencies; in older configs it stands beside this struct instead.
        factor: context extension factor, for "linear" and "llama3".
        low_freq_factor: "llama3": wavelengths over original context / low_freq_factor are scaled in full.
        high_freq_factor: "llama3": wavelengths under original context / high_freq_factor are left alone.
        original_max_position_embeddings: "llama3": context length in tokens before the extension.
    """

    rope_type: str | None = None
    type: str | None = None  # what rope_type was called before
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    @property
    def kind(self) -> str:
        """The rope type, by its new name or its old one."""
        return self.rope_type or self.type or "default"

    def problem(self) -> str | None:
        """What is wrong with these parameters, or None."""
        if self.kind not in ROPE_FIELDS:
            return f"rope type {self.kind!r} is not supported; supported are {', '.join(ROPE_FIELDS)}"
        missing = [name for name in ROPE_FIELDS[self.kind] if not (getattr(self, name) or 0) > 0]
        return f"rope type {self.kind!r} needs a positive {' and '.join(missing)}" if missing else None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a Llama `config.json` that decides how the model computes.

    Field names are Hugging Face's, see `transformers.LlamaConfig`; sizes are in elements, positions in tokens.
    """

    architectures: list[str] | None = None
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int
    vocab_size: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    quantization_config: Any = None

    @classmethod
    def from_directory(cls, directory: str | Path) -> Self:
        """Read and check `config.json`.

        Raises:
            CheckpointError: no such directory, no readable config.json in it, or a model that is not supported.
        """
        path = Path(directory) / "config.json"
        if not path.parent.is_dir():
            raise CheckpointError(f"{directory}: no such directory; give one with a Hugging Face checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{directory}: has no config.json, so it is not a Hugging Face checkpoint")
        try:
            config = msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if problem := config._problem():
            raise CheckpointError(f"{path}: {problem}")
        return config

    def _problem(self) -> str | None:
        """Why this model cannot be run, or None."""
        if self.architectures is None or ARCHITECTURE not in self.architectures:
            return f"architectures is {self.architectures}; supported is [{ARCHITECTURE!r}]"
        if self.hidden_act != "silu":
            return f"hidden_act {self.hidden_act!r} is not supported; supported is 'silu'"
        if self.quantization_config is not None:
            return "quantized weights are not supported; use a checkpoint without quantization_config"
        if self.kv_heads < 1 or self.num_attention_heads % self.kv_heads:
            return f"{self.num_attention_heads} attention heads are no multiple of {self.kv_heads} key-value heads"
        if self.head_size < 2 or self.head_size % 2:
            return f"the head size {self.head_size} is not an even number, which rotary embedding needs"
        return self.rope.problem()

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads; as many as attention heads where the config does not say."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def rope(self) -> RopeParameters:
        """Rotary parameters, from the newer key or from the older ones, with rope_theta filled in."""
        rope = self.rope_parameters or self.rope_scaling or RopeParameters()
        return msgspec.structs.replace(rope, rope_theta=rope.rope_theta or self.rope_theta or 10000.0)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text; none where the config names none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)


class Weights:
    """The safetensors files of a checkpoint, opened for reading slices; a context manager.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.
        dtype: what the tensors are converted to.
        device: where they are put.

    Raises:
        CheckpointError: no weights in the directory, or files that cannot be read.
    """

    def __init__(self, directory: str | Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self._directory = Path(directory)
        self._dtype = dtype
        self.device = device
        self._close = ExitStack()
        self._files: dict[str, Any] = {}  # tensor name -> open safetensors file
        try:
            for path in self._paths():
                file = self._open(path)
                self._files.update((name, file) for name in file.keys())  # noqa: SIM118 (not a mapping)
        except BaseException:
            self._close.close()
            raise

    def _paths(self) -> list[Path]:
        """The checkpoint's safetensors files."""
        single, index = self._directory / "model.safetensors", self._directory / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            raise CheckpointError(
                f"{self._directory}: has no weights; needed is model.safetensors, or model.safetensors.index.json "
                "with the files that it names (PyTorch's .bin files are not read)"
            )
        try:
            weight_map = msgspec.json.decode(index.read_bytes(), type=dict[str, Any])["weight_map"]
            names = sorted(set(msgspec.convert(weight_map, dict[str, str]).values()))
        except (msgspec.DecodeError, msgspec.ValidationError, KeyError) as error:
            raise CheckpointError(f"{index}: has no valid weight_map: {error}") from error
        return [self._directory / name for name in names]

    def _open(self, path: Path) -> Any:
        try:
            return self._close.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close.close()

    def read(
        self, name: str, shape: tuple[int, ...], *, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """The elements [start, stop) along dimension `dim` (0 or 1) of a tensor; nothing else is read from disk.

        Args:
            name: the tensor's name in the checkpoint.
            shape: its whole shape, as the config has it.
            dim: the dimension that is cut.
            start: first index along `dim`.
            stop: index after the last; None is the end.

        Raises:
            CheckpointError: there is no such tensor, or it has another shape.
        """
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self._directory}: the weights lack the tensor {name!r} that the config calls for")
        tensor = file.get_slice(name)
        found = tuple(tensor.get_shape())
        if found != shape:
            raise CheckpointError(f"{self._directory}: tensor {name!r} has shape {found}; the config calls for {shape}")
        part: Tensor = tensor[start:stop] if dim == 0 else tensor[:, start:stop]
        return part.to(self.device, self._dtype)
