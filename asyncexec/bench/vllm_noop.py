"""A worker of vLLM that does nothing, the payloads that it is given, and executors on it: what a step costs."""

import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from asyncexec.bench import vllm_tiny


class NoopWorker:
    """Answers at once what a model runner would: the named method is `worker_cls` of the configuration."""

    def __init__(self, vllm_config: Any, **place: Any) -> None:
        self.vllm_config = vllm_config
        self.place = place
        self.rank: int = place["rank"]
        self._one_call = False
        self._breaks = False
        self._requests = 0
        self._outputs: dict[int, Any] = {}
        platform: Any = importlib.import_module("vllm.platforms").current_platform
        self.device = f"cuda:{place['local_rank']}" if platform.is_cuda() else "cpu"
        self.model_runner = self

    def init_device(self) -> None:
        """Nothing to set up."""

    def join_groups(self) -> None:
        """Make vLLM's process groups, which its own executor on a Ray graph asks for the rank's place."""
        state: Any = importlib.import_module("vllm.distributed.parallel_state")
        config: Any = importlib.import_module("vllm.config")
        parallel = self.vllm_config.parallel_config
        method: str = self.place["distributed_init_method"]
        os.environ["VLLM_DIST_IDENT"] = method.rpartition(":")[2]  # as vLLM's worker for CPUs does
        with config.set_current_vllm_config(self.vllm_config):
            state.init_distributed_environment(
                parallel.world_size,
                self.rank,
                method,
                self.place["local_rank"],
                "gloo",
            )
            state.initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)

    def load_model(self, **options: Any) -> None:
        """Nothing to load."""

    def answer_in_one_call(self, one_call: bool) -> None:
        """Whether `execute_model` has the output already, as pooling models' has, instead of `sample_tokens`."""
        self._one_call = one_call

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """The first half of a step, or all of it."""
        self._requests = scheduler_output.total_num_scheduled_tokens
        if self._breaks:
            self._breaks = False
            raise ValueError("a broken step")
        return self._output() if self._one_call else None

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The second half."""
        return self._output()

    def _output(self) -> Any:
        """One token for each request of the step, made once."""
        if self._requests not in self._outputs:
            names = [request_name(number) for number in range(self._requests)]
            self._outputs[self._requests] = importlib.import_module("vllm.v1.outputs").ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[[1000 + self.rank + i] for i in range(self._requests)],
            )
        return self._outputs[self._requests]

    def break_next_step(self) -> None:
        """Have the next step raise."""
        self._breaks = True

    def seen(self) -> int:
        """Requests in the last step."""
        return self._requests

    def echo(self, value: Any) -> Any:
        """Return it."""
        return value

    def pid(self) -> int:
        """Of this rank's process."""
        return os.getpid()

    def nap(self, seconds: float) -> float:
        """Be busy."""
        time.sleep(seconds)
        return seconds

    def fail(self, on_rank: int = -1) -> None:
        """Raise, on one rank or on all."""
        if on_rank in (-1, self.rank):
            raise ZeroDivisionError("asked to fail")

    def check_health(self) -> None:
        """Well."""

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """None in particular."""
        return []

    def shutdown(self) -> None:
        """Nothing to free."""


def request_name(number: int) -> str:
    """As vLLM's frontend names them."""
    return f"{number:08x}-{number * 2654435761 % (1 << 32):08x}-cmpl"


def scheduler_output(requests: int) -> Any:
    """A decode step of so many running requests, every 16th with a new block."""
    output: Any = importlib.import_module("vllm.v1.core.sched.output")
    names = [request_name(number) for number in range(requests)]
    cached = output.CachedRequestData.make_empty()
    cached.req_ids = names
    cached.new_token_ids = []
    cached.new_block_ids = [([9000 + i],) if i % 16 == 0 else None for i in range(requests)]
    cached.num_computed_tokens = [470 + i for i in range(requests)]
    cached.num_output_tokens = [30 + i for i in range(requests)]
    made = output.SchedulerOutput.make_empty()
    made.scheduled_cached_reqs = cached
    made.num_scheduled_tokens = dict.fromkeys(names, 1)
    made.total_num_scheduled_tokens = requests
    return made


def step(executor: Any, scheduler_output: Any) -> Any:
    """A step as the engine core runs it without steps in flight; returns the output."""
    output = executor.execute_model(scheduler_output, non_block=True).result()
    return executor.sample_tokens(None) if output is None else output


def vllm_config(ranks: int, stages: int = 1, additional: dict[str, Any] | None = None, backend: str = "mp") -> Any:
    """A configuration as the engine core would hand it to its executor."""
    arguments: Any = importlib.import_module("vllm.engine.arg_utils")
    with tempfile.TemporaryDirectory() as folder:
        config = arguments.EngineArgs(
            **vllm_tiny.engine_arguments(
                vllm_tiny.make_model(Path(folder), heads=8),
                tensor_parallel_size=ranks,
                pipeline_parallel_size=stages,
                distributed_executor_backend=backend,
                additional_config=additional or {},
            )
        ).create_engine_config()
    return config


def make_executor(
    kind: str,
    ranks: int,
    stages: int = 1,
    additional: dict[str, Any] | None = None,
    worker: str = f"{__name__}.NoopWorker",
    worker_extension: str = "",
) -> Any:
    """`kind` is "mp", "ray", "ray-v2", "asyncexec", or the dotted name of an executor class; `worker` likewise."""
    names = {
        "mp": "vllm.v1.executor.multiproc_executor.MultiprocExecutor",
        "ray": "vllm.v1.executor.ray_executor.RayDistributedExecutor",
        "ray-v2": "vllm.v1.executor.ray_executor_v2.RayExecutorV2",
        "asyncexec": "asyncexec.integrations.vllm.AsyncExecExecutor",
    }
    module, _, name = names.get(kind, kind).rpartition(".")
    config = vllm_config(ranks, stages, additional, "ray" if kind.startswith("ray") else "mp")
    config.parallel_config.worker_cls = worker
    config.parallel_config.worker_extension_cls = worker_extension
    return getattr(importlib.import_module(module), name)(config)
