"""An executor that has nothing to do costs nothing."""

from typing import Any, ClassVar

from asyncexec.bench.case import Point
from asyncexec.bench.cases import CASES
from asyncexec.bench.peers.executors import Nccl


class WithGroups(Nccl):
    """Its ranks have joined their process groups, as those of a model do."""

    options: ClassVar[dict[str, Any]] = {}


async def test_an_idle_executor_uses_no_processor_time() -> None:
    peer = WithGroups(4)
    await peer.start()
    try:
        samples = await CASES["idle"].measure(peer, Point(4), 4.0)
    finally:
        await peer.close()
    assert samples["idle_cores"][0] < 0.01
