"""vLLM's engine on the executor: its tokens are those of vLLM's own executor, and a killed rank ends it at once."""

import os
from pathlib import Path
from typing import Any

import pytest
from engines import OURS, run

pytestmark = pytest.mark.timeout(900)
KILLS = int(os.environ.get("ASYNCEXEC_VLLM_KILLS", "1"))
"""How often a rank is killed; each start of the engine takes half a minute."""


@pytest.mark.parametrize(
    ("tp", "pp", "core", "scheduling"),
    [
        (1, 1, "process", "sync"),
        (2, 1, "process", "sync"),
        (2, 1, "inside", "sync"),
        (2, 1, "process", "async"),
        (1, 2, "inside", "sync"),
        (1, 2, "process", "sync"),
    ],
)
def test_tokens_equal_those_of_vllms_executor(model: str, tp: int, pp: int, core: str, scheduling: str) -> None:
    theirs = run(model, "mp", tp, pp)
    assert [len(tokens) for tokens in theirs] == [64] * 16
    assert run(model, OURS, tp, pp, core=core, scheduling=scheduling) == theirs


def test_concurrent_requests_of_the_async_engine(model: str) -> None:
    assert run(model, OURS, 2, mode="concurrent") == run(model, "mp", 2)


@pytest.mark.parametrize("backend", ["custom.MarkedExecutor"])
@pytest.mark.parametrize("mode", ["generate", "concurrent"])
def test_a_class_derived_from_the_executor(
    model: str, backend: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKED_EXECUTOR", str(tmp_path / "marked"))
    assert run(model, backend, 2, mode=mode) == run(model, "mp", 2)
    assert (tmp_path / "marked").exists()


def test_verbs_of_the_whole_engine(model: str) -> None:
    ours, theirs = (dict(run(model, backend, 2, mode="verbs")) for backend in (OURS, "mp"))
    assert ours.pop("traces") > 0
    assert theirs.pop("traces") > 0
    assert ours == theirs
    assert ours["after"] == ours["before"] != ours["with adapter"]
    assert ours["loras"] == [True, [5], True, True, []]
    assert ours["sleeping"] == [True, False]
    assert ours["shards"] == ["model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"]


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_rank_ends_the_engine_at_once(
    model: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it can be seen what is left
    outcome = run.__wrapped__(model, OURS, 2, mode="killed", rank=number % 2)
    record_property("seconds", outcome["seconds"])
    assert outcome["errors"] == ["EngineDeadError"]
    assert outcome["meetings"] == 1
    assert outcome["left"] == []
    assert outcome["seconds"] < 1.0
