"""Why a graph of Ray's is not awaited directly: `python benchmarks/ray_naive.py`.

The cancellations of `torture.py`, in small, on a compiled graph of Ray's own that is awaited as its documentation
shows it: some steps are abandoned by a timeout.  It hangs; the script waits for a few seconds and says what happened.
"""

import asyncio
import importlib
from typing import Any

from asyncexec_ray.cluster import LOCAL_SYSTEM_CONFIG

ray: Any = importlib.import_module("ray")
dag: Any = importlib.import_module("ray.dag")

STEPS = 1000
LIMIT = 5.0
"""Seconds that a step is waited for before it counts as hanging; it takes less than a millisecond."""


class EchoActor:
    """Returns what it is given."""

    def step(self, message: bytes) -> bytes:
        return message


async def run_steps(graph: Any) -> str:
    """What became of steps of which every tenth is abandoned."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: print(f"behind the scenes: {context.get('exception')!r}"))
    for number in range(STEPS):
        limit = 1e-5 if number % 10 == 9 else LIMIT
        try:
            future = await graph.execute_async(b"%d" % number)
            async with asyncio.timeout(limit):
                answer = await future
        except TimeoutError:
            if limit == LIMIT:
                return f"step {number} HANGS: no answer within {LIMIT:g} s, after {number // 10} abandoned steps"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what this script is about
            return f"step {number} raised {type(error).__name__}: {error}"
        else:
            if answer != b"%d" % number:
                return f"step {number} got the answer of step {answer.decode()}"
    return f"all {STEPS} steps were answered"


async def compile_and_run(actor: Any) -> str:
    """Compiled inside the running loop, as it must be."""
    with dag.InputNode() as message:
        output = actor.step.bind(message)
    return await run_steps(output.experimental_compile(enable_asyncio=True))


def main() -> int:
    ray.init(address="local", num_cpus=4, include_dashboard=False, _system_config=LOCAL_SYSTEM_CONFIG)
    actor = ray.remote(EchoActor).remote()
    print(asyncio.run(compile_and_run(actor)), flush=True)
    ray.kill(actor)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
