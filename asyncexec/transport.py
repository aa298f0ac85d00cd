"""The Transport contract: moves frames between the driver and its ranks, and reports ranks that are lost.

A transport knows no futures, no aggregation and no deadlines.  It has a half in the driver (`Transport`) and a half
in each rank (`RankLink`); the rank's half is driven by `asyncexec.runtime.RankRuntime`, which is the same for all.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import msgspec

from asyncexec.config import ExecutorConfig
from asyncexec.wire import Buffer, Frame
from asyncexec.worker import RankContext


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a transport that has none."""


@dataclass(frozen=True, slots=True)
class RankLoss:
    """What is known of a rank that ended.

    Attributes:
        reason: in words, such as "exited with status 3".
        pid: its process, where it had one of its own.
        exit_code: None where a signal ended it, or nothing is known.
        signal: the signal's name, such as "SIGKILL".
        stderr: the end of what it wrote to standard error.
        node: the host that it ran on, where the transport places ranks on several.
    """

    reason: str
    pid: int | None = None
    exit_code: int | None = None
    signal: str | None = None
    stderr: str = ""
    node: str | None = None


class KernelState(NamedTuple):
    """What the kernel says of a rank's process.

    Attributes:
        state: "running" (or ready to, or asleep), "stopped" or "dead".
        words: the kernel's own, such as "State: T (stopped)".
        pid: the process; None where the rank is a thread of this one.
    """

    state: Literal["running", "stopped", "dead"]
    words: str
    pid: int | None = None


class TransportEvents(Protocol):
    """What a transport tells its executor, always on the event loop that called `open`."""

    def frame_received(self, rank: int, frame: Frame) -> None:
        """`rank` sent a frame.  Frames of one rank come in the order in which it sent them."""
        ...

    def rank_lost(self, rank: int, loss: RankLoss) -> None:
        """`rank` ended without being asked to, or can no longer be reached.  Said at most once for a rank."""
        ...


class Transport(abc.ABC):
    """The driver's half.  Constructed by the executor; every method is called on one event loop.

    Args:
        config: the executor's configuration.
        options: this transport's own options, an instance of `Options`.
        events: whom to tell.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    """The struct that the table `options.<transport name>` of the configuration is read into."""

    def __init__(self, config: ExecutorConfig, options: Any, events: TransportEvents) -> None:
        self.config = config
        self.options = options
        self.events = events

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this transport cannot be used on this machine and what to install; None where it can."""
        return None

    @abc.abstractmethod
    async def open(self, config: ExecutorConfig) -> None:
        """Bring up all ranks of `config`, so that frames can be sent to them.

        May be called again with other parallel sizes.  Ranks that are there stay, also those that `config` has no place
        for, until they are closed; its ranks join each other anew when they get their next START.

        A failure, or a cancellation, of the first call leaves nothing behind; after one of a later call, `close` the
        ranks that are new.  Raises ConfigError where the configuration cannot work on this machine.
        """

    def refusal(self, frame: Frame, ranks: Sequence[int]) -> str | None:
        """Why `frame` is too large for `ranks`, in words that follow "the arguments"; None where it is not."""
        return frame.refusal(self.config.max_frame_bytes)

    @abc.abstractmethod
    def send(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Send one frame to each of `ranks`, in order behind what was sent before.  Never blocks.

        The frame's memory may be read until it has been received: it must not change before the call is settled.
        """

    def staging(self, nbytes: int) -> memoryview | None:
        """Memory of `nbytes` at least that `RankLink.read_staged` reads; None where calls must carry all they need."""
        return None

    @abc.abstractmethod
    async def inspect(self, rank: int, stacks: bool) -> Buffer:
        """Ask a rank's side thread what the rank is doing; waits for the answer, for as long as that takes.

        Args:
            rank: which.
            stacks: whether it also tells the stacks of its threads, which takes longer.

        Raises ConnectionError where the rank is gone.
        """

    @abc.abstractmethod
    def kernel_state(self, rank: int) -> KernelState:
        """What the kernel says of a rank's process, without asking the rank."""

    @abc.abstractmethod
    async def close(self, ranks: Sequence[int] | None = None) -> None:
        """End all ranks, or the last ones: ask, then terminate, then kill, each within its limit of `config.timeouts`.

        Whatever was sent before is finished first, within the first limit.  May be called again.

        Args:
            ranks: which, where they are there: the last ones, or none.  None is all, and the end of the transport.
        """

    @abc.abstractmethod
    def abort(self) -> None:
        """End all ranks at once.  May be called at any time and again."""


class RankLink(abc.ABC):
    """The rank's half: where its frames go to, and its way to the neighbouring pipeline stages."""

    @abc.abstractmethod
    def send(self, frame: Frame) -> None:
        """Send a frame to the driver.  May be called by several threads."""

    @abc.abstractmethod
    def join(self) -> RankContext:
        """Make the process groups with the other ranks, and tell this rank's place.  Blocks.

        Called for each START.  Before it is called again, `leave` is.
        """

    @abc.abstractmethod
    def answer_inspections(self, describe: Callable[[bool], bytes]) -> None:
        """From now on have `describe(stacks)` called whenever the driver inspects this rank, beside the main thread."""

    @abc.abstractmethod
    def send_intermediate(
        self, call_id: int, tensors: Mapping[str, Any] | None, replicated: frozenset[str] = frozenset()
    ) -> None:
        """Hand tensors to the next pipeline stage, or None to say that this stage has none because it failed.

        Args:
            call_id: of the step.
            tensors: by name.
            replicated: which of them are the same on all tensor-parallel ranks: a part of each will do.
        """

    @abc.abstractmethod
    def receive_intermediate(self, call_id: int) -> Mapping[str, Any] | None:
        """Block until the previous stage's tensors are there; None when it had none because it failed."""

    def read_staged(self, begin: int, nbytes: int) -> tuple[Any, Any]:
        """Bytes of the staging memory as a uint8 tensor on the rank's device; all ranks do so together.

        Returns:
            The tensor, valid on the current stream, and a CUDA event after which the memory may be overwritten.  In
            place of the event None, where the tensor lies over the memory or another rank reads it.
        """
        raise NotImplementedError("this transport has no staging memory")

    @abc.abstractmethod
    def leave(self) -> None:
        """Leave the process groups, whether or not `join` succeeded; called before joining anew, and at the end."""
