"""``chameleon preprocess`` and ``chameleon inspect``, the real commands on a few documents."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from PIL import Image
from safetensors.torch import save_file

from megatron_chameleon.cli.main import main
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.tokenizer.image import FORMAT, IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE
from megatron_chameleon.tokenizer.text_training import train_text_tokenizer
from megatron_chameleon.tokenizer.vqgan import Vqgan, VqganConfig

REPOSITORY = Path(__file__).parents[2]


def run(*command):
    """Run a command of its own process: seconds, so only where the process matters."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def chameleon(capsys):
    """Runs a verb in this process and returns what it prints."""

    def run_verb(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run_verb


@pytest.fixture
def refused(capsys):
    """Runs a verb that must end with exit code 2 and returns its one line."""

    def run_verb(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run_verb


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_text_tokenizer(["a handwritten seven", "two and three is five"] * 20, folder, 340, 32)
    config = VqganConfig(
        resolution=16,
        base_channels=32,
        ch_mult=[1, 1, 1],
        num_res_blocks=1,
        z_channels=8,
        embed_dim=8,
        codebook_size=32,
    )
    torch.manual_seed(0)
    save_file(Vqgan(config).state_dict(), folder / IMAGE_WEIGHTS_FILE)
    (folder / IMAGE_CONFIG_FILE).write_text(json.dumps({"format": FORMAT, "model": asdict(config)}))
    return folder


@pytest.fixture
def documents(tmp_path):
    """150 documents, three chunks; every third has an image, of which three are unusable."""
    noise = np.random.default_rng(0)
    broken = {30: None, 60: b"", 90: b"no picture"}
    lines = []
    for i in range(150):
        content = [{"type": "text", "text": f"number {i} " + "seven " * (i % 7)}]
        if i % 3 == 0:
            content.append({"type": "image", "image": f"{i}.png"})
            pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            if i not in broken:
                Image.fromarray(pixels).save(tmp_path / f"{i}.png")
            elif broken[i] is not None:
                (tmp_path / f"{i}.png").write_bytes(broken[i])
        lines.append(json.dumps({"id": f"doc-{i}", "content": content}))
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def contents(folder, prefix):
    return {p.name.removeprefix(prefix): p.read_bytes() for p in folder.glob(f"{prefix}.*")}


def test_workers_do_not_change_a_byte(tmp_path, tokenizer_folder, documents):
    out = tmp_path / "out"
    for workers in (1, 2):
        done = run(
            *("-m", "megatron_chameleon", "preprocess", documents),
            *("--tokenizer", tokenizer_folder, "--output", out / f"w{workers}"),
            *("--workers", workers),
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert f"{out}/w{workers}: 147 documents, " in done.stdout
        assert "47 images" in done.stdout and "documents/s" in done.stdout
        assert "3 dropped (1 corrupt image, 1 empty image, 1 missing image; listed" in done.stdout
    one, two = contents(out, "w1"), contents(out, "w2")
    assert sorted(one) == [".bin", ".documents", ".dropped.jsonl", ".idx", ".images", ".json"]
    assert one == two

    dropped = [json.loads(line) for line in one[".dropped.jsonl"].splitlines()]
    assert [(d["id"], d["where"], d["reason"]) for d in dropped] == [
        ("doc-30", f"{documents}:31", "missing image"),
        ("doc-60", f"{documents}:61", "empty image"),
        ("doc-90", f"{documents}:91", "corrupt image"),
    ]
    tokenizer = load_tokenizer(tokenizer_folder)
    dataset = IndexedDataset(str(out / "w1"))
    kept = [i for i in range(150) if i not in (30, 60, 90)]
    assert len(dataset) == len(kept)
    for position, i in enumerate(kept):
        text = f"number {i} " + "seven " * (i % 7)
        assert tokenizer.text.decode(dataset[position]) == text
        codes = tokenizer.vocabulary.is_image_code(dataset[position]).sum()
        assert codes == (16 if i % 3 == 0 else 0)


def test_shards_are_the_whole_dealt_out(tmp_path, tokenizer_folder, documents, chameleon):
    arguments = (documents, "--tokenizer", tokenizer_folder, "--output", tmp_path / "s")
    script = REPOSITORY / "tools" / "preprocess_data.py"  # the Megatron-style entry point
    done = run(script, *arguments, "--shard", "0/2")
    assert done.returncode == 0, done.stderr
    chameleon("preprocess", *arguments, "--shard", "1/2")
    tokenizer = load_tokenizer(tokenizer_folder)
    for i in range(2):
        shard = IndexedDataset(str(tmp_path / f"s.shard-{i}-of-2"))
        numbers = [int(tokenizer.text.decode(doc).split()[1]) for doc in shard[0 : len(shard)]]
        assert numbers == [n for n in range(i, 150, 2) if n not in (30, 60, 90)]


def test_error_leaves_the_old_output_and_no_other_file(
    tmp_path, tokenizer_folder, documents, chameleon, refused
):
    output = tmp_path / "out" / "tokens"
    arguments = ("preprocess", documents, "--tokenizer", tokenizer_folder, "--output", output)
    chameleon(*arguments)
    before = contents(tmp_path / "out", "tokens")
    with documents.open("a") as file:
        file.write('{"text": "cut of')
    for workers in (1, 2):
        line = refused(*arguments, "--workers", workers)
        assert line.startswith(f"error: {documents}:151: not a line of JSON (Unterminated string")
        assert line.endswith("Mend or remove the line.")
        assert contents(tmp_path / "out", "tokens") == before
        assert len(list((tmp_path / "out").iterdir())) == len(before)


def test_every_document_dropped(tmp_path, tokenizer_folder, refused):
    path, output = tmp_path / "d.jsonl", tmp_path / "out" / "t"
    path.write_text('{"content": [{"type": "image", "image": "none.png"}]}\n' * 2)
    line = refused("preprocess", path, "--tokenizer", tokenizer_folder, "--output", output)
    assert line == (
        f"error: {path}: all 2 documents were dropped (2 missing image), the first for "
        f"{tmp_path}/none.png: no such image file. Check the images; paths are relative to the "
        "file of documents."
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_inspect_shows_what_was_written(tmp_path, tokenizer_folder, documents, chameleon):
    output, page = tmp_path / "tokens", tmp_path / "page.html"
    chameleon("preprocess", documents, "--tokenizer", tokenizer_folder, "--output", output)
    printed = chameleon("inspect", output, "--html", page, "--documents", 4, "--start", 2)
    assert f"{output}: 147 documents, " in printed and f"{page}: 4 documents" in printed
    assert page.read_text().count("<article>") == 4
    assert page.read_text().count("data:image/png;base64,") == 1  # documents 2, 3, 4, 5


def test_inspect_names_what_is_wrong(tmp_path, tokenizer_folder, documents, chameleon, refused):
    output, page = tmp_path / "tokens", tmp_path / "page.html"
    folder = shutil.copytree(tokenizer_folder, tmp_path / "before")
    chameleon("preprocess", documents, "--tokenizer", folder, "--output", output)
    moved = folder.rename(tmp_path / "after")
    assert refused("inspect", output, "--html", page) == (
        f"error: {folder}: no such folder. Name the folder with --tokenizer DIR."
    )
    chameleon("inspect", output, "--html", page, "--tokenizer", moved)
    assert page.is_file()
    assert "147 documents" in chameleon("inspect", output)  # a summary needs no tokenizer
    assert refused("inspect", output, "--start", 147) == (
        f"error: --start: 147, but {output} has 147 documents. Give a number from 0 to 146."
    )
    assert refused("inspect", output, "--documents", 0).startswith("error: --documents: 0 is less")
    line = refused("inspect", output, "--html", tmp_path, "--tokenizer", moved)
    assert line.startswith(f"error: {tmp_path}: cannot be written (")
