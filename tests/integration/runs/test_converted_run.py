"""A run resumes from a checkpoint that was converted to DeepSpeed and back, bit for bit."""

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.convert.verify import verify


def test_training_resumes_after_conversions(tiny) -> None:
    words = ["training.dtype=bf16", "training.steps=8"]  # bf16 has main weights too
    tiny.train("run", *words, "checkpoint.every_steps=4", "checkpoint.keep_last=2")
    source = tiny.folder / "run/checkpoints/step_00000004"
    convert(source, tiny.folder / "universal", "deepspeed")
    result = convert(tiny.folder / "universal", tiny.folder / "back", "megatron")
    assert result.optimizer == "Optimizer state kept."
    compared = verify(source, tiny.folder / "back")
    assert (compared.differences, compared.largest, compared.optimizer) == ([], 0.0, True)
    # The checkpoint holds seed and batch size; a run with other values would be refused.
    tiny.train("goes-on", *words, "--resume", tiny.folder / "back")
    expected, found = tiny.metrics("run")[4:], tiny.metrics("goes-on")
    for key in (
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
    ):  # same layout, same bits
        assert [record[key] for record in found] == [record[key] for record in expected], key
