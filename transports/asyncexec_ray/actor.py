"""The class of the actors."""

from collections.abc import Sequence
from typing import Any

GROUPS = {"calls": 1, "late": 1, "inspect": 1, "meet": 1}
"""Threads of an actor for our calls, by name: the frames that are no steps, the long poll for replies that do not come
with a step, inspections, and the question where the process groups meet.  Ray's own calls, which allocate channels and
end graphs, have the default thread to themselves; the graph's loop has another one of Ray's."""


def actor_class() -> type:
    """The class of one rank's actor.

    A class that is made in a function travels by value.  So it needs nothing to be importable on the actor's host
    before it has set the import path there; only what Python brings is imported outside of its methods.
    """

    class Rank:
        def __init__(self, sys_path: Sequence[str]) -> None:
            import sys

            sys.path[:] = [*sys_path, *(path for path in sys.path if path not in sys_path)]
            from asyncexec_ray.rank import RankServer

            self._server = RankServer()

        def place(self) -> bytes:
            return self._server.place()

        def sit(self, seat: bytes, leader: Any) -> None:
            self._server.sit(seat, leader)

        def call(self, message: bytes) -> None:
            self._server.call(message)

        def step(self, message: bytes, intermediate: Any = None) -> bytes:
            return self._server.step(message, intermediate)

        def hand_on(self, reply: bytes) -> Any:
            return self._server.hand_on()

        def late(self) -> list[bytes | None]:
            return self._server.late()

        def inspect(self, stacks: bool) -> bytes:
            return self._server.inspect(stacks)

        def meet(self) -> tuple[str, int]:
            return self._server.meet()

    return Rank
