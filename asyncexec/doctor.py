"""`asyncexec doctor`: what this machine has, which transports it can use, and what to install for the others."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from typing import Any

import asyncexec
from asyncexec.registry import list_transports


def report() -> Iterator[str]:
    """The report, line by line."""
    yield f"asyncexec    {asyncexec.__version__}"
    system = f"{platform.system()} {platform.release()}"
    yield f"Python       {platform.python_version()} on {system}, {os.cpu_count()} cores"
    loop = _package("uvloop", otherwise="asyncio; faster with: pip install uvloop")
    yield f"event loop   {loop}"
    yield from _torch()
    ray = _package("ray", otherwise="not installed; pip install 'asyncexec[ray]'")
    yield f"Ray          {ray}"
    for transport in list_transports():
        yield f"transport    {transport.name}: {transport.unavailable or 'usable'}"


def _package(name: str, *, otherwise: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return otherwise


def _torch() -> Iterator[str]:
    if importlib.util.find_spec("torch") is None:
        yield "torch        not installed; pip install 'asyncexec[nccl]'"
        return
    torch: Any = importlib.import_module("torch")
    yield f"torch        {torch.__version__}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        yield "CUDA         no devices; the nccl transport uses Gloo between its ranks"
        return
    yield f"CUDA         {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        peers = [peer for peer in range(count) if peer != index and torch.cuda.can_device_access_peer(index, peer)]
        links = f", direct access to {', '.join(f'cuda:{peer}' for peer in peers)}" if peers else ""
        yield f"  cuda:{index}     {device.name}, {device.total_memory / 2**30:.0f} GiB{links}"
