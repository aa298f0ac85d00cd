"""The floor: the least that any executor with a process per rank does.

One process encodes the step as msgpack and writes it to a Unix socket for each rank.  The ranks echo the bytes
(asyncio protocols on uvloop), and the first process decodes what the first one sent.  There is nothing else: no worker,
no errors, no deadlines.
"""

import asyncio
import collections
import multiprocessing
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from asyncexec import run
from asyncexec.bench.payload import Payload, SchedulerOutput
from asyncexec.bench.peer import Peer
from asyncexec.bench.processes import end_with_parent

_LENGTH = struct.Struct("<I")


class Messages(asyncio.Protocol):
    """Cuts what arrives into messages."""

    transport: asyncio.WriteTransport

    def __init__(self, message_received: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._message_received, self._lost = message_received, lost
        self._data = b""

    def connection_made(self, transport: Any) -> None:
        """Keep the transport, to send by."""
        self.transport = transport

    def send(self, body: bytes) -> None:
        """One message."""
        self.transport.write(_LENGTH.pack(len(body)) + body)

    def data_received(self, data: bytes) -> None:
        """Some bytes of one or more messages."""
        self._data += data
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            if len(self._data) < end:
                return
            body, self._data = self._data[_LENGTH.size : end], self._data[end:]
            self._message_received(body)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side has ended."""
        self._lost()


class Echo(asyncio.Protocol):
    """Sends back what arrives, as it arrives."""

    def __init__(self, ended: asyncio.Event) -> None:
        self._ended = ended

    def connection_made(self, transport: Any) -> None:
        """Keep the transport, to send by."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Echo."""
        self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The driver has ended."""
        self._ended.set()


def echo_bytes(ended: asyncio.Event) -> asyncio.BaseProtocol:
    """A rank that looks at nothing."""
    return Echo(ended)


def echo_decoded(ended: asyncio.Event) -> asyncio.BaseProtocol:
    """A rank that decodes each step and encodes its answer."""
    decoder, encoder = msgspec.msgpack.Decoder(SchedulerOutput), msgspec.msgpack.Encoder()
    messages = Messages(lambda body: messages.send(encoder.encode(decoder.decode(body))), ended.set)
    return messages


def _serve(connection: socket.socket, make_echo: Callable[[asyncio.Event], asyncio.BaseProtocol]) -> None:
    end_with_parent()

    async def serve() -> None:
        ended = asyncio.Event()
        await asyncio.get_running_loop().create_connection(lambda: make_echo(ended), sock=connection)
        await ended.wait()

    run(serve())


class _Rank:
    """The driver's end of one rank."""

    def __init__(self, make_echo: Callable[[asyncio.Event], asyncio.BaseProtocol]) -> None:
        self.socket, theirs = socket.socketpair()
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, make_echo))
        self.process.start()
        theirs.close()
        self._waiting: collections.deque[asyncio.Future[bytes]] = collections.deque()
        self.messages = Messages(lambda body: self._waiting.popleft().set_result(body), self._lost)

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self.messages, sock=self.socket)

    def call(self, body: bytes) -> asyncio.Future[bytes]:
        if self.messages.transport.is_closing():
            raise ConnectionResetError("the rank has ended")
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append(reply)
        self.messages.send(body)
        return reply

    def _lost(self) -> None:
        for reply in self._waiting:
            reply.set_exception(ConnectionResetError("the rank has ended"))


class Floor(Peer):
    """The ranks echo bytes."""

    tensors = False

    def make_rank(self) -> _Rank:
        """One that looks at nothing."""
        return _Rank(echo_bytes)

    async def start(self) -> None:
        """Start the processes."""
        self._ranks = [self.make_rank() for _ in range(self.ranks)]
        for rank in self._ranks:
            await rank.connect()
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(SchedulerOutput)

    def submit(self, value: Payload) -> Awaitable[Any]:
        """Write to all, then wait for all."""
        body = self._encoder.encode(value)
        return self._replies([rank.call(body) for rank in self._ranks])

    async def _replies(self, replies: Sequence[asyncio.Future[bytes]]) -> SchedulerOutput:
        bodies = [await reply for reply in replies]
        return self._decoder.decode(bodies[0])

    async def pids(self) -> Sequence[int]:
        """Of the echoing processes."""
        return [rank.process.pid for rank in self._ranks if rank.process.pid is not None]

    async def close(self) -> None:
        """Close the sockets, which ends the ranks."""
        for rank in self._ranks:
            rank.messages.transport.close()
        for rank in self._ranks:
            await asyncio.to_thread(rank.process.join)


class DecodingFloor(Floor):
    """The ranks decode and encode, as any rank that runs a model must."""

    def make_rank(self) -> _Rank:
        """One that decodes."""
        return _Rank(echo_decoded)
