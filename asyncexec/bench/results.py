"""A result file: JSON Lines, first what was run where, then the raw samples of each turn."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Self, TextIO

import msgspec

from asyncexec.bench.case import Point, Samples
from asyncexec.errors import ConfigError


class Header(msgspec.Struct, frozen=True, tag="run", tag_field="kind"):
    """The first line.

    Attributes:
        started: when, as ISO 8601 in UTC.
        suite: its name.
        commit: of the checkout; empty where there is none.  It ends with "+" if files were changed since.
        hardware: processor, cores, memory, kernel.
        versions: of Python and the packages that matter.
        settings: of the suite, as the harness used them.
        not_measured: the peers and cases that were left out, with the reason.
    """

    started: str
    suite: str
    commit: str
    hardware: dict[str, str]
    versions: dict[str, str]
    settings: list[dict[str, object]]
    not_measured: dict[str, str]


class Turn(msgspec.Struct, frozen=True, tag="turn", tag_field="kind"):
    """Each further line: what one peer's turn in one round measured."""

    case: str
    point: Point
    peer: str
    round: int
    samples: Samples


class Failure(msgspec.Struct, frozen=True, tag="failure", tag_field="kind"):
    """A turn that failed, and with which words; the peer had no further turn at this number of ranks."""

    case: str
    point: Point
    peer: str
    message: str


Line = Header | Turn | Failure
Place = tuple[str, Point]
"""Case and point: what is measured side by side."""


class Writer:
    """Appends to an open file as the run goes on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, line: Line) -> None:
        """One line; samples keep six significant digits, which is more than clocks are worth."""
        if isinstance(line, Turn):
            rounded = {name: [float(f"{value:.6g}") for value in values] for name, values in line.samples.items()}
            line = msgspec.structs.replace(line, samples=rounded)
        self._file.write(msgspec.json.encode(line).decode() + "\n")
        self._file.flush()


class Results:
    """The lines of one run, by what they measure."""

    def __init__(self, header: Header, turns: Iterable[Turn], failures: Iterable[Failure]) -> None:
        self.header, self.failures = header, list(failures)
        self.turns: dict[Place, dict[str, dict[int, Samples]]] = defaultdict(lambda: defaultdict(dict))
        for turn in turns:
            self.turns[turn.case, turn.point][turn.peer][turn.round] = turn.samples

    @classmethod
    def read(cls, path: Path) -> Self:
        """The results in a file.

        Raises:
            ConfigError: there is none, or it is no result file; says why.
        """
        try:
            lines = [msgspec.json.decode(line, type=Line) for line in path.read_bytes().splitlines()]
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}: not a result file: {error}") from error
        if not lines or not isinstance(lines[0], Header):
            raise ConfigError(f"{path}: not a result file: it does not begin with a run")
        turns = (line for line in lines if isinstance(line, Turn))
        return cls(lines[0], turns, (line for line in lines if isinstance(line, Failure)))
