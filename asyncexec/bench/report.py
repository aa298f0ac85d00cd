"""The report of a run as one HTML file: plots as SVG, tables as text; it fetches nothing."""

import html
import importlib
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console

from asyncexec.bench.case import Point, Samples
from asyncexec.bench.results import Results
from asyncexec.bench.tables import REFERENCE, summary
from asyncexec.errors import ConfigError

Plot = Callable[[Results, Any, Mapping[str, Any]], None]
"""Draws into axes of matplotlib with the style of each peer; raises LookupError where nothing was measured."""

_WIDTH = 128

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
    left_out = [f"not measured: {name}: {reason}" for name, reason in head.not_measured.items()]
    left_out += [f"failed: {one.peer}, {one.case}, {one.point}: {one.message}" for one in results.failures]
    title = f"asyncexec bench: suite {head.suite}, {head.started}, commit {head.commit or 'unknown'}"
    return _PAGE.format(
        title=_text(title),
        facts=rows,
        method=_METHOD,
        plots="".join(_figures(results)),
        tables="".join(f"<pre>{_text(_as_text(table))}</pre>" for table in summary(results)),
        left_out="".join(f"<li>{_text(line)}</li>" for line in left_out) or "<li>nothing</li>",
        settings=_text("\n".join(map(str, head.settings))),
    )


def _figures(results: Results) -> Iterator[str]:
    plt = _matplotlib()
    names = list(dict.fromkeys(name for peers in results.turns.values() for name in peers))
    colours, lines = plt.get_cmap("tab20"), ("-", "--", "-.", ":")
    styles: dict[str, Any] = {
        n: {"color": colours(i % 20), "linestyle": lines[i % 4], "label": n} for i, n in enumerate(names)
    }
    styles.get(REFERENCE, {})["linewidth"] = 3
    for title, plot in PLOTS.items():
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
            figure.legend(loc="outside right upper", fontsize="small")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        svg = drawn.getvalue()
        yield f"<h2>{_text(title)}</h2>{svg[svg.index('<svg') :]}"


def _latencies(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    """Shares of the steps that took no longer."""
    point = Point(2)
    for peer, rounds in _at(results, "steps", point).items():
        samples = sorted(_together(rounds.values(), "latency_us"))
        shares = [(number + 1) / len(samples) for number in range(len(samples))]
        axes.plot(samples, shares, **styles[peer])
    axes.set(xscale="log", xlabel=f"latency of a step, us ({point})", ylabel="share of the steps")


def _depths(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    _lines(results, axes, styles, "steps_per_s", lambda p: p == Point(2, in_flight=p.in_flight), lambda p: p.in_flight)
    axes.set(xlabel="steps in flight (2 ranks, 64 requests)", ylabel="steps/s")


def _ranks(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    _lines(results, axes, styles, "latency_us", lambda p: p == Point(p.ranks), lambda p: p.ranks)
    axes.set(yscale="log", xlabel="ranks (64 requests, 1 in flight)", ylabel="latency of a step, us")


def _requests(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    _lines(results, axes, styles, "latency_us", lambda p: p == Point(2, requests=p.requests), lambda p: p.requests)
    axes.set(yscale="log", xlabel="requests (2 ranks, 1 in flight)", ylabel="latency of a step, us")


def _tensors(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    _lines(
        results,
        axes,
        styles,
        "latency_us",
        lambda p: p == Point(2, tensor_mib=p.tensor_mib) and p.tensor_mib > 0,
        lambda p: p.tensor_mib,
    )
    axes.set(yscale="log", xlabel="MiB of the array that a step carries (2 ranks)", ylabel="latency of a step, us")


def _processor(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    _bars(results, axes, styles, "steps", "cpu_us_per_step")
    axes.set(xlabel="processor time of a step, driver and ranks, us (2 ranks, 64 requests, 1 in flight)")


def _idle(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    _bars(results, axes, styles, "idle", "idle_cores")
    axes.set(xlabel="cores in use while no step is submitted (2 ranks)")


def _failures(results: Results, axes: Any, styles: Mapping[str, Any]) -> None:
    _bars(results, axes, styles, "failure", "failure_ms")
    axes.set(xscale="log", xlabel="ms from the death of a rank to the exception of a step (2 ranks); 3000 is never")


PLOTS: dict[str, Plot] = {
    "Latency of a step": _latencies,
    "Steps in flight": _depths,
    "Ranks": _ranks,
    "Requests": _requests,
    "Arrays": _tensors,
    "Processor time of a step": _processor,
    "Idle": _idle,
    "Death of a rank": _failures,
}


def _lines(
    results: Results,
    axes: Any,
    styles: Mapping[str, Any],
    metric: str,
    has: Callable[[Point], bool],
    along: Callable[[Point], int],
) -> None:
    """A curve for each peer through its medians at the points that qualify."""
    curves: dict[str, dict[int, float]] = {}
    for (case, point), peers in results.turns.items():
        if case == "steps" and has(point):
            for peer, rounds in peers.items():
                if samples := _together(rounds.values(), metric):
                    curves.setdefault(peer, {})[along(point)] = statistics.median(samples)
    if not any(len(curve) > 1 for curve in curves.values()):
        raise LookupError("no peer was measured at two such points")
    for peer, curve in curves.items():
        axes.plot(*zip(*sorted(curve.items()), strict=True), marker="o", markersize=4, **styles[peer])
    axes.set_xticks(sorted({at for curve in curves.values() for at in curve}))


def _bars(results: Results, axes: Any, styles: Mapping[str, Any], case: str, metric: str) -> None:
    peers = _at(results, case, Point(2))
    values = {peer: _together(rounds.values(), metric) for peer, rounds in peers.items()}
    names = [peer for peer in reversed(values) if values[peer]]
    axes.barh(names, [statistics.median(values[name]) for name in names], color=[styles[n]["color"] for n in names])


def _together(rounds: Iterable[Samples], metric: str) -> list[float]:
    return [value for samples in rounds for value in samples.get(metric, ())]


def _at(results: Results, case: str, point: Point) -> Mapping[str, Any]:
    if (case, point) not in results.turns:
        raise LookupError(f"{case} was not measured at {point}")
    return results.turns[case, point]


def _as_text(table: Any) -> str:
    written = io.StringIO()
    Console(width=_WIDTH, file=written).print(table)
    return written.getvalue()


def _text(value: str) -> str:
    return html.escape(value, quote=False)


def _matplotlib() -> Any:
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError("the report needs matplotlib: pip install 'asyncexec[bench]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "asyncexec"
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
