"""Isolated documents: every layout against a dense mask on one process.

The dense mask exists only in the program that these tests run. ``packed`` is what Transformer
Engine gets, over a stand-in for its attention (``stand_ins/transformer_engine_attention.py``).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from run_command import run_jobs

SECONDS = 600
STEPS = 2

TOLERANCES = {
    # Of the first loss, of the later ones, and of the norms of gradients' differences. fp32 is
    # precise to 6e-8; what attention adds up in another order passes through four layers and back,
    # and AdamW turns it into steps.
    "fp32": (1e-6, 1e-5, 1e-5),
    "fp64": (1e-12, 1e-10, 1e-10),
    # Another last bit before a rounding to bf16, or to FP8, becomes one of 8 bits, or of 4.
    "bf16": (1e-4, 1e-3, 3e-2),
    "fp8": (1e-4, 1e-3, 3e-2),
}

MODELS: dict[str, dict[str, Any]] = {
    "pre": {"model.qk_norm_groups": 1},
    "swin": {
        "model.norm_order": "swin",
        "model.num_attention_heads": 8,
        "model.num_query_groups": 4,
        "model.qk_norm_groups": 2,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp64": {"training.dtype": "fp64"},
    "bf16": {"training.dtype": "bf16"},
    "fp8": {"fp8.format": "hybrid", "fp8.emulate": True, "fp8.amax_history_len": 2},
}

TENSOR = {"parallel.tensor_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "parallel.sequence_parallel": True}
PIPELINE = {"parallel.pipeline_model_parallel_size": 2}
INTERLEAVED = {**PIPELINE, "parallel.virtual_pipeline_model_parallel_size": 2}
CONTEXT = {"parallel.context_parallel_size": 2}
DISTRIBUTED = {"parallel.use_distributed_optimizer": True}
FULL = {"parallel.recompute_granularity": "full"}
SELECTIVE = {"parallel.recompute_granularity": "selective"}

Layout = tuple[str, str, int, str, dict[str, Any]]

LAYOUTS: list[Layout] = [  # model, kind, processes, attention, settings
    ("pre", "fp32", 2, "own", {**SEQUENCE, **SELECTIVE}),
    ("pre", "fp32", 2, "own", {**INTERLEAVED, **FULL}),
    ("pre", "bf16", 2, "own", DISTRIBUTED),
    ("pre", "fp8", 1, "own", {}),
    ("swin", "fp64", 2, "own", {**TENSOR, **FULL}),
    ("swin", "fp64", 2, "own", PIPELINE),
    ("swin", "fp64", 2, "own", {}),
    ("pre", "fp32", 1, "packed", {}),
    ("pre", "fp32", 2, "packed", {**INTERLEAVED, **FULL}),
    ("pre", "fp32", 2, "packed", {**CONTEXT, **SELECTIVE}),
    ("pre", "fp32", 4, "packed", {**CONTEXT, **SEQUENCE, **FULL}),
    ("pre", "fp32", 4, "packed", {**CONTEXT, **PIPELINE}),
]


def name_of(layout: Layout) -> str:
    model, kind, processes, attention, settings = layout
    words = [key.split(".")[1].removesuffix("_size") for key in settings]
    return "-".join([model, kind, attention, str(processes), *words])


def job(name: str, model: str, kind: str, processes: int, attention: str, more: Any) -> Any:
    settings = {"model.num_layers": 4, "data.reset_attention": True, **MODELS[model], **KINDS[kind]}
    return {
        "name": name,
        "processes": processes,
        "steps": STEPS,
        "attention": attention,
        "set": {**settings, **more},
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every layout, and of the references."""
    folder = tmp_path_factory.mktemp("isolated")
    references = sorted({layout[:2] for layout in LAYOUTS})
    jobs = [job(f"{m}-{kind}-dense", m, kind, 1, "dense", {}) for m, kind in references]
    jobs += [job(name_of(layout), *layout) for layout in LAYOUTS]
    jobs.append(job("pre-fp32-other", "pre", "fp32", 1, "own", {"data.reset_attention": False}))
    run_jobs("run_layouts.py", jobs, folder, SECONDS)
    return folder


def load(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    gradients = torch.load(folder / f"{name}.pt")["gradients"]
    return gradients, json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_layout_equals_a_dense_mask(results: Path, layout: Layout) -> None:
    model, kind, _, _, settings = layout
    first, later, of_gradients = TOLERANCES[kind]
    expected, expected_steps = load(results, f"{model}-{kind}-dense")
    found, found_steps = load(results, name_of(layout))
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        difference = torch.linalg.vector_norm(found[key] - gradient)
        assert difference <= of_gradients * torch.linalg.vector_norm(gradient), key
    keys = ["loss", "loss_text", "loss_image", "z_loss"]
    # Context parallelism measures none, and in bf16 it has only 8 bits.
    if "parallel.context_parallel_size" not in settings and kind != "bf16":
        keys.append("max_attention_logit")
    for number, (ours, dense) in enumerate(zip(found_steps, expected_steps, strict=True)):
        for key in keys:
            rel = later if number else first
            assert ours[key] == pytest.approx(dense[key], rel=rel, abs=0), (key, number)


def test_isolation_makes_a_difference(results: Path) -> None:
    _, isolated = load(results, "pre-fp32-dense")
    _, packed = load(results, "pre-fp32-other")
    assert abs(isolated[0]["loss"] / packed[0]["loss"] - 1) > 1e-4
