"""Reports of running executors for people: from another terminal, or into the log on SIGUSR1.

Each executor listens on a Unix socket in the abstract namespace, `@asyncexec-<pid>-<random>`: there is no file that
could be left behind.  Whoever connects gets one report as text, if the kernel says that it is the same user or root.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import struct
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

from asyncexec.errors import AsyncExecError

logger = logging.getLogger("asyncexec")

_PREFIX = "asyncexec-"
_PEER = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)


class Reporter:
    """Gives an executor's reports to people while it runs.

    Args:
        report: makes one, as text, on the event loop that called `open`.
    """

    def __init__(self, report: Callable[[], Awaitable[str]]) -> None:
        self._report = report
        self._server: asyncio.Server | None = None
        self._busy: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Listen, and answer SIGUSR1 unless the program handles it itself."""
        self._loop = asyncio.get_running_loop()
        if hasattr(socket, "SO_PEERCRED"):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # the random part: abstract names are shared by containers that share the network, process numbers are not
            listener.bind(f"\0{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
            try:
                self._server = await asyncio.start_unix_server(self._answer, sock=listener)
            except BaseException:
                listener.close()
                raise
        _on_signal(self)

    async def close(self) -> None:
        """Stop listening, and drop what is being written."""
        _reporters.discard(self)
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()  # a reader that does not read must not hold up the executor's end
        for task in self._busy:
            task.cancel()

    def log_soon(self) -> None:
        """Have a report logged; may be called anywhere, a signal handler included."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the executor with it
            self._loop.call_soon_threadsafe(self._start_logging)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        connection: socket.socket = writer.get_extra_info("socket")
        _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        try:
            if uid in (os.getuid(), 0):
                writer.write((await self._report()).encode("utf-8", "replace"))
                await writer.drain()
        except ConnectionError:
            pass  # who asked has left
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _log(self) -> None:
        logger.warning("report on SIGUSR1:\n%s", await self._report())

    def _start_logging(self) -> None:
        task = self._loop.create_task(self._log())
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)


_reporters: "weakref.WeakSet[Reporter]" = weakref.WeakSet()
"""Whom a signal concerns.  Signals belong to the process, so this cannot belong to anything smaller."""


def _on_signal(reporter: Reporter) -> None:
    _reporters.add(reporter)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _log_all)


def _log_all(number: int, frame: FrameType | None) -> None:
    for reporter in list(_reporters):
        reporter.log_soon()


def running_executors() -> dict[str, int]:
    """The executors on this machine that can be asked: name of each one's socket, and the process that it is in."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    names = {line.split()[-1].removeprefix("@") for line in lines if f" @{_PREFIX}" in line}
    return {name: int(name.removeprefix(_PREFIX).split("-")[0]) for name in sorted(names)}


def fetch_report(name: str, limit: float = 5.0) -> str:
    """The report of the executor whose socket has this name.

    Raises:
        AsyncExecError: it does not answer within `limit` seconds, is gone, or belongs to another user.
    """
    parts: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit)
        try:
            connection.connect(f"\0{name}")
            while part := connection.recv(1 << 16):
                parts.append(part)
        except TimeoutError:
            raise AsyncExecError(f"{name} did not answer within {limit:g} s: its event loop is blocked") from None
        except OSError as error:
            raise AsyncExecError(f"{name}: {error}") from error
    if not parts:
        raise AsyncExecError(f"{name} belongs to another user, and answers only that user and root")
    return b"".join(parts).decode()
