"""A run on conversations ends with a check of its answers' modalities, in every layout."""

import json
import shutil

import pytest

from conversation_files import write_conversations
from megatron_chameleon.tokenizer.folder import load_tokenizer
from run_command import run_chameleon
from tiny_project import TinyProject


@pytest.fixture(scope="module")
def chat(tiny: TinyProject):
    tokenizer = load_tokenizer(tiny.tokenizer, images=False)
    return write_conversations(tiny.folder / "chat", tokenizer, [[("t", "t"), ("t", "i")]] * 9)


def settings(chat, *more):
    steps = ("training.steps=2", "optimizer.lr_warmup_steps=1", "checkpoint.every_steps=2")
    source = f"[{{prefix: {chat}, weight: 1.0}}]"
    held_out = f"data.validation.sources=[{{prefix: {chat}}}]"
    prompts = "data.validation.modality_prompts=3"
    return (*steps, f"data.stage1={source}", "data.stage2=[]", held_out, prompts, *more)


def check_of(tiny, run):
    folder = tiny.folder / run / "modalities" / "step_00000002"
    lines = (folder / "samples.jsonl").read_text().splitlines()
    answers = [json.loads(line)["token_ids"] for line in lines]
    return json.loads((folder / "modalities.json").read_text()), answers


def test_every_layout_that_can_answer_finds_the_same(tiny, chat):
    """And so does the checkpoint, asked by itself."""
    samples = ("logging.sample_every_steps=2", "logging.sample_prompts=[{text: one}]")
    result = tiny.train("alone", *settings(chat, *samples))
    assert "checking modalities: the model answers 6 prompts" in result.stdout
    found, answers = check_of(tiny, "alone")
    tensor = "parallel.tensor_model_parallel_size=2"
    tiny.train("tensor", *settings(chat, tensor), processes=2)
    run_chameleon("evaluate-modalities", tiny.folder / "alone", "--prompts", 3)
    assert check_of(tiny, "alone") == check_of(tiny, "tensor")
    assert check_of(tiny, "alone") == (found, answers)
    events = (tiny.folder / "alone" / "events.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in events]
    assert [e["text"] for e in told if e["event"] == "modalities"] == found["warnings"] != []
    assert told[-1]["event"] == "finish"
    again = tiny.train("alone", *settings(chat, *samples))  # nothing is left to do
    assert "modalities" not in again.stdout and "sampled" not in again.stdout

    # As a kill leaves it between the last save and what the model is asked behind it.
    file = tiny.folder / "alone" / "samples" / "step_00000002" / "samples.jsonl"
    text = file.read_text()
    shutil.rmtree(tiny.folder / "alone" / "modalities")
    file.unlink()
    tiny.train("alone", *settings(chat, *samples))
    assert check_of(tiny, "alone") == (found, answers) and file.read_text() == text


def test_what_cannot_be_checked_is_said(tiny, chat):
    split = "parallel.pipeline_model_parallel_size=2"
    result = tiny.train("pipeline", *settings(chat, split), processes=2)
    assert "were not checked, because the model is split by pipelines or ZeRO 3" in result.stdout
    assert f"use chameleon evaluate-modalities {tiny.folder}/pipeline" in result.stdout
    unasked = tiny.train("unasked", *settings(chat, "data.validation.modality_prompts=0"))
    assert (
        "modalities" not in unasked.stdout and not (tiny.folder / "unasked" / "modalities").exists()
    )
