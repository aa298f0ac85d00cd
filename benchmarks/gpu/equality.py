"""Float32 greedy tokens of the demo engine on several layouts, beside those of transformers on one GPU."""

import argparse
import asyncio
import random
from typing import Any

import torch

from asyncexec import create_executor, run
from asyncexec.demo.checkpoint import ModelConfig
from asyncexec.demo.engine import AsyncEngine
from asyncexec.demo.tokenizer import load_tokenizer
from model import BLOCK_SIZE, SHAPE, checkpoint
from rows import row

NEW_TOKENS = 32
LENGTHS = (1, 7, 16, 33, 100, 250)


def prompts() -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(int(SHAPE["vocab_size"])) for _ in range(length)] for length in LENGTHS]


def reference() -> tuple[list[list[int]], float]:
    """transformers' tokens, and the smallest margin of a chosen token's logit over the next one's."""
    import transformers

    llama: Any = transformers.LlamaForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    llama = llama.to("cuda:0")
    outputs, margin = [], float("inf")
    for prompt in prompts():
        ids = torch.tensor([prompt], device="cuda:0")
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
        margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
        outputs.append(out.sequences[0, len(prompt) :].tolist())
    del llama
    torch.cuda.empty_cache()
    return outputs, margin


async def engine(tp: int, pp: int, ahead: bool) -> list[list[int]]:
    directory = checkpoint()
    model = ModelConfig.from_directory(directory)
    config = {
        "transport": "nccl",
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "async_scheduling": ahead,
        "options": {"nccl": {"backend": "nccl"}},
    }
    kwargs = {"model": str(directory), "dtype": "float32", "block_size": BLOCK_SIZE}
    async with (
        create_executor(config, "asyncexec.demo.worker:ModelWorker", worker_kwargs=kwargs) as executor,
        AsyncEngine(
            executor, model, load_tokenizer(directory, model), block_size=BLOCK_SIZE, async_scheduling=ahead
        ) as serving,
    ):

        async def one(prompt: list[int]) -> list[int]:
            return [t.token_id async for t in serving.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True)]

        return list(await asyncio.gather(*map(one, prompts())))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    gpus = parser.parse_args().gpus
    expected, margin = reference()
    row("smallest margin of a greedy token over the next", margin, "logits")
    layouts = [(1, 1, False), (1, 1, True), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, False)]
    for tp, pp, ahead in layouts:
        if tp * pp <= gpus:
            found = run(engine(tp, pp, ahead))
            equal = sum(
                a == b for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)
            )
            total = len(LENGTHS) * NEW_TOKENS
            name = f"tokens equal to transformers', float32, tp {tp} x pp {pp}{', async scheduling' if ahead else ''}"
            row(name, equal, f"of {total}", target="all", met=equal == total)


if __name__ == "__main__":
    main()
