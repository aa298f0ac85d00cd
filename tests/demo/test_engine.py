"""The engine on an executor that the test drives step by step."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from asyncexec import Executor, StepFuture, StepTiming, WorkerDied
from asyncexec.demo.checkpoint import ModelConfig
from asyncexec.demo.engine import AsyncEngine, EngineClosed, Token
from asyncexec.demo.messages import LAST_SAMPLED, SamplingParams, StepInput, StepOutput
from asyncexec.demo.scheduler import FinishReason, InvalidRequest, PromptTooLong
from asyncexec.demo.tokenizer import ByteTokenizer, NoTokenizer, NotText

pytestmark = pytest.mark.timeout(20)

EOS = 100
MODEL = ModelConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
    vocab_size=256,
    max_position_embeddings=64,
    eos_token_id=EOS,
)
TIMING = StepTiming(queued=0, driver=0, wire=0, worker=0, aggregate=0, total=0)


class FakeExecutor:
    """Samples the number after the last token.  Steps stay in flight until the test, or `automatic`, completes them."""

    def __init__(
        self, max_concurrent_batches: int = 1, *, automatic: bool = True, blocks: Sequence[int] = (64,)
    ) -> None:
        self.max_concurrent_batches = max_concurrent_batches
        self.automatic = automatic
        self.blocks = list(blocks)
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.in_flight: list[tuple[StepInput, StepFuture[StepOutput]]] = []
        self.most_in_flight = 0
        self.steps: list[StepInput] = []
        self.refusal: Exception | None = None
        self.submitted = asyncio.Event()
        self._last_sampled: dict[int, int] = {}

    async def collective_rpc(self, method: str, args: tuple[int, ...] = ()) -> list[int]:
        self.calls.append((method, args))
        return self.blocks

    def execute_model(self, step: StepInput) -> StepFuture[StepOutput]:
        if self.refusal is not None:
            raise self.refusal
        loop = asyncio.get_running_loop()
        future = StepFuture[StepOutput](loop)
        self.steps.append(step)
        self.in_flight.append((step, future))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        self.submitted.set()
        if self.automatic:
            loop.call_soon(self.complete)
        return future

    def complete(self) -> None:
        """Complete the oldest step in flight."""
        step, future = self.in_flight.pop(0)
        tokens = []
        for part in step.requests:
            last = part.token_ids[-1]
            if part.sample:
                self._last_sampled[part.slot] = (self._last_sampled[part.slot] if last == LAST_SAMPLED else last) + 1
            tokens.append(self._last_sampled[part.slot] if part.sample else -1)
        future.set_result(StepOutput(tokens), lambda: TIMING)

    def fail(self, error: Exception) -> None:
        """Fail every step in flight, and refuse further ones."""
        self.refusal = error
        for _, future in self.in_flight:
            future.set_exception(error)

    async def step_submitted(self) -> StepInput:
        """Wait for a step that no earlier wait has seen."""
        await self.submitted.wait()
        self.submitted.clear()
        return self.steps[-1]


def engine_on(executor: FakeExecutor, **options: Any) -> AsyncEngine:
    return AsyncEngine(cast(Executor, executor), MODEL, ByteTokenizer(), **options)


async def collect(tokens: AsyncIterator[Token]) -> list[Token]:
    return [token async for token in tokens]


def ids(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


async def test_text_streams_token_by_token() -> None:
    async with engine_on(FakeExecutor()) as engine:
        tokens = await collect(engine.generate("a", max_tokens=3, ignore_eos=True))
        assert tokens == [Token(98, "b"), Token(99, "c"), Token(100, "d", FinishReason.LENGTH)]
        assert len(engine.timings) == 3


async def test_each_token_comes_when_its_step_is_done() -> None:
    executor = FakeExecutor(automatic=False)
    async with engine_on(executor) as engine, aclosing(engine.generate("a", max_tokens=3)) as tokens:
        for expected in (98, 99):
            waiting = asyncio.ensure_future(anext(tokens))
            await executor.step_submitted()
            executor.complete()
            assert (await waiting).token_id == expected


async def test_the_end_of_sequence_ends_the_stream() -> None:
    async with engine_on(FakeExecutor()) as engine:
        tokens = await collect(engine.generate([97], max_tokens=50))
        assert ids(tokens) == [98, 99, 100]
        assert tokens[-1].finish_reason is FinishReason.STOP


async def test_the_context_ends_the_stream() -> None:
    async with engine_on(FakeExecutor()) as engine:
        tokens = await collect(engine.generate([1] * 60, max_tokens=50))
        assert len(tokens) == 4
        assert tokens[-1].finish_reason is FinishReason.LENGTH


async def test_requests_that_come_together_run_together() -> None:
    executor = FakeExecutor()
    async with engine_on(executor) as engine:
        outputs = await asyncio.gather(*(collect(engine.generate([i], max_tokens=5)) for i in range(8)))
    assert [ids(tokens) for tokens in outputs] == [list(range(i + 1, i + 6)) for i in range(8)]
    assert [len(step.requests) for step in executor.steps] == [8] * 5


async def test_a_request_that_comes_later_joins_in() -> None:
    executor = FakeExecutor(automatic=False)
    async with engine_on(executor) as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(collect, engine.generate([1], max_tokens=3))
        await executor.step_submitted()
        tasks.start_soon(collect, engine.generate([2], max_tokens=3))
        executor.complete()
        assert len((await executor.step_submitted()).requests) == 2
        executor.automatic = True
        executor.complete()


@pytest.mark.parametrize("ahead", [False, True])
async def test_as_many_steps_as_the_executor_runs_are_in_flight(ahead: bool) -> None:
    executor = FakeExecutor(2, automatic=False)
    async with engine_on(executor, async_scheduling=ahead) as engine, anyio.create_task_group() as tasks:
        for prompt in ([1], [2]):
            tasks.start_soon(collect, engine.generate(prompt, max_tokens=8))
        await executor.step_submitted()
        for _ in range(7):
            while len(executor.in_flight) < 2:
                await executor.step_submitted()
            executor.complete()
        tasks.cancel_scope.cancel()
    assert executor.most_in_flight == 2
    assert {len(step.requests) for step in executor.steps} == {2 if ahead else 1}


async def test_a_free_slot_is_taken_at_once_by_a_newcomer() -> None:
    executor = FakeExecutor(2, automatic=False)
    async with engine_on(executor) as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(collect, engine.generate([1], max_tokens=8))
        await executor.step_submitted()
        tasks.start_soon(collect, engine.generate([2], max_tokens=8))
        await executor.step_submitted()
        assert len(executor.in_flight) == 2
        tasks.cancel_scope.cancel()


async def test_running_ahead_says_the_same_and_nothing_after_the_end() -> None:
    async with engine_on(FakeExecutor(2), async_scheduling=True) as engine:
        outputs = await asyncio.gather(*(collect(engine.generate([i], max_tokens=9)) for i in (90, 93, 97)))
        assert [ids(tokens) for tokens in outputs] == [list(range(91, 100)), list(range(94, 101)), [98, 99, 100]]


async def _in_task_group(work: Awaitable[Any], started: asyncio.Event) -> None:
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await work

        tasks.start_soon(run)
        await started.wait()
        tasks.cancel_scope.cancel()


async def _as_task(work: Awaitable[Any], started: asyncio.Event) -> None:
    task = asyncio.ensure_future(work)
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _move_on(work: Awaitable[Any], started: asyncio.Event) -> None:
    with anyio.move_on_after(0):
        await work


async def _asyncio_timeout(work: Awaitable[Any], started: asyncio.Event) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await work


@pytest.mark.parametrize("cancel", [_in_task_group, _as_task, _move_on, _asyncio_timeout])
async def test_cancelling_a_request_frees_its_blocks_and_disturbs_nobody(
    cancel: Callable[[Awaitable[Any], asyncio.Event], Awaitable[None]],
) -> None:
    executor = FakeExecutor(2, automatic=False)
    async with engine_on(executor) as engine:
        other = asyncio.ensure_future(collect(engine.generate([1], max_tokens=3)))
        await executor.step_submitted()
        await cancel(collect(engine.generate([2], max_tokens=30)), executor.submitted)
        executor.automatic = True
        while executor.in_flight:
            executor.complete()
        assert ids(await other) == [2, 3, 4]
        assert engine.load.free_blocks == engine.load.num_blocks


async def test_a_request_cancelled_in_flight_keeps_its_blocks_until_the_step_is_done() -> None:
    executor = FakeExecutor(automatic=False)
    async with engine_on(executor) as engine:
        cancelled = asyncio.ensure_future(collect(engine.generate([1], max_tokens=30)))
        await executor.step_submitted()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert engine.load.running == 0
        assert engine.load.free_blocks == engine.load.num_blocks - 1
        executor.automatic = True
        executor.complete()
        assert ids(await collect(engine.generate([5], max_tokens=2))) == [6, 7]
        assert engine.load.free_blocks == engine.load.num_blocks


async def test_a_stream_that_is_closed_or_dropped_frees_its_blocks() -> None:
    async with engine_on(FakeExecutor()) as engine:
        async with aclosing(engine.generate([1], max_tokens=30)) as tokens:
            assert (await anext(tokens)).token_id == 2
        async for _ in engine.generate([1], max_tokens=30):
            break
        gc.collect()
        assert ids(await collect(engine.generate([5], max_tokens=2))) == [6, 7]
        assert engine.load.free_blocks == engine.load.num_blocks
        assert engine.load.running == engine.load.waiting == 0


async def test_a_stream_that_is_never_iterated_costs_nothing() -> None:
    executor = FakeExecutor()
    async with engine_on(executor) as engine:
        stream = engine.generate([1], max_tokens=30)
        assert ids(await collect(engine.generate([5], max_tokens=2))) == [6, 7]
        await stream.aclose()
    assert all(len(step.requests) == 1 for step in executor.steps)


async def test_a_failure_fails_every_open_stream_with_the_same_error() -> None:
    executor = FakeExecutor(2, automatic=False)
    error = WorkerDied("rank 1 was killed", rank=1)
    async with engine_on(executor, max_num_seqs=2) as engine:
        streams = [asyncio.ensure_future(collect(engine.generate([i], max_tokens=30))) for i in range(3)]
        while len(executor.in_flight) < 2:
            await executor.step_submitted()
        executor.fail(error)
        assert await asyncio.gather(*streams, return_exceptions=True) == [error] * 3
        with pytest.raises(WorkerDied) as refused:
            engine.generate([1], max_tokens=3)
        assert refused.value is error


async def test_a_refused_step_fails_every_open_stream() -> None:
    executor = FakeExecutor()
    executor.refusal = error = WorkerDied("gone")
    async with engine_on(executor) as engine:
        with pytest.raises(WorkerDied) as failed:
            await collect(engine.generate([1], max_tokens=30))
        assert failed.value is error


async def test_tokens_that_came_before_a_failure_are_delivered() -> None:
    executor = FakeExecutor(automatic=False)
    async with engine_on(executor) as engine:
        stream = engine.generate([1], max_tokens=30)
        first = asyncio.ensure_future(anext(stream))
        await executor.step_submitted()
        executor.complete()
        await executor.step_submitted()
        executor.complete()
        await executor.step_submitted()
        executor.fail(WorkerDied("gone"))
        assert (await first).token_id == 2
        assert (await anext(stream)).token_id == 3
        with pytest.raises(WorkerDied):
            await anext(stream)


async def test_leaving_the_engine_ends_open_streams() -> None:
    executor = FakeExecutor(automatic=False)
    async with engine_on(executor) as engine:
        stream = asyncio.ensure_future(collect(engine.generate([1], max_tokens=30)))
        late = engine.generate([1], max_tokens=3)
        await executor.step_submitted()
    with pytest.raises(EngineClosed, match="closed before the request had ended"):
        await stream
    with pytest.raises(EngineClosed):
        await collect(late)
    with pytest.raises(EngineClosed):
        engine.generate([1], max_tokens=30)


async def test_an_engine_that_was_not_entered_is_not_open() -> None:
    with pytest.raises(EngineClosed, match="async with"):
        engine_on(FakeExecutor()).generate([1], max_tokens=30)


async def test_the_error_of_the_block_is_not_wrapped() -> None:
    with pytest.raises(KeyError):
        async with engine_on(FakeExecutor()):
            raise KeyError


@asynccontextmanager
async def _anyio_deadline() -> AsyncIterator[None]:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0):
            yield


@asynccontextmanager
async def _asyncio_deadline() -> AsyncIterator[None]:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            yield


@pytest.mark.parametrize("deadline", [_anyio_deadline, _asyncio_deadline])
async def test_a_deadline_around_the_engine_is_kept(
    deadline: Callable[[], AbstractAsyncContextManager[None]],
) -> None:
    async with deadline(), engine_on(FakeExecutor(automatic=False)) as engine:
        await collect(engine.generate([1], max_tokens=30))


async def test_every_rank_gets_a_cache_of_the_size_that_all_can_have() -> None:
    executor = FakeExecutor(blocks=[40, 30])
    async with engine_on(executor) as engine:
        assert engine.load.num_blocks == 30
    assert executor.calls == [("available_blocks", ()), ("initialize_kv_cache", (30,))]


async def test_the_cache_is_no_larger_than_it_can_be_of_use() -> None:
    executor = FakeExecutor(blocks=[10**9])
    async with engine_on(executor, max_num_seqs=3, block_size=10):
        assert executor.calls[1] == ("initialize_kv_cache", (3 * 7,))


async def test_long_prompts_and_full_caches_end_well() -> None:
    executor = FakeExecutor(2, blocks=[12])
    async with engine_on(executor, block_size=4, max_num_batched_tokens=8) as engine:
        outputs = await asyncio.gather(*(collect(engine.generate([i] * 20, max_tokens=20)) for i in range(5)))
        assert [ids(tokens) for tokens in outputs] == [list(range(i + 1, i + 21)) for i in range(5)]
        assert engine.load.free_blocks == 12


GREEDY = SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "sampling", "error", "message"),
    [
        ("", 1, GREEDY, InvalidRequest, "the prompt is empty"),
        ([], 1, GREEDY, InvalidRequest, "the prompt is empty"),
        ([1, 256], 1, GREEDY, InvalidRequest, "token id 256 .* vocabulary: 0 to 255"),
        ([-1], 1, GREEDY, InvalidRequest, "token id -1 "),
        ([1] * 70, 1, GREEDY, PromptTooLong, "has 70 tokens.* context is 64"),
        ([1], 0, GREEDY, InvalidRequest, "max_tokens must be at least 1"),
        ([1] * 40, 20, GREEDY, InvalidRequest, "whole KV cache holds 48"),
        ([1], 1, SamplingParams(temperature=-1.0), InvalidRequest, "temperature must be 0 or above, not -1.0"),
        ([1], 1, SamplingParams(temperature=float("nan")), InvalidRequest, "temperature"),
        ([1], 1, SamplingParams(top_p=0.0), InvalidRequest, "top_p must be above 0 and at most 1, not 0.0"),
    ],
)
async def test_bad_requests_are_refused_at_once(
    prompt: str | list[int], max_tokens: int, sampling: SamplingParams, error: type[Exception], message: str
) -> None:
    async with engine_on(FakeExecutor(blocks=[3])) as engine:
        with pytest.raises(error, match=message):
            engine.generate(prompt, max_tokens=max_tokens, sampling=sampling)


async def test_text_without_a_tokenizer_is_refused() -> None:
    executor = cast(Executor, FakeExecutor())
    async with AsyncEngine(executor, MODEL, NoTokenizer("/models/none")) as engine:
        with pytest.raises(NotText, match="/models/none"):
            engine.generate("a", max_tokens=1)
        assert ids(await collect(engine.generate([1], max_tokens=2))) == [2, 3]
