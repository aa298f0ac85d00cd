"""Puts the tables of a result file into docs/benchmarks.md: `python benchmarks/refresh_figures.py`."""

import io
import re
from pathlib import Path

from rich.console import Console

from asyncexec.bench import command
from asyncexec.bench.results import Results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results" / "quick-2-cores.jsonl"


def refreshed(page: str, path: Path) -> str:
    """The page with the block of figures as `asyncexec bench --show` prints the file.

    Raises:
        ValueError: the page has no block of figures.
    """
    written = io.StringIO()
    command.show(Results.read(path), Console(width=command.WIDTH, file=written, highlight=False))
    figures = "\n".join(line.rstrip() for line in written.getvalue().splitlines())
    changed, count = re.subn(
        r"```text\nsuite .*?\n```\n", lambda _: f"```text\n{figures}\n```\n", page, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError("the page has no block of figures: one of text that begins with 'suite'")
    return changed


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
