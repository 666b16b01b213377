"""FP8 settings that cannot work are refused, with the numbers and what to use."""

from typing import Any

import pytest

from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.schema import Config, Fp8Config, SourceConfig
from megatron_chameleon.errors import ConfigErrors


def config_with(values: dict[str, Any]) -> Config:
    config = Config(fp8=Fp8Config(format="hybrid"))
    config.tokenizer.path = "tokenizer"
    config.data.stage1 = [SourceConfig(prefix="data")]
    config.model.ffn_hidden_size = 320
    for key, value in values.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    return config


def problems(values: dict[str, Any], world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        check_config(config_with(values), world_size)
    return caught.value.lines()


TENSOR_2 = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_what_works_is_let_through(recipe: str, emulate: bool) -> None:
    values = {"fp8.recipe": recipe, "fp8.emulate": emulate, "fp8.margin": 1}
    check_config(config_with(values), 1)
    check_config(config_with({**values, **TENSOR_2}), 2)
    if recipe == "tensorwise":
        check_config(config_with({**values, "fp8.num_layers_at_end_in_bf16": 4}), 1)


@pytest.mark.parametrize("preset", ["chameleon_7b", "chameleon_34b"])
@pytest.mark.parametrize("tensor_size", [1, 2, 4, 8])
def test_the_papers_models_have_shapes_for_fp8(preset: str, tensor_size: int, tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"preset: {preset}\n")
    config = load_config(path)
    config.fp8.format = "hybrid"
    config.tokenizer.path, config.data.stage1 = "tokenizer", [SourceConfig(prefix="data")]
    config.parallel.tensor_model_parallel_size = tensor_size
    config.parallel.sequence_parallel = tensor_size > 1
    check_config(config, tensor_size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"fp8.format": "mxfp8"},
            "fp8.format: 'mxfp8' is not one of hybrid, e4m3. Choose one of them, or null.",
        ),
        (
            {"fp8.recipe": "blockwise"},
            "fp8.recipe: 'blockwise' is not one of delayed, tensorwise. Choose one of them.",
        ),
        (
            {"fp8.amax_compute_algo": "mean"},
            "fp8.amax_compute_algo: 'mean' is not one of max, most_recent. Choose one of them.",
        ),
        (
            {"fp8.amax_history_len": 0},
            "fp8.amax_history_len: 0 is not between 1 and 65,536. Use a number in that range.",
        ),
        (
            {"fp8.margin": -1},
            "fp8.margin: -1 is not between 0 and 1,000. Use a number in that range.",
        ),
        (
            {"fp8.margin": 17},
            "fp8.margin: 17 is above 16: E4M3 spans 2^18, and nothing would be left. Use 0, "
            "Transformer Engine's default, or 1.",
        ),
        (
            {"fp8.format": None, "fp8.emulate": True},
            "fp8.emulate: true changes nothing while fp8.format is null. Set fp8.format to hybrid "
            "or e4m3.",
        ),
        (
            {"fp8.num_layers_at_start_in_bf16": 1},
            "fp8.num_layers_at_start_in_bf16: 1, but delayed scaling runs all layers in FP8. Set "
            "it to 0, or fp8.recipe=tensorwise.",
        ),
        (
            {"fp8.recipe": "tensorwise", "fp8.num_layers_at_end_in_bf16": 5},
            "fp8.num_layers_at_end_in_bf16: 5 is above the 4 layers of a pipeline stage. Use at "
            "most 4.",
        ),
        (
            {"model.seq_length": 250, "training.micro_batch_size": 2},
            "model.seq_length: 250 x micro_batch_size 2 = 500 tokens are not a multiple of 16. "
            "Use 256, because FP8 needs a multiple on each rank.",
        ),
        (
            {"model.ffn_hidden_size": 344},
            "model.ffn_hidden_size: 344 is not a multiple of 16. Use a multiple of 16 with FP8, "
            "such as 352.",
        ),
        (
            {"model.hidden_size": 120, "model.num_query_groups": 4},
            "model.hidden_size: 120 is not a multiple of 16. Use a multiple of 16 with FP8, such "
            "as 128.",
        ),
        (
            {"model.hidden_size": 112, "model.num_attention_heads": 8, "model.num_query_groups": 2},
            "model.num_query_groups: 2 gives 168 rows of queries, keys and values, which is not a "
            "multiple of 16. Use a multiple of 16 with FP8, such as 160.",
        ),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    assert message in problems(values)


def test_each_rank_needs_the_shapes() -> None:
    values = {**TENSOR_2, "model.seq_length": 252, "model.ffn_hidden_size": 336}
    assert problems(values, 2) == [
        "model.seq_length: 252 / 2 x micro_batch_size 1 = 126 tokens are not a multiple of 8. Use "
        "256, because FP8 needs a multiple on each rank.",
        "model.ffn_hidden_size: 336 is not a multiple of 16 on each of 2 tensor-parallel ranks. "
        "Use a multiple of 32 with FP8, such as 320.",
    ]


def test_without_fp8_shapes_are_free() -> None:
    values = {"fp8.format": None, "model.seq_length": 250, "model.ffn_hidden_size": 343}
    check_config(config_with(values), 1)
