"""Fixtures that all tests share: the layouts that an executor's tests run on."""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import uvloop

# the machines that run this are shared: how long an example takes says nothing
hypothesis.settings.register_profile("asyncexec", deadline=None, print_blob=True)
hypothesis.settings.load_profile("asyncexec")

# Workers that need no process groups start in a fraction of the time that torch needs to be imported.
NCCL: dict[str, Any] = {"transport": "nccl", "options": {"nccl": {"backend": "none"}}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "local": {"transport": "local"},
    "nccl-1": NCCL,
    "nccl-tp2": NCCL | {"tensor_parallel_size": 2},
    "nccl-pp2": NCCL | {"pipeline_parallel_size": 2},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are, and say so."""
    marked = [(item, marker) for item in items if (marker := item.get_closest_marker("gpu"))]
    there = importlib.import_module("torch").cuda.device_count() if marked else 0
    for item, marker in marked:
        needed = marker.args[0] if marker.args else 1
        if needed > there:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs; visible: {there}"))


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The configuration of each layout in turn."""
    return dict(LAYOUTS[request.param])


@pytest.fixture
def world_size(layout: dict[str, Any]) -> int:
    return int(layout.get("tensor_parallel_size", 1) * layout.get("pipeline_parallel_size", 1))


# libuv opens a pipe for signals with a process's first loop, and keeps it
uvloop.new_event_loop().close()


def children() -> set[int]:
    """The processes that this one has started and that are there still, zombies included."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Fails the test if it leaves a process or a file descriptor behind."""
    before = children(), set(os.listdir("/proc/self/fd"))
    yield
    assert children() <= before[0], "processes are left behind"
    left = set(os.listdir("/proc/self/fd")) - before[1]
    assert {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in left if os.path.lexists(f"/proc/self/fd/{fd}")} == {}
