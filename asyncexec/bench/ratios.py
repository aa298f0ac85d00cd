"""What samples show: quantiles, and ratios of medians with their confidence intervals."""

import math
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 1000


class Ratio(NamedTuple):
    """A ratio with the interval that holds it with 95% confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least this share (0 to 1) of all do not exceed (the nearest rank).

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The median of `ours` over that of `theirs`, whose n-th values were measured in the same round.

    The interval is the percentile bootstrap's (Efron 1979): rounds are drawn with replacement, and both values of a
    round stay together, so that what slows a round down slows both.  The draws are the same in every call.

    Raises:
        ValueError: no rounds, another number of them on the other side, or a value that is not above 0.
    """
    rounds = list(zip(ours, theirs, strict=True))
    if not rounds:
        raise ValueError("no rounds")
    if min(map(min, rounds)) <= 0:
        raise ValueError("a ratio needs values above 0")
    draw = random.Random(0)
    drawn = sorted(_ratio(draw.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    value = _ratio(rounds)
    # the percentiles of few rounds may miss the estimate itself by rounding
    return Ratio(value, min(value, quantile(drawn, 0.025)), max(value, quantile(drawn, 0.975)))


def _ratio(rounds: Sequence[tuple[float, float]]) -> float:
    ours, theirs = zip(*rounds, strict=True)
    return float(statistics.median(ours) / statistics.median(theirs))
