"""Aggregators: how the outputs that the ranks report become the one output of a step."""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from asyncexec.connectors import ECOutputAggregator, KVOutputAggregator
from asyncexec.errors import ConfigError


@runtime_checkable
class Aggregator(Protocol):
    """Merges the outputs of each step: three methods, always called on the event loop.

    Several steps can be under way, each with a partial result of its own.  `begin` and `finish` are called once for
    every step that is sent, each in step order, whether or not anybody still awaits the step; `add` in between, as
    the replies arrive.  An optional fourth method, `rank_lost(rank)`, is told of a rank that will report no more.

    Attributes:
        needs_all_ranks: whether every rank sends its output; otherwise only the output rank (the first of the last
            pipeline stage) does, and the others send nothing unless their method raises.
    """

    needs_all_ranks: bool

    def begin(self, ranks: Sequence[int]) -> Any:
        """A step is sent to `ranks`.  Returns its partial result, any object of the aggregator's own."""
        ...

    def add(self, partial: Any, rank: int, output: Any) -> None:
        """Merge what `rank` returned, None where it returned nothing.  The ranks come in any order, each at most once.

        `output` must not be changed.
        """
        ...

    def finish(self, partial: Any, output: Any, failed: bool) -> Any:
        """The step's output.

        Args:
            partial: what `begin` returned.
            output: what the output rank returned, or what the aggregator before this one in a chain made of it.
            failed: the step failed, or its deadline has passed: some ranks may not have reported, and what this
                returns goes to nobody.  Keep what must not be lost for the next step.
        """
        ...


STEP_METHODS = ("execute_model", "sample_tokens")
"""The methods that are steps."""


class FirstRank:
    """The output rank's output, as it is: right for models whose ranks all compute the same."""

    needs_all_ranks: bool = False

    def begin(self, ranks: Sequence[int]) -> Any:
        """Nothing to prepare."""

    def add(self, partial: Any, rank: int, output: Any) -> None:
        """Nothing to merge."""

    def finish(self, partial: Any, output: Any, failed: bool) -> Any:
        """The output."""
        return output


class AllRanks:
    """A list of every rank's output, by rank."""

    needs_all_ranks: bool = True

    def begin(self, ranks: Sequence[int]) -> dict[int, Any]:
        """No outputs yet."""
        return {}

    def add(self, partial: dict[int, Any], rank: int, output: Any) -> None:
        """Keep the output."""
        partial[rank] = output

    def finish(self, partial: dict[int, Any], output: Any, failed: bool) -> list[Any]:
        """The outputs in the order of ranks."""
        return [partial[rank] for rank in sorted(partial)]


class Chain:
    """Several aggregators on one step: each is given the output that the one before it made.

    One that raises fails the step, as it would alone; the others are called all the same, and those behind it are told
    that the step has failed.  So put last what must not be lost, such as what connectors report.

    Args:
        aggregators: in that order.
    """

    def __init__(self, aggregators: Sequence[Aggregator]) -> None:
        self.aggregators = tuple(aggregators)
        self.needs_all_ranks = any(aggregator.needs_all_ranks for aggregator in self.aggregators)

    def begin(self, ranks: Sequence[int]) -> list[Any]:
        """Begin with each.  An error of one is raised when the step is finished, so that the others get their parts."""
        partial: list[Any] = []
        for aggregator in self.aggregators:
            try:
                partial.append(aggregator.begin(ranks))
            except Exception as error:  # noqa: BLE001 - an aggregator may be anybody's code, and raise anything
                partial.append(_Raised(error))
        return partial

    def add(self, partial: list[Any], rank: int, output: Any) -> None:
        """Give the output to each."""
        errors = _Errors()
        for aggregator, part in zip(self.aggregators, partial, strict=True):
            if not isinstance(part, _Raised):
                with errors:
                    aggregator.add(part, rank, output)
        errors.reraise()

    def finish(self, partial: list[Any], output: Any, failed: bool) -> Any:
        """Hand the output on from one to the next."""
        errors = _Errors(part.error for part in partial if isinstance(part, _Raised))
        for aggregator, part in zip(self.aggregators, partial, strict=True):
            if not isinstance(part, _Raised):
                with errors:
                    output = aggregator.finish(part, output, failed or bool(errors.raised))
        errors.reraise()
        return output

    def rank_lost(self, rank: int) -> None:
        """Tell each."""
        errors = _Errors()
        for aggregator in self.aggregators:
            with errors:
                tell_rank_lost(aggregator, rank)
        errors.reraise()


class _Raised(NamedTuple):
    """In place of the partial result of an aggregator whose `begin` raised."""

    error: Exception


class _Errors:
    """Keeps what is raised within `with`, any number of times, until all that is to be done has been tried."""

    def __init__(self, raised: Iterable[Exception] = ()) -> None:
        self.raised = list(raised)

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, Exception):
            self.raised.append(error)
        return isinstance(error, Exception)

    def reraise(self) -> None:
        """Raise the first one, with the others as notes."""
        if self.raised:
            first, *others = self.raised
            for other in others:
                first.add_note(f"another aggregator raised too: {type(other).__name__}: {other}")
            raise first


def tell_rank_lost(aggregator: Aggregator, rank: int) -> None:
    """Call the aggregator's `rank_lost`, where it has one."""
    if callable(lost := getattr(aggregator, "rank_lost", None)):
        lost(rank)


_BUILT_IN: Mapping[str, Callable[[], Aggregator]] = {
    "first": FirstRank,
    "all": AllRanks,
    "kv": KVOutputAggregator,
    "ec": ECOutputAggregator,
}


def make_aggregator(name: str) -> Aggregator:
    """The aggregator that the configuration names: a built-in one, "module:Class", or several joined by "+".

    Raises:
        ConfigError: there is no such aggregator, it cannot be imported or constructed, or lacks a method.
    """
    parts = [_make_one(part) for part in name.split("+")]
    if len(parts) > 1 and any(isinstance(part, AllRanks) for part in parts):
        raise ConfigError(
            f"aggregator is {name!r}: 'all' makes a list, which cannot be handed on or merged into; valid: 'all' alone"
        )
    return parts[0] if len(parts) == 1 else Chain(parts)


def make_aggregators(names: str | Mapping[str, str]) -> dict[str, Aggregator]:
    """Aggregators by method, for `ExecutorConfig.aggregator`; methods that name the same one share it."""
    if isinstance(names, str):
        names = dict.fromkeys(STEP_METHODS, names)
    made = {name: make_aggregator(name) for name in set(names.values())}
    return {method: made[name] for method, name in names.items()}


def _make_one(name: str) -> Aggregator:
    factory: Any = _BUILT_IN.get(name)
    if factory is None:
        module_name, colon, class_name = name.partition(":")
        if not (module_name and colon and class_name):
            built_in = ", ".join(map(repr, _BUILT_IN))
            raise ConfigError(f"aggregator is {name!r}; valid: {built_in}, 'module:Class', or several joined by '+'")
        try:
            factory = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"aggregator {name!r} cannot be imported: {error}") from error
    try:
        aggregator = factory()
    except Exception as error:
        raise ConfigError(f"aggregator {name!r} cannot be constructed: {type(error).__name__}: {error}") from error
    if not isinstance(aggregator, Aggregator):
        raise ConfigError(f"aggregator {name!r} lacks `needs_all_ranks`, `begin`, `add` or `finish`")
    return aggregator
