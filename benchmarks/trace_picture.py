"""Draws a trace as an SVG for the documentation: `python benchmarks/trace_picture.py docs/trace.svg`.

It runs a few steps of two pipeline stages with a trace, and draws what the file says; or draws another trace's file.
"""

import argparse
import asyncio
import collections
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from asyncexec import DeferredOutput, IntermediateTensors, RankContext, create_executor, run

WIDTH, LEFT, ROW, TOP = 960, 150, 16, 28
COLORS = {"encode": "#9c6", "send": "#69c", "aggregate": "#c96", "decode": "#bd8", "run": "#7ac", "reply": "#c7a"}
Event = dict[str, Any]


class Later(DeferredOutput[int]):
    def wait(self) -> int:
        time.sleep(0.0006)
        return 1


class Stages:
    """Two stages whose work takes a millisecond; the output of the second comes later."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: int, intermediate: IntermediateTensors[Any] | None) -> Any:
        time.sleep(0.001)
        return Later() if self.context.is_last_stage else IntermediateTensors[Any]({})


async def record(path: Path) -> None:
    config = {"transport": "nccl", "pipeline_parallel_size": 2, "options": {"nccl": {"backend": "none"}}}
    async with create_executor(config, "trace_picture:Stages") as executor:
        await asyncio.gather(*(executor.execute_model(n) for n in range(20)))  # warm
        async with executor.trace(path):
            await asyncio.gather(*(executor.execute_model(n) for n in range(4)))


def draw(events: list[Event]) -> str:
    slices = sorted((e for e in events if e["ph"] == "X"), key=lambda e: (e["ts"], -e["dur"]))
    began = min(e["ts"] for e in slices)
    span = max(e["ts"] + e["dur"] for e in slices) - began
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    used = {(e["pid"], e["tid"]) for e in slices}
    tops = {track: TOP + n * (2 * ROW + 14) for n, track in enumerate(sorted(used))}

    def x(ts: float) -> float:
        return float(LEFT + (ts - began) / span * (WIDTH - LEFT - 8))

    parts = []
    for (pid, tid), top in tops.items():
        label = f"{processes[pid]}, {threads[pid, tid]}"
        parts.append(f'<text x="4" y="{top + ROW}">{escape(label)}</text>')
    ends: dict[tuple[int, int], float] = collections.defaultdict(float)
    for e in slices:
        track = e["pid"], e["tid"]
        nested = e["ts"] < ends[track]
        ends[track] = max(ends[track], e["ts"] + e["dur"])
        left, width = x(e["ts"]), max(e["dur"] / span * (WIDTH - LEFT - 8), 0.6)
        color = COLORS.get(e["name"].split()[0], "#ccc")
        top = tops[track] + (ROW if nested else 0)
        title = f"<title>{escape(e['name'])}: {e['dur']:.0f} us</title>"
        parts.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 2}" fill="{color}">{title}</rect>'
        )
        if width > 6.5 * len(e["name"]):
            parts.append(f'<text x="{left + 3:.1f}" y="{top + 11}">{escape(e["name"])}</text>')
    flows = collections.defaultdict(list)
    for e in events:
        if e["ph"] in "stf":
            flows[e["id"]].append((e["ts"], tops[e["pid"], e["tid"]] + ROW // 2))
    for points in flows.values():
        line = " ".join(f"{x(ts):.1f},{y}" for ts, y in sorted(points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="#555" stroke-width="0.7" stroke-opacity="0.6"/>')
    height = max(tops.values()) + 2 * ROW + 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="10"><rect width="{WIDTH}" height="{height}" fill="white"/>'
        f'<text x="{LEFT}" y="14">{span / 1e3:.1f} ms</text>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the SVG")
    parser.add_argument("--trace", type=Path, help="draw this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = arguments.trace or Path(directory, "trace.json")
        if arguments.trace is None:
            run(record(path))
        arguments.output.write_text(draw(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
