"""One run on two processes that reports in every possible way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session

PROMPTS = "[{text: 'a handwritten seven', force: image}, {text: a}]"


def numbers(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records]


def token_ids_of_samples(folder: Path) -> list[list[int]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return [json.loads(line)["token_ids"] for line in lines]


def token_ids_of_checkpoint(run: Path) -> list[list[int]]:
    """The answers of the last checkpoint, read as ``chameleon generate`` reads it."""
    session = Session.load(run)
    options = GenerationOptions(max_tokens=25, seed=1)
    drawn = session.generate([["a handwritten seven"]], replace(options, force=Force.IMAGE))
    return [answer.token_ids for answer in [*drawn, *session.generate([["a"]], options)]]


def test_everything_at_once_and_training_does_not_notice(tiny) -> None:
    folder = tiny.folder / "told"
    result = tiny.train(
        "told",
        "training.steps=6",
        "parallel.tensor_model_parallel_size=2",
        "logging.tensorboard=true",
        "logging.wandb_project=digits",
        "logging.sample_every_steps=3",
        "logging.sample_max_tokens=25",
        f"logging.sample_prompts={PROMPTS}",
        "training.profile_steps=[2,3]",
        "training.profile_all_ranks=true",
        processes=2,
        HOME=str(tiny.folder),  # no key
    )
    for words in ("step 5/6  loss", f"traced {folder}/profile", f"sampled {folder}/samples"):
        assert words in result.stdout

    tiny.train("quiet", "training.steps=6")
    told, quiet = tiny.metrics("told"), tiny.metrics("quiet")
    assert told[0].keys() == quiet[0].keys()
    for key in ("loss", "output_norm", "log_z_image", "grad_norm_attention"):
        assert numbers(told, key) == pytest.approx(numbers(quiet, key), rel=1e-5), key
    assert (folder / "alarms.jsonl").read_text() == ""

    steps = sorted(path.name for path in (folder / "samples").glob("step_*"))
    assert steps == ["step_00000003", "step_00000006"]
    lines = (folder / "samples" / steps[0] / "samples.jsonl").read_text().splitlines()
    drawn, _ = (json.loads(line)["content"] for line in lines)
    assert [part["type"] for part in drawn] == ["image"]
    assert (folder / "samples" / steps[0] / drawn[0]["image"]).is_file()
    assert token_ids_of_checkpoint(folder) == token_ids_of_samples(folder / "samples" / steps[1])
    page = (folder / "samples" / "index.html").read_text()
    assert page.count(f'<img alt="picture {drawn[0]["image"]}" width="') == 2
    assert "<figcaption>step 3</figcaption>" in page and "training.steps" in page  # its command
    assert "a handwritten seven (image)" in page

    traces = sorted(path.name for path in (folder / "profile").iterdir())
    assert traces == ["rank00000_steps_2-3.json", "rank00001_steps_2-3.json"]
    assert any((folder / "tensorboard").iterdir())
    assert list((folder / "wandb").glob("offline-run-*"))
