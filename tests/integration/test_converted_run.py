"""A run goes on from a checkpoint that was DeepSpeed's in between, as if nothing had happened."""

import pytest


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_goes_on_after_conversions(tiny, chameleon, dtype: str) -> None:
    run, words = f"run-{dtype}", [f"training.dtype={dtype}", "training.steps=8"]
    tiny.train(run, *words, "checkpoint.every_steps=4", "checkpoint.keep_last=2")
    source = tiny.folder / run / "checkpoints/step_00000004"
    between, back = tiny.folder / f"universal-{dtype}", tiny.folder / f"back-{dtype}"
    chameleon("convert", source, between, "--to", "deepspeed")
    result = chameleon("convert", between, back, "--to", "megatron")
    assert "optimizer state kept" in result.stdout
    result = chameleon("verify", source, back)
    assert "bit for bit or in value; optimizer state equal too" in result.stdout
    # its own seed and batch size are in it: a run with others would be refused
    tiny.train(f"goes-on-{dtype}", *words, "--resume", back)
    expected, found = tiny.metrics(run)[4:], tiny.metrics(f"goes-on-{dtype}")
    for key in ("step", "loss", "grad_norm", "learning_rate"):  # one layout: the same bits
        assert [record[key] for record in found] == [record[key] for record in expected], key
