"""Adapters compute what ``peft`` computes from the same numbers, and its files are read rightly."""

import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_chameleon.checkpoint.adapters.stored import base_entry
from megatron_chameleon.checkpoint.convert.adapter import export_adapter
from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.convert.verify import verify
from megatron_chameleon.checkpoint.formats.adapted import find_adapter
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint
from megatron_chameleon.checkpoint.loading.base_weights import find_first_weights
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.checkpoint.state.save import Saver
from megatron_chameleon.checkpoint.state.start import Start
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.inference.session import Session
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.tokenizer.folder import fingerprint
from megatron_chameleon.training.engines.megatron import MegatronEngine
from tiny_engine import make_engine, train
from tiny_model import VOCAB_SIZE, model_config, random_token_ids

ADAPTER = {"adapter.rank": 3, "adapter.alpha": 12.0, "optimizer.weight_decay": 0.0}
FIRST = 7
"""The step at which the runs here go on."""


def close(found: Tensor, expected: Tensor) -> None:
    """Two orders of the same fp32 sums: 1e-5 of the largest logit is 80 roundings of 2**-23."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("adapters") / "exported"
    convert(tiny_checkpoint, folder, "hf")
    return folder


def hf_model(folder: Path) -> Any:
    from transformers import ChameleonForConditionalGeneration

    return ChameleonForConditionalGeneration.from_pretrained(folder).eval()


def logits(model: Any, token_ids: Tensor) -> Tensor:
    """Before the mask that ``forward`` puts on image codes."""
    with torch.no_grad():
        found: Tensor = model.lm_head(model.model(input_ids=token_ids).last_hidden_state)
    return found


def adapted(folder: Path, adapter: Path) -> Any:
    """transformers' model with an adapter that ``peft`` has loaded."""
    return peft.PeftModel.from_pretrained(hf_model(folder), adapter).eval().base_model.model


def randomize(parameters: Any) -> None:
    """Let every number of an adapter differ, and every magnitude differ from its beginning."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def adapter_engine(topology: Topology, base: Path, **values: Any) -> MegatronEngine:
    """An engine with an adapter beside the weights of a folder."""
    return make_engine(topology, open_checkpoint(base), **(ADAPTER | values))


def trained(engine: MegatronEngine) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in engine.named_parameters() if p.requires_grad}


def save(engine: MegatronEngine, folder: Path, step: int, base: Path, tokenizer: Path) -> Path:
    """Save a step as a run does."""
    entries = {"vocab_size": VOCAB_SIZE, "tokenizer_fingerprint": fingerprint(tokenizer)}
    reader = open_checkpoint(base)
    entries |= base_entry(reader.folder, reader.weight_files) | engine.average.state_entries()
    engine.config.tokenizer.path = str(tokenizer)
    with Saver(folder / "checkpoints", engine, lambda saved: None) as saver:
        saver.save(step, entries)
    return folder / "checkpoints" / f"step_{step:08}"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_training_computes_what_peft_computes_and_its_files_are_peft_s(
    topology: Topology, tmp_path: Path, exported: Path, tiny_tokenizer: Path, dora: bool
) -> None:
    engine = adapter_engine(topology, exported, **{"adapter.dora": dora})
    token_ids = random_token_ids(model_config().seq_length)
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
    model = engine.parts[0].eval()
    with torch.no_grad():
        close(model(token_ids, positions, None), logits(hf_model(exported), token_ids))
    randomize(p for _, p in engine.named_parameters() if p.requires_grad)
    with torch.no_grad():
        ours = model(token_ids, positions, None)
    step = save(engine, tmp_path / "run", FIRST, exported, tiny_tokenizer)
    adapter = find_adapter(tmp_path / "run")
    assert adapter is not None and adapter.config.dora is dora
    export_adapter(adapter, tmp_path / "peft")
    theirs = logits(adapted(exported, tmp_path / "peft"), token_ids)
    assert (theirs - logits(hf_model(exported), token_ids)).abs().max() > 0.1 * theirs.abs().max()
    close(ours, theirs)

    assert Session.load(step).has_adapter

    convert(step, tmp_path / "merged", "hf")
    close(logits(hf_model(tmp_path / "merged"), token_ids), theirs)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_that_peft_saved_is_merged_as_peft_merges_it(
    tmp_path: Path, exported: Path, dora: bool
) -> None:
    """With another rank and alpha in some layers, and with lm_head, which ours never have."""
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "lm_head"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.o_proj": 30},
        use_dora=dora,
        use_rslora=not dora,
    )
    model = peft.get_peft_model(hf_model(exported), config)
    randomize(p for name, p in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path / "peft")
    token_ids = random_token_ids(40)
    before = logits(hf_model(exported), token_ids)
    theirs = logits(model.eval().merge_and_unload(), token_ids)
    convert(tmp_path / "peft", tmp_path / "merged", "hf", base=exported)
    close(logits(hf_model(tmp_path / "merged"), token_ids), theirs)
    assert (theirs - before).abs().max() > 0.1 * theirs.abs().max()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_merge_into_fp32_is_not_rounded_to_the_dtype_of_the_base(
    tiny_checkpoint: Path, tmp_path: Path, dora: bool
) -> None:
    base, adapter = tmp_path / "bf16", tmp_path / "peft"
    convert(tiny_checkpoint, base, "hf", dtype="bf16")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=dora)
    model = peft.get_peft_model(hf_model(base), config)
    randomize(p for name, p in model.named_parameters() if "lora_" in name)
    model.save_pretrained(adapter)
    convert(adapter, tmp_path / "merged", "hf", dtype="fp32", base=base)
    own = load_file(adapter / "adapter_model.safetensors")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    layer = "model.layers.1.self_attn.q_proj"
    low, high = (own[f"base_model.model.{layer}.lora_{part}.weight"].double() for part in "AB")
    expected = old[f"{layer}.weight"].double() + 8 / 4 * high @ low
    if dora:
        length = own[f"base_model.model.{layer}.lora_magnitude_vector"].double()
        expected *= (length / expected.norm(dim=1))[:, None]
    found = new[f"{layer}.weight"]
    assert found.dtype == torch.float32
    # A few roundings of 2**-24; one of bf16 would be 2**-9.
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.equal(new["lm_head.weight"], old["lm_head.weight"].float())
    assert verify(tmp_path / "merged", adapter).differences == []


def test_a_run_goes_on_bit_for_bit_and_saves_no_base_weights(
    topology: Topology, tmp_path: Path, exported: Path, tiny_tokenizer: Path
) -> None:
    values = {"adapter.dora": True, "adapter.dropout": 0.2, "training.ema_decay": 0.9}
    engine = adapter_engine(topology, exported, **values)
    frozen = {n: p.detach().clone() for n, p in engine.named_parameters() if not p.requires_grad}
    first = trained(engine)
    assert len(first) == 3 * 7 * len(engine.parts[0].decoder.layers)
    train(engine, 1, 2)
    step = save(engine, tmp_path / "run", 2, exported, tiny_tokenizer)
    train(engine, 3, 4)
    last = trained(engine)
    assert not any(torch.equal(first[name], last[name]) for name in first)
    assert all(torch.equal(dict(engine.named_parameters())[n], frozen[n]) for n in frozen)

    stored = TrainingCheckpoint(step)
    assert all("_adapter." in name for name in (*stored.tensors, *stored.optimizer_tensors))
    found = {*stored.tensors}
    assert found == {re.sub(r"layers\.\d+\.", "layers.", name) for name in first}

    start = find_first_weights(engine.config, Start(checkpoint=step))
    assert start.reader is not None
    again = make_engine(topology, start.reader, **(ADAPTER | values))
    again.restore(step, 2)
    train(again, 3, 4)
    assert all(torch.equal(tensor, last[name]) for name, tensor in trained(again).items())


@pytest.mark.parametrize("change", ["moved", "changed"])
def test_other_base_weights_are_one_clear_error(
    topology: Topology, tmp_path: Path, exported: Path, tiny_tokenizer: Path, change: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(exported, base)
    engine = adapter_engine(topology, base)
    step = save(engine, tmp_path / "run", FIRST, base, tiny_tokenizer)
    if change == "moved":
        base.rename(tmp_path / "elsewhere")
        message = f"{base}: no such folder, and {step} is an adapter of the weights there"
    else:
        weights = load_file(base / "model.safetensors")
        weights["lm_head.weight"][0, 0] += 1
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        message = f"{base}: its fingerprint is "
    for use in (
        lambda: open_checkpoint(tmp_path / "run"),
        lambda: find_first_weights(engine.config, Start(checkpoint=step)),
    ):
        with pytest.raises(CheckpointError) as caught:
            use()
        assert str(caught.value).startswith(message)
        assert "adapter.base" in str(caught.value)
    if change == "moved":
        assert open_checkpoint(tmp_path / "run", base=tmp_path / "elsewhere").step == FIRST
        engine.config.adapter.base = str(tmp_path / "elsewhere")
        assert find_first_weights(engine.config, Start(checkpoint=step)).reader is not None
