"""`asyncexec bench`: what samples show, what is kept of them, and one small run."""

import dataclasses
import importlib.util
import io
import re
import statistics
from pathlib import Path

import pytest
import refresh_figures
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from asyncexec import ConfigError, cli
from asyncexec.bench import command, suites
from asyncexec.bench.case import Point, Samples
from asyncexec.bench.cases import CASES
from asyncexec.bench.figures import carried, slopes
from asyncexec.bench.harness import Harness
from asyncexec.bench.host import Host, PeerFailed
from asyncexec.bench.peers import PEERS, load_peer
from asyncexec.bench.ratios import quantile, ratio_of_medians
from asyncexec.bench.report import PLOTS, html_report
from asyncexec.bench.results import Failure, Header, Line, Results, Turn, Writer
from asyncexec.bench.suites import Part
from asyncexec.bench.tables import comparison, left_out, summary

ROOT = Path(__file__).parents[1]
HEADER = Header("2026-01-01T00:00:00Z", "quick", "abc", {"cores": "2"}, {"python": "3.11"}, [], {"zeromq": "missing"})
POSITIVE = st.floats(min_value=1e-3, max_value=1e6)
PAIRS = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=12)


@given(st.lists(POSITIVE, min_size=1), st.floats(0, 1))
def test_a_quantile_is_a_sample_that_enough_do_not_exceed(samples: list[float], share: float) -> None:
    found = quantile(samples, share)
    assert found in samples
    assert sum(sample <= found for sample in samples) >= share * len(samples) - 1e-9
    assert sum(sample < found for sample in samples) <= share * len(samples)


@given(PAIRS)
def test_the_interval_holds_the_ratio_and_the_rounds_bound_it(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [our for our, _ in pairs], [their for _, their in pairs]
    ratio = ratio_of_medians(ours, theirs)
    assert ratio.value == pytest.approx(statistics.median(ours) / statistics.median(theirs))
    assert ratio.low <= ratio.value <= ratio.high
    assert min(ours) / max(theirs) <= ratio.low * (1 + 1e-9)
    assert ratio.high <= max(ours) / min(theirs) * (1 + 1e-9)
    assert ratio == ratio_of_medians(ours, theirs), "the draws are the same"


@given(st.lists(POSITIVE, min_size=1, max_size=12), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_what_slows_a_round_down_for_both_widens_nothing(theirs: list[float], factor: float) -> None:
    assert ratio_of_medians([their * factor for their in theirs], theirs) == (factor, factor, factor)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_a_ratio_of_nothing_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError):
        ratio_of_medians(ours, theirs)


def test_a_quantile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


POINTS = st.builds(
    Point,
    ranks=st.integers(1, 8),
    requests=st.sampled_from([0, 64]),
    in_flight=st.integers(1, 4),
    interval_ms=st.sampled_from([0.0, 2.5]),
)
SAMPLES = st.dictionaries(st.sampled_from(["latency_us", "steps_per_s"]), st.lists(st.integers(0, 10**5).map(float)))
TURNS = st.builds(
    Turn,
    case=st.sampled_from(["steps", "idle"]),
    point=POINTS,
    peer=st.sampled_from(list(PEERS)),
    round=st.integers(0, 9),
    samples=SAMPLES,
)
FAILURES = st.builds(Failure, case=st.just("steps"), point=POINTS, peer=st.just("nccl"), message=st.text())


@given(st.lists(TURNS), st.lists(FAILURES))
def test_results_survive_their_file(
    tmp_path_factory: pytest.TempPathFactory, turns: list[Turn], failures: list[Failure]
) -> None:
    path = tmp_path_factory.mktemp("results") / "run.jsonl"
    results = read_back(path, [HEADER, *turns, *failures])
    assert results.header == HEADER
    assert results.failures == failures
    kept = {(t.case, t.point, t.peer, t.round): t.samples for t in turns}
    assert {
        (case, point, peer, number): samples
        for (case, point), peers in results.turns.items()
        for peer, rounds in peers.items()
        for number, samples in rounds.items()
    } == kept


def read_back(path: Path, lines: list[Line]) -> Results:
    with path.open("w", encoding="utf-8") as file:
        writer = Writer(file)
        for line in lines:
            writer.add(line)
    return Results.read(path)


def results_of(factor: float) -> Results:
    def samples(base: float) -> Samples:
        return {"latency_us": [base, base * 1.5], "steps_per_s": [1e6 / base], "cpu_us_per_step": [0.0]}

    point = Point(2)
    turns = [
        Turn("steps", point, peer, number, samples(base * factor * (number + 1)))
        for number in range(4)
        for peer, base in (("floor", 100.0), ("nccl", 200.0))
    ]
    return Results(HEADER, [*turns, Turn("failure", point, "zeromq", 0, {"failure_ms": [3000.0]})], [])


def text_of(*tables: object) -> str:
    console = Console(width=command.WIDTH, file=io.StringIO())
    for table in tables:
        console.print(table)
    return written(console)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_tables_show_each_peer_beside_the_reference() -> None:
    text = text_of(*summary(results_of(1.0)))
    assert "2 ranks, 64 requests, 1 in flight" in text
    assert "0.50 [0.50, 0.50]" in text
    assert "1.00 [1.00, 1.00]" in text
    assert "not within 3000" in text


def test_a_comparison_gives_the_ratio_of_each_metric_and_none_to_zero() -> None:
    text = text_of(comparison(results_of(1.0), results_of(2.0)))
    lines = {tuple(line.split()[:2]): line for line in text.splitlines() if line.strip()}
    assert lines["nccl", "latency_us"].rstrip().endswith("2.00 [2.00, 2.00]")
    assert lines["floor", "steps_per_s"].rstrip().endswith("0.50 [0.50, 0.50]")
    assert lines["nccl", "cpu_us_per_step"].rstrip().endswith("-")


def test_a_small_run_of_two_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = (Point(1, in_flight=2), Point(1, interval_ms=1.0))
    around = [Part(case, (Point(1),), 1, 0.05) for case in ("idle", "life", "failure")]
    arrays = [Part("steps", (Point(1, tensor_mib=1),), 1, 5), Part("rpc", (Point(1),), 1, 5)]
    monkeypatch.setitem(suites.SUITES, "quick", [Part("steps", points, 2, 5), *around, *arrays])
    path = tmp_path / "run.jsonl"
    assert cli.main(["bench", "--peers", "floor", "nccl", "memcpy", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "1 rank, 64 requests, every 1 ms" in printed
    results = Results.read(path)
    assert results.header.versions["python"]
    assert set(results.turns) == {
        *(("steps", point) for point in points),
        *((part.case, Point(1)) for part in around),
        *((part.case, part.points[0]) for part in arrays),
    }
    able = {("steps", Point(1, tensor_mib=1)): ["nccl", "memcpy"], ("rpc", Point(1)): ["nccl"]}
    for place, peers in results.turns.items():
        assert list(peers) == able.get(place, ["floor", "nccl"]), place
        for rounds in peers.values():
            for samples in rounds.values():
                assert samples
                assert all(value > 0 for values in samples.values() for value in values)
    for peer in ("floor", "nccl"):
        assert [len(samples["latency_us"]) for samples in results.turns["steps", points[0]][peer].values()] == [5, 5]
    assert cli.main(["bench", "--show", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[:-1]
    assert cli.main(["bench", "--compare", str(path), str(path)]) == 0
    assert "1.00 [1.00, 1.00]" in capsys.readouterr().out


def test_pipelines_aggregation_and_the_demo_are_cases_too(tmp_path: Path) -> None:
    parts = [
        Part("overlap", (Point(2, in_flight=2),), 1, 5),
        Part("aggregation", (Point(3, requests=2),), 1, 10),
        Part("demo", (Point(1, requests=2, in_flight=2),), 1, 5),
    ]
    lines: list[Line] = []
    peers = {name: load_peer(name) for name in ("count", "floor", "nccl", "kv-aggregator")}
    Harness(parts, peers, lines.append, lambda what, behind: None).run()
    turns = [line for line in lines if isinstance(line, Turn)]
    assert len(turns) == len(lines), lines
    measured = {(turn.case, turn.peer): turn.samples for turn in turns}
    assert list(measured) == [
        ("overlap", "nccl"),
        ("aggregation", "count"),
        ("aggregation", "kv-aggregator"),
        ("demo", "nccl"),
    ]
    # of 5 steps the least is 0.6, and 1 is what there would be without any overlap
    assert measured["overlap", "nccl"]["overlap_ratio"][0] < 0.9
    assert measured["demo", "nccl"]["tokens_per_s"][0] > 0
    assert len(measured["demo", "nccl"]["latency_us"]) >= 5
    text = text_of(*summary(Results(HEADER, turns, [])))
    assert "tokens/s / nccl's [95%]" in text
    assert "us / count's [95%]" in text
    assert f"{measured['overlap', 'nccl']['overlap_ratio'][0]:.3f}" in text
    assert re.search(r"nccl +[0-9]+ +1\.00 +[0-9]+ +[0-9]+", text), "one round has no interval"
    assert html_report(Results(HEADER, turns, [])).count("<svg") == 3


@pytest.mark.parametrize("name", ["count", "kv-aggregator"])
def test_aggregators_count_what_all_ranks_have_finished(name: str) -> None:
    reports = [[{"a", "b"}, {"a"}], [set(), {"b", "c"}], [{"d"}, {"d"}]]
    merge = getattr(load_peer(name)(2), CASES["aggregation"].needs)(reports)
    assert merge() == 3


def test_a_case_that_lacks_packages_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = dataclasses.replace(CASES["demo"], packages={"no_such_package": "pip install 'asyncexec[demo]'"})
    monkeypatch.setitem(CASES, "demo", lacking)
    parts = [Part("demo", (Point(1),), 1, 1), Part("idle", (Point(1),), 1, 1)]
    kept, missing = command.able(parts)
    assert kept == parts[1:]
    assert missing == {"case demo": "no_such_package is not installed: pip install 'asyncexec[demo]'"}
    with pytest.raises(ConfigError, match="case demo cannot be measured: no_such_package is not installed"):
        command.able(parts[:1])


def test_what_was_left_out_for_one_reason_is_one_line() -> None:
    missing = {"vllm-mp": "no vllm", "zeromq": "no pyzmq", "vllm-ray": "no vllm"}
    results = Results(replace(HEADER, not_measured=missing), [], [])
    assert left_out(results) == ["not measured: vllm-mp, vllm-ray: no vllm", "not measured: zeromq: no pyzmq"]


def test_a_peer_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"^ConfigError: .*local.*$"):
        Host("local", 2, keeps_running=True)


def test_the_others_go_on_without_a_peer_that_fails() -> None:
    floor = load_peer("floor")
    lines: list[Line] = []
    parts = [Part("steps", (Point(2),), 1, 3), Part("life", (Point(2),), 2, 1)]
    # of `local`, whose limit of one rank is hidden here
    Harness(parts, {"local": floor, "floor": floor}, lines.append, lambda what, behind: None).run()
    failures = [line for line in lines if isinstance(line, Failure)]
    assert [(failure.case, failure.peer) for failure in failures] == [("steps", "local"), ("life", "local")]
    assert [line.case for line in lines if isinstance(line, Turn) and line.peer == "floor"] == ["steps", "life", "life"]


def test_a_missing_peer_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load_peer("zeromq").needs, "no_such_package", "pip install 'asyncexec[bench]'")
    peers, missing = command.peers_of(["floor", "zeromq"])
    assert list(peers) == ["floor"]
    assert missing == {"zeromq": "no_such_package is not installed: pip install 'asyncexec[bench]'"}
    head = command.header("quick", [], missing)
    console = Console(width=command.WIDTH, file=io.StringIO())
    command.show(Results(head, [], []), console)
    assert "not measured: zeromq: no_such_package is not installed" in written(console)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "slow"], "asyncexec bench: argument --suite: invalid choice: 'slow'"),
        (["--peers", "pigeon"], "asyncexec bench: no peer 'pigeon'; valid: floor, floor-codec, memcpy, local, nccl"),
        (
            ["--cases", "colour"],
            "asyncexec bench: no case 'colour'; valid: steps, rpc, idle, life, failure, overlap, aggr",
        ),
        (["--show", "/nowhere"], "asyncexec bench: /nowhere: No such file or directory"),
        (["--compare", __file__, __file__], f"asyncexec bench: {__file__}: not a result file: "),
        (["--compare", "one"], "asyncexec bench: argument --compare: expected 2 arguments"),
        (["--output", "/nowhere/file"], "asyncexec bench: /nowhere/file: No such file or directory"),
        (["--compare", "a", "b", "--html", "c"], "asyncexec bench: --html: a comparison has no report; --show FILE"),
        (["--show", __file__, "--html", "/nowhere/x"], f"asyncexec bench: {__file__}: not a result file: "),
        (["--show", "a", "--compare", "a", "b"], "asyncexec bench: argument --compare: not allowed with"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["bench", *arguments])
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    output, errors = capsys.readouterr()
    assert status == 2
    assert output == ""
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def test_the_figures_in_the_documentation_are_those_of_the_results() -> None:
    for path in refresh_figures.PAGES:
        page = path.read_text(encoding="utf-8")
        assert refresh_figures.refreshed(page) == page
    with pytest.raises(ValueError, match="no block of figures"):
        refresh_figures.refreshed("no figures")


def test_every_peer_and_case_of_a_suite_is_there() -> None:
    for name in PEERS:
        assert load_peer(name)(1).ranks == 1
    for parts in suites.SUITES.values():
        assert parts
        command.parts_of("quick", [part.case for part in parts])


def test_the_slope_over_ranks_and_what_an_array_costs() -> None:
    turns = [
        Turn("steps", Point(ranks, requests=0), peer, number, {"latency_us": [base + slope * ranks + number]})
        for ranks in (1, 2, 4, 8)
        for number in range(3)
        for peer, base, slope in (("floor", 20.0, 2.0), ("nccl", 50.0, 7.5))
    ]
    turns += [
        Turn("steps", Point(4, tensor_mib=16), peer, 0, {"latency_us": [latency]})
        for peer, latency in (("memcpy", 971.0), ("nccl", 1300.0))
    ]
    results = Results(HEADER, turns, [])
    found = {slope.peer: slope for slope in slopes(results)}
    assert found["nccl"].ranks == (1, 2, 4, 8)
    assert found["nccl"].us == pytest.approx((7.5, 7.5, 7.5))
    assert found["floor"].us.value == pytest.approx(2.0)
    [figure] = carried(results)
    assert (figure.peer, figure.ratio) == ("nccl", 1300 / (971 + 29))
    text = text_of(*summary(Results(HEADER, turns[:24], [])))
    assert "7.5 [7.5, 7.5]" in text


def test_the_report_is_one_file_with_a_plot_for_what_was_measured() -> None:
    page = html_report(Results.read(ROOT / "benchmarks" / "results" / "quick-2-cores.jsonl"))
    assert len(page) < 5 << 20
    assert not re.search(r"(src|href)=.?https?:|@import|<script|url\(https?:", page)
    for title in PLOTS:
        section = page.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]
        assert "<svg" in section or "Not measured in this run." in section, title
    assert page.count("<svg") >= 5
    assert "<text" in page, "words are text, not outlines"
    page = html_report(results_of(1.0))
    assert page.count("<svg") == 3, "latencies, the processor time of a step, and a death"
    assert page.count("Not measured in this run.") == len(PLOTS) - 3
    assert "not measured: zeromq: missing" in page


def test_the_plots_of_a_report_share_no_ids() -> None:
    page = html_report(Results.read(ROOT / "benchmarks" / "results" / "quick-2-cores.jsonl"))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(ids)) == len(ids) > 100
    used = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', page))
    assert used
    assert {first or second for first, second in used} <= set(ids), "what is used is there"


@pytest.mark.parametrize("usual", [Point(4), Point(2, requests=256), Point(1, in_flight=2)], ids=str)
def test_the_report_shows_what_was_measured_also_elsewhere(usual: Point) -> None:
    points = [
        usual,
        *(replace(usual, **{name: getattr(usual, name) * 2}) for name in ("ranks", "requests", "in_flight")),
    ]
    samples = {"latency_us": [1.0, 2.0], "steps_per_s": [9.0], "cpu_us_per_step": [3.0]}
    turns = [Turn("steps", point, "nccl", 0, samples) for point in points]
    turns += [Turn("idle", Point(usual.ranks), "nccl", 0, {"idle_cores": [0.0001]})]
    turns += [
        Turn("failure", Point(usual.ranks), "local", 0, {}),
        Turn("unheard-of", usual, "new", 0, {"new_s": [1.0]}),
    ]
    page = html_report(Results(HEADER, turns, [Failure("steps", usual, "pipes", "it <broke>")]))
    for title in PLOTS:
        drawn = f'<svg role="img" aria-label="{title}"' in page
        assert drawn != any(word in title for word in ("array", "death", "stages", "demo", "merge")), title
    assert page.count(">nccl<") == 4 + 2, "legends of the curves, names of the bars"
    assert "failed: pipes, steps, " in page
    assert "it &lt;broke&gt;" in page


def test_each_peer_looks_the_same_in_every_report_and_unlike_the_others() -> None:
    def colours(*peers: str) -> set[str]:
        turns = [Turn("idle", Point(2), peer, 0, {"idle_cores": [1.0]}) for peer in peers]
        page = html_report(Results(HEADER, turns, []))
        found = re.findall(r'id="plot\d+-patch_\d+">\s*<path[^>]*style="fill: (#\w+)"', page)
        return set(found) - {"#ffffff"}

    assert len(colours("zeromq")) == 1
    assert colours("zeromq") < colours("pipes", "zeromq")
    assert len(colours(*PEERS)) == len(PEERS) - 1, "nccl's black is what SVG has where no colour is written"


def test_a_report_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run.jsonl"
    arguments = ["bench", "--peers", "floor", "--output", str(output), "--html"]
    assert cli.main([*arguments, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"asyncexec bench: {tmp_path}: Is a directory\n"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert cli.main([*arguments, str(tmp_path / "run.html")]) == 2
    assert "the report needs matplotlib: pip install 'asyncexec[bench]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_where_the_report_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = str(ROOT / "benchmarks" / "results" / "quick-2-cores.jsonl")
    assert cli.main(["bench", "--show", results, "--html", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().endswith("Is a directory")


def test_points_can_be_chosen() -> None:
    parts = command.some_of(suites.SUITES["grid"], [2, 4], [64], [1])
    points = [point for part in parts if part.case == "steps" for point in part.points]
    assert {point.ranks for point in points} == {2, 4}
    assert {(point.requests, point.tensor_mib) for point in points} == {(64, 0), (64, 1), (64, 16)}
    with pytest.raises(ConfigError, match="no point of the suite has these numbers; valid: 1 rank, 64 requests"):
        command.some_of(suites.SUITES["quick"], [3], None, None)
