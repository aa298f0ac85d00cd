"""Fixtures that all tests share: the layouts that an executor's tests run on."""

import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import uvloop

from asyncexec.testing.conformance import descriptors
from asyncexec_ray.cluster import LOCAL_SYSTEM_CONFIG

# the machines that run this are shared: how long an example takes says nothing
hypothesis.settings.register_profile("asyncexec", deadline=None, print_blob=True)
hypothesis.settings.load_profile("asyncexec")

# Workers that need no process groups start in a fraction of the time that torch needs to be imported.
NCCL: dict[str, Any] = {"transport": "nccl", "options": {"nccl": {"backend": "none"}}}
RAY: dict[str, Any] = {"transport": "ray", "options": {"ray": {"backend": "none"}}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "local": {"transport": "local"},
    "nccl-1": NCCL,
    "nccl-tp2": NCCL | {"tensor_parallel_size": 2},
    "nccl-pp2": NCCL | {"pipeline_parallel_size": 2},
    "ray-tp2": RAY | {"tensor_parallel_size": 2},
    "ray-pp2": RAY | {"pipeline_parallel_size": 2},
    "ray-documented": {"transport": "ray", "options": {"ray": {"backend": "none", "driver": "documented"}}},
    "ray-calls": {"transport": "ray", "options": {"ray": {"backend": "none", "driver": "calls"}}},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are, and say so."""
    marked = [(item, marker) for item in items if (marker := item.get_closest_marker("gpu"))]
    there = importlib.import_module("torch").cuda.device_count() if marked else 0
    for item, marker in marked:
        needed = marker.args[0] if marker.args else 1
        if needed > there:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs; visible: {there}"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray for all tests that need one: with more CPUs than there are, since its ranks do little."""
    ray = importlib.import_module("ray")
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        object_store_memory=3 << 30,
        logging_level="ERROR",
        _system_config=LOCAL_SYSTEM_CONFIG,
    )
    yield
    ray.shutdown()


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The configuration of each layout in turn."""
    layout = LAYOUTS[request.param]
    if layout["transport"] == "ray":
        request.getfixturevalue("ray_cluster")
    return dict(layout)


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
def no_leftovers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test if it leaves a process or a file descriptor behind."""
    for fixture in ("layout", "make"):
        if fixture in request.fixturenames:
            request.getfixturevalue(fixture)  # the tests' Ray, which outlasts the test, starts before it
    before = children(), set(descriptors())
    yield
    assert children() <= before[0], "processes are left behind"
    assert {fd: target for fd, target in descriptors().items() if fd not in before[1]} == {}
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        state: Any = importlib.import_module("ray._private.state")
        actors = [actor for actor in state.actors().values() if actor["State"] != "DEAD"]
        assert actors == [], "actors are left behind"
        groups = importlib.import_module("ray.util").placement_group_table().values()
        assert [group for group in groups if group["state"] != "REMOVED"] == [], "placement groups are left behind"
