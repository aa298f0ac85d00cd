"""Engine, executor, ranks and model together, held to transformers' LlamaForCausalLM token for token."""

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from asyncexec import ExecutorConfig, RankContext, create_executor
from asyncexec.demo.checkpoint import ModelConfig
from asyncexec.demo.engine import AsyncEngine
from asyncexec.demo.random_checkpoint import write_random_checkpoint
from asyncexec.demo.tokenizer import ByteTokenizer
from asyncexec.demo.worker import ModelWorker

pytestmark = pytest.mark.timeout(300)

SEED = 0
NEW_TOKENS = 64
BLOCK_SIZE = 8
PROMPT_LENGTHS = (1, 2, 5, 15, 16, 17, 40, 90)
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "MHA": {"num_key_value_heads": 4},
    "GQA": {"num_key_value_heads": 2},
    "MHA, tied embeddings": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "GQA, tied embeddings": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
LAYOUTS = [
    ("nccl", 1, 1, False),
    ("nccl", 2, 1, False),
    ("nccl", 1, 2, False),
    ("nccl", 2, 2, False),
    ("nccl", 2, 1, True),
    ("local", 1, 1, False),
    ("local", 1, 1, True),
    ("ray", 2, 1, False),
    ("ray", 1, 2, False),
    ("ray", 2, 2, False),
    ("ray", 2, 1, True),
]
SMALLEST_MARGIN = 5e-5
"""Of the likeliest token's logit over the next one's.  Below, the order of float32 sums would decide."""

Outputs = list[list[int]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_random_checkpoint(root / name, seed=SEED, **config) for name, config in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, Outputs]:
    return {name: reference(directory) for name, directory in checkpoints.items()}


def prompts() -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(256) for _ in range(length)] for length in PROMPT_LENGTHS]


def reference(directory: Path) -> Outputs:
    """What transformers says to each prompt, provided that rounding has no say in it."""
    llama: Any = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    outputs: Outputs = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.cat(out.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > SMALLEST_MARGIN, "rounding may choose some token: change SEED"
        outputs.append(out.sequences[0, len(prompt) :].tolist())
    return outputs


def worker_for_any_model() -> type:
    """A worker that can change its checkpoint, so that one set of ranks serves them all."""

    class AnyModelWorker(ModelWorker):
        def __init__(self, context: RankContext) -> None:
            self._context = context

        def use(self, model: str) -> None:
            ModelWorker.__init__(self, self._context, model=model)

    return AnyModelWorker


async def generate_all(engine: AsyncEngine) -> Outputs:
    async def generate(prompt: list[int]) -> list[int]:
        stream = engine.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
        return [token.token_id async for token in stream]

    return await asyncio.gather(*map(generate, prompts()))


@pytest.mark.parametrize(("transport", "tp", "pp", "ahead"), LAYOUTS)
async def test_greedy_output_is_that_of_transformers(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    expected: dict[str, Outputs],
    transport: str,
    tp: int,
    pp: int,
    ahead: bool,
) -> None:
    if transport == "ray":
        request.getfixturevalue("ray_cluster")
    config = ExecutorConfig(
        transport=transport, tensor_parallel_size=tp, pipeline_parallel_size=pp, async_scheduling=ahead
    )
    outputs: dict[str, Outputs] = {}
    async with create_executor(config, worker_for_any_model()) as executor:
        for name, directory in checkpoints.items():
            await executor.collective_rpc("use", (str(directory),))
            model = ModelConfig.from_directory(directory)
            async with AsyncEngine(executor, model, ByteTokenizer(), async_scheduling=ahead) as engine:
                outputs[name] = await generate_all(engine)
    assert outputs == expected


async def test_chunked_prompts_and_preemption_change_nothing(
    checkpoints: dict[str, Path], expected: dict[str, Outputs]
) -> None:
    directory = checkpoints["GQA"]
    model = ModelConfig.from_directory(directory)
    layer_bytes = 2 * BLOCK_SIZE * model.kv_heads * model.head_size * 4
    options: Mapping[str, Any] = {
        "model": str(directory),
        "block_size": BLOCK_SIZE,
        "kv_cache_bytes": 24 * model.num_hidden_layers * layer_bytes,
    }
    async with (
        create_executor({"transport": "local"}, ModelWorker, worker_kwargs=options) as executor,
        AsyncEngine(executor, model, ByteTokenizer(), block_size=BLOCK_SIZE, max_num_batched_tokens=32) as engine,
    ):
        assert engine.load.num_blocks == 24
        assert await generate_all(engine) == expected["GQA"]
        assert engine.load.free_blocks == 24
