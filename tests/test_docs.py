"""The documentation's programs run: every Python block of the README and of docs/ is one, unless it is a fragment."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<fragment><!-- fragment -->\n)?```python\n(?P<source>.*?)^```$", re.DOTALL | re.MULTILINE)
LIMIT = 60.0
"""Seconds that one program may take."""

ENVIRONMENTS = {
    "local": {"ASYNCEXEC_TRANSPORT": "local"},
    "nccl-tp2": {
        "ASYNCEXEC_TRANSPORT": "nccl",
        "ASYNCEXEC_TENSOR_PARALLEL_SIZE": "2",
        "ASYNCEXEC_OPTIONS__NCCL__BACKEND": "none",
    },
}
"""For programs that leave the transport to the environment: they run on each."""


class Block(NamedTuple):
    """One Python block, named by its page and the line of its fence."""

    name: str
    source: str
    is_fragment: bool


def blocks_of(text: str, page: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("source"))
        found.append(Block(f"{page}:{line}", match["source"], match["fragment"] is not None))
    return found


BLOCKS = [
    block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())
]
PROGRAMS = [
    pytest.param(block, variables, id=f"{block.name}-{name}" if name else block.name)
    for block in BLOCKS
    if not block.is_fragment
    for name, variables in (ENVIRONMENTS.items() if "from_environment" in block.source else [("", {})])
]


def test_blocks_and_fragments_are_found() -> None:
    text = "one\n```python\nx = 1\n```\n\n<!-- fragment -->\n```python\nawait x\n\ny\n```\n```toml\nz = 1\n```\n"
    assert blocks_of(text, "page") == [Block("page:2", "x = 1\n", False), Block("page:7", "await x\n\ny\n", True)]
    assert any(block.name.startswith("README.md:") and not block.is_fragment for block in BLOCKS)


def test_every_fence_is_one_that_is_found() -> None:
    """An indented or misspelt fence would never run."""
    for page in PAGES:
        fences = re.findall(r"^\s*[`~]{3,}\s*(?:python|py)\b", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == len(blocks_of(page.read_text(encoding="utf-8"), page.name)), page.name


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_it_compiles(block: Block) -> None:
    # an `await` outside of a function is fine in a fragment, and nowhere else
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if block.is_fragment else 0
    compile(block.source, block.name, "exec", flags=flags, dont_inherit=True)


@pytest.mark.parametrize(("block", "variables"), PROGRAMS)
def test_it_runs(block: Block, variables: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block.source, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ASYNCEXEC_")}
    process = subprocess.run(
        [sys.executable, program.name],
        cwd=tmp_path,
        env=inherited | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert process.returncode == 0, f"{block.name} exited with {process.returncode}:\n{process.stderr}"
