"""What travels how: decided by the type hints, equal on both ends, and nothing is lost."""

import copy
import gc
import pickle
import sys
import types
import weakref
from typing import Any

import cloudpickle
import msgspec
import numpy as np
import pytest
import torch
import workers

from asyncexec import (
    ConfigError,
    DeferredOutput,
    ExecutorFailed,
    IntermediateTensors,
    RankContext,
    StepTimeout,
    WorkerDied,
    WorkerError,
)
from asyncexec.codec import Codec
from asyncexec.pickling import around_bytes, dumps, loads
from asyncexec.wire import Frame, FrameKind


class Batch(msgspec.Struct):
    ids: list[int]
    hidden: torch.Tensor
    mask: np.ndarray | None = None


class Opaque:
    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


class Everything:
    def execute_model(
        self, scheduler_output: Batch, intermediate: IntermediateTensors[Batch] | None
    ) -> Batch | IntermediateTensors[Batch]:
        raise NotImplementedError

    def deferred(self, numbers: tuple[int, ...] = (1, 2)) -> DeferredOutput[Batch]:
        raise NotImplementedError

    def blob(self, data: bytes, view: bytearray | None = None) -> bytes:
        raise NotImplementedError

    def keywords(self, a: int, *, b: dict[str, float], c: str | None = None) -> set[str]:
        raise NotImplementedError

    def anything(self, value: Any) -> Any:
        raise NotImplementedError

    def opaque(self, value: Opaque) -> Opaque:
        raise NotImplementedError

    def variadic(self, *values: int, **named: int) -> None:
        raise NotImplementedError

    def unhinted(self, value):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def unresolvable(self, value: "Missing") -> int:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(Everything)


def travel(frame: Frame) -> Frame:
    """The frame as the other end receives it: in other, writable memory."""
    return Frame(frame.kind, method=frame.method, body=bytes(frame.body), buffers=list(map(bytearray, frame.buffers)))


def call(codec: Codec, method: str, *args: Any, **kwargs: Any) -> Any:
    target, received, keywords = codec.decode_call(travel(codec.encode_call(method, args, kwargs)))
    assert target == method
    return list(received), dict(keywords)


def result(codec: Codec, method: str, value: Any) -> Any:
    reply = Frame(FrameKind.REPLY, method=codec.method_number(method))
    codec.encode_result(reply, value)
    return codec.decode_result(travel(reply))


def test_the_hints_decide_the_format(codec: Codec) -> None:
    assert codec.formats == {
        "anything": ("pickled", "pickled"),
        "blob": ("typed", "typed"),
        "deferred": ("typed", "typed"),
        "execute_model": ("typed", "typed"),
        "keywords": ("typed", "typed"),
        "opaque": ("pickled", "pickled"),
        "unhinted": ("pickled", "pickled"),
        "unresolvable": ("pickled", "pickled"),
        "variadic": ("pickled", "typed"),
    }


def test_both_ends_agree_or_know_it() -> None:
    class Same(Everything):
        pass

    class Other(Everything):
        def variadic(self, *values: int, **named: int) -> int:  # type: ignore[override]
            raise NotImplementedError

    assert Codec(Same).fingerprint == Codec(Everything).fingerprint
    assert Codec(Other).fingerprint != Codec(Everything).fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4), (1000,)])
@pytest.mark.parametrize("method", ["execute_model", "anything"])
def test_tensors_keep_dtype_and_shape(codec: Codec, method: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    value = Batch([1], tensor) if method == "execute_model" else tensor
    (received,), _ = call(codec, method, value)
    tensor_received = received.hidden if method == "execute_model" else received
    assert tensor_received.dtype == dtype
    assert torch.equal(tensor_received, tensor)
    tensor_received.add_(tensor) if dtype != torch.bool else tensor_received.logical_not_()  # it is writable


def test_memory_travels_beside_the_message(codec: Codec) -> None:
    data = np.arange(100_000, dtype=np.float64)
    typed = codec.encode_call("execute_model", (Batch([1], torch.from_numpy(data), data),), {})
    pickled = codec.encode_call("anything", ({"a": data, "b": torch.from_numpy(data)},), {})
    blob = codec.encode_call("blob", (data.tobytes(),), {})
    for payload in (typed, pickled, blob):
        assert len(payload.body) < 1000
        assert sum(memoryview(b).nbytes for b in payload.buffers) in (data.nbytes, 2 * data.nbytes)
    address = data.__array_interface__["data"][0]
    sent = [np.frombuffer(b, np.uint8).__array_interface__["data"][0] for b in (*typed.buffers, *pickled.buffers)]
    assert sent == [address] * 4, "the memory was copied"


def test_values_come_back_equal(codec: Codec) -> None:
    assert call(codec, "deferred") == ([(1, 2)], {})
    assert call(codec, "deferred", (5,)) == ([(5,)], {})
    assert call(codec, "keywords", 1, b={"x": 0.5}) == ([1], {"b": {"x": 0.5}, "c": None})
    assert call(codec, "blob", b"x" * 5000, bytearray(b"y")) == ([b"x" * 5000, bytearray(b"y")], {})
    assert call(codec, "blob", b"x") == ([b"x", None], {})
    assert call(codec, "variadic", 1, 2, a=3) == ([1, 2], {"a": 3})
    assert call(codec, "opaque", Opaque(4)) == ([Opaque(4)], {})
    assert call(codec, "anything", ({1, 2}, (3,), b"z" * 4000)) == ([({1, 2}, (3,), b"z" * 4000)], {})
    assert result(codec, "keywords", {"a", "b"}) == {"a", "b"}
    assert result(codec, "blob", b"r" * 3000) == b"r" * 3000
    assert result(codec, "execute_model", None) is None
    assert result(codec, "variadic", None) is None


def test_a_callable_travels_by_value(codec: Codec) -> None:
    offset = 5
    target, args, _ = codec.decode_call(travel(codec.encode_call(lambda worker, x: worker + x + offset, (1,), {})))
    assert callable(target)
    assert target(10, *args) == 16


def test_what_cannot_be_sent_is_said(codec: Codec) -> None:
    with pytest.raises(ConfigError, match=r"Everything has no method 'nothing'; it has: anything, blob"):
        codec.encode_call("nothing", (), {})
    with pytest.raises(TypeError, match="required argument"):
        codec.encode_call("execute_model", (), {})
    with pytest.raises(TypeError, match="positional"):
        codec.encode_call("execute_model", (1, 2), {})
    with pytest.raises(TypeError, match="Opaque"):
        codec.encode_call("execute_model", (Opaque(1),), {})
    with pytest.raises(TypeError, match="dtype object"):
        codec.encode_call("execute_model", (Batch([1], torch.ones(1), np.array([None])),), {})


def test_structs_of_main_travel_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """cloudpickle alone would lose their fields."""
    namespace: dict[str, Any] = {"__name__": "__main__", "msgspec": msgspec}
    source = """
class Inner(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    some_value: int
    more: list[int] = []
    def doubled(self): return self.some_value * 2
class Outer(msgspec.Struct, tag=True):
    inner: Inner
"""
    exec(source, namespace)
    outer = namespace["Outer"](namespace["Inner"](some_value=4))
    message, buffers = dumps((namespace["Outer"], outer))
    assert loads(message, buffers) == (namespace["Outer"], outer), "where it came from, it is the class that it was"
    monkeypatch.setattr("asyncexec.pickling._known", {})  # as in another process
    kind, received = loads(message, buffers)
    assert kind is not namespace["Outer"]
    assert loads(message, buffers)[0] is kind, "the same class with every message"
    assert isinstance(received, kind)
    assert received.inner.doubled() == 8
    assert (
        msgspec.json.encode(received)
        == msgspec.json.encode(outer)
        == b'{"type":"Outer","inner":{"someValue":4,"more":[]}}'
    )
    assert msgspec.json.decode(msgspec.json.encode(outer), type=kind) == received


def test_what_has_a_name_nowhere_else_travels_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside what goes by its name, and with memory beside the message."""
    main = types.ModuleType("__main__")
    exec("class Named:\n    answer = 42\ndef function(): return Named.answer", main.__dict__)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "__main__", main)
        message, buffers = dumps([Opaque(1), main.function, main.Named(), torch.arange(1000), np.arange(1000)])
        assert len(buffers) == 2
        assert buffers.tensors == {0}
    opaque, function, named, tensor, array = loads(message, buffers)
    assert (opaque, function(), named.answer) == (Opaque(1), 42, 42)
    assert torch.equal(tensor, torch.from_numpy(array))


def test_modules_may_be_asked_to_travel_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("asked_to_travel")
    exec("def function(): return 42", module.__dict__)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, module.__name__, module)
        by_name = dumps(module.function)
        cloudpickle.register_pickle_by_value(module)
        try:
            by_value = dumps(module.function)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    assert loads(*by_value)() == 42
    with pytest.raises(ModuleNotFoundError):
        loads(*by_name)


def test_pickling_leaves_nothing_to_the_garbage_collector() -> None:
    """Cycles would have it run in the middle of the steps."""
    values = [Opaque(1)], {"tensor": torch.ones(1000), "array": np.ones(1000), "bytes": around_bytes(bytes(5000))}
    dumps(values)
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            dumps(values)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_worker_that_answers_any_name() -> None:
    class Wrapper:
        def __init__(self, context: RankContext) -> None:
            self.worker = workers.EchoWorker(context)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.worker, name)

    received = Codec(Wrapper).decode_call(travel(Codec(Wrapper).encode_call("greet", ("you",), {"loud": True})))
    assert received == ("greet", ["you"], {"loud": True})


def test_hints_that_are_no_types_are_pickled() -> None:
    class Loose:
        def execute_model(self, scheduler_output: any, tensors=None, extra: int = 1) -> np.array:  # type: ignore
            raise NotImplementedError

        def take(self, intermediate: int, x: torch.tensor = None) -> any:  # type: ignore
            raise NotImplementedError

        @property
        def raising(self) -> int:
            raise RuntimeError("not to be run")

    codec = Codec(Loose)
    assert codec.formats == {"execute_model": ("pickled", "pickled"), "take": ("pickled", "pickled")}
    assert codec.fingerprint == Codec(Loose).fingerprint
    assert call(codec, "take", 5) == ([5], {})


def test_a_worker_whose_step_takes_too_little_is_refused() -> None:
    class Short:
        def execute_model(self, scheduler_output: int) -> int:
            raise NotImplementedError

    with pytest.raises(ConfigError, match=r"Short\.execute_model cannot be called"):
        Codec(Short)


def test_byte_strings_are_checked_where_they_are_sent(codec: Codec) -> None:
    with pytest.raises(TypeError, match="str is not what the type hint says"):
        codec.encode_call("blob", ("text",), {})
    assert call(codec, "blob", memoryview(b"abcdef")[::2]) == ([b"ace", None], {})


@pytest.mark.parametrize(
    "error",
    [
        WorkerError("ValueError", "no", "Traceback", method="m", call_id=3, rank=1),
        StepTimeout("late", timeout=1.0, waiting_for=[0], method="m"),
        ExecutorFailed(WorkerDied("died", pid=4, signal="SIGKILL", rank=0)),
    ],
)
def test_errors_survive_pickling_and_copying(error: Exception) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert {k: str(v) for k, v in vars(again).items()} == {k: str(v) for k, v in vars(error).items()}


class Arrays:
    def both_ways(self, array: np.ndarray) -> np.ndarray:
        return array


def test_nothing_keeps_what_was_encoded_or_decoded() -> None:
    codec, array = Codec(Arrays), np.zeros(1000)
    given, payload = weakref.ref(array), codec.encode_call("both_ways", (array,), {})
    memory = np.frombuffer(bytes(payload.buffers[0]))
    del payload, array
    assert given() is None
    kept = weakref.ref(memory)
    number = codec.method_number("both_ways")
    sent = Frame(FrameKind.CALL, method=number, body=payload_body(codec), buffers=(memory.data,))
    _, args, _ = codec.decode_call(sent)
    assert args[0].sum() == 0
    del sent, args, memory
    assert kept() is None


def test_nothing_keeps_what_was_pickled(codec: Codec) -> None:
    array = np.zeros(1000)
    given, frame = weakref.ref(array), codec.encode_call("anything", ({"a": array},), {})
    assert len(frame.buffers) == 1
    del frame, array
    assert given() is None, "it waits for the garbage collector"


def payload_body(codec: Codec) -> Any:
    return codec.encode_call("both_ways", (np.zeros(1000),), {}).body
