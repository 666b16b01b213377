"""The trained model on one rank and on several, compared with transformers' Chameleon, in fp32."""

import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import mixed_requests
import pytest
import torch

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.checkpoint.loading.transformers_model import read_transformers
from megatron_chameleon.config.schema import ModelConfig, TrainingConfig
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.models.transformers_layers import TransformersLayers
from megatron_chameleon.inference.session import Session
from run_command import run_jobs
from tiny_model import (
    VOCAB_SIZE,
    exported_logits,
    random_tensors,
    random_token_ids,
    write_checkpoint,
)

# fp32 is precise to 6e-8, and the logits reach about 4. The project promises 1e-5.
TOLERANCE = 1e-5
TOKENS, LENGTHS = 24, [5, 9]

MODELS = {
    "mha-pre": {"norm_order": "pre", "num_attention_heads": 6},
    "gqa-swin": {"norm_order": "swin", "num_query_groups": 3, "qk_norm_groups": 1},
}
# 3 processes: the vocabulary of 320 tokens is not divisible by them
JOBS = [
    ("mha-pre", "megatron", 1, False),
    ("mha-pre", "megatron", 3, True),
    ("mha-pre", "hf", 2, False),
    ("gqa-swin", "megatron", 3, False),
    ("gqa-swin", "meta", 3, True),
]
SAMPLED = (JOBS[0], JOBS[1])


LOCKSTEP_JOBS = {
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
def results(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, tiny_checkpoint: Path
) -> Path:
    """A folder with the logits of transformers, MODEL.pt, and of each job and rank."""
    folder = tmp_path_factory.mktemp("cached")
    token_ids = random_token_ids(TOKENS)
    torch.save(token_ids, folder / "token_ids.pt")
    for name, values in MODELS.items():
        sizes = {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 42, "seq_length": 32}
        model = ModelConfig(**{**sizes, "num_attention_heads": 6, **values})
        checkpoint = folder / f"{name}-megatron" / "step_00000007"
        write_checkpoint(checkpoint, model, random_tensors(model, VOCAB_SIZE), tiny_tokenizer)
        for form in {"hf", *(form for job, form, *_ in JOBS if job == name)} - {"megatron"}:
            convert(checkpoint, folder / f"{name}-{form}", form)
        torch.save(exported_logits(folder / f"{name}-hf", token_ids), folder / f"{name}.pt")
    jobs = [
        {
            "program": "run_cached",
            "name": job_name(*job),
            "processes": job[2],
            "checkpoint": str(folder / f"{job[0]}-{job[1]}"),
            "token_ids": str(folder / "token_ids.pt"),
            "lengths": LENGTHS,
            "sequence_parallel": job[3],
            "samples": job in SAMPLED,
        }
        for job in JOBS
    ]
    jobs += [
        {
            "program": "run_lockstep",
            "name": name,
            "processes": processes,
            "checkpoint": str(tiny_checkpoint),
            "port": free_port(),
            "fault": fault,
        }
        for name, (processes, fault) in LOCKSTEP_JOBS.items()
    ]
    run_jobs("inference/run_ranks.py", jobs, folder, 300)
    return folder


def job_name(model: str, form: str, processes: int, sequence_parallel: bool) -> str:
    return f"{model}-{form}-tp{processes}{'-sp' if sequence_parallel else ''}"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job_name(*job))
def test_every_rank_reads_what_transformers_reads(
    results: Path, job: tuple[str, str, int, bool]
) -> None:
    model, _, processes, _ = job
    expected = torch.load(results / f"{model}.pt")
    assert expected.abs().max() > 1  # logits that differ from each other
    first = torch.load(results / f"{job_name(*job)}-0.pt")
    assert first["logits"].shape == (2, TOKENS, VOCAB_SIZE)  # no padding
    for row, length in enumerate(LENGTHS):
        difference = first["logits"][row, length - 1 :] - expected[row, length - 1 :]
        assert difference.abs().max() <= TOLERANCE
    assert (first["codes"] - first["same_codes"]).abs().max() <= TOLERANCE
    for rank in range(1, processes):  # to the last bit: otherwise the ranks would draw apart
        other = torch.load(results / f"{job_name(*job)}-{rank}.pt")
        for name, values in first.items():
            assert values.equal(other[name]) or (
                values.isnan().any() and values.nan_to_num().equal(other[name].nan_to_num())
            )


def test_training_samples_of_several_ranks_are_those_of_generate(results: Path) -> None:
    written = [
        [json.loads(line)["token_ids"] for line in file.read_text().splitlines()]
        for job in SAMPLED
        for file in (results / job_name(*job) / "samples").rglob("samples.jsonl")
    ]
    session = Session.load(results / "mha-pre-megatron")
    options = [
        GenerationOptions(max_tokens=20, force=force, seed=TrainingConfig().seed)
        for force in (Force.IMAGE, Force.TEXT, None)
    ]
    expected = [session.generate([["a"]], one)[0].token_ids for one in options]
    assert written == [expected, expected]


def found(results: Path, name: str) -> Any:
    return json.loads((results / f"{name}.json").read_text())


def test_ranks_draw_what_one_rank_and_transformers_draw(
    results: Path, tiny_checkpoint: Path
) -> None:
    reader = open_checkpoint(tiny_checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = open_tokenizer(reader, None, Path(scratch))
    model = read_transformers(reader, tokenizer).eval()
    classes = TokenClasses(tokenizer.vocabulary)
    layers = TransformersLayers(model, classes.code_token_ids)
    decoder = ContinuousDecoder(layers, classes, tokenizer.image_form)
    expected = mixed_requests.answers(decoder, tokenizer.vocabulary)
    assert len(expected[0]) == 1 + mixed_requests.CANCELS_AFTER_STEPS  # the rest was cancelled
    assert found(results, "tp1-0") == expected
    assert found(results, "tp2-0") == expected


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("follower-ends-0", "rank 0 of 2: a step failed"),
        ("leader-ends-1", "rank 1: "),
        ("follower-draws-1", "rank 1: it has drawn other tokens than rank 0. Start all ranks on "),
    ],
)
def test_a_rank_that_is_left_says_why(results: Path, rank: str, message: str) -> None:
    assert found(results, rank).startswith(message)
