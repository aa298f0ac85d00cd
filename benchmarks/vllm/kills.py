"""How soon a killed rank is noticed, and whether anything is left: SIGKILL to a rank of one executor after another.

.venv-vllm/bin/python benchmarks/vllm/kills.py [COUNT]
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from asyncexec.bench import vllm_noop, vllm_tiny
from asyncexec.errors import WorkerDied


def kill_one(number: int) -> tuple[float, float, bool]:
    """Seconds until the call in flight failed and until the callback came, and whether nothing is left."""
    executor = vllm_noop.make_executor("asyncexec", 2)
    called = threading.Event()
    executor.register_failure_callback(called.set)
    pids = executor.collective_rpc("pid")
    future = executor.collective_rpc("nap", args=(60.0,), non_block=True)
    time.sleep(0.05)
    began = time.monotonic()
    os.kill(pids[number % 2], signal.SIGKILL)
    error = future.exception(10)
    failed = time.monotonic() - began
    called.wait(10)
    called_back = time.monotonic() - began
    executor.shutdown()
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    return failed, called_back, isinstance(error, WorkerDied) and not left


def main() -> None:
    """Count, and tell the worst."""
    vllm_tiny.set_environment()
    outcomes = [kill_one(number) for number in range(int((*sys.argv[1:], "20")[0]))]
    clean = sum(fine and failed < 0.1 and called < 0.1 for failed, called, fine in outcomes)
    worst = max(max(failed, called) for failed, called, _ in outcomes)
    print(f"{clean} of {len(outcomes)} noticed within 100 ms, nothing left behind; slowest {worst * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
