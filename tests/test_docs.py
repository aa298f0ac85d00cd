"""The documentation does what it says: programs run, configurations parse, commands exist, links lead somewhere.

A Python block that cannot run alone has `<!-- fragment: why -->` on the line above it: it is compiled, and the reason
is printed.  A TOML block that is no configuration has `<!-- not a configuration: why -->`, and a `sh` block of commands
that are not ours `<!-- not checked: why -->`.  In a `console` block, what follows a command is what it prints, unless
`<!-- output varies: why -->` stands above.
"""

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

import asyncexec
from asyncexec import ExecutorConfig, cli, testing

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>[^:\n]*?)(?:: (?P<reason>[^\n]*))? -->\n *)?```(?P<language>\w*)\n"
    r"(?P<source>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
MARKS = {"python": "fragment", "toml": "not a configuration", "console": "output varies", "sh": "not checked"}
LANGUAGES = {*MARKS, "text", "mermaid"}
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
    """One block, named by its page and the line of its fence; `mark` is None where nothing is said above it."""

    name: str
    language: str
    source: str
    mark: str | None
    reason: str | None


class Command(NamedTuple):
    """One command of a shell block, and the lines that follow it."""

    words: list[str]
    output: str


def blocks_of(text: str, page: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("source"))
        source = re.sub(rf"^{match['indent']}", "", match["source"], flags=re.MULTILINE)
        found.append(Block(f"{page}:{line}", match["language"], source, match["mark"], match["reason"]))
    return found


def commands_of(block: Block) -> list[Command]:
    """Every line of a `sh` block, and those after `$ ` of a `console` block."""
    if block.language == "sh":
        return [Command(words, "") for line in block.source.splitlines() if (words := shlex.split(line, comments=True))]
    parts = re.split(r"^\$ (.*)\n", block.source, flags=re.MULTILINE)[1:]
    return [Command(shlex.split(line), output) for line, output in zip(parts[::2], parts[1::2], strict=True)]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"), page_name(page))]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in ("sh", "console")]
PROGRAMS = [
    pytest.param(block, variables, id=f"{block.name}-{name}" if name else block.name)
    for block in PYTHON
    for name, variables in (ENVIRONMENTS.items() if "from_environment" in block.source else [("", {})])
]


def run_program(source: str, variables: dict[str, str], directory: Path) -> str:
    """Run a program in a process of its own; returns its standard output."""
    program = directory / "program.py"
    program.write_text(source, encoding="utf-8")
    return run([sys.executable, program.name], variables, directory)


def run(command: list[str], variables: dict[str, str], directory: Path) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ASYNCEXEC_")}
    process = subprocess.run(
        command,
        cwd=directory,
        env=inherited | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert process.returncode == 0, f"{command} exited with {process.returncode}:\n{process.stderr}"
    return process.stdout


# ------------------------------------------------------------------------------------------------------- finding


def test_blocks_are_found() -> None:
    text = "one\n```python\nx = 1\n```\n\n<!-- fragment: it waits -->\n```python\nawait x\n\ny\n```\n"
    text += "- a\n  ```sh\n  z\n  ```\n"
    assert blocks_of(text, "page") == [
        Block("page:2", "python", "x = 1\n", None, None),
        Block("page:7", "python", "await x\n\ny\n", "fragment", "it waits"),
        Block("page:13", "sh", "z\n", None, None),
    ]
    assert commands_of(Block("", "console", "$ a b\n1\n2\n$ c\n", None, None)) == [
        Command(["a", "b"], "1\n2\n"),
        Command(["c"], ""),
    ]
    assert {"python", "toml", "sh", "console"} <= {block.language for block in BLOCKS}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_is_one_that_is_found(page: Path) -> None:
    """An indented or misspelt block would never run."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^\s*[`~]{3,}", text, re.MULTILINE)
    assert len(fences) == 2 * len(blocks_of(text, ""))
    assert not re.search(r"\n\n {4,}(?:\$|make|asyncexec|pip|python|import|from)\b", text), "a block without a fence"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_its_language_is_known_and_a_mark_has_a_reason(block: Block) -> None:
    assert block.language in LANGUAGES
    if block.mark is not None:
        assert block.mark == MARKS.get(block.language)
        assert block.reason, f"say why: <!-- {block.mark}: why -->"


# -------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_it_compiles(block: Block) -> None:
    # an `await` outside of a function is fine in a fragment, and nowhere else
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if block.mark else 0
    compile(block.source, block.name, "exec", flags=flags, dont_inherit=True)


@pytest.mark.parametrize(("block", "variables"), PROGRAMS)
def test_it_runs(block: Block, variables: dict[str, str], tmp_path: Path) -> None:
    if block.mark:
        pytest.skip(f"a fragment: {block.reason}")
    run_program(block.source, variables, tmp_path)


# --------------------------------------------------------------------------------------------------------- shell


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=lambda block: block.name)
def test_it_is_a_configuration(block: Block, tmp_path: Path) -> None:
    if block.mark:
        tomllib.loads(block.source)
        pytest.skip(f"no configuration: {block.reason}")
    file = tmp_path / "engine.toml"
    file.write_text(block.source, encoding="utf-8")
    ExecutorConfig.from_toml(file)


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_its_commands_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", lambda parsed: 0)
    if block.language == "sh" and block.mark:
        pytest.skip(f"not checked: {block.reason}")
    commands = commands_of(block)
    assert commands
    for command in commands:
        _require_command(command.words)


def _require_command(words: list[str]) -> None:
    """A command of ours with arguments that it takes, a target of the Makefile, an extra, a file that is there."""
    variables, (program, *arguments) = _split(words)
    if variables:
        ExecutorConfig.from_environment(variables)
    match Path(program).name:
        case "asyncexec":
            assert _status(arguments) == 0, f"{arguments} are no arguments of asyncexec"
        case "make":
            targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert {word for word in arguments if "=" not in word} <= set(targets)
        case "python":
            assert (ROOT / arguments[0]).is_file() or arguments[0] in ("engine.py", "first.py", "second.py")
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for wanted in re.findall(r"\[(.*?)\]", " ".join(arguments)):
                assert set(wanted.split(",")) <= set(extras["optional-dependencies"])
        case "export":
            ExecutorConfig.from_environment(dict(word.split("=", 1) for word in arguments))
        case "pre-commit":
            assert arguments == ["install"]
        case other:
            raise AssertionError(f"{other}: say here how to check it")


def _status(arguments: list[str]) -> object:
    try:
        return cli.main(arguments)
    except SystemExit as left:
        return left.code


def _split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    rest = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    return dict(word.split("=", 1) for word in words[: len(words) - len(rest)]), rest


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "console"], ids=lambda block: block.name
)
def test_it_prints_that(block: Block, tmp_path: Path) -> None:
    """A script is the Python block before."""
    if block.mark:
        pytest.skip(f"its output varies: {block.reason}")
    before = [other for other in BLOCKS[: BLOCKS.index(block)] if other.language == "python"]
    for command in commands_of(block):
        variables, (program, *arguments) = _split(command.words)
        if Path(program).name == "python":
            assert run_program(before[-1].source, variables, tmp_path) == command.output
        else:
            assert run([sys.executable, "-m", "asyncexec", *arguments], variables, tmp_path) == command.output


# ---------------------------------------------------------------------------------------------- links, reference


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=page_name)
def test_its_links_lead_somewhere(page: Path) -> None:
    """In the repository, where README and CONTRIBUTING are read; `make docs` checks the site's own."""
    text = re.sub(BLOCK, "", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!https?://)(.*?)\)", text):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor and target.parent.name != "reference":  # those anchors are the generator's
            assert anchor in anchors_of(target), link


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(BLOCK, "", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_has_every_public_name() -> None:
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").iterdir())
    named = {name.rpartition(".")[2] for name in re.findall(r"^::: (asyncexec\.\S+)$", reference, re.MULTILINE)}
    assert named >= {*asyncexec.__all__, *testing.__all__} - {"__version__"}


def test_every_page_has_its_place_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].partition("\nvalidation:")[0]
    for page in DOCS:
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, (
            f"{page_name(page)}: add it to mkdocs.yml"
        )
