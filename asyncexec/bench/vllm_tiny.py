"""A tiny Llama without weights, and how vLLM is started on it without a model hub."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

VLLM = {"vllm": "pip install vllm, or make .venv-vllm/.done for CPUs"}
"""The package, with how it is installed."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ADAPTED = ["v_proj", "o_proj"]
"""What an adapter must change to be seen in the tokens: the other weights, being random, are small."""

OURS = "asyncexec.integrations.vllm.AsyncExecExecutor"


def set_environment() -> None:
    """Before vLLM is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def make_model(folder: Path, heads: int = 2) -> str:
    """A model's directory, with a configuration alone; tensor-parallel ranks must divide the heads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": 32 * heads}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def make_adapter(folder: Path, rank: int = 4) -> str:
    """A LoRA adapter's directory for `make_model`'s model, with weights that change its tokens."""
    torch: Any = importlib.import_module("torch")
    width = CONFIG["hidden_size"]
    draw = torch.Generator().manual_seed(0)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{half}.weight": torch.randn(shape, generator=draw)
        for layer in range(2)
        for name in ADAPTED
        for half, shape in (("A", (rank, width)), ("B", (width, rank)))
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ADAPTED, "bias": "none"}
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    importlib.import_module("safetensors.torch").save_file(weights, adapter / "adapter_model.safetensors")
    return str(adapter)


def engine_arguments(model: str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments for `LLM` and `AsyncEngineArgs`; weights are random, and the same for the same seed."""
    return {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 512,
        "block_size": 32,
        "seed": 0,
        "dtype": "float32",
        "disable_log_stats": True,
    } | changes


def prompts(count: int = 16) -> list[dict[str, list[int]]]:
    """Prompts of different lengths."""
    return [{"prompt_token_ids": [(7 * i + 3 * j) % 250 + 3 for j in range(4 + 3 * i)]} for i in range(count)]
