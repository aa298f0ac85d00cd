"""Our transports pass the suite that any transport must pass, and the core withstands a faulty one."""

import asyncio
from collections import Counter
from typing import Any

import pytest
import workers

from asyncexec import PayloadError, ReplyLost, StepTimeout, create_executor
from asyncexec.registry import load_transport
from asyncexec.testing import CHECKS, Faults, Recorder, with_faults

pytestmark = pytest.mark.usefixtures("no_leftovers")


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
async def test_conformance(check: Any, layout: dict[str, Any]) -> None:
    await check(layout)


@pytest.mark.parametrize("seed", range(3))
async def test_no_fault_brings_a_reply_to_the_wrong_call(layout: dict[str, Any], seed: int) -> None:
    faults = Faults(seed=seed, drop=0.05, double=0.1, delay=0.1, swap=0.05, cut=0.05)
    faulty = with_faults(load_transport(layout["transport"]), faults)
    recorder = Recorder()
    # Ray's channels are waited for actively: on a busy machine their steps take turns with everything else
    limit = 5.0 if layout["transport"] == "ray" else 1.0
    config = layout | {"max_concurrent_batches": 4, "timeouts": {"step": limit, "drain": 0.2}}
    outcomes: Counter[str] = Counter()
    async with create_executor(config, workers.EchoWorker, aggregator=recorder, transport=faulty) as executor:

        async def step(n: int) -> None:
            try:
                assert await executor.execute_model(n) == n
                outcomes["right"] += 1
            except (ReplyLost, PayloadError, StepTimeout) as error:
                outcomes[type(error).__name__] += 1

        for n in range(0, 240, 40):
            await asyncio.gather(*(step(n + k) for k in range(40)))
        counters = executor.counters
    assert outcomes.total() == 240
    assert outcomes["right"] > 100
    assert outcomes["ReplyLost"] > 0
    assert outcomes["PayloadError"] > 0
    assert recorder.seen == sorted(set(recorder.seen)), "a step was aggregated twice or out of order"
    assert counters.late > 0
