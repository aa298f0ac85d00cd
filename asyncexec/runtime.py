"""The rank-side runtime: takes calls in order, runs the worker, replies.  The same code on every transport."""

import dataclasses
import importlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from asyncexec.buckets import Bucket
from asyncexec.codec import Codec
from asyncexec.errors import ConfigError, PayloadError
from asyncexec.inspection import Activity, RankSpan
from asyncexec.outputs import DeferredOutput, IntermediateTensors
from asyncexec.pickling import loads
from asyncexec.transport import RankLink
from asyncexec.wire import ALL_RANKS, Frame, FrameKind
from asyncexec.worker import RankContext

_START, _STOP, _REPLY = FrameKind.START, FrameKind.STOP, FrameKind.REPLY

_BEFORE_START = 1 << 16
"""Bytes of an error that is to say why START cannot be read, and so not how large a frame may be."""

_LONGEST_NAME = 256
"""Characters of an exception's type that are told."""

_ERROR_OVERHEAD = 64
"""Bytes that the encoded form of an error adds, and more than enough."""


class WorkerSpec(NamedTuple):
    """What a rank needs to construct its worker; pickled in a START frame.

    Attributes:
        worker: "module:Class", or the class itself.
        kwargs: passed to the constructor after the context.
        fingerprint: of the driver's codec, which the rank's must equal.
        max_frame_bytes: a result that is larger fails its call here, before the driver would refuse the frame.
    """

    worker: str | type
    kwargs: Mapping[str, Any]
    fingerprint: str
    max_frame_bytes: int


class RemoteFailure(msgspec.Struct, frozen=True, array_like=True):
    """An exception on its way to the driver; the msgpack body of an ERROR frame.

    Attributes:
        type: qualified name of its class.
        message: its text.
        traceback: as printed here.
        in_collective: whether torch.distributed raised it: another rank may be the reason.
    """

    type: str
    message: str
    traceback: str
    in_collective: bool

    @classmethod
    def of(cls, error: BaseException) -> "RemoteFailure":
        """Describe an exception that is being handled."""
        module = type(error).__module__
        name = type(error).__qualname__ if module == "builtins" else f"{module}.{type(error).__qualname__}"
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        in_collective = any(module.startswith("torch.distributed") for module in frames)
        try:
            message, printed = str(error), "".join(traceback.format_exception(error))
        except Exception as failing:  # noqa: BLE001 - the exception's own __str__ raised: tell what can be told
            message = f"its message cannot be had: {type(failing).__name__}"
            printed = "".join(traceback.format_tb(error.__traceback__))
        return cls(name, _encodable(message), _encodable(printed), in_collective)

    def within(self, limit: int) -> "RemoteFailure":
        """Cut to about `limit` bytes where it is longer: the beginning of the message, the end of the traceback."""
        half = limit // 2
        message = self.message.encode()[:half].decode(errors="ignore")
        traceback = self.traceback.encode()[-half:].decode(errors="ignore")
        return RemoteFailure(self.type[:_LONGEST_NAME], message, traceback, self.in_collective)


def _encodable(text: str) -> str:
    """Escape what is no valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def load_worker_class(worker: str | type) -> type:
    """The worker class that "module:Class" names.

    Raises:
        ConfigError: the module cannot be imported or has no such class; the message has the import error.
    """
    if isinstance(worker, type):
        return worker
    module_name, colon, class_name = worker.partition(":") if isinstance(worker, str) else ("", "", "")
    if not (module_name and colon and class_name):
        raise ConfigError(f"worker is {worker!r}; valid: a class, or 'module:Class'")
    try:
        target: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            target = getattr(target, part)
    except Exception as error:
        raise ConfigError(f"worker {worker!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(target, type):
        raise ConfigError(f"worker {worker!r} is a {type(target).__name__}; valid: a class")
    return target


class RankRuntime:
    """Serves one rank until the driver asks it to stop, or is gone.

    A transport gives it frames one after the other, in the order sent: by `serve`, or by calls of `handle` between
    `begin` and `finish`, on whatever threads it has.  Replies leave in call order too: while a deferred output is
    waited for, the results of later calls queue up behind it.
    """

    def __init__(self, link: RankLink) -> None:
        self._link = link
        self._context = RankContext()
        self._worker: Any = None
        self._codec = Codec(object)
        self._step_method = -1
        self._stage: _Stage | None = None
        self._max_frame_bytes = _BEFORE_START
        self._replies = _ReplyQueue()
        self._activity = Activity()
        self._last_call = 0
        self._has_joined = False

    def serve(self, receive: Callable[[], Frame | None]) -> None:
        """Take what `receive` returns until that is STOP or None, then let the worker and the link end."""
        self.begin()
        try:
            while (frame := receive()) is not None and frame.kind is not _STOP:
                self.handle(frame)
                del frame  # its memory can be used for the next one
        finally:
            self.finish()

    def begin(self) -> None:
        """Answer inspections from now on."""
        self._activity = Activity()
        self._link.answer_inspections(self._describe)

    def handle(self, frame: Frame) -> None:
        """Run a START or a CALL on the calling thread; returns when the worker's method has."""
        if frame.kind is _START:
            self._start(frame)
        else:
            self._call(frame)

    def finish(self) -> None:
        """Send what is still waited for, then let the worker and the link end."""
        self._replies.finish()
        try:
            if callable(shutdown := getattr(self._worker, "shutdown", None)):
                shutdown()
        finally:
            self._link.leave()

    def _describe(self, stacks: bool) -> bytes:
        report = self._activity.report(self._context.rank, deferred=self._replies.busy, stacks=stacks)
        return msgspec.msgpack.encode(report)

    def _start(self, frame: Frame) -> None:
        started = time.monotonic_ns()
        self._activity.begin("start", frame.call_id, started)
        try:
            spec: WorkerSpec = loads(frame.body, frame.buffers)
            worker_class = load_worker_class(spec.worker)
            self._codec = Codec(worker_class)
            self._max_frame_bytes = spec.max_frame_bytes
            self._step_method = self._codec.method_number("execute_model")
            if self._codec.fingerprint != spec.fingerprint:
                raise ConfigError(
                    f"driver and rank disagree on how calls of {worker_class.__qualname__} travel; "
                    "do both run the same code?"
                )
            self._join()
            self._take_place(worker_class, spec.kwargs)
            reply = self._result(frame, None, started)
        except Exception as error:  # noqa: BLE001 - every failure to start is the driver's to hear of
            reply = self._error(frame, error, started)
        self._activity.end(reply.ended_ns)
        self._send(reply)

    def _join(self) -> None:
        """Meet the other ranks, instead of those met before."""
        if self._has_joined:
            self._link.leave()
        self._has_joined = True
        self._context = dataclasses.replace(self._link.join(), mark_progress=self._activity.mark)
        self._stage = _Stage(self._link, self._context, self._activity)

    def _take_place(self, worker_class: type, kwargs: Mapping[str, Any]) -> None:
        """Construct the worker, or have the one that is there take its new place."""
        if callable(reinitialize := getattr(self._worker, "reinitialize_distributed", None)):
            reinitialize(self._context)
            return
        old, self._worker = self._worker, None  # its memory first
        if callable(shutdown := getattr(old, "shutdown", None)):
            shutdown()
        del old, shutdown, reinitialize
        self._worker = worker_class(self._context, **kwargs)

    def _call(self, frame: Frame) -> None:
        if frame.call_id <= self._last_call:
            return  # a duplicate, or overtaken: the worker must not run a call twice, nor calls out of order
        self._last_call = frame.call_id
        started = time.monotonic_ns()
        stage = self._stage if frame.method == self._step_method else None
        method = self._codec.method_name(frame.method) or "a callable"
        span = RankSpan(frame.call_id, frame.epoch, method, started) if frame.trace else None
        self._activity.begin(method, frame.call_id, started)
        call: Any = None  # until the reply is sent: what large arguments are made of takes time to free
        try:
            call = self._codec.decode_call(frame)
            if span is not None:
                span.began = time.monotonic_ns()
            output = self._run(stage, frame.call_id, *call)
        except _EarlierStageFailed:
            owed = self._wanted(frame) or frame.acknowledge
            reply = _answer(FrameKind.SKIPPED, frame, started) if owed else None
        except Exception as error:  # noqa: BLE001 - the worker's errors are the caller's to hear of
            reply = self._error(frame, error, started)
        else:
            if isinstance(output, DeferredOutput) and (self._wanted(frame) or frame.acknowledge):
                self._defer(frame, output, started, span)
                reply = span = None
            else:
                reply = self._reply(frame, output, started)
        ended = time.monotonic_ns() if reply is None else reply.ended_ns
        if span is not None:
            span.ended = ended
        self._activity.end(ended)  # before the reply: who has it may ask at once what the rank is doing
        if reply is not None:
            self._send(reply, span)
        elif span is not None:
            self._activity.keep(span)
        if stage is not None:
            stage.release_next(frame.call_id)

    def _run(
        self,
        stage: "_Stage | None",
        call_id: int,
        target: str | Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run a call; returns its output."""
        if stage is not None:
            return stage.run(call_id, self._worker.execute_model, *args, **kwargs)
        if isinstance(target, Bucket):
            return target(self._worker, self._link.read_staged)
        if callable(target):
            return target(self._worker, *args, **kwargs)
        return getattr(self._worker, target)(*args, **kwargs)

    def _wanted(self, frame: Frame) -> bool:
        return frame.reply_to in (ALL_RANKS, self._context.rank)

    def _defer(self, frame: Frame, output: DeferredOutput[Any], started: int, span: RankSpan | None) -> None:
        """Have the completion thread wait for an output."""
        if span is not None:
            span.ended = time.monotonic_ns()
        self._replies.defer(lambda: self._resolve(frame, output, started, span))

    def _resolve(self, frame: Frame, output: DeferredOutput[Any], started: int, span: RankSpan | None) -> None:
        if span is not None:
            span.completing = time.monotonic_ns()
        reply: Frame | None
        try:
            value = output.wait()
        except BaseException as error:  # noqa: BLE001 - on this thread SystemExit would end nothing but later replies
            reply = self._error(frame, error, started)
        else:
            reply = self._reply(frame, value, started)
        if span is not None:
            span.ready = time.monotonic_ns() if reply is None else reply.ended_ns
        if reply is not None:
            self._send_now(reply, span)
        elif span is not None:
            self._activity.keep(span)

    def _reply(self, frame: Frame, value: Any, started: int) -> Frame | None:
        """What to say of a call that returned `value`; None where nobody wants to know."""
        if self._wanted(frame):
            return self._result(frame, value, started)
        return _answer(FrameKind.DONE, frame, started) if frame.acknowledge else None

    def _result(self, frame: Frame, value: Any, started: int) -> Frame:
        reply = _answer(_REPLY, frame, started)
        try:
            self._codec.encode_result(reply, value)
            if refusal := reply.refusal(self._max_frame_bytes):
                raise PayloadError(f"the results {refusal}")
        except Exception as error:  # noqa: BLE001 - encoding runs code of the worker's author, which may raise anything
            return self._error(frame, error, started)
        return reply

    def _error(self, frame: Frame, error: BaseException, started: int) -> Frame:
        reply = _answer(FrameKind.ERROR, frame, started)
        failure = RemoteFailure.of(error).within(self._max_frame_bytes - _LONGEST_NAME - _ERROR_OVERHEAD)
        reply.body = msgspec.msgpack.encode(failure)
        return reply

    def _send(self, reply: Frame, span: RankSpan | None = None) -> None:
        """Send a reply behind those that are still waited for."""
        if self._replies.busy:
            self._replies.defer(lambda: self._send_behind(reply, span))
        elif span is None:
            self._link.send(reply)
        else:
            self._send_now(reply, span)

    def _send_behind(self, reply: Frame, span: RankSpan | None) -> None:
        if span is not None:
            span.completing = time.monotonic_ns()
        self._send_now(reply, span)

    def _send_now(self, reply: Frame, span: RankSpan | None) -> None:
        """Send a reply, and keep note of it before the driver can have it: who has it may ask for the note."""
        if span is not None:
            span.answer = reply.kind.name
            span.replied = time.monotonic_ns()
            self._activity.keep(span)
        self._link.send(reply)


def _answer(kind: FrameKind, frame: Frame, started: int) -> Frame:
    return Frame(kind, frame.call_id, frame.epoch, frame.method, frame.reply_to, started, time.monotonic_ns())


class _EarlierStageFailed(Exception):
    """This call cannot run here: an earlier pipeline stage failed, and reports why itself."""


class _Stage:
    """The steps on one pipeline stage: tensors in, the worker, tensors out."""

    def __init__(self, link: RankLink, context: RankContext, activity: Activity) -> None:
        self._link = link
        self._activity = activity
        self._number = context.pipeline_parallel_rank
        self._is_first, self._is_last = context.is_first_stage, context.is_last_stage
        self._handed_on = 0

    def run(self, call_id: int, execute_model: Callable[[Any, Any], Any], scheduler_output: Any) -> Any:
        intermediate = None
        if not self._is_first:
            with self._activity.transfer("receive_intermediate, from the previous pipeline stage"):
                tensors = self._link.receive_intermediate(call_id)
            if tensors is None:
                raise _EarlierStageFailed
            intermediate = IntermediateTensors[Any](tensors)
        output = execute_model(scheduler_output, intermediate)
        if self._is_last:
            return output
        if not isinstance(output, IntermediateTensors):
            raise TypeError(
                f"execute_model of pipeline stage {self._number} returned {type(output).__qualname__}; "
                "every stage but the last returns IntermediateTensors"
            )
        with self._activity.transfer("send_intermediate, to the next pipeline stage"):
            self._link.send_intermediate(call_id, output.tensors, output.replicated)
        self._handed_on = call_id
        return output.output

    def release_next(self, call_id: int) -> None:
        """Tell the next stage that nothing will come for this step, unless something came."""
        if self._handed_on != call_id and not self._is_last:
            self._link.send_intermediate(call_id, None)


class _ReplyQueue:
    """Keeps replies in call order although some wait: a thread of its own, started by the first deferred output."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._deferred = self._sent = 0  # each is counted up by one thread at a time

    @property
    def busy(self) -> bool:
        """Whether something is still to be sent."""
        return self._deferred != self._sent

    def defer(self, send: Callable[[], None]) -> None:
        """Have `send`, which may block, run on the completion thread after what was put there before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._drain, name="asyncexec-completion", daemon=True)
            self._thread.start()
        self._deferred += 1
        self._queue.put(send)

    def finish(self) -> None:
        """Wait until everything has been sent."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _drain(self) -> None:
        while (send := self._queue.get()) is not None:
            try:
                send()
            finally:
                self._sent += 1
