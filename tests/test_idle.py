"""An executor that has nothing to do costs nothing."""

from idle_cost import measure


async def test_an_idle_executor_uses_no_processor_time() -> None:
    assert await measure(ranks=4, seconds=4.0) < 0.01
