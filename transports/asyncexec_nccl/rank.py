"""What a rank's process runs, and the rank's half of the transport."""

import ctypes
import functools
import importlib
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from asyncexec.errors import ConfigError
from asyncexec.process_groups import agree, join_groups, join_pairs, leave_groups, warm_up
from asyncexec.runtime import RankRuntime
from asyncexec.transport import RankLink
from asyncexec.wire import Frame, FrameKind
from asyncexec.worker import ProcessGroups, RankContext
from asyncexec_nccl.arguments import ArgumentReceiver
from asyncexec_nccl.devices import choose_backend, choose_device
from asyncexec_nccl.gpu_hops import GpuHopReceiver, GpuHopSender
from asyncexec_nccl.hops import HopReceiver, HopSender
from asyncexec_nccl.layout import Joints, Layout, receive_layout
from asyncexec_nccl.nccl_pairs import PairReceiver, PairSender
from asyncexec_nccl.peer_copies import meet
from asyncexec_nccl.process import RankLaunch
from asyncexec_nccl.shared_memory import RankMemory
from asyncexec_nccl.staging import StagedReader
from asyncexec_nccl.stream import RankStream
from asyncexec_nccl.ways import ReceivingWay, SendingWay

_PR_SET_PDEATHSIG = 1

_PIECE = FrameKind.PIECE


def main(launch_json: str) -> None:
    """Serve one rank until the driver says STOP or is gone."""
    launch = msgspec.json.decode(launch_json, type=RankLaunch)
    _end_with(launch.driver_pid)
    link = _SocketLink(launch)
    RankRuntime(link).serve(link.receive)


def _end_with(driver_pid: int) -> None:
    """Have the kernel end this process with the driver, however the driver ends and whatever this process does."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != driver_pid:
        raise SystemExit("the driver ended while this rank was being spawned")


class _SocketLink(RankLink):
    def __init__(self, launch: RankLaunch) -> None:
        self._launch = launch
        self._stream = self._open(launch.control)
        self._side = self._open(launch.side)
        os.set_inheritable(launch.layouts, False)
        self._layouts = socket.socket(fileno=launch.layouts)
        self._layouts.setblocking(False)
        self._groups = ProcessGroups()
        self._previous: HopReceiver | None = None
        self._next: HopSender | None = None
        self._staging = RankMemory(launch.staging)
        self._staged = StagedReader(self._staging, "cpu", launch.rank, None)
        self._arguments = ArgumentReceiver(
            launch.arguments, launch.shared_memory_bytes, launch.rank, launch.max_frame_bytes
        )

    def _open(self, descriptor: int) -> RankStream:
        os.set_inheritable(descriptor, False)
        return RankStream(socket.socket(fileno=descriptor), self._launch.max_frame_bytes)

    def receive(self) -> Frame | None:
        while (frame := self._stream.receive()) is not None and frame.kind is _PIECE:
            self._arguments.take(frame)
        return None if frame is None else self._arguments.complete(frame)

    def send(self, frame: Frame) -> None:
        try:
            self._stream.send(frame.pack())
        except ConnectionError:
            return  # the driver is gone: `receive` says so next

    def join(self) -> RankContext:
        rank, device = self._launch.rank, "cpu"
        layout, joints = receive_layout(self._layouts)
        size, stages = layout.tensor_parallel_size, layout.pipeline_parallel_size
        self._make_host_hops(joints)
        backend = self._launch.backend
        try:
            backend = choose_backend(backend, layout.world_size, self._launch.devices)
            device = choose_device(backend, rank, self._launch.devices)
            if backend == "gloo":
                # ranks of one host meet on the loopback interface, whatever the host's name resolves to
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            open_store = functools.partial(_open_store, joints.store, layout.world_size)
            limit = self._launch.collective_timeout
            self._groups = join_groups(backend, rank, size, stages, open_store, limit)
            if backend == "nccl" and self._groups.world is not None:
                warm_up(self._groups, device)
                if stages > 1:
                    self._make_gpu_hops(layout, device)
        finally:
            if backend == "none" or layout.world_size == 1:
                os.close(joints.store)  # else see `_open_store`
        self._staged = StagedReader(self._staging, device, rank, self._groups.world)
        self._arguments.place_on(device, self._groups.world)
        return RankContext(
            rank=rank,
            local_rank=rank,
            world_size=layout.world_size,
            tensor_parallel_rank=rank % size,
            tensor_parallel_size=size,
            pipeline_parallel_rank=rank // size,
            pipeline_parallel_size=layout.pipeline_parallel_size,
            device=device,
            groups=self._groups,
        )

    def _make_host_hops(self, joints: Joints) -> None:
        """Take the connections to the neighbouring stages over."""
        if joints.previous is not None:
            self._previous = HopReceiver(self._open(joints.previous))
        if joints.next is not None:
            self._next = HopSender(self._open(joints.next), self._launch.max_frame_bytes)

    def _make_gpu_hops(self, layout: Layout, device: str) -> None:
        """Have tensors on the GPUs go from one to the other: by copies where all can reach their neighbours' memory."""
        launch, groups, size = self._launch, self._groups, layout.tensor_parallel_size
        previous = None if self._previous is None else self._previous.stream
        following = None if self._next is None else self._next.stream
        receiving: ReceivingWay | None = None
        sending: SendingWay | None = None
        if launch.hop_bytes:
            receiving, sending = meet(previous, following, device, launch.hop_bytes)
        complete = (receiving is None) == (previous is None) and (sending is None) == (following is None)
        if not agree(groups.world, complete, device):
            for way in (receiving, sending):
                if way is not None:
                    way.let_go()
                    way.close()
            stages, limit = layout.pipeline_parallel_size, launch.collective_timeout
            pairs = join_pairs(launch.rank, size, stages, device, limit)
            receiving = None if pairs.previous is None else PairReceiver(device, pairs.previous)
            sending = None if pairs.next is None else PairSender(device, pairs.next)
        if previous is not None and receiving is not None:
            self._previous = GpuHopReceiver(previous, device, receiving, groups.tensor_parallel, size)
        if following is not None and sending is not None:
            part = launch.rank % size
            self._next = GpuHopSender(following, launch.max_frame_bytes, sending, device, part, size)

    def answer_inspections(self, describe: Callable[[bool], bytes]) -> None:
        # a daemon: it ends with the process, at the latest with the driver
        threading.Thread(target=self._answer, args=(describe,), name="asyncexec-side", daemon=True).start()

    def _answer(self, describe: Callable[[bool], bytes]) -> None:
        while (question := self._side.receive()) is not None:
            try:
                self._side.send(Frame(FrameKind.REPORT, body=describe(len(question.body) > 0)).pack())
            except ConnectionError:
                return  # the driver is gone
            except Exception:  # noqa: BLE001 - one report less, but the next question must find somebody
                traceback.print_exc()
                self._side.send(Frame(FrameKind.REPORT).pack())

    def send_intermediate(
        self, call_id: int, tensors: Mapping[str, Any] | None, replicated: frozenset[str] = frozenset()
    ) -> None:
        if self._next is None:
            raise ConfigError("there is no pipeline stage behind this one")
        self._next.send(call_id, tensors, replicated)

    def receive_intermediate(self, call_id: int) -> Mapping[str, Any] | None:
        if self._previous is None:
            raise ConfigError("there is no pipeline stage before this one")
        return self._previous.receive(call_id)

    def read_staged(self, begin: int, nbytes: int) -> tuple[Any, Any]:
        return self._staged.read(begin, nbytes)

    def leave(self) -> None:
        leave_groups(self._groups)
        self._staged.close()  # unpinning may wait for the GPU, which waits for nobody any more
        self._arguments.leave()
        self._groups = ProcessGroups()
        hops = [hop for hop in (self._previous, self._next) if hop is not None]
        for hop in hops:
            hop.let_go()  # of all, before waiting for a neighbour to do so
        for hop in hops:
            hop.close()
        self._previous = self._next = None


def _open_store(descriptor: int, world_size: int) -> Any:
    """Where the ranks meet: a file in memory only, which nobody but them can open.  No port, no path.

    A FileStore opens its file once more when it is destroyed, which is when the worker lets go of the last group: the
    descriptor must stay what it is, and is never closed.
    """
    return importlib.import_module("torch.distributed").FileStore(f"/proc/self/fd/{descriptor}", world_size)
