"""`asyncexec demo`: generates text with a Llama checkpoint that is split over several worker processes."""

import argparse
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import anyio

from asyncexec import ConfigError, ExecutorConfig, WorkerStartError, create_executor
from asyncexec import run as run_coroutine
from asyncexec.demo.checkpoint import CheckpointError, ModelConfig
from asyncexec.demo.display import Display, Generation, make_display
from asyncexec.demo.engine import AsyncEngine, Token
from asyncexec.demo.messages import SamplingParams
from asyncexec.demo.scheduler import InvalidRequest
from asyncexec.demo.summary import Summary, latencies
from asyncexec.demo.tokenizer import NotText, Tokenizer, load_tokenizer

SHIPPED_CHECKPOINT = Path(__file__).parent / "tiny"
PROMPTS = ("def ", "import os\n", "class ", "    for ", "if __name__ == ", "# This ")
PROMPTS_TEMPERATURE = 0.6
"""For the prompts above: a model this small repeats itself when it is greedy."""
WORKER = "asyncexec.demo.worker:ModelWorker"
BLOCK_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="a Hugging Face checkpoint of a Llama model (default: a small one)")
    add("--tp", type=int, metavar="N", help="tensor-parallel ranks (default: 2, or 1 on local)")
    add("--pp", type=int, metavar="N", help="pipeline stages (default: 2, or 1 on local)")
    add("--transport", default="nccl", help="nccl, ray, local or another installed transport (default: nccl)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and cache (default: float32)")
    add("--prompt", dest="prompts", action="append", metavar="TEXT", help="repeatable; by default, some of Python")
    add(
        "--prompt-ids",
        dest="prompts",
        action="append",
        type=_token_ids,
        metavar="1,2,3",
        help="a prompt as token ids; repeatable, also together with --prompt",
    )
    add("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate per prompt (default: 128)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: 0, or 0.6 without a prompt)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens only (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="for a temperature above 0 (default: 0)")
    add("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    add("--async-scheduling", action="store_true", help="with --pp 1: keep two steps of each request in flight")
    add("--json", action="store_true", help="print one JSON object per prompt and nothing else")


def run(args: argparse.Namespace) -> int:
    """Run the command; the arguments are those of `add_arguments`.

    Returns:
        The exit status.

    Raises:
        ConfigError: the arguments, the checkpoint or a prompt cannot work; says why in one line.
        TransportUnavailable: there is no such transport here.
        AsyncExecError: the executor failed.
    """
    try:
        job = Job.from_arguments(args)
        with make_display(job.generations, job.layout, as_json=args.json) as display:
            display.summarize(run_coroutine(job.run(display)))
    except (CheckpointError, InvalidRequest, NotText) as error:
        raise ConfigError(str(error)) from error
    except WorkerStartError as error:
        # What is wrong with the checkpoint is the user's to know; on which rank it showed is not.
        if error.remote_type.rpartition(".")[2] == CheckpointError.__name__:
            raise ConfigError(error.remote_message) from error
        raise
    return 0


@dataclass(frozen=True, slots=True)
class Job:
    """What the command was asked to do.

    Attributes:
        directory: of the checkpoint.
        model: its configuration.
        tokenizer: its tokenizer.
        dtype: of weights and cache.
        config: how its ranks run.
        sampling: how tokens are chosen, for all requests.
        ignore_eos: whether all requests go on to `max_tokens`.
        generations: the requests.
    """

    directory: Path
    model: ModelConfig
    tokenizer: Tokenizer
    dtype: str
    config: ExecutorConfig
    sampling: SamplingParams
    ignore_eos: bool
    generations: Sequence[Generation]

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Self:
        """Read what the arguments name.

        Raises:
            ConfigError: sizes or a transport's options that cannot work.
            CheckpointError: no checkpoint there, or none that can be run.
            NotText: a text prompt for a checkpoint without a tokenizer.
        """
        directory = args.model or SHIPPED_CHECKPOINT
        model = ModelConfig.from_directory(directory)
        tokenizer = load_tokenizer(directory, model)
        ranks = 1 if args.transport == "local" else 2
        temperature = 0.0 if args.prompts else PROMPTS_TEMPERATURE
        return cls(
            directory=directory,
            model=model,
            tokenizer=tokenizer,
            dtype=args.dtype,
            config=ExecutorConfig(
                transport=args.transport,
                tensor_parallel_size=ranks if args.tp is None else args.tp,
                pipeline_parallel_size=ranks if args.pp is None else args.pp,
                async_scheduling=args.async_scheduling,
            ),
            sampling=SamplingParams(
                temperature if args.temperature is None else args.temperature, args.top_p, args.seed
            ),
            ignore_eos=args.ignore_eos,
            generations=[_generation(prompt, tokenizer, args.max_tokens) for prompt in args.prompts or PROMPTS],
        )

    @property
    def layout(self) -> str:
        """How the model is run, in words."""
        config = self.config
        sizes = f"tp {config.tensor_parallel_size} x pp {config.pipeline_parallel_size}"
        name = self.directory.resolve().name
        return f"{name}, {self.dtype}, {config.transport}, {sizes}, steps in flight: {config.max_concurrent_batches}"

    async def run(self, display: Display) -> Summary:
        """Run all requests at once to their end."""
        executor = create_executor(
            self.config,
            WORKER,
            worker_kwargs={"model": str(self.directory), "dtype": self.dtype, "block_size": BLOCK_SIZE},
        )
        engine = AsyncEngine(
            executor,
            self.model,
            self.tokenizer,
            block_size=BLOCK_SIZE,
            async_scheduling=self.config.async_scheduling and self.config.pipeline_parallel_size == 1,
        )
        async with executor, engine:
            streams = [
                engine.generate(
                    generation.prompt,
                    max_tokens=generation.max_tokens,
                    sampling=self.sampling,
                    ignore_eos=self.ignore_eos,
                )
                for generation in self.generations
            ]
            started = time.perf_counter()
            try:
                async with anyio.create_task_group() as tasks:
                    for generation, stream in zip(self.generations, streams, strict=True):
                        tasks.start_soon(_follow, stream, generation, display)
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # An executor that fails tells every request the same.
            seconds = time.perf_counter() - started
        return Summary(
            layout=self.layout,
            num_requests=len(self.generations),
            num_tokens=sum(len(generation.output_ids) for generation in self.generations),
            seconds=seconds,
            num_steps=len(engine.timings),
            latencies=latencies(engine.timings),
        )


async def _follow(stream: AsyncGenerator[Token, None], generation: Generation, display: Display) -> None:
    async with aclosing(stream):
        async for token in stream:
            generation.add(token)
            display.update(generation)


def _generation(prompt: str | Sequence[int], tokenizer: Tokenizer, max_tokens: int) -> Generation:
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return Generation(prompt, prompt_ids, max_tokens, tokenizer.knows_text)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"token ids are whole numbers with commas between, not {text!r}") from None
