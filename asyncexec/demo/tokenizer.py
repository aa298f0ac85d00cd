"""Text to token ids and back, as far as the checkpoint's directory says how.

- `tokenizer.json`, the format of the `tokenizers` library: `HuggingFaceTokenizer`.
- A vocabulary of the 256 bytes, and beyond them nothing but the ids that begin and end a text: `ByteTokenizer`.
- Anything else: `NoTokenizer`, which leaves prompts of token ids.

The way back is a `Detokenizer` for each request: it is given one token at a time, and never says half a character.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from asyncexec.demo.checkpoint import CheckpointError, ModelConfig

NUM_BYTES = 256
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 5
"""How many tokens of the prompt, at least, the output is decoded with: its leading space depends on them."""


class NotText(ValueError):
    """Text was given for a checkpoint that comes without a tokenizer."""


class Detokenizer(Protocol):
    """Turns one request's output into text, token by token."""

    def add(self, token_id: int) -> str:
        """The text that the next token completes: whole characters, perhaps none."""
        ...

    def finish(self) -> str:
        """The rest, after the last token: U+FFFD where the output ends within a character."""
        ...


class Tokenizer(Protocol):
    """Turns text into token ids, and makes the detokenizers for the way back.

    Attributes:
        knows_text: whether there is any text; False only for `NoTokenizer`.
    """

    knows_text: ClassVar[bool]

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, with those that begin a text; raises NotText where there is no way."""
        ...

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A fresh detokenizer for the output that follows a prompt."""
        ...


def load_tokenizer(directory: str | Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer that goes with a checkpoint.

    Raises:
        CheckpointError: there is a tokenizer.json that cannot be read, or the `tokenizers` library is not installed.
    """
    path = Path(directory) / "tokenizer.json"
    if path.is_file():
        return HuggingFaceTokenizer(path)
    special = {config.bos_token_id, *config.eos_token_ids} - {None}
    if config.vocab_size >= NUM_BYTES and special == set(range(NUM_BYTES, config.vocab_size)):
        return ByteTokenizer(config.bos_token_id)
    return NoTokenizer(directory)


class HuggingFaceTokenizer:
    """A `tokenizer.json`."""

    knows_text: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        """Read the file; raises CheckpointError like `load_tokenizer`."""
        try:
            import tokenizers
        except ImportError as error:
            raise CheckpointError(f"{path} needs the tokenizers library: pip install tokenizers") from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises nothing more specific.
            raise CheckpointError(f"{path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The ids, with whatever the file says that a text begins with."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def detokenizer(self, prompt_ids: Sequence[int]) -> "WindowDetokenizer":
        """A detokenizer that has the end of the prompt in its window."""
        return WindowDetokenizer(self._tokenizer, prompt_ids)


class WindowDetokenizer:
    """Decodes each new token together with those before it, as spaces and characters may span tokens.

    The window begins with the tokens of the last text that was said.  These begin and end between two characters, so
    what the whole window's text is longer by than theirs is what the new tokens say.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        """Args: a `tokenizers.Tokenizer`, and the prompt."""
        self._tokenizer = tokenizer
        self._said: list[int] = []
        self._pending: list[int] = []
        for length in range(CONTEXT, CONTEXT + 4):  # A character has 4 tokens at most: one of these begins with one.
            self._said = list(prompt_ids[-length:])
            if not tokenizer.decode(self._said).startswith(REPLACEMENT):
                break

    def add(self, token_id: int) -> str:
        """The text that the next token completes."""
        self._pending.append(token_id)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._said, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """What has been held back."""
        text = self._new_text()
        self._pending.clear()
        return text

    def _new_text(self) -> str:
        before: str = self._tokenizer.decode(self._said)
        after: str = self._tokenizer.decode(self._said + self._pending)
        return after[len(before) :]


class ByteTokenizer:
    """Token ids 0 to 255 are the bytes of UTF-8; the ids beyond say nothing."""

    knows_text: ClassVar[bool] = True

    def __init__(self, bos_token_id: int | None = None) -> None:
        """Args: the id that begins every prompt, if one does."""
        self._start = [] if bos_token_id is None else [bos_token_id]

    def encode(self, text: str) -> list[int]:
        """The id that begins a text, then the bytes."""
        return self._start + list(text.encode("utf-8", errors="replace"))

    def detokenizer(self, prompt_ids: Sequence[int]) -> "ByteDetokenizer":
        """A detokenizer; bytes need no context."""
        return ByteDetokenizer()


class ByteDetokenizer:
    """Decodes UTF-8 byte by byte; what is no UTF-8 comes out as U+FFFD."""

    def __init__(self) -> None:
        """Start between two characters."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """The characters that this byte completes."""
        return self._decoder.decode(bytes([token_id])) if token_id < NUM_BYTES else ""

    def finish(self) -> str:
        """U+FFFD if a character is incomplete."""
        return self._decoder.decode(b"", final=True)


class NoTokenizer:
    """What is left without a tokenizer: prompts of token ids, and output without text."""

    knows_text: ClassVar[bool] = False

    def __init__(self, directory: str | Path) -> None:
        """Args: the checkpoint's directory, for the error message."""
        self._directory = directory

    def encode(self, text: str) -> list[int]:
        """Raises NotText."""
        raise NotText(f"{self._directory} has no tokenizer.json, so give the prompt as token ids, not as {text!r}")

    def detokenizer(self, prompt_ids: Sequence[int]) -> "NoDetokenizer":
        """A detokenizer that says nothing."""
        return NoDetokenizer()


class NoDetokenizer:
    """Says nothing."""

    def add(self, token_id: int) -> str:
        """Nothing."""
        return ""

    def finish(self) -> str:
        """Nothing."""
        return ""
