"""A model that is borrowed to answer, and then trains on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_cache import cached_logits

from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.loading import model as loading
from megatron_chameleon.checkpoint.loading.config import inference_config
from megatron_chameleon.checkpoint.loading.model import load_model
from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.errors import CheckpointError, ConfigError
from megatron_chameleon.inference.models.megatron_layers import MegatronLayers
from megatron_chameleon.model.chameleon import ChameleonModel, build_model
from megatron_chameleon.parallel.topology import Topology
from tiny_model import VOCAB_SIZE, model_config

CODES = torch.tensor([5, 300, 7])
FP8 = {"delayed": Fp8Config("hybrid", recipe="delayed", emulate=True), "none": Fp8Config()}


def state_of(model: ChameleonModel) -> dict[str, Any]:
    """Everything that a training step could read of a model, and torch's random state."""
    return {
        "tensors": {name: value.clone() for name, value in model.named_parameters()},
        "extra": {name: str(value) for name, value in model.state_dict().items() if "_e" in name},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("fp8", FP8)
def test_a_borrowed_model_trains_on_to_the_last_bit(topology: Topology, fp8: str) -> None:
    config = Config(model=model_config(), fp8=FP8[fp8])
    config.training.dtype = "fp32"
    losses = []
    for borrows in (False, True):
        (model,) = build_model(config, VOCAB_SIZE, topology)
        ids = torch.arange(40).view(2, 20)
        losses.append(train(model, ids))
        if borrows:
            before = state_of(model)
            with (
                pytest.raises(RuntimeError, match="in the middle"),
                MegatronLayers.borrowed(model, CODES, VOCAB_SIZE) as layers,
            ):
                cached_logits(layers, ids, [4, 6])
                raise RuntimeError("in the middle")
            after = state_of(model)
            for name, tensor in before.pop("tensors").items():
                assert after["tensors"][name].equal(tensor)
            del after["tensors"]
            assert before.pop("random").equal(after.pop("random"))
            assert after == before
        losses.append(train(model, ids))
    assert losses[:2] == losses[2:]


def train(model: ChameleonModel, ids: torch.Tensor) -> float:
    model.train()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    entropy, *_ = model(ids, positions, attention_mask=None, labels=ids.roll(-1, 1))
    entropy.mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    return entropy.mean().item()


def test_a_model_of_fp8_training_decodes_without_fp8(topology: Topology) -> None:
    found = []
    for fp8 in FP8.values():
        config = Config(model=model_config(), fp8=fp8)
        config.training.dtype = "fp32"
        (model,) = build_model(config, VOCAB_SIZE, topology)
        with MegatronLayers.borrowed(model, CODES, VOCAB_SIZE) as layers:
            found.append(cached_logits(layers, torch.arange(10)[None], [2])[:, 1:])
    assert found[0].equal(found[1])


def test_a_checkpoint_keeps_its_dtype(tiny_checkpoint: Path, topology: Topology) -> None:
    reader = open_checkpoint(tiny_checkpoint)
    (model,) = load_model(reader, inference_config(reader, 1), topology)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with MegatronLayers.borrowed(model, CODES, VOCAB_SIZE) as layers:
        assert (layers.dtype, layers.context_tokens) == (torch.float32, 64)
        assert (layers.num_layers, layers.num_key_heads, layers.head_dim) == (3, 2, 12)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (3, "3 processes cannot share the model's 4 attention heads, 2 key/value heads and 40 "),
        (4, "4 processes cannot share the model's 2 key/value heads equally. Start 1 or 2"),
    ],
)
def test_a_model_that_cannot_be_split(tiny_checkpoint: Path, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        inference_config(open_checkpoint(tiny_checkpoint), ranks)
    assert message in str(caught.value)


def test_ranks_that_have_opened_different_checkpoints(
    tiny_checkpoint: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_checkpoint(tiny_checkpoint)
    monkeypatch.setattr(loading, "all_gather", lambda opened: [opened, ("step_00000009", 9)])
    with pytest.raises(CheckpointError) as caught:
        load_model(reader, inference_config(reader, 1), topology)
    assert str(caught.value).endswith(
        "rank 0 has opened step_00000007 (step 7), and rank 1 step_00000009 (step 9). "
        "Give the folder of one checkpoint instead of a run's."
    )
