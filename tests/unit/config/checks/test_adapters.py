"""Settings of adapters that cannot work are refused with the numbers and a remedy, all at once."""

from typing import Any

import pytest

from megatron_chameleon.config.checks.adapters import RANK_NEEDED, check_adapter
from megatron_chameleon.config.finetuning import LINEAR_LAYERS
from megatron_chameleon.config.schema import Config


def problems(**values: Any) -> list[str]:
    config = Config()
    for key, value in values.items():
        section, name = key.split("__")
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return [str(problem) for problem in check_adapter(config)]


def test_defaults_and_every_layer_alone_are_let_through() -> None:
    assert problems() == problems(adapter__rank=8) == []
    for name in LINEAR_LAYERS:
        assert problems(adapter__rank=8, adapter__target_modules=[name]) == []


@pytest.mark.parametrize(
    ("key", "value"), [("dropout", 0.1), ("dora", True), ("start_from", "a"), ("base", "b")]
)
def test_a_setting_without_an_adapter(key: str, value: Any) -> None:
    what = f"{value} is set, but adapter.rank is 0: there is no adapter"
    expected = f"adapter.{key}: {what}. Set adapter.rank, or remove it."
    assert problems(**{f"adapter__{key}": value}) == [expected]
    assert key in RANK_NEEDED


def test_a_rank_that_no_matrix_of_the_model_has() -> None:
    sizes = {"model__hidden_size": 64, "model__ffn_hidden_size": 48}
    assert problems(adapter__rank=48, **sizes) == []
    assert problems(adapter__rank=49, **sizes) == [
        "adapter.rank: 49 exceeds the smaller side of the model's matrices, which is 48. "
        "Use at most 48; 8 to 64 are common."
    ]


def test_all_other_problems_at_once() -> None:
    found = problems(
        adapter__rank=4,
        adapter__target_modules=["q_proj", "k_proj", "q_proj"],
        model__freeze=["lm_head"],
        optimizer__name="muon",
    )
    assert found == [
        "adapter.target_modules: names q_proj more than once. Name each layer once.",
        "model.freeze: names parameters of the model, which are all frozen beside an adapter. "
        "Remove it, or set adapter.rank to 0.",
        "optimizer.name: muon updates the matrices of the model, which are frozen beside an "
        "adapter. Use adamw, or set adapter.rank to 0.",
    ]
    none = problems(adapter__rank=4, adapter__target_modules=[], model__train=["lm_head"])
    assert [line.split(": ")[0] for line in none] == ["adapter.target_modules", "model.train"]
