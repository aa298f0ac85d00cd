"""Driving a compiled graph by a reader and a writer of our own.  All that touches Ray's internals is in this file.

Ray's own asyncio reader and writer take two tasks, two thread pools and several wake-ups for each step.  Here the
writer writes on the event loop, which never blocks as long as no more steps are in flight than a channel has buffers;
and one thread reads all outputs in order and wakes the loop once for whatever has come.  Both stand behind the
interfaces that Ray's own stand behind, and Ray's teardown closes them.  Steps go to the writer, past `execute_async`:
there is no Ray future that could be dropped or awaited twice, and no count of them that has to be kept right.

What is used, as of Ray 2.60: in `ray.dag.compiled_dag_node`, the names `AwaitableBackgroundReader` and
`AwaitableBackgroundWriter`, the attributes `_dag_submitter`, `_dag_output_fetcher` and `_proxy_actor` of a
`CompiledDAG`, and the messages of the logger; in `ray.experimental.channel`, the base classes `ReaderInterface` and
`WriterInterface`, and `_torch_available` of `ChannelContext`.
"""

import asyncio
import collections
import contextlib
import importlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from asyncexec.errors import ConfigError

SUPPORTED = (2, 60)
"""The Ray release, major and minor, that this was written for and is tested on."""

SLACK = 4096
"""Bytes that Ray adds to a message, and more than enough."""

Deliver = Callable[[int, Any, bool], None]
"""Called on the loop with an output's index, its value, and whether it is the step's last output."""

_compiling = threading.local()
_hooks = threading.Lock()


def require_support() -> None:
    """Raises ConfigError where the installed Ray is another release, or lacks what is used here."""
    version = importlib.import_module("ray").__version__
    node = importlib.import_module("ray.dag.compiled_dag_node")
    missing = [name for name in ("AwaitableBackgroundReader", "AwaitableBackgroundWriter") if not hasattr(node, name)]
    release = tuple(int(part) for part in version.split(".")[:2])
    if release != SUPPORTED or missing:
        supported = ".".join(map(str, SUPPORTED))
        raise ConfigError(
            f"options.ray.driver is 'direct', which works with Ray {supported}, and Ray {version} is installed; "
            "valid: 'documented'"
        )


def prepare_rank(buffer_size_bytes: int, *, tensors_on_gpu: bool) -> None:
    """On a rank: the size of the buffers that it will allocate, and no torch where no channel carries tensors."""
    importlib.import_module("ray.dag").DAGContext.get_current().buffer_size_bytes = buffer_size_bytes + SLACK
    if not tensors_on_gpu:
        # otherwise each rank imports torch with its first step, which takes seconds
        importlib.import_module("ray.experimental.channel").ChannelContext.get_current()._torch_available = False


class DirectDriver:
    """A compiled graph, and our own reader and writer on it.  Construct it in a helper thread: compiling blocks.

    Args:
        compile_graph: compiles, with `enable_asyncio=True`.
        loop: where `deliver` is called.
        deliver: see `Deliver`.
        failed: called on the loop when the graph ended by itself.
    """

    def __init__(
        self,
        compile_graph: Callable[[], Any],
        loop: asyncio.AbstractEventLoop,
        deliver: Deliver,
        failed: Callable[[BaseException], None],
    ) -> None:
        quieten_ray()
        self._inbox = _Inbox(loop, deliver, failed)
        with _our_reader_and_writer(self._inbox):
            self._graph: Any = compile_graph()

    def send(self, message: bytes) -> None:
        """Start a step."""
        self._graph._dag_submitter.write(message)
        self._graph._dag_output_fetcher.expect_one()

    async def close(self) -> None:
        """End the graph."""
        await asyncio.to_thread(end_graph, self._graph)


class _Inbox:
    """What the reader has read, on its way to the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, deliver: Deliver, failed: Callable[[BaseException], None]
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._failed = failed
        self._outputs: collections.deque[tuple[int, Any, bool]] = collections.deque()
        self._woken = False

    def put(self, index: int, value: Any, last: bool) -> None:
        """Called by the reader's thread."""
        self._outputs.append((index, value, last))
        if not self._woken:
            self._woken = True
            self._on_loop(self._drain)

    def fail(self, error: BaseException) -> None:
        """Called by the reader's thread, at most once."""
        self._on_loop(self._failed, error)

    def _drain(self) -> None:
        self._woken = False  # before looking: what is put from now on wakes the loop again
        while self._outputs:
            self._deliver(*self._outputs.popleft())

    def _on_loop(self, callback: Any, *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return  # the loop is closed: the driver is gone, and nobody is left to tell


@contextlib.contextmanager
def _our_reader_and_writer(inbox: _Inbox) -> Iterator[None]:
    """A graph that this thread compiles meanwhile gets ours; one that another thread compiles gets Ray's."""
    node: Any = importlib.import_module("ray.dag.compiled_dag_node")
    theirs = node.AwaitableBackgroundReader, node.AwaitableBackgroundWriter
    reader, writer = _make_classes()

    def make_reader(channels: Any, futures: Any) -> Any:
        ours = getattr(_compiling, "inbox", None)
        return theirs[0](channels, futures) if ours is None else reader(channels, ours)

    def make_writer(*args: Any, **kwargs: Any) -> Any:
        ours = getattr(_compiling, "inbox", None)
        return (theirs[1] if ours is None else writer)(*args, **kwargs)

    with _hooks:
        _compiling.inbox = inbox
        node.AwaitableBackgroundReader, node.AwaitableBackgroundWriter = make_reader, make_writer
        try:
            yield
        finally:
            node.AwaitableBackgroundReader, node.AwaitableBackgroundWriter = theirs
            _compiling.inbox = None


def _make_classes() -> tuple[type, type]:
    """Our reader and writer; made here, where Ray is imported already."""
    channel: Any = importlib.import_module("ray.experimental.channel")
    closed = importlib.import_module("ray.exceptions").RayChannelError

    class Reader(channel.ReaderInterface):  # type: ignore[misc]
        """Reads the outputs of one step after the other, in a thread that sleeps while no step is in flight."""

        def __init__(self, channels: list[Any], inbox: _Inbox) -> None:
            super().__init__(channels)
            self._inbox = inbox
            self._expected: queue.SimpleQueue[bool] = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._read_all, name="asyncexec-ray-reader", daemon=True)

        def start(self) -> None:
            self._thread.start()

        def expect_one(self) -> None:
            self._expected.put(True)

        def close(self) -> None:
            super().close()
            self._expected.put(False)

        def _read_all(self) -> None:
            last = len(self._input_channels) - 1
            try:
                while self._expected.get():
                    for index, source in enumerate(self._input_channels):
                        value = source.read()
                        if value != b"" or index == last:
                            self._inbox.put(index, value, index == last)
            except closed as error:
                if not self._closed:
                    self._inbox.fail(error)

    class Writer(channel.WriterInterface):  # type: ignore[misc]
        """Writes where it is called."""

        def start(self) -> None:
            for target in self._output_channels:
                target.ensure_registered_as_writer()

        def write(self, val: bytes, timeout: float | None = None) -> None:
            for target in self._output_channels:
                target.write(val, timeout)

    return Reader, Writer


def end_graph(graph: Any) -> None:
    """Tear a graph down; blocks until its ranks have ended what they do.

    Its proxy actor would end with the graph object, which may be part of a cycle, and then with the next garbage
    collection.
    """
    graph.teardown()
    if (proxy := getattr(graph, "_proxy_actor", None)) is not None:
        importlib.import_module("ray").kill(proxy)


def quieten_ray() -> None:
    """Keep Ray from logging each teardown step by step, and deaths that the executor reports itself."""
    logger = logging.getLogger("ray.dag.compiled_dag_node")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO and not record.getMessage().startswith("Error cancelling worker task")
