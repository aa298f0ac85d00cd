"""Sampling: draws have the distribution that temperature and top-p define, and depend on seed and position alone."""

import pytest
import torch

from asyncexec.demo.messages import SamplingParams
from asyncexec.demo.sampler import sample

pytestmark = pytest.mark.timeout(60)


def test_draws_follow_temperature_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    positions = range(4000)

    def shares(**params: float) -> list[float]:
        tokens = sample(logits, [SamplingParams(**params)] * 4000, positions).tolist()  # type: ignore[arg-type]
        return [tokens.count(token) / 4000 for token in range(4)]

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(temperature=1.0, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(temperature=1.0, top_p=0.01) == [1, 0, 0, 0]
    assert shares(temperature=1e-9) == [1, 0, 0, 0]
    squares = [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]
    assert shares(temperature=0.5) == pytest.approx(squares, abs=0.03)
