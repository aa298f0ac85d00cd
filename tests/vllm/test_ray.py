"""The executor on the transport "ray": its ranks are actors of one Ray, on this host."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import lose_a_rank, step
from engines import OURS, run

from asyncexec.bench import vllm_noop
from asyncexec.errors import ConfigError, WorkerError
from asyncexec.integrations.vllm.worker import HostLock

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("ray_address")]
ON_RAY = {"asyncexec": {"transport": "ray"}}


@pytest.fixture(scope="module")
def on_ray(ray_address: str) -> Iterator[Any]:
    os.environ["VLLM_SEEN_BY_RANKS"] = "as in the engine core"
    executor = vllm_noop.make_executor("asyncexec", 2, additional=ON_RAY)
    del os.environ["VLLM_SEEN_BY_RANKS"]
    yield executor
    executor.shutdown()


def test_steps_and_calls_keep_their_order(on_ray: Any) -> None:
    for requests in range(1, 30):
        assert len(step(on_ray, requests).sampled_token_ids) == requests
        assert on_ray.collective_rpc("seen") == [requests, requests]
    futures = []
    for requests in range(1, 20):
        on_ray.execute_model(vllm_noop.scheduler_output(requests), non_block=True)
        futures.append(on_ray.sample_tokens(None, non_block=True))
    assert [len(future.result().req_ids) for future in futures] == list(range(1, 20))


def test_a_step_may_be_larger_than_any_buffer(on_ray: Any) -> None:
    assert len(step(on_ray, 100_000).req_ids) == 100_000


def test_an_error_of_any_rank_and_a_deadline(on_ray: Any) -> None:
    with pytest.raises(WorkerError) as caught:
        on_ray.collective_rpc("fail", args=(1,))
    assert (caught.value.rank, caught.value.remote_type) == (1, "ZeroDivisionError")
    with pytest.raises(TimeoutError):
        on_ray.collective_rpc("nap", timeout=0.2, args=(1.0,))
    assert len(set(on_ray.collective_rpc("pid"))) == 2


def test_the_engine_cores_variables_reach_the_ranks(on_ray: Any) -> None:
    read = on_ray.collective_rpc(lambda wrapper: os.environ.get("VLLM_SEEN_BY_RANKS"))
    assert read == ["as in the engine core"] * 2


def test_arrays_of_an_output_are_the_drivers_own(on_ray: Any) -> None:
    sent = np.arange(100_000, dtype=np.float32)
    (echoed, _) = on_ray.collective_rpc("echo", args=(sent,))
    echoed[0] = 5
    on_ray.collective_rpc("echo", args=(sent + 1,))
    assert (echoed[0], echoed[-1]) == (5, 99_999)


def test_idle_ranks_do_not_wait_actively(on_ray: Any) -> None:
    step(on_ray, 4)
    pids = on_ray.collective_rpc("pid")
    before = [_processor_seconds(pid) for pid in pids]
    time.sleep(2)
    assert all(_processor_seconds(pid) - used < 0.3 for pid, used in zip(pids, before, strict=True))


def test_a_death_is_noticed(make: Any) -> None:
    lose_a_rank(make(2, additional=ON_RAY), limit=2.0)


def test_variables_of_each_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with pytest.raises(ConfigError, match="VLLM_CPU_OMP_THREADS_BIND=nobind"):
        vllm_noop.make_executor("asyncexec", 2, additional=ON_RAY)


def test_a_rank_on_another_host_says_so(on_ray: Any) -> None:
    assert HostLock("/no/such/file").is_here is False
    on_ray.collective_rpc(lambda wrapper: None)


def test_tokens_equal_those_of_vllms_executor(model: str, ray_address: str) -> None:
    assert run(model, OURS, 2, ray=ray_address) == run(model, "mp", 2)


def test_a_killed_rank_ends_the_engine(
    model: str, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    outcome = run.__wrapped__(model, OURS, 2, mode="killed", rank=1, ray=ray_address)
    assert outcome["errors"] == ["EngineDeadError"]
    assert outcome["left"] == []
    assert outcome["seconds"] < 2.0


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
