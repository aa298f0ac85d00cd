"""Reading of checkpoints: whatever is wrong is told with the path, the problem and what would be valid."""

import json
from pathlib import Path
from typing import Any

import pytest

from asyncexec.demo.checkpoint import CheckpointError, ModelConfig
from asyncexec.demo.random_checkpoint import write_random_checkpoint
from asyncexec.demo.worker import ModelWorker
from asyncexec.worker import RankContext

pytestmark = pytest.mark.timeout(60)


def build(model: Path, *, tp: int = 1, pp: int = 1, **arguments: Any) -> ModelWorker:
    context = RankContext(world_size=tp * pp, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    return ModelWorker(context, model=str(model), **arguments)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory"):
        build(tmp_path / "nowhere")


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures is \['GPT2LMHeadModel'\]; supported is"),
        ({"architectures": None}, r"architectures is None; supported is \['LlamaForCausalLM'\]"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported; supported is 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"'yarn' is not supported; supported are default, lin",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' needs a positive low_freq_factor and high",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs a positive factor"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3 key-value heads"),
        ({"head_dim": 15}, "head size 15 is not an even number"),
        ({"hidden_size": "big"}, r"Expected `int`, got `str` - at `\$\.hidden_size`"),
    ],
)
def test_a_config_that_cannot_run_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        build(tmp_path)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights; needed is model\.safetensors"):
        build(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: cannot be read"):
        build(tmp_path)


@pytest.mark.parametrize("index", ["{}", "{", '{"weight_map": [1]}'])
def test_a_broken_index_is_named(index: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json: has no valid weight_map"):
        build(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 5}, r"lack the tensor 'model\.layers\.4\."),
        ({"intermediate_size": 64}, r"gate_proj\.weight' has shape \(128, 64\); the config calls for \(64, 64\)"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(CheckpointError, match=message):
        build(tmp_path)


@pytest.mark.parametrize(
    ("config", "tp", "pp", "message"),
    [
        ({}, 3, 1, "2 key-value heads cannot be split evenly over tensor_parallel_size=3"),
        ({}, 8, 1, "4 attention heads cannot be split evenly over tensor_parallel_size=8"),
        ({"intermediate_size": 129}, 2, 1, "129 intermediate columns cannot be split evenly"),
        ({}, 1, 5, "pipeline_parallel_size=5, but the model has only 4 layers"),
    ],
)
def test_impossible_splits_are_refused(config: dict[str, Any], tp: int, pp: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        build(write_random_checkpoint(tmp_path, **config), tp=tp, pp=pp)


def test_end_of_text_ids_are_a_tuple(tmp_path: Path) -> None:
    for given, ids in ((None, ()), (5, (5,)), ([5, 6], (5, 6))):
        write_random_checkpoint(tmp_path, eos_token_id=given)
        assert ModelConfig.from_directory(tmp_path).eos_token_ids == ids
