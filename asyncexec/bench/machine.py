"""Where a run takes place: hardware, versions and the commit, for the head of its results."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import asyncexec

PACKAGES = ("msgspec", "uvloop", "pyzmq", "ray", "torch", "vllm")


def hardware() -> dict[str, str]:
    """Processor, cores, memory and kernel."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{pages * size / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Of Python, asyncexec and what the peers are made of, as far as it is installed."""
    found = {"python": platform.python_version(), "asyncexec": asyncexec.__version__}
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def commit() -> str:
    """Of the checkout that this package is in, with "+" where it was changed; empty where it is in none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps inside of somebody else's checkout
        return ""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
