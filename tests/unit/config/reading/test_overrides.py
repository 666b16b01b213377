"""Words that replace values of a config: they work, or are refused in one line that names them."""

from pathlib import Path

import pytest

from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.reading.overrides import Override
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError


def load(folder: Path, *words: str) -> Config:
    path = folder / "config.yaml"
    path.write_text("data: {stage1: [{prefix: a}, {prefix: b}]}\ntraining: {steps: 7}\n")
    return load_config(path, words)


def test_an_entry_of_a_list(tmp_path: Path) -> None:
    words = ["data.stage1[0].weight=2", "data.stage1[1]={repeat: 3}", "data.stage1.1.image_first=1"]
    first, second = load(tmp_path, *words).data.stage1
    assert (first.prefix, first.weight) == ("a", 2.0)
    assert (second.prefix, second.repeat, second.image_first) == ("b", 3, 1.0)


def test_a_mapping_is_merged_and_a_list_replaced(tmp_path: Path) -> None:
    config = load(tmp_path, "training={seed: 3}", "data.stage1=[{prefix: c}]")
    assert (config.training.steps, config.training.seed) == (7, 3)
    assert [source.prefix for source in config.data.stage1] == ["c"]


def test_the_last_word_wins_and_one_may_refer_to_another(tmp_path: Path) -> None:
    config = load(tmp_path, "training.steps=8", "training.steps=1e3", "variables.x=here")
    assert config.training.steps == 1000
    words = ["variables.x=here", "logging.run_dir=${variables.x}/run"]
    assert load(tmp_path, *words).logging.run_dir == "here/run"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.stage1[2].weight=2", "there is no such entry (list index out of range). Name one"),
        ("data.stage1[-1].weight=2", "not of the form section.key=value"),
        ("data.stage1[0]=3", "data.stage1[0] must be a mapping (got 3)"),
        ("data.stage1[0][0]=3", "data.stage1[0].0: Unknown key"),
        ("data.stage1+=1", "not of the form"),
        ("model[0]=3", "model.0: Unknown key"),
        ("model.num_layers.x=3", "model.num_layers must be a whole number (got {'x': 3})"),
        ("model=3", "model must be a mapping (got 3)"),
        ("a.b=[", "not valid YAML (did not find expected node content). Correct or quote"),
        ("a.b={", "not valid YAML (did not find expected node content)"),
        ("a.b={?}", "cannot be read (Incompatible key type 'NoneType')"),
        ("a.b=*x", "cannot be read (found undefined alias)"),
        ("a.b=${", "cannot be read (no viable alternative at input '${')"),
        ("a.b=${x}", "a.b: Interpolation key 'x' not found"),
        ("a.b=${no:x}", "a.b: Unsupported interpolation type no"),
        ("model.num_layers=${model.num_layers}", "Recursive interpolation detected"),
        ("model.num_layers=", "must be a whole number (got None)"),
        ("=3", "=3: not of the form section.key=value"),
        (".a=1", "not of the form section.key=value"),
        ("model..x=1", "not of the form section.key=value"),
        ("model.=1", "not of the form section.key=value"),
        ("", "'': not of the form section.key=value"),
        ("ä.ö=1", "ä.ö=1: Unknown key. Use one of model,"),
        ("model.num-layers=3", "Unknown key. Did you mean `model.num_layers`?"),
        ("model.__class__=1", "Unknown key"),
        ("model.num_layers=010", "YAML would read '010' as another number. Correct or quote"),
        ("model.num_layers=!!python/name:os.system", "the tag "),
        ("preset=../../etc/passwd", "no preset is called '../../etc/passwd'. Use one of:"),
        ("preset=[1]", "no preset is called [1]"),
        ("preset=${x}", "no preset is called '${x}'"),
        ("tokenizer.path=\x01", "not valid YAML ("),
        ("tokenizer.path=\udc80", "not valid YAML ("),
        (f"model.num_layers={'9' * 9999}", "cannot be read (Exceeds the limit (4300 digits)"),
        (f"a.b={'x' * 1_000_000}", "has 1,000,004 characters, more than 65,536"),
        (f"{'a.' * 1000}b=1", "cannot be read (maximum recursion depth"),
    ],
)
def test_what_is_refused(word: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, word)
    (line,) = caught.value.lines()
    assert message in line
    assert line.isprintable()
    assert len(line) < 500


def test_which_keys_a_word_concerns() -> None:
    word = Override("data.stage1[0]", "{}")
    assert word.concerns("data.stage1[0].weight") and word.concerns("data")
    assert not word.concerns("data.stage1[1]") and not word.concerns("data.stage10")
