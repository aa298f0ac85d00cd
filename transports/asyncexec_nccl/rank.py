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

from asyncexec.errors import ConfigError
from asyncexec.process_groups import join_groups, leave_groups
from asyncexec.runtime import RankRuntime
from asyncexec.transport import RankLink
from asyncexec.wire import Frame, FrameKind
from asyncexec.worker import ProcessGroups, RankContext
from asyncexec_nccl.hops import HopReceiver, HopSender
from asyncexec_nccl.process import RankLaunch
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
        device = "cpu"
        if launch.backend != "none":
            backend = choose_backend(launch.backend, world_size)
            if backend == "nccl":
                device = f"cuda:{launch.rank}"
                importlib.import_module("torch").cuda.set_device(device)
            else:
                # ranks of one host meet on the loopback interface, whatever the host's name resolves to
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            self._groups = join_groups(backend, launch.rank, size, launch.pipeline_parallel_size, self._open_store)
        if launch.previous >= 0:
            self._previous = HopReceiver(self._open(launch.previous), device)
        if launch.next >= 0:
            self._next = HopSender(self._open(launch.next), launch.max_frame_bytes)
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

    def send_intermediate(self, call_id: int, tensors: Mapping[str, Any] | None) -> None:
        self._next.send(call_id, tensors)

    def receive_intermediate(self, call_id: int) -> Mapping[str, Any] | None:
        return self._previous.receive(call_id)

    def leave(self) -> None:
        leave_groups(self._groups)


def choose_backend(backend: str, world_size: int) -> str:
    """What "auto" is on this machine: "nccl" where every rank has a GPU of its own, else "gloo".

    Raises:
        ConfigError: NCCL was asked for, and there are not enough GPUs.
    """
    torch = importlib.import_module("torch")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if backend == "auto":
        return "nccl" if gpus >= world_size else "gloo"
    if backend == "nccl" and gpus < world_size:
        raise ConfigError(f"options.nccl.backend is 'nccl' for {world_size} ranks, and {gpus} GPUs are visible")
    return backend
