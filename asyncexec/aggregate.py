"""Aggregators: how the outputs that the ranks report become the one output of a step."""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from asyncexec.errors import ConfigError


@runtime_checkable
class Aggregator(Protocol):
    """Merges one step's outputs.  Called once per step, in step order, whether or not anybody still awaits it.

    Attributes:
        needs_all_ranks: whether every rank sends its output; otherwise only the output rank does, and the others
            send nothing unless they fail.
    """

    needs_all_ranks: bool

    def aggregate(self, outputs_by_rank: Mapping[int, Any], output_rank: int) -> Any:
        """The step's output.

        Args:
            outputs_by_rank: what each reporting rank returned; None where it returned nothing.
            output_rank: the first rank of the last pipeline stage, whose output is the step's own.
        """
        ...


class FirstRank:
    """The output rank's output, as it is: right for models whose ranks all compute the same."""

    needs_all_ranks: bool = False

    def aggregate(self, outputs_by_rank: Mapping[int, Any], output_rank: int) -> Any:
        """The output of `output_rank`."""
        return outputs_by_rank[output_rank]


class AllRanks:
    """A list of every rank's output, by rank."""

    needs_all_ranks: bool = True

    def aggregate(self, outputs_by_rank: Mapping[int, Any], output_rank: int) -> Any:
        """The outputs in the order of ranks."""
        return [outputs_by_rank[rank] for rank in sorted(outputs_by_rank)]


_BUILT_IN: Mapping[str, type] = {"first": FirstRank, "all": AllRanks}


def make_aggregator(name: str) -> Aggregator:
    """The aggregator that the configuration names: "first", "all" or "module:Class".

    Raises:
        ConfigError: there is no such aggregator, it cannot be imported or constructed, or lacks `aggregate`.
    """
    factory: Any = _BUILT_IN.get(name)
    if factory is None:
        module_name, colon, class_name = name.partition(":")
        if not (module_name and colon and class_name):
            raise ConfigError(f"aggregator is {name!r}; valid: {', '.join(map(repr, _BUILT_IN))}, or 'module:Class'")
        try:
            factory = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"aggregator {name!r} cannot be imported: {error}") from error
    try:
        aggregator = factory()
    except Exception as error:
        raise ConfigError(f"aggregator {name!r} cannot be constructed: {type(error).__name__}: {error}") from error
    if not isinstance(aggregator, Aggregator):
        raise ConfigError(f"aggregator {name!r} lacks `needs_all_ranks` or `aggregate`")
    return aggregator
