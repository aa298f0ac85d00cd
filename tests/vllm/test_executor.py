"""The executor alone, on workers that do nothing: calls, futures, errors, deadlines, deaths."""

import asyncio
import concurrent.futures
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from calls import lose_a_rank, step

from asyncexec.bench import vllm_noop
from asyncexec.errors import ConfigError, StepTimeout, WorkerError
from asyncexec.integrations.vllm import AsyncExecExecutor

pytestmark = pytest.mark.timeout(300)


def test_a_step_has_the_output_of_the_output_rank(shared: Any) -> None:
    for _ in range(100):
        assert len(step(shared).sampled_token_ids) == 4


def test_two_steps_in_flight(shared: Any) -> None:
    futures = []
    for _ in range(20):
        shared.execute_model(vllm_noop.scheduler_output(4), non_block=True)
        futures.append(shared.sample_tokens(None, non_block=True))
    assert all(len(future.result().req_ids) == 4 for future in futures)


def test_a_first_half_runs_before_the_calls_behind_it(shared: Any) -> None:
    step(shared)
    assert shared.execute_model(vllm_noop.scheduler_output(5), non_block=True).result() is None
    assert shared.collective_rpc("seen") == [5, 5]
    assert len(shared.sample_tokens(None).req_ids) == 5
    shared.execute_model(vllm_noop.scheduler_output(6), non_block=True)  # whose second half never comes
    assert len(step(shared, 7).req_ids) == 7
    assert len(step(shared).req_ids) == 4


def test_a_first_half_does_not_wait_for_what_takes_the_engine_time(make: Any, tmp_path: Path) -> None:
    os.mkfifo(began := tmp_path / "began")
    executor = make(1, worker="custom.TellsWhenItBegins", additional={"began": str(began)})
    step(executor)
    output = vllm_noop.scheduler_output(5)
    output.has_structured_output_requests = True  # the engine works out their bitmask while the model runs
    assert executor.execute_model(output, non_block=True).result() is None
    assert began.read_text() == "5"
    assert len(executor.sample_tokens(None).req_ids) == 5


def test_an_output_of_the_first_half_is_what_sampling_returns(shared: Any) -> None:
    step(shared)
    shared.collective_rpc("answer_in_one_call", args=(True,))  # from now on the first half has the output
    try:
        assert len(step(shared).req_ids) == 4
    finally:
        shared.collective_rpc("answer_in_one_call", args=(False,))
    assert len(step(shared).req_ids) == 4


def test_collective_rpc_by_name_and_callable(shared: Any) -> None:
    pids = shared.collective_rpc("pid")
    assert len(set(pids)) == 2
    assert shared.collective_rpc(lambda wrapper: os.getpid()) == pids
    assert shared.collective_rpc(lambda wrapper, n, k: (wrapper.rank, n, k), None, [1], {"k": 2}) == [
        (0, 1, 2),
        (1, 1, 2),
    ]
    assert shared.collective_rpc(lambda wrapper: type(wrapper).__name__) == ["WorkerWrapperBase"] * 2
    assert shared.collective_rpc("pid", non_block=True).result(10) == pids


def test_futures_complete_by_themselves(shared: Any) -> None:
    future = shared.collective_rpc("pid", non_block=True)
    called = threading.Event()
    future.add_done_callback(lambda done: called.set())
    assert called.wait(10)
    assert future.done()
    assert future.result() == future.result()
    assert not future.cancel()


async def test_futures_can_be_awaited(shared: Any) -> None:
    future = shared.collective_rpc("pid", non_block=True)
    assert len(await asyncio.wait_for(asyncio.wrap_future(future), 10)) == 2


def test_waiting_for_several_futures(shared: Any) -> None:
    futures = [shared.collective_rpc("nap", args=(0.01,), non_block=True) for _ in range(3)]
    done, missing = concurrent.futures.wait(futures, 10)
    assert (len(done), len(missing)) == (3, 0)


def test_result_with_a_timeout_gives_up_the_wait_and_nothing_else(shared: Any) -> None:
    future = shared.collective_rpc("nap", args=(0.5,), non_block=True)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.05)
    assert time.monotonic() - began < 0.4
    assert future.result() == [0.5, 0.5]


def test_a_deadline_names_the_ranks_and_later_replies_stay_matched(shared: Any) -> None:
    with pytest.raises(TimeoutError) as caught:
        shared.collective_rpc("nap", timeout=0.1, args=(1.0,))
    error = caught.value
    assert isinstance(error, StepTimeout)
    assert error.waiting_for == (0, 1)
    assert error.report is not None
    assert "nap" in error.report.with_stacks()
    pids = shared.collective_rpc("pid")
    assert len(set(pids)) == 2
    assert shared.collective_rpc("pid") == pids


def test_a_deadline_behind_a_long_call_is_kept(shared: Any) -> None:
    shared.collective_rpc("nap", args=(1.0,), non_block=True)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        shared.collective_rpc("pid", timeout=0.1)
    assert time.monotonic() - began < 0.8


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_any_rank_has_its_type_and_traceback(shared: Any, rank: int) -> None:
    with pytest.raises(WorkerError) as caught:
        shared.collective_rpc("fail", args=(rank,))
    assert (caught.value.rank, caught.value.remote_type) == (rank, "ZeroDivisionError")
    assert "vllm_noop.py" in caught.value.remote_traceback
    assert len(set(shared.collective_rpc("pid"))) == 2


def test_an_error_of_the_first_half_is_raised_by_the_second(shared: Any) -> None:
    step(shared)
    shared.collective_rpc("break_next_step")
    with pytest.raises(WorkerError, match="broken step"):
        step(shared)
    assert len(step(shared).req_ids) == 4


def test_an_error_of_a_first_half_is_forgotten_with_it(shared: Any) -> None:
    step(shared)
    shared.collective_rpc("break_next_step")
    shared.execute_model(vllm_noop.scheduler_output(5), non_block=True)
    assert shared.collective_rpc("seen") == [5, 5]  # it has been run, and its second half never comes
    shared.execute_model(vllm_noop.scheduler_output(6), non_block=True)
    assert shared.collective_rpc("seen") == [6, 6]
    assert len(shared.sample_tokens(None).req_ids) == 6


def test_an_unknown_method_is_an_error_of_the_call(shared: Any) -> None:
    with pytest.raises(WorkerError, match="no_such_method"):
        shared.collective_rpc("no_such_method")


def test_threads_do_not_mix_replies(shared: Any) -> None:
    def work(number: int) -> bool:
        return all(
            shared.collective_rpc("echo", args=((number, i),)) == [(number, i)] * 2 and len(step(shared).req_ids) == 4
            if number == 0
            else shared.collective_rpc("echo", args=((number, i),)) == [(number, i)] * 2
            for i in range(200)
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_the_scheduler_output_may_change_at_once(shared: Any) -> None:
    output = vllm_noop.scheduler_output(4)
    future = shared.execute_model(output, non_block=True)
    output.total_num_scheduled_tokens = 9
    future.result()
    shared.sample_tokens(None)
    assert shared.collective_rpc("seen") == [4, 4]


def test_idle_ranks_use_no_cpu(shared: Any) -> None:
    pids = [*shared.collective_rpc("pid"), os.getpid()]
    before = [_cpu_ticks(pid) for pid in pids]
    time.sleep(2)
    assert all(_cpu_ticks(pid) - ticks <= 4 for pid, ticks in zip(pids, before, strict=True))


def test_the_health_check_is_answered_during_a_call(shared: Any) -> None:
    future = shared.collective_rpc("nap", args=(0.5,), non_block=True)
    shared.check_health()
    assert not future.done()
    future.result()


def test_a_death_fails_what_is_in_flight_and_calls_back(make: Any) -> None:
    lose_a_rank(make(2), limit=1.0)


def test_a_failure_callback_may_shut_down(make: Any) -> None:
    def watchers() -> int:
        return sum(thread.name == "asyncexec-watcher" for thread in threading.enumerate())

    before = watchers()
    executor = make(1)
    called = threading.Event()
    executor.register_failure_callback(executor.shutdown)
    executor.register_failure_callback(called.set)
    os.kill(executor.collective_rpc("pid")[0], signal.SIGKILL)
    assert called.wait(5)
    executor.shutdown()  # the rest of it
    assert watchers() == before


def test_a_death_while_idle_is_noticed(make: Any) -> None:
    executor = make(2)
    called = threading.Event()
    executor.register_failure_callback(called.set)
    os.kill(executor.collective_rpc("pid")[0], signal.SIGKILL)
    began = time.monotonic()
    assert called.wait(5)
    assert time.monotonic() - began < 1.0


def test_the_output_rank_is_the_first_of_the_last_stage(make: Any) -> None:
    executor = make(1, stages=2)
    assert step(executor).sampled_token_ids[0] == [1001]  # rank 1's
    assert step(executor).sampled_token_ids[0] == [1001]


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"transprot": "nccl"}, "transprot"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"timeouts": {"stp": 1}}, "timeouts.stp"),
        ({"timeouts": {"step": -1}}, "timeouts.step"),
        ({"options": {"nccl": {"bakend": "none"}}}, "bakend"),
    ],
)
def test_bad_options_are_refused_by_name_and_leave_nothing(
    table: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vllm_noop.vllm_config(1, 1, {"asyncexec": table})
    config.parallel_config.worker_cls = "asyncexec.bench.vllm_noop.NoopWorker"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=named):
        AsyncExecExecutor(config)
    assert not list(tmp_path.iterdir())


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
