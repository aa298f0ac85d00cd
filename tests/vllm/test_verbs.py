"""Every verb of vLLM's executor interface: the workers are called with what MultiprocExecutor calls them with."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from asyncexec.bench import vllm_noop
from asyncexec.errors import WorkerError

KINDS = ("asyncexec", "mp")
Verb = Callable[[Any], Any]
LORA = LoRARequest(lora_name="adapter", lora_int_id=5, lora_path="/nowhere")

VERBS: dict[str, list[Verb]] = {
    "lora": [
        lambda e: e.add_lora(LORA),
        lambda e: e.list_loras(),
        lambda e: e.pin_lora(5),
        lambda e: e.pin_lora(6),
        lambda e: e.remove_lora(5),
        lambda e: e.remove_lora(5),
        lambda e: e.list_loras(),
    ],
    "lora that not all ranks load": [
        lambda e: e.add_lora(LoRARequest(lora_name="half", lora_int_id=7, lora_path="/nowhere")),
        lambda e: e.collective_rpc("remove_lora", args=(7,)),
    ],
    "sleep": [
        lambda e: e.is_sleeping,
        lambda e: e.wake_up(),  # nothing to do
        lambda e: e.sleep(2),
        lambda e: e.is_sleeping,
        lambda e: e.sleep(1),  # sleeps already
        lambda e: e.wake_up(["weights"]),
        lambda e: (e.is_sleeping, e.sleeping_tags),
        lambda e: e.wake_up(["no such tag"]),
        lambda e: e.wake_up(["kv_cache"]),
        lambda e: e.is_sleeping,
        lambda e: e.discard(("kv_cache",)),
        lambda e: e.sleeping_tags,
        lambda e: e.wake_up(),
        lambda e: e.is_sleeping,
    ],
    "profile": [
        lambda e: e.profile(True, "request"),
        lambda e: e.profile(is_start=False),
        lambda e: e.profile(True, delay_iterations=3),
    ],
    "state and caches": [
        lambda e: e.save_sharded_state("/a/path", pattern="part-{part}", max_size=99),
        lambda e: e.reset_mm_cache(),
        lambda e: e.reset_encoder_cache(),
    ],
    "dummy batch and drafts": [
        lambda e: e.execute_dummy_batch(),
        lambda e: e.take_draft_token_ids().draft_token_ids,
        lambda e: e.supports_draft_weight_updates(),
    ],
    "start": [
        lambda e: e.determine_available_memory(),
        lambda e: e.get_kv_cache_specs(),
        lambda e: e.get_supported_kv_cache_layouts(),
        lambda e: e.set_kv_cache_layout("LBHNC"),
        lambda e: e.get_kv_connector_handshake_metadata(),
        lambda e: e.initialize_from_config(["config 0", "config 1"]),
        lambda e: e.compile_or_warm_up_model(),
        lambda e: e.vllm_config.compilation_config.compilation_time,
        lambda e: e.vllm_config.compilation_config.encoder_compilation_time,
        lambda e: e.supported_tasks,
    ],
}


@pytest.fixture(scope="module")
def both() -> Iterator[dict[str, Any]]:
    """Both executors, on workers that record."""
    executors = {}
    for kind in KINDS:
        executors[kind] = vllm_noop.make_executor(kind, 2, worker="custom.RecordingWorker")
    yield executors
    for executor in executors.values():
        executor.shutdown()


@pytest.mark.parametrize("name", VERBS)
def test_verbs_are_those_of_vllms_executor(both: dict[str, Any], name: str) -> None:
    answers = {kind: [verb(executor) for verb in VERBS[name]] for kind, executor in both.items()}
    recorded = {kind: executor.collective_rpc("recorded") for kind, executor in both.items()}
    assert answers["asyncexec"] == answers["mp"]
    assert recorded["asyncexec"] == recorded["mp"]
    assert [len(calls) > 0 for calls in recorded["asyncexec"]] == [True, True]


def test_an_adapter_that_cannot_be_loaded_harms_nothing_else(both: dict[str, Any]) -> None:
    executor = both["asyncexec"]
    with pytest.raises(WorkerError, match="an invalid adapter"):
        executor.add_lora(LoRARequest(lora_name="broken", lora_int_id=13, lora_path="/nowhere"))
    assert executor.add_lora(LORA)
    assert executor.remove_lora(5)
    assert not executor.is_failed


def test_an_error_of_profiling_names_its_rank(both: dict[str, Any]) -> None:
    with pytest.raises(WorkerError, match="no space") as caught:
        both["asyncexec"].profile(True, "broken")
    assert caught.value.rank == 1


def test_profiling_that_the_worker_does_not_know_is_refused_before_a_call(both: dict[str, Any]) -> None:
    executor = both["asyncexec"]
    executor.collective_rpc("recorded")
    with pytest.raises(ValueError, match="max_iterations"):
        executor.profile(True, max_iterations=3)
    assert executor.collective_rpc("recorded") == [[], []]


def test_a_worker_extension(make: Any) -> None:
    executor = make(2, worker="custom.RecordingWorker", worker_extension="custom.Extension")
    assert executor.collective_rpc("extended", args=(9,)) == [(0, 9), (1, 9)]


def test_the_class_says_what_it_can_do() -> None:
    executor = importlib.import_module("asyncexec.integrations.vllm").AsyncExecExecutor
    abstract: Any = importlib.import_module("vllm.v1.executor.abstract")
    assert issubclass(executor, abstract.Executor)
    assert executor.supports_async_scheduling()
    assert executor.supports_pp
    config = vllm_noop.vllm_config(1)
    for backend in (executor, "asyncexec.integrations.vllm.AsyncExecExecutor"):
        config.parallel_config.distributed_executor_backend = backend
        assert abstract.Executor.get_class(config) is executor
