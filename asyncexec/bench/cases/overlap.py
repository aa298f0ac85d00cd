"""Whether the stages of a pipeline work at the same time: steps in flight, beside one step at a time."""

import time

from msgspec.structs import replace

from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.cases.steps import back_to_back
from asyncexec.bench.payload import scheduler_output
from asyncexec.bench.peer import Peer

WARM_UP = 3
"""Steps before those that are measured."""

TRIES = 3
"""Of either; the shortest counts, since what disturbs them only makes them longer."""

STAGE_S = 0.02
"""Seconds that each stage takes; it sleeps, as if a GPU computed, so that the machine's cores do not matter."""


async def measure(peer: Peer, point: Point, amount: float) -> Samples:
    """What `amount` steps take with `in_flight` under way, over what they take one at a time.

    The least, with a step for each stage, is (steps + stages - 1) / (steps * stages).
    """
    await getattr(peer, OVERLAP.needs)(STAGE_S)  # as many stages as ranks
    value, steps = scheduler_output(point.requests), int(amount)
    alone = replace(point, in_flight=1)
    await back_to_back(peer, value, alone, WARM_UP)
    taken: dict[Point, list[float]] = {alone: [], point: []}
    for one in [alone, point] * TRIES:
        began = time.perf_counter()
        await back_to_back(peer, value, one, steps)
        taken[one].append(time.perf_counter() - began)
    await peer.close()
    return {"overlap_ratio": [min(taken[point]) / min(taken[alone])]}


OVERLAP = Case("overlap", measure, fresh=True, needs="start_pipeline")
