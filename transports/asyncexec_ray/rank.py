"""The rank's half: what an actor does, on whichever of its threads Ray calls it."""

import contextlib
import importlib
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec

from asyncexec.errors import PayloadError
from asyncexec.process_groups import join_groups, leave_groups
from asyncexec.runtime import RankRuntime
from asyncexec.tensors import decode_tensors, encode_tensors
from asyncexec.transport import RankLink
from asyncexec.wire import Frame, FrameKind
from asyncexec.worker import ProcessGroups, RankContext
from asyncexec_ray import graph_internals
from asyncexec_ray.messages import Place, Seat, frame_of, number_and_frame, numbered, packed, step_of


class RankServer:
    """One rank.  `step` is called by the graph's loop, everything else by ordinary actor calls beside it."""

    def __init__(self) -> None:
        self._turns = _Turns()
        self._late: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._link = _RayLink(self._late)
        self._runtime = RankRuntime(self._link)
        self._runtime.begin()

    def place(self) -> bytes:
        """Where this is."""
        context = importlib.import_module("ray").get_runtime_context()
        host = importlib.import_module("ray.util").get_node_ip_address()
        place = Place(
            node=context.get_node_id(),
            host=host,
            pid=os.getpid(),
            pid_namespace=os.readlink("/proc/self/ns/pid"),
            gpus=[str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])],
            stderr=os.readlink("/proc/self/fd/2"),
        )
        return msgspec.msgpack.encode(place)

    def sit(self, seat: bytes, leader: Any) -> None:
        """Be the rank that `seat` says from the next START on; `leader` is the actor of rank 0."""
        self._seat = msgspec.msgpack.decode(seat, type=Seat)
        graph_internals.prepare_rank(self._seat.buffer_size_bytes, tensors_on_gpu=bool(_gpus()))
        self._link.sit(self._seat, leader)

    def call(self, message: bytes) -> None:
        """Take a frame that is no step."""
        number, frame = number_and_frame(message)
        with self._turns.take(number), _ending_the_process():
            if frame.kind is FrameKind.STOP:
                try:
                    self._runtime.finish()
                finally:
                    self._late.put(None)
            else:
                self._runtime.handle(frame)

    def step(self, message: bytes, intermediate: Any) -> bytes:
        """Take a step; returns the reply, or nothing where none is wanted or it comes late."""
        number, frame = step_of(message, self._seat.rank, self._seat.world_size)
        with self._turns.take(number), _ending_the_process(), self._link.stepping(intermediate) as step:
            self._runtime.handle(frame)
        return step.reply

    def hand_on(self) -> Any:
        """The tensors of the step that was taken last, for the next pipeline stage."""
        return self._link.take_outgoing()

    def late(self) -> list[bytes | None]:
        """Wait for frames that do not come with a step; None comes after the last one."""
        messages = [self._late.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(self._late.get_nowait())
        return messages

    def inspect(self, stacks: bool) -> bytes:
        """What the rank is doing."""
        return self._link.describe(stacks)

    def meet(self) -> tuple[str, int]:
        """Where the process groups meet; waits until rank 0, which this is, has opened it."""
        return self._link.meeting_point.result()


class _Turns:
    """Lets two threads work in the order of the numbers that their messages have."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._next = 1

    @contextlib.contextmanager
    def take(self, number: int) -> Iterator[None]:
        """Wait until everything before `number` is done: it was sent before, and is here or on its way."""
        with self._condition:
            self._condition.wait_for(lambda: self._next == number)
        try:
            yield
        finally:
            with self._condition:
                self._next += 1
                self._condition.notify_all()


class _Step:
    """The step that runs: what it was given, and what goes back with it."""

    def __init__(self, intermediate: Any) -> None:
        self.thread = threading.get_ident()
        self.intermediate = intermediate
        self.reply = b""


class _RayLink(RankLink):
    def __init__(self, late: queue.SimpleQueue[bytes | None]) -> None:
        self.describe: Callable[[bool], bytes] = lambda stacks: b""
        self._device = "cuda:0" if _gpus() else "cpu"  # Ray shows an actor its own GPUs alone
        self._groups = ProcessGroups()
        self._numbering = threading.Lock()
        self._sent = 0
        self._late = late
        self._step: _Step | None = None
        self._graph_thread = 0
        self._outgoing: Any = None

    def sit(self, seat: Seat, leader: Any) -> None:
        """Take a seat; the ranks meet anew when they join."""
        self.meeting_point: Future[tuple[str, int]] = Future()
        self._seat = seat
        self._leader = leader

    @contextlib.contextmanager
    def stepping(self, intermediate: Any) -> Iterator[_Step]:
        """While a step of the graph runs, on the graph's thread."""
        step = self._step = _Step(intermediate)
        if self._graph_thread != step.thread:
            self._graph_thread = step.thread
            self._use_device()  # which each thread has to say
        try:
            yield step
        finally:
            self._step = None

    def send(self, frame: Frame) -> None:
        """With the step where it is the step's reply; else late.

        Errors come late although their step is over: the driver reads what comes with a step rank by rank, and a rank
        before this one may wait for it in a collective.
        """
        with self._numbering:
            self._sent += 1
            message = numbered(self._sent, frame)
            step = self._step
            if (
                step is not None
                and step.thread == threading.get_ident()
                and frame.kind in (FrameKind.REPLY, FrameKind.DONE)
                and not step.reply
                and len(message) <= self._seat.buffer_size_bytes
            ):
                step.reply = message
            else:
                self._late.put(message)

    def join(self) -> RankContext:
        seat = self._seat
        size = seat.tensor_parallel_size
        self._use_device()
        if seat.one_host and seat.backend == "gloo":
            # ranks of one host meet on the loopback interface, whatever the host's name resolves to
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._groups = join_groups(seat.backend, seat.rank, size, seat.pipeline_parallel_size, self._open_store)
        return RankContext(
            rank=seat.rank,
            local_rank=seat.local_rank,
            world_size=seat.world_size,
            tensor_parallel_rank=seat.rank % size,
            tensor_parallel_size=size,
            pipeline_parallel_rank=seat.rank // size,
            pipeline_parallel_size=seat.pipeline_parallel_size,
            device=self._device,
            groups=self._groups,
        )

    def _use_device(self) -> None:
        if self._device != "cpu":
            importlib.import_module("torch").cuda.set_device(self._device)

    def _open_store(self) -> Any:
        """A TCP store on rank 0, at a port that the kernel chooses; the others ask rank 0's actor where."""
        store: Any = importlib.import_module("torch.distributed").TCPStore
        if self._seat.rank != 0:
            ray: Any = importlib.import_module("ray")
            host, port = ray.get(self._leader.meet.options(concurrency_group="meet").remote())
            return store(host, port, self._seat.world_size, is_master=False)
        host = "127.0.0.1" if self._seat.one_host else importlib.import_module("ray.util").get_node_ip_address()
        opened = store(host, 0, self._seat.world_size, is_master=True, wait_for_workers=False)
        self.meeting_point.set_result((host, opened.port))
        return opened

    def answer_inspections(self, describe: Callable[[bool], bytes]) -> None:
        self.describe = describe

    def send_intermediate(
        self, call_id: int, tensors: Mapping[str, Any] | None, replicated: frozenset[str] = frozenset()
    ) -> None:
        self._outgoing = None
        if tensors is None or self._seat.tensor_transport == "nccl":
            self._outgoing = tensors
            return
        body, buffers = encode_tensors(tensors)
        message = packed(Frame(FrameKind.CALL, call_id, body=body, buffers=buffers))
        if len(message) > (limit := self._seat.buffer_size_bytes):
            raise PayloadError(
                f"the intermediate tensors are {len(message)} bytes; options.ray.buffer_size_bytes is {limit}"
            )
        self._outgoing = message

    def take_outgoing(self) -> Any:
        """What the step before left for the next stage; None where there is nothing."""
        outgoing, self._outgoing = self._outgoing, None
        return outgoing

    def receive_intermediate(self, call_id: int) -> Mapping[str, Any] | None:
        intermediate = self._step.intermediate if self._step is not None else None
        if not isinstance(intermediate, bytes):
            return intermediate  # tensors, or None
        frame = frame_of(intermediate)
        return decode_tensors(frame.body, frame.buffers, self._device)

    def leave(self) -> None:
        leave_groups(self._groups)
        self._groups = ProcessGroups()


def _gpus() -> list[Any]:
    ids: dict[str, list[Any]] = importlib.import_module("ray").get_runtime_context().get_accelerator_ids()
    return ids.get("GPU", [])


@contextlib.contextmanager
def _ending_the_process() -> Iterator[None]:
    """A worker that exits ends its rank, as it would where it has the process to itself; Ray would go on."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - without this call, the rank cannot take the next one either
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit) or not isinstance(code, int | None):
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
