"""Results for people: the table at the end of a run, and the comparison of two."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich import box
from rich.table import Table

from asyncexec.bench.case import Samples
from asyncexec.bench.cases.failure import LIMIT_S
from asyncexec.bench.figures import carried, slopes
from asyncexec.bench.ratios import quantile, ratio_of_medians
from asyncexec.bench.results import Place, Results

REFERENCE = "nccl"
"""The peer beside which the others are shown; the first one where it was not measured."""

Rounds = Mapping[int, Samples]
"""One peer's samples at one place, by round."""

Places = Mapping[Place, Mapping[str, Rounds]]
"""What was measured, by case and point, and by peer."""


def summary(results: Results) -> list[Table]:
    """The tables of the steps, the demo and the aggregation, of what is around them, and of what takes many points."""
    own = {
        make: {place: peers for place, peers in results.turns.items() if place[0] == case}
        for case, make in (("steps", _steps), ("demo", _demo), ("aggregation", _aggregation))
    }
    around = {place: peers for place, peers in results.turns.items() if not any(place in of for of in own.values())}
    tables = [make(places) for make, places in (own | {_around: around}).items() if places]
    return [*tables, *(table for table in (_slopes(results), _carried(results)) if table.row_count)]


def left_out(results: Results) -> list[str]:
    """A line for each reason why peers or cases were not measured, and for each failure."""
    names: dict[str, list[str]] = {}
    for name, reason in results.header.not_measured.items():
        names.setdefault(reason, []).append(name)
    lines = [f"not measured: {', '.join(those)}: {reason}" for reason, those in names.items()]
    return lines + [f"failed: {one.peer}, {one.case}, {one.point}: {one.message}" for one in results.failures]


def _slopes(results: Results) -> Table:
    table = _table("peer", "payload", "ranks", "us for each further rank [95%]")
    for slope in slopes(results):
        ranks = ", ".join(map(str, slope.ranks))
        table.add_row(slope.peer, slope.payload, ranks, "{:.1f} [{:.1f}, {:.1f}]".format(*slope.us))
    return table


def _carried(results: Results) -> Table:
    table = _table("peer", "ranks", "payload", "p50 / (a copy for each rank + an empty step of the floor)")
    for figure in carried(results):
        table.add_row(figure.peer, str(figure.point.ranks), figure.point.payload, f"{figure.ratio:.2f}")
    return table


def _steps(places: Places) -> Table:
    return _beside(places, _step_figures, "p50 us", "p99 us", "p50 / {}'s [95%]", "steps/s", "CPU us/step")


def _demo(places: Places) -> Table:
    return _beside(places, _demo_figures, "tokens/s", "tokens/s / {}'s [95%]", "step p50 us", "step p99 us")


def _aggregation(places: Places) -> Table:
    return _beside(places, _aggregation_figures, "us to merge a step", "us / {}'s [95%]")


def _beside(places: Places, figures: Callable[[Rounds, Rounds], list[str]], *columns: str) -> Table:
    """At each point every peer, of which `figures` are told beside the reference's."""
    names = dict.fromkeys(name for peers in places.values() for name in peers)
    reference = REFERENCE if REFERENCE in names else next(iter(names))
    table = _table("peer", *(column.format(reference) for column in columns))
    for (_, point), peers in places.items():
        _section(table, str(point))
        for name, rounds in peers.items():
            table.add_row(name, *figures(rounds, peers.get(reference, {})))
    return table


def _around(places: Places) -> Table:
    """`pipelined` is the time of steps in flight in a pipeline, over that of the same steps one by one."""
    table = _table("peer", "rpc p50 us", "idle cores", "start s", "stop s", "death noticed ms", "pipelined")
    for ranks in sorted({point.ranks for _, point in places}):
        _section(table, f"{ranks} rank{'s' * (ranks > 1)}")
        at = [peers for (_, point), peers in places.items() if point.ranks == ranks]
        for name in dict.fromkeys(name for peers in at for name in peers):
            together = [samples for peers in at for samples in peers.get(name, {}).values()]
            figures = [_median(together, metric, ".3g") for metric in ("idle_cores", "start_s", "stop_s")]
            pipelined = _median(together, "overlap_ratio", ".3f")
            table.add_row(name, _median(together, "rpc_us", ".0f"), *figures, _noticed(together), pipelined)
    return table


def comparison(first: Results, second: Results) -> Table:
    """What changed from the first run to the second: ratios of medians over the rounds that both have."""
    table = _table("peer", "metric", "first", "second", "second / first [95%]")
    for place in [place for place in first.turns if place in second.turns]:
        _section(table, f"{place[0]}: {place[1]}")
        before, after = first.turns[place], second.turns[place]
        for peer in [peer for peer in before if peer in after]:
            for metric in dict.fromkeys(name for samples in before[peer].values() for name in samples):
                both = [_by_round(each[peer], metric) for each in (before, after)]
                if all(both):
                    medians = (_digits(statistics.median(each.values())) for each in both)
                    table.add_row(peer, metric, *medians, _ratio(both[1], both[0]))
    return table


def _step_figures(rounds: Rounds, reference: Rounds) -> list[str]:
    together = list(rounds.values())
    p50, p99 = _spread(together)
    ratio = _ratio(_by_round(rounds, "latency_us"), _by_round(reference, "latency_us"))
    return [p50, p99, ratio, _median(together, "steps_per_s", ".0f"), _median(together, "cpu_us_per_step", ".0f")]


def _demo_figures(rounds: Rounds, reference: Rounds) -> list[str]:
    ratio = _ratio(_by_round(rounds, "tokens_per_s"), _by_round(reference, "tokens_per_s"))
    together = list(rounds.values())
    return [_median(together, "tokens_per_s", ".0f"), ratio, *_spread(together)]


def _aggregation_figures(rounds: Rounds, reference: Rounds) -> list[str]:
    ratio = _ratio(_by_round(rounds, "merge_us"), _by_round(reference, "merge_us"))
    return [_median(rounds.values(), "merge_us", ".1f"), ratio]


def _spread(together: Sequence[Samples]) -> tuple[str, str]:
    """Median and 99th percentile of the latencies."""
    latencies = [latency for samples in together for latency in samples["latency_us"]]
    return f"{statistics.median(latencies):.0f}", f"{quantile(latencies, 0.99):.0f}"


def _by_round(rounds: Rounds, metric: str) -> dict[int, float]:
    """The median of each round that has samples of this metric."""
    return {number: statistics.median(samples[metric]) for number, samples in rounds.items() if samples.get(metric)}


def _ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Of the rounds that both have; one alone has no interval, and a median of 0, as of an idle peer, no ratio."""
    both = [(ours[number], theirs[number]) for number in ours if number in theirs]
    if not both or min(map(min, both)) <= 0:
        return "-"
    ratio = ratio_of_medians([our for our, _ in both], [their for _, their in both])
    return str(ratio) if len(both) > 1 else f"{ratio.value:.2f}"


def _median(together: Iterable[Samples], metric: str, form: str) -> str:
    values = [value for samples in together for value in samples.get(metric, ())]
    return format(statistics.median(values), form) if values else "-"


def _digits(value: float) -> str:
    """Four significant digits, and no exponent for what is large."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _noticed(together: Iterable[Samples]) -> str:
    figure = _median(together, "failure_ms", ".0f")
    return f"not within {figure}" if figure == f"{LIMIT_S * 1e3:.0f}" else figure


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _section(table: Table, title: str) -> None:
    table.add_section()
    table.add_row(title, style="bold")
