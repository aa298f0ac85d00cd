"""The demo engine's worker: one rank of a Llama model."""

import torch
from torch import Tensor

from asyncexec.demo.attention import BatchLayout, KVCache
from asyncexec.demo.checkpoint import ModelConfig, Weights
from asyncexec.demo.graphs import DecodeGraphs
from asyncexec.demo.llama import LlamaStage
from asyncexec.demo.messages import LAST_SAMPLED, ScheduledRequest, StepInput, StepOutput
from asyncexec.demo.parallel import TensorParallel
from asyncexec.demo.sampler import sample
from asyncexec.demo.upload import upload
from asyncexec.device import HostCopier
from asyncexec.outputs import DeferredOutput, IntermediateTensors
from asyncexec.worker import RankContext

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_CACHE_BYTES = 256 * 1024 * 1024
CUDA_CACHE_SHARE = 0.85
"""How much of a GPU's free memory goes to the KV cache; the rest is for the activations of a step."""


class ModelWorker:
    """Runs one rank's part of a Llama model with a paged KV cache.

    Call `initialize_kv_cache` on every rank, with the same number of blocks, before the first step.

    Args:
        context: this rank's place.
        model: directory of a Hugging Face checkpoint (config.json and safetensors) of the Llama architecture.
        dtype: of weights, activations and cache: "float32" or "bfloat16".
        block_size: tokens in a block of the KV cache.
        kv_cache_bytes: upper bound of this rank's KV cache.  None: 256 MiB on a CPU, on a GPU 85 % of the memory that
            is free once the weights are loaded.

    Raises:
        CheckpointError: the checkpoint is missing, broken or unsupported, or cannot be split over this many ranks.
        ValueError: unknown dtype, or a block size below 1.
    """

    def __init__(
        self,
        context: RankContext,
        *,
        model: str,
        dtype: str = "float32",
        block_size: int = 16,
        kv_cache_bytes: int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        self._config = ModelConfig.from_directory(model)
        self._device = torch.device(context.device)
        self._dtype = DTYPES[dtype]
        self._block_size = block_size
        self._kv_cache_bytes = kv_cache_bytes
        tp = TensorParallel(context.tensor_parallel_rank, context.tensor_parallel_size, context.groups.tensor_parallel)
        kv_first, kv_last = tp.kv_part(self._config.kv_heads)
        self._block_shape = (block_size, kv_last - kv_first, self._config.head_size)
        stage, stages = context.pipeline_parallel_rank, context.pipeline_parallel_size
        with torch.inference_mode(), Weights(model, dtype=self._dtype, device=self._device) as weights:
            self._stage = LlamaStage(weights, self._config, tp, stage=stage, stages=stages)
        self._is_last_stage = context.is_last_stage
        self._whole_on_gpu = context.world_size == 1 and self._device.type == "cuda"
        self._graphs: DecodeGraphs | None = None
        self._caches: list[KVCache] = []
        self._num_blocks = 0
        self._copies = HostCopier(context.device) if self._device.type == "cuda" else None
        self._last_sampled = torch.full((1,), LAST_SAMPLED, device=self._device)  # by slot; it grows
        self._sampled_slots: set[int] = set()

    def available_blocks(self) -> int:
        """How many blocks of the KV cache, for all of this rank's layers, fit its memory."""
        elements = 2 * len(self._stage.layer_numbers) * torch.Size(self._block_shape).numel()
        return self._cache_bytes() // (elements * self._dtype.itemsize)

    def _cache_bytes(self) -> int:
        if self._device.type != "cuda":
            return CPU_CACHE_BYTES if self._kv_cache_bytes is None else self._kv_cache_bytes
        free = int(torch.cuda.mem_get_info(self._device)[0] * CUDA_CACHE_SHARE)
        return free if self._kv_cache_bytes is None else min(free, self._kv_cache_bytes)

    @torch.inference_mode()
    def initialize_kv_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache, or replace it by an empty one.

        Raises:
            ValueError: fewer than one block.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; the KV cache needs at least one block")
        self._graphs = None  # they use the old one
        self._caches.clear()  # its memory first
        shape = (num_blocks, *self._block_shape)
        self._caches = [KVCache.zeros(shape, self._dtype, self._device) for _ in self._stage.layer_numbers]
        self._num_blocks = num_blocks
        self._graphs = DecodeGraphs(self._stage, self._caches) if self._whole_on_gpu else None

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: StepInput, intermediate: IntermediateTensors[StepOutput] | None
    ) -> StepOutput | DeferredOutput[StepOutput] | IntermediateTensors[StepOutput]:
        """Run one step; on a GPU this enqueues its work and never waits for it.

        Args:
            scheduler_output: the requests that take part.
            intermediate: "hidden_states" [tokens, hidden] of the previous stage; None on the first stage.

        Returns:
            The sampled tokens on the last stage, "hidden_states" [tokens, hidden] on every other.

        Raises:
            RuntimeError: the KV cache is not initialised.
            ValueError: a token, block or slot of the step does not exist.
        """
        requests = scheduler_output.requests
        if not self._caches:
            raise RuntimeError("the KV cache is not initialised: call initialize_kv_cache on every rank first")
        if not requests:
            return StepOutput([]) if self._is_last_stage else IntermediateTensors({})
        self._check_blocks(requests)
        layout = BatchLayout.build(requests, self._block_size, self._device)
        x = self._token_ids(requests) if intermediate is None else intermediate["hidden_states"]
        logits = None if self._graphs is None else self._graphs.logits(x, layout)
        if logits is None:
            hidden = self._stage(x, self._caches, layout)
            if not self._is_last_stage:
                return IntermediateTensors({"hidden_states": hidden}, replicated=frozenset({"hidden_states"}))
            if not len(layout.last_rows):
                return StepOutput([-1] * len(requests))
            logits = self._stage.logits(hidden[layout.last_rows])
        return self._sample(requests, logits)

    def _check_blocks(self, requests: list[ScheduledRequest]) -> None:
        """Refuse blocks that do not exist: on a GPU the error would come late and break the process."""
        for request in requests:
            if not all(0 <= block < self._num_blocks for block in request.block_ids):
                raise ValueError(
                    f"the request in slot {request.slot} has block ids {request.block_ids}; "
                    f"the KV cache has blocks 0 to {self._num_blocks - 1}"
                )

    def _token_ids(self, requests: list[ScheduledRequest]) -> Tensor:
        """The step's token ids, int64 [tokens], with placeholders replaced."""
        ids: list[int] = []
        rows: list[int] = []
        slots: list[int] = []
        for request in requests:
            for token in request.token_ids:
                if token == LAST_SAMPLED and request.slot in self._sampled_slots:
                    rows.append(len(ids))
                    slots.append(request.slot)
                elif not 0 <= token < self._config.vocab_size:
                    raise ValueError(
                        f"the request in slot {request.slot} has token id {token}; valid are 0 to "
                        f"{self._config.vocab_size - 1}, and {LAST_SAMPLED} where a token was sampled for the slot"
                    )
                ids.append(token)
        tokens = upload(ids, self._device)
        if rows:
            sampled = self._last_sampled.index_select(0, upload(slots, self._device))
            tokens.index_copy_(0, upload(rows, self._device), sampled)
        return tokens

    def _remember(self, slots: list[int], tokens: Tensor) -> None:
        """Keep the tokens sampled for these slots, on the device: the next step may stand on them."""
        self._sampled_slots.update(slots)
        if (missing := max(slots) + 1 - len(self._last_sampled)) > 0:
            self._last_sampled = torch.nn.functional.pad(self._last_sampled, (0, missing), value=LAST_SAMPLED)
        self._last_sampled.index_copy_(0, upload(slots, self._device), tokens)

    def _sample(self, requests: list[ScheduledRequest], logits: Tensor) -> StepOutput | DeferredOutput[StepOutput]:
        sampling = [request for request in requests if request.sample]
        positions = [request.start + len(request.token_ids) for request in sampling]
        tokens = sample(logits, [request.sampling for request in sampling], positions)
        self._remember([request.slot for request in sampling], tokens)

        def output(copies: list[Tensor]) -> StepOutput:
            remaining = iter(copies[0].tolist())
            return StepOutput([next(remaining) if request.sample else -1 for request in requests])

        return output([tokens]) if self._copies is None else self._copies.to_host([tokens], output)
