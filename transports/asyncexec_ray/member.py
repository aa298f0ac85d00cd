"""The driver's half of one rank."""

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import msgspec

from asyncexec.transport import KernelState, RankLoss
from asyncexec.wire import Frame
from asyncexec_ray.messages import Place, Seat, number_and_frame, numbered
from asyncexec_ray.process import LocalProcess, watch
from asyncexec_ray.refs import answer, when_done


class Member:
    """One rank: its actor, the order of its messages, and its end.

    One call of `late` is always on its way to the actor.  It brings what does not come with a step; and it fails as
    soon as Ray knows that the actor is dead, whatever else goes on.

    Args:
        actor: Ray's handle.
        place: where it is.
        driver_node: Ray's id of the driver's node.
        on_frame: called on the loop with each frame, in the order in which the rank sent them.
        on_change: called on the loop, with this, when the rank has left or ended.

    Attributes:
        leaving: whether it has been asked to end, so that its end is no loss.
        left: whether it has done what STOP asks for.
        loss: how its process ended; None while it has not.
    """

    def __init__(
        self,
        actor: Any,
        place: Place,
        driver_node: str,
        on_frame: Callable[[Frame], None],
        on_change: Callable[["Member"], None],
    ) -> None:
        self.actor = actor
        self.place = place
        self.leaving = False
        self.left = False
        self.loss: RankLoss | None = None
        self._loop = asyncio.get_running_loop()
        self._process = watch(place, driver_node)
        self._on_frame = on_frame
        self._on_change = on_change
        self._sent = 0
        self._received = 0
        self._early: dict[int, Frame] = {}
        self._ask()

    def sit(self, seat: Seat, leader: Any) -> asyncio.Future[None]:
        """Tell the actor its rank; `leader` is the actor of rank 0."""
        return answer(self._method("sit", "calls").remote(msgspec.msgpack.encode(seat), leader))

    def next_number(self) -> int:
        """The number of the next message to this rank."""
        self._sent += 1
        return self._sent

    def call(self, frame: Frame) -> None:
        """Send a frame that is no step."""
        self._method("call", "calls").remote(numbered(self.next_number(), frame))

    def inspect(self, stacks: bool) -> asyncio.Future[bytes]:
        """Ask what the rank is doing; raises what Ray raises where the rank is gone."""
        return answer(self._method("inspect", "inspect").remote(stacks))

    def received(self, message: bytes) -> None:
        """Take a message of the rank, whichever way it came; on the loop."""
        number, frame = number_and_frame(message)
        if number == self._received + 1 and not self._early:
            self._received = number
            self._on_frame(frame)
            return
        self._early[number] = frame
        while (due := self._early.pop(self._received + 1, None)) is not None:
            self._received += 1
            self._on_frame(due)

    def kernel_state(self) -> KernelState:
        """What the kernel says where it can be asked, else what Ray has said so far."""
        if self._process is not None:
            return self._process.state()
        if self.loss is not None:
            return KernelState("dead", f"on {self.place.host}; {self.loss.reason}")
        return KernelState("running", f"on {self.place.host}; Ray has reported no death")

    def kill_process(self) -> None:
        """End its process, where that is here, also if it is stopped."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Let go of what the driver has of it."""
        if self._process is not None:
            self._process.close()

    def _method(self, name: str, group: str) -> Any:
        return getattr(self.actor, name).options(concurrency_group=group)

    def _ask(self) -> None:
        when_done(self._method("late", "late").remote(), self._loop, self._answered)

    def _answered(self, answered: concurrent.futures.Future[list[bytes | None]]) -> None:
        error = answered.exception()
        if error is not None:
            self._died(error)
            return
        for message in answered.result():
            if message is None:
                self.left = True
                self._on_change(self)
            else:
                self.received(message)
        self._ask()

    def _died(self, error: BaseException) -> None:
        if self._process is None:
            self._end(RankLoss(cause_of(error), self.place.pid, node=self.place.host))
        else:
            self._process.when_ended(functools.partial(self._end_with, self._process, error))

    def _end_with(self, process: LocalProcess, error: BaseException) -> None:
        code, name = process.exit()
        how = f"killed by {name}; " if name else f"exited with status {code}; " if code is not None else ""
        reason = how + cause_of(error)
        self._end(RankLoss(reason, self.place.pid, code, name, process.stderr(), self.place.host))

    def _end(self, loss: RankLoss) -> None:
        self.loss = loss
        self._on_change(self)


def cause_of(error: BaseException) -> str:
    """Ray's words for why an actor is gone, without its advice."""
    said = str(error).strip().rpartition("\n")[2].partition(" Some common causes")[0].partition(" There are some")[0]
    return f"Ray says: {said}" if said else f"Ray says: {type(error).__name__}"
