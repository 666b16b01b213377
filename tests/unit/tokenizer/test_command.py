"""The verb as a user types it, run in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.tokenizer import load_tokenizer
from megatron_chameleon.tokenizer.common.grids import Shapes

Noise = Callable[..., Image.Image]
SMALL = ["model.resolution=8", "model.ch_mult=[1,1]", "model.codebook_size=16"]
SMALL += ["training.steps=2", "training.batch_size=4"]


def run(*words: str) -> int:
    try:
        main(["tokenizer", *words])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


@pytest.fixture
def corpus(tmp_path: Path, noise: Noise) -> Path:
    """Documents with text and images, and the images beside them."""
    lines = []
    for index in range(6):
        noise(index).save(tmp_path / f"{index}.png")
        image = {"type": "image", "image": f"{index}.png"}
        text = {"type": "text", "text": f"a picture of noise, the sum of two and {index}"}
        lines.append(json.dumps({"content": [image, text]}))
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_both_kinds_make_a_folder_that_loads(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(corpus.parent / "tokenizer")
    words = ["--vocab-size", "320", "--image-codes", "16"]
    assert run("text", str(corpus), "--output", output, *words) == 0
    assert "text tokenizer with 320 ids, 16 of them image codes" in capsys.readouterr().out
    assert run("image", str(corpus), "--output", output, "--config", "digits", *SMALL) == 0
    assert "image tokenizer from 6 images (0 dropped)" in capsys.readouterr().out
    tokenizer = load_tokenizer(output)
    assert tokenizer.image is not None and tokenizer.image.resolution == 8


def test_overrides_may_stand_before_options_and_after(corpus: Path) -> None:
    output = str(corpus.parent / "out")
    words = [str(corpus), *SMALL, "--output", output, "model.z_channels=8", "--config", "digits"]
    assert run("image", *words, "--seed", "7") == 0
    details = json.loads((corpus.parent / "out" / "image.json").read_text())
    assert details["model"]["resolution"] == 8 and details["model"]["z_channels"] == 8
    assert details["seed"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text", "none.txt"], "error: none.txt: no such file. Check the path.\n"),
        (["image", "none"], "error: none: no such file. Pass an existing file.\n"),
        (
            ["image", ".", "model.codebok=3"],
            "model.codebok=3: Unknown key. Did you mean `model.codebook_size`?\n",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    sizes = ["--vocab-size", "320", "--image-codes", "16"] if words[0] == "text" else []
    assert run(*words, "--output", str(tmp_path / "out"), *sizes) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith(message) and error.count("\n") == 1


def test_debug_shows_where_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("image", "none", "--output", str(tmp_path / "out"), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("image", "a.png", "--output", "out", "--sede", "3") == 2
    assert "unrecognized arguments: --sede" in capsys.readouterr().err


def test_grids_are_asked_for_with_a_budget(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one the vocabulary is what it was, to the byte."""
    words = ["text", str(corpus), "--vocab-size", "320", "--image-codes", "16", "--output"]
    folder = corpus.parent
    assert run(*words, str(folder / "squares")) == 0
    assert "grids of pictures" not in capsys.readouterr().out
    content = json.loads((folder / "squares" / "vocabulary.json").read_text())
    assert content["format"] == "megatron_chameleon.vocabulary/1"
    assert not {"grids", "end_row"} & content.keys()
    assert run(*words, str(folder / "shaped"), "--image-grids", "16") == 0
    assert "16 of them image codes and 9 grids of pictures, from 8 x 2 to 2 x 8 codes" in (
        capsys.readouterr().out
    )
    tokenizer = load_tokenizer(folder / "shaped", images=False)
    content = json.loads((folder / "shaped" / "vocabulary.json").read_text())
    assert content["format"] == "megatron_chameleon.vocabulary/2"
    assert tokenizer.vocabulary.shapes == Shapes(16)
    ids = tokenizer.text.encode("<grid_4x4> <end_row>")
    assert not {*ids} & {*tokenizer.vocabulary.tokens_beside_codes.tolist()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-grids", "3"], "is too small for a picture of 4:1"),
        (["--image-grids", "0"], "--image-grids: '0' is not a whole number"),
        (["--image-grids", "9", "--largest-ratio", "nan"], "'nan' is not a number between 1"),
        (["--largest-ratio", "2"], "--largest-ratio: has no effect without --image-grids"),
        (["--image-grids", "4000"], "16 image codes, 127 grids and the end of a row"),
    ],
)
def test_grids_that_cannot_be_are_refused(
    corpus: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(corpus.parent / "out"), "--vocab-size", "320", "--image-codes", "16"]
    assert run("text", str(corpus), *output, *words) == 2
    assert message in capsys.readouterr().err
