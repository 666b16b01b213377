"""Initial weights, gradients of all parameters, and losses: every layout against one process.

The z-loss has the weight 1e-2, so that its gradient is noticeable. In the pre-norm model all heads
share one QK-norm, so that its gradient must be summed over the tensor-parallel ranks. The Swin
model has grouped queries and two QK-norms. The deep model has enough layers for more pipeline
stages. The model with dropout runs under the layouts that do not change its masks.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from run_command import run_jobs

TOLERANCES = {
    # fp32 is precise to 6e-8, and the order of summation differs through four layers. Gradients are
    # compared by the norm of their difference: single elements near 0 have no relative precision.
    "fp32": 1e-5,
    # float64 is precise to 1e-16. RoPE's angles stay in fp32, and are the same in every layout.
    "fp64": 1e-10,
}
MANY_PROCESSES = 8  # on two cores, a step of so many processes takes half a second or more
SECONDS = 2400

MODELS: dict[str, dict[str, Any]] = {
    "pre": {"model.qk_norm_groups": 1},
    "swin": {
        "model.norm_order": "swin",
        "model.num_attention_heads": 8,
        "model.num_query_groups": 4,
        "model.qk_norm_groups": 2,
    },
    "deep": {"model.num_layers": 4},
    "dropout": {"model.num_layers": 4, "model.hidden_dropout": 0.1},
}


def grid() -> dict[str, tuple[int, dict[str, Any]]]:
    """Every layout of the grid: its name -> (processes, config values)."""
    found = {}
    for tp, pp, sp, dp in itertools.product(
        (1, 2, 4), (1, 2), (False, True), ("1", "2", "2-distributed")
    ):
        if (sp and tp == 1) or (tp, pp, dp) == (1, 1, "1"):
            continue
        values = {
            "parallel.tensor_model_parallel_size": tp,
            "parallel.pipeline_model_parallel_size": pp,
            "parallel.sequence_parallel": sp,
            "parallel.use_distributed_optimizer": dp == "2-distributed",
        }
        name = f"tp{tp}{'-sp' if sp else ''}-pp{pp}-dp{dp}"
        found[name] = (tp * pp * int(dp[0]), values)
    return found


def others() -> dict[str, tuple[int, dict[str, Any]]]:
    """Layouts outside the grid: interleaved pipelines, overlap and recomputation."""
    tensor = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
    pipeline = {"parallel.pipeline_model_parallel_size": 2}
    interleaved = {**pipeline, "parallel.virtual_pipeline_model_parallel_size": 2}
    overlap = {"parallel.overlap_grad_reduce": True}
    gather = {"parallel.use_distributed_optimizer": True, "parallel.overlap_param_gather": True}
    return {
        "interleaved": (2, interleaved),
        "interleaved-tp2-sp": (4, {**interleaved, **tensor}),
        "interleaved-distributed": (
            4,
            {**interleaved, "parallel.use_distributed_optimizer": True},
        ),
        "pp4": (4, {"parallel.pipeline_model_parallel_size": 4}),
        "overlap": (2, overlap),
        "overlap-gather": (2, {**overlap, **gather}),
        "overlap-interleaved": (4, {**overlap, **interleaved}),
        "recompute-selective": (2, {**tensor, "parallel.recompute_granularity": "selective"}),
        "recompute-full": (2, {**tensor, "parallel.recompute_granularity": "full"}),
        "recompute-two-layers": (
            1,
            {"parallel.recompute_granularity": "full", "parallel.recompute_num_layers": 2},
        ),
    }


def with_dropout() -> dict[str, tuple[int, dict[str, Any]]]:
    """Layouts that draw the same dropout masks as one process."""
    every = {**grid(), **others()}
    names = ["tp2-pp1-dp1", "tp2-pp2-dp2", "interleaved-distributed", "recompute-two-layers"]
    return {name: every[name] for name in names}


def count_steps(model: str, dtype: str, processes: int) -> int:
    """20 in fp32; fewer if the gradients of the first step in float64 already show the same."""
    if dtype == "fp64":
        return 1 if processes >= MANY_PROCESSES else 3
    return 5 if model == "swin" and processes >= MANY_PROCESSES else 20


def jobs() -> list[dict[str, Any]]:
    found = []
    for model, dtype in itertools.product(MODELS, TOLERANCES):
        layouts = {"deep": others, "dropout": with_dropout}.get(model, grid)()
        for name, (processes, values) in {"alone": (1, {}), **layouts}.items():
            if dtype == "fp64" and values.get("parallel.use_distributed_optimizer"):
                continue  # megatron-core's distributed optimizer supports fp32 and bf16 only
            settings = {**MODELS[model], **values, "training.dtype": dtype}
            found.append(
                {
                    "name": f"{model}-{dtype}-{name}",
                    "processes": processes,
                    "steps": count_steps(model, dtype, processes),
                    "set": settings,
                }
            )
    return sorted(found, key=lambda job: job["processes"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every job."""
    folder = tmp_path_factory.mktemp("layouts")
    run_jobs("run_layouts.py", jobs(), folder, SECONDS)
    return folder


@pytest.mark.parametrize("name", [job["name"] for job in jobs() if "alone" not in job["name"]])
def test_a_layout_is_the_same_model(results: Path, name: str) -> None:
    model, dtype, _ = name.split("-", 2)
    reference, tolerance = f"{model}-{dtype}-alone", TOLERANCES[dtype]
    expected, found = (torch.load(results / f"{run}.pt") for run in (reference, name))
    assert found["weights"].keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        assert torch.equal(found["weights"][key], weight), key
    for key, gradient in expected["gradients"].items():
        difference = torch.linalg.vector_norm(found["gradients"][key] - gradient)
        assert difference <= tolerance * torch.linalg.vector_norm(gradient), key

    expected_steps, found_steps = (
        json.loads((results / f"{run}.json").read_text()) for run in (reference, name)
    )
    for key in ("loss", "loss_text", "loss_image", "z_loss"):
        losses = [step[key] for step in expected_steps[: len(found_steps)]]
        assert [step[key] for step in found_steps] == pytest.approx(losses, rel=tolerance, abs=0)
    check_monitor(found_steps[0], expected_steps[0])


def check_monitor(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the metrics of the first step. Gradient norms are fp32 even in float64 runs."""
    assert found.keys() == expected.keys()
    for key in ("output_norm", "max_logit", "log_z_text", "log_z_image", "max_attention_logit"):
        assert found[key] == pytest.approx(expected[key], rel=TOLERANCES["fp32"], abs=0), key
    layers = pytest.approx(expected["layer_output_norms"], rel=TOLERANCES["fp32"], abs=0)
    assert found["layer_output_norms"] == layers
    for key in expected:
        if key.startswith("grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=TOLERANCES["fp32"], abs=0), key


@pytest.mark.parametrize("model", MODELS)
def test_the_models_learn(results: Path, model: str) -> None:
    """If the weights hardly moved, the losses would not show a wrong gradient."""
    steps = json.loads((results / f"{model}-fp32-alone.json").read_text())
    assert abs(steps[-1]["loss"] - steps[0]["loss"]) > 0.05
