"""Processes as the kernel sees them: the processor time that they used, stopping them, ending with their parent."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1
_CPUCLOCK_SCHED = 2


def processor_seconds(pids: Iterable[int]) -> float:
    """User and system time, in seconds, that these processes have used so far, with all their threads.

    It is read from their processor-time clocks, which have nanoseconds and count threads that have ended too; the ids
    are those of clock_getcpuclockid(3), which Python lacks.

    Raises:
        OSError: one of them has ended.
    """
    return sum(time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED) for pid in pids) / 1e9


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    Raises:
        OSError: the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each of these processes that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
