"""An executor as one writes it with ZeroMQ: a ROUTER in the driver, a DEALER on each rank, msgpack between them."""

import asyncio
import importlib
import multiprocessing
import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from asyncexec.bench.payload import Payload, SchedulerOutput, echo
from asyncexec.bench.peer import Peer
from asyncexec.bench.processes import end_with_parent

_LEAVE = b""
"""The message that asks a rank to end: no step is empty."""


def _serve(address: str, rank: int) -> None:
    end_with_parent()
    zmq: Any = importlib.import_module("zmq")
    decoder, encoder = msgspec.msgpack.Decoder(SchedulerOutput), msgspec.msgpack.Encoder()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.IDENTITY, b"%d" % rank)
        dealer.connect(address)
        dealer.send_multipart([b"ready", b""])
        while True:
            step, body = dealer.recv_multipart()
            if body == _LEAVE:
                return
            dealer.send_multipart([step, encoder.encode(echo(decoder.decode(body)))])


class ZeroMq(Peer):
    """Steps are numbered; one task takes all replies."""

    needs: ClassVar[dict[str, str]] = {"zmq": "pip install 'asyncexec[bench]'"}
    tensors = False

    async def start(self) -> None:
        """Bind, start the processes, and wait until each has said that it is there."""
        zmq: Any = importlib.import_module("zmq.asyncio")
        self._directory = tempfile.TemporaryDirectory()
        address = f"ipc://{Path(self._directory.name) / 'steps'}"
        self._context = zmq.Context()
        self._router = self._context.socket(importlib.import_module("zmq").ROUTER)
        self._router.bind(address)
        spawn = multiprocessing.get_context("spawn")
        self._processes = [spawn.Process(target=_serve, args=(address, rank)) for rank in range(self.ranks)]
        for process in self._processes:
            process.start()
        for _ in self._processes:
            await self._router.recv_multipart()
        self._identities = [b"%d" % rank for rank in range(self.ranks)]
        self._waiting: dict[tuple[bytes, bytes], asyncio.Future[bytes]] = {}
        self._steps = 0
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(SchedulerOutput)
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            identity, step, body = await self._router.recv_multipart()
            self._waiting.pop((identity, step)).set_result(body)

    def submit(self, value: Payload) -> Awaitable[Any]:
        """Send to each rank, and wait for all."""
        self._steps += 1
        step, body = b"%d" % self._steps, self._encoder.encode(value)
        replies = []
        for identity in self._identities:
            reply = asyncio.get_running_loop().create_future()
            self._waiting[identity, step] = reply
            replies.append(reply)
            self._router.send_multipart([identity, step, body])
        return self._replies(replies)

    async def _replies(self, replies: Sequence[asyncio.Future[bytes]]) -> SchedulerOutput:
        bodies = [await reply for reply in replies]
        return self._decoder.decode(bodies[0])

    async def pids(self) -> Sequence[int]:
        """Of the processes."""
        return [process.pid for process in self._processes if process.pid is not None]

    async def close(self) -> None:
        """Ask each rank to leave, then close."""
        self._reader.cancel()
        for identity in self._identities:
            await self._router.send_multipart([identity, b"", _LEAVE])
        for process in self._processes:
            await asyncio.to_thread(process.join)
        self._context.destroy()
        self._directory.cleanup()
