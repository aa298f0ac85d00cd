"""AsyncExecExecutor: vLLM's executor interface over asyncexec's window, futures and supervision."""

import concurrent.futures
import functools
import importlib
import inspect
import os
import weakref
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.utils.network_utils import get_distributed_init_method, get_loopback_ip, get_open_port
from vllm.v1.executor.abstract import Executor

from asyncexec.aggregate import Aggregator
from asyncexec.blocking import BlockingExecutor
from asyncexec.errors import AsyncExecError, ConfigError
from asyncexec.integrations.vllm.connectors import ec_aggregator, kv_aggregator, step_aggregator
from asyncexec.integrations.vllm.meeting import MeetingPlace
from asyncexec.integrations.vllm.settings import Settings
from asyncexec.integrations.vllm.worker import HostLock, OnWrapper
from asyncexec.pickling import Snapshot

logger = init_logger(__name__)

_DONE: concurrent.futures.Future[None] = concurrent.futures.Future()
"""Of a first half that nobody waits for."""
_DONE.set_result(None)

_WORKER = "asyncexec.integrations.vllm.worker:VllmWorker"


class AsyncExecExecutor(Executor):  # type: ignore[misc]
    """vLLM's workers on the ranks of an asyncexec executor.

    Futures are `concurrent.futures.Future`s that complete by themselves.  What fails raises errors of
    `asyncexec.errors`: WorkerError with the remote traceback, WorkerDied, StepTimeout (a TimeoutError).
    """

    uses_ray = False
    supports_pp = True

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """It does."""
        return True

    def _init_executor(self) -> None:
        parallel = self.parallel_config
        if getattr(parallel, "nnodes", 1) > 1:
            raise ConfigError(f"nnodes is {parallel.nnodes}; AsyncExecExecutor starts its ranks on one host")
        if getattr(envs, "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", False):
            raise ConfigError("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH is set; AsyncExecExecutor does not scale experts up")
        if getattr(parallel, "numa_bind", False):
            raise ConfigError("numa_bind is set; AsyncExecExecutor does not bind its ranks to NUMA nodes")
        self.is_failed = False
        self._world_size: int = parallel.world_size
        self._output_rank = self._world_size - parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
        self._kv: Aggregator | None = None
        self._ec: Aggregator | None = None
        self._aggregator: Aggregator | None = None
        self._sampling_follows = False
        config = Settings.of(self.vllm_config).executor_config(self._world_size, _environments(self.vllm_config))
        self._meeting = MeetingPlace()
        worker_kwargs = {
            "vllm_config": self.vllm_config,
            "distributed_init_method": self._init_method(),
            "shared_worker_lock": HostLock(str(self._meeting.lock)),
        }
        try:
            self._ranks = BlockingExecutor(config, _WORKER, worker_kwargs)
        except BaseException:
            self._meeting.remove()
            raise
        self._finalizer = weakref.finalize(self, _close, self._ranks, self._meeting)
        try:
            self._ranks.start()
        except BaseException:
            self._finalizer()
            raise
        self._meeting.all_have_met()
        self._ranks.add_failure_callback(functools.partial(_note_failure, weakref.ref(self), self._meeting))
        if callable(settle := getattr(importlib.import_module("vllm.utils.torch_utils"), _SETTLE_THREADS, None)):
            settle()  # this process only schedules

    def _init_method(self) -> str:
        """Where vLLM's ranks meet: a file that no other executor has, so not a port.

        vLLM's CPU workers name their shared memory after it.
        """
        needs_tcp = getattr(importlib.import_module("vllm.utils.network_utils"), "aiter_requires_tcp_store", None)
        if callable(needs_tcp) and needs_tcp():
            return str(get_distributed_init_method(get_loopback_ip(), get_open_port()))
        return f"file://{self._meeting.store}"

    # ------------------------------------------------------------------------------------------------ calls

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """Run a method of the workers, or a callable that is given vLLM's worker wrapper, on all ranks.

        Returns:
            Every rank's result, in the order of ranks; a future of that if `non_block`.
        """
        target = method if isinstance(method, str) else OnWrapper(method)
        future = self._ranks.submit(target, tuple(args), kwargs, timeout=timeout)
        return future if non_block else future.result()

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """The first half of a step.

        Once the workers have been seen to leave a step's output to `sample_tokens`, nobody waits for this half: the
        future is done at once, with None.  An error, or an output all the same, comes with `sample_tokens`.

        Without a grammar the engine core asks for the second half at once, and both go to the ranks as one message.
        """
        has_tokens = scheduler_output.total_num_scheduled_tokens > 0
        if non_block and has_tokens and self._sampling_follows and self._aggregator is None:
            # holding takes a copy, which the prompts and images of new requests are too large for
            if scheduler_output.has_structured_output_requests or scheduler_output.scheduled_new_reqs:
                self._ranks.notify("execute_ahead", (scheduler_output,))
            else:
                self._ranks.hold("execute_ahead", (Snapshot(scheduler_output),), joins="sample_tokens")
            return _DONE
        future = self._step("execute_model", (scheduler_output,))
        if has_tokens and not self._sampling_follows:
            future.add_done_callback(self._learn)
        return future if non_block else future.result()

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The second half."""
        future = self._step("sample_tokens", (grammar_output,))
        return future if non_block else future.result()

    def _learn(self, execute_future: concurrent.futures.Future[Any]) -> None:
        if execute_future.exception() is None and execute_future.result() is None:
            self._sampling_follows = True

    def execute_dummy_batch(self) -> None:
        """One step without requests; done when the output rank is."""
        self._of_output_rank("execute_dummy_batch")

    def take_draft_token_ids(self) -> Any:
        """The output rank's draft tokens."""
        return self._of_output_rank("take_draft_token_ids")

    def _step(self, method: str, args: tuple[Any, ...]) -> Any:
        return self._ranks.submit(
            method, args, output_rank=self._output_rank, aggregator=self._aggregator, is_step=True
        )

    def _of_output_rank(self, method: str) -> Any:
        return self._ranks.submit(method, output_rank=self._output_rank, is_step=True).result()

    def init_kv_output_aggregator(self, connector: Any) -> None:
        """Have every rank's KV connector report; called once, before the first step."""
        self._kv = self.kv_output_aggregator = kv_aggregator(connector, self._world_size)
        self._aggregator = step_aggregator(self._kv, self._ec)

    def init_ec_output_aggregator(self) -> None:
        """Have every rank's encoder-cache connector report; called once, before the first step."""
        self._ec = self.ec_output_aggregator = ec_aggregator()
        self._aggregator = step_aggregator(self._kv, self._ec)

    @functools.cached_property
    def max_concurrent_batches(self) -> int:
        """Steps that the engine core may have in flight; asked for by vLLM 0.22, which has it on its executors."""
        stages: int = self.parallel_config.pipeline_parallel_size
        return 2 if stages == 1 and self.scheduler_config.async_scheduling else stages

    # -------------------------------------------------------------------------------------------- life and death

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """Have `callback()` called when a rank is lost, on any thread; at once if that has happened."""
        self._ranks.add_failure_callback(lambda cause: callback())

    def check_health(self) -> None:
        """Return if every rank is idle or makes progress; answered beside the ranks' main threads.

        Raises:
            RankUnhealthy: names the ranks that are not, with a report.
            ExecutorFailed: a rank was lost.
        """
        self._ranks.check_health()

    def shutdown(self) -> None:
        """End the ranks; may be called again."""
        if hasattr(self, "_finalizer"):  # else it never came up
            # not the finalizer itself, which calls once: in a failure callback this does what can be done there
            _close(self._ranks, self._meeting)


_SETTLE_THREADS = "set_torch_threads_for_runtime"
"""Of vLLM 0.32; 0.22 has set them by then."""


def _environments(vllm_config: Any) -> list[dict[str, str]]:
    """What vLLM sets for each worker before it starts: how many threads it has and, on CPUs, to which cores they go."""
    parallel = vllm_config.parallel_config
    set_threads = importlib.import_module("vllm.v1.executor.multiproc_executor").set_multiprocessing_worker_envs
    if inspect.signature(set_threads).parameters:
        set_threads(parallel.world_size * max(1, parallel.data_parallel_size_local))
    else:  # vLLM 0.22
        set_threads()
    binding = importlib.import_module("vllm.utils.ompmultiprocessing").OMPProcessManager(vllm_config)
    environments = []
    before = dict(os.environ)
    for rank in range(parallel.world_size):
        with binding.configure_omp_envs(rank=rank, local_rank=rank):
            environments.append({name: value for name, value in os.environ.items() if before.get(name) != value})
    return environments


def _note_failure(executor: "weakref.ref[AsyncExecExecutor]", meeting: MeetingPlace, cause: AsyncExecError) -> None:
    meeting.remove()  # now: a failing engine core may be killed before it shuts its executor down
    logger.error("the executor has failed: %s", cause)
    if (there := executor()) is not None:
        there.is_failed = True


def _close(ranks: BlockingExecutor, meeting: MeetingPlace) -> None:
    try:
        ranks.close()
    finally:
        meeting.remove()
