"""What a rank's process runs, and the rank's half of the transport."""

import ctypes
import importlib
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from asyncexec.process_groups import StagePairs, join_groups, join_pairs, leave_groups, warm_up
from asyncexec.runtime import RankRuntime
from asyncexec.transport import RankLink
from asyncexec.wire import Frame, FrameKind
from asyncexec.worker import ProcessGroups, RankContext
from asyncexec_nccl.devices import choose_backend, choose_device
from asyncexec_nccl.gpu_hops import GpuHopReceiver, GpuHopSender, SideStream
from asyncexec_nccl.hops import HopReceiver, HopSender
from asyncexec_nccl.process import RankLaunch
from asyncexec_nccl.staging import StagedReader
from asyncexec_nccl.stream import RankStream

_PR_SET_PDEATHSIG = 1


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
        self._groups = ProcessGroups()
        self._previous: HopReceiver | None = None
        self._next: HopSender | None = None
        self._staged = StagedReader(launch.staging, "cpu", launch.rank, None)

    def _open(self, descriptor: int) -> RankStream:
        os.set_inheritable(descriptor, False)
        return RankStream(socket.socket(fileno=descriptor), self._launch.max_frame_bytes)

    def receive(self) -> Frame | None:
        return self._stream.receive()

    def send(self, frame: Frame) -> None:
        try:
            self._stream.send(frame)
        except ConnectionError:
            return  # the driver is gone: `receive` says so next

    def join(self) -> RankContext:
        launch = self._launch
        size = launch.tensor_parallel_size
        world_size = size * launch.pipeline_parallel_size
        backend = choose_backend(launch.backend, world_size, launch.devices)
        device = choose_device(backend, launch.rank, launch.devices)
        if backend == "gloo":
            # ranks of one host meet on the loopback interface, whatever the host's name resolves to
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        stages = launch.pipeline_parallel_size
        limit = launch.collective_timeout
        self._groups = join_groups(backend, launch.rank, size, stages, self._open_store, limit)
        self._staged = StagedReader(launch.staging, device, launch.rank, self._groups.world)
        if backend == "nccl" and world_size > 1:
            pairs = join_pairs(launch.rank, size, stages, limit)
            warm_up(self._groups, pairs, device)
            self._connect_stages(pairs, device)
        else:
            self._connect_stages(None, device)
        return RankContext(
            rank=launch.rank,
            local_rank=launch.rank,
            world_size=world_size,
            tensor_parallel_rank=launch.rank % size,
            tensor_parallel_size=size,
            pipeline_parallel_rank=launch.rank // size,
            pipeline_parallel_size=launch.pipeline_parallel_size,
            device=device,
            groups=self._groups,
        )

    def _connect_stages(self, pairs: StagePairs | None, device: str) -> None:
        """Make the ways to the neighbouring stages: by NCCL where there are pairs, else through host memory."""
        launch, size = self._launch, self._launch.tensor_parallel_size
        previous = self._open(launch.previous) if launch.previous >= 0 else None
        following = self._open(launch.next) if launch.next >= 0 else None
        if pairs is None:
            self._previous = HopReceiver(previous, device) if previous else None
            self._next = HopSender(following, launch.max_frame_bytes) if following else None
            return
        side = SideStream(device)
        if previous:
            group = self._groups.tensor_parallel
            self._previous = GpuHopReceiver(previous, device, pairs.previous, side, group, size)
        if following:
            limit, part = launch.max_frame_bytes, launch.rank % size
            self._next = GpuHopSender(following, limit, pairs.next, side, device, part, size)

    def _open_store(self) -> Any:
        """Where the ranks meet: a file in memory only, which nobody but them can open.  No port, no path."""
        launch = self._launch
        world_size = launch.tensor_parallel_size * launch.pipeline_parallel_size
        store = importlib.import_module("torch.distributed").FileStore
        return store(f"/proc/self/fd/{launch.store}", world_size)

    def answer_inspections(self, describe: Callable[[], bytes]) -> None:
        # a daemon: it ends with the process, at the latest with the driver
        threading.Thread(target=self._answer, args=(describe,), name="asyncexec-side", daemon=True).start()

    def _answer(self, describe: Callable[[], bytes]) -> None:
        while self._side.receive() is not None:
            try:
                self._side.send(Frame(FrameKind.REPORT, body=describe()))
            except ConnectionError:
                return  # the driver is gone
            except Exception:  # noqa: BLE001 - one report less, but the next question must find somebody
                traceback.print_exc()
                self._side.send(Frame(FrameKind.REPORT))

    def send_intermediate(
        self, call_id: int, tensors: Mapping[str, Any] | None, replicated: frozenset[str] = frozenset()
    ) -> None:
        if self._next is not None:  # a START that failed has connected nothing
            self._next.send(call_id, tensors, replicated)

    def receive_intermediate(self, call_id: int) -> Mapping[str, Any] | None:
        return None if self._previous is None else self._previous.receive(call_id)

    def read_staged(self, begin: int, nbytes: int) -> tuple[Any, Any]:
        return self._staged.read(begin, nbytes)

    def leave(self) -> None:
        self._staged.close()
        leave_groups(self._groups)
