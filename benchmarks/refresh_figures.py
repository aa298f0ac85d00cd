"""Puts the tables of result files into the pages of docs/ that name them: `python benchmarks/refresh_figures.py`."""

import io
import re
from pathlib import Path

from rich.console import Console

from asyncexec.bench import command
from asyncexec.bench.results import Results

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("benchmarks.md", "vllm.md")]

_BLOCK = re.compile(r"(^From `(\S+)`:\n\n```text\n).*?(```\n)", re.DOTALL | re.MULTILINE)
"""Where figures go: a line that names their file, and a block of text."""


def refreshed(page: str) -> str:
    """The page, each of whose blocks of figures is what `asyncexec bench --show` prints of its file.

    Raises:
        ValueError: the page has no block of figures.
        ConfigError: a file that it names is not there.
    """
    changed, count = _BLOCK.subn(lambda block: f"{block[1]}{_shown(ROOT / block[2])}\n{block[3]}", page)
    if count == 0:
        raise ValueError("the page has no block of figures: a line 'From `FILE`:' and one of text")
    return changed


def _shown(path: Path) -> str:
    written = io.StringIO()
    command.show(Results.read(path), Console(width=command.WIDTH, file=written, highlight=False))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
