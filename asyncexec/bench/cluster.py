"""The Ray cluster that the peers on Ray share: one, in a process of its own, for the time of a run."""

import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from asyncexec.bench.processes import end_with_parent
from asyncexec.errors import AsyncExecError

CPUS = GPUS = 32
"""More than there are: what the ranks reserve says nothing about what they use."""

START_LIMIT_S = 60.0

_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_MODE")


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """A local cluster; meanwhile, `RAY_ADDRESS` and `RAY_AUTH_MODE` say how this process's children connect to it.

    Raises:
        AsyncExecError: Ray did not start.
    """
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(theirs,))
    before = {name: os.environ.pop(name, None) for name in _VARIABLES}
    process.start()
    theirs.close()
    try:
        if not connection.poll(START_LIMIT_S):
            raise AsyncExecError(f"Ray did not start within {START_LIMIT_S:g} s")
        os.environ.update(connection.recv())
        yield
    except EOFError:
        raise AsyncExecError("Ray did not start; its own output says why") from None
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        connection.close()
        process.join()


def _hold(connection: "Connection[Any, Any]") -> None:
    """Ray's daemons end with the process that started them."""
    end_with_parent()
    os.setsid()
    ray: Any = importlib.import_module("ray")
    # Ray's default niceness of 15 would let whatever else runs hold up every step
    ray.init(
        address="local",
        num_cpus=CPUS,
        num_gpus=GPUS,  # vLLM's executors do not do without
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _system_config={"worker_niceness": 0, "prestart_worker_first_driver": False},
    )
    with open(os.devnull, "w") as nowhere:  # from here on, Ray remarks on how many actors there are
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    # Ray turns authentication on for a cluster that it starts, and off for one whose address it is given
    connection.send(
        {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "")}
    )
    with contextlib.suppress(EOFError):
        connection.recv()  # ends when the harness closes its side
    ray.shutdown()
