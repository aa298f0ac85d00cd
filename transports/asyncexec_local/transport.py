"""One rank, in this process, on a thread of its own so that the event loop never blocks."""

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import msgspec

from asyncexec.config import ExecutorConfig
from asyncexec.errors import ConfigError
from asyncexec.runtime import RankRuntime
from asyncexec.transport import KernelState, RankLink, RankLoss, Transport, TransportEvents
from asyncexec.wire import Buffer, Frame
from asyncexec.worker import RankContext


class LocalOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `options.local`.

    Attributes:
        device: the worker's torch device; "auto" is "cuda:0" if the worker uses torch and there is one, else "cpu".
    """

    device: str = "auto"


class LocalTransport(Transport):
    """Frames go through queues; memory beside them is copied once, so that neither side sees the other's changes."""

    Options = LocalOptions

    def __init__(self, config: ExecutorConfig, options: Any, events: TransportEvents) -> None:
        super().__init__(config, options, events)
        _require_one_rank(config)
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        self._asked = False

    async def open(self, config: ExecutorConfig) -> None:
        """Start the rank's thread, unless it runs already."""
        _require_one_rank(config)
        if self._thread is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._link = _LocalLink(self)
        # a daemon: a worker stuck in native code must not keep the interpreter from exiting
        self._thread = threading.Thread(target=self._serve, name="asyncexec-rank-0", daemon=True)
        self._thread.start()

    def send(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Queue a frame for the rank."""
        self._link.inbox.put(_with_own_memory(frame))

    async def inspect(self, rank: int, stacks: bool) -> Buffer:
        """Have a helper thread look at the rank's thread."""
        return await anyio.to_thread.run_sync(self._link.describe, stacks, abandon_on_cancel=True)

    def kernel_state(self, rank: int) -> KernelState:
        """The rank's thread lives or not; it stops only with this process."""
        return KernelState("dead" if self._ended.is_set() else "running", "a thread of this process")

    async def close(self, ranks: Sequence[int] | None = None) -> None:
        """Ask the rank to end and wait for it; a thread cannot be killed, so a stuck one is left behind, and said."""
        if self._thread is None or (ranks is not None and 0 not in ranks):
            return
        self._asked = True
        self._link.inbox.put(None)
        limits = self.config.timeouts
        with anyio.move_on_after(limits.stop + limits.terminate):
            await self._ended.wait()
        if self._ended.is_set():
            self._thread.join()  # telling of its end was the last thing that it had to do
        else:
            print("asyncexec: the worker of transport 'local' is stuck; its thread is left behind", file=sys.stderr)

    def abort(self) -> None:
        """Have the rank end when it has finished the call that it runs."""
        self._asked = True
        if self._thread is not None:
            self._link.aborted = True
            self._link.inbox.put(None)

    def post(self, frame: Frame) -> None:
        """Hand a frame to the loop; called on the rank's threads."""
        self._on_loop(self._received, frame)

    def _received(self, frame: Frame) -> None:
        self.events.frame_received(0, frame)

    def _serve(self) -> None:
        loss = RankLoss("its thread returned")
        try:
            RankRuntime(self._link).serve(self._link.receive)
        except BaseException as error:  # noqa: BLE001 - SystemExit of a worker ends its rank, not this process
            traceback.print_exc()
            loss = RankLoss(f"its thread ended with {type(error).__name__}: {error}")
        self._on_loop(self._end, loss)

    def _end(self, loss: RankLoss) -> None:
        self._ended.set()
        if not self._asked:
            self.events.rank_lost(0, loss)

    def _on_loop(self, callback: Any, *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            # the loop is closed: the driver is gone, and nobody is left to tell
            return


class _LocalLink(RankLink):
    """The rank's half.  With one rank there are no groups to join and no neighbouring stages."""

    def __init__(self, transport: LocalTransport) -> None:
        self.inbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self.aborted = False
        self.describe: Callable[[bool], bytes] = lambda stacks: b""
        self._transport = transport

    def receive(self) -> Frame | None:
        frame = self.inbox.get()
        return None if self.aborted else frame

    def send(self, frame: Frame) -> None:
        self._transport.post(_with_own_memory(frame))

    def join(self) -> RankContext:
        device = self._transport.options.device
        if device == "auto":
            torch = sys.modules.get("torch")
            device = "cuda:0" if torch is not None and torch.cuda.is_available() else "cpu"
        return RankContext(device=device)

    def answer_inspections(self, describe: Callable[[bool], bytes]) -> None:
        self.describe = describe

    def send_intermediate(
        self, call_id: int, tensors: Mapping[str, Any] | None, replicated: frozenset[str] = frozenset()
    ) -> None:
        raise ConfigError("transport 'local' has one pipeline stage")

    def receive_intermediate(self, call_id: int) -> Mapping[str, Any] | None:
        raise ConfigError("transport 'local' has one pipeline stage")

    def leave(self) -> None:
        """Nothing was joined."""


def _require_one_rank(config: ExecutorConfig) -> None:
    if config.world_size != 1:
        raise ConfigError(
            f"tensor_parallel_size x pipeline_parallel_size is {config.tensor_parallel_size} x "
            f"{config.pipeline_parallel_size}; transport 'local' runs one rank: use transport 'nccl'"
        )


def _with_own_memory(frame: Frame) -> Frame:
    frame.buffers = tuple(bytearray(buffer) for buffer in frame.buffers)
    return frame
