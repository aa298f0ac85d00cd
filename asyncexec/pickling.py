"""Pickle protocol 5 with memory beside the message, for what type hints do not describe.

Functions and classes that another process cannot import (those of `__main__`, lambdas, local ones) go by value: by
cloudpickle, and msgspec structs by a reducer of ours, for cloudpickle loses their fields.

Loading runs code of the sender's choice: only frames of a peer that has proven itself get here, a process that this
one spawned or was spawned by.
"""

import copyreg
import inspect
import io
import pickle
import sys
import types
import typing
import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle
import msgspec

from asyncexec.errors import PayloadError
from asyncexec.tensors import tensor_from, tensor_parts
from asyncexec.wire import Buffer, Buffers

_IN_BAND_BELOW = 1024
"""Buffers smaller than this stay in the pickle: a buffer of its own costs more than the copy."""

_MAIN = b"__main__"
"""Names the module whose functions and classes another process has not, in a pickle that refers to them."""


def dumps(value: Any) -> tuple[Buffer, Buffers]:
    """Pickle `value`: the message, and the memory to send beside it."""
    if not cloudpickle.list_registry_pickle_by_value():
        try:
            message, buffers = _dump(pickle.Pickler, value)
        except Exception:  # noqa: BLE001 - what has no name can go by value alone, which raises what there is to say
            return _dump(_ByValue, value)
        if _MAIN not in message:
            return message, buffers
    return _dump(_ByValue, value)


def _dump(kind: type[pickle.Pickler], value: Any) -> tuple[bytes, Buffers]:
    message, buffers = io.BytesIO(), Buffers()
    of_tensor: pickle.PickleBuffer | None = None  # of the last one

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _IN_BAND_BELOW:
            return True
        if buffer is of_tensor:
            buffers.tensors.add(len(buffers))
        buffers.append(raw)
        return False

    def reduce_tensor(tensor: Any) -> Any:
        nonlocal of_tensor
        if tensor.layout is not sys.modules["torch"].strided or tensor.is_quantized:
            return tensor.__reduce_ex__(5)
        dtype, shape, memory = tensor_parts(tensor)
        of_tensor = pickle.PickleBuffer(memory)
        return _tensor, (dtype, shape, of_tensor)

    pickler = kind(message, protocol=5, buffer_callback=keep_in_band)
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor is not None:
        pickler.dispatch_table = {**copyreg.dispatch_table, tensor: reduce_tensor}
    pickler.dump(value)
    return message.getvalue(), buffers


def loads(message: Buffer, buffers: Sequence[Buffer] = ()) -> Any:
    """The value that `dumps` pickled; arrays and tensors lie over `buffers`, without a copy."""
    return pickle.loads(message, buffers=buffers)  # noqa: S301 - see the module's docstring


class Snapshot:
    """A value as it is now, which may change before it is sent: it arrives as the value that it was.

    Raises:
        PayloadError: it cannot be pickled.
    """

    def __init__(self, value: Any) -> None:
        try:
            message, buffers = dumps(value)
        except Exception as error:
            raise PayloadError(f"{type(value).__qualname__} cannot be sent: {type(error).__name__}: {error}") from error
        self._parts = message, [bytearray(buffer) for buffer in buffers]

    def __reduce__(self) -> Any:
        return loads, self._parts


def around_bytes(value: Any) -> Any:
    """`value`; for a long byte string a stand-in that unpickles as it, whose memory travels beside the message."""
    return _Bytes(value) if type(value) in (bytes, bytearray) and len(value) >= _IN_BAND_BELOW else value


class _Bytes:
    def __init__(self, value: Buffer) -> None:
        self._value = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self._value), (pickle.PickleBuffer(self._value),)


class _ByValue(cloudpickle.Pickler):  # type: ignore[misc]
    """Functions and classes that have no name elsewhere by value; calls Python code for every object."""

    # cloudpickle's own table of its class is what the compiled code sees, not one that is set on the pickler
    dispatch_table: Any

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is getattr(sys.modules.get("torch"), "Tensor", None):
            return self.dispatch_table[type(obj)](obj)
        if isinstance(obj, type) and issubclass(obj, msgspec.Struct) and not _importable(obj):
            return _struct, _struct_parts(obj)
        return super().reducer_override(obj)


def _tensor(dtype: str, shape: Sequence[int], memory: Any) -> Any:
    # memory that stayed in the pickle comes back as bytes, read-only, which tensors cannot be
    return tensor_from(dtype, shape, bytearray(memory) if isinstance(memory, bytes) else memory)


def _importable(kind: type) -> bool:
    """Whether another process finds this class by its module and name."""
    found: Any = sys.modules.get(kind.__module__) if kind.__module__ != "__main__" else None
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is kind


def _struct_parts(kind: type[msgspec.Struct]) -> tuple[Any, ...]:
    """What `_struct` needs to make the class again.  Structs that refer to themselves cannot be sent this way."""
    hints = typing.get_type_hints(kind, include_extras=True)
    members = {name: value for name, value in kind.__dict__.items() if _is_written_by_hand(name, value)}
    own = [field for field in msgspec.structs.fields(kind) if field.name in inspect.get_annotations(kind)]
    parameters = inspect.signature(kind).parameters
    options = {name: getattr(kind.__struct_config__, name) for name in _STRUCT_OPTIONS}
    options["rename"] = {field.name: field.encode_name for field in own}
    options["kw_only"] = all(parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY for field in own)
    fields = [(field.name, hints[field.name], field.default, field.default_factory) for field in own]
    identity = _identities.setdefault(kind, uuid.uuid4().hex)
    _known.setdefault(identity, kind)
    return identity, kind.__name__, kind.__module__, kind.__qualname__, kind.__bases__, fields, members, options


def _struct(
    identity: str,
    name: str,
    module: str,
    qualname: str,
    bases: tuple[type, ...],
    fields: Sequence[tuple[str, Any, Any, Any]],
    members: dict[str, Any],
    options: Mapping[str, Any],
) -> type[msgspec.Struct]:
    if identity in _known:
        return _known[identity]  # it came here before, or came from here
    make_field: Any = msgspec.field  # whose overloads do not allow for both defaults to be given
    specs = [(field, hint, make_field(default=default, default_factory=make)) for field, hint, default, make in fields]
    made = msgspec.defstruct(name, specs, bases=bases, module=module, namespace=members, **options)
    made.__qualname__ = qualname
    _identities[made] = identity
    return _known.setdefault(identity, made)


_identities: "weakref.WeakKeyDictionary[type[msgspec.Struct], str]" = weakref.WeakKeyDictionary()
_known: "weakref.WeakValueDictionary[str, type[msgspec.Struct]]" = weakref.WeakValueDictionary()
"""Classes that travelled by value: the same class must not become another one with each message."""


def _is_written_by_hand(name: str, value: Any) -> bool:
    """Whether a member of a struct class comes from its author, not from msgspec."""
    made = ("__module__", "__annotations__", "__slots__", "__qualname__", "__match_args__")
    return name not in made and not isinstance(value, types.MemberDescriptorType)


_STRUCT_OPTIONS = (
    "array_like",
    "cache_hash",
    "dict",
    "eq",
    "forbid_unknown_fields",
    "frozen",
    "gc",
    "omit_defaults",
    "order",
    "repr_omit_defaults",
    "tag",
    "tag_field",
    "weakref",
)
