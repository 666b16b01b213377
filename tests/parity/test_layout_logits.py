"""Logits of every layout, compared with transformers' Chameleon, on random fp32 weights."""

import itertools
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

MODELS = {
    "mha-pre": {"norm_order": "pre"},
    "gqa-swin-1": {"norm_order": "swin", "num_query_groups": 4, "qk_norm_groups": 1},
    "gqa-swin-2": {"norm_order": "swin", "num_query_groups": 4, "qk_norm_groups": 2},
    "gqa-swin-4": {"norm_order": "swin", "num_query_groups": 4, "qk_norm_groups": 4},
}
LAYOUTS = {
    f"tp{tp}-pp{pp}{'-sp' if sp else ''}": (
        tp * pp,
        {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "sequence_parallel": sp,
        },
    )
    for tp, pp, sp in itertools.product((1, 2, 4), (1, 2), (False, True))
    if not (sp and tp == 1)
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A folder with the logits of transformers, MODEL.pt, and of each layout, MODEL-LAYOUT.pt."""
    folder = tmp_path_factory.mktemp("logits")
    token_ids = random_token_ids(48)
    torch.save(token_ids, folder / "token_ids.pt")
    jobs = []
    for name, values in MODELS.items():
        sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 40, "seq_length": 48}
        model = ModelConfig(**sizes, num_attention_heads=8, **values)
        tensors = random_tensors(model, VOCAB_SIZE)
        checkpoint = folder / name / "step_00000007"
        write_checkpoint(checkpoint, model, tensors, tiny_tokenizer)
        convert(checkpoint, folder / f"{name}-hf", "hf")
        torch.save(exported_logits(folder / f"{name}-hf", token_ids), folder / f"{name}.pt")
        jobs += [
            {
                "name": f"{name}-{layout}",
                "processes": processes,
                "checkpoint": str(checkpoint),
                "token_ids": str(folder / "token_ids.pt"),
                "parallel": parallel,
            }
            for layout, (processes, parallel) in LAYOUTS.items()
        ]
    run_jobs("run_logits.py", jobs, folder, 300)
    return folder


@pytest.mark.parametrize(("model", "layout"), itertools.product(MODELS, LAYOUTS))
def test_a_layout_computes_what_transformers_computes(
    results: Path, model: str, layout: str
) -> None:
    expected = torch.load(results / f"{model}.pt")
    found = torch.load(results / f"{model}-{layout}.pt")
    assert expected.abs().max() > 1  # logits that differ from each other
    assert (found - expected).abs().max() <= TOLERANCE
