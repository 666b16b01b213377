"""``--tokenizer`` and ``--start-from`` with folders of models, by the real command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.cli.main import main

OURS = ("chameleon.json", "image_tokenizer", "text.model", "vocabulary.json", "SHA256SUMS")
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def folders(
    tiny_checkpoint: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders that have the same tokenizer, by what they are."""
    place = tmp_path_factory.mktemp("models")
    for kind in ("hf", "meta"):
        convert(tiny_checkpoint, place / kind, kind, verify=False)
    published = Path(shutil.copytree(place / "hf", place / "published"))
    for name in OURS:
        path = published / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    run = tiny_checkpoint.parent.parent
    return {
        **{"tokenizer": tiny_tokenizer, "checkpoint": tiny_checkpoint, "run": run},
        **{name: place / name for name in ("hf", "meta", "published")},
        "tokenizer of meta": place / "meta" / "tokenizer",
    }


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    Image.radial_gradient("L").resize((8, 8)).save(tmp_path / "a.png")
    picture = {"type": "image", "image": "a.png"}
    text = {"type": "text", "text": "a handwritten two"}
    path = tmp_path / "documents.jsonl"
    lines = [{"content": [text, picture]}, {"content": [picture, text]}, {"text": "five"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that ends with exit code 2, and returns its one line."""

    def run(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("error: ")]
        assert caught.value.code == 2
        return line

    return run


def test_the_tokenizer_of_any_model_gives_the_same_tokens(
    folders: dict[str, Path], documents: Path, tmp_path: Path
) -> None:
    written = {}
    for name, folder in folders.items():
        prefix = tmp_path / "out" / name
        main(["preprocess", str(documents), "--tokenizer", str(folder), "--output", str(prefix)])
        written[name] = Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
        assert json.loads(Path(f"{prefix}.json").read_text())["tokenizer"] == str(folder)
    assert len(set(written.values())) == 1


def test_what_names_a_model_as_its_tokenizer_can_be_read_merged_and_filtered(
    folders: dict[str, Path],
    documents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--tokenizer", str(folders["published"]), "--output", str(tmp_path / "t")]
    for shard in ("0/2", "1/2"):
        main(["preprocess", str(documents), *words, "--shard", shard])
    main(["preprocess", "--merge", *words[2:]])
    main(["inspect", str(tmp_path / "t"), "--html", str(tmp_path / "page.html")])
    assert f"tokenizer {folders['published']}" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "16 image codes, which the tokenizer cannot draw, as it has no decoder: " in page
    limit = ["--min-tokens", "2", "--tokenizer", str(folders["published"]), "--dry-run"]
    main(["data", "filter", str(documents), *limit])
    assert capsys.readouterr().out.splitlines()[-1].startswith("kept")


def test_pictures_need_an_image_tokenizer(
    folders: dict[str, Path], documents: Path, tmp_path: Path, refused: Refused
) -> None:
    text_alone = Path(shutil.copytree(folders["published"], tmp_path / "text_alone"))
    file = text_alone / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if "vqmodel" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    said = f"documents.jsonl:1: the document has 1 image, and {text_alone} has no image tokenizer. "
    words = ["--tokenizer", text_alone, "--output", tmp_path / "t"]
    line = refused("preprocess", documents, *words)
    assert f"{said}Give --tokenizer a folder that has one, or train one with: chameleon" in line
    file.unlink()  # a folder from which only the tokenizer was fetched
    assert said in refused("preprocess", documents, *words)
    (tmp_path / "text.jsonl").write_text('{"text": "five"}\n')
    main(["preprocess", str(tmp_path / "text.jsonl"), *map(str, words)])


def test_other_things_are_no_tokenizers(documents: Path, tmp_path: Path, refused: Refused) -> None:
    remedy = "Give a tokenizer folder, or that of a model or a run, whose tokenizer is taken."
    (tmp_path / "empty").mkdir()
    for path, what in (
        (documents, "is a file, not a folder"),
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "has neither vocabulary.json nor a model's files"),
    ):
        words = ["--tokenizer", path, "--output", tmp_path / "t"]
        assert refused("preprocess", documents, *words) == f"error: {path}: {what}. {remedy}"
    other = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "empty" / "config.json").write_text(json.dumps(other))
    words = ["--tokenizer", tmp_path / "empty", "--output", tmp_path / "t"]
    assert f"{tmp_path / 'empty'}" in refused("preprocess", documents, *words)


def test_configs_that_inherit_are_inspected_with_their_weights(
    folders: dict[str, Path],
    documents: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    published, prefix = str(folders["published"]), str(tmp_path / "t")
    main(["preprocess", str(documents), "--tokenizer", published, "--output", prefix])
    config = tmp_path / "train.yaml"
    values = {
        "data": {"stage1": [{"prefix": prefix}]},
        "training": {"epochs": 4},
        "logging": {"run_dir": str(tmp_path / "run")},
    }
    config.write_text(yaml.safe_dump(values))
    for words in (["inspect", config], ["data", "audit", config, "--step", "1"]):
        line = refused(*words)
        assert line.startswith("error: tokenizer.path: not set. Give the folder that ")
        assert line.endswith(" or --start-from with weights to inherit it from.")
        capsys.readouterr()
        main([*map(str, words), "--start-from", published])
        out = capsys.readouterr().out
        assert "64 tokens" in out  # the sequence length is that of the weights
    assert not (tmp_path / "run").exists()
    for path, kind in ((prefix, "a token file"), (documents, "an input")):
        assert f"{kind}, and only a config" in refused("inspect", path, "--start-from", published)
