"""Executors for vLLM's tests: workers that do nothing, since each start of vLLM takes many seconds."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncexec.bench import vllm_noop, vllm_tiny

vllm_tiny.set_environment()

Make = Callable[..., Any]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes an executor, which is shut down after the test."""
    made: list[Any] = []

    def make(ranks: int = 2, **options: Any) -> Any:
        executor = vllm_noop.make_executor("asyncexec", ranks, **options)
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.shutdown()


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    """An executor of two ranks that the tests of a module share; it must be as usable after a test as before."""
    executor = vllm_noop.make_executor("asyncexec", 2)
    yield executor
    executor.shutdown()
