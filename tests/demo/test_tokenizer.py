"""Tokenizers: text survives the way there and back, token by token, and no half characters are said."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from asyncexec.demo.checkpoint import CheckpointError, ModelConfig
from asyncexec.demo.tokenizer import (
    ByteTokenizer,
    Detokenizer,
    HuggingFaceTokenizer,
    NoTokenizer,
    NotText,
    WindowDetokenizer,
    load_tokenizer,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd\u2581"))


def config(vocab_size: int, bos: int | None = None, eos: int | list[int] | None = None) -> ModelConfig:
    return ModelConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        vocab_size=vocab_size,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def byte_level() -> Tokenizer:
    """As GPT-2's and Llama 3's: every byte is a letter of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: letters, spaces as U+2581, and bytes for all that has no letter of its own."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocabulary |= {letter: 257 + i for i, letter in enumerate("\u2581abcdefghij")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


@given(TEXTS)
def test_bytes_come_back_as_whole_characters(text: str) -> None:
    tokenizer = ByteTokenizer(bos_token_id=256)
    ids = tokenizer.encode(text)
    assert ids[0] == 256
    said = pieces(tokenizer.detokenizer([256]), ids)
    assert "".join(said) == text
    assert [piece for piece in said if piece] == list(text)


def test_bytes_that_are_no_text_are_replaced() -> None:
    euro = list("€".encode())
    assert "".join(pieces(ByteTokenizer().detokenizer([]), [0xFF, *euro, 257, *euro[:2]])) == "\ufffd€\ufffd"


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_byte_level_tokens_come_back_as_whole_characters(prompt: str, text: str) -> None:
    tokenizer = byte_level()
    said = pieces(WindowDetokenizer(tokenizer, tokenizer.encode(prompt).ids), tokenizer.encode(text).ids)
    assert "".join(said) == text
    assert "\ufffd" not in "".join(said)


@settings(deadline=None)
@given(st.text("abc é€😀", min_size=1), st.text("abc é€😀"))
def test_spaces_and_fallback_bytes_come_back_whole(prompt: str, text: str) -> None:
    tokenizer = byte_fallback()
    whole = tokenizer.encode(prompt + text).ids
    start = len(tokenizer.encode(prompt).ids)
    said = pieces(WindowDetokenizer(tokenizer, whole[:start]), whole[start:])
    assert "".join(said) == text
    assert "\ufffd" not in "".join(said)


def test_an_end_within_a_character_is_told_at_the_end() -> None:
    tokenizer = byte_level()
    detokenizer = WindowDetokenizer(tokenizer, [])
    ids = tokenizer.encode("a€").ids
    assert [detokenizer.add(token) for token in ids[:-1]] == ["a", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_the_directory_decides(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(tmp_path, config(258, bos=256, eos=257)), ByteTokenizer)
    assert isinstance(load_tokenizer(tmp_path, config(257, eos=[256])), ByteTokenizer)
    assert isinstance(load_tokenizer(tmp_path, config(258, bos=1, eos=2)), NoTokenizer)
    assert isinstance(load_tokenizer(tmp_path, config(1000)), NoTokenizer)
    assert isinstance(load_tokenizer(tmp_path, config(100)), NoTokenizer)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, config(258, bos=256, eos=257))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    ids = tokenizer.encode("né")
    assert "".join(pieces(tokenizer.detokenizer([]), ids)) == "né"


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, config(1000))
    assert not tokenizer.knows_text
    with pytest.raises(NotText, match=r"no tokenizer\.json.*token ids, not as 'hello'"):
        tokenizer.encode("hello")
    assert pieces(tokenizer.detokenizer([1]), [2, 3]) == ["", "", ""]


@pytest.mark.parametrize("content", ["{", json.dumps({"version": "1.0"})])
def test_a_tokenizer_file_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path, config(1000))
