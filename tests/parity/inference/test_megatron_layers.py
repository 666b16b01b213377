"""The trained model reading token by token, compared with transformers' Chameleon, in fp32."""

from pathlib import Path

import pytest
import torch

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.config.schema import ModelConfig
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
# 3 processes: the vocabulary of 320 tokens does not divide by them
JOBS = [
    ("mha-pre", "megatron", 1, False),
    ("mha-pre", "megatron", 3, True),
    ("mha-pre", "hf", 2, False),
    ("gqa-swin", "megatron", 3, False),
    ("gqa-swin", "meta", 3, True),
    ("gqa-swin", "deepspeed", 1, False),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
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
            "name": job_name(*job),
            "processes": job[2],
            "checkpoint": str(folder / f"{job[0]}-{job[1]}"),
            "token_ids": str(folder / "token_ids.pt"),
            "lengths": LENGTHS,
            "sequence_parallel": job[3],
        }
        for job in JOBS
    ]
    run_jobs("inference/run_cached.py", jobs, folder, 300)
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
