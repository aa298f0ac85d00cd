"""One rank's process: spawned with the sockets that it needs, watched through a pidfd, ended with its children."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping

import msgspec

from asyncexec.kernel import process_state, signal_name
from asyncexec.transport import KernelState, RankLoss

_LONGEST_LINE = 1 << 16
"""Characters after which a line is passed on although it has no end yet."""

_TAIL = 4096
"""Characters of standard error that are kept."""

_BOOTSTRAP = "import sys, json; s = json.loads(sys.argv[1]); sys.path[:] = s['sys_path']; \
from asyncexec_nccl.rank import main; main(sys.argv[1])"


class RankLaunch(msgspec.Struct, frozen=True):
    """What a rank's process is told when it is spawned, as JSON on its command line.

    Attributes:
        driver_pid: the process without which the rank ends.
        rank: its number.
        backend: "nccl", "gloo", "none" or "auto".
        devices: the GPU of each rank, by its index among the visible ones; None is the rank's own number.
        collective_timeout: seconds after which an operation of a process group counts as stuck.
        max_frame_bytes: of the configuration.
        control: file descriptor of its socket to the driver.
        side: file descriptor of the socket over which the driver inspects it.
        staging: file descriptor of the memory that large tensors for all ranks are put into.
        arguments: file descriptor of the memory that large arguments are put into.
        shared_memory_bytes: of the options.
        hop_bytes: of the options.
        layouts: file descriptor of the socket over which it is told its place among the others.
        sys_path: where it imports from.
    """

    driver_pid: int
    rank: int
    backend: str
    devices: list[int] | None
    collective_timeout: float
    max_frame_bytes: int
    control: int
    side: int
    staging: int
    arguments: int
    shared_memory_bytes: int
    hop_bytes: int
    layouts: int
    sys_path: list[str]

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the process inherits; everything else of the driver is closed in it."""
        return self.control, self.side, self.staging, self.arguments, self.layouts


_LAST_READS = 16
"""Reads of 64 KiB, as much as a pipe holds, that are made of the standard error of a rank that has ended."""


class RankProcess:
    """A spawned rank.

    Args:
        launch: what it is told.
        environment: its environment variables.
        on_exit: called once, on `loop`, when it has ended.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        launch: RankLaunch,
        environment: Mapping[str, str],
        on_exit: Callable[[], None],
    ) -> None:
        # On the loop's own thread, for a millisecond or two: the kernel ends the rank with the thread that spawned
        # it, which a helper thread would leave too early.  A session of its own keeps a Ctrl-C away from the rank.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, msgspec.json.encode(launch).decode()],
            pass_fds=launch.descriptors,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._errors = _ErrorOutput(loop, self._process, launch.rank)
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
            name = signal_name(-code)
            return RankLoss(f"killed by {name}", self.pid, None, name, self._errors.tail)
        return RankLoss(f"exited with status {code}", self.pid, code, None, self._errors.tail)

    def kernel_state(self) -> KernelState:
        """From /proc; a zombie counts as dead."""
        return process_state(self.pid)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # while it is a zombie its number cannot be reused: what its worker started goes with it
        self.signal(signal.SIGKILL)
        self._pidfd = -1
        self._process.wait()
        try:
            self._errors.close()
        finally:
            self._on_exit()


class _ErrorOutput:
    """What a rank writes to standard error: passed on line by line, the last of it kept."""

    def __init__(self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes], rank: int) -> None:
        if process.stderr is None:
            raise ValueError("the process has no pipe for standard error")
        self._loop = loop
        self._pipe = process.stderr
        self._prefix = f"[rank {rank}] "
        self._line = ""
        self.tail = ""
        os.set_blocking(self._pipe.fileno(), False)
        loop.add_reader(self._pipe.fileno(), self._read)

    def close(self) -> None:
        """Take what is there still, and no more."""
        for _ in range(_LAST_READS):  # what its worker started may write on, and without end
            if self._pipe.closed or not self._read():
                break
        if not self._pipe.closed:
            self._end()

    def _read(self) -> bool:
        """Take some; returns whether there may be more."""
        try:
            data = os.read(self._pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return False
        text = data.decode(errors="replace")
        self.tail = (self.tail + text)[-_TAIL:]
        *lines, self._line = (self._line + text).replace("\r", "\n").split("\n")
        if len(self._line) > _LONGEST_LINE:
            lines, self._line = [*lines, self._line], ""
        self._pass_on(lines)
        if not data:
            self._end()
        return bool(data)

    def _end(self) -> None:
        self._loop.remove_reader(self._pipe.fileno())
        self._pipe.close()
        if self._line:
            self._pass_on([self._line])

    def _pass_on(self, lines: list[str]) -> None:
        if not lines or sys.stderr is None:  # None where the program was started with standard error closed
            return
        with contextlib.suppress(OSError, ValueError):  # nobody reads the driver's standard error any more
            sys.stderr.write("".join(f"{self._prefix}{line}\n" for line in lines))
