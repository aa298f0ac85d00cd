"""Our aggregators beside vLLM's own, on vLLM's classes: equal wherever vLLM's does not assert or drop a report."""

import copy
import random
from collections.abc import Callable
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorWorkerMetadata
from vllm.distributed.ec_transfer.ec_connector.utils import ECOutputAggregator as VllmECAggregator
from vllm.distributed.kv_events import BlockRemoved
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator as VllmAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheKVEvents
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiKVConnectorStats,
    MultiKVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ECConnectorOutput, KVConnectorOutput, ModelRunnerOutput

from asyncexec.integrations.vllm.connectors import ec_aggregator, kv_aggregator, step_aggregator

REQUESTS = ["a", "b", "c", "d"]
FIELDS = (
    "finished_sending",
    "finished_recving",
    "failed_recving",
    "invalid_block_ids",
    "kv_connector_stats",
    "kv_connector_worker_meta",
)


class Connector:
    def __init__(self, count: int | None) -> None:
        self._count = count

    def get_finished_count(self) -> int | None:
        return self._count


def output(report: Any) -> Any:
    made = ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})
    made.kv_connector_output = report
    return made


def merge(aggregator: Any, outputs: list[Any], output_rank: int = 0) -> Any:
    """One step; its outputs may come in any order."""
    partial = aggregator.begin(range(len(outputs)))
    for rank in reversed(range(len(outputs))):
        aggregator.add(partial, rank, outputs[rank])
    return aggregator.finish(partial, outputs[output_rank], False)


def stats(numbers: dict[str, int]) -> Any:
    """A counter, which adds up; a gauge, of which the last counts; a histogram, a list in the order of ranks."""
    kinds = {"saved": "counter", "free": "gauge", "seconds": "histogram"}
    values = {name: {(): [n] if kinds[name] == "histogram" else n} for name, n in numbers.items()}
    return OffloadingConnectorStats({"types": {name: kinds[name] for name in numbers}, "data": values})


class History:
    """Random reports of a random number of ranks over some steps; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._draw = draw = random.Random(seed)
        self.ranks = draw.randint(1, 4)
        self.output_rank = draw.randrange(self.ranks)
        self.count = draw.choice([None, 1, 2, self.ranks])
        self.many_connectors = draw.random() < 0.3
        self.steps = [self._step() for _ in range(draw.randint(1, 8))]

    def _step(self) -> list[Any]:
        """Every rank's output; all None in the first half of a step."""
        if self._draw.random() < 0.2:
            return [None] * self.ranks
        return [output(self._report()) for _ in range(self.ranks)]

    def _report(self) -> Any:
        draw = self._draw
        if draw.random() < 0.2:
            return None
        stats, meta = (self._many_stats, self._many_meta) if self.many_connectors else (self._stats, self._meta)
        return KVConnectorOutput(
            finished_sending=self._or_none(self._requests),
            finished_recving=self._or_none(self._requests),
            failed_recving=self._requests(),
            invalid_block_ids=set(draw.sample(range(6), draw.randint(0, 2))),
            kv_connector_stats=self._or_none(stats),
            kv_cache_events=self._or_none(self._events),
            kv_connector_worker_meta=self._or_none(meta),
            expected_finished_count=draw.choice([0, 0, 0, 1, 2, 3]),
        )

    def _or_none(self, make: Callable[[], Any]) -> Any:
        return make() if self._draw.random() < 0.6 else None

    def _requests(self) -> set[str]:
        return set(self._draw.sample(REQUESTS, self._draw.randint(0, 3)))

    def _stats(self) -> Any:
        names = self._draw.sample(["saved", "free", "seconds"], self._draw.randint(0, 3))
        return stats({name: self._draw.randint(1, 9) for name in names})

    def _many_stats(self) -> Any:
        return MultiKVConnectorStats(
            {name: self._stats() for name in self._draw.sample("xy", self._draw.randint(0, 2))}
        )

    def _meta(self) -> Any:
        return OffloadingWorkerMetadata(dict.fromkeys(self._draw.sample(range(4), self._draw.randint(0, 2)), 1))

    def _many_meta(self) -> Any:
        return MultiKVConnectorWorkerMetadata((self._or_none(self._meta), self._or_none(self._meta)))

    def _events(self) -> Any:
        made = LMCacheKVEvents(num_workers=1)
        blocks = self._draw.choices(range(4), k=self._draw.randint(0, 3))
        made.add_events([BlockRemoved(block_hashes=[block], medium=None) for block in blocks])
        return made


def fields(report: Any) -> dict[str, Any]:
    """What the scheduler reads; a report that says nothing is as good as none."""
    report = report or KVConnectorOutput()
    read = {name: getattr(report, name) or None for name in FIELDS}
    events = report.kv_cache_events
    read["events"] = events and (events.get_number_of_workers(), sorted(map(repr, events.get_all_events())))
    return read


def test_all_fields_are_compared() -> None:
    """A field that a later vLLM adds has to be merged, and then compared here."""
    assert set(KVConnectorOutput.__dataclass_fields__) == {*FIELDS, "kv_cache_events", "expected_finished_count"}


def test_ten_thousand_histories_are_merged_as_vllm_merges_them() -> None:
    for seed in range(10_000):
        history = History(seed)
        theirs = VllmAggregator.from_connector(Connector(history.count), history.ranks)
        ours = step_aggregator(kv_aggregator(Connector(history.count), history.ranks))
        for number, given in enumerate(history.steps):
            expected = theirs.aggregate(copy.deepcopy(given), history.output_rank)
            before = [made and fields(made.kv_connector_output) for made in copy.deepcopy(given)]
            merged = merge(ours, given, history.output_rank)
            where = f"seed {seed}, step {number}"
            assert [made and fields(made.kv_connector_output) for made in given] == before, where  # not changed
            if expected is None:
                assert merged is None, where
                continue
            assert merged.req_ids == expected.req_ids, where
            report, as_vllm = merged.kv_connector_output, expected.kv_connector_output
            assert fields(report) == fields(as_vllm), where
            assert report is None or report.expected_finished_count == as_vllm.expected_finished_count, where


class Saved(ECConnectorWorkerMetadata):  # type: ignore[misc]
    """Metadata that shows in which order it was merged."""

    def __init__(self, items: list[str]) -> None:
        self.items = items

    def aggregate(self, other: Any) -> "Saved":
        return Saved(self.items + other.items)


def ec_output(**report: Any) -> Any:
    return ModelRunnerOutput(req_ids=[], req_id_to_index={}, ec_connector_output=ECConnectorOutput(**report))


def ec_fields(made: Any) -> Any:
    report = made.ec_connector_output
    if report is None:
        return None
    meta = report.ec_connector_worker_meta
    return report.finished_sending, report.finished_recving, report.ec_connector_stats, meta and meta.items


def test_two_thousand_encoder_reports_are_merged_as_vllm_merges_them() -> None:
    draw = random.Random(0)
    for number in range(2_000):
        made = [
            ec_output(
                finished_sending=draw.choice([None, {"a"}, {"b", "c"}]),
                finished_recving=draw.choice([None, {"a"}, {"b", "d"}]),
                ec_connector_stats=draw.choice([None, stats({"saved": rank + 1}), stats({"seconds": rank})]),
                ec_connector_worker_meta=draw.choice([None, Saved([]), Saved([f"of rank {rank}"])]),
            )
            if draw.random() < 0.8
            else ModelRunnerOutput(req_ids=[], req_id_to_index={})
            for rank in range(draw.randint(1, 4))
        ]
        output_rank = draw.randrange(len(made))
        expected = VllmECAggregator().aggregate(copy.deepcopy(made), output_rank)
        assert ec_fields(merge(ec_aggregator(), made, output_rank)) == ec_fields(expected), f"number {number}"


def test_a_request_is_finished_when_the_last_rank_says_so_and_blocks_are_invalid_once() -> None:
    ours = kv_aggregator(Connector(None), 2)

    def step(*reports: dict[str, Any]) -> Any:
        return merge(ours, [output(KVConnectorOutput(**report)) for report in reports]).kv_connector_output

    assert step({}, {}).finished_sending is None
    report = step({"finished_sending": {"a"}, "finished_recving": {"b"}}, {"invalid_block_ids": {1}})
    assert (report.finished_sending, report.finished_recving, report.invalid_block_ids) == (None, None, {1})
    report = step({"invalid_block_ids": {2}}, {"finished_sending": {"a"}})
    assert (report.finished_sending, report.finished_recving, report.invalid_block_ids) == ({"a"}, None, {2})
    report = step({"invalid_block_ids": {3, 4}}, {"finished_recving": {"b"}, "failed_recving": {"c"}})
    assert (report.finished_recving, report.failed_recving, report.invalid_block_ids) == ({"b"}, set(), {3, 4})
    report = step({"finished_recving": {"c"}}, {"finished_recving": {"c"}})
    assert (report.finished_recving, report.failed_recving) == ({"c"}, {"c"})


def test_a_new_expected_count_is_for_requests_that_nobody_has_reported() -> None:
    ours = kv_aggregator(Connector(4), 3)
    old: dict[str, Any] = {"finished_sending": {"old"}}
    new: dict[str, Any] = {"finished_recving": {"new"}}
    two: dict[str, Any] = {"expected_finished_count": 2}

    def step(*reports: dict[str, Any]) -> Any:
        return merge(ours, [output(KVConnectorOutput(**report)) for report in reports]).kv_connector_output

    assert step(old, {}, {}).finished_sending is None
    report = step(old | two, new | two, new)
    assert (report.finished_sending, report.finished_recving) == (None, {"new"})
    assert report.expected_finished_count == 2
    assert [(p.request_id, p.expected, p.reported_by) for p in ours.pending()] == [("old", 4, [0, 0])]


def test_every_ranks_encoder_report_is_in_that_of_the_output_rank_in_the_order_of_ranks() -> None:
    outputs = [
        ec_output(
            finished_sending={"a"}, ec_connector_worker_meta=Saved(["a"]), ec_connector_stats=stats({"saved": 2})
        ),
        ec_output(finished_recving={"b"}),
        ec_output(ec_connector_worker_meta=Saved(["c"]), ec_connector_stats=stats({"saved": 3})),
    ]
    merged = merge(ec_aggregator(), outputs, 2)
    assert merged.req_ids is outputs[2].req_ids
    assert ec_fields(merged) == ({"a"}, {"b"}, stats({"saved": 5}), ["a", "c"])


def test_encoder_reports_that_say_nothing_make_none() -> None:
    assert merge(ec_aggregator(), [ec_output(), ec_output()]).ec_connector_output is None
    assert merge(step_aggregator(ec_aggregator()), [None]) is None


def test_the_empty_output_that_all_share_is_not_written_to() -> None:
    for aggregator in (ec_aggregator(), kv_aggregator(Connector(None), 2)):
        one = ec_output(ec_connector_worker_meta=Saved(["a"]))
        one.kv_connector_output = KVConnectorOutput(invalid_block_ids={7})
        merged = merge(aggregator, [one, EMPTY_MODEL_RUNNER_OUTPUT], 1)
        assert merged is not EMPTY_MODEL_RUNNER_OUTPUT
        assert merged.ec_connector_output or merged.kv_connector_output
    assert EMPTY_MODEL_RUNNER_OUTPUT.ec_connector_output is None
    assert EMPTY_MODEL_RUNNER_OUTPUT.kv_connector_output is None


def test_both_connectors_of_one_step() -> None:
    ours = step_aggregator(kv_aggregator(Connector(1), 2), ec_aggregator())
    outputs = [ec_output(finished_sending={"a"}), ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})]
    outputs[1].kv_connector_output = KVConnectorOutput(invalid_block_ids={7})
    merged = merge(ours, outputs, 1)
    assert merged.req_ids == ["r"]
    assert merged.kv_connector_output.invalid_block_ids == {7}
    assert merged.ec_connector_output.finished_sending == {"a"}


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
