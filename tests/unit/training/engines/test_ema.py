"""The moving average of the weights: by hand, saved, loaded, dropped, in use, and converted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.convert.verify import verify
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.checkpoint.state.resume import load
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.inference.session import Session
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.planner.memory import predict_memory
from megatron_chameleon.training.engines.ema import decay_after
from megatron_chameleon.training.engines.megatron import MegatronEngine
from tiny_engine import batches, make_engine, save, train

DECAY = 0.2
AVERAGED: dict[str, Any] = {"training.ema_decay": DECAY}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"training.dtype": "bf16"},
    "distributed": {"parallel.use_distributed_optimizer": True},
    "bf16-distributed": {
        "training.dtype": "bf16",
        "parallel.use_distributed_optimizer": True,
    },
}


def stored(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """The tensors of a part of the optimizer's state by the names of their weights."""
    reader, prefix = TrainingCheckpoint(checkpoint), f"optimizer.state.{part}."
    names = [name for name in reader.optimizer_tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): reader.read(name) for name in names}


def weights(engine: MegatronEngine) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in engine.named_parameters()}


def main_weights(checkpoint: Path) -> dict[str, Tensor]:
    reader = TrainingCheckpoint(checkpoint)
    return {n: reader.read(n) for n in reader.tensors} | stored(checkpoint, "fp32_param")


def test_the_decay_grows_up_to_the_configs() -> None:
    assert [decay_after(n, 0.5) for n in (0, 1, 2, 7, 8, 9)] == [
        0.0,  # the average starts with the first weights
        pytest.approx(2 / 11),
        pytest.approx(3 / 12),
        pytest.approx(8 / 17),
        0.5,  # 9 / 18
        0.5,
    ]
    assert decay_after(10**6, 0.9999) == 0.9999
    assert decay_after(5, 0.0) == 0.0


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_average_is_that_by_hand_and_resumes_bit_for_bit(
    topology: Topology, tiny_tokenizer: Path, tmp_path: Path, name: str
) -> None:
    engine, expected = make_engine(topology, **AVERAGED, **LAYOUTS[name]), {}
    for step in range(1, 5):
        train(engine, step, step)
        checkpoint = save(engine, tmp_path, step, tiny_tokenizer)
        # (1 + n) / (10 + n) with n = step - 1; 0.2 is reached with n = 2
        decay = (
            min(DECAY, step / (9 + step)) if step > 1 else 0.0
        )  # (1 + n) / (10 + n), n = step - 1
        for key, weight in main_weights(checkpoint).items():
            expected[key] = decay * expected.get(key, 0.0) + (1 - decay) * weight.double()
        found = stored(checkpoint, "ema")
        assert found.keys() == expected.keys() == TrainingCheckpoint(checkpoint).tensors.keys()
        for key, average in found.items():
            assert average.dtype == torch.float32
            # one rounding of fp32 (6e-8) per update
            torch.testing.assert_close(average.double(), expected[key], rtol=3e-7, atol=1e-8)
        assert TrainingCheckpoint(checkpoint).state["ema_updates"] == step
    resumed = make_engine(topology, **AVERAGED, **LAYOUTS[name])
    train(resumed, 1, 1)  # a rollback loads into an engine that has trained
    assert load(tmp_path / "step_00000002", resumed) == 2
    assert (resumed.average.updates, resumed.average.note) == (2, "")
    train(resumed, 3, 4)
    again = save(resumed, tmp_path / "again", 4, tiny_tokenizer)
    for part in ("ema", "exp_avg"):
        old, new = stored(checkpoint, part), stored(again, part)
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_model_computes_with_the_average_and_then_with_its_weights(
    topology: Topology, tiny_tokenizer: Path, tmp_path: Path, name: str
) -> None:
    engine = make_engine(topology, **AVERAGED, **LAYOUTS[name])
    start = weights(engine)
    with engine.ema_weights():  # before the first update there is only one set of weights
        assert all(torch.equal(start[key], w) for key, w in engine.named_parameters())
    train(engine, 1, 3)
    own = weights(engine)
    averages = stored(save(engine, tmp_path, 3, tiny_tokenizer), "ema")
    with pytest.raises(ZeroDivisionError), engine.ema_weights():
        used = weights(engine)
        raise ZeroDivisionError
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    expected = averages["decoder.layers.mlp.linear_fc2.weight"][1]
    assert torch.equal(used[key], expected.to(used[key].dtype))
    assert all(torch.equal(own[key], w) for key, w in engine.named_parameters())
    # and the run goes on as if nothing had been
    train(engine, 4, 4)
    other = make_engine(topology, **AVERAGED, **LAYOUTS[name])
    train(other, 1, 4)
    assert all(torch.equal(w, weights(other)[key]) for key, w in engine.named_parameters())


def test_an_update_that_is_left_out_does_not_count(topology: Topology) -> None:
    engine = make_engine(topology, **AVERAGED)
    train(engine, 1, 2)
    (before,) = {id(t): t.clone() for _, t in list(engine.average.named_tensors())[:1]}.values()
    assert engine.train_step(3, batches(3), update=False)["skipped"]
    assert engine.train_step(3, batches(3, weight=torch.inf))["skipped"]
    assert engine.average.updates == 2
    assert torch.equal(before, next(engine.average.named_tensors())[1])


def test_a_checkpoint_without_an_average_and_a_run_without_one(
    topology: Topology, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    plain = make_engine(topology)
    train(plain, 1, 2)
    without = save(plain, tmp_path / "plain", 2, tiny_tokenizer)
    assert "ema_updates" not in (without / "state.json").read_text()
    engine = make_engine(topology, **AVERAGED)
    train(engine, 1, 2)
    with_average = save(engine, tmp_path, 2, tiny_tokenizer)
    load(without, engine)
    assert engine.average.note == (
        f"{without} has no EMA of the weights: it begins with the next update"
    )
    assert stored(save(engine, tmp_path / "none-yet", 2, tiny_tokenizer), "ema") == {}
    train(engine, 3, 3)
    begun = save(engine, tmp_path, 3, tiny_tokenizer)
    assert all(torch.equal(t, main_weights(begun)[k]) for k, t in stored(begun, "ema").items())
    load(with_average, plain)
    assert plain.average.note == (
        f"the EMA of the weights in {with_average} is dropped, because training.ema_decay is null"
    )
    train(plain, 3, 3)
    assert stored(save(plain, tmp_path / "plain", 3, tiny_tokenizer), "ema") == {}
    state = with_average / "state.json"
    state.write_text(state.read_text().replace('"ema_updates": 2', '"ema_updates": 0'))
    with pytest.raises(CheckpointError, match=r"ema_updates is missing in its state\.json"):
        load(with_average, engine)


def test_conversions(topology: Topology, tiny_tokenizer: Path, tmp_path: Path) -> None:
    engine = make_engine(topology, **AVERAGED, **LAYOUTS["bf16"])
    train(engine, 1, 3)
    source = save(engine, tmp_path, 3, tiny_tokenizer)
    averages = stored(source, "ema")
    # kept beside the moments
    kept = convert(source, tmp_path / "kept", "megatron").optimizer
    assert kept == "Optimizer state kept, and the EMA of the weights with it."
    assert verify(source, tmp_path / "kept").tensors == 5 * (3 + 2 * 13)
    load(tmp_path / "kept", engine)
    assert engine.average.updates == 3
    # omitted
    end = "the EMA of the weights omitted (--ema writes it as the weights)."
    assert convert(source, tmp_path / "zero", "deepspeed").optimizer == (
        f"Optimizer state kept; {end}"
    )
    assert convert(source, tmp_path / "hf", "hf").optimizer == (
        f"Optimizer state omitted: the Hugging Face format cannot store it; {end}"
    )
    # written as the weights: in fp32, as it is stored
    for to in ("hf", "megatron"):
        result = convert(source, tmp_path / f"ema-{to}", to, ema=True)
        assert result.optimizer == (
            "The weights are their EMA after 3 updates. Optimizer state omitted."
        )
        reader = open_checkpoint(tmp_path / f"ema-{to}")
        for row in tensor_rows(reader.dimensions):
            expected = averages[row.megatron_name]
            expected = expected if row.layer is None else expected[row.layer]
            assert torch.equal(reader.read(row), expected), row.key
        assert verify(source, tmp_path / f"ema-{to}", ema=True).differences == []
        assert verify(source, tmp_path / f"ema-{to}").differences != []
    narrow = convert(source, tmp_path / "narrow", "hf", ema=True, dtype="bf16")
    assert narrow.largest_change is not None
    head = Session.load(source, ema=True).model.lm_head.weight
    assert torch.equal(head, averages["output_layer.weight"])
    head = Session.load(tmp_path / "narrow").model.lm_head.weight
    assert torch.equal(head, averages["output_layer.weight"].bfloat16())


def test_a_checkpoint_that_has_no_average(
    topology: Topology, tiny_tokenizer: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tiny_checkpoint, ema=True)
    assert str(error.value) == (
        f"{tiny_checkpoint}: has no EMA of the weights. Leave out --ema, or use a checkpoint of a "
        "run with training.ema_decay."
    )
    convert(tiny_checkpoint, tmp_path / "hf", "hf")
    with pytest.raises(CheckpointError, match="is in the Hugging Face format, which has no EMA"):
        open_checkpoint(tmp_path / "hf", ema=True)


def test_the_planner_counts_its_memory() -> None:
    config = Config()
    without = predict_memory(config, 1000, 1)
    config.training.ema_decay = 0.9
    assert predict_memory(config, 1000, 1).optimizer == 1.5 * without.optimizer  # 12 for 8 bytes
