"""Continuous batching: which requests run in the next step, and which blocks of the KV cache they use.

`Scheduler` is a plain state machine: no asyncio, no clock, no executor.  The engine adds requests, asks for steps with
`schedule()`, runs them in that order, and gives each one's sampled tokens back with `complete()`.

A request is waiting, running or finished.  Running and waiting together are always in order of arrival:

    add -> waiting -> running -> finished
              ^          |
              +- preempt +          the latest running request gives up its blocks, and is computed again later

- Waiting requests are admitted in order, each once there are blocks for all of its tokens so far.
- Older requests come first.  One that runs short of blocks takes them from the latest, so the oldest always gets on.
- Steps in flight write into their requests' blocks.  A request that leaves meanwhile (finished, aborted, preempted)
  keeps its slot and blocks until the last of them completes.

Two kinds of overlap, told by the limits:

- Pipeline stages (`max_steps_per_request` 1): a request is in one step at a time; requests are spread evenly over the
  steps in flight, so that every stage has work.
- Async scheduling (`max_steps_per_request` 2): a request's next step is scheduled before its last token is known, and
  names that token `LAST_SAMPLED`.  If the token turns out to end the request, the next one is discarded.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from asyncexec.demo.blocks import BlockAllocator
from asyncexec.demo.messages import LAST_SAMPLED, SamplingParams, ScheduledRequest, StepInput


class InvalidRequest(ValueError):
    """A request that this engine can never run; the message says what is wrong with it."""


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room in the model's context for a single token of output."""


class FinishReason(StrEnum):
    """Why a request's last token was its last."""

    STOP = "stop"
    """The model ended it with an end-of-sequence token."""
    LENGTH = "length"
    """It has `max_tokens` tokens, or fills the context."""
    ABORTED = "aborted"
    """Nobody wants the rest of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What bounds a scheduler's decisions.

    Attributes:
        num_blocks: blocks of the KV cache.
        block_size: tokens in a block.
        max_model_len: the model's context, in tokens; prompt and output together.
        max_num_seqs: requests that may run at a time, and in one step.
        max_num_batched_tokens: tokens in one step; longer prompts run in chunks.
        max_concurrent_batches: steps in flight.
        max_steps_per_request: of these, how many may hold the same request.
        eos_token_ids: tokens that end a request.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_concurrent_batches: int = 1
    max_steps_per_request: int = 1
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Raise ValueError for a limit under which nothing could ever run."""
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_concurrent_batches",
            "max_steps_per_request",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what becomes of it.  The engine reads it; only the scheduler changes it.

    Attributes:
        prompt_ids: the prompt's tokens.
        max_tokens: tokens to generate at most.
        sampling: how each is chosen.
        ignore_eos: go on after an end-of-sequence token.
        token_ids: the prompt, then the output as far as it is known.
        finish_reason: None until the request ends.
        slot: its number on the workers while it holds blocks; -1 otherwise.
        block_ids: the KV cache's blocks that it holds, in the order of its tokens.
        num_computed: tokens whose keys and values are in the cache, or will be once the steps in flight are done.
        num_unseen: tokens that steps in flight will sample.
        num_in_flight: steps in flight that it is part of.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ignore_eos: bool = False
    token_ids: list[int] = field(init=False)
    finish_reason: FinishReason | None = field(init=False, default=None)
    slot: int = field(init=False, default=-1)
    block_ids: list[int] = field(init=False, default_factory=list)
    num_computed: int = field(init=False, default=0)
    num_unseen: int = field(init=False, default=0)
    num_in_flight: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def num_tokens(self) -> int:
        """Length of the sequence once the steps in flight are done."""
        return len(self.token_ids) + self.num_unseen


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step in flight: what the workers get, and whose it is, in the same order."""

    input: StepInput
    requests: tuple[Request, ...]


class Scheduler:
    """Decides which requests run in each step.  See the module's docstring for the rules."""

    def __init__(self, limits: SchedulerLimits) -> None:
        """Start with no requests and an empty cache."""
        self.limits = limits
        self._allocator = BlockAllocator(limits.num_blocks)
        self._free_slots = list(reversed(range(limits.max_num_seqs)))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._leaving: set[Request] = set()
        self._in_flight: deque[Step] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot or for blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot and blocks, and go on."""
        return len(self._running)

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the KV cache that nobody holds."""
        return self._allocator.num_free

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that can never run."""
        prompt, context = len(request.prompt_ids), self.limits.max_model_len
        if not prompt:
            raise InvalidRequest("the prompt is empty")
        if request.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {request.max_tokens}")
        if prompt >= context:
            raise PromptTooLong(
                f"the prompt has {prompt} tokens, and the model's context is {context}, with at least one to generate"
            )
        # The last token is returned, but never run, so it needs no place in the cache.
        stored = min(prompt + request.max_tokens, context) - 1
        capacity = self.limits.num_blocks * self.limits.block_size
        if stored > capacity:
            raise InvalidRequest(
                f"the request has up to {stored} tokens to store ({prompt} of them the prompt), "
                f"and the whole KV cache holds {capacity}"
            )

    def add(self, request: Request) -> None:
        """Queue a request; raises `InvalidRequest` like `check`."""
        self.check(request)
        self._waiting.append(request)

    def abort(self, request: Request) -> None:
        """End a request that was added.  One that has finished is left as it is."""
        if request.finish_reason is None:
            self._finish(request, FinishReason.ABORTED)

    def schedule(self) -> Step | None:
        """The next step to run, or None: as many as allowed are in flight, or nothing can run before one completes."""
        limits = self.limits
        if len(self._in_flight) >= limits.max_concurrent_batches:
            return None
        self._admit()
        share = math.ceil(len(self._running) * limits.max_steps_per_request / limits.max_concurrent_batches)
        budget = limits.max_num_batched_tokens
        batch: list[tuple[Request, ScheduledRequest]] = []
        # Running requests leave during the loop, by preemption, but only from the end, before the loop is there.
        for request in self._running:
            if not budget or len(batch) == share:
                break
            count = min(self._num_runnable(request), budget)
            if count and self._reserve(request, request.num_computed + count):
                batch.append((request, self._take(request, count)))
                budget -= count
        if not batch:
            return None
        step = Step(StepInput([part for _, part in batch]), tuple(request for request, _ in batch))
        self._in_flight.append(step)
        return step

    def complete(self, step: Step, token_ids: Sequence[int]) -> list[tuple[Request, int]]:
        """Take in what a step sampled: `token_ids`, one for each of its requests, in its order.

        Returns:
            The requests that got a token, with the token.  A request that ended with it has its `finish_reason` set.

        Raises:
            ValueError: the step is not the oldest in flight, or has another number of requests.
        """
        if not self._in_flight or self._in_flight[0] is not step:
            raise ValueError("steps complete in the order in which they were scheduled")
        if len(token_ids) != len(step.requests):
            raise ValueError(f"a step of {len(step.requests)} requests returned {len(token_ids)} tokens")
        self._in_flight.popleft()
        sampled: list[tuple[Request, int]] = []
        for request, part, token_id in zip(step.requests, step.input.requests, token_ids, strict=True):
            request.num_in_flight -= 1
            if part.sample:
                request.num_unseen -= 1
                if request.finish_reason is None:
                    self._append(request, token_id)
                    sampled.append((request, token_id))
            if request in self._leaving and not request.num_in_flight:
                self._release(request)
        return sampled

    def _admit(self) -> None:
        """Let waiting requests in, in order, while there are slots, and blocks for all their tokens so far."""
        while self._waiting and self._free_slots:
            request = self._waiting[0]
            blocks = self._blocks_for(request.num_tokens)
            # A spare block for each running request, or its next few tokens would throw the newcomer out again.
            if request in self._leaving or blocks + len(self._running) > self._allocator.num_free:
                return
            self._waiting.popleft()
            request.slot = self._free_slots.pop()
            request.block_ids = self._allocator.allocate(blocks)
            self._running.append(request)

    def _num_runnable(self, request: Request) -> int:
        """How many tokens of a running request could run in the next step."""
        if request.num_in_flight == self.limits.max_steps_per_request or self._is_full(request):
            return 0
        return request.num_tokens - request.num_computed

    def _reserve(self, request: Request, num_tokens: int) -> bool:
        """Make sure that a running request has blocks for its first `num_tokens` tokens; False if it has to wait."""
        missing = max(0, self._blocks_for(num_tokens) - len(request.block_ids))
        while missing > self._allocator.num_free:
            # Blocks are on their way, or everybody older goes first.
            if self._leaving or self._running[-1] is request:
                return False
            self._preempt()
        request.block_ids += self._allocator.allocate(missing)
        return True

    def _take(self, request: Request, count: int) -> ScheduledRequest:
        """Put the next `count` tokens of a request into a step."""
        start, end = request.num_computed, request.num_computed + count
        sample = end == request.num_tokens
        part = ScheduledRequest(
            slot=request.slot,
            start=start,
            # Where the request's last token is still unseen, it is also the only one left to run.
            token_ids=request.token_ids[start:end] or [LAST_SAMPLED],
            block_ids=request.block_ids[: self._blocks_for(end)],
            sample=sample,
            sampling=request.sampling,
        )
        request.num_computed = end
        request.num_unseen += sample
        request.num_in_flight += 1
        return part

    def _append(self, request: Request, token_id: int) -> None:
        """Add a sampled token to a request, and end the request if that was its last."""
        request.token_ids.append(token_id)
        if token_id in self.limits.eos_token_ids and not request.ignore_eos:
            self._finish(request, FinishReason.STOP)
        elif not request.num_unseen and self._is_full(request):
            self._finish(request, FinishReason.LENGTH)

    def _is_full(self, request: Request) -> bool:
        """Whether a request will have all its tokens once the steps in flight are done."""
        wanted = len(request.prompt_ids) + request.max_tokens
        return request.num_tokens >= min(wanted, self.limits.max_model_len)

    def _preempt(self) -> None:
        """Put the latest running request back into the queue, to be computed again from its tokens."""
        request = self._running.pop()
        request.num_computed = 0
        self._waiting.appendleft(request)
        self._leave(request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """End a request that is waiting or running."""
        request.finish_reason = reason
        if request in self._running:
            self._running.remove(request)
            self._leave(request)
        else:
            self._waiting.remove(request)

    def _leave(self, request: Request) -> None:
        """Take its slot and blocks from a request that runs no more, as soon as no step in flight writes into them."""
        if request.num_in_flight:
            self._leaving.add(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._leaving.discard(request)
        self._allocator.free(request.block_ids)
        request.block_ids = []
        self._free_slots.append(request.slot)
        request.slot = -1

    def _blocks_for(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.limits.block_size)
