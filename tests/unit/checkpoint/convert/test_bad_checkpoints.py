"""Damaged, foreign and malicious checkpoints give one clear line each, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chameleon.checkpoint.convert import partial_folder as partial_module
from megatron_chameleon.checkpoint.convert import plan as plan_module
from megatron_chameleon.checkpoint.convert.plan import plan_conversion
from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.errors import ChameleonError, CheckpointError, ConfigError
from meta_files import MetaModel, load_shards, random_shards, write_meta

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def hf_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of several shards with an index, which tests must not change."""
    folder = tmp_path_factory.mktemp("bad") / "hf"
    convert(tiny_checkpoint, folder, "hf", shard_bytes=60_000, verify=False)
    return folder


@pytest.fixture(scope="module")
def meta_folder(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two of Meta's shards, which tests must not change."""
    model = MetaModel(shards=2, norm_groups=2)
    folder = tmp_path_factory.mktemp("bad_meta") / "models" / "30b"
    return write_meta(folder, model, random_shards(model), tiny_tokenizer)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change_shard(folder: Path, name: str, change: Callable[[dict], None]) -> None:
    path = shard_of(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


NORM = "model.norm.weight"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def misplace_a_tensor(index: dict) -> None:
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][NORM] = next(f for f in files if f != index["weight_map"][NORM])


HF_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (
        lambda f: cut(shard_of(f, NORM)),
        r"model-0\d+-of-0\d+\.safetensors: is damaged or not a safetensors file",
    ),
    "missing shard": (
        lambda f: shard_of(f, NORM).unlink(),
        r"1 of the \d+ files with weights are missing, such as model-0\d+-of-0\d+\.safetensors\. F",
    ),
    "wrong index": (
        lambda f: change_json(f / INDEX, misplace_a_tensor),
        rf"holds {NORM}, which the index places in|says that {NORM} is in .* where it is not",
    ),
    "index without the tensor": (
        lambda f: change_json(f / INDEX, lambda c: c["weight_map"].pop(NORM)),
        rf"holds {NORM}, which the index does not list",
    ),
    "index that leads away": (
        lambda f: change_json(f / INDEX, lambda c: c["weight_map"].update({NORM: "../x"})),
        r"names '\.\./x' for model\.norm\.weight, which is not in the folder",
    ),
    "no index": (lambda f: (f / INDEX).write_text("{}"), "is not an index of safetensors files"),
    "extra key": (
        lambda f: (
            change_shard(f, NORM, lambda t: t.update({"lm_head.bias": torch.zeros(3)})),
            change_json(
                f / INDEX, lambda c: c["weight_map"].update({"lm_head.bias": c["weight_map"][NORM]})
            ),
        ),
        r"the tensor lm_head\.bias \[3\] has no place in a Chameleon model",
    ),
    "missing key": (
        lambda f: (
            change_shard(f, NORM, lambda t: t.pop(NORM)),
            change_json(f / INDEX, lambda c: c["weight_map"].pop(NORM)),
        ),
        rf"the tensor {NORM} is missing",
    ),
    "wrong shape": (
        lambda f: change_shard(f, NORM, lambda t: t.update({NORM: torch.ones(32)})),
        rf"{NORM} is \[32\], its config says \[48\]",
    ),
    "other architecture": (
        lambda f: change_json(f / "config.json", lambda c: c.update(model_type="llama")),
        r"config\.json: model_type is 'llama', not 'chameleon'",
    ),
    "tied embeddings": (
        lambda f: change_json(f / "config.json", lambda c: c.update(tie_word_embeddings=True)),
        r"tie_word_embeddings is True, and only False is supported",
    ),
    "no config": (
        lambda f: change_json(f / "config.json", lambda c: c.pop("num_hidden_layers")),
        r"config\.json: num_hidden_layers is missing",
    ),
    "no decoder": (
        lambda f: shutil.rmtree(f / "image_tokenizer"),
        r"lack the VQ decoder.* --tokenizer",
    ),
    "no tokenizer": (
        lambda f: (
            shutil.rmtree(f / "image_tokenizer"),
            [(f / name).unlink() for name in ("text.model", "vocabulary.json", "tokenizer.json")],
        ),
        r"has no tokenizer: neither tokenizer\.json nor vocabulary\.json\. Copy tokenizer\.json",
    ),
    "another encoder": (
        lambda f: change_shard(
            f,
            "model.vqmodel.quant_conv.bias",
            lambda t: t["model.vqmodel.quant_conv.bias"].add_(1.0),
        ),
        r"its image tokenizer is not the encoder among its weights: 1 of 57 .* quant_conv\.bias",
    ),
}


@pytest.mark.parametrize("name", HF_DAMAGES)
def test_damaged_hugging_face_folders(hf_folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = HF_DAMAGES[name]
    copy = Path(shutil.copytree(hf_folder, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(copy, tmp_path / "out", "megatron")
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


class _Runs:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


def change_pth(path: Path, change: Callable[[dict], None]) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


W1 = "layers.1.feed_forward.w1.weight"
META_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (
        lambda f: cut(f / "consolidated.01.pth"),
        r"01\.pth: is not a complete zip archive",
    ),
    "missing shard": (
        lambda f: (f / "consolidated.01.pth").unlink(),
        r"1 of 2 shards are missing, the first is consolidated\.01\.pth",
    ),
    "other number": (
        lambda f: (f / "consolidate_params.json").write_text('{"model_parallel_size": 1}'),
        r"1 of 1 shards are missing, the first is consolidated\.pth",
    ),
    "two models": (
        lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.pth"),
        r"holds consolidated\.pth and consolidated\.00\.pth",
    ),
    "malicious": (
        lambda f: torch.save({"x": _Runs(f.parents[2] / "ran")}, f / "consolidated.00.pth"),
        r"consolidated\.00\.pth: would run code when it is loaded \(it asks for",
    ),
    "no tensors": (
        lambda f: torch.save([1, 2], f / "consolidated.00.pth"),
        r"holds a list, not tensors by name",
    ),
    "extra key": (
        lambda f: change_pth(
            f / "consolidated.01.pth", lambda t: t.update({"output.bias": torch.ones(2)})
        ),
        r"consolidated\.01\.pth: the tensor output\.bias \[2\] has no place",
    ),
    "missing key": (
        lambda f: change_pth(f / "consolidated.01.pth", lambda t: t.pop(W1)),
        rf"consolidated\.01\.pth: the tensor {W1} is missing",
    ),
    "wrong shape": (
        lambda f: change_pth(f / "consolidated.01.pth", lambda t: t.update({W1: torch.ones(3, 4)})),
        rf"{W1} is \[3, 4\], its config says \[24, 64\]",
    ),
    "norms that differ": (
        lambda f: change_pth(f / "consolidated.01.pth", lambda t: t["norm.weight"].add_(1)),
        r"norm\.weight: differs between the 2 shards",
    ),
    "several dtypes": (
        lambda f: change_pth(
            f / "consolidated.01.pth", lambda t: t.update({W1: t[W1].to(torch.float16)})
        ),
        r"the parts of decoder\.layers\.mlp\.linear_fc1\.weight\[1\] are float16 and float32",
    ),
    "other vocabulary": (
        lambda f: change_json(f / "params.json", lambda c: c["model"].update(vocab_size=32000)),
        r"vocab_size is 32000, but the tensors have 320 tokens",
    ),
    "malicious tokenizer": (
        lambda f: torch.save(_Runs(f.parents[2] / "ran"), f.parents[1] / "tokenizer/vqgan.ckpt"),
        r"vqgan\.ckpt: would run code when it is loaded",
    ),
    "no tokenizer": (
        lambda f: shutil.rmtree(f.parents[1] / "tokenizer"),
        r"there is no text_tokenizer\.json, nor in the two folders above",
    ),
}


@pytest.mark.parametrize("name", META_DAMAGES)
def test_damaged_meta_folders(meta_folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = META_DAMAGES[name]
    shutil.copytree(meta_folder.parents[1], tmp_path / "copy")
    source = tmp_path / "copy/models/30b"
    damage(source)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(source, tmp_path / "out", "hf")
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]  # in particular, nothing "ran"


@pytest.mark.parametrize(
    ("files", "given", "said"),
    [
        ([], "gone", "gone: no such folder. Give a checkpoint or a run folder."),
        (["x/"], "x", "x: is empty. Give a checkpoint or a run folder."),
        (["file"], "file", "is a file, and checkpoints are folders. Give a checkpoint or"),
        (["m/config.json"], "m/config.json", "are folders. Give its folder, "),
        (["t.idx", "t.bin"], "t", "t: is a token file, which has no weights. Give"),
        (["d/t.idx"], "d", "d: holds token files, which have no weights. Give that of a model."),
        (["d/vocabulary.json"], "d", "d: is a tokenizer folder, which has no weights. Give that"),
        (["d/b.jsonl", "d/c", "d/a/", "d/e"], "d", "holds a, b.jsonl, c, ..., and has no state"),
        (["d/b.jsonl"], "d", r"no config.json (hf), no params.json (meta) and no latest or"),
        (["d/7b/params.json"], "d", "d/7b?"),
        (["d/snapshots/abc/config.json"], "d", "d/snapshots/abc?"),
    ],
)
def test_what_is_no_checkpoint_is_said_to_be_what_it_is(
    tmp_path: Path, files: list[str], given: str, said: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / given, tmp_path / "out", "hf")
    assert said in str(caught.value)


def test_shards_are_for_meta_only(hf_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shards 2: is for --to meta, and this is --to hf"):
        convert(hf_folder, tmp_path / "out", "hf", shards=2)
    with pytest.raises(ConfigError, match=r"--shards 0: is below 1"):
        convert(hf_folder, tmp_path / "out", "meta", shards=0)


@pytest.mark.parametrize("to", ["megatron", "deepspeed", "hf", "meta"])
def test_a_full_disk_and_an_existing_destination(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    plan = plan_conversion(hf_folder, tmp_path / "out", to)
    usage = shutil.disk_usage(tmp_path)._replace(free=plan.total_bytes - 1)
    with monkeypatch.context() as patch:
        patch.setattr(plan_module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match=r"disk full: [\d,]+ bytes are free, [\d,]+ are"):
            convert(hf_folder, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        convert(hf_folder, tmp_path / "out", to)


@pytest.mark.parametrize("to", ["megatron", "deepspeed", "hf", "meta"])
def test_a_failing_disk_leaves_nothing(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    def full(path: str, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(partial_module.os, "fsync", full)
    with pytest.raises(ChameleonError, match=r"cannot be written .*No space left"):
        convert(hf_folder, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_what_an_interrupted_conversion_left_is_cleared(hf_folder: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    (partial / "new").mkdir(parents=True)
    (partial / "new" / "consolidated.pth").write_bytes(b"half")
    lines: list[str] = []
    convert(hf_folder, tmp_path / "out", "meta", shards=2, progress=lines.append)
    assert lines[0] == f"removed what an interrupted conversion left in {partial}"
    assert len(load_shards(tmp_path / "out")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_conversions_into_one_folder_are_refused(hf_folder: Path, tmp_path: Path) -> None:
    with (
        partial_module.partial_folder(tmp_path / "out", lambda line: None),
        pytest.raises(CheckpointError, match="another conversion is writing it"),
    ):
        convert(hf_folder, tmp_path / "out", "meta")
