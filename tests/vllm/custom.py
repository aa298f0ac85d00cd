"""What users bring: workers for `worker_cls` and `worker_extension_cls`, an executor derived from ours."""

import importlib
import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

from asyncexec.bench.vllm_noop import NoopWorker
from asyncexec.integrations.vllm import AsyncExecExecutor


class RecordingWorker(NoopWorker):
    """Records the verbs that it is called with."""

    def __init__(self, vllm_config: Any, **place: Any) -> None:
        super().__init__(vllm_config, **place)
        self._recorded: list[str] = []
        self._loras: set[int] = set()

    def _record(self, verb: str, *args: Any, **kwargs: Any) -> None:
        self._recorded.append(f"{verb} {args} {kwargs}")

    def recorded(self) -> list[str]:
        """What has been called since this was asked last."""
        recorded, self._recorded = self._recorded, []
        return recorded

    def add_lora(self, lora_request: Any) -> bool:
        """Known from now on; number 13 cannot be loaded, number 7 only by rank 0."""
        self._record("add_lora", lora_request)
        if lora_request.lora_int_id == 13:
            raise ValueError("an invalid adapter")
        if lora_request.lora_int_id == 7 and self.rank != 0:
            return False
        self._loras.add(lora_request.lora_int_id)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Whether it was there."""
        self._record("remove_lora", lora_id)
        there = lora_id in self._loras
        self._loras.discard(lora_id)
        return there

    def pin_lora(self, lora_id: int) -> bool:
        """Whether it is there."""
        self._record("pin_lora", lora_id)
        return lora_id in self._loras

    def list_loras(self) -> set[int]:
        """Those that are there."""
        self._record("list_loras")
        return self._loras

    def sleep(self, level: int = 1) -> None:
        """Recorded, as all that follows."""
        self._record("sleep", level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self._record("wake_up", tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        self._record("discard", sorted(tags))

    def profile(
        self, is_start: bool = True, profile_prefix: str | None = None, delay_iterations: int | None = None
    ) -> None:
        self._record("profile", is_start, profile_prefix, delay_iterations)
        if profile_prefix == "broken" and self.rank == 1:
            raise OSError("no space for a trace")

    def save_sharded_state(self, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        self._record("save_sharded_state", path, pattern, max_size)

    def reset_mm_cache(self) -> None:
        self._record("reset_mm_cache")

    def reset_encoder_cache(self) -> None:
        self._record("reset_encoder_cache")

    def execute_dummy_batch(self) -> None:
        self._record("execute_dummy_batch")

    def take_draft_token_ids(self) -> Any:
        """Its own rank, as a draft."""
        return importlib.import_module("vllm.v1.outputs").DraftTokenIds(["r"], [[self.rank]])

    def supports_draft_weight_updates(self) -> bool:
        return self.rank == 0

    def get_kv_connector_handshake_metadata(self) -> Any:
        return {(0, 0, self.rank): f"meta of {self.rank}"}

    def determine_available_memory(self) -> int:
        return 1000 + self.rank

    def get_kv_cache_spec(self) -> dict[str, str]:
        return {f"layer of {self.rank}": "spec"}

    def set_kv_cache_layout(self, layout_name: str) -> None:
        self._record("set_kv_cache_layout", layout_name)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self._record("initialize_from_config", kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        return importlib.import_module("vllm.v1.worker.worker_base").CompilationTimes(1.0 + self.rank, 2.0 - self.rank)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)


class PickyWorker(NoopWorker):
    """Fails on one rank in the ways that the scheduler output or a call tells it to."""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Rank 1 raises at once where there are 3 requests, while rank 0 is busy."""
        if scheduler_output.total_num_scheduled_tokens == 3:
            if self.rank == 1:
                raise ValueError("rank 1 cannot")
            time.sleep(1.5)
        return super().execute_model(scheduler_output)

    def take_draft_token_ids(self) -> Any:
        """Hangs, as a read from the device may."""
        time.sleep(3)

    def hold(self, payload: Any, gone: str) -> None:
        """Leave a file when the memory of an argument is let go of."""
        weakref.finalize(payload, Path(gone).touch)


class TellsWhenItBegins(NoopWorker):
    """Writes to the pipe that `additional_config` names when a step of 5 requests begins."""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Tell, and go on once it has been read."""
        if scheduler_output.total_num_scheduled_tokens == 5:
            Path(self.vllm_config.additional_config["began"]).write_text("5")
        return super().execute_model(scheduler_output)


class SlowToShutDown(NoopWorker):
    """Needs half a second, and says when it is done; or never ends."""

    def shutdown(self) -> None:
        """What `additional_config` says."""
        asked = self.vllm_config.additional_config["shutdown"]
        if asked == "never":
            signal.pause()
        time.sleep(0.5)
        (Path(asked) / str(self.rank)).touch()


class BreaksAtStart(NoopWorker):
    """One rank does not come up, in the way that `additional_config` says."""

    def load_model(self, **options: Any) -> None:
        """Raise, end, or be killed; the others wait for each other."""
        how = self.vllm_config.additional_config["breaks"]
        if self.rank != 1:
            time.sleep(20)
        if how == "raises":
            raise ValueError("to serve this, KV cache is needed")
        if how == "exits":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)


class Extension:
    """For `worker_extension_cls`."""

    def extended(self, number: int) -> tuple[int, int]:
        """A method that vLLM's worker lacks."""
        return self.rank, number  # type: ignore[attr-defined]

    def process_id(self) -> int:
        """Of this rank."""
        return os.getpid()


class MarkedExecutor(AsyncExecExecutor):
    """Derived by a user: leaves a file when it is used, wherever the engine core runs."""

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        """As ours."""
        Path(os.environ["MARKED_EXECUTOR"]).touch()
        return super().collective_rpc(*args, **kwargs)
