"""``chameleon evaluate-modalities``: on checkpoints of any format, on several ranks, and errors."""

import json
import shutil

import pytest

from conversation_files import write_conversations
from megatron_chameleon.tokenizer.folder import load_tokenizer
from run_command import run_chameleon
from tiny_model import tiny_checkpoint, tiny_tokenizer  # noqa: F401


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, tiny_tokenizer):  # noqa: F811
    """Conversations whose answers are a text or an image."""
    path = tmp_path_factory.mktemp("conversations") / "chat"
    conversations = [[("t", "t"), ("t", "i")]] * 5
    return write_conversations(path, load_tokenizer(tiny_tokenizer), conversations)


def test_every_format_and_layout_gives_the_same(tiny_checkpoint, prefix, tmp_path):  # noqa: F811
    run_chameleon("convert", tiny_checkpoint, tmp_path / "hf", "--to", "hf")
    words = ("--data", prefix, "--prompts", 3, "--json")
    alone = run_chameleon("evaluate-modalities", tmp_path / "hf", *words)
    found = json.loads(alone.stdout)
    assert [(c["expected"], c["prompts"], c["asked"]) for c in found["counts"]] == [
        ("text", "held-out", 3),
        ("one image", "held-out", 3),
    ]
    assert all(sum(counts["given"].values()) == 3 for counts in found["counts"])
    assert "written" not in alone.stderr  # an exported folder is left as it is
    run = tmp_path / "run"
    shutil.copytree(tiny_checkpoint, run / "checkpoints" / "step_00000007")
    split = run_chameleon("evaluate-modalities", run, *words, processes=2)
    assert json.loads(split.stdout)["counts"] == found["counts"]
    kept = run / "modalities" / "step_00000007"
    assert json.loads((kept / "modalities.json").read_text())["counts"] == found["counts"]
    assert len((kept / "samples.jsonl").read_text().splitlines()) == 6
    report = run_chameleon("report", run).stdout
    assert "step 7: " in report and "text questions: " in report


def test_without_held_out_conversations_built_in_prompts_are_asked(
    tiny_checkpoint,  # noqa: F811
    tmp_path,
):
    result = run_chameleon("evaluate-modalities", tiny_checkpoint, "--output", tmp_path / "new")
    first, second = result.stdout.splitlines()[:2]
    assert first.startswith("built-in text questions: ") and " of 4 answered with text" in first
    assert second.startswith("built-in drawing requests: ")
    assert (tmp_path / "new" / "modalities.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "error: nowhere: no such folder"),
        (["CHECKPOINT", "--data", "nowhere/at/all"], "error: --data[0].prefix: nowhere/at/all"),
        (["CHECKPOINT", "--prompts", "0"], "error: --prompts: '0' is not a whole number"),
        (["CHECKPOINT", "--output", "PREFIX.bin"], "chat.bin: "),
        (["CHECKPOINT", "--device", "tpu"], "error: --device: invalid choice: 'tpu'"),
    ],
)
def test_errors(tiny_checkpoint, prefix, words, message):  # noqa: F811
    words = [word.replace("PREFIX", str(prefix)) for word in words]
    words = [str(tiny_checkpoint) if word == "CHECKPOINT" else word for word in words]
    result = run_chameleon("evaluate-modalities", *words, succeeds=False)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("error: ") == 1
