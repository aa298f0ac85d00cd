"""`asyncexec bench`: measures, shows and compares."""

import argparse
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asyncexec.bench import machine
from asyncexec.bench.case import Point
from asyncexec.bench.cases import CASES
from asyncexec.bench.harness import Harness
from asyncexec.bench.peer import Peer
from asyncexec.bench.peers import PEERS, load_peer
from asyncexec.bench.report import html_report, require_matplotlib
from asyncexec.bench.results import Failure, Header, Line, Results, Writer
from asyncexec.bench.suites import SUITES, Part
from asyncexec.bench.tables import comparison, left_out, summary
from asyncexec.errors import ConfigError

WIDTH = 120
"""Columns of the tables where the output is no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    add = parser.add_argument
    add("--suite", choices=SUITES, default="quick", help="quick: 3 to 5 minutes; full: below 10 (default: quick)")
    add("--peers", nargs="+", metavar="PEER", help=f"of {', '.join(PEERS)} (default: all that are installed)")
    add("--cases", nargs="+", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    add("--ranks", nargs="+", type=int, metavar="N", help="only points with so many ranks")
    add("--requests", nargs="+", type=int, metavar="N", help="only steps with so many requests, or with arrays")
    add("--in-flight", nargs="+", type=int, metavar="N", help="only so many steps under way at once")
    add("--output", type=Path, metavar="FILE", help="the results as JSON Lines (default: a new file here)")
    add("--html", type=Path, metavar="FILE", help="write a report with plots, too; one file that needs no network")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--show", type=Path, metavar="FILE", help="measure nothing; the table of these results")
    other.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="measure nothing; the ratios of the second results to the first, with 95%% confidence intervals",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the arguments are those of `add_arguments`.

    Returns:
        The exit status: 1 if a peer failed.

    Raises:
        ConfigError: a name or a file that cannot be used; says why in one line.
        AsyncExecError: peers need Ray, and it did not start.
    """
    console = make_console()
    if args.compare:
        if args.html:
            raise ConfigError("--html: a comparison has no report; --show FILE --html REPORT makes that of one run")
        console.print(comparison(*map(Results.read, args.compare)))
        return 0
    if args.show:
        results = Results.read(args.show)
        show(results, console)
        write_html(results, args.html, console)
        return 0
    parts, cannot = able(some_of(parts_of(args.suite, args.cases), args.ranks, args.requests, args.in_flight))
    peers, missing = peers_of(args.peers)
    missing |= cannot
    if args.html:
        require_report(args.html)
    path = args.output or Path(f"asyncexec-bench-{args.suite}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}.jsonl")
    measure(args.suite, parts, peers, missing, path, console)
    results = Results.read(path)
    show(results, console)
    console.print(f"results: {path}", soft_wrap=True)
    write_html(results, args.html, console)
    return 1 if results.failures else 0


def make_console() -> Console:
    """Of the terminal's width, or wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def parts_of(suite: str, cases: Sequence[str] | None) -> list[Part]:
    """The parts of the suite that measure these cases; all for None.

    Raises:
        ConfigError: there is no such case.
    """
    for name in cases or ():
        if name not in CASES:
            raise ConfigError(f"no case {name!r}; valid: {', '.join(CASES)}")
    return [part for part in SUITES[suite] if cases is None or part.case in cases]


def some_of(
    parts: Sequence[Part], ranks: Sequence[int] | None, requests: Sequence[int] | None, in_flight: Sequence[int] | None
) -> list[Part]:
    """The parts with those of their points that have one of these numbers each; None is any.

    Raises:
        ConfigError: no point is left.
    """

    def wanted(point: Point) -> bool:
        return (
            (ranks is None or point.ranks in ranks)
            and (requests is None or bool(point.tensor_mib) or point.requests in requests)
            and (in_flight is None or point.in_flight in in_flight)
        )

    kept = [msgspec.structs.replace(part, points=tuple(filter(wanted, part.points))) for part in parts]
    if not any(part.points for part in kept):
        points = {str(point): None for part in parts for point in part.points}
        raise ConfigError(f"no point of the suite has these numbers; valid: {'; '.join(points)}")
    return [part for part in kept if part.points]


def able(parts: Sequence[Part]) -> tuple[list[Part], dict[str, str]]:
    """The parts whose cases can be measured here; and the other cases, with what to install.

    Raises:
        ConfigError: there are none of the first.
    """
    reasons = {part.case: CASES[part.case].unavailable() for part in parts}
    missing = {f"case {name}": reason for name, reason in reasons.items() if reason is not None}
    if len(missing) == len(reasons):
        raise ConfigError("; ".join(f"{name} cannot be measured: {reason}" for name, reason in missing.items()))
    return [part for part in parts if reasons[part.case] is None], missing


def require_report(path: Path) -> None:
    """Refuse a report that could not be written, before minutes are spent on measuring.

    Raises:
        ConfigError: says why.
    """
    require_matplotlib()
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def write_html(results: Results, path: Path | None, console: Console) -> None:
    """Write the report, where one is wanted, and say where it is.

    Raises:
        ConfigError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(html_report(results), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    console.print(f"report: {path}", soft_wrap=True)


def peers_of(names: Sequence[str] | None) -> tuple[dict[str, type[Peer]], dict[str, str]]:
    """The peers of these names, all for None, that can be measured here; and the others, with what to install.

    Raises:
        ConfigError: there is no such peer, or none of them can be measured.
    """
    available: dict[str, type[Peer]] = {}
    missing: dict[str, str] = {}
    for name in dict.fromkeys(names or PEERS):
        peer = load_peer(name)
        reason = peer.unavailable()
        if reason is None:
            available[name] = peer
        else:
            missing[name] = reason
    if not available:
        raise ConfigError("; ".join(f"{name} cannot be measured: {reason}" for name, reason in missing.items()))
    return available, missing


def measure(
    suite: str,
    parts: Sequence[Part],
    peers: Mapping[str, type[Peer]],
    missing: Mapping[str, str],
    path: Path,
    console: Console,
) -> None:
    """Run these parts, and write each line of the results as soon as it is known.

    Raises:
        ConfigError: the file cannot be written.
        AsyncExecError: peers need Ray, and it did not start.
    """
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with file, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        writer = Writer(file)
        writer.add(header(suite, parts, missing))

        def keep(line: Line) -> None:
            writer.add(line)
            if isinstance(line, Failure):
                bar.console.print(f"{line.peer} failed, {line.case}, {line.point}: {line.message}", markup=False)

        task = bar.add_task("")
        harness = Harness(parts, peers, keep, lambda what, behind: bar.update(task, description=what, completed=behind))
        bar.update(task, total=harness.turns)
        harness.run()


def header(suite: str, parts: Sequence[Part], missing: Mapping[str, str]) -> Header:
    """What is about to be run, and where."""
    return Header(
        started=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
        suite=suite,
        commit=machine.commit(),
        hardware=machine.hardware(),
        versions=machine.versions(),
        settings=[msgspec.to_builtins(part) for part in parts],
        not_measured=dict(missing),
    )


def show(results: Results, console: Console) -> None:
    """The tables, under what was run where, and above what was not."""
    head = results.header
    console.print(f"suite {head.suite}, {head.started}, commit {head.commit or 'unknown'}")
    for facts in (head.hardware, head.versions):
        console.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False)
    for table in summary(results):
        console.print(table)
    for line in left_out(results):
        console.print(line, markup=False)
