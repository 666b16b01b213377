"""Combinations that cannot work are refused with the numbers and a remedy, all at once."""

from collections.abc import Callable

import pytest

from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.schema import Config, SourceConfig, ValidationSourceConfig
from megatron_chameleon.errors import ConfigErrors


def good() -> Config:
    config = Config()
    config.tokenizer.path = "tokenizer"
    config.data.stage1 = [SourceConfig(prefix="data")]
    config.training.global_batch_size = 8
    return config


def problems(config: Config, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        check_config(config, world_size)
    return caught.value.lines()


def change(section: str, key: str, value: object) -> Callable[[Config], None]:
    return lambda config: setattr(getattr(config, section), key, value)


def test_a_config_that_works_is_let_through() -> None:
    config = good()
    config.parallel.tensor_model_parallel_size = 2
    config.parallel.sequence_parallel = True
    check_config(config, world_size=4)


@pytest.mark.parametrize(
    ("edit", "world_size", "message"),
    [
        (
            change("training", "global_batch_size", 6),
            4,
            "training.global_batch_size: 6 is not divisible by micro_batch_size 1 x data parallel "
            "4 = 4. Use 4 or 8, or use the nearest layout that works: ",
        ),
        (
            change("parallel", "tensor_model_parallel_size", 2),
            3,
            "parallel: 3 processes cannot be laid out as tensor 2 x pipeline 1 = 2 times data "
            "parallel. Start a multiple of 2 processes.",
        ),
        (
            change("parallel", "tensor_model_parallel_size", 3),
            3,
            "model.num_attention_heads: 4 is not divisible by tensor_model_parallel_size 3.",
        ),
        (
            change("parallel", "pipeline_model_parallel_size", 3),
            3,
            "model.num_layers: 4 layers are not divisible by 3 pipeline stages. Use one of 1, 2, "
            "4.",
        ),
        (change("parallel", "sequence_parallel", True), 1, "true needs tensor_model_parallel_size"),
        (change("model", "hidden_size", 130), 1, "130 is not divisible by num_attention_heads 4"),
        (change("model", "hidden_size", 12), 1, "12 / 4 heads gives an odd head size"),
        (change("model", "num_query_groups", 3), 1, "Use one of 1, 2, 4"),
        (change("model", "qk_norm_groups", 3), 1, "model.qk_norm_groups: 3 does not divide"),
        (change("model", "norm_order", "post"), 1, "'post' is not one of pre, swin"),
        (change("model", "hidden_dropout", 1.5), 1, "1.5 is not 0 or more and below 1"),
        (change("optimizer", "lr", 0.0), 1, "optimizer.lr: 0.0 is not above 0"),
        (change("optimizer", "lr", float("nan")), 1, "optimizer.lr: nan is not above 0"),
        (change("optimizer", "lr_warmup_steps", 100), 1, "100 is not below training.steps 100"),
        (
            change("training", "nonfinite", "ignore"),
            1,
            "'ignore' is not one of stop, skip, rollback",
        ),
        (
            change("training", "nonfinite_limit", -1),
            1,
            "training.nonfinite_limit: -1 is not between 0 and 1,000,000,000",
        ),
        (
            change("training", "hang_seconds", -1.0),
            1,
            "training.hang_seconds: -1.0 is not 0 or between 0.1 and 10,000,000",
        ),
        (
            change("training", "skip_steps", [101]),
            1,
            "skip_steps: 101 is not one of the 100 steps. Gi",
        ),
        (change("optimizer", "min_lr", 1.0), 1, "1.0 is above lr 0.0001. Use at most 0.0001."),
        (change("training", "z_loss", -1.0), 1, "training.z_loss: -1.0 is not between 0 and 1,000"),
        (change("tokenizer", "path", ""), 1, "tokenizer.path: not set"),
        (change("data", "stage1", []), 1, "data.stage1: no sources"),
        (change("data", "stage1", [SourceConfig("a", -1.0)]), 1, "-1.0 is not between 1e-09 and"),
        (
            change("data", "stage2", [SourceConfig("a", float("inf"))]),
            1,
            "inf is not between 1e-09 and",
        ),
        (change("data", "stage1_fraction", 1.5), 1, "1.5 is not between 0 and 1"),
        (change("data", "stage1", [SourceConfig("")]), 1, "data.stage1[0].prefix: not set"),
        (change("data", "stage2", [SourceConfig("a", 1.0, 7.0)]), 1, "data.stage2[0].image_first"),
        (
            change("data", "stage1", [SourceConfig("a", 0.0)]),
            1,
            "0.0 is not between 1e-09 and 1e+15. Use a number in that range, or remove the source.",
        ),
        (
            change("data", "stage1", [SourceConfig("a", repeat=0)]),
            1,
            "0 is not true, false or a number",
        ),
        (
            change("data", "stage2", [SourceConfig("a", name="x"), SourceConfig("b", name="x")]),
            1,
            "data.stage2[1].name: 'x' is also the name of data.stage2[0]. Give each source a name",
        ),
        (change("data", "packing_reserve", 0.6), 1, "0.6 is not between 0 and 0.5"),
        (change("data", "stage1_tokens", 0), 1, "data.stage1_tokens: 0 is not between 1 and"),
    ],
)
def test_what_cannot_work(edit: Callable[[Config], None], world_size: int, message: str) -> None:
    config = good()
    edit(config)
    assert any(message in line for line in problems(config, world_size))


def test_all_problems_come_at_once() -> None:
    config = good()
    config.training.global_batch_size = 7
    config.parallel.sequence_parallel = True
    config.optimizer.lr_warmup_steps = 1000
    lines = problems(config, world_size=2)
    assert len(lines) == 4
    assert lines[2].startswith("parallel: tensor 1 x pipeline 1 does not work on 2 processes")


def test_an_invalid_value_causes_no_second_problem() -> None:
    config = good()
    config.optimizer.lr = -1.0
    assert problems(config) == [
        "optimizer.lr: -1.0 is not above 0 and at most 1,000,000. Use a number in that range."
    ]
    config.optimizer.lr, config.data.stage2_share = 1e-4, 3.0
    config.data.stage1[0].weight = 0.0
    assert [line.partition(":")[0] for line in problems(config)] == [
        "data.stage1[0].weight",
        "data.stage2_share",
    ]


def test_qk_norm_groups_that_fit_the_heads_but_not_the_key_heads() -> None:
    config = good()
    config.model.num_attention_heads = 8
    config.model.hidden_size = 64
    config.model.num_query_groups = 4
    config.model.qk_norm_groups = 8  # more groups than key heads: each key head has its own
    check_config(config, 1)
    config.model.num_attention_heads = 12
    config.model.hidden_size = 96
    config.model.num_query_groups = 6
    config.model.qk_norm_groups = 4
    assert problems(config, 1)[0].startswith("model.qk_norm_groups: 4 does not divide num_query_")


def test_qk_norm_groups_need_not_fit_the_layout() -> None:
    config = good()
    config.parallel.tensor_model_parallel_size = 2
    config.model.qk_norm_groups = 1
    check_config(config, 2)


def deepspeed(**values: object) -> Config:
    config = good()
    config.engine.name = "deepspeed"
    for name, value in values.items():
        setattr(config.engine, name, value)
    return config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_is_let_through(stage: int) -> None:
    config = deepspeed(zero_stage=stage, offload_optimizer=stage > 0, offload_param=stage == 3)
    config.parallel.tensor_model_parallel_size = 2
    config.parallel.sequence_parallel = True
    config.training.dtype = "bf16" if stage else "fp32"
    check_config(config, world_size=4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            change("engine", "zero_stage", 4),
            "engine.zero_stage: 4 is not one of 0, 1, 2, 3. Choose one of them.",
        ),
        (
            change("engine", "offload_param", True),
            "engine.offload_param: true needs engine.zero_stage 3, but it is 1.",
        ),
        (
            change("parallel", "pipeline_model_parallel_size", 2),
            "parallel.pipeline_model_parallel_size: 2, but the deepspeed engine has no pipeline "
            "parallelism. Set it to 1, or use engine.name=megatron.",
        ),
        (
            change("parallel", "virtual_pipeline_model_parallel_size", 2),
            "the deepspeed engine has no interleaved pipelines",
        ),
        (
            change("parallel", "context_parallel_size", 2),
            "the deepspeed engine has no context parallelism",
        ),
        (
            change("parallel", "use_distributed_optimizer", True),
            "true is for the megatron engine; with deepspeed, engine.zero_stage does this. Set it "
            "to false, and engine.zero_stage to 1 or more.",
        ),
        (
            change("parallel", "overlap_grad_reduce", True),
            "parallel.overlap_grad_reduce: true is for the megatron engine",
        ),
        (
            change("fp8", "format", "hybrid"),
            "fp8.format: hybrid is not supported by the deepspeed engine. Set it to null",
        ),
    ],
)
def test_what_deepspeed_cannot_do(edit: Callable[[Config], None], message: str) -> None:
    config = deepspeed()
    edit(config)
    assert any(message in line for line in problems(config, world_size=4))


def test_context_parallelism_needs_the_attention_of_transformer_engine() -> None:
    config = good()
    config.parallel.context_parallel_size = 2
    config.data.reset_attention = True
    lines = problems(config, world_size=2)
    assert lines == [
        "data.reset_attention: true with context_parallel_size 2 needs bf16, and training.dtype is "
        "fp32. Set training.dtype=bf16, this to false, or parallel.context_parallel_size to 1."
    ]
    config.training.dtype = "bf16"
    check_config(config, world_size=2)
    config.fp8.format, config.fp8.emulate = "hybrid", True
    lines = problems(config, world_size=2)
    assert lines == [
        "fp8.emulate: true excludes Transformer Engine, which context_parallel_size 2 needs. Set "
        "parallel.context_parallel_size to 1."
    ]


def test_zero_0_offloads_nothing_and_has_no_bf16() -> None:
    lines = problems(deepspeed(zero_stage=0, offload_optimizer=True))
    assert lines == [
        "engine.offload_optimizer: true needs engine.zero_stage of 1 or more, but it is 0. Set it "
        "to false, or the stage to 1."
    ]
    config = deepspeed(zero_stage=0)
    config.training.dtype = "bf16"
    assert problems(config)[0].startswith(
        "engine.zero_stage: 0 with training.dtype bf16 would sum gradients in bf16"
    )


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_deepspeed_keys_with_the_other_engine(key: str) -> None:
    config = good()
    setattr(config.engine, key, True)
    assert problems(config) == [
        f"engine.{key}: true needs engine.name deepspeed, but it is megatron. Set it to false, or "
        "change the engine."
    ]


def test_held_out_sources() -> None:
    config = good()
    config.data.validation.sources = [
        ValidationSourceConfig("held/out", name="pairs"),
        ValidationSourceConfig("", name="pairs"),
    ]
    assert problems(config) == [
        "data.validation.sources[1].name: 'pairs' is also the name of data.validation.sources[0]. "
        "Give each source a name of its own.",
        "data.validation.sources[1].prefix: not set. Give the path of the token files without "
        ".bin.",
    ]


def test_keys_about_a_held_out_loss_that_there_is_not() -> None:
    config = good()
    config.data.validation.every_steps, config.data.validation.max_tokens = 100, 5000
    config.checkpoint.keep_best = True
    lists = "but data.validation.sources lists no source. List at least one"
    assert problems(config) == [
        f"data.validation.every_steps: 100 is set, {lists}, with its prefix, or remove it.",
        f"data.validation.max_tokens: 5,000 is set, {lists}, with its prefix, or remove it.",
        f"checkpoint.keep_best: true needs a held-out loss, {lists}, or set it to false.",
    ]
