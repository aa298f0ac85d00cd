"""The executor's configuration: one frozen struct, from a dict, TOML, the environment or keyword arguments."""

import difflib
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from asyncexec.errors import ConfigError

ENVIRONMENT_PREFIX = "ASYNCEXEC_"

_OWN_KEYS = 3
"""Steps into tables whose names are ours: deepest are those of a transport's options."""

TRACE_VARIABLE = "ASYNCEXEC_TRACE"
"""Names the file that an executor's trace is written to, from start to end: no key of the configuration."""

StructT = TypeVar("StructT", bound=msgspec.Struct)


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of every wait, in seconds.

    Attributes:
        start: ranks spawned, joined and their workers constructed.
        step: `execute_model` and `sample_tokens`, from submission; None waits for ever.
        rpc: `collective_rpc`, from submission; None waits for ever.
        methods: limits for single methods by name; they win over `step` and `rpc`.
        drain: `aclose` waits this long for the calls in flight.
        stop: then this long for the ranks to leave by themselves,
        terminate: then this long after SIGTERM, before SIGKILL ends what is left.
        report: how long a rank may take to say what it is doing.
        health: how long a rank may be in a call without making progress and count as healthy.
    """

    start: float = 600.0
    step: float | None = 300.0
    rpc: float | None = 600.0
    methods: dict[str, float | None] = {}
    drain: float = 10.0
    stop: float = 5.0
    terminate: float = 2.0
    report: float = 0.3
    health: float = 60.0

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in self.__struct_fields__ if name != "methods"}
        limits |= {f"methods.{name}": limit for name, limit in self.methods.items()}
        for name, limit in limits.items():
            if limit is not None and not 0 < limit < math.inf:
                unlimited = ", or None for no limit" if name in ("step", "rpc") or "." in name else ""
                raise ConfigError(f"timeouts.{name} is {limit}; valid: seconds above 0{unlimited}")

    def for_method(self, method: str, *, step: bool) -> float | None:
        """The limit of one call of `method`, in seconds; None is no limit."""
        return self.methods.get(method, self.step if step else self.rpc)


class ExecutorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """How an executor runs its worker.

    Attributes:
        transport: name of an installed transport, such as "local" or "nccl".
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: stages that the layers are cut into.
        async_scheduling: the engine submits a step before it has seen the step before it.
        max_concurrent_batches: steps that run at once, from 1.  Unless given (0): the pipeline size, or 2 for one stage
            with async scheduling (as vLLM's executors define it).
        max_queued_steps: further steps that may wait in order; one more raises `ExecutorBusy`.
        max_frame_bytes: the largest message to or from a rank, in bytes, tensors and arrays included; from 1024.
        aggregator: "first" (the output rank's value), "all" (a list of every rank's), "kv" and "ec" (what connectors
            report, see `asyncexec.connectors`), "module:Class", or several joined by "+".  A table of these by method
            serves methods that differ, those of `collective_rpc` among them; others are "first" for steps, "all" for
            the rest.
        timeouts: see `Timeouts`.
        on_timeout: after a call's deadline, "continue" drops the late reply and goes on; "fail" fails the executor.
        options: one table of options per transport, by the transport's name.
    """

    transport: str = "local"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    async_scheduling: bool = False
    max_concurrent_batches: int = 0
    max_queued_steps: int = 64
    max_frame_bytes: int = 1 << 30
    aggregator: str | dict[str, str] = "first"
    timeouts: Timeouts = Timeouts()
    on_timeout: Literal["continue", "fail"] = "continue"
    options: dict[str, dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; valid: whole numbers from 1")
        if self.max_concurrent_batches < 0:
            raise ConfigError(f"max_concurrent_batches is {self.max_concurrent_batches}; valid: whole numbers from 1")
        # kept beside the fields: a value that was given may equal the derived one
        vars(self)["_derives_batches"] = self.max_concurrent_batches == 0
        if self.max_concurrent_batches == 0:
            msgspec.structs.force_setattr(self, "max_concurrent_batches", self._derived_batches())
        if self.max_queued_steps < 0:
            raise ConfigError(f"max_queued_steps is {self.max_queued_steps}; valid: whole numbers from 0")
        if self.max_frame_bytes < 1024:
            raise ConfigError(f"max_frame_bytes is {self.max_frame_bytes}; valid: whole numbers from 1024")

    def _derived_batches(self) -> int:
        return 2 if self.async_scheduling and self.pipeline_parallel_size == 1 else self.pipeline_parallel_size

    def reconfigured(self, request: "ReconfigureDistributedRequest") -> "ExecutorConfig":
        """This configuration with the request's sizes; steps that run at once are derived anew unless they were given.

        Raises:
            ConfigError: a size that is impossible.
        """
        changes: dict[str, Any] = {
            name: size
            for name in ("tensor_parallel_size", "pipeline_parallel_size")
            if (size := getattr(request, name)) is not None
        }
        if vars(self)["_derives_batches"]:
            changes["max_concurrent_batches"] = 0
        return msgspec.structs.replace(self, **changes)

    @property
    def world_size(self) -> int:
        """tensor_parallel_size * pipeline_parallel_size."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def output_rank(self) -> int:
        """The rank whose output is a step's output: the first of the last pipeline stage."""
        return self.world_size - self.tensor_parallel_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExecutorConfig":
        """Build from plain values, nested as in the struct.

        Raises:
            ConfigError: names the key that is unknown or wrong, and what would be valid.
        """
        return convert(values, cls)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> "ExecutorConfig":
        """Read the `[asyncexec]` table of a TOML file, or the whole file where it has none.

        Raises:
            ConfigError: the file cannot be read or is no TOML, or as for `from_dict`; names the file.
        """
        try:
            document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from error
        return convert(document.get("asyncexec", document), cls, where=f"{os.fspath(path)}: ")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ExecutorConfig":
        """Read `ASYNCEXEC_<KEY>` variables; two underscores step into a table (`ASYNCEXEC_TIMEOUTS__STEP=30`).

        Names in capitals throughout are read in small letters, but for those in the tables of a transport's options
        (`ASYNCEXEC_OPTIONS__NCCL__ENVIRONMENT__NCCL_DEBUG=INFO`).

        Raises:
            ConfigError: as for `from_dict`, also for a variable of that prefix that is no key.
        """
        values: dict[str, Any] = {}
        for variable, text in environment.items():
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable == TRACE_VARIABLE:
                continue
            *tables, key = _keys(variable.removeprefix(ENVIRONMENT_PREFIX))
            table = values
            for name in tables:
                table = table.setdefault(name, {})
                if not isinstance(table, dict):
                    raise ConfigError(f"{variable} steps into {name!r}, which another variable sets to a value")
            table[key] = text
        return convert(values, cls, where=f"environment {ENVIRONMENT_PREFIX}*: ", strict=False)

    @classmethod
    def of(cls, config: "ExecutorConfig | Mapping[str, Any]") -> "ExecutorConfig":
        """`config` itself where it is one, else built from the mapping."""
        return config if isinstance(config, ExecutorConfig) else cls.from_dict(config)


class ReconfigureDistributedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New parallel sizes for a running executor; see `Executor.reinitialize_distributed`.

    Attributes:
        tensor_parallel_size: None leaves it as it is.
        pipeline_parallel_size: None leaves it as it is.
        leave: this executor takes no further part: it is closed.
    """

    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    leave: bool = False


def _keys(name: str) -> list[str]:
    parts = name.split("__")
    return [part.lower() if depth < _OWN_KEYS and part.isupper() else part for depth, part in enumerate(parts)]


def convert(values: Mapping[str, Any], struct: type[StructT], *, where: str = "", strict: bool = True) -> StructT:
    """Build `struct` from plain values; a ConfigError names the key that is wrong and what is valid.

    Args:
        values: plain values, nested as in the struct.
        struct: the type to build.
        where: prefix for error messages, such as a file's name.
        strict: False also reads numbers and booleans from text, as the environment needs it.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}a table of keys is needed, not {type(values).__name__}")
    _refuse_unknown_keys(values, struct, where, "")
    try:
        return msgspec.convert(dict(values), struct, strict=strict)
    except ConfigError:
        raise
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{where}{error.__cause__}") from None
        what, _, path = str(error).partition(" - at `$.")
        raise ConfigError(f"{where}{path.rstrip('`')}: {what}" if path else f"{where}{what}") from error


def _refuse_unknown_keys(values: Mapping[str, Any], struct: type[msgspec.Struct], where: str, table: str) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in values.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {table + close[0]!r}? " if close else ""
            raise ConfigError(f"{where}unknown key {table + str(key)!r}; {hint}valid: {', '.join(fields)}")
        nested = fields[key]
        if isinstance(value, Mapping) and isinstance(nested, type) and issubclass(nested, msgspec.Struct):
            _refuse_unknown_keys(value, nested, where, f"{table}{key}.")
