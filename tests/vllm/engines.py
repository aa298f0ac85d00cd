"""Runs of the whole engine, each in a process of its own."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = "asyncexec.integrations.vllm.AsyncExecExecutor"


@functools.cache
def run(
    model: str,
    backend: str,
    tp: int = 1,
    pp: int = 1,
    *,
    core: str = "process",
    scheduling: str = "sync",
    mode: str = "generate",
    rank: int = 0,
    ray: str | None = None,
) -> Any:
    """What the program printed; on the transport "ray" where that is the address of a cluster."""
    own = {} if ray is None else {"asyncexec": {"transport": "ray", "options": {"ray": {"address": ray}}}}
    options = {
        "model": model,
        "backend": backend,
        "tp": tp,
        "pp": pp,
        "mode": mode,
        "async_scheduling": scheduling == "async",
        "rank": rank,
        "additional": own,
    }
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("program.py"), json.dumps(options)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if core == "process" else "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])
