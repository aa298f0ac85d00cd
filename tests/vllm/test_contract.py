"""What vLLM's own tests ask of its executors, asked of ours; docs/vllm.md has the list of those tests."""

import concurrent.futures
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import step

from asyncexec.bench import vllm_noop
from asyncexec.errors import AsyncExecError, ExecutorFailed, StepTimeout, WorkerDied, WorkerError
from asyncexec.integrations.vllm.settings import Settings

PICKY = "custom.PickyWorker"


@pytest.mark.parametrize(
    ("how", "told"),
    [("raises", "ValueError: to serve this, KV cache is needed"), ("exits", "7"), ("is killed", "SIGKILL")],
)
def test_a_rank_that_does_not_come_up_ends_the_start_with_its_reason(
    how: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(AsyncExecError, match=told) as caught:
        vllm_noop.make_executor("asyncexec", 2, additional={"breaks": how}, worker="custom.BreaksAtStart")
    assert "rank 1" in str(caught.value)
    assert time.monotonic() - began < 60  # the other rank is not waited for
    assert not list(tmp_path.iterdir())


def test_a_rank_that_ends_in_a_call_fails_the_calls_of_every_thread(make: Any) -> None:
    executor = make(2)
    pids = executor.collective_rpc("pid")
    naps = [executor.collective_rpc("nap", args=(60.0,), non_block=True) for _ in range(3)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(nap.exception, 30) for nap in naps]
        os.kill(pids[1], signal.SIGKILL)
        assert all(isinstance(waiter.result(30), WorkerDied) for waiter in waiting)
    with pytest.raises(ExecutorFailed):
        executor.collective_rpc("synchronize_device")


def test_an_error_of_a_rank_that_need_not_reply_fails_the_step_while_the_others_are_busy(make: Any) -> None:
    executor = make(2, worker=PICKY)
    step(executor, 4)
    step(executor, 4)
    earlier = executor.collective_rpc("echo", args=(bytes(16 << 20),), non_block=True)
    began = time.monotonic()
    executor.execute_model(vllm_noop.scheduler_output(3), non_block=True)
    with pytest.raises(WorkerError, match="rank 1 cannot") as caught:
        executor.sample_tokens(None)
    assert caught.value.rank == 1
    assert time.monotonic() - began < 1.4  # rank 0 takes longer
    assert [len(echoed) for echoed in earlier.result(30)] == [16 << 20] * 2
    assert len(step(executor, 4).req_ids) == 4
    assert not executor.is_failed


def test_a_draft_that_hangs_has_the_limit_of_a_step(make: Any) -> None:
    executor = make(2, worker=PICKY, additional={"asyncexec": {"timeouts": {"step": 0.3}}})
    with pytest.raises(TimeoutError, match="take_draft_token_ids"):
        executor.take_draft_token_ids()


def test_vllms_limits_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    config = vllm_noop.vllm_config(1)
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "7")
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "60")
    limits = Settings.of(config).timeouts
    assert limits.step == limits.for_method("take_draft_token_ids", step=True) == 7
    assert limits.for_method("add_lora", step=False) is None
    assert 50 < limits.drain + limits.stop + limits.terminate < 60
    monkeypatch.delenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS")
    limits = Settings.of(config).timeouts
    assert 3 < limits.drain + limits.stop + limits.terminate < 5


def test_a_deadline_that_is_over_already_is_kept(shared: Any) -> None:
    nap = shared.collective_rpc("nap", args=(0.5,), non_block=True)
    with pytest.raises(StepTimeout):
        shared.collective_rpc("pid", timeout=1e-6)
    with pytest.raises(TimeoutError):
        nap.result(timeout=0)
    assert nap.result() == [0.5, 0.5]
    assert len(set(shared.collective_rpc("pid"))) == 2


def test_an_argument_is_let_go_of_before_the_next_call(make: Any, tmp_path: Path) -> None:
    executor = make(1, worker=PICKY)
    gone = tmp_path / "gone"
    executor.collective_rpc("hold", args=(np.ones(1000), str(gone)))
    deadline = time.monotonic() + 5
    while not gone.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_arrays_of_an_output_are_the_drivers_own(shared: Any) -> None:
    sent = np.arange(4000, dtype=np.float32)
    small, large = shared.collective_rpc("echo", args=((sent[:4].copy(), sent),))[0]
    small[0] = large[0] = 5
    for _ in range(3):  # what comes later lies elsewhere
        shared.collective_rpc("echo", args=((sent[:4] + 1, sent + 1),))
    assert (small[0], large[0], small[-1], large[-1], sent[0]) == (5, 5, 3, 3999, 0)


def test_a_worker_may_take_its_time_to_shut_down(make: Any, tmp_path: Path) -> None:
    executor = make(2, worker="custom.SlowToShutDown", additional={"shutdown": str(tmp_path)})
    executor.shutdown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_worker_that_never_shuts_down_is_ended(make: Any) -> None:
    executor = make(2, worker="custom.SlowToShutDown", additional={"shutdown": "never"})
    pids = executor.collective_rpc("pid")
    began = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - began < 5  # after which vLLM kills the engine core
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_executors_meet_at_files_of_their_own(make: Any) -> None:
    methods = [
        executor.collective_rpc(lambda wrapper: wrapper.worker.place["distributed_init_method"])
        for executor in (make(2), make(2))
    ]
    assert all(method.startswith("file://") for pair in methods for method in pair)
    assert [len(set(pair)) for pair in methods] == [1, 1]
    assert methods[0][0] != methods[1][0]


def test_ranks_are_where_vllms_wrapper_expects_them(shared: Any) -> None:
    places = shared.collective_rpc(lambda wrapper: wrapper.worker.place)
    assert [(p["rank"], p["local_rank"], p["is_driver_worker"]) for p in places] == [(0, 0, True), (1, 1, False)]
    assert shared.collective_rpc(lambda wrapper: (wrapper.rpc_rank, wrapper.global_rank)) == [(0, 0), (1, 1)]
