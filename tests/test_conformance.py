"""Our transports pass the suite that any transport must pass, and the core withstands a faulty one."""

import asyncio
from collections import Counter
from typing import Any

import pytest
import workers
from conftest import LAYOUTS

from asyncexec import (
    Aggregator,
    ConfigError,
    Executor,
    ExecutorFailed,
    PayloadError,
    ReplyLost,
    StepTimeout,
    WorkerDied,
    WorkerError,
    create_executor,
)
from asyncexec.registry import load_transport
from asyncexec.testing import CHECKS, Faults, Recorder, with_faults

pytestmark = pytest.mark.usefixtures("no_leftovers")


@pytest.fixture(params=["nccl-tp2", "nccl-pp2"])
def ranks_of_their_own(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(LAYOUTS[request.param])


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
async def test_conformance(check: Any, layout: dict[str, Any]) -> None:
    await check(layout)


async def test_the_suite_takes_a_factory(layout: dict[str, Any]) -> None:
    made = []

    def factory(worker: type, aggregator: Aggregator | None = None, **changes: Any) -> Executor:
        made.append(worker)
        return create_executor(layout | changes, worker, aggregator=aggregator)

    await CHECKS["order"](factory)
    assert made


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("seed", range(2))
async def test_no_fault_brings_a_reply_to_the_wrong_call(layout: dict[str, Any], seed: int, calls: bool) -> None:
    faults = Faults(seed=seed, drop=0.05, double=0.1, delay=0.1, swap=0.05, cut=0.05, calls=calls)
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
            except (ReplyLost, PayloadError, WorkerError, StepTimeout) as error:
                outcomes[type(error).__name__] += 1

        for n in range(0, 240, 40):
            await asyncio.gather(*(step(n + k) for k in range(40)))
        counters = executor.counters
    assert outcomes.total() == 240
    assert outcomes["right"] > (20 if calls else 100)  # a lost acknowledgement holds up the steps behind it
    assert outcomes["ReplyLost"] > 0
    assert outcomes["PayloadError"] > 0
    assert (outcomes["WorkerError"] > 0) == calls  # a call that was cut cannot be decoded
    assert recorder.seen == sorted(set(recorder.seen)), "a step was aggregated twice or out of order"
    assert counters.late > 0


async def test_stopped_ranks_go_on_and_nothing_is_lost(ranks_of_their_own: dict[str, Any]) -> None:
    faulty = with_faults(load_transport("nccl"), Faults(stop=0.2, stop_for=0.01))
    async with create_executor(ranks_of_their_own, workers.EchoWorker, transport=faulty) as executor:
        for n in range(100):
            assert await executor.execute_model(n) == n


async def test_a_rank_killed_on_schedule_fails_the_executor(ranks_of_their_own: dict[str, Any]) -> None:
    faulty = with_faults(load_transport("nccl"), Faults(kill=0.1))
    async with create_executor(ranks_of_their_own, workers.EchoWorker, transport=faulty) as executor:

        async def steps() -> None:
            for n in range(200):
                assert await executor.execute_model(n) == n

        # which of the two depends on whether the death is noticed within a step or between two
        with pytest.raises((WorkerDied, ExecutorFailed)):
            await steps()
        assert isinstance(executor.failure, WorkerDied)
        assert executor.failure.signal == "SIGKILL"


async def test_a_thread_cannot_be_killed() -> None:
    faulty = with_faults(load_transport("local"), Faults(kill=0.1))
    with pytest.raises(ConfigError, match="need ranks that are processes of their own"):
        await create_executor({"transport": "local"}, workers.EchoWorker, transport=faulty).start()
