"""How calls and results travel: the worker's type hints decide once, at start.

For each method of the worker class, arguments and result get one of two formats:

- *typed*: every hint is made of msgspec structs, dataclasses and plain data.  Msgpack by encoders and decoders
  that were compiled for these types.  The hint is the contract: of an instance of a subclass, the fields that the
  hinted struct has are sent.
- *pickled*: anything else.  Pickle protocol 5, functions and classes of `__main__` by value (cloudpickle).

In both, the memory of tensors and NumPy arrays travels beside the message, and so do arguments and results that are
byte strings; bytes nested in a struct are part of the message.  A tensor arrives on the CPU, without its gradient.

Driver and ranks build the same `Codec` from the same class and compare `fingerprint` when a rank starts.
"""

import hashlib
import inspect
import threading
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from asyncexec.errors import ConfigError
from asyncexec.outputs import DeferredOutput, IntermediateTensors
from asyncexec.pickling import around_bytes, dumps, loads
from asyncexec.tensors import array_from, array_parts, is_array_type, is_tensor_type, tensor_from, tensor_parts
from asyncexec.wire import VERSION, Buffer, Buffers, Frame, FrameKind

_CALL = FrameKind.CALL


class Codec:
    """The wire formats of one worker class.

    Attributes:
        formats: for each public method, how its arguments and its result travel ("typed" or "pickled").
        fingerprint: equal on two sides that agree on every format.
    """

    def __init__(self, worker_class: type) -> None:
        self._name = worker_class.__qualname__
        self._open_ended = hasattr(worker_class, "__getattr__")
        methods = [name for name in sorted(dir(worker_class)) if _is_public_method(worker_class, name)]
        plans = [_MethodPlan.of(worker_class, name) for name in methods]
        self._plans: dict[int, _MethodPlan] = dict(enumerate(plans, start=1))
        self._numbers = {plan.name: number for number, plan in self._plans.items()}
        self.formats = {plan.name: (plan.arguments.kind, plan.result.kind) for plan in plans}
        text = "\n".join([f"wire {VERSION}", *(plan.description for plan in plans)])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def method_name(self, method: int) -> str | None:
        """The name of the method with this number; None for calls that carry their target themselves."""
        plan = self._plans.get(method)
        return None if plan is None else plan.name

    def method_number(self, name: str) -> int:
        """The number of the method of this name; -1 where the worker class has none."""
        return self._numbers.get(name, -1)

    def encode_call(self, target: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Frame:
        """A CALL of a method by name, or of a callable.

        Raises:
            ConfigError: the worker class has no such method.
            TypeError: the arguments do not fit the method, or cannot be encoded.  Pickling may raise more.
        """
        number = self._numbers.get(target, 0) if isinstance(target, str) else 0
        if number:
            body, buffers = self._plans[number].arguments.encode(args, kwargs)
        elif isinstance(target, str) and not self._open_ended:
            raise ConfigError(f"{self._name} has no method {target!r}; it has: {', '.join(self._numbers)}")
        else:
            body, buffers = _PICKLED.encode((target, *args), kwargs)
        return Frame(_CALL, method=number, body=body, buffers=buffers)

    def decode_call(self, frame: Frame) -> tuple[str | Callable[..., Any], Sequence[Any], Mapping[str, Any]]:
        """What `encode_call` encoded: a method's name, or a callable that takes the worker first; its arguments.

        Raises what decoding raises when the message does not fit.
        """
        plan = self._plans.get(frame.method)
        if plan is not None:
            return plan.name, *plan.arguments.decode(frame.body, frame.buffers)
        if frame.method != 0:
            raise ConfigError(f"method {frame.method} is unknown; {self._name} has {len(self._plans)} methods")
        (target, *args), kwargs = _PICKLED.decode(frame.body, frame.buffers)
        return target, args, kwargs

    def encode_result(self, reply: Frame, value: Any) -> None:
        """Put what the reply's method returned into the reply; TypeError where it cannot be encoded."""
        plan = self._plans.get(reply.method, _CALLABLE)
        reply.body, reply.buffers = plan.result.encode((value,), {})

    def decode_result(self, reply: Frame) -> Any:
        """The value that `encode_result` encoded."""
        plan = self._plans.get(reply.method, _CALLABLE)
        return plan.result.decode(reply.body, reply.buffers)[0][0]


def _is_public_method(worker_class: type, name: str) -> bool:
    value = inspect.getattr_static(worker_class, name, None)  # without running descriptors, which may raise
    return not name.startswith("_") and (callable(value) or isinstance(value, staticmethod | classmethod))


class _MethodPlan(NamedTuple):
    name: str
    arguments: "_Format"
    result: "_Format"
    description: str

    @classmethod
    def of(cls, worker_class: type, name: str) -> "_MethodPlan":
        static = inspect.getattr_static(worker_class, name)
        function = getattr(static, "__func__", static)
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return cls(name, _PICKLED, _PICKLED, f"{name}: unknown signature")
        if not isinstance(static, staticmethod):
            parameters = parameters[1:]
        if name == "execute_model":
            _require_step_parameters(worker_class, parameters)
            parameters = parameters[:1]  # the rank itself adds the intermediate tensors
        try:
            hints = typing.get_type_hints(function, include_extras=True)
            if any(isinstance(hint, str) for hint in function.__annotations__.values()):
                # a copy that travels by value could not resolve these names any more
                function.__annotations__ = hints
            arguments = _arguments_format(name, parameters, hints)
            hint = _result_hint(hints.get("return", Any))
            result = _result_format(hint)
        except (NameError, TypeError, ValueError, AttributeError):
            # hints for type checkers alone, or that are no types; they are so on both sides, and both pickle
            return cls(name, _PICKLED, _PICKLED, f"{name}: pickled")
        described = (
            ", ".join(f"{p.name}: {hints[p.name]!r}" for p in parameters) if arguments.kind == "typed" else "pickled"
        )
        return cls(name, arguments, result, f"{name}({described}) -> {hint if result.kind == 'typed' else 'pickled'}")


def _require_step_parameters(worker_class: type, parameters: list[inspect.Parameter]) -> None:
    try:
        inspect.Signature(parameters).bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"{worker_class.__qualname__}.execute_model cannot be called with a scheduler output and the intermediate "
            f"tensors: {error}"
        ) from error


def _arguments_format(name: str, parameters: Sequence[inspect.Parameter], hints: Mapping[str, Any]) -> "_Format":
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) or p.name not in hints for p in parameters):
        return _PICKLED
    fields: list[Any] = []
    for parameter in parameters:
        hint = hints[parameter.name]
        if parameter.default is None:
            hint = hint | None
        fields.append(
            (parameter.name, hint)
            if parameter.default is parameter.empty
            else (parameter.name, hint, parameter.default)
        )
    keyword_only = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return _typed(f"{name}_arguments", fields, keyword_only)


def _result_format(hint: Any) -> "_Format":
    return _PICKLED if hint is Any else _typed("result", [("value", hint)], frozenset())


def _result_hint(hint: Any) -> Any:
    """What crosses the wire of a return hint: without intermediate tensors, the value of a deferred output, or None."""
    crossing: Any = None
    for hinted in _arms(hint):
        arm, origin = hinted, typing.get_origin(hinted) or hinted
        if origin is IntermediateTensors:
            continue
        if inspect.isclass(origin) and issubclass(origin, DeferredOutput):
            arm = (*typing.get_args(hinted), Any)[0]
        if arm is Any or isinstance(arm, typing.TypeVar):
            return Any
        crossing = crossing | arm if crossing is not None else (arm if arm is not None else types.NoneType)
    return crossing | None if crossing is not None else types.NoneType


class _Format:
    """How one tuple of values travels."""

    kind: str

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Buffer, Sequence[Buffer]]:
        raise NotImplementedError

    def decode(self, body: Buffer, buffers: Sequence[Buffer]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        raise NotImplementedError


class _Pickled(_Format):
    kind = "pickled"

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Buffer, Sequence[Buffer]]:
        return dumps(([*map(around_bytes, args)], {key: around_bytes(kwargs[key]) for key in kwargs} if kwargs else {}))

    def decode(self, body: Buffer, buffers: Sequence[Buffer]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        args, kwargs = loads(body, buffers)
        return args, kwargs


class _Typed(_Format):
    """Msgpack of one struct, whose fields are the values."""

    kind = "typed"

    def __init__(self, struct: type[msgspec.Struct], blobs: Mapping[int, type], keyword_only: frozenset[str]) -> None:
        self._struct = struct
        self._blobs = blobs
        self._keyword_only = keyword_only
        self._fields = struct.__struct_fields__
        self._memory = threading.local()
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._to_memory)
        self._decoder = msgspec.msgpack.Decoder(struct, dec_hook=self._from_memory)

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Buffer, Sequence[Buffer]]:
        values = self._struct(*args, **kwargs)
        for index in self._blobs:
            name = self._fields[index]
            value = getattr(values, name)
            if value is not None:
                setattr(values, name, _Blob(_contiguous(value)))
        memory = self._memory
        memory.buffers = None
        try:
            return self._encoder.encode(values), memory.buffers or ()
        finally:
            memory.buffers = None  # which would keep the memory until the next call

    def decode(self, body: Buffer, buffers: Sequence[Buffer]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        self._memory.buffers = buffers
        try:
            values: Sequence[Any] = msgspec.structs.astuple(self._decoder.decode(body))
        finally:
            self._memory.buffers = None
        if self._blobs:
            values = [self._blobs[i](v.value) if isinstance(v, _Blob) else v for i, v in enumerate(values)]
        if not self._keyword_only:
            return values, {}
        pairs = list(zip(self._fields, values, strict=True))
        return [v for name, v in pairs if name not in self._keyword_only], {
            name: v for name, v in pairs if name in self._keyword_only
        }

    def _to_memory(self, value: Any) -> Any:
        """Encoder hook: describe a value whose memory goes beside the message."""
        buffers = self._memory.buffers = self._memory.buffers or Buffers()
        if isinstance(value, _Blob):
            buffers.append(value.value)
            return len(buffers) - 1
        if is_tensor_type(type(value)):
            dtype, shape, memory = tensor_parts(value)
            buffers.tensors.add(len(buffers))
        elif is_array_type(type(value)):
            dtype, shape, memory = array_parts(value)
        else:
            raise TypeError(f"{type(value).__qualname__} is not what the type hint says, and cannot be encoded")
        buffers.append(memory)
        return [dtype, shape, len(buffers) - 1]

    def _from_memory(self, kind: type, value: Any) -> Any:
        """Decoder hook: the reverse."""
        buffers = self._memory.buffers
        if kind is _Blob:
            return _Blob(buffers[value])
        dtype, shape, index = value
        make = tensor_from if is_tensor_type(kind) else array_from
        return make(dtype, shape, buffers[index])


def _contiguous(value: Any) -> Buffer:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{type(value).__qualname__} is not what the type hint says: bytes, bytearray or memoryview")
    return bytes(value) if isinstance(value, memoryview) and not value.c_contiguous else value


class _Blob:
    """A byte string on its way beside the message."""

    def __init__(self, value: Buffer) -> None:
        self.value = value


def _typed(name: str, fields: list[Any], keyword_only: frozenset[str]) -> _Format:
    """A typed format for a struct of `fields`, or the pickled one where a hint is not made of plain data."""
    blobs: dict[int, type] = {}
    for index, (field, hint, *default) in enumerate(fields):
        arms = [arm for arm in _arms(hint) if arm is not types.NoneType]
        if len(arms) == 1 and arms[0] in (bytes, bytearray, memoryview):
            blobs[index] = arms[0]
            fields[index] = (field, _Blob | None, *default)
        elif not _is_plain(hint):
            return _PICKLED
    try:
        return _Typed(msgspec.defstruct(name, fields, array_like=True), blobs, keyword_only)
    except (TypeError, NameError):
        # msgspec refuses what it cannot tell apart on the wire, such as a union of two untagged structs
        return _PICKLED


def _arms(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_plain(hint: Any) -> bool:
    """Whether a type is made of msgspec structs, plain data, tensors and arrays alone, all the way down."""
    try:
        return _is_plain_info(msgspec.inspect.type_info(hint), set())
    except (TypeError, NameError):
        return False


def _is_plain_info(info: Any, seen: set[type]) -> bool:
    if isinstance(info, msgspec.inspect.AnyType | msgspec.inspect.RawType | msgspec.inspect.ExtType):
        return False
    if isinstance(info, msgspec.inspect.CustomType):
        return is_tensor_type(info.cls) or is_array_type(info.cls)
    cls = getattr(info, "cls", None)
    if cls is not None:
        if cls in seen:
            return True
        seen.add(cls)
    parts = [getattr(info, name, None) for name in ("type", "item_type", "key_type", "value_type")]
    parts += getattr(info, "types", None) or getattr(info, "item_types", None) or ()
    parts += [field.type for field in getattr(info, "fields", ())]
    return all(_is_plain_info(part, seen) for part in parts if isinstance(part, msgspec.inspect.Type))


_PICKLED = _Pickled()

_CALLABLE = _MethodPlan("a callable", _PICKLED, _PICKLED, "")
"""Of calls that carry their target themselves."""
