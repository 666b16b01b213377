"""The card of an exported model: what it says, and that what it tells people to do works."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_chameleon.checkpoint.convert.model_card import model_card
from megatron_chameleon.checkpoint.convert.plan import ConversionOptions, make_target
from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.base import Target
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.tokenizer.common.grids import Shapes
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny_checkpoint, tmp_path_factory.mktemp("card") / "tiny", "hf").destination


@pytest.fixture(scope="module")
def target(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    reader = open_checkpoint(tiny_checkpoint)
    return make_target(reader, "hf", ConversionOptions(), tmp_path_factory.mktemp("target"))


def test_what_the_card_tells_people_to_do_works(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(exported.parent)
    card = (exported / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(names["images"]) == len(names["texts"]) == 1
    assert names["images"][0].size == (8, 8)
    assert capsys.readouterr().out.startswith("A tree is")
    assert names["model"].generation_config.temperature == 0.7


def test_model_hubs_can_read_the_header(exported: Path) -> None:
    _, header, body = (exported / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["license"] == "unknown" and fields["library_name"] == "transformers"
    assert body.lstrip().startswith("# tiny\n")


def test_shares_are_those_of_the_config_and_names_reveal_no_folders(target: Target) -> None:
    config = Config()
    config.data.stage1 = [SourceConfig("/home/me/web", weight=3), SourceConfig("x/books", weight=1)]
    config.data.stage2 = [SourceConfig("/secret/q", name="a|b <i>\n# c")]
    config.data.stage2_share = 0.4
    card = model_card(replace(target, config=config), "mine")
    assert "| web | 75.0% | 45.0% |\n| books | 25.0% | 15.0% |\n| a_b _i___ c |  | 40.0% |" in card
    assert "/home" not in card and "secret" not in card


def test_a_source_without_a_training_config_has_a_card_too(target: Target) -> None:
    card = model_card(replace(target, config=None), 'a"b/../c')
    assert "## Training" not in card and "## Data" not in card
    assert 'Session.load("a_b_.._c")' in card


def test_a_model_whose_images_keep_their_shape_says_so(target: Target) -> None:
    tokenizer, shapes = target.tokenizer, Shapes(16)
    assert tokenizer.image is not None
    vocabulary = replace(tokenizer.vocabulary, grids=shapes.grids, end_row=0)
    image = ImageTokenizer(tokenizer.image.model, shapes=shapes)
    shaped = replace(tokenizer, vocabulary=vocabulary, image=image)
    card = model_card(replace(target, tokenizer=shaped), "mine")
    assert "keeps its shape: 9 grids, from 8 x 2 to 2 x 8 codes of" in card
    assert "The processor of transformers knows squares alone" in card
    assert "knows squares alone" not in model_card(target, "mine")
