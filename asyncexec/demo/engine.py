"""The engine: `async for token in engine.generate(...)`, any number of times at once.

Two tasks do the work, and neither ever polls:

- `_dispatch` asks the scheduler for steps and submits them, until as many as the executor runs at once are in flight.
  It wakes up when something changed: a request came or left, or a step completed.
- `_collect` awaits the steps in order, and hands their tokens to the requests' streams.

They live in a task group that belongs to the engine, so they cannot outlive its `async with` block.
"""

import math
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from asyncexec import AsyncExecError, Executor, StepFuture, StepTiming
from asyncexec.demo.checkpoint import ModelConfig
from asyncexec.demo.messages import SamplingParams, StepOutput
from asyncexec.demo.scheduler import FinishReason, InvalidRequest, Request, Scheduler, SchedulerLimits, Step
from asyncexec.demo.tokenizer import Tokenizer

KEPT_TIMINGS = 10_000
GREEDY = SamplingParams()

_StepInFlight: TypeAlias = tuple[Step, StepFuture[StepOutput]]
_SampledToken: TypeAlias = tuple[int, FinishReason | None]


class EngineClosed(AsyncExecError):
    """The engine is not open (any more): the rest of the output will never come."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        token_id: its number in the vocabulary.
        text: the characters that it completes; may be empty, or several.
        finish_reason: set on a request's last token.
    """

    token_id: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is.

    Attributes:
        running: requests that generate.
        waiting: requests that wait for their turn.
        free_blocks: blocks of the KV cache that are free.
        num_blocks: all of them.
    """

    running: int
    waiting: int
    free_blocks: int
    num_blocks: int


class AsyncEngine:
    """Generates text for many requests at once, on an executor whose worker is `asyncexec.demo.worker:ModelWorker`.

    Use it within the executor's own block, and from the tasks of its event loop:

        async with create_executor(...) as executor, AsyncEngine(executor, model, tokenizer) as engine:
            async for token in engine.generate("def ", max_tokens=64):
                print(token.text, end="")

    Args:
        executor: started, and used by nobody else.
        model: the checkpoint's configuration, for its context, vocabulary and ends of text.
        tokenizer: turns text into token ids and back.
        block_size: tokens in a block of the KV cache; the worker's `block_size`.
        max_num_seqs: requests that run at a time; more wait.
        max_num_batched_tokens: tokens in one step; longer prompts run in several.
        async_scheduling: schedule a request's next step before its last token is known.  This takes a single pipeline
            stage, as the first stage is not where tokens are sampled.

    Attributes:
        timings: where the time of each of the last 10,000 steps went.
    """

    def __init__(
        self,
        executor: Executor,
        model: ModelConfig,
        tokenizer: Tokenizer,
        *,
        block_size: int = 16,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        async_scheduling: bool = False,
    ) -> None:
        self.timings: deque[StepTiming] = deque(maxlen=KEPT_TIMINGS)
        self._executor = executor
        self._model = model
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._async_scheduling = async_scheduling
        self._streams: dict[Request, MemoryObjectSendStream[_SampledToken]] = {}
        self._changed = anyio.Event()
        self._failure: Exception | None = EngineClosed("the engine is not open; use it with `async with`")

    async def __aenter__(self) -> Self:
        """Allocate the KV cache on every rank, and begin to step."""
        self._scheduler = Scheduler(await self._allocate_cache())
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._run)
        self._failure = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop stepping.  Streams that are still open raise EngineClosed."""
        self._fail(EngineClosed("the engine was closed before the request had ended"))
        self._tasks.cancel_scope.cancel()
        # The block's own error is none of the task group's, which would wrap it in an ExceptionGroup.
        await self._tasks.__aexit__(None, None, None)

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is."""
        scheduler = self._scheduler
        return EngineLoad(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.num_free_blocks,
            num_blocks=scheduler.limits.num_blocks,
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        sampling: SamplingParams = GREEDY,
        ignore_eos: bool = False,
    ) -> AsyncGenerator[Token, None]:
        """The tokens that follow a prompt, as they come.

        The request is queued when the iteration begins.  Cancelling or closing the iteration, or dropping it, aborts
        the request and frees its blocks; nobody else is disturbed.

        Args:
            prompt: text, or token ids.
            max_tokens: tokens to generate at most; fewer where the model ends the text or the context is full.
            sampling: how each token is chosen; greedily by default.
            ignore_eos: go on after an end-of-sequence token.

        Raises:
            PromptTooLong: the prompt fills the model's context.
            InvalidRequest: an empty prompt, token ids out of the vocabulary, sampling parameters or `max_tokens` out
                of range, or a request that the whole KV cache cannot hold.
            NotText: text, where the checkpoint has no tokenizer.
            EngineClosed: the engine is not open, or was closed meanwhile.
            AsyncExecError: the executor failed, and every open stream with it.
        """
        self._check_open()
        _check_sampling(sampling)
        request = Request(self._prompt_ids(prompt), max_tokens, sampling, ignore_eos)
        self._scheduler.check(request)
        return self._generate(request)

    async def _generate(self, request: Request) -> AsyncGenerator[Token, None]:
        detokenizer = self._tokenizer.detokenizer(request.prompt_ids)
        with self._queued(request) as tokens:
            async for token_id, finish_reason in tokens:
                text = detokenizer.add(token_id)
                if finish_reason is not None:
                    text += detokenizer.finish()
                yield Token(token_id, text, finish_reason)
        if request.finish_reason is FinishReason.ABORTED:
            self._check_open()

    @contextmanager
    def _queued(self, request: Request) -> Iterator[MemoryObjectReceiveStream[_SampledToken]]:
        """Have a request run for as long as the context lasts, or until it ends by itself."""
        self._check_open()
        sender, receiver = anyio.create_memory_object_stream[_SampledToken](math.inf)
        with sender, receiver:
            self._scheduler.add(request)
            self._streams[request] = sender
            self._changed.set()
            try:
                yield receiver
            finally:
                del self._streams[request]
                self._scheduler.abort(request)
                self._changed.set()

    async def _run(self) -> None:
        sender, receiver = anyio.create_memory_object_stream[_StepInFlight](self._executor.max_concurrent_batches)
        try:
            async with sender, receiver, anyio.create_task_group() as tasks:
                tasks.start_soon(self._dispatch, sender)
                tasks.start_soon(self._collect, receiver)
        except* Exception as errors:  # noqa: BLE001 (every open stream raises it)
            self._fail(errors.exceptions[0])

    async def _dispatch(self, in_flight: MemoryObjectSendStream[_StepInFlight]) -> None:
        """Keep as many steps in flight as the executor runs at once."""
        while True:
            self._changed = anyio.Event()
            while step := self._scheduler.schedule():
                await in_flight.send((step, self._executor.execute_model(step.input)))
            await self._changed.wait()

    async def _collect(self, in_flight: MemoryObjectReceiveStream[_StepInFlight]) -> None:
        """Hand each step's tokens out as it completes."""
        async for step, future in in_flight:
            output = await future
            if timing := future.timing:
                self.timings.append(timing)
            for request, token_id in self._scheduler.complete(step, output.token_ids):
                self._streams[request].send_nowait((token_id, request.finish_reason))
                if request.finish_reason is not None:
                    self._streams[request].close()
            self._changed.set()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: Exception) -> None:
        """End every open stream with an error, unless there was one before."""
        if self._failure is None:
            self._failure = error
        for request, stream in self._streams.items():
            self._scheduler.abort(request)
            stream.close()

    async def _allocate_cache(self) -> SchedulerLimits:
        """Give every rank a KV cache of the same size, and tell what fits."""
        context = self._model.max_position_embeddings
        available: list[int] = await self._executor.collective_rpc("available_blocks")
        useful = self._max_num_seqs * math.ceil(context / self._block_size)
        num_blocks = min(*available, useful)
        await self._executor.collective_rpc("initialize_kv_cache", (num_blocks,))
        return SchedulerLimits(
            num_blocks=num_blocks,
            block_size=self._block_size,
            max_model_len=context,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            max_concurrent_batches=self._executor.max_concurrent_batches,
            max_steps_per_request=self._executor.max_concurrent_batches if self._async_scheduling else 1,
            eos_token_ids=frozenset(self._model.eos_token_ids),
        )

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if len(prompt) == 0:
            raise InvalidRequest("the prompt is empty")
        token_ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        for token_id in token_ids:
            if not 0 <= token_id < self._model.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} of the prompt is not in the vocabulary: 0 to {self._model.vocab_size - 1}"
                )
        return token_ids


def _check_sampling(sampling: SamplingParams) -> None:
    if not 0 <= sampling.temperature < math.inf:
        raise InvalidRequest(f"temperature must be 0 or above, not {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, not {sampling.top_p}")
