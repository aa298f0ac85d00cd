"""Which GPU a rank uses, what joins the ranks, and how long that may take."""

import importlib
from collections.abc import Sequence

from asyncexec.config import Timeouts
from asyncexec.errors import ConfigError
from asyncexec_nccl.ring import Ring

_NO_LIMIT = 10 * 365 * 86400.0
"""Seconds; torch wants a limit."""


class OutOfStep(BaseException):
    """This rank cannot take part in an operation of a group that others have begun, or are about to.

    The group matches operations by their order alone, so this rank's next one would be taken for the one that is
    missing: wrong values, or a hang.  No `Exception`, since nothing that handles one may go on: it ends the rank.
    """


def check_devices(devices: Sequence[int] | None, world_size: int) -> None:
    """Raise ConfigError unless `options.nccl.devices` names a GPU of its own for every rank."""
    if devices is None:
        return
    if len(devices) < world_size or len(set(devices)) < len(devices) or min(devices, default=0) < 0:
        raise ConfigError(
            f"options.nccl.devices is {list(devices)}; valid: {world_size} different numbers from 0, one for each rank"
        )


def check_hop_bytes(nbytes: int) -> None:
    """Raise ConfigError unless `options.nccl.hop_bytes` is enough for a ring, or 0."""
    if 0 < nbytes < Ring.SMALLEST:
        raise ConfigError(f"options.nccl.hop_bytes is {nbytes}; valid: 0, or {Ring.SMALLEST} and more")


def collective_timeout(timeouts: Timeouts) -> float:
    """Seconds after which an operation of a process group counts as stuck, which ends the rank.

    Twice the longest limit of any call: a rank may enter a collective when another's call begins, and a call that
    outlasts its deadline is not interrupted.  Without limits there is none.
    """
    limits = [timeouts.start, timeouts.step, timeouts.rpc, *timeouts.methods.values()]
    return 2 * max(_NO_LIMIT / 2 if limit is None else limit for limit in limits)


def choose_backend(backend: str, world_size: int, devices: Sequence[int] | None = None) -> str:
    """What "auto" is on this machine: "nccl" where every rank has a GPU of its own, else "gloo".

    Raises:
        ConfigError: NCCL was asked for, and there are not enough GPUs.
    """
    if backend in ("none", "gloo"):
        return backend
    torch = importlib.import_module("torch")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = visible >= world_size if devices is None else max(devices[:world_size]) < visible
    if backend == "nccl" and not there:
        of = "" if devices is None else f" on GPUs {', '.join(map(str, devices))}"
        raise ConfigError(f"options.nccl.backend is 'nccl' for {world_size} ranks{of}, and {visible} GPUs are visible")
    return "nccl" if there else "gloo"


def choose_device(backend: str, rank: int, devices: Sequence[int] | None = None) -> str:
    """This rank's torch device, made the current one: on "nccl" its GPU, else "cpu"."""
    if backend != "nccl":
        return "cpu"
    device = f"cuda:{rank if devices is None else devices[rank]}"
    importlib.import_module("torch").cuda.set_device(device)
    return device
