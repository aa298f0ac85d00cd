"""What the demo engine and its workers say to each other: one `StepInput` down, one `StepOutput` up."""

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How the next token of a request is chosen.

    Attributes:
        temperature: 0 is greedy; above, logits are divided by it.
        top_p: nucleus sampling; only the most likely tokens that together reach this probability are kept (0, 1].
        seed: the draw depends on the seed and the token's position alone, so neither batching nor a
            recomputation after preemption changes it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class ScheduledRequest(msgspec.Struct, frozen=True, array_like=True):
    """One request's part of a step.

    Attributes:
        slot: small number that identifies the request's state on the workers while it runs; reused afterwards.
        start: position of `token_ids[0]` in the sequence; the tokens before it are in the KV cache already.
        token_ids: the tokens to run.  `[LAST_SAMPLED]` stands for the token that the step before sampled for this
            slot, which the engine has not seen yet (async scheduling).
        block_ids: the KV-cache blocks of the whole sequence up to and including `token_ids`, in order.
        sample: whether to sample a token after the last of `token_ids` (False within a prompt run in chunks).
        sampling: how.
    """

    slot: int
    start: int
    token_ids: list[int]
    block_ids: list[int]
    sample: bool
    sampling: SamplingParams


LAST_SAMPLED = -1
"""Placeholder token id: whatever the previous step sampled for the slot."""


class StepInput(msgspec.Struct, frozen=True, array_like=True):
    """The scheduler output of one step: the requests that take part, in batch order."""

    requests: list[ScheduledRequest]


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """The sampled tokens of one step.

    Attributes:
        token_ids: one for each request of the `StepInput`, in its order; -1 where nothing was sampled.
    """

    token_ids: list[int]
