"""A run that starts from a converted checkpoint has its weights and begins at step 1."""

import pytest

LAYOUT = ["parallel.tensor_model_parallel_size=2", "parallel.use_distributed_optimizer=true"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_starts_from_a_converted_checkpoint(tiny, chameleon, dtype: str) -> None:
    first, run = f"trained-{dtype}", f"continued-{dtype}"
    tiny.train(first, f"training.dtype={dtype}")
    folders = [tiny.folder / f"{name}-{dtype}" for name in ("hf", "weights")]
    chameleon("convert", tiny.folder / first, folders[0], "--to", "hf")
    chameleon("convert", folders[0], folders[1], "--to", "megatron")
    words = [f"training.dtype={dtype}", "training.steps=3", "training.seed=2", "--resume"]
    tiny.train(run, *words, folders[1], *LAYOUT, processes=2)
    old, new = tiny.metrics(first), tiny.metrics(run)
    assert [line["step"] for line in new] == [1, 2, 3]
    assert old[0]["loss"] - old[-1]["loss"] > 0.5, "a run that has learned nothing proves nothing"
    # not the samples that were trained on last
    assert abs(new[0]["loss"] - old[-1]["loss"]) < 0.25
