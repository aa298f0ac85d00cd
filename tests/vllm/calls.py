"""What several tests ask of an executor, on whatever transport."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from asyncexec.bench import vllm_noop
from asyncexec.errors import ExecutorFailed, WorkerDied


def step(executor: Any, requests: int = 4) -> Any:
    """As the engine core runs it."""
    return vllm_noop.step(executor, vllm_noop.scheduler_output(requests))


def lose_a_rank(executor: Any, limit: float) -> None:
    """Kill the second rank in a call, and check that everybody hears of it within `limit` seconds and nothing stays."""
    called = threading.Event()
    executor.register_failure_callback(called.set)
    pids = executor.collective_rpc("pid")
    future = executor.collective_rpc("nap", args=(60.0,), non_block=True)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        future.result(30)
    assert time.monotonic() - began < limit
    assert called.wait(limit)
    assert executor.is_failed
    with pytest.raises(ExecutorFailed):
        executor.collective_rpc("pid")
    again = threading.Event()
    executor.register_failure_callback(again.set)
    assert again.is_set()
    executor.shutdown()
    executor.shutdown()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
