"""A rank's process where it is on the driver's host: what the kernel knows of it, beside what Ray tells."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from asyncexec.kernel import exit_of, process_state
from asyncexec.transport import KernelState
from asyncexec_ray.messages import Place

_EXIT_LIMIT = 0.3
"""Seconds that a process is given to be gone once Ray has noticed that its connections are; more than enough."""

_TAIL = 4096
"""Bytes of standard error that are told."""


class LocalProcess:
    """Watches an actor's process through a pidfd, which stays valid whatever becomes of the number."""

    def __init__(self, place: Place) -> None:
        self.pid = place.pid
        self._stderr = Path(place.stderr)
        self._pidfd = os.pidfd_open(place.pid)
        self._timer: asyncio.TimerHandle | None = None

    def state(self) -> KernelState:
        """From /proc."""
        return process_state(self.pid)

    def kill(self) -> None:
        """SIGKILL, which also ends a stopped process."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def when_ended(self, then: Callable[[], None]) -> None:
        """Have `then` called on the running loop when the process is gone, or is not gone after a moment."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            self._stop_waiting()
            then()

        self._timer = loop.call_later(_EXIT_LIMIT, ended)
        loop.add_reader(self._pidfd, ended)

    def exit(self) -> tuple[int | None, str | None]:
        """Exit code, or name of the signal; both None where the kernel does not tell."""
        return exit_of(self._pidfd) if self._pidfd >= 0 else (None, None)

    def stderr(self) -> str:
        """The end of what it wrote to standard error."""
        try:
            with self._stderr.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
                return file.read().decode(errors="replace")
        except OSError:  # Ray keeps it elsewhere, or no longer
            return ""

    def close(self) -> None:
        """Stop watching."""
        self._stop_waiting()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            asyncio.get_running_loop().remove_reader(self._pidfd)


def watch(place: Place, driver_node: str) -> LocalProcess | None:
    """The process of an actor at `place`; None where this process cannot see it."""
    if place.node != driver_node or place.pid_namespace != os.readlink("/proc/self/ns/pid"):
        return None
    try:
        return LocalProcess(place)
    except ProcessLookupError:  # it has ended already, which Ray will tell
        return None
