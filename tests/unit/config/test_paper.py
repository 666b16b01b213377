"""The comparison with the paper: marks, sizes, derived values and warnings."""

import pytest

from megatron_chameleon.config import paper
from megatron_chameleon.config.checks.check import check_config, get_value
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import PRESETS
from megatron_chameleon.config.schema import Config, SourceConfig
from places import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def preset(size: str, *overrides: str) -> Config:
    return load_config(PRESETS / f"chameleon_{size}.yaml", overrides)


def rows(config: Config, size: str, stage: str = "pretraining") -> dict[str, paper.PaperComparison]:
    found = paper.compare(config, size, stage) + paper.derived_rows(config, size, stage)
    return {row.key: row for row in found}


@pytest.mark.parametrize("size", paper.SIZES)
def test_a_preset_has_every_value_of_the_paper(size: str) -> None:
    config = preset(size)
    for key in set(paper.PRETRAINING) - {"data.image_first"}:
        value = get_value(config, key) or (32 if key == "model.num_query_groups" else 0)
        assert value == paper.PRETRAINING[key].of(size), key
    assert {row.mark for row in rows(config, size).values()} <= {"=", "~", "-"}


# arXiv 2405.09818: table 1, sections 2.2, 2.3 and 3.2; copied by hand, independently of the code
@pytest.mark.parametrize(
    ("stage", "size", "key", "value"),
    [
        ("pretraining", "7b", "model.hidden_dropout", 0.1),
        ("pretraining", "34b", "model.hidden_dropout", 0.0),
        ("pretraining", "34b", "model.norm_order", "swin"),
        ("pretraining", "34b", "optimizer.lr", 1e-4),
        ("pretraining", "7b", "optimizer.lr_warmup_steps", 4000),
        ("pretraining", "7b", "optimizer.adam_beta2", 0.95),
        ("pretraining", "7b", "optimizer.adam_eps", 1e-5),
        ("pretraining", "7b", "derived.tokens per batch", 8_388_608),
        ("pretraining", "34b", "derived.tokens per batch", 12_582_912),
        ("pretraining", "7b", "derived.parameters", 7_013_158_912),
        ("pretraining", "7b", "derived.total tokens", 9.2e12),
        ("sft", "7b", "model.hidden_dropout", 0.05),
        ("sft", "34b", "model.hidden_dropout", 0.05),
        ("sft", "7b", "data.loss_on", "answers"),
        ("sft", "34b", "optimizer.lr", 1e-5),
        ("sft", "34b", "optimizer.lr_decay_style", "cosine"),
        ("sft", "7b", "training.global_batch_size", 128),
    ],
)
def test_the_papers_values(stage: str, size: str, key: str, value: object) -> None:
    assert rows(preset(size), size, stage)[key].paper == value


def test_marks() -> None:
    config = preset("7b", "optimizer.lr=3e-4", "training.steps=1000", "training.seed=7")
    config.data.stage1 = [SourceConfig("a", 1.0, 0.7), SourceConfig("b")]
    found = rows(config, "7b")
    marks = {
        "model.num_layers": "=",
        "model.num_query_groups": "=",  # null in the config, 32 in the model
        "optimizer.lr": "!",
        "training.steps": "!",
        "derived.total tokens": "!",
        "training.global_batch_size": "~",  # the paper counts tokens
        "training.seed": "-",
        "data.stage1[0].image_first": "!",
        "data.stage1[1].image_first": "-",  # null: not text-image pairs
        "tokenizer.path": "-",
    }
    assert {key: found[key].mark for key in marks} == marks
    assert found["model.num_query_groups"].value == 32
    assert found["tokenizer.path"].value == paper.TO_BE_SET
    assert "data.stage1" not in found
    assert rows(preset("7b"), "7b")["data.stage1"].value == paper.TO_BE_SET


def test_both_readings_of_the_tokens_seen_are_the_papers() -> None:
    key = "derived.total tokens"
    assert rows(preset("7b", "training.steps=1101494"), "7b")[key].mark == "~"  # 4.4T x 2.1
    assert rows(preset("7b", "training.steps=1201600"), "7b")[key].mark == "!"  # 4.8T x 2.1


@pytest.mark.parametrize(
    ("layers", "hidden", "size"),
    [(3, 128, "7b"), (32, 5120, "7b"), (48, 6144, "34b"), (80, 8192, "34b")],
)
def test_the_nearest_size(layers: int, hidden: int, size: str) -> None:
    config = Config()
    config.model.num_layers, config.model.hidden_size = layers, hidden
    assert paper.nearest_size(config) == size


@pytest.mark.parametrize("size", paper.SIZES)
def test_the_presets_give_no_warning(size: str) -> None:
    assert paper.warnings(preset(size)) == []


def test_a_small_model_may_leave_out_what_keeps_a_large_one_stable() -> None:
    config = Config()
    config.training.z_loss = 0.0
    config.model.qk_norm_groups = 0
    assert paper.warnings(config) == []


def test_dropout_with_the_swin_order() -> None:
    config = Config()
    config.model.norm_order, config.model.hidden_dropout = "swin", 0.1
    (line,) = paper.warnings(config)
    assert line.startswith("model.hidden_dropout is 0.1 with model.norm_order swin: the paper")
    assert "Set model.hidden_dropout=0" in line


@pytest.mark.parametrize(
    ("size", "override", "words"),
    [
        ("7b", "model.hidden_dropout=0", "model.hidden_dropout is 0 at 7.0B parameters"),
        ("7b", "model.qk_norm_groups=0", "model.qk_norm_groups is 0 (no QK-norm) at 7.0B"),
        ("7b", "training.z_loss=0", "training.z_loss is 0 at 7.0B parameters"),
        ("34b", "training.z_loss=0", "training.z_loss is 0 at 34.3B parameters"),
        ("34b", "model.qk_norm_groups=0", "model.qk_norm_groups is 0 (no QK-norm) at 34.3B"),
    ],
)
def test_what_diverges_at_scale(size: str, override: str, words: str) -> None:
    (line,) = paper.warnings(preset(size, override))
    assert line.startswith(words)
    assert ("dropout, QK-norm and z-loss" in line) == (size == "7b")


@pytest.mark.parametrize("size", paper.SIZES)
def test_the_examples_fit_64_processes(size: str) -> None:
    config = load_config(EXAMPLES / f"chameleon_{size}" / "train.yaml")
    check_config(config, 64)
    assert {row.mark for row in paper.compare(config, size)} <= {"=", "~", "-"}
    assert sum(source.image_first == 0.5 for source in config.data.stage1) == 1
    assert config.data.stage2


def test_the_fine_tuning_example_has_the_papers_values() -> None:
    """Section 3.2; one node of 8 processes."""
    config = load_config(EXAMPLES / "sft" / "train.yaml")
    check_config(config, 8)
    assert paper.warnings(config) == []
    assert {row.mark for row in paper.compare(config, "7b", "sft")} <= {"=", "~", "-"}
    assert (config.optimizer.lr, config.model.hidden_dropout) == (1e-5, 0.05)


def test_lists_of_numbers_and_a_growing_batch_have_their_rows() -> None:
    ramp = "training.rampup_batch_size=[256, 256, 1_000_000]"
    config = preset("7b", ramp, "training.skip_steps=[7]")
    found = rows(config, "7b")
    assert found["training.rampup_batch_size"].value == "256, 256, 1000000"
    assert found["training.skip_steps"].value == "7"
    *_, total = paper.derived_rows(config, "7b", samples=10**6)
    assert total.value == 10**6 * 4096
