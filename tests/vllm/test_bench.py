"""vLLM's own executors as peers of the benchmarks."""

import pytest

from asyncexec.bench.case import Point
from asyncexec.bench.harness import Harness
from asyncexec.bench.peers import load_peer
from asyncexec.bench.results import Line, Turn
from asyncexec.bench.suites import Part


@pytest.mark.parametrize("name", ["vllm-ray", "vllm-ray-step", "vllm-ray-v2"])
def test_steps_of_vllms_executors_on_ray_are_measured(name: str) -> None:
    lines: list[Line] = []
    part = Part("steps", (Point(2), Point(2, in_flight=2)), 1, 5)
    Harness([part], {name: load_peer(name)}, lines.append, lambda what, behind: None).run()
    assert [line.point for line in lines if isinstance(line, Turn)] == list(part.points), lines


def test_vllms_aggregator_counts_what_all_ranks_have_finished() -> None:
    reports = [[{"a", "b"}, {"a"}], [set(), {"b", "c"}], [{"d"}, {"d"}]]
    assert load_peer("vllm-kv-aggregator")(2).merging(reports)() == 3  # type: ignore[attr-defined]
