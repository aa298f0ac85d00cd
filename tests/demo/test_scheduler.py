"""The scheduler against a simulated worker, which has a real (if tiny) paged cache and trusts nobody."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncexec.demo.messages import LAST_SAMPLED, StepInput
from asyncexec.demo.scheduler import (
    FinishReason,
    InvalidRequest,
    PromptTooLong,
    Request,
    Scheduler,
    SchedulerLimits,
    Step,
)

EOS = 0
VOCABULARY = 11


def next_token(sequence: list[int]) -> int:
    """The simulated model: every token before counts."""
    state = 7
    for token in sequence:
        state = (state * 31 + token + 1) % 10007
    return state % VOCABULARY


def expected_output(request: Request, limits: SchedulerLimits) -> list[int]:
    """What the model says when nothing else runs."""
    sequence = list(request.prompt_ids)
    while len(sequence) < min(len(request.prompt_ids) + request.max_tokens, limits.max_model_len):
        sequence.append(next_token(sequence))
        if sequence[-1] in limits.eos_token_ids and not request.ignore_eos:
            break
    return sequence[len(request.prompt_ids) :]


class SimulatedWorker:
    """Keeps tokens in blocks where a real worker keeps keys and values, and samples from what it finds there."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cache: dict[tuple[int, int], int] = {}
        self.last_sampled: dict[int, int] = {}

    def execute(self, step: StepInput) -> list[int]:
        sampled = []
        for part in step.requests:
            end = part.start + len(part.token_ids)
            cells = [(part.block_ids[i // self.block_size], i % self.block_size) for i in range(end)]
            for cell, token in zip(cells[part.start :], part.token_ids, strict=True):
                self.cache[cell] = self.last_sampled[part.slot] if token == LAST_SAMPLED else token
            if part.sample:
                self.last_sampled[part.slot] = next_token([self.cache[cell] for cell in cells])
            sampled.append(self.last_sampled[part.slot] if part.sample else -1)
        return sampled


class Bench:
    """A scheduler, its worker and the steps between them; checks every rule after every event."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.worker = SimulatedWorker(limits.block_size)
        self.in_flight: list[Step] = []
        self.requests: list[Request] = []
        self.first_steps: list[Request] = []
        self.outputs: dict[Request, list[int]] = {}
        self.preemptions = 0

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.requests.append(request)
            self.outputs[request] = []

    def schedule(self) -> Step | None:
        computed = {request: request.num_computed for request in self.requests}
        step = self.scheduler.schedule()
        self.preemptions += sum(request.num_computed < computed[request] for request in self.requests)
        if step is not None:
            self.in_flight.append(step)
            self.first_steps += [request for request in step.requests if request not in self.first_steps]
            self.check_step(step)
        self.check()
        return step

    def complete(self) -> None:
        step = self.in_flight.pop(0)
        for request, token in self.scheduler.complete(step, self.worker.execute(step.input)):
            self.outputs[request].append(token)
        self.check()

    def abort(self, request: Request) -> None:
        self.scheduler.abort(request)
        self.check()

    def run(self) -> None:
        """Run what there is to its end, with as many steps in flight as allowed."""
        while any(request.finish_reason is None for request in self.requests):
            while self.schedule():
                pass
            assert self.in_flight, "requests are left, nothing is in flight, and nothing can be scheduled"
            self.complete()
        while self.in_flight:
            self.complete()

    def check_step(self, step: Step) -> None:
        assert 0 < len(step.requests) <= self.limits.max_num_seqs
        assert sum(len(part.token_ids) for part in step.input.requests) <= self.limits.max_num_batched_tokens
        assert len(self.in_flight) <= self.limits.max_concurrent_batches
        for request, part in zip(step.requests, step.input.requests, strict=True):
            assert request.finish_reason is None
            assert sum(request in other.requests for other in self.in_flight) <= self.limits.max_steps_per_request
            assert len(part.block_ids) == -(-(part.start + len(part.token_ids)) // self.limits.block_size)
            if part.start == 0:
                before = self.requests[: self.requests.index(request)]
                assert all(earlier.slot >= 0 for earlier in before if earlier.finish_reason is None), "overtaken"

    def check(self) -> None:
        """Every block and slot has one owner or none, and what steps in flight write to is owned."""
        held = [block for request in self.requests for block in request.block_ids]
        assert len(held) == len(set(held)) == self.limits.num_blocks - self.scheduler.num_free_blocks
        slots = [request.slot for request in self.requests if request.slot >= 0]
        assert len(slots) == len(set(slots))
        assert all(0 <= slot < self.limits.max_num_seqs for slot in slots)
        for step in self.in_flight:
            for request, part in zip(step.requests, step.input.requests, strict=True):
                assert request.slot == part.slot
                assert request.block_ids[: len(part.block_ids)] == part.block_ids

    def check_end(self) -> None:
        """Everything came back, and everybody got what the model says, in one piece."""
        assert self.scheduler.num_free_blocks == self.limits.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        for request in self.requests:
            expected = expected_output(request, self.limits)
            assert self.outputs[request] == request.output_ids
            if request.finish_reason is FinishReason.ABORTED:
                assert request.output_ids == expected[: len(request.output_ids)]
            else:
                assert request.output_ids == expected


def limits(**changes: int | frozenset[int]) -> SchedulerLimits:
    return SchedulerLimits(**({"num_blocks": 64, "block_size": 4, "max_model_len": 100} | changes))  # type: ignore[arg-type]


def token_counts(step: Step | None) -> list[int]:
    return [] if step is None else [len(part.token_ids) for part in step.input.requests]


@st.composite
def any_limits(draw: st.DrawFn) -> SchedulerLimits:
    depth = draw(st.integers(1, 3))
    return SchedulerLimits(
        num_blocks=draw(st.integers(2, 12)),
        block_size=draw(st.integers(1, 4)),
        max_model_len=draw(st.integers(4, 30)),
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(1, 20)),
        max_concurrent_batches=depth,
        max_steps_per_request=draw(st.sampled_from([1, depth])),
        eos_token_ids=frozenset({EOS}),
    )


prompts = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12)
requests = st.builds(Request, prompts, st.integers(1, 12), ignore_eos=st.booleans())
events = st.sampled_from(["add", "schedule", "schedule", "complete", "complete", "abort"])


@settings(max_examples=300, deadline=None)
@given(any_limits(), st.lists(requests, max_size=8), st.data())
def test_every_request_gets_what_it_would_get_alone(
    limits: SchedulerLimits, coming: list[Request], data: st.DataObject
) -> None:
    bench = Bench(limits)
    for event in data.draw(st.lists(events, max_size=60)):
        if event == "add" and coming:
            request = coming.pop()
            try:
                bench.add(request)
            except InvalidRequest:
                continue
        elif event == "schedule":
            bench.schedule()
        elif event == "complete" and bench.in_flight:
            bench.complete()
        elif event == "abort" and bench.requests:
            bench.abort(data.draw(st.sampled_from(bench.requests)))
    bench.run()
    bench.check_end()


@settings(max_examples=150, deadline=None)
@given(st.integers(0))
@example(20)  # These two admit a preempted request again while a step still writes into its old blocks,
@example(73)  # in a scheduler that does not wait for that.
def test_requests_that_keep_preempting_each_other_all_finish(seed: int) -> None:
    random = Random(seed)
    depth = random.randint(2, 4)
    bench = Bench(
        limits(
            num_blocks=random.randint(8, 40),
            block_size=1,
            max_concurrent_batches=depth,
            max_steps_per_request=random.choice([1, depth]),
            eos_token_ids=frozenset({EOS}),
            max_num_batched_tokens=random.choice([3, 50]),
        )
    )
    bench.add(*(Request([i % 3 + 1] * random.randint(1, 2), max_tokens=random.choice([1, 2, 7])) for i in range(14)))
    while not all(request.finish_reason for request in bench.requests):
        while bench.schedule():
            pass
        bench.complete()
        if random.random() < 0.2:
            bench.abort(random.choice(bench.requests))
    bench.run()
    bench.check_end()


@settings(max_examples=150, deadline=None)
@given(any_limits(), st.lists(requests, min_size=1, max_size=8))
def test_requests_start_in_order_of_arrival(limits: SchedulerLimits, arriving: list[Request]) -> None:
    bench = Bench(limits)
    for request in arriving:
        try:
            bench.add(request)
        except InvalidRequest:
            continue
    bench.run()
    bench.check_end()
    assert bench.first_steps == bench.requests


def test_a_long_prompt_runs_in_chunks_within_the_budget() -> None:
    bench = Bench(limits(max_num_batched_tokens=8))
    bench.add(Request([1] * 20, max_tokens=2, ignore_eos=True), Request([2], max_tokens=2, ignore_eos=True))
    steps = []
    while step := bench.schedule():
        steps.append((token_counts(step), [part.sample for part in step.input.requests]))
        bench.complete()
    assert steps == [
        ([8], [False]),
        ([8], [False]),
        ([4, 1], [True, True]),
        ([1, 1], [True, True]),
    ]
    bench.check_end()


def test_newcomers_join_the_running_batch() -> None:
    bench = Bench(limits())
    bench.add(Request([1, 2, 3], max_tokens=9, ignore_eos=True))
    assert token_counts(bench.schedule()) == [3]
    bench.add(Request([4, 5], max_tokens=9, ignore_eos=True))
    bench.complete()
    assert token_counts(bench.schedule()) == [1, 2]
    bench.complete()
    assert token_counts(bench.schedule()) == [1, 1]


def test_a_pipeline_gets_disjoint_steps_of_even_size() -> None:
    bench = Bench(limits(max_concurrent_batches=2))
    bench.add(*(Request([1, 2], max_tokens=50, ignore_eos=True) for _ in range(5)))
    first, second = bench.schedule(), bench.schedule()
    assert (len(token_counts(first)), len(token_counts(second))) == (3, 2)
    assert bench.schedule() is None
    bench.complete()
    assert token_counts(bench.schedule()) == [1, 1, 1]


def test_async_scheduling_runs_ahead_of_the_tokens() -> None:
    bench = Bench(limits(max_concurrent_batches=2, max_steps_per_request=2))
    bench.add(Request([1, 2, 3], max_tokens=4, ignore_eos=True))
    first, second = bench.schedule(), bench.schedule()
    assert first is not None
    assert second is not None
    assert first.input.requests[0].token_ids == [1, 2, 3]
    assert second.input.requests[0].token_ids == [LAST_SAMPLED]
    assert second.input.requests[0].start == 3
    bench.run()
    bench.check_end()


def test_async_scheduling_schedules_no_token_beyond_the_last_that_was_asked_for() -> None:
    bench = Bench(limits(max_concurrent_batches=2, max_steps_per_request=2))
    bench.add(Request([1, 2, 3], max_tokens=1))
    assert bench.schedule()
    assert bench.schedule() is None


def test_async_scheduling_discards_the_token_after_the_end_and_holds_on_to_the_blocks() -> None:
    prompt = next(prompt for prompt in _prompts() if next_token(prompt) == EOS)
    bench = Bench(limits(max_concurrent_batches=2, max_steps_per_request=2, eos_token_ids=frozenset({EOS})))
    request = Request(prompt, max_tokens=5)
    bench.add(request)
    assert bench.schedule()
    assert bench.schedule()
    bench.complete()
    assert request.finish_reason is FinishReason.STOP
    assert request.block_ids, "the second step still writes into them"
    bench.complete()
    assert request.output_ids == bench.outputs[request] == [EOS]
    bench.check_end()


def _prompts() -> Iterator[list[int]]:
    return ([1 + i % 10, 1 + i // 10 % 10, 1 + i // 100] for i in range(1000))


def test_end_of_sequence_can_be_ignored() -> None:
    prompt = next(prompt for prompt in _prompts() if next_token(prompt) == EOS)
    bench = Bench(limits(eos_token_ids=frozenset({EOS})))
    stopping, going_on = Request(prompt, max_tokens=3), Request(prompt, max_tokens=3, ignore_eos=True)
    bench.add(stopping, going_on)
    bench.run()
    assert (stopping.finish_reason, len(stopping.output_ids)) == (FinishReason.STOP, 1)
    assert (going_on.finish_reason, len(going_on.output_ids)) == (FinishReason.LENGTH, 3)


def test_the_latest_request_gives_way_when_blocks_run_out() -> None:
    bench = Bench(limits(num_blocks=5))
    older = Request([1] * 4, max_tokens=13, ignore_eos=True)
    later = Request([2] * 4, max_tokens=13, ignore_eos=True)
    bench.add(older, later)
    bench.run()
    assert bench.preemptions
    assert bench.first_steps == [older, later]
    bench.check_end()


@pytest.mark.parametrize("max_steps_per_request", [1, 2])
def test_preemption_waits_for_the_steps_in_flight(max_steps_per_request: int) -> None:
    bench = Bench(limits(num_blocks=3, max_concurrent_batches=2, max_steps_per_request=max_steps_per_request))
    bench.add(*(Request([i + 1] * 3, max_tokens=8, ignore_eos=True) for i in range(2)))
    bench.run()
    assert bench.preemptions
    bench.check_end()


@pytest.mark.parametrize("max_steps_per_request", [1, 2])
def test_an_aborted_request_keeps_its_blocks_while_a_step_writes_into_them(max_steps_per_request: int) -> None:
    bench = Bench(limits(max_concurrent_batches=2, max_steps_per_request=max_steps_per_request))
    request, other = (Request([1, 2, 3], max_tokens=8) for _ in range(2))
    bench.add(request, other)
    assert bench.schedule()
    bench.abort(request)
    assert request.block_ids
    assert request.slot >= 0
    bench.complete()
    assert request.block_ids == []
    bench.abort(request)
    bench.run()
    bench.check_end()


def test_an_aborted_request_that_waits_never_runs() -> None:
    bench = Bench(limits(max_num_seqs=1))
    first, second = (Request([1, 2, 3], max_tokens=2, ignore_eos=True) for _ in range(2))
    bench.add(first, second)
    bench.schedule()
    bench.abort(second)
    bench.complete()
    bench.run()
    assert bench.first_steps == [first]
    bench.check_end()


def test_generation_ends_with_the_context() -> None:
    bench = Bench(limits(max_model_len=10))
    request = Request([1] * 7, max_tokens=50, ignore_eos=True)
    bench.add(request)
    bench.run()
    assert request.finish_reason is FinishReason.LENGTH
    assert len(request.output_ids) == 3


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request([], max_tokens=1), InvalidRequest, "the prompt is empty"),
        (Request([1], max_tokens=0), InvalidRequest, "max_tokens must be at least 1, not 0"),
        (Request([1] * 30, max_tokens=1), PromptTooLong, "30 tokens, and the model's context is 20"),
        (Request([1] * 10, max_tokens=8), InvalidRequest, "17 tokens to store .* KV cache holds 16"),
    ],
)
def test_what_can_never_run_is_refused(request_: Request, error: type[Exception], message: str) -> None:
    scheduler = Scheduler(limits(num_blocks=4, max_model_len=20))
    with pytest.raises(error, match=message):
        scheduler.add(request_)
    assert scheduler.num_waiting == 0


def test_what_just_fits_runs() -> None:
    bench = Bench(limits(num_blocks=4, max_model_len=20))
    bench.add(Request([1] * 10, max_tokens=7, ignore_eos=True), Request([1] * 10, max_tokens=7, ignore_eos=True))
    bench.run()
    bench.check_end()


def test_steps_complete_in_order_and_whole() -> None:
    bench = Bench(limits(max_concurrent_batches=2))
    bench.add(Request([1], max_tokens=2), Request([2], max_tokens=2))
    first, second = bench.schedule(), bench.schedule()
    assert first is not None
    assert second is not None
    with pytest.raises(ValueError, match="in the order"):
        bench.scheduler.complete(second, [1])
    with pytest.raises(ValueError, match="1 requests returned 2 tokens"):
        bench.scheduler.complete(first, [1, 2])
    bench.run()
    bench.check_end()


@pytest.mark.parametrize("name", ["block_size", "max_num_seqs", "max_num_batched_tokens", "max_concurrent_batches"])
def test_limits_that_allow_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        limits(**{name: 0})
