"""Configs: precedence, types and one clear line for each mistake."""

from pathlib import Path

import pytest

from megatron_chameleon.config import load
from megatron_chameleon.config.load import format_config, load_config
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.errors import ConfigError, ConfigErrors


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "{}")) == Config()


def test_preset_then_file_then_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text("model: {num_layers: 7, hidden_size: 64, seq_length: 8}")
    monkeypatch.setattr(load, "PRESETS", tmp_path)
    path = write(tmp_path, "preset: small\nmodel: {hidden_size: 96, seq_length: 16}")
    config = load_config(path, ["model.seq_length=32"])
    assert (config.model.num_layers, config.model.hidden_size) == (7, 96)
    assert config.model.seq_length == 32


def test_a_preset_by_override_wins_over_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: chameleon_34b")
    assert load_config(path).model.num_layers == 48
    assert load_config(path, ["preset=chameleon_7b"]).model.num_layers == 32


def test_a_list_of_sources(tmp_path: Path) -> None:
    text = "data: {stage1: [{prefix: a, weight: 2}, {prefix: b, image_first: 0.5}]}"
    sources = load_config(write(tmp_path, text)).data.stage1
    assert sources == [SourceConfig("a", 2.0), SourceConfig("b", 1.0, 0.5)]


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    # YAML 1.1 takes 1e-4 for a string: the config must not.
    config = load_config(write(tmp_path, "optimizer: {lr: 1e-4, weight_decay: 0}"))
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-4, 0.0)
    assert isinstance(config.optimizer.weight_decay, float)


def test_interpolation(tmp_path: Path) -> None:
    text = "tokenizer: {path: here/tokenizer}\nlogging: {run_dir: '${tokenizer.path}/run'}"
    assert load_config(write(tmp_path, text)).logging.run_dir == "here/tokenizer/run"


def test_variables_of_ones_own(tmp_path: Path) -> None:
    text = "variables: {inputs: here}\ntokenizer: {path: '${variables.inputs}/tokenizer'}"
    path = write(tmp_path, text)
    assert load_config(path).tokenizer.path == "here/tokenizer"
    assert load_config(path, ["variables.inputs=there"]).tokenizer.path == "there/tokenizer"


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "data: {stage1: [{prefix: a}]}\ntraining: {seed: 9}"))
    assert load_config(write(tmp_path, format_config(config))) == config


def test_every_unknown_key_and_wrong_type_in_one_go_with_the_nearest_name(tmp_path: Path) -> None:
    text = (
        "model: {hiden_size: 3, num_layers: two}\ntrainning: {}\nparallel: {sequence_parallel: 1}"
    )
    path = write(tmp_path, text)
    with pytest.raises(ConfigErrors) as caught:
        load_config(path)
    assert caught.value.lines() == [
        f"{path}: model.hiden_size: Unknown key. Did you mean `model.hidden_size`?",
        f"{path}: model.num_layers must be a whole number (got 'two'). Correct the value, or "
        "remove it to use the default, 4.",
        f"{path}: trainning: Unknown key. Did you mean `training`?",
        f"{path}: parallel.sequence_parallel must be true or false (got 1). Correct the value, or "
        "remove it to use the default, false.",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=abc", "optimizer.lr must be a number (got 'abc'). Correct the value, or"),
        ("model.num_query_groups=x", "must be a whole number or null (got 'x')"),
        ("tokenizer.path=3", "tokenizer.path must be a string (got 3). Correct the value."),
        ("training.skip_steps=[1,x]", "training.skip_steps[1] must be a whole number (got 'x')"),
        ("data.stage1=[{prefix: a, repeat: x}]", "must be true, false or a whole number (got 'x')"),
        ("data.stage1=[{prefix: a, image_first: x}]", "must be a number or null (got 'x')"),
        ("model.zzz=1", "model.zzz: Unknown key. Use one of num_layers, hidden_size,"),
    ],
)
def test_a_mistake_is_named_in_plain_words(tmp_path: Path, override: str, message: str) -> None:
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    path = write(tmp_path, f"{section}: {{{name}: {value}}}")
    with pytest.raises(ConfigErrors) as caught:
        load_config(path)
    (line,) = caught.value.lines()
    assert line.startswith(f"{path}: {key}")
    assert message in line
    with pytest.raises(ConfigErrors, match=r"must be|Unknown key") as caught:
        load_config(write(tmp_path, "{}"), [override])
    (line,) = caught.value.lines()
    assert line.startswith(f"{override}: ")
    assert message.removeprefix(f"{key}: ") in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("logging.sample_prompts=[a b]", "sample_prompts[0] must be a mapping (got 'a b'). Write"),
        ("logging.sample_prompts=[a b]", "Write it as {text: a b}."),
        ("logging.sample_prompts=draw", "Write it as [{text: draw}]."),
        ("logging.sample_prompts={text: a}", "Write it as [{text: a}]."),
        ("logging.sample_prompts=[{prompt: a}]", "logging.sample_prompts[0].prompt: Unknown key."),
        ("data.stage1={prefix: a}", "data.stage1 must be a list. Write it as [...], or change one"),
        ("data.validation=t/held", "Write it as {sources: [{prefix: t/held}]}."),
        ("data.validation.sources=[t/held]", "sources[0] must be a mapping (got 't/held'). Write"),
        ("training.skip_steps=3", "Write it as [3]."),
        ("training.skip_steps=[a]", "(got 'a'). Write the list as [10, 20]."),
        ("training.profile_steps=[10, x]", "(got 'x'). Write the list as [10, 12]."),
        ("adapter.target_modules=[3]", "(got 3). Write the list as [q_proj, k_proj]."),
        ("data.stage1=[{path: a}]", "Unknown key. Did you mean `data.stage1[0].prefix`?"),
        (
            "data.validation.sources=[{files: a}]",
            "Did you mean `data.validation.sources[0].prefix`?",
        ),
        ("training.skip_steps={a: 1}", "Write it as [10, 20]."),
        ("training.rampup_batch_size=5", "Write it as [8, 8, 10000]."),
        (
            "model.train=lm_head",
            "model.train must be a list (got 'lm_head'). Write it as [lm_h",
        ),
        ("adapter.target_modules=all", "Write it as [q_proj, k_proj]."),
        ("logging.on_event_kinds=7", "Write it as [restart, alarm]."),
        ("adapter=8", "adapter must be a mapping (got 8). Write it as {rank: 0}."),
    ],
)
def test_lists_and_mappings_are_shown_as_they_should_be(
    tmp_path: Path, override: str, said: str
) -> None:
    file = write(tmp_path, "data: {stage1: [{prefix: a}]}")
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    (line,) = caught.value.lines()
    assert line.startswith(f"{override}: ") and said in line


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [1", [], "not valid YAML"),
        ("[1, 2]", [], "the top level is not a mapping"),
        (
            "model: 3",
            [],
            "model must be a mapping (got 3). Write it as {num_layers: 4}.",
        ),
        (
            "data: {stage1: 5}",
            [],
            "data.stage1 must be a list (got 5). Write it as [{prefix: '...'}].",
        ),
        (
            "preset: chameleon_8b",
            [],
            "no preset is called 'chameleon_8b'. Use one of: chameleon_34b, chameleon_7b.",
        ),
        ("logging: {run_dir: '${nowhere.x}'}", [], "nowhere"),
        ("{}", ["training.steps"], "training.steps: not of the form section.key=value"),
        ("{}", ["trainin.steps=3"], "trainin.steps=3: Unknown key. Did you mean `training`?"),
    ],
)
def test_one_line_says_what_is_wrong(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    lines = caught.value.lines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")
