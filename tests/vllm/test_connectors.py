"""Our aggregators beside vLLM's own, on vLLM's classes: equal wherever vLLM's does not assert or drop a report."""

import copy
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator as VllmAggregator
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from asyncexec.integrations.vllm.connectors import kv_aggregator, step_aggregator

REQUESTS = ["a", "b", "c", "d"]


class Connector:
    def __init__(self, count: int | None) -> None:
        self._count = count

    def get_finished_count(self) -> int | None:
        return self._count


def output(report: Any) -> Any:
    made = ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})
    made.kv_connector_output = report
    return made


request_sets = st.sets(st.sampled_from(REQUESTS), max_size=3)
reports = st.one_of(
    st.none(),
    st.builds(
        KVConnectorOutput,
        finished_sending=st.none() | request_sets,
        finished_recving=st.none() | request_sets,
        failed_recving=request_sets,
        invalid_block_ids=st.sets(st.integers(0, 5), max_size=2),
        expected_finished_count=st.sampled_from([0, 0, 0, 1, 2, 3]),
    ),
)
histories = st.integers(1, 4).flatmap(
    lambda ranks: st.tuples(
        st.just(ranks),
        st.integers(0, ranks - 1),
        st.sampled_from([None, 1, 2, ranks]),
        st.lists(st.lists(reports, min_size=ranks, max_size=ranks), min_size=1, max_size=8),
    )
)


def fields(report: Any) -> dict[str, Any]:
    """What the scheduler reads; a report that says nothing is as good as none."""
    empty = KVConnectorOutput()
    report = report or empty
    names = ("finished_sending", "finished_recving", "failed_recving", "invalid_block_ids")
    return {name: getattr(report, name, None) or None for name in names}


@pytest.mark.timeout(600)
@hypothesis.settings(max_examples=10_000, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(histories)
def test_histories_are_merged_as_vllm_merges_them(history: tuple[int, int, int | None, list[list[Any]]]) -> None:
    ranks, output_rank, count, steps = history
    theirs = VllmAggregator.from_connector(Connector(count), ranks)
    ours = step_aggregator(kv_aggregator(Connector(count), ranks))
    assert ours is not None
    for step in steps:
        expected = theirs.aggregate([output(copy.deepcopy(report)) for report in step], output_rank)
        outputs = [output(report) for report in step]
        partial = ours.begin(range(ranks))
        for rank in reversed(range(ranks)):  # they may come in any order
            ours.add(partial, rank, outputs[rank])
        merged = ours.finish(partial, outputs[output_rank], False)
        assert merged.req_ids == expected.req_ids
        assert fields(merged.kv_connector_output) == fields(expected.kv_connector_output)


def test_a_first_half_without_an_output_stays_none_and_loses_nothing() -> None:
    """With pipeline stages, vLLM's asserts or drops what the others reported."""
    ours = step_aggregator(kv_aggregator(Connector(None), 2))
    assert ours is not None
    partial = ours.begin(range(2))
    ours.add(partial, 0, output(KVConnectorOutput(finished_sending={"a"})))
    ours.add(partial, 1, None)
    assert ours.finish(partial, None, False) is None
    partial = ours.begin(range(2))
    last = output(KVConnectorOutput(finished_sending={"a"}))
    ours.add(partial, 0, output(None))
    ours.add(partial, 1, last)
    assert ours.finish(partial, last, False).kv_connector_output.finished_sending == {"a"}
    assert last.kv_connector_output.finished_sending == {"a"}  # inputs are not changed


def test_nothing_to_merge_needs_no_aggregator() -> None:
    assert step_aggregator(None, None) is None
