from pathlib import Path

import pytest

from megatron_chameleon.config.names import preset_names
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.tokenizer.image.config import PRESETS, load_image_config


def test_presets() -> None:
    assert preset_names(PRESETS) == ["chameleon_512", "digits"]
    paper = load_image_config().model
    assert (paper.resolution, paper.codebook_size, paper.embed_dim, paper.z_channels) == (
        512,
        8192,
        256,
        256,
    )
    assert (paper.base_channels, paper.ch_mult, paper.num_res_blocks) == (128, [1, 1, 2, 2, 4], 2)
    assert load_image_config().training.commitment_beta == 0.25
    assert load_image_config("digits").model.resolution < 64


def test_overrides_go_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {resolution: 64, ch_mult: [1, 2]}\ntraining: {lr: 1e-3, steps: 7}\n")
    config = load_image_config(path, ["training.steps=9", "model.ch_mult=[1,2,4]"])
    assert config.model.resolution == 64 and config.model.ch_mult == [1, 2, 4]
    assert config.training.lr == 1e-3 and config.training.steps == 9
    assert config.model.num_res_blocks == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.step=9"], r"training.step=9: Unknown key. Did you mean `training.steps`\?"),
        (["steps=9"], r"^steps=9: Unknown key. Use one of model, training\."),
        (["training.steps=many"], r"training.steps must be a whole number \(got 'many'\)"),
        (["training.steps=0"], "training.steps: 0 is not between 1 and 1,000,000,000. Use a"),
        (["training.shift=-0.1"], r"training.shift: -0.1 is not between 0 and 1"),
        (["training.scale=1"], r"training.scale: 1.0 is not 0 or more and below 1"),
        (["training.l1_weight=0", "training.l2_weight=0"], "l1_weight and l2_weight are both 0"),
        (["model.base_channels=48"], "48 is not a multiple of 32"),
        (
            ["training.discriminator_weight=1", "model.resolution=16"],
            "3 layers need images of 24 pixels, model.resolution is 16. Use fewer",
        ),
        (["model.quantizer=fsq"], "'fsq' is not one of vq, lfq, ibq"),
        (
            ["model.quantizer=lfq", "model.codebook_size=1000"],
            "1000 codes, but lfq has two for each of the 32 .*Use model.embed_dim=10 and model.code"
            "book_size=1024",
        ),
        (
            ["model.quantizer=ibq", "training.codebook=ema"],
            "ema is for model.quantizer=vq, not ibq",
        ),
        (["training.perceptual=vgg"], "'vgg' is not one of none, auto, lpips, spectral, wavelet"),
        (["training.perceptual=lpips"], "perceptual_backbone names no file. Give the file of torc"),
        (
            ["training.perceptual=spectral", "model.resolution=4"],
            "spectral needs images of 8 pixels, model.resolution is 4. Use another",
        ),
    ],
)
def test_what_cannot_work_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_image_config("digits", words)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_there_is_named_with_the_presets() -> None:
    with pytest.raises(
        ConfigError, match=r"^digit: no such config file. Did you mean digits\? .*_512, digits\.$"
    ):
        load_image_config("digit")


def test_a_file_with_an_unknown_key_or_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {codebok_size: 64}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: .*Did you mean `model.codebook_size`\?"):
        load_image_config(path)
    path.write_text("model: [\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:2: not valid YAML"):
        load_image_config(path)
    path.write_text("just words\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: "):
        load_image_config(path)
