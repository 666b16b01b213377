"""The layout does not change the model: losses and gradient norms over 20 steps.

Every layout is compared with one process. The z-loss has the weight 1e-2 here, so that its gradient
is noticeable.
"""

import pytest

# The order of summation changes fp32 sums by about 1e-7 relative, and 20 steps of AdamW amplify
# that. The project promises 1e-5 for the losses. Norms drift a few times faster, since they do not
# flatten near a minimum as the losses do.
TOLERANCES = {
    "loss": 1e-5,
    "loss_text": 1e-5,
    "loss_image": 1e-5,
    "z_loss": 1e-4,
    "grad_norm": 1e-4,
    "output_norm": 1e-4,
}

LAYOUTS = {
    "tensor": (2, ["parallel.tensor_model_parallel_size=2"]),
    "tensor-sequence": (
        2,
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
    "pipeline": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "data": (2, []),
    "data-distributed-optimizer": (2, ["parallel.use_distributed_optimizer=true"]),
    "tensor-pipeline": (
        4,
        [
            "parallel.tensor_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
            "parallel.sequence_parallel=true",
        ],
    ),
}


@pytest.fixture(scope="module")
def alone(tiny):
    tiny.train("alone")
    return tiny.metrics("alone")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_process(tiny, alone, name: str) -> None:
    processes, overrides = LAYOUTS[name]
    tiny.train(name, *overrides, processes=processes)
    found = tiny.metrics(name)
    assert [record["step"] for record in found] == list(range(1, 21))
    for key, tolerance in TOLERANCES.items():
        expected = [record[key] for record in alone]
        assert [r[key] for r in found] == pytest.approx(expected, rel=tolerance, abs=0), key


def test_the_run_learns(alone) -> None:
    assert alone[-1]["loss"] < 0.8 * alone[0]["loss"]


def test_swin_order_and_shared_norms_under_tensor_parallelism(tiny) -> None:
    overrides = ["model.norm_order=swin", "model.num_query_groups=2", "model.qk_norm_groups=1"]
    tiny.train("swin", *overrides)
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    tiny.train("swin-tensor", *overrides, *layout, processes=2)
    for key, tolerance in TOLERANCES.items():
        expected = [record[key] for record in tiny.metrics("swin")]
        found = [record[key] for record in tiny.metrics("swin-tensor")]
        assert found == pytest.approx(expected, rel=tolerance, abs=0), key


MUON = ["optimizer.name=muon", "training.steps=8", "checkpoint.every_steps=4"]


def test_muon_orthogonalizes_whole_matrices_in_every_layout(tiny) -> None:
    """And a run resumes in another layout, with the momentum of its matrices."""
    tiny.train("muon", *MUON)
    tensor, pipeline = LAYOUTS["tensor-sequence"][1], LAYOUTS["pipeline"][1]
    tiny.train("muon-layout", *MUON, *tensor, *pipeline, processes=4)
    half = tiny.folder / "muon-layout" / "checkpoints" / "step_00000004"
    tiny.train("muon-resumed", *MUON, "--resume", half)
    expected = tiny.metrics("muon")
    for name, first in (("muon-layout", 0), ("muon-resumed", 4)):
        found = tiny.metrics(name)
        assert [record["step"] for record in found] == [*range(first + 1, 9)]
        for key, tolerance in TOLERANCES.items():
            ours, theirs = ([record[key] for record in records] for records in (found, expected))
            assert ours == pytest.approx(theirs[first:], rel=tolerance, abs=0), key
