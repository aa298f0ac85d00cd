"""The report of a run as one HTML file: plots as SVG, tables as text; it fetches nothing."""

import html
import importlib
import importlib.util
import io
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from rich.console import Console

from asyncexec.bench.case import Point, Samples
from asyncexec.bench.cases.failure import LIMIT_S
from asyncexec.bench.peers import PEERS
from asyncexec.bench.results import Results
from asyncexec.bench.tables import REFERENCE, left_out, summary
from asyncexec.errors import ConfigError

Plot = Callable[[Results, Any, Mapping[str, Any]], None]
"""Draws into axes of matplotlib with the style of each peer; raises LookupError where nothing was measured."""

ByPeer = Mapping[str, list[float]]
"""Samples of one metric at one point, by peer."""

_USUAL = Point(2)
"""Plots show this point, or the measured one that is most like it."""

_WIDTH = 128

_IDS = re.compile(r'(\bid="|url\(#|href="#)')
"""What stands before an id of matplotlib's SVG, where it is given and where it is used."""

_METHOD = """Each peer has a process of its own, and the peers take turns, round after round; while it is not its turn,
a peer is stopped. What slows the machine for a while slows all of them: compare peers within this run, not
microseconds between runs. Curves and bars are medians over all rounds."""


def html_report(results: Results) -> str:
    """The report.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    head = results.header
    facts = head.hardware | head.versions
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    title = f"asyncexec bench: suite {head.suite}, {head.started}, commit {head.commit or 'unknown'}"
    return _PAGE.format(
        title=_text(title),
        facts=rows,
        method=_METHOD,
        plots="".join(_figures(results)),
        tables="".join(f"<pre>{_text(_as_text(table))}</pre>" for table in summary(results)),
        left_out="".join(f"<li>{_text(line)}</li>" for line in left_out(results)) or "<li>nothing</li>",
        settings=_text("\n".join(map(str, head.settings))),
    )


def _figures(results: Results) -> Iterator[str]:
    plt = _matplotlib()
    styles = _styles(plt, results)
    for number, (title, plot) in enumerate(PLOTS.items()):
        figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
        try:
            plot(results, axes, styles)
        except LookupError:
            yield f"<h2>{_text(title)}</h2><p>Not measured in this run.</p>"
            continue
        finally:
            plt.close(figure)
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside right upper", fontsize="small", handlelength=4)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        # in one page, the ids of each plot must be its own
        svg = _IDS.sub(rf"\1plot{number}-", drawn.getvalue().partition("<svg")[2])
        yield f'<h2>{_text(title)}</h2><svg role="img" aria-label="{_text(title)}"{svg}'


def _styles(plt: Any, results: Results) -> dict[str, Any]:
    """Colour, line and marker of each peer, the same in every report; the reference stands out."""
    measured = (name for peers in results.turns.values() for name in peers)
    colours = [plt.get_cmap(palette)(number) for palette in ("tab20", "tab20b") for number in range(20)]
    lines, markers = ("-", "--", "-.", ":"), "osD^v<>phXP*d"
    styles: dict[str, Any] = {
        name: {
            "color": colours[i % len(colours)],
            "linestyle": lines[i % len(lines)],
            "marker": markers[i % len(markers)],
            "markersize": 5,
            "label": name,
        }
        for i, name in enumerate(dict.fromkeys([*PEERS, *measured]))
    }
    styles[REFERENCE] |= {"color": "black", "linestyle": "-", "linewidth": 3}
    return styles


def _latencies(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    """Shares of the steps that took no longer."""
    point, latencies = _at(results, "steps", "latency_us")
    for peer, samples in latencies.items():
        shares = [(number + 1) / len(samples) for number in range(len(samples))]
        axes.plot(sorted(samples), shares, **styles[peer], markevery=0.15)
    axes.set(xscale="log", xlabel=f"latency of a step, us ({point})", ylabel="share of the steps that took no longer")


def _depths(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    where = _lines(results, axes, styles, "steps_per_s", "in_flight")
    axes.set(xlabel=f"steps in flight ({where})", ylabel="steps/s")


def _ranks(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    where = _lines(results, axes, styles, "latency_us", "ranks")
    axes.set(yscale="log", xlabel=f"ranks ({where})", ylabel="latency of a step, us")


def _requests(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    where = _lines(results, axes, styles, "latency_us", "requests")
    axes.set(yscale="log", xlabel=f"requests ({where})", ylabel="latency of a step, us")


def _tensors(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    where = _lines(results, axes, styles, "latency_us", "tensor_mib")
    axes.set(yscale="log", xlabel=f"MiB of the array ({where})", ylabel="latency of a step, us")


def _processor(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    point = _bars(results, axes, styles, "steps", "cpu_us_per_step")
    axes.set(xlabel=f"processor time of a step, driver and ranks, us ({point})")


def _idle(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    point = _bars(results, axes, styles, "idle", "idle_cores")
    axes.set(xlabel=f"cores in use while no step is submitted (ranks: {point.ranks})")


def _overlap(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    point = _bars(results, axes, styles, "overlap", "overlap_ratio")
    within = f"{point.ranks} stages, {point.in_flight} in flight; 1 is no overlap, {1 / point.ranks:g} the least"
    axes.set(xlabel=f"time of steps in flight over that of the same steps one by one ({within})")


def _demo(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    point = _bars(results, axes, styles, "demo", "tokens_per_s")
    axes.set(xlabel=f"tokens/s of the demo's engine ({point})")


def _aggregation(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    point = _bars(results, axes, styles, "aggregation", "merge_us", Point(64, requests=4))
    axes.set(xlabel=f"us for each step ({point.ranks} ranks, {point.requests} requests finished on all of them)")


def _failures(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    point = _bars(results, axes, styles, "failure", "failure_ms")
    never = f"{LIMIT_S * 1e3:.0f} is not noticed"
    axes.set(xscale="log", xlabel=f"ms from a rank's death to the exception of a step (ranks: {point.ranks}); {never}")


PLOTS: dict[str, Plot] = {
    "How long a step takes": _latencies,
    "Steps per second, over steps in flight": _depths,
    "How long a step takes, over ranks": _ranks,
    "How long a step takes, over its requests": _requests,
    "How long a step takes, over the size of an array that it carries": _tensors,
    "Processor time of a step": _processor,
    "Cores in use while idle": _idle,
    "How soon the death of a rank is noticed": _failures,
    "How far the stages of a pipeline overlap": _overlap,
    "Tokens per second of the demo": _demo,
    "How long the ranks' reports of KV transfers take to merge": _aggregation,
}


def _lines(results: Results, axes: Any, styles: Mapping[str, Any], metric: str, along: str) -> str:
    """A curve for each peer through its medians at points that differ in one attribute; says what they share."""
    groups: dict[Point, dict[int, ByPeer]] = defaultdict(dict)
    points: dict[Point, list[Point]] = defaultdict(list)
    for (case, point), peers in results.turns.items():
        # a scheduler output is no array of size 0
        if case == "steps" and not (along == "tensor_mib" and point.tensor_mib == 0):
            group = msgspec.structs.replace(point, **{along: getattr(_USUAL, along)})
            groups[group][getattr(point, along)] = _measured(peers, metric)
            points[group].append(point)
    able = [group for group, by in groups.items() if sum(map(bool, by.values())) > 1]
    if not able:
        raise LookupError(f"{metric} was not measured at two points that differ in {along} alone")
    chosen = max(able, key=_likeness)
    for peer in dict.fromkeys(peer for samples in groups[chosen].values() for peer in samples):
        curve = {at: statistics.median(by[peer]) for at, by in sorted(groups[chosen].items()) if peer in by}
        axes.plot(list(curve), list(curve.values()), **styles[peer])
    axes.set_xticks(sorted(groups[chosen]))
    first, *others = (str(point).split(", ") for point in points[chosen])
    return ", ".join(part for part in first if all(part in other for other in others))


def _bars(
    results: Results, axes: Any, styles: Mapping[str, Any], case: str, metric: str, usual: Point = _USUAL
) -> Point:
    point, values = _at(results, case, metric, usual)
    names = list(values)[::-1]  # bars begin at the bottom
    medians = [statistics.median(values[name]) for name in names]
    bars = axes.barh(names, medians, color=[styles[name]["color"] for name in names])
    axes.bar_label(bars, [f"{median:.0f}" if median >= 100 else f"{median:.3g}" for median in medians], padding=3)
    axes.margins(x=0.1)
    return point


def _at(results: Results, case: str, metric: str, usual: Point = _USUAL) -> tuple[Point, ByPeer]:
    """The point of this case that is most like the usual one, and each peer's samples there."""
    found = {
        point: samples
        for (name, point), peers in results.turns.items()
        if name == case and (samples := _measured(peers, metric))
    }
    if not found:
        raise LookupError(f"{metric} was not measured")
    point = max(found, key=lambda point: _likeness(point, usual))
    return point, found[point]


def _measured(peers: Mapping[str, Mapping[int, Samples]], metric: str) -> ByPeer:
    """The samples of all rounds, of each peer that has some."""
    together = {
        peer: [value for samples in rounds.values() for value in samples.get(metric, ())]
        for peer, rounds in peers.items()
    }
    return {peer: samples for peer, samples in together.items() if samples}


def _likeness(point: Point, usual: Point = _USUAL) -> int:
    """How many attributes are the usual ones."""
    return sum(getattr(point, name) == getattr(usual, name) for name in point.__struct_fields__)


def _as_text(table: Any) -> str:
    written = io.StringIO()
    Console(width=_WIDTH, file=written).print(table)
    return written.getvalue()


def _text(value: str) -> str:
    return html.escape(value, quote=False)


def require_matplotlib() -> None:
    """Say so where the report cannot be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the report needs matplotlib: pip install 'asyncexec[bench]'")


def _matplotlib() -> Any:
    require_matplotlib()
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "asyncexec"
    matplotlib.rcParams["svg.fonttype"] = "none"  # text that can be searched and read aloud
    return importlib.import_module("matplotlib.pyplot")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
th {{ text-align: left; padding-right: 1.5rem; font-weight: normal; color: #555; }}
pre {{ overflow-x: auto; font-size: 0.8rem; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1><table>{facts}</table><p>{method}</p>{plots}
<h2>Tables</h2>{tables}<h2>Not measured</h2><ul>{left_out}</ul><h2>Settings</h2><pre>{settings}</pre>
</body></html>
"""
