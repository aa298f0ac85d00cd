"""`asyncexec demo`: what it prints, and what it says to arguments that cannot work."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from asyncexec import ConfigError, StepTiming
from asyncexec.demo.command import PROMPTS, SHIPPED_CHECKPOINT, Job, add_arguments, run
from asyncexec.demo.display import Generation, LiveDisplay, PlainDisplay
from asyncexec.demo.engine import Token
from asyncexec.demo.messages import SamplingParams
from asyncexec.demo.random_checkpoint import write_random_checkpoint
from asyncexec.demo.scheduler import FinishReason
from asyncexec.demo.summary import Latency, Summary, latencies

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a byte-level vocabulary."""
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=64)


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer."""
    return write_random_checkpoint(
        tmp_path_factory.mktemp("wordless"), vocab_size=50, bos_token_id=None, eos_token_id=None
    )


def parse(*arguments: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def run_local(model: Path, *arguments: str) -> int:
    return run(parse("--transport", "local", "--model", model, *arguments))


def test_by_default_the_shipped_checkpoint_runs_on_two_by_two_ranks() -> None:
    job = Job.from_arguments(parse())
    assert job.directory == SHIPPED_CHECKPOINT
    assert (job.config.tensor_parallel_size, job.config.pipeline_parallel_size) == (2, 2)
    assert (job.config.transport, job.dtype) == ("nccl", "float32")
    assert [generation.prompt for generation in job.generations] == list(PROMPTS)
    assert job.layout == "tiny, float32, nccl, tp 2 x pp 2, steps in flight: 2"


def test_local_has_one_rank_and_prompts_are_continued_greedily() -> None:
    job = Job.from_arguments(parse("--transport", "local", "--prompt", "a", "--async-scheduling", "--top-p", "0.5"))
    assert job.config.world_size == 1
    assert job.config.max_concurrent_batches == 2
    assert job.sampling == SamplingParams(temperature=0.0, top_p=0.5, seed=0)


def test_json_is_one_object_per_prompt_in_the_order_given(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "ab", "--prompt-ids", "7,8,9", "--prompt", "é", "--max-tokens", "5", "--ignore-eos"]
    assert run_local(model, *arguments, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [result["prompt_ids"] for result in results] == [[256, 97, 98], [7, 8, 9], [256, 0xC3, 0xA9]]
    for result in results:
        assert list(result) == ["prompt_ids", "output_ids", "text"]
        assert len(result["output_ids"]) == 5
        assert result["text"] == bytes(i for i in result["output_ids"] if i < 256).decode(errors="replace")


def test_async_scheduling_changes_nothing_and_a_seed_decides(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for extra in ([], ["--async-scheduling"], ["--temperature", "1", "--seed", "1"], ["--temperature", "1"]):
        run_local(model, "--prompt", "def ", "--max-tokens", "20", "--json", *extra)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(set(outputs)) == 3


def test_token_ids_are_enough_without_a_tokenizer(wordless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_local(wordless, "--prompt-ids", "1,2,3", "--max-tokens", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- 1: 1,2,3 (4/4 tokens, length)"
    assert all(0 <= int(token) < 50 for token in lines[1].split())
    assert len(lines[1].split()) == 4


def test_output_that_is_no_terminal_is_plain_and_ends_with_a_summary(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", "one", "--prompt", "two", "--max-tokens", "3", "--ignore-eos"]
    assert run_local(model, *arguments) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.index("--- 1: 'one' (3/3 tokens, length)") < out.index("--- 2: 'two' (3/3 tokens, length)")
    for part in ("driver", "queued", "wire", "worker", "aggregate", "total", "p50", "p99", "tokens/s"):
        assert part in out
    assert "6 tokens of 2 requests" in out
    assert "float32, local, tp 1 x pp 1, steps in flight: 1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x" * 80], "the prompt has 81 tokens, and the model's context is 64"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt-ids", "1,300"], "token id 300 .* vocabulary: 0 to 257"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens must be at least 1, not 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0 or above"),
        (["--prompt", "a", "--tp", "0"], "tensor_parallel_size is 0"),
        (["--prompt", "a", "--tp", "2"], "tensor_parallel_size|one rank|1 rank"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        run_local(model, *arguments, "--json")
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_none_is_told(model: Path, wordless: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such directory"):
        run_local(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        run_local(tmp_path)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="has no weights") as refused:
        run_local(tmp_path, "--prompt", "a")
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json, so give the prompt as token ids, not as 'a'"):
        run_local(wordless, "--prompt", "a")


def test_a_model_that_cannot_be_split_is_told(model: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=3") as refused:
        run(parse("--model", model, "--tp", "3", "--pp", "1", "--prompt", "a"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ids", ["", "1,x", "1;2"])
def test_token_ids_are_numbers(ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--prompt-ids", ids)
    assert left.value.code == 2
    assert f"token ids are whole numbers with commas between, not {ids!r}" in capsys.readouterr().err


SUMMARY = Summary(
    layout="tiny", num_requests=2, num_tokens=10, seconds=2.0, num_steps=5, latencies={"total": Latency(0.001, 0.0125)}
)


def terminal() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=True, width=60, height=24, highlight=False, color_system=None), output


def shown(display: LiveDisplay) -> str:
    """What the live part of a display looks like now."""
    console, output = terminal()
    console.print(display._render())
    return output.getvalue()


def test_a_terminal_shows_the_texts_as_they_grow() -> None:
    first, second = Generation("def ", [1], 3), Generation([7, 8], [7, 8], 3, knows_text=False)
    console, output = terminal()
    with LiveDisplay([first, second], "tiny on nccl", console) as display:
        assert "starting tiny on nccl" in shown(display)
        first.add(Token(5, "f(x):\n  a\n"))
        first.add(Token(6, "\x1b[31mred\x07"))
        second.add(Token(9, ""))
        assert "2/3 tokens" in shown(display)
        assert "\ufffd[31mred\ufffd" in shown(display)
        first.add(Token(7, "!", FinishReason.STOP))
        display.update(first)
        assert "def f(x):" not in shown(display)
        assert "7,8" in shown(display)
        assert "def f(x):" in output.getvalue()
        assert "3/3 tokens, stop" in output.getvalue()
        display.summarize(SUMMARY)
    assert "\x1b[31m" not in output.getvalue()
    assert "5 tokens/s: 10 tokens of 2 requests in 2.0 s and 5 steps" in output.getvalue()
    assert "12.50" in output.getvalue()


def test_many_requests_fit_a_small_terminal() -> None:
    requests = [Generation(f"prompt {i}", [i], 3) for i in range(50)]
    for request in requests:
        request.add(Token(1, "line\n" * 30))
    console, _ = terminal()
    assert len(shown(LiveDisplay(requests, "tiny", console)).splitlines()) < 24


def test_plain_output_waits_for_those_before() -> None:
    requests = [Generation("a", [1], 1), Generation("b", [2], 1)]
    console, output = terminal()
    with PlainDisplay(requests, console) as display:
        requests[1].add(Token(1, "B", FinishReason.LENGTH))
        display.update(requests[1])
        assert output.getvalue() == ""
        requests[0].add(Token(1, "A", FinishReason.LENGTH))
        display.update(requests[0])
        assert output.getvalue() == "--- 1: 'a' (1/1 tokens, length)\naA\n--- 2: 'b' (1/1 tokens, length)\nbB\n"


def timing(total: float) -> StepTiming:
    parts: dict[str, Any] = dict.fromkeys(("driver", "queued", "wire", "worker", "aggregate"), 0.0)
    return StepTiming(**parts, total=total)


def test_percentiles_are_of_what_was_measured() -> None:
    assert latencies([]) == {}
    assert latencies([timing(3.0)])["total"] == Latency(3.0, 3.0)
    spread = latencies([timing(float(i)) for i in range(100, 0, -1)])
    assert spread["total"] == Latency(50.0, 99.0)
    assert spread["wire"] == Latency(0.0, 0.0)
