"""What the demo shows: live in a terminal, in plain text elsewhere, or as JSON for programs."""

import abc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from asyncexec.demo.engine import Token
from asyncexec.demo.scheduler import FinishReason
from asyncexec.demo.summary import Summary

LIVE_LINES = 8
"""Lines of a running request's text that the live display shows at most: the last ones."""


@dataclass(slots=True, eq=False)
class Generation:
    """One request of the demo, and what it has become so far.

    Attributes:
        prompt: as it was given, text or token ids.
        prompt_ids: its tokens.
        max_tokens: tokens to generate at most.
        knows_text: whether tokens have a text; their ids are shown otherwise.
        output_ids: the tokens generated so far.
        text: their text.
        finish_reason: set when the request has ended.
    """

    prompt: str | Sequence[int]
    prompt_ids: Sequence[int]
    max_tokens: int
    knows_text: bool = True
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    def add(self, token: Token) -> None:
        """Take in the next token."""
        self.output_ids.append(token.token_id)
        self.text += token.text
        self.finish_reason = token.finish_reason

    @property
    def title(self) -> str:
        """What to call the request in one line."""
        return repr(self.prompt) if isinstance(self.prompt, str) else ",".join(map(str, self.prompt))

    @property
    def progress(self) -> str:
        """How far it is, or how it ended."""
        tokens = f"{len(self.output_ids)}/{self.max_tokens} tokens"
        return f"{tokens}, {self.finish_reason}" if self.finish_reason else tokens

    def rendered(self) -> Text:
        """Prompt, if it is text, and output; nothing in it moves the cursor or sets a colour of its own."""
        if not self.knows_text:
            return Text(" ".join(map(str, self.output_ids)))
        prompt = self.prompt if isinstance(self.prompt, str) else ""
        return Text(_printable(prompt), style="bold").append(_printable(self.text), style="not bold")


class Display(Protocol):
    """Where a run of the demo is shown.  A context manager: entered before the ranks start, left at the end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, generation: Generation) -> None:
        """A request has another token."""
        ...

    def summarize(self, summary: Summary) -> None:
        """All requests have ended."""
        ...


def make_display(generations: Sequence[Generation], layout: str, *, as_json: bool) -> Display:
    """The display that suits standard output."""
    if as_json:
        return JsonDisplay(generations, sys.stdout)
    console = Console(highlight=False)
    return LiveDisplay(generations, layout, console) if console.is_terminal else PlainDisplay(generations, console)


class InOrder(abc.ABC):
    """Shows each request when it and all those before it have ended."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        """Args: the requests, in the order in which to show them."""
        self._generations = generations
        self._num_shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None  # There is nothing to put away.

    def update(self, generation: Generation) -> None:
        """Show what can be shown."""
        while self._num_shown < len(self._generations) and self._generations[self._num_shown].finish_reason:
            self.show(self._num_shown + 1, self._generations[self._num_shown])
            self._num_shown += 1

    @abc.abstractmethod
    def show(self, number: int, generation: Generation) -> None:
        """Show a request that has ended; `number` counts from 1."""


class JsonDisplay(InOrder):
    """One JSON object a line and request, in the order given, and nothing else."""

    def __init__(self, generations: Sequence[Generation], output: TextIO) -> None:
        """Args: the requests, and where to write."""
        super().__init__(generations)
        self._output = output

    def show(self, number: int, generation: Generation) -> None:
        """Write one request."""
        fields = {
            "prompt_ids": list(generation.prompt_ids),
            "output_ids": generation.output_ids,
            "text": generation.text,
        }
        print(json.dumps(fields), file=self._output, flush=True)

    def summarize(self, summary: Summary) -> None:
        """Programs get by without."""


class PlainDisplay(InOrder):
    """Text without colours or movement, for files and pipes."""

    def __init__(self, generations: Sequence[Generation], console: Console) -> None:
        """Args: the requests, and where to write."""
        super().__init__(generations)
        self._console = console

    def show(self, number: int, generation: Generation) -> None:
        """Write one request."""
        self._console.print(Text(f"--- {number}: {generation.title} ({generation.progress})"), soft_wrap=True)
        self._console.print(generation.rendered(), soft_wrap=True)

    def summarize(self, summary: Summary) -> None:
        """Write the summary."""
        self._console.print(summary_table(summary))


class LiveDisplay:
    """The ends of the running requests' texts, kept up to date; above them, in full, the requests that have ended."""

    def __init__(self, generations: Sequence[Generation], layout: str, console: Console) -> None:
        """Args: the requests, how the model is run, and the terminal."""
        self._running = list(generations)
        self._layout = layout
        self._console = console
        # Rendered in a thread, ten times a second, so that no token waits for the terminal.
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=10, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def update(self, generation: Generation) -> None:
        """Move a request that has ended to the top."""
        if generation.finish_reason is not None:
            self._running.remove(generation)
            self._console.print(_panel(generation, generation.rendered()))

    def summarize(self, summary: Summary) -> None:
        """Write the summary."""
        self._live.stop()
        self._console.print(summary_table(summary))

    def _render(self) -> RenderableType:
        running = list(self._running)
        if not any(generation.output_ids for generation in running):
            return Text(f"starting {self._layout} ...", style="dim")
        height = self._console.height - 1
        lines = min(LIVE_LINES, max(1, height // len(running) - 2))
        return Group(*(_panel(each, _tail(each.rendered(), lines)) for each in running[: height // (lines + 2)]))


def summary_table(summary: Summary) -> RenderableType:
    """The summary for people."""
    table = Table("ms per step", "p50", "p99")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, latency in summary.latencies.items():
        table.add_row(part, f"{latency.p50 * 1e3:.2f}", f"{latency.p99 * 1e3:.2f}", end_section=part == "aggregate")
    speed = (
        f"{summary.tokens_per_second:,.0f} tokens/s: {summary.num_tokens} tokens of {summary.num_requests} requests "
        f"in {summary.seconds:.1f} s and {summary.num_steps} steps"
    )
    return Group(table, Text(speed, style="bold"), Text(summary.layout))


def _panel(generation: Generation, text: Text) -> Panel:
    return Panel(
        text, title=Text(generation.title), title_align="left", subtitle=generation.progress, border_style="cyan"
    )


def _tail(text: Text, lines: int) -> Text:
    """The last lines of a text, each cut to the terminal's width."""
    return Text("\n", no_wrap=True, overflow="ellipsis").join(text.split("\n")[-lines:])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
