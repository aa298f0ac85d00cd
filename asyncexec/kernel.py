"""What the kernel knows of another process: asked of /proc and of a pidfd, without asking the process."""

import array
import fcntl
import os
import signal
from pathlib import Path
from typing import Literal

from asyncexec.transport import KernelState

# include/uapi/linux/pidfd.h: the request of 64 bytes, the bit that asks for how the process ended, and where that is
_PIDFD_GET_INFO = 0xC0_40_FF_0B
_PIDFD_INFO_EXIT = 1 << 3
_STATUS_AT = 15


def process_state(pid: int) -> KernelState:
    """What /proc says of a process; a zombie counts as dead."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        words = next(line for line in lines if line.startswith("State:")).replace("\t", " ")
        letter = words.split()[1]
        waits_in = Path(f"/proc/{pid}/wchan").read_text() if letter not in "ZX" else ""
    except (FileNotFoundError, ProcessLookupError):
        return KernelState("dead", "no such process", pid)
    if waits_in not in ("", "0"):
        words += f", in {waits_in}"
    state: Literal["stopped", "dead", "running"] = (
        "stopped" if letter in "Tt" else "dead" if letter in "ZX" else "running"
    )
    return KernelState(state, words, pid)


def exit_of(pidfd: int) -> tuple[int | None, str | None]:
    """Exit code, or the name of the signal, of a process that has ended and may be anybody's child.

    Both are None while it runs, and on kernels before 6.15, which tell nobody but the parent.
    """
    request = array.array("I", [_PIDFD_INFO_EXIT, *[0] * 15])
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request)
    except OSError:
        return None, None
    if not request[0] & _PIDFD_INFO_EXIT:
        return None, None
    code = os.waitstatus_to_exitcode(request[_STATUS_AT])
    return (None, signal_name(-code)) if code < 0 else (code, None)


def signal_name(number: int) -> str:
    """Such as "SIGKILL"; real-time signals have no name of their own."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
