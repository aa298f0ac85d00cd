"""One rank's process: spawned with the sockets that it needs, watched through a pidfd, ended with its children."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from asyncexec.transport import RankLoss

_BOOTSTRAP = "import sys, json; s = json.loads(sys.argv[1]); sys.path[:] = s['sys_path']; \
from asyncexec_nccl.rank import main; main(sys.argv[1])"


class RankLaunch(msgspec.Struct, frozen=True):
    """What a rank's process is told when it is spawned, as JSON on its command line.

    Attributes:
        driver_pid: the process without which the rank ends.
        rank, tensor_parallel_size, pipeline_parallel_size: its place.
        backend: "nccl", "gloo", "none" or "auto".
        max_frame_bytes: of the configuration.
        control: file descriptor of its socket to the driver.
        store: file descriptor of the memory that the process groups meet in.
        previous, next: file descriptors of its sockets to the neighbouring pipeline stages; -1 where there is none.
        sys_path: where it imports from.
    """

    driver_pid: int
    rank: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    backend: str
    max_frame_bytes: int
    control: int
    store: int
    previous: int
    next: int
    sys_path: list[str]


class RankProcess:
    """A spawned rank.

    Args:
        launch: what it is told.
        keep: sockets and descriptors that it inherits; everything else of the driver is closed in it.
        environment: its environment variables.
        on_exit: called once, on `loop`, when it has ended.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        launch: RankLaunch,
        keep: Sequence[int],
        environment: Mapping[str, str],
        on_exit: Callable[[], None],
    ) -> None:
        # On the loop's own thread, for a millisecond or two: the kernel ends the rank with the thread that spawned
        # it, which a helper thread would leave too early.  A session of its own keeps a Ctrl-C away from the rank.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, msgspec.json.encode(launch).decode()],
            pass_fds=keep,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._loop = loop
        self._on_exit = on_exit
        self._pidfd = os.pidfd_open(self.pid)
        loop.add_reader(self._pidfd, self._exited)

    @property
    def running(self) -> bool:
        """Whether its end has not been noticed yet."""
        return self._pidfd >= 0

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the rank and to whatever processes its worker started."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def loss(self) -> RankLoss:
        """How it ended."""
        code = self._process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return RankLoss(f"killed by {name}", self.pid, None, name)
        return RankLoss(f"exited with status {code}", self.pid, code, None)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # while it is a zombie its number cannot be reused: what its worker started goes with it
        self.signal(signal.SIGKILL)
        self._pidfd = -1
        self._process.wait()
        self._on_exit()


def inheritable(connection: socket.socket | None) -> int:
    """The descriptor to name in `RankLaunch`; -1 for none."""
    return -1 if connection is None else connection.fileno()
