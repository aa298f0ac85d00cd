"""`vllm serve` with the executor: a completion over HTTP; after SIGTERM nothing is left."""

import functools
import http.client
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncexec.bench import vllm_tiny

pytestmark = pytest.mark.timeout(900)
psutil: Any = importlib.import_module("psutil")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """The process of a server that is up, in a folder that it has to itself for what is temporary."""
    options = [
        *("--distributed-executor-backend", vllm_tiny.OURS),
        *("--tensor-parallel-size", "2", "--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager"),
        *("--max-model-len", "512", "--block-size", "32", "--seed", "0", "--dtype", "float32"),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", "0"),
    ]
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("serve.py"), "serve", vllm_tiny.make_model(tmp_path / "m"), *options],
        env=os.environ | {"TMPDIR": str(tmp_path), "VLLM_LOGGING_LEVEL": "INFO"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Application startup complete" in line:
            break
    assert process.poll() is None, "".join(lines[-30:])
    started = psutil.Process(process.pid).children(recursive=True)
    yield process
    if process.poll() is None:
        process.kill()
    for left in started:
        if left.is_running():
            left.kill()
    process.communicate(timeout=30)


def ask(process: Any, method: str, path: str, body: Any = None) -> Any:
    """A request to the one port on which the server listens."""
    (port,) = {
        connection.laddr.port
        for connection in psutil.Process(process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    read = response.read()
    assert response.status == 200, read
    return json.loads(read) if read else None


def test_completions_over_http_and_nothing_left_after_sigterm(server: Any, tmp_path: Path) -> None:
    complete = functools.partial(ask, server, "POST", "/v1/completions")
    request = {"model": "tiny", "prompt": [3, 6, 9, 12], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    first, again = (complete(request | {"detokenize": False, "return_token_ids": True}) for _ in range(2))
    assert len(first["choices"][0]["token_ids"]) == 16
    assert first["choices"][0]["token_ids"] == again["choices"][0]["token_ids"]
    ask(server, "GET", "/health")

    started = psutil.Process(server.pid).children(recursive=True)
    assert len([process for process in started if any("Worker_TP" in part for part in process.cmdline())]) == 2
    meetings = [path.name for path in tmp_path.glob("vllm-asyncexec-*")]
    assert len(meetings) == 1
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=30)
    _, left = psutil.wait_procs(started, timeout=5)
    assert not left
    assert not list(Path("/dev/shm").glob(f"*{meetings[0]}-*"))
