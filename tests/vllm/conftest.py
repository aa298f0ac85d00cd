"""Executors for vLLM's tests: workers that do nothing, since each start of vLLM takes many seconds."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncexec.bench import vllm_noop, vllm_tiny
from asyncexec_ray.cluster import LOCAL_SYSTEM_CONFIG

vllm_tiny.set_environment()

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vllm_tiny.make_model(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """Of one Ray for all tests of a module; this process is connected to it."""
    ray: Any = importlib.import_module("ray")
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config=LOCAL_SYSTEM_CONFIG
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


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
