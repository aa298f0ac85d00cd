"""The table `additional_config["asyncexec"]` of vLLM's configuration, and what the executor makes of both."""

import os
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from vllm import envs

from asyncexec.config import ExecutorConfig, Timeouts, convert
from asyncexec.errors import ConfigError

_DAY = 86400.0

_STEPS = 1024
"""Steps under way at once: the engine core decides how many there are, and never has more than a few."""

_CLOSING = {"drain": 0.5, "terminate": 0.5}
_BESIDE_STOP = 2.0
"""Seconds of vLLM's limit that are left for the rest of closing, and for the engine core's own."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `additional_config["asyncexec"]`.  Parallel sizes and scheduling are vLLM's own options.

    Attributes:
        transport: "nccl" (processes of this host) or "ray" (actors on this host).
        timeouts: see `asyncexec.config.Timeouts`.  Other defaults here: `start` is a day, for vLLM has limits of its
            own, `step` is VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS, `rpc` is None, and closing takes less than
            VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS (5), after which vLLM kills an engine core that is shutting down.
        on_timeout: as in `asyncexec.ExecutorConfig`.
        max_frame_bytes: as in `asyncexec.ExecutorConfig`.
        options: one table of options per transport.
    """

    transport: str = "nccl"
    timeouts: Timeouts = Timeouts()
    on_timeout: Literal["continue", "fail"] = "continue"
    max_frame_bytes: int = 1 << 34
    options: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, vllm_config: Any) -> "Settings":
        """Read the table.

        Raises:
            ConfigError: names the key that is wrong, and what is valid.
        """
        where = "additional_config['asyncexec']: "
        additional = vllm_config.additional_config
        table = additional.get("asyncexec", {}) if isinstance(additional, Mapping) else {}
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}a table of keys is needed, not {type(table).__name__}")
        closing = float(getattr(envs, "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", 5))  # vLLM 0.22 has it fixed
        limits = _CLOSING | {
            "start": _DAY,
            "step": float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS),
            "rpc": None,
            "stop": max(0.5, closing - _BESIDE_STOP),
        }
        given = table.get("timeouts", {})
        return convert(
            {**table, "timeouts": limits | dict(given)} if isinstance(given, Mapping) else table, cls, where=where
        )

    def executor_config(self, world_size: int, environments: list[dict[str, str]]) -> ExecutorConfig:
        """The configuration of our executor for vLLM's ranks.

        They are one stage here, whatever vLLM's pipeline is: its workers hand on their tensors by groups of their own.
        """
        own = dict(self.options.get(self.transport, {}))
        if self.transport == "nccl":
            own = {"backend": "none", "rank_environments": environments} | own
        elif self.transport == "ray":
            own = _ray_options(environments) | own
        return ExecutorConfig(
            transport=self.transport,
            tensor_parallel_size=world_size,
            max_concurrent_batches=_STEPS,
            max_frame_bytes=self.max_frame_bytes,
            timeouts=self.timeouts,
            on_timeout=self.on_timeout,
            options=self.options | {self.transport: own},
        )


_NOT_FOR_RANKS = {"CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "RAY_JOB_ID", "RAY_RAYLET_PID"}
"""Variables that Ray sets for each of its processes."""


def _ray_options(environments: list[dict[str, str]]) -> dict[str, Any]:
    """For ranks that are actors: on this host, without the graph, which carries nothing but `execute_model`.

    Raises:
        ConfigError: each rank is to have variables of its own.
    """
    first = environments[0]
    if any(environment != first for environment in environments):
        names = ", ".join(sorted(first))
        raise ConfigError(
            f"vLLM sets {names} for each rank, and Ray the same variables for all; set VLLM_CPU_OMP_THREADS_BIND=nobind"
        )
    variables = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_RANKS} | first
    return {
        "backend": "none",
        "driver": "calls",
        "strategy": "STRICT_PACK",
        "runtime_env": {"env_vars": variables},
    }
