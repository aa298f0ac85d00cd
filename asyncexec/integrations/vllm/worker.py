"""The worker class that runs on each rank: vLLM's own worker, set up as vLLM's executors do."""

import fcntl
import importlib
import os
import socket
import threading
from typing import Any

from asyncexec.errors import ConfigError
from asyncexec.outputs import DeferredOutput
from asyncexec.worker import RankContext


class VllmWorker:
    """Any `worker_cls` of vLLM in vLLM's `WorkerWrapperBase`; calls of methods that are not here go to that.

    Args:
        context: the rank's place; it has no process groups, for vLLM makes its own.
        vllm_config: the engine's configuration.
        distributed_init_method: where vLLM's ranks meet.
        shared_worker_lock: a lock over all ranks of the host, for the multimodal cache in shared memory.

    Raises:
        ConfigError: this is not the engine core's host.
    """

    def __init__(
        self, context: RankContext, vllm_config: Any, distributed_init_method: str, shared_worker_lock: "HostLock"
    ) -> None:
        if not shared_worker_lock.is_here:
            raise ConfigError(
                f"rank {context.rank} is on {socket.gethostname()}, without the files of the engine core's host; "
                "AsyncExecExecutor needs all its ranks there"
            )
        # a rank that sees its own GPU alone, as Ray's do, has it as the first one
        local_rank = 0 if context.device == "cuda:0" else context.local_rank
        _prepare_process(context, local_rank, vllm_config)
        from vllm.envs import enable_envs_cache
        from vllm.platforms import current_platform
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        parallel = vllm_config.parallel_config
        self.wrapper: Any = WorkerWrapperBase(rpc_rank=local_rank, global_rank=context.rank)
        all_kwargs: list[dict[str, Any]] = [{} for _ in range(context.world_size)]
        all_kwargs[local_rank] = {
            "vllm_config": vllm_config,
            "local_rank": local_rank,
            "rank": context.rank,
            "distributed_init_method": distributed_init_method,
            "is_driver_worker": context.rank % parallel.tensor_parallel_size == 0,
            "shared_worker_lock": shared_worker_lock,
        }
        self.wrapper.init_worker(all_kwargs)
        name_process = importlib.import_module("vllm.v1.executor.multiproc_executor").WorkerProc
        name_process.setup_proc_title_and_log_prefix(enable_ep=parallel.enable_expert_parallel)
        self.wrapper.init_device()
        context.mark_progress()
        name_process.setup_proc_title_and_log_prefix(enable_ep=parallel.enable_expert_parallel)
        self.wrapper.load_model()
        context.mark_progress()
        current_platform.update_block_size_for_backend(vllm_config)
        enable_envs_cache()
        self._ahead: tuple[Any, Exception | None] | None = None
        self._output_type: type = importlib.import_module("vllm.v1.outputs").AsyncModelRunnerOutput

    def __getattr__(self, name: str) -> Any:
        if name == "wrapper":  # not there yet
            raise AttributeError(name)
        return getattr(self.wrapper, name)

    def execute_model(self, scheduler_output: Any, intermediate: Any = None) -> Any:
        """The first half of a step; None where sampling follows."""
        self._ahead = None
        return self._maybe_deferred(self.wrapper.execute_model(scheduler_output))

    def execute_ahead(self, scheduler_output: Any) -> None:
        """The first half of a step, of which nobody waits for the end; `sample_tokens` tells how it went."""
        self._ahead = None
        try:
            self._ahead = self.wrapper.execute_model(scheduler_output), None
        except Exception as error:
            self._ahead = None, error
            raise

    def sample_tokens(self, grammar_output: Any, scheduler_output: Any = None) -> Any:
        """The second half, or both if it is given what to execute.

        Returns or raises what the first half did where nobody was told: an output of it leaves nothing to sample.
        """
        (output, failed), self._ahead = self._ahead or (None, None), None
        if scheduler_output is not None:
            output, failed = self.wrapper.execute_model(scheduler_output), None
        if failed is not None:
            raise failed
        return self._maybe_deferred(self.wrapper.sample_tokens(grammar_output) if output is None else output)

    def shutdown(self) -> None:
        """Let vLLM's worker and its process groups end."""
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        self.wrapper.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()

    def _maybe_deferred(self, output: Any) -> Any:
        return (
            _AsyncOutput(output, getattr(self.wrapper, "device", None))
            if isinstance(output, self._output_type)
            else output
        )


class HostLock:
    """A lock over all ranks of a host, as multiprocessing's, that travels by pickle; the kernel frees a dead rank's.

    Args:
        path: of a file that every rank can open.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._threads = threading.Lock()
        self._file = -1

    @property
    def is_here(self) -> bool:
        """Whether this process can reach it."""
        return os.path.exists(self._path)

    def __reduce__(self) -> Any:
        return HostLock, (self._path,)

    def __enter__(self) -> bool:
        self._threads.acquire()
        if self._file < 0:
            self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def __exit__(self, *error: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._threads.release()


class OnWrapper:
    """A callable of the engine's, given what it expects: vLLM's wrapper, not ours."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, worker: VllmWorker, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._function(worker.wrapper, *args, **kwargs)


class _AsyncOutput(DeferredOutput[Any]):
    """An output that is still being copied from the GPU."""

    _thread = threading.local()

    def __init__(self, output: Any, device: Any) -> None:
        self._output = output
        self._device = device

    def wait(self) -> Any:
        if self._device is not None and not getattr(self._thread, "has_device", False):
            # else the first CUDA call of this thread makes a context on device 0
            importlib.import_module("vllm.platforms").current_platform.set_device(self._device)
            self._thread.has_device = True
        return self._output.get_output()


def _prepare_process(context: RankContext, local_rank: int, vllm_config: Any) -> None:
    """What vLLM sets up in a worker's process before the worker; older versions lack some of it."""
    from vllm.logger import init_logger
    from vllm.tracing import maybe_init_worker_tracer

    logging = importlib.import_module("vllm.logger")
    if (logging_config := getattr(vllm_config, "logging_config", None)) is not None:
        logging.configure_logging(logging_config)
    init_logger(__name__)
    if (gpus := getattr(vllm_config.parallel_config, "assigned_physical_gpu_ids", None)) is not None:
        importlib.import_module("vllm.platforms.interface").set_assigned_physical_gpu_ids(gpus)
    if (devices := _module("vllm.v1.executor.vllm_net_devices")) is not None:
        devices.set_worker_net_device(local_rank, vllm_config)
    maybe_init_worker_tracer(
        instrumenting_module_name="vllm.worker", process_kind="worker", process_name=f"Worker_{context.rank}"
    )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
