"""The configuration: every source, and a clear refusal of what cannot work."""

from pathlib import Path

import pytest

from asyncexec import (
    ConfigError,
    ExecutorConfig,
    ReconfigureDistributedRequest,
    Timeouts,
    TransportUnavailable,
    create_executor,
)


def test_sizes_and_slots_are_derived() -> None:
    assert ExecutorConfig(tensor_parallel_size=2, pipeline_parallel_size=3).world_size == 6
    assert ExecutorConfig(tensor_parallel_size=2, pipeline_parallel_size=3).output_rank == 4
    assert ExecutorConfig().max_concurrent_batches == 1
    assert ExecutorConfig(pipeline_parallel_size=4).max_concurrent_batches == 4
    assert ExecutorConfig(async_scheduling=True).max_concurrent_batches == 2
    assert ExecutorConfig(async_scheduling=True, pipeline_parallel_size=3).max_concurrent_batches == 3
    assert ExecutorConfig(max_concurrent_batches=7).max_concurrent_batches == 7


def test_slots_that_were_given_stay_when_the_layout_changes() -> None:
    for given in (1, 2, 4):
        config = ExecutorConfig(pipeline_parallel_size=2, max_concurrent_batches=given)
        for stages in (4, 1, 2):
            config = config.reconfigured(ReconfigureDistributedRequest(pipeline_parallel_size=stages))
            assert config.max_concurrent_batches == given
    derived = ExecutorConfig(pipeline_parallel_size=2)
    assert derived.reconfigured(ReconfigureDistributedRequest(pipeline_parallel_size=4)).max_concurrent_batches == 4


def test_names_from_the_environment() -> None:
    environment = {
        "ASYNCEXEC_TRANSPORT": "nccl",
        "ASYNCEXEC_OPTIONS__NCCL__ENVIRONMENT__NCCL_DEBUG": "INFO",
        "ASYNCEXEC_TIMEOUTS__METHODS__EXECUTE_MODEL": "1",
        "ASYNCEXEC_TIMEOUTS__METHODS__loadWeights": "2",
    }
    config = ExecutorConfig.from_environment(environment)
    assert config.options == {"nccl": {"environment": {"NCCL_DEBUG": "INFO"}}}
    assert config.timeouts.methods == {"execute_model": 1.0, "loadWeights": 2.0}


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    expected = ExecutorConfig(
        transport="nccl",
        tensor_parallel_size=2,
        async_scheduling=True,
        timeouts=Timeouts(step=2.5),
        options={"nccl": {"backend": "gloo"}},
    )
    file = tmp_path / "config.toml"
    file.write_text(
        '[asyncexec]\ntransport = "nccl"\ntensor_parallel_size = 2\nasync_scheduling = true\n'
        '[asyncexec.timeouts]\nstep = 2.5\n[asyncexec.options.nccl]\nbackend = "gloo"\n'
    )
    environment = {
        "ASYNCEXEC_TRANSPORT": "nccl",
        "ASYNCEXEC_TENSOR_PARALLEL_SIZE": "2",
        "ASYNCEXEC_ASYNC_SCHEDULING": "true",
        "ASYNCEXEC_TIMEOUTS__STEP": "2.5",
        "ASYNCEXEC_OPTIONS__NCCL__BACKEND": "gloo",
        "HOME": "/",
    }
    assert ExecutorConfig.from_toml(file) == expected
    assert ExecutorConfig.from_environment(environment) == expected
    assert ExecutorConfig.of(expected) is expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tensor_parallel": 2}, "unknown key 'tensor_parallel'; did you mean 'tensor_parallel_size'"),
        ({"timeouts": {"steps": 1}}, "unknown key 'timeouts.steps'; did you mean 'timeouts.step'"),
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size: Expected `int`, got `str`"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; valid: whole numbers from 1"),
        ({"timeouts": {"step": -1.0}}, "timeouts.step is -1.0; valid: seconds above 0"),
        ({"timeouts": {"methods": {"load": 0.0}}}, "timeouts.methods.load is 0.0"),
        ({"timeouts": {"step": float("inf")}}, "timeouts.step is inf; valid: seconds above 0, or None for no limit"),
        ({"timeouts": {"start": float("nan")}}, "timeouts.start is nan; valid: seconds above 0"),
        ({"max_queued_steps": -1}, "max_queued_steps is -1"),
        ({"max_frame_bytes": 1}, "max_frame_bytes is 1"),
        (["transport"], "a table of keys is needed, not list"),
    ],
)
def test_what_cannot_be_read_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExecutorConfig.from_dict(values)
    assert message in str(caught.value)


def test_the_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("transport = [")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        ExecutorConfig.from_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match=r"none\.toml"):
        ExecutorConfig.from_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"ASYNCEXEC_.*tensor_parallel_size"):
        ExecutorConfig.from_environment({"ASYNCEXEC_TENSOR_PARALLEL_SIZE": "many"})


@pytest.mark.parametrize(
    ("config", "worker", "error", "message"),
    [
        ({"tensor_parallel_size": 2}, "workers:EchoWorker", ConfigError, "transport 'local' runs one rank"),
        ({"transport": "pigeon"}, "workers:EchoWorker", TransportUnavailable, "no transport 'pigeon'.*local, nccl"),
        ({"transport": "nccl", "options": {"nccl": {"backnd": "x"}}}, "workers:EchoWorker", ConfigError, "backnd"),
        ({"transport": "nccl", "options": {"nccl": {"backend": "mpi"}}}, "workers:EchoWorker", ConfigError, "mpi"),
        ({"options": {"locla": {}}}, "workers:EchoWorker", ConfigError, "options.locla: .*installed: local, nccl"),
        ({"aggregator": "second"}, "workers:EchoWorker", ConfigError, "aggregator is 'second'; valid: 'first', 'all'"),
        ({"aggregator": "nowhere:A"}, "workers:EchoWorker", ConfigError, "'nowhere:A' cannot be imported"),
        ({"aggregator": "builtins:int"}, "workers:EchoWorker", ConfigError, "lacks"),
        ({}, "workers", ConfigError, "valid: a class, or 'module:Class'"),
        ({}, "no_such_module:Worker", ConfigError, "No module named 'no_such_module'"),
        ({}, "workers:NoSuchWorker", ConfigError, "has no attribute 'NoSuchWorker'"),
        ({}, "os:getpid", ConfigError, "valid: a class"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    config: dict[str, object], worker: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        create_executor(config, worker)
