"""The demo's model: held to transformers' LlamaForCausalLM token for token, however it is split, batched or chunked."""

import random
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from asyncexec.codec import Codec
from asyncexec.demo import train
from asyncexec.demo.messages import LAST_SAMPLED, SamplingParams, ScheduledRequest, StepInput, StepOutput
from asyncexec.demo.random_checkpoint import write_random_checkpoint
from asyncexec.demo.worker import ModelWorker
from asyncexec.outputs import DeferredOutput, IntermediateTensors
from asyncexec.worker import ProcessGroups, RankContext

pytestmark = pytest.mark.timeout(120)

BLOCK_SIZE = 4
NEW_TOKENS = 64
GREEDY = SamplingParams()
TINY = Path(train.__file__).parent / "tiny"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "one-kv-head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3-rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "rope-parameters": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "rope_theta": None},
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "own-head-size": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "sharded": {"shards": 3},
    "odd-vocabulary": {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": [2, 3]},
}

Step = Callable[[StepInput], list[int]]
"""Runs one step on all ranks and gives the last stage's token ids."""


def prompts(count: int, vocab_size: int = 101, *, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to about 40 tokens, no two of the same length."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(1 + 5 * index)] for index in range(count)]


def reference(model: Path, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """What transformers generates greedily, without stopping at an end-of-text token."""
    llama: Any = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = llama.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def single(model: Path, **arguments: Any) -> Step:
    """One rank."""
    return pipeline([ModelWorker(RankContext(), model=str(model), block_size=BLOCK_SIZE, **arguments)])


def pipeline(stages: Sequence[ModelWorker]) -> Step:
    """Stages called one after another in this thread."""
    for worker in stages:
        worker.initialize_kv_cache(400)

    def step(step_input: StepInput) -> list[int]:
        output: StepOutput | IntermediateTensors[StepOutput] | None = None
        for worker in stages:
            given = output if isinstance(output, IntermediateTensors) else None
            result = worker.execute_model(step_input, given)
            assert not isinstance(result, DeferredOutput), "on a CPU nothing is waited for"
            output = result
        assert isinstance(output, StepOutput)
        return output.token_ids

    return step


def gloo(rank: int, size: int, path: Path) -> dist.ProcessGroup:
    """A Gloo group between threads of this process."""
    store = dist.FileStore(str(path), size)  # type: ignore[attr-defined]
    group = dist.ProcessGroup(store, rank, size)
    backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30))
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(rank)` in `count` threads at once; their results in order, or the first error."""
    results: list[Any] = [None] * count
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:  # noqa: BLE001 (raised again below)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


def split(model: Path, folder: Path, *, tp: int, pp: int, generate: Callable[[Step], Any]) -> list[Any]:
    """`generate` on every tensor-parallel rank of a model split tp x pp, each rank's stages in one thread."""
    folder.mkdir()

    def work(rank: int) -> Any:
        stages = []
        for stage in range(pp):
            groups = ProcessGroups(tensor_parallel=gloo(rank, tp, folder / str(stage)) if tp > 1 else None)
            context = RankContext(
                rank=stage * tp + rank, world_size=tp * pp, tensor_parallel_rank=rank, tensor_parallel_size=tp,
                pipeline_parallel_rank=stage, pipeline_parallel_size=pp, groups=groups,
            )  # fmt: skip
            stages.append(ModelWorker(context, model=str(model), block_size=BLOCK_SIZE))
        return generate(pipeline(stages))

    return in_threads(tp, work)


def scattered_blocks(count: int, length: int) -> list[list[int]]:
    """Block tables for `count` requests of up to `length` tokens, in no order."""
    each = -(-length // BLOCK_SIZE)
    blocks = list(range(1, count * each + 1))
    random.Random(1).shuffle(blocks)
    return [blocks[index * each : (index + 1) * each] for index in range(count)]


def generate(
    step: Step,
    prompts: Sequence[list[int]],
    *,
    new_tokens: int = NEW_TOKENS,
    chunk: int | None = None,
    sampling: Sequence[SamplingParams] | None = None,
    arrivals: Sequence[int] | None = None,
    placeholders: bool = False,
) -> list[list[int]]:
    """Run all prompts together and give their new tokens.

    Prompts run in chunks of `chunk` tokens if given; `arrivals` has the step in which each begins.
    """
    tables = scattered_blocks(len(prompts), max(map(len, prompts)) + new_tokens)
    sequences = [list(prompt) for prompt in prompts]
    done = [0] * len(prompts)  # tokens in the KV cache
    now = 0
    while any(len(sequence) < len(prompt) + new_tokens for sequence, prompt in zip(sequences, prompts, strict=True)):
        requests = []
        for index, sequence in enumerate(sequences):
            waits = arrivals is not None and now < arrivals[index]
            if waits or len(sequence) == len(prompts[index]) + new_tokens:
                continue
            tokens = sequence[done[index] :][:chunk]
            sampled = done[index] + len(tokens) == len(sequence)
            shown = [LAST_SAMPLED] if placeholders and done[index] >= len(prompts[index]) else tokens
            params = GREEDY if sampling is None else sampling[index]
            blocks = tables[index][: -(-(done[index] + len(tokens)) // BLOCK_SIZE)]
            requests.append(ScheduledRequest(index, done[index], shown, blocks, sampled, params))
            done[index] += len(tokens)
        for request, token in zip(requests, step(StepInput(requests)), strict=True):
            assert (token >= 0) == request.sample
            if request.sample:
                sequences[request.slot].append(token)
        now += 1
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("gqa"), vocab_size=101, bos_token_id=None, eos_token_id=None)


# Equal to transformers


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path, **CHECKPOINTS[name])
    batch = prompts(8 if name == "gqa" else 4)
    assert generate(single(model), batch) == [reference(model, prompt) for prompt in batch]


@pytest.mark.parametrize("name", ["mha", "tied", "odd-vocabulary"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_split_models_generate_the_same_on_every_rank(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path, **CHECKPOINTS[name])
    batch = prompts(3)
    whole = generate(single(model), batch, new_tokens=16)
    ranks = split(model, tmp_path / "x", tp=tp, pp=pp, generate=lambda step: generate(step, batch, new_tokens=16))
    assert ranks == [whole] * tp


def test_key_value_heads_are_shared_where_ranks_are_more(tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path, num_attention_heads=8, num_key_value_heads=2, attention_bias=True)
    batch = prompts(3)
    ranks = split(model, tmp_path / "x", tp=4, pp=1, generate=lambda step: generate(step, batch, new_tokens=16))
    assert ranks == [[reference(model, prompt, 16) for prompt in batch]] * 4


def test_bfloat16_stays_close_to_float32(gqa: Path) -> None:
    batch = prompts(4)
    llama = transformers.LlamaForCausalLM.from_pretrained(gqa, dtype=torch.float32)
    for prompt, tokens in zip(batch, generate(single(gqa, dtype="bfloat16"), batch, new_tokens=16), strict=True):
        logits = llama(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 0.1 * logits.std()


def test_the_checkpoint_that_ships_agrees_in_all_three_implementations() -> None:
    batch = [list(b"def "), list(b"import os\n\nclass ")]
    ours = generate(single(TINY), batch, new_tokens=48)
    assert ours == [reference(TINY, prompt, 48) for prompt in batch]
    trained = train.TrainedLlama()
    weights = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).model.state_dict()
    trained.load_state_dict(weights)
    sequence = torch.tensor([batch[0] + ours[0]])
    assert trained(sequence)[0, 3:-1].argmax(-1).tolist() == ours[0]
    assert b"(" in bytes(ours[0])


# Batching


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_a_prompt_equal_the_whole(gqa: Path, chunk: int) -> None:
    batch = prompts(5)
    whole = generate(single(gqa), batch, new_tokens=8)
    assert generate(single(gqa), batch, new_tokens=8, chunk=chunk) == whole


def test_requests_may_join_while_others_run(gqa: Path) -> None:
    batch = prompts(5)
    whole = generate(single(gqa), batch, new_tokens=16)
    assert generate(single(gqa), batch, new_tokens=16, chunk=6, arrivals=[4, 0, 9, 2, 2]) == whole


def test_the_placeholder_stands_for_the_last_sampled_token(gqa: Path) -> None:
    batch = prompts(3)
    whole = generate(single(gqa), batch, new_tokens=8)
    assert generate(single(gqa), batch, new_tokens=8, placeholders=True) == whole


def test_a_step_may_be_empty_or_sample_nothing(gqa: Path) -> None:
    step = single(gqa)
    assert step(StepInput([])) == []
    assert step(StepInput([ScheduledRequest(0, 0, [1, 2], [0], False, GREEDY)])) == [-1]


def test_messages_travel_typed() -> None:
    formats = Codec(ModelWorker).formats
    assert formats["execute_model"] == ("typed", "typed")
    assert formats["initialize_kv_cache"] == formats["available_blocks"] == ("typed", "typed")


def test_blocks_fill_the_memory_that_they_may_have(gqa: Path) -> None:
    worker = ModelWorker(RankContext(), model=str(gqa), block_size=8, kv_cache_bytes=1_000_000)
    block_bytes = 4 * 2 * 8 * 2 * 16 * 4  # layers, keys and values, tokens, heads, elements, bytes
    assert worker.available_blocks() == 1_000_000 // block_bytes
    half = ModelWorker(RankContext(), model=str(gqa), block_size=8, kv_cache_bytes=1_000_000, dtype="bfloat16")
    assert half.available_blocks() == 1_000_000 * 2 // block_bytes


# Sampling


def test_draws_do_not_depend_on_the_batch(gqa: Path) -> None:
    batch = prompts(5)
    params = [SamplingParams(0.0), *(SamplingParams(1.0, 0.3 + 0.2 * index, seed=index) for index in range(4))]
    together = generate(single(gqa), batch, new_tokens=16, sampling=params)
    alone = [
        generate(single(gqa), [prompt], new_tokens=16, sampling=[param], chunk=5)[0]
        for prompt, param in zip(batch, params, strict=True)
    ]
    assert together == alone
    other = [SamplingParams(param.temperature, param.top_p, seed=param.seed + 10) for param in params]
    changed = generate(single(gqa), batch, new_tokens=16, sampling=other)
    assert changed[0] == together[0]
    assert all(now != before for now, before in zip(changed[1:], together[1:], strict=True))


def test_draws_are_the_same_on_a_split_model(gqa: Path, tmp_path: Path) -> None:
    # at temperature 20 all tokens are about as likely: none that pads the vocabulary may be among them
    batch, params = prompts(2), [SamplingParams(0.8, 0.9, seed=7), SamplingParams(20.0, 1.0, seed=8)]
    whole = generate(single(gqa), batch, new_tokens=16, sampling=params)
    ranks = split(
        gqa, tmp_path / "x", tp=4, pp=2, generate=lambda step: generate(step, batch, new_tokens=16, sampling=params)
    )
    assert ranks == [whole] * 4


# Errors


def test_bad_arguments_are_refused(gqa: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int4' is not supported; supported are float32, bfloat16"):
        ModelWorker(RankContext(), model=str(gqa), dtype="int4")
    with pytest.raises(ValueError, match="block_size is 0"):
        ModelWorker(RankContext(), model=str(gqa), block_size=0)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        ModelWorker(RankContext(), model=str(gqa)).initialize_kv_cache(0)


def test_steps_need_the_cache_first(gqa: Path) -> None:
    with pytest.raises(RuntimeError, match="call initialize_kv_cache"):
        ModelWorker(RankContext(), model=str(gqa)).execute_model(StepInput([]), None)


@pytest.mark.parametrize(
    ("start", "tokens", "blocks", "message"),
    [
        (0, [101], [0], r"token id 101; valid are 0 to 100"),
        (0, [LAST_SAMPLED], [0], r"token id -1; valid are"),
        (0, [1], [400], r"block ids \[400\]; the KV cache has blocks 0 to 399"),
        (0, [], [0], "has 0 tokens"),
        (3, [1, 2], [0], "has 2 tokens from position 3 and 1 blocks of 4"),
    ],
)
def test_steps_that_cannot_run_are_refused(
    gqa: Path, start: int, tokens: list[int], blocks: list[int], message: str
) -> None:
    step = single(gqa)
    with pytest.raises(ValueError, match=message):
        step(StepInput([ScheduledRequest(0, start, tokens, blocks, True, GREEDY)]))
    assert generate(step, prompts(1), new_tokens=2)  # and the worker goes on


# Training


def test_training_writes_a_checkpoint_that_both_can_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--out", str(tmp_path), "--steps", "2", "--bytes-per-step", "256"])
    assert "step     1/2  loss" in capsys.readouterr().out
    prompt = list(b"import ")
    assert generate(single(tmp_path), [prompt], new_tokens=2) == [reference(tmp_path, prompt, 2)]
