"""What connectors report is merged over ranks and steps: against a reference, vLLM's rules, and by single cases."""

import contextlib
import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncexec import (
    Chain,
    ConfigError,
    ECConnectorOutput,
    ECOutputAggregator,
    KVConnectorOutput,
    KVOutputAggregator,
    ModelOutput,
    PendingTransfer,
)
from asyncexec.aggregate import make_aggregator


@dataclasses.dataclass
class Numbers:
    """Statistics or metadata that merge by changing themselves, as vLLM's do."""

    numbers: list[int]

    def aggregate(self, other: "Numbers") -> "Numbers":
        self.numbers += other.numbers
        return self


@dataclasses.dataclass
class Events:
    """Cache events, counted over workers."""

    counts: Counter[str]
    workers: int = 1

    def get_all_events(self) -> list[str]:
        return list(self.counts.elements())

    def add_events(self, events: Sequence[str]) -> None:
        self.counts.update(events)

    def increment_workers(self, count: int = 1) -> None:
        self.workers += count


class Step(NamedTuple):
    """One generated step: what each rank returned, the order in which the replies arrive, and what happens then."""

    outputs: dict[int, ModelOutput | None]
    arrival: list[int]
    failed: bool
    lost: list[int]
    reset: list[str]


class History(NamedTuple):
    ranks: int
    expected: int | None
    depth: int
    steps: list[Step]
    plain: bool
    """Whether vLLM's rules are defined on it: all ranks return an output, no step fails, no rank is lost."""


def generate(seed: int, max_ranks: int, max_steps: int) -> History:
    noise = random.Random(seed)
    ranks, plain = noise.randint(1, max_ranks), noise.random() < 0.5
    steps = noise.randint(1, max_steps)
    requests = [f"r{n}" for n in range(noise.randint(1, 12))]
    when: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for request in requests:  # each rank reports most requests once, some never, and the same one again later
        for direction in ("sending", "recving"):
            for rank in range(ranks):
                for _ in range(noise.choice((0, 1, 1, 1, 1, 1, 2))):
                    when.setdefault((noise.randrange(steps), rank), []).append((direction, request))
    generated = []
    alive = set(range(ranks))
    for number in range(steps):
        outputs = {rank: _output(noise, when.get((number, rank), []), ranks, plain) for rank in range(ranks)}
        failed = not plain and noise.random() < 0.15
        arrival = [rank for rank in noise.sample(range(ranks), ranks) if rank in alive]
        if failed:
            arrival = arrival[: noise.randrange(len(arrival) + 1)]
        lost = []
        if not plain and len(alive) > 1 and noise.random() < 0.03:
            lost = [noise.choice(sorted(alive))]
            alive -= set(lost)
        reset = [noise.choice(requests)] if not plain and noise.random() < 0.1 else []
        generated.append(Step(outputs, arrival, failed, lost, reset))
    expected = noise.choice((None, None, ranks, noise.randint(1, ranks)))
    return History(ranks, expected, noise.randint(1, 4), generated, plain)


def _output(noise: random.Random, finished: Sequence[tuple[str, str]], ranks: int, plain: bool) -> ModelOutput | None:
    if not plain and noise.random() < 0.1:
        return None
    if not finished and noise.random() < 0.5:
        return ModelOutput()
    sending, recving = ({r for d, r in finished if d == direction} for direction in ("sending", "recving"))
    report = KVConnectorOutput(finished_sending=sending or None, finished_recving=recving)
    if noise.random() < 0.1:
        report.failed_recving = {f"r{noise.randrange(12)}"}
    if noise.random() < 0.1:
        report.invalid_block_ids = {noise.randrange(9)}
    if noise.random() < 0.1:
        report.kv_connector_stats = Numbers([noise.randrange(9)])
    if noise.random() < 0.1:
        report.kv_connector_worker_meta = Numbers([noise.randrange(9)])
    if noise.random() < 0.1:
        report.kv_cache_events = Events(Counter([f"e{noise.randrange(3)}"]))
    if noise.random() < 0.02:
        report.expected_finished_count = noise.randint(1, ranks)
    return ModelOutput(kv_connector_output=report)


Outcome = dict[str, Any]


def outcome_of(output: Any) -> Outcome:
    """What an engine makes of an output; an empty report is the same as none."""
    report = getattr(output, "kv_connector_output", None) or KVConnectorOutput()
    found = {
        "sending": set(report.finished_sending or ()),
        "recving": set(report.finished_recving or ()),
        "failed": set(report.failed_recving),
        "invalid": set(report.invalid_block_ids),
        "stats": report.kv_connector_stats and report.kv_connector_stats.numbers,
        "meta": report.kv_connector_worker_meta and report.kv_connector_worker_meta.numbers,
        "events": report.kv_cache_events and (report.kv_cache_events.counts, report.kv_cache_events.workers),
    }
    return {name: value for name, value in found.items() if value}


def streamed(history: History, aggregator: KVOutputAggregator) -> list[Outcome]:
    """The outcomes by the aggregator, with up to `depth` steps under way at once."""
    outcomes, ranks = [], range(history.ranks)
    under_way: list[tuple[Step, Any, list[int]]] = []
    for number, step in enumerate([*history.steps, *[None] * history.depth]):
        if step is not None:
            under_way.append((step, aggregator.begin(ranks), list(step.arrival)))
            early = under_way[number % len(under_way)]  # of any step, also before those of the steps before it
            while early[2]:
                rank = early[2].pop(0)
                aggregator.add(early[1], rank, early[0].outputs[rank])
        if under_way and (step is None or len(under_way) == history.depth):
            done, partial, coming = under_way.pop(0)
            for rank in coming:
                aggregator.add(partial, rank, done.outputs[rank])
            output = done.outputs[0] if 0 in done.arrival else None
            merged = aggregator.finish(partial, output, done.failed)
            if not done.failed:
                outcomes.append(outcome_of(merged))
            aggregator.reset(done.reset)
            for rank in done.lost:
                aggregator.rank_lost(rank)
    return outcomes


class Reference:
    """The rules, step by step and without any cleverness: tallies of who has said what."""

    def __init__(self, history: History) -> None:
        self.expected = history.expected
        self.ranks = history.ranks
        self.gone: set[int] = set()
        self.tallies: dict[tuple[str, str], tuple[list[int], list[int]]] = {}  # -> ([reports needed], reporters)
        self.aborted: set[tuple[str, str]] = set()
        self.failures: set[str] = set()
        self.unsaid: list[Outcome] = []

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        outcomes = []
        for step in steps:
            said = self.hear(step)
            self.unsaid.append(said)
            if not step.failed:
                outcomes.append(self.tell())
            for request in step.reset:
                self.abort(request)
            for rank in step.lost:
                self.lose(rank)
        return outcomes

    def hear(self, step: Step) -> Outcome:
        said: Outcome = {"sending": set(), "recving": set(), "invalid": set(), "stats": [], "meta": [], "events": []}
        for rank in sorted(set(step.arrival) - self.gone):
            output = step.outputs[rank]
            report = output.kv_connector_output if output is not None else None
            if report is None:
                continue
            if report.expected_finished_count:
                self.expected = report.expected_finished_count
            self.failures |= {one for one in report.failed_recving if ("recving", one) not in self.aborted}
            for direction, requests in (("sending", report.finished_sending), ("recving", report.finished_recving)):
                for request in sorted(requests or ()):
                    self.report(direction, request, rank, said)
            said["invalid"] |= report.invalid_block_ids
            said["stats"] += [report.kv_connector_stats] if report.kv_connector_stats else []
            said["meta"] += [report.kv_connector_worker_meta] if report.kv_connector_worker_meta else []
            said["events"] += [report.kv_cache_events] if report.kv_cache_events else []
        return said

    def report(self, direction: str, request: str, rank: int, said: Outcome) -> None:
        there = self.ranks - len(self.gone)
        needed = there if self.expected is None else self.expected
        if self.gone:
            needed = max(1, min(needed, there))
        tally = self.tallies.setdefault((direction, request), ([needed], []))
        tally[1].append(rank)
        self.settle(direction, request, said)

    def settle(self, direction: str, request: str, said: Outcome) -> None:
        [needed], reporters = self.tallies[direction, request]
        if len(reporters) >= needed:
            del self.tallies[direction, request]
            if (direction, request) in self.aborted:
                self.aborted.remove((direction, request))
            else:
                said[direction].add(request)

    def tell(self) -> Outcome:
        everything = self.unsaid
        self.unsaid = []
        together: Outcome = {name: set().union(*(s[name] for s in everything)) for name in ("sending", "recving")}
        together["invalid"] = set().union(*(s["invalid"] for s in everything))
        together["failed"] = self.failures & together["recving"]
        self.failures -= together["failed"]
        for name in ("stats", "meta"):
            together[name] = [n for said in everything for numbers in said[name] for n in numbers.numbers]
        events = [said["events"] for said in everything if said["events"]]
        counts: Counter[str] = sum((event.counts for step in events for event in step), Counter())
        together["events"] = (counts, len(events[-1])) if events else None  # the workers of every step are the same
        return {name: value for name, value in together.items() if value}

    def abort(self, request: str) -> None:
        for direction in ("sending", "recving"):
            if (direction, request) in self.tallies:
                self.aborted.add((direction, request))
            for said in self.unsaid:
                said[direction].discard(request)
        self.failures.discard(request)

    def lose(self, rank: int) -> None:
        self.gone.add(rank)
        said: Outcome = {"sending": set(), "recving": set(), "invalid": set(), "stats": [], "meta": [], "events": []}
        for direction, request in list(self.tallies):
            needed, reporters = self.tallies[direction, request]
            if rank not in reporters:
                needed[0] -= 1
                self.settle(direction, request, said)
        self.unsaid.append(said)


def by_vllms_rules(history: History) -> list[Outcome]:
    """The rules of vLLM's KVOutputAggregator (0.32), where all ranks return an output.

    - The workers are taken in the order of ranks.  One without a KV part is passed over.
    - A worker's expected count, if above 0, is the one for requests counted for the first time from then on.
    - Each report of a request takes one off its count, which begins at the expected count; at 0 the request is
      finished, and forgotten.  Sending and receiving are counted apart.
    - A failed receive is told in the step in which the request finishes receiving.
    - Statistics, metadata and events merge from the first worker's on; invalid blocks are united.
    """
    expected = history.expected or history.ranks
    remaining: dict[str, dict[str, int]] = {"sending": {}, "recving": {}}
    failures: set[str] = set()
    outcomes = []
    for step in history.steps:
        found: Outcome = {"sending": set(), "recving": set(), "invalid": set()}
        merged: dict[str, Any] = {"stats": None, "meta": None, "events": None}
        for rank in range(history.ranks):
            output = step.outputs[rank]
            assert output is not None
            report = copy.deepcopy(output.kv_connector_output)
            if report is None:
                continue
            expected = report.expected_finished_count or expected
            for direction in ("sending", "recving"):
                for request in getattr(report, f"finished_{direction}") or ():
                    left = remaining[direction].pop(request, expected) - 1
                    if left == 0:
                        found[direction].add(request)
                    else:
                        remaining[direction][request] = left
            for name, part in (("stats", report.kv_connector_stats), ("meta", report.kv_connector_worker_meta)):
                if part is not None:
                    merged[name] = part if merged[name] is None else merged[name].aggregate(part)
            if report.kv_cache_events is not None:
                if merged["events"] is None:
                    merged["events"] = report.kv_cache_events
                else:
                    merged["events"].add_events(report.kv_cache_events.get_all_events())
                    merged["events"].increment_workers(1)
            found["invalid"] |= report.invalid_block_ids
            failures |= report.failed_recving
        found["failed"] = failures & found["recving"]
        failures -= found["failed"]
        found["stats"], found["meta"] = (merged[name] and merged[name].numbers for name in ("stats", "meta"))
        found["events"] = merged["events"] and (merged["events"].counts, merged["events"].workers)
        outcomes.append({name: value for name, value in found.items() if value})
    return outcomes


@settings(max_examples=10_000)
@given(st.integers(0, 2**64 - 1))
def test_any_history_is_merged_as_the_reference_does_and_as_vllm_does(seed: int) -> None:
    # most are small, and every hundredth is as large as they get
    history = generate(seed, *((8, 50) if seed % 100 == 0 else (5, 12)))
    untouched = copy.deepcopy(history) if seed % 10 == 0 else None
    aggregator, reference = KVOutputAggregator(history.expected), Reference(history)
    outcomes = streamed(history, aggregator)
    assert outcomes == reference.run(history.steps)
    if history.plain:
        assert outcomes == by_vllms_rules(history)
    assert {(p.direction, p.request_id): (p.expected, p.reported_by) for p in aggregator.pending()} == {
        key: (needed, reporters)
        for key, ([needed], reporters) in reference.tallies.items()
        if key not in reference.aborted
    }
    if untouched is not None:
        for step, as_it_was in zip(history.steps, untouched.steps, strict=True):
            assert step.outputs == as_it_was.outputs, "an input was changed"


def merge(aggregator: Any, outputs: Sequence[Any], output_rank: int = 0, failed: bool = False) -> Any:
    partial = aggregator.begin(range(len(outputs)))
    for rank, output in enumerate(outputs):
        aggregator.add(partial, rank, output)
    return aggregator.finish(partial, outputs[output_rank], failed)


def sent(*request_ids: str, **more: Any) -> ModelOutput:
    return ModelOutput(kv_connector_output=KVConnectorOutput(finished_sending=set(request_ids), **more))


def test_the_output_is_the_output_ranks_with_the_merged_report() -> None:
    aggregator = KVOutputAggregator()
    first, second = sent("a"), sent("a", "b")
    first.sampled_token_ids = [[7]]
    merged = merge(aggregator, [first, second])
    assert merged.sampled_token_ids == [[7]]
    assert merged.kv_connector_output.finished_sending == {"a"}
    assert merged.kv_connector_output.finished_recving is None
    assert first.kv_connector_output.finished_sending == {"a"}
    assert merged is not first
    assert aggregator.pending() == [PendingTransfer("b", "sending", 2, [1], [0])]


def test_without_reports_the_output_is_as_it_is() -> None:
    for output in (ModelOutput(), [1, 2], None, object()):
        assert merge(KVOutputAggregator(), [output, None, "nothing"]) is output


def test_an_empty_output_rank_does_not_lose_the_other_ranks_reports() -> None:
    merged = merge(KVOutputAggregator(1), [None, sent("a")])
    assert merged == sent("a", expected_finished_count=1)


def test_an_output_that_cannot_carry_reports_is_named_and_nothing_is_lost() -> None:
    aggregator = KVOutputAggregator(1)
    with pytest.raises(TypeError, match="returned a list, which has no attribute 'kv_connector_output'"):
        merge(aggregator, [[1], sent("a")])
    assert merge(aggregator, [ModelOutput(), None]).kv_connector_output.finished_sending == {"a"}


def test_a_failing_aggregation_of_statistics_loses_no_request() -> None:
    class Failing:
        def aggregate(self, other: object) -> object:
            raise ZeroDivisionError

    aggregator = KVOutputAggregator()
    outputs = [sent("a", kv_connector_stats=Failing()) for _ in range(2)]
    with pytest.raises(ZeroDivisionError):
        merge(aggregator, outputs)
    assert merge(aggregator, [ModelOutput()] * 2).kv_connector_output.finished_sending == {"a"}


def test_a_lost_rank_is_waited_for_no_longer() -> None:
    aggregator = KVOutputAggregator()
    merge(aggregator, [sent("a"), sent("a"), ModelOutput()])
    aggregator.rank_lost(2)
    aggregator.rank_lost(2)
    assert aggregator.pending() == []
    assert merge(aggregator, [ModelOutput()] * 3).kv_connector_output.finished_sending == {"a"}
    assert merge(aggregator, [sent("b"), sent("b"), sent("b")]).kv_connector_output.finished_sending == {"b"}


def test_ranks_that_come_anew_count() -> None:
    aggregator = KVOutputAggregator()
    merge(aggregator, [ModelOutput()] * 2)
    aggregator.rank_lost(1)
    assert merge(aggregator, [sent("a")]).kv_connector_output.finished_sending == {"a"}
    assert merge(aggregator, [sent("b"), ModelOutput()]).kv_connector_output.finished_sending is None
    assert merge(aggregator, [ModelOutput(), sent("b")]).kv_connector_output.finished_sending == {"b"}


def test_an_aborted_request_is_not_reported_and_nothing_waits_for_it() -> None:
    aggregator = KVOutputAggregator()
    merge(aggregator, [sent("a"), ModelOutput()])
    aggregator.reset(["a", "unknown"])
    assert aggregator.pending() == []
    assert merge(aggregator, [ModelOutput(), sent("a")]).kv_connector_output.finished_sending is None
    assert merge(aggregator, [sent("a"), sent("a")]).kv_connector_output.finished_sending == {"a"}, "a new one"


def test_an_impossible_count_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected_finished_count is 0"):
        KVOutputAggregator(0)


@dataclasses.dataclass
class ForeignReport:
    """As vLLM's class was before it told of failed receives and of metadata."""

    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    kv_connector_stats: Any = None
    kv_cache_events: Any = None
    invalid_block_ids: set[int] = dataclasses.field(default_factory=set)
    expected_finished_count: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    tokens: list[int]
    kv_connector_output: Any = None


class Slotted:
    __slots__ = ("kv_connector_output", "tokens")

    def __init__(self, tokens: list[int], kv_connector_output: Any = None) -> None:
        self.tokens, self.kv_connector_output = tokens, kv_connector_output


@pytest.mark.parametrize("kind", [Frozen, Slotted])
def test_classes_of_others_pass_through(kind: Any) -> None:
    outputs = [kind([rank], ForeignReport({"a"}, invalid_block_ids={rank})) for rank in range(2)]
    merged = merge(KVOutputAggregator(), outputs, output_rank=1)
    assert type(merged) is kind
    assert merged.tokens == [1]
    assert merged.kv_connector_output == ForeignReport({"a"}, invalid_block_ids={0, 1}, expected_finished_count=2)
    assert outputs[1].kv_connector_output == ForeignReport({"a"}, invalid_block_ids={1})


def moved(*hashes: str, **more: Any) -> ModelOutput:
    return ModelOutput(ec_connector_output=ECConnectorOutput(finished_recving=set(hashes), **more))


def test_encoder_caches_are_united() -> None:
    aggregator = ECOutputAggregator()
    outputs = [moved("a", ec_connector_stats=Numbers([1])), None, moved("b", ec_connector_stats=Numbers([2]))]
    report = merge(aggregator, outputs).ec_connector_output
    assert report == ECConnectorOutput(finished_recving={"a", "b"}, ec_connector_stats=Numbers([1, 2]))
    assert merge(aggregator, [moved(), moved()]).ec_connector_output is None
    assert merge(aggregator, [moved("c"), moved()], failed=True).ec_connector_output is not None
    assert merge(aggregator, [ModelOutput(), None]).ec_connector_output.finished_recving == {"c"}


def test_several_aggregators_on_one_step() -> None:
    chain = make_aggregator("kv+ec")
    assert isinstance(chain, Chain)
    assert chain.needs_all_ranks
    outputs = [ModelOutput(kv_connector_output=sent("a").kv_connector_output), moved("m"), sent("a")]
    outputs[1].kv_connector_output = sent("a").kv_connector_output
    merged = merge(chain, outputs)
    assert merged.kv_connector_output.finished_sending == {"a"}
    assert merged.ec_connector_output.finished_recving == {"m"}
    merge(chain, [sent("b"), sent("b"), None])
    chain.rank_lost(2)
    assert merge(chain, [ModelOutput(), None, None]).kv_connector_output.finished_sending == {"b"}


def test_a_chain_may_begin_with_any_aggregator() -> None:
    assert not make_aggregator("first+first").needs_all_ranks
    with pytest.raises(ConfigError, match="aggregator is ''"):
        make_aggregator("kv+")


@pytest.mark.parametrize("expected", [None, 4])
def test_layouts_that_shrink_and_grow(expected: int | None) -> None:
    aggregator = KVOutputAggregator(expected)
    merge(aggregator, [ModelOutput()] * 4)
    for rank in (2, 3):
        aggregator.rank_lost(rank)
    assert merge(aggregator, [sent("a"), ModelOutput()]).kv_connector_output.finished_sending is None
    assert merge(aggregator, [ModelOutput(), sent("a")]).kv_connector_output.finished_sending == {"a"}
    for rank in (2, 3):
        aggregator.rank_lost(rank)
    assert merge(aggregator, [sent("b"), sent("b"), None, None]).kv_connector_output.finished_sending is None
    told = merge(aggregator, [None, None, sent("b", invalid_block_ids={7}), sent("b")]).kv_connector_output
    assert (told.finished_sending, told.invalid_block_ids) == ({"b"}, {7})


def test_a_failed_receive_of_an_aborted_request_is_forgotten() -> None:
    def received(**more: Any) -> ModelOutput:
        return ModelOutput(kv_connector_output=KVConnectorOutput(finished_recving={"a"}, **more))

    aggregator = KVOutputAggregator()
    merge(aggregator, [received(), ModelOutput()])
    aggregator.reset(["a"])
    merge(aggregator, [ModelOutput(), received(failed_recving={"a"})])
    told = merge(aggregator, [received(), received()]).kv_connector_output
    assert (told.finished_recving, told.failed_recving) == ({"a"}, set())


def test_events_of_a_failed_step_are_of_the_same_workers() -> None:
    aggregator = KVOutputAggregator()
    for failed in (True, True, False):
        outputs = [
            ModelOutput(kv_connector_output=KVConnectorOutput(kv_cache_events=Events(Counter("e")))) for _ in range(2)
        ]
        merged = merge(aggregator, outputs, failed=failed)
    assert merged.kv_connector_output.kv_cache_events.counts == Counter("eeeeee")
    assert merged.kv_connector_output.kv_cache_events.workers == 2


class DictOutput(dict[str, Any]):
    """Is made by a constructor that is not `object`'s."""

    kv_connector_output: Any = None


@dataclasses.dataclass
class OwnReport:
    """Has more than the attributes that are known, and needs it."""

    extra: int
    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    failed_recving: set[str] = dataclasses.field(default_factory=set)
    invalid_block_ids: set[int] = dataclasses.field(default_factory=set)
    kv_connector_stats: Any = None
    kv_cache_events: Any = None
    kv_connector_worker_meta: Any = None
    expected_finished_count: int = 0


def test_outputs_and_reports_of_any_class() -> None:
    aggregator = KVOutputAggregator(1)
    merged = merge(aggregator, [DictOutput(a=1), sent("a")])
    assert merged == {"a": 1}
    assert merged.kv_connector_output.finished_sending == {"a"}
    output, reports = ModelOutput(), [OwnReport(5, {"c"}), OwnReport(6)]
    partial = aggregator.begin(range(2))
    for rank, report in enumerate(reports):
        aggregator.add(partial, rank, ModelOutput(kv_connector_output=report))
    told = aggregator.finish(partial, output, False).kv_connector_output
    assert isinstance(told, OwnReport)
    assert told.finished_sending == {"c"}
    assert reports[0].finished_sending == {"c"}


class Stubborn:
    """Raises in the method of this name."""

    needs_all_ranks = True

    def __init__(self, method: str) -> None:
        self._method = method

    def begin(self, ranks: Sequence[int]) -> None:
        self._raise("begin")

    def add(self, partial: None, rank: int, output: Any) -> None:
        self._raise("add")

    def finish(self, partial: None, output: Any, failed: bool) -> Any:
        self._raise("finish")
        return output

    def _raise(self, method: str) -> None:
        if method == self._method:
            raise RuntimeError(f"no {method}")


@pytest.mark.parametrize("method", ["begin", "add", "finish"])
def test_an_aggregator_that_raises_does_not_take_the_others_reports_with_it(method: str) -> None:
    kv = KVOutputAggregator()
    chain, outputs = Chain([Stubborn(method), kv]), [sent("a", invalid_block_ids={5}), sent("a")]
    partial, failed = chain.begin(range(2)), False
    for rank, output in enumerate(outputs):
        try:
            chain.add(partial, rank, output)
        except RuntimeError:
            failed = True  # so does a step
    with contextlib.nullcontext() if failed else pytest.raises(RuntimeError, match=f"no {method}"):
        chain.finish(partial, outputs[0], failed)
    told = merge(kv, [ModelOutput()] * 2).kv_connector_output
    assert (told.finished_sending, told.invalid_block_ids) == ({"a"}, {5})


@pytest.mark.parametrize("name", ["all+kv", "kv+all", "first+all"])
def test_a_list_of_all_outputs_is_no_part_of_a_chain(name: str) -> None:
    with pytest.raises(ConfigError, match="valid: 'all' alone"):
        make_aggregator(name)
