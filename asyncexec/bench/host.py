"""A process for each peer, which the harness asks to measure, and stops while it is not its turn.

It is a process so that no peer's threads, memory or event loop burden another, and it is stopped (SIGSTOP, its ranks
too) because the readers of some peers wait actively and would take the others' cores.
"""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.cases import CASES
from asyncexec.bench.peer import Peer
from asyncexec.bench.peers import load_peer
from asyncexec.bench.processes import end_with_parent, signal_all
from asyncexec.run import run

TURN_LIMIT_S = 90.0
"""A turn that takes longer has failed."""

START_LIMIT_S = 180.0
"""A peer that has not started by then has failed; vLLM's executors take half a minute on two idle cores."""

CLOSE_LIMIT_S = 10.0
"""A peer that has not ended by then has failed."""


class PeerFailed(Exception):
    """A peer raised, died or did not answer in time; the message is one line."""


class Host:
    """The harness's half: one peer in its process, stopped unless it is its turn."""

    def __init__(self, peer: str, ranks: int, *, keeps_running: bool) -> None:
        self.peer = peer
        self._log = tempfile.NamedTemporaryFile(prefix=f"asyncexec-bench-{peer}-")  # noqa: SIM115 - lives as we do
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, peer, str(ranks), str(int(keeps_running)), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is the harness's business
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._pids = [self._process.pid]
        try:
            self._pids += self._answer(START_LIMIT_S)
            self._stop()
        except BaseException:
            self.kill()
            raise

    def turn(self, case: Case, point: Point, amount: float) -> Samples:
        """One turn of the peer.

        Raises:
            PeerFailed: it raised, died or did not answer; it must be killed.
        """
        samples: Samples = self._ask((case.name, point, amount), TURN_LIMIT_S)
        self._stop()
        return samples

    def close(self) -> None:
        """Let the peer end by itself.

        Raises:
            PeerFailed: it could not, or not in time; it must be killed.
        """
        self._ask(None, CLOSE_LIMIT_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_LIMIT_S)
        self.kill()

    def kill(self) -> None:
        """End the peer's processes now; they may have ended before."""
        if self._process.poll() is None:
            signal_all(self._pids, signal.SIGKILL)
            self._process.wait()
        self._connection.close()
        self._log.close()

    def _stop(self) -> None:
        signal_all(self._pids, signal.SIGSTOP)

    def _ask(self, request: tuple[str, Point, float] | None, limit: float) -> Any:
        signal_all(reversed(self._pids), signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # its process has ended, as reading the answer will show
            self._connection.send(request)
        return self._answer(limit)

    def _answer(self, limit: float) -> Any:
        if not self._connection.poll(limit):
            raise PeerFailed(f"no answer within {limit:g} s")
        try:
            answer, failure = self._connection.recv()
        except EOFError:
            lines = Path(self._log.name).read_text(errors="replace").split("\n")
            said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            raise PeerFailed(f"its process ended: {said}") from None
        if failure is not None:
            raise PeerFailed(failure)
        return answer


async def _take_turns(connection: Connection, peer: Peer, keeps_running: bool) -> None:
    try:
        if keeps_running:
            await peer.start()
        connection.send((list(await peer.pids()) if keeps_running else [], None))
        while (request := await asyncio.to_thread(connection.recv)) is not None:
            name, point, amount = request
            connection.send((await CASES[name].measure(peer, point, amount), None))
        if keeps_running:
            await peer.close()
        connection.send((None, None))
    except Exception as error:  # noqa: BLE001 - whatever it is, the harness reports it
        traceback.print_exc()
        connection.send((None, f"{type(error).__name__}: {error}".split("\n")[0]))


def main() -> None:
    """The peer's process."""
    end_with_parent()
    peer, ranks, keeps_running, descriptor = sys.argv[1:]
    with Connection(int(descriptor)) as connection:
        run(_take_turns(connection, load_peer(peer)(int(ranks)), keeps_running == "1"))


if __name__ == "__main__":
    main()
