"""What the step timeline and the metrics cost: `python benchmarks/tracing_cost.py`.

Each way to run has a driver process of its own with its own ranks; they take turns in short rounds, in another order
each time, and wait while it is not their turn.

    before     the checkout before the commit that added `asyncexec/observing.py`, taken from git: no hooks at all
    off        this checkout, no observers
    again      the same once more: what the method itself cannot tell apart
    traced     off, with a trace being written
    metrics    off, with Prometheus metrics (prometheus_client)

Steps without work (the rank returns at once), and steps in which every rank sleeps for a millisecond.  Ratios of
medians of rounds with a 95% bootstrap interval, in which the values of one round stay together; the difference in
microseconds is that of the rounds' means.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import asyncexec
from asyncexec import create_executor, run
from asyncexec.bench.ratios import RESAMPLES, quantile, ratio_of_medians

ROOT = Path(__file__).parents[1]
MODES = ("before", "off", "again", "traced", "metrics")
LAYOUTS: dict[str, dict[str, Any]] = {
    "local": {"transport": "local"},
    "nccl-tp2": {"transport": "nccl", "tensor_parallel_size": 2, "options": {"nccl": {"backend": "none"}}},
}


class Worker:
    def __init__(self, context: Any) -> None:
        pass

    def execute_model(self, seconds: float, intermediate: None) -> int:
        if seconds:
            time.sleep(seconds)
        return os.getpid()

    def source(self) -> str:
        return str(Path(asyncexec.__file__).parents[1])


async def child(mode: str, layout: str) -> None:
    """Run rounds of steps as asked on standard input: seconds and number; answer microseconds a step."""
    async with contextlib.AsyncExitStack() as stack:
        executor = await stack.enter_async_context(create_executor(LAYOUTS[layout], "tracing_cost:Worker"))
        if mode == "traced":
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            await stack.enter_async_context(executor.trace(Path(directory, "trace.json")))
        elif mode == "metrics":
            from asyncexec.metrics.prometheus import PrometheusMetrics

            PrometheusMetrics().observe(executor)
        sources = {Worker(None).source(), *await executor.collective_rpc("source")}
        print(*sources, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            seconds, steps = float(line.split()[0]), int(line.split()[1])
            began = time.perf_counter_ns()
            for _ in range(steps):
                await executor.execute_model(seconds)
            print((time.perf_counter_ns() - began) / steps / 1e3, flush=True)


class Host:
    """A driver process of one mode."""

    def __init__(self, mode: str, layout: str, source: Path) -> None:
        paths = [source, source / "transports", ROOT / "benchmarks"]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", mode, "--layouts", layout],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if (used := self._read().strip()) != str(source):
            raise SystemExit(f"BROKEN: {mode} runs the code of {used}, not of {source}")

    def measure(self, seconds: float, steps: int) -> float:
        """Microseconds a step."""
        stdin = self._process.stdin
        assert stdin is not None
        print(seconds, steps, file=stdin, flush=True)
        return float(self._read())

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _read(self) -> str:
        stdout: IO[str] | None = self._process.stdout
        assert stdout is not None
        if not (line := stdout.readline()):
            raise SystemExit(f"BROKEN: a driver ended with {self._process.wait()}")
        return line


@contextlib.contextmanager
def checkout_before() -> Iterator[Path]:
    """The files of the commit before the hooks."""
    git = ("git", "-C", str(ROOT))
    log = (*git, "log", "--diff-filter=A", "--format=%h", "--", "asyncexec/observing.py")
    added = subprocess.run(log, check=True, capture_output=True, text=True).stdout.split()[-1]
    with tempfile.TemporaryDirectory() as directory:
        archive = subprocess.run((*git, "archive", f"{added}^"), check=True, capture_output=True).stdout
        subprocess.run(("tar", "-x", "-C", directory), input=archive, check=True)
        yield Path(directory).resolve()


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median difference of the rounds with its 95% bootstrap interval."""
    rounds = [a - b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    drawn = [statistics.median(draw.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES)]
    return f"{statistics.median(rounds):+.2f} [{quantile(drawn, 0.025):+.2f}, {quantile(drawn, 0.975):+.2f}]"


def measure(layout: str, seconds: float, steps: int, rounds: int, before: Path) -> None:
    samples: dict[str, list[float]] = {mode: [] for mode in MODES}
    with contextlib.ExitStack() as stack:
        hosts = {}
        for mode in MODES:
            hosts[mode] = Host(mode, layout, before if mode == "before" else ROOT)
            stack.callback(hosts[mode].close)
        shuffle = random.Random(0)
        for n in range(rounds + 2):
            for mode in shuffle.sample(MODES, len(MODES)):
                took = hosts[mode].measure(seconds, steps)
                if n >= 2:  # the first warm up
                    samples[mode].append(took)
    for ours, theirs in (("off", "before"), ("again", "off"), ("traced", "off"), ("metrics", "off")):
        a, b = samples[ours], samples[theirs]
        print(
            f"{layout:9} {seconds * 1e3:4g} ms   {ours:>7} / {theirs:6} {statistics.median(a):9.1f} "
            f"{statistics.median(b):9.1f}   {ratio_of_medians(a, b)!s:>19}   {difference(a, b)}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument(
        "--steps", type=int, default=512, help="of one round; what the last 64 leave to a trace may fall outside it"
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--milliseconds", nargs="+", type=float, default=[0.0, 1.0], help="of work in a step")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run(child(arguments.child, arguments.layouts[0]))
        return 0
    print("layout    step      pair                us a step, medians   ratio [95%]         difference, us [95%]")
    with checkout_before() as before:
        for layout in arguments.layouts:
            for milliseconds in arguments.milliseconds:
                measure(layout, milliseconds / 1e3, arguments.steps, arguments.rounds, before)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
