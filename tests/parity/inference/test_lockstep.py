"""Answers of several ranks, compared with those of one, and of transformers' layers."""

import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import mixed_requests
import pytest

from megatron_chameleon.checkpoint.formats.hf_model import read_transformers
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.models.transformers_layers import TransformersLayers
from run_command import run_jobs

JOBS = {
    "tp1": (1, None),
    "tp2": (2, None),
    "follower-ends": (2, "follower ends"),
    "leader-ends": (2, "leader ends"),
    "follower-draws": (2, "follower draws"),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lockstep")
    jobs = [
        {
            "name": name,
            "processes": processes,
            "checkpoint": str(tiny_checkpoint),
            "port": free_port(),
            "fault": fault,
        }
        for name, (processes, fault) in JOBS.items()
    ]
    run_jobs("inference/run_lockstep.py", jobs, folder, 120)
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*-[01].json")}


def test_ranks_draw_what_one_rank_and_transformers_draw(
    results: dict[str, Any], tiny_checkpoint: Path
) -> None:
    reader = open_checkpoint(tiny_checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = open_tokenizer(reader, None, Path(scratch))
    model = read_transformers(reader, tokenizer).eval()
    classes = TokenClasses(tokenizer.vocabulary)
    layers = TransformersLayers(model, classes.code_token_ids)
    decoder = ContinuousDecoder(layers, classes, tokenizer.image.codes_per_image)
    expected = mixed_requests.answers(decoder, tokenizer.vocabulary)
    assert len(expected[0]) == 1 + mixed_requests.CANCELS_AFTER_STEPS  # the rest was cancelled
    assert results["tp1-0"] == expected
    assert results["tp2-0"] == expected


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("follower-ends-0", "rank 0 of 2: a step failed"),
        ("leader-ends-1", "rank 1: "),
        ("follower-draws-1", "rank 1: it has drawn other tokens than rank 0. Start all ranks on "),
    ],
)
def test_a_rank_that_is_left_says_why(results: dict[str, Any], rank: str, message: str) -> None:
    assert results[rank].startswith(message)
