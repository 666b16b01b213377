"""Impossible layouts are refused with the numbers and the nearest layouts that work."""

import time
from typing import Any

import pytest

from megatron_chameleon.config.checks.layouts import (
    MOST_PROCESSES,
    check_layout,
    divisors,
    nearest_layouts,
)
from megatron_chameleon.config.schema import Config


def config_of(**values: Any) -> Config:
    config = Config()
    config.model.num_layers = 12
    config.model.num_attention_heads = 8
    config.training.global_batch_size = 16
    for key, value in values.items():
        section = "training" if hasattr(config.training, key) else "parallel"
        section = "model" if hasattr(config.model, key) else section
        setattr(getattr(config, section), key, value)
    return config


def lines(config: Config, world_size: int) -> list[str]:
    return [line for problem in check_layout(config, world_size) for line in problem.lines()]


def test_a_layout_that_works_says_nothing() -> None:
    config = config_of(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        virtual_pipeline_model_parallel_size=2,
        sequence_parallel=True,
        global_batch_size=18,
    )
    assert lines(config, 6) == []


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        ({"tensor_model_parallel_size": 3}, 3, "model.num_attention_heads: 8 is not divisible by"),
        (
            {"tensor_model_parallel_size": 4, "num_query_groups": 2},
            4,
            "model.num_query_groups: 2 is not divisible by tensor_model_parallel_size 4",
        ),
        (
            {"pipeline_model_parallel_size": 5},
            5,
            "12 layers are not divisible by 5 pipeline stages",
        ),
        ({"tensor_model_parallel_size": 2}, 3, "3 processes cannot be laid out as tensor 2"),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            1,
            "virtual_pipeline_model_parallel_size: 2 needs pipeline_model_parallel_size of 2",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            2,
            "4 does not divide the 6 layers of a pipeline stage into 2 or more parts. "
            "Use one of 2, 3, 6, null",
        ),
        (
            {
                "pipeline_model_parallel_size": 4,
                "virtual_pipeline_model_parallel_size": 3,
                "global_batch_size": 6,
            },
            4,
            "6 gives 6 micro-batches, but the interleaved schedule of 4 stages needs a multiple",
        ),
        ({"context_parallel_size": 2, "seq_length": 66}, 2, "66 is not divisible by 2 x context"),
        ({"sequence_parallel": True}, 1, "parallel.sequence_parallel: true needs"),
        (
            {"sequence_parallel": True, "tensor_model_parallel_size": 2, "seq_length": 33},
            2,
            "model.seq_length: 33 is not divisible by tensor_model_parallel_size 2",
        ),
        ({"global_batch_size": 6}, 4, "6 is not divisible by micro_batch_size 1 x data parallel 4"),
    ],
)
def test_what_cannot_work(values: dict[str, Any], world_size: int, message: str) -> None:
    assert any(message in line for line in lines(config_of(**values), world_size))


def test_the_nearest_layouts_are_named() -> None:
    """16 processes, TP 16 does not fit 8 heads: TP 8 is one doubling away, then TP 4 or PP 2."""
    config = config_of(tensor_model_parallel_size=16)
    assert lines(config, 16)[-1] == (
        "parallel: tensor 16 x pipeline 1 does not work on 16 processes. Use one of the nearest "
        "layouts that do: tensor 8 x pipeline 1; tensor 4 x pipeline 1; tensor 8 x pipeline 2."
    )


def test_one_problem_is_one_line() -> None:
    assert lines(config_of(pipeline_model_parallel_size=8), 8) == [
        "model.num_layers: 12 layers are not divisible by 8 pipeline stages. Use one of 1, 2, 3, "
        "4, 6, 12, or use the nearest layout that works: tensor 1 x pipeline 4; tensor 1 x "
        "pipeline 2; tensor 2 x pipeline 4."
    ]


def test_every_suggestion_works() -> None:
    config = config_of(
        tensor_model_parallel_size=3,
        pipeline_model_parallel_size=5,
        virtual_pipeline_model_parallel_size=5,
        sequence_parallel=True,
        global_batch_size=24,
    )
    suggestions = nearest_layouts(config, 24)
    assert len(suggestions) == 3
    for layout in suggestions:
        config.parallel = layout
        assert lines(config, 24) == []


def test_nothing_is_suggested_where_nothing_works() -> None:
    assert nearest_layouts(config_of(global_batch_size=1), 5) == []


def test_divisors() -> None:
    for number in (1, 2, 12, 36, 97, 720):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_large_sizes_are_answered_at_once() -> None:
    """A number with many divisors, and one of which a loop would never see the end."""
    config = config_of(num_attention_heads=5040, num_layers=1680, global_batch_size=720_720)
    config.model.ffn_hidden_size = 720_720
    config.parallel.tensor_model_parallel_size = 16
    config.parallel.pipeline_model_parallel_size = 11
    start = time.monotonic()
    assert nearest_layouts(config, 720_720)
    assert lines(config, MOST_PROCESSES)
    (line,) = lines(config, 10**30)
    assert line == (
        "parallel: 1,000,000,000,000,000,000,000,000,000,000 processes are more than 1,048,576. "
        "Check the launcher and the sizes of the layout."
    )
    assert time.monotonic() - start < 5
