"""The compiled graph of the steps: its shape, and when it is compiled, used and torn down."""

import asyncio
import collections
import contextlib
import enum
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from asyncexec_ray.documented import DocumentedDriver
from asyncexec_ray.graph_internals import SLACK, DirectDriver
from asyncexec_ray.options import RayOptions

_buffer_size = threading.Lock()


class GraphDriver(Protocol):
    """What drives a compiled graph."""

    def send(self, message: bytes) -> None:
        """Start a step; not more at once than the graph was compiled for."""
        ...

    async def close(self) -> None:
        """End the graph; bounded by the ranks' ending what they do."""
        ...


def compile_graph(
    stages: Sequence[Sequence[Any]], outputs: Sequence[int], tensor_transport: str, options: RayOptions, capacity: int
) -> Any:
    """Compile the steps of actors.

    Every rank gets the step itself; its intermediate tensors go from each rank to the one of the same number in the
    next stage; and every rank's reply is an output.  Blocks for a fraction of a second.

    Args:
        stages: the actors, stage by stage.
        outputs: the ranks in the order in which their replies are to be read.
        tensor_transport: "nccl" or "shm".
        options: of the transport.
        capacity: steps that may be in flight.
    """
    dag: Any = importlib.import_module("ray.dag")
    replies: list[Any] = []
    with dag.InputNode() as step:
        handed_on: list[Any] = []
        for number, actors in enumerate(stages):
            came = handed_on
            answers = [
                actor.step.bind(step, came[rank]) if came else actor.step.bind(step)
                for rank, actor in enumerate(actors)
            ]
            replies += answers
            if number < len(stages) - 1:
                handed_on = [actor.hand_on.bind(answer) for actor, answer in zip(actors, answers, strict=True)]
                if tensor_transport == "nccl":
                    handed_on = [node.with_tensor_transport(transport="nccl") for node in handed_on]
        graph = dag.MultiOutputNode([replies[rank] for rank in outputs])
    with _buffers_of(dag.DAGContext.get_current(), options.buffer_size_bytes + SLACK):
        return graph.experimental_compile(enable_asyncio=True, _max_inflight_executions=capacity)


@contextlib.contextmanager
def _buffers_of(context: Any, size: int) -> Iterator[None]:
    """The size of the buffers that are allocated meanwhile; channels heed Ray's setting for the process alone."""
    with _buffer_size:
        before, context.buffer_size_bytes = context.buffer_size_bytes, size
        try:
            yield
        finally:
            context.buffer_size_bytes = before


class _State(enum.Enum):
    ABSENT = enum.auto()
    CHANGING = enum.auto()
    READY = enum.auto()
    CLOSED = enum.auto()


class StepGraph:
    """Takes steps at any time; there is a compiled graph only while it is needed.

    Args:
        compile_now: compiles the graph.
        idle_teardown: of the options.
        driver: "direct" or "documented".
        capacity: steps that may be in flight; more wait here, in order.
        deliver: called with an output's index and value, if it has one.
        failed: called once if no graph can be had, or it ended by itself.
    """

    def __init__(
        self,
        compile_now: Callable[[], Any],
        idle_teardown: float | None,
        driver: str,
        capacity: int,
        deliver: Callable[[int, Any], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._compile_now = compile_now
        self._idle_teardown = idle_teardown
        self._kind = driver
        self._capacity = capacity
        self._deliver = deliver
        self._failed = failed
        self._state = _State.ABSENT
        self._driver: GraphDriver | None = None
        self._change: asyncio.Task[None] | None = None
        self._waiting: collections.deque[bytes] = collections.deque()
        self._in_flight = 0
        self._used = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def send(self, message: bytes) -> None:
        """Start a step as soon as the graph is there and has room."""
        self._waiting.append(message)
        self._go_on()

    async def close(self) -> None:
        """Tear the graph down for good; steps that wait or are in flight are given up."""
        self._state = _State.CLOSED
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._change is not None:
            await asyncio.wait([self._change])
        if self._driver is not None:
            driver, self._driver = self._driver, None
            await driver.close()

    def _go_on(self) -> None:
        if self._state is _State.ABSENT and self._waiting:
            self._state = _State.CHANGING
            self._change = self._loop.create_task(self._set_up())
        while self._driver is not None and self._state is _State.READY and self._waiting:
            if self._in_flight == self._capacity:
                return
            self._in_flight += 1
            self._driver.send(self._waiting.popleft())

    async def _set_up(self) -> None:
        try:
            self._driver = await self._make_driver()
        except Exception as error:  # noqa: BLE001 - whatever kept Ray from compiling, nothing can run
            self._end_by(error)
            return
        self._become(_State.READY)
        self._arm()

    async def _make_driver(self) -> GraphDriver:
        if self._kind == "documented":
            # Ray starts its tasks on the loop that it is called on, and blocks that while it compiles
            return DocumentedDriver(self._compile_now(), self._output, self._end_by)
        return await asyncio.to_thread(DirectDriver, self._compile_now, self._loop, self._output, self._end_by)

    async def _tear_down(self, driver: GraphDriver) -> None:
        await driver.close()
        self._become(_State.ABSENT)

    def _become(self, state: _State) -> None:
        if self._state is _State.CHANGING:
            self._state = state
            self._go_on()

    def _output(self, index: int, value: Any, last: bool) -> None:
        if value != b"":
            if isinstance(value, bytes):
                self._deliver(index, value)
            else:
                self._end_by(value if isinstance(value, BaseException) else TypeError(f"an output is {value!r}"))
                return
        if last:
            self._in_flight -= 1
            self._used = self._loop.time()
            self._go_on()

    def _end_by(self, error: BaseException) -> None:
        if self._state is not _State.CLOSED:
            self._state = _State.CLOSED
            # without the traceback: it holds a graph that was half compiled, and its actor
            self._failed(error.with_traceback(None))

    def _arm(self) -> None:
        """Have `_look` called when the graph may have been idle for long enough."""
        if self._idle_teardown is not None:
            self._used = self._loop.time()
            self._timer = self._loop.call_later(self._idle_teardown, self._look)

    def _look(self) -> None:
        """Tear an idle graph down; one that has been used meanwhile gets its time anew."""
        limit = self._idle_teardown
        if limit is None or self._state is not _State.READY or self._driver is None:
            return
        rest = limit if self._in_flight else self._used + limit - self._loop.time()
        if rest > 0:
            self._timer = self._loop.call_later(rest, self._look)
            return
        driver, self._driver = self._driver, None
        self._state = _State.CHANGING
        self._change = self._loop.create_task(self._tear_down(driver))
