"""A tokenizer of another library in place of ours, from its folder to a drawn picture."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_networks import make, save
from PIL import Image

from megatron_chameleon.data.token_files.reader import open_token_file
from megatron_chameleon.tokenizer.folder import fingerprint, load_tokenizer
from run_command import run_chameleon, warm_server
from tiny_project import CONFIG, TinyProject

WORDS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """Forty captioned pictures with Emu3's tokenizer, trained for four steps."""
    warm_server("megatron_chameleon.tokenizer.image.others.emu3")  # imports transformers' models
    folder = tmp_path_factory.mktemp("other")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(40):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        text = {"type": "text", "text": f"a {WORDS[number % 4]} picture, number {number}"}
        content = [text, {"type": "image", "image": f"{number}.png"}]
        lines.append(json.dumps({"content": content}) + "\n")
    documents = folder / "documents.jsonl"
    documents.write_text("".join(lines))
    source, tokenizer = save("emu3", folder / "Emu3-VisionTokenizer"), folder / "tokenizer"
    size = ("--resolution", 16)
    made = run_chameleon("tokenizer", "image", "--from", source, "--output", tokenizer, *size)
    assert "emu3, 315,379 parameters, 64 codes, images of 16 x 16 pixels as 4 x 4" in made.stdout
    # the codebook's size is that of the image tokenizer
    run_chameleon("tokenizer", "text", documents, "--output", tokenizer, "--vocab-size", 384)
    where = ("--tokenizer", tokenizer, "--output", folder / "tokens")
    run_chameleon("preprocess", documents, *where)
    config = folder / "train.yaml"
    config.write_text(CONFIG.format(folder=folder))
    project = TinyProject(folder, documents, tokenizer, folder / "tokens", config)
    project.train("run", "training.steps=4")
    run_chameleon("convert", folder / "run", folder / "exported", "--to", "hf")
    return project


def test_the_token_file_has_the_codes_of_the_library(project: TinyProject) -> None:
    tokenizer = load_tokenizer(project.tokenizer)
    assert tokenizer.image is not None
    image = Image.open(project.folder / "0.png").resize((19, 16), Image.Resampling.LANCZOS)
    middle = np.asarray(image)[None, :, 1:17]  # it covers the square, of which the middle is taken
    rule = tokenizer.image.model.pixel_rule
    pixels = rule.to_floats(torch.tensor(middle).permute(0, 3, 1, 2))
    with torch.inference_mode():
        (codes,) = make("emu3").encode(pixels, torch.tensor([[16, 16]])).image_tokens
    vocabulary = tokenizer.vocabulary
    token_file = open_token_file(project.tokens, tokenizer)
    tokens = token_file.read(0)
    inside = tokens[vocabulary.is_image_code(tokens)]
    np.testing.assert_array_equal(vocabulary.token_ids_to_codes(inside), codes.flatten().numpy())


def test_an_export_carries_the_network_and_comes_back(project: TinyProject) -> None:
    exported, again = project.folder / "exported", project.folder / "again"
    assert fingerprint(exported) == fingerprint(project.tokenizer)
    assert "`emu3`, in `image_tokenizer/`; transformers cannot read" in (
        exported / "README.md"
    ).read_text(encoding="utf-8")
    run_chameleon("convert", exported, again, "--to", "megatron")
    assert fingerprint(again / "tokenizer") == fingerprint(project.tokenizer)

    result = run_chameleon(
        "convert", exported, project.folder / "meta", "--to", "meta", succeeds=False
    )
    assert result.returncode == 2
    assert "network of its image tokenizer is 'emu3', but the format can hold" in result.stderr
    assert not (project.folder / "meta").exists()


def test_transformers_refuses_pictures_that_it_could_not_read(project: TinyProject) -> None:
    from transformers import AutoProcessor, ChameleonForConditionalGeneration

    exported = project.folder / "exported"
    model = ChameleonForConditionalGeneration.from_pretrained(exported)
    processor = AutoProcessor.from_pretrained(exported)
    image = Image.open(project.folder / "0.png")
    inputs = processor(text="<image> a", images=image, return_tensors="pt")
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.isfinite(model(**text).logits).all()
    with pytest.raises(ValueError, match="do not match"):
        model(**inputs)


def test_pictures_are_drawn_and_shown(project: TinyProject) -> None:
    folder = project.folder
    drawn = folder / "drawn"
    words = ("--prompt", "a red picture", "--force", "image", "--output", drawn)
    run_chameleon("generate", folder / "exported", *words, "--seed", 1)
    (picture,) = drawn.rglob("*.png")
    assert Image.open(picture).size == (16, 16)
    run_chameleon("inspect", project.tokens, "--html", folder / "page.html")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 10
    run_chameleon("report", folder / "run", "--output", folder / "report.html")
    assert "<h2" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_does_not_belong_together_is_refused(project: TinyProject, tmp_path: Path) -> None:
    small = project.train("small", "model.seq_length=16", succeeds=False)
    assert small.returncode == 2 and "16" in small.stderr.splitlines()[-1]

    other = shutil.copytree(project.tokenizer, tmp_path / "tokenizer")
    content = json.loads((other / "image.json").read_text())
    content["pixels"]["rescale"] *= 0.9
    (other / "image.json").write_text(json.dumps(content))
    where = ("--tokenizer", other, "--output", tmp_path / "tokens")
    run_chameleon("preprocess", project.documents, *where)
    mixed = f"data.stage1=[{{prefix: {project.tokens}}}, {{prefix: {tmp_path / 'tokens'}}}]"
    result = project.train("mixed", mixed, succeeds=False)
    assert result.returncode == 2
    assert "tokenizer" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there are neither images nor --from FOLDER"),
        (("--resolution", 16, "a.png"), "--resolution: goes only with --from"),
        (("--from", "x", "a.png"), "--from: trains nothing, but a.png is for training"),
        (("--from", "x", "--config", "digits"), "--config is for training"),
        (("--from", "nowhere"), "nowhere: no such folder"),
        (("--from", "."), "config.json: no such file"),
    ],
)
def test_options_that_contradict_each_other(
    words: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    result = run_chameleon(
        "tokenizer", "image", *words, "--output", tmp_path / "out", succeeds=False
    )
    assert result.returncode == 2
    assert message in result.stderr
