"""``chameleon preprocess`` and ``chameleon inspect``, the real commands on a few documents."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.token_files.reader import open_token_file, read_info
from megatron_chameleon.tokenizer.folder import load_tokenizer
from mixed_corpus import write_corpus, write_tokenizer
from places import REPOSITORY


def run(*command):
    """Run a command in its own process. That takes seconds: only where the process matters."""
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
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def documents(tmp_path):
    """150 documents in three chunks; every third has an image, and three of these are unusable."""
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
        assert "error" not in done.stderr and "Traceback" not in done.stderr
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """All kinds of input, 40 to 160 documents each."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 40)


def test_shards_one_after_the_other_are_the_whole(tmp_path, tokenizer_folder, corpus, chameleon):
    out = tmp_path / "out"
    inputs = (*corpus, "--tokenizer", tokenizer_folder, "--output")
    chameleon("preprocess", *inputs, out / "whole")
    script = REPOSITORY / "tools" / "preprocess_data.py"  # the Megatron-style entry point
    done = run(script, *inputs, out / "s", "--shard", "0/7")
    assert done.returncode == 0, done.stderr
    for i in (1, 2, 3, 4, 6):
        chameleon("preprocess", *inputs, out / "s", "--shard", f"{i}/7")
    status = chameleon("preprocess", "--status", "--output", out / "s").splitlines()
    assert [line.split()[2:4] for line in status[5:8]] == [
        ["done", "100%"],
        ["not", "begun"],
        ["done", "100%"],
    ]
    assert status[-1].split()[2:4] == ["6/7", "done"]
    chameleon("preprocess", *inputs, out / "s", "--shard", "5/7")
    counts = [read_info(out / f"s.shard-{i}-of-7").documents for i in range(7)]
    assert sum(counts) == read_info(out / "whole").documents
    printed = chameleon("preprocess", "--merge", "--output", out / "s")
    assert printed.strip().endswith("of 7 shards")
    assert contents(out, "s") == contents(out, "whole")
    open_token_file(out / "s", load_tokenizer(tokenizer_folder)).verify()
    again = chameleon("preprocess", *inputs, out / "s", "--shard", "5/7")
    assert "an earlier run has written it" in again  # a requeued job of the array


def test_a_held_out_share_is_the_same_with_workers_and_shards(
    tmp_path, tokenizer_folder, corpus, chameleon
):
    inputs = (*corpus, "--tokenizer", tokenizer_folder, "--image-cache", tmp_path / "cache")
    out = tmp_path / "out"
    chameleon("preprocess", *inputs, "--output", out / "all")
    split = ("preprocess", *inputs, "--holdout", 0.2, "--output")
    printed = chameleon(*split, out / "one")
    chameleon(*split, out / "two", "--workers", 2)
    for i in range(3):
        chameleon(*split, out / "s", "--shard", f"{i}/3")
    chameleon("preprocess", "--merge", "--output", out / "s")
    for side in ("", "-holdout"):
        one = contents(out, f"one{side}")
        assert len(one) >= 5 and one == contents(out, f"two{side}") == contents(out, f"s{side}")
    assert len(list(out.glob("s*"))) == len(list(out.glob("one*")))  # no shard is left

    def documents_of(name):
        return [token_file.read(i).tobytes() for i in range(len(token_file))]

    found = {}
    for name in ("all", "one", "one-holdout"):
        token_file = open_token_file(out / name, load_tokenizer(tokenizer_folder))
        token_file.verify()
        found[name] = documents_of(name)
    assert sorted(found["one"] + found["one-holdout"]) == sorted(found["all"])
    assert not set(found["one"]) & set(found["one-holdout"])
    counts = f"held out {len(found['one-holdout'])} of {len(found['all'])} documents ("
    assert f"{out}/one-holdout: {counts}" in printed
    info = read_info(out / "one-holdout")
    assert 0 < info.images < info.documents  # pictures and texts
    listed = chameleon("inspect", out / "one-holdout")
    assert f"held out side of --holdout 0.2: {info.documents} of " in listed


def test_merge_names_what_is_missing(tmp_path, tokenizer_folder, documents, chameleon, refused):
    inputs = (documents, "--tokenizer", tokenizer_folder, "--output", tmp_path / "s")
    assert refused("preprocess", "--merge", *inputs[3:]) == (
        f"error: {tmp_path}/s: there are no shards here. "
        "Make them with: chameleon preprocess ... --shard I/N."
    )
    chameleon("preprocess", *inputs, "--shard", "0/2")
    assert f"{tmp_path}/s.shard-1-of-2: no token file here" in refused(
        "preprocess", "--merge", *inputs[3:]
    )
    chameleon("preprocess", *inputs, "--shard", "1/2", "--source", "other")
    assert "s.shard-1-of-2: its inputs or options differ from those of" in refused(
        "preprocess", "--merge", *inputs[3:]
    )
    chameleon("preprocess", *inputs, "--shard", "0/3")
    line = refused("preprocess", "--status", *inputs[3:])
    assert line == (
        f"error: {tmp_path}/s: there are shards of 2 and of 3 here. "
        "Remove those that you do not want."
    )


def test_bad_documents_stop_the_run_only_where_they_are_too_many(
    tmp_path, tokenizer_folder, documents, chameleon, refused
):
    with documents.open("a") as file:
        file.write('{"text": "cut of')
    output = tmp_path / "out" / "t"
    arguments = ("preprocess", documents, "--tokenizer", tokenizer_folder, "--output", output)
    line = refused(*arguments, "--max-bad", 0.02)
    assert line.startswith(
        f"error: {output}: 4 of 151 documents (2.6%) are bad, more than --max-bad 0.02: 1 broken "
        "document, 1 corrupt image, 1 empty image, 1 missing image; "
        f"{output}.partial/tokens.dropped.jsonl lists them, such as {documents}:31: "
    )
    assert not output.with_suffix(".json").exists()
    assert "unfinished" in chameleon("preprocess", "--status", "--output", output)
    line = refused("inspect", output)
    assert line.startswith(
        f"error: {output}: the token file is unfinished: {output}.partial still exists. Finish it"
    )
    printed = chameleon(*arguments, "--max-bad", 0.03)  # resumes at the end
    assert "147 documents" in printed and "4 dropped (1 broken document, 1 corrupt" in printed
    last = json.loads(contents(tmp_path / "out", "t")[".dropped.jsonl"].splitlines()[-1])
    assert last["where"] == f"{documents}:151" and last["source"] == "documents"
    assert last["detail"].startswith("the line is not valid JSON (Unterminated string")


def test_unfinished_work_of_another_command_is_not_thrown_away(
    tmp_path, tokenizer_folder, documents, chameleon, refused
):
    arguments = (
        "preprocess",
        documents,
        "--tokenizer",
        tokenizer_folder,
        "--output",
        tmp_path / "t",
    )
    refused(*arguments, "--max-bad", 0)
    documents.touch()
    assert refused(*arguments) == (
        f"error: {tmp_path}/t.partial: its 147 documents come from other inputs, other "
        "options or another tokenizer. Finish them with their own command, or start again with "
        "--restart."
    )
    assert "147 documents" in chameleon(*arguments, "--restart")
    assert not (tmp_path / "t.partial").exists()


def test_every_document_dropped(tmp_path, tokenizer_folder, refused):
    path, output = tmp_path / "d.jsonl", tmp_path / "out" / "t"
    path.write_text('{"content": [{"type": "image", "image": "none.png"}]}\n' * 2)
    line = refused("preprocess", path, "--tokenizer", tokenizer_folder, "--output", output)
    assert line == (
        f"error: {path}: all 2 documents were dropped (2 missing image); the first: {path}:1: "
        f"{tmp_path}/none.png: no such image file. Paths of images are relative to the file of "
        "documents, or to an --image-root."
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_inspect_shows_what_was_written(tmp_path, tokenizer_folder, documents, chameleon):
    output, page = tmp_path / "tokens", tmp_path / "page.html"
    chameleon("preprocess", documents, "--tokenizer", tokenizer_folder, "--output", output)
    printed = chameleon("inspect", output, "--html", page, "--documents", 4, "--start", 2)
    assert f"{output}: 147 documents, " in printed and f"{page}: 4 documents" in printed
    assert page.read_text().count("<article") == 4
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
    assert refused("inspect", output, "--documents", 0).startswith(
        "error: --documents: '0' is not a whole number between 1 and "
    )
    line = refused("inspect", output, "--html", tmp_path, "--tokenizer", moved)
    assert line.startswith(f"error: {tmp_path}: cannot be written (")


def test_keys_that_nobody_reads_are_listed_or_left_out(tmp_path, tokenizer_folder, capsys):
    """One list for the whole run; a picture among them drops its document unless it is ignored."""
    lines = [{"text": "one", "lang": "en", "n": n, "id": [n], "source": {"w": n}} for n in range(3)]
    lines.append({"text": "two", "mask": "m.png"})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["preprocess", tmp_path / "d.jsonl", "--tokenizer", tokenizer_folder, "--output"]
    main([*map(str, words), str(tmp_path / "a")])
    assert capsys.readouterr().err.count("warning: keys not used: lang, n\n") == 1
    info = read_info(tmp_path / "a")
    assert info.documents == 3 and list(info.sources) == [f'{{"w": {n}}}' for n in range(3)]
    (dropped,) = map(json.loads, (tmp_path / "a.dropped.jsonl").read_text().splitlines())
    assert dropped["detail"].startswith("the key mask holds a picture, and no picture is read")
    main([*map(str, words), str(tmp_path / "b"), "--ignore-keys", "mask,lang"])
    assert "warning: keys not used: n\n" in capsys.readouterr().err
    assert read_info(tmp_path / "b").documents == 4
