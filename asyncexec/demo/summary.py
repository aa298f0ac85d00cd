"""What a run of the demo adds up to: tokens a second, and where the time of its steps went."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asyncexec import StepTiming

PARTS = ("driver", "queued", "wire", "worker", "aggregate", "total")


@dataclass(frozen=True, slots=True)
class Latency:
    """How one part of the steps' time is spread, in seconds: half and 99 % of the steps took no longer than this."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers.

    Attributes:
        layout: how the model was run, in words.
        num_requests: requests that ended.
        num_tokens: tokens generated.
        seconds: from the first request's submission to the last one's end.
        num_steps: steps that the latencies are of.
        latencies: by part; the parts of a single step add up to its total.
    """

    layout: str
    num_requests: int
    num_tokens: int
    seconds: float
    num_steps: int
    latencies: dict[str, Latency]

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated in a second, over all requests."""
        return self.num_tokens / self.seconds


def latencies(timings: Sequence[StepTiming]) -> dict[str, Latency]:
    """The spread of each part over some steps; empty where there are none."""
    if not timings:
        return {}
    ordered = {part: sorted(getattr(timing, part) for timing in timings) for part in PARTS}
    return {part: Latency(_percentile(values, 50), _percentile(values, 99)) for part, values in ordered.items()}


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile: the smallest value that at least `percent` % of the values do not exceed."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]
