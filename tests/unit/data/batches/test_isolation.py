"""``data.reset_attention: null``: a new run decides by its documents, a resumed one keeps it."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chameleon.config.load import load_config, load_recorded_config
from megatron_chameleon.config.names import find_config
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.isolation import documents_per_sequence, settle_isolation
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.errors import ConfigErrors


@pytest.fixture
def config(tmp_path, token_file, numbered):
    token_file(numbered([10] * 40), "short")
    token_file(numbered([400] * 5), "long")
    config = Config()
    config.model.seq_length = 40
    config.data.stage1 = [SourceConfig(str(tmp_path / "short"))]
    config.training.steps, config.training.global_batch_size = 10, 2
    return config


def test_short_documents_are_isolated_and_long_ones_are_not(config, tokenizer, tmp_path):
    reader = BatchReader(config, tokenizer)
    assert reader.config.data.reset_attention is True and config.data.reset_attention is None
    assert reader.isolation == "documents are isolated (about 4 share a sequence)"
    assert reader.history.isolated and reader.batch([0]).cu_seqlens is not None
    config.model.seq_length = 39
    reader = BatchReader(config, tokenizer)
    assert reader.config.data.reset_attention is False and not reader.history.isolated
    assert reader.isolation == "documents are not isolated (about 3.9 share a sequence)"
    assert reader.batch([0]).cu_seqlens is None


@pytest.mark.parametrize("isolated", [True, False])
def test_explicit_values_hold(config, tokenizer, isolated):
    config.data.reset_attention, config.model.seq_length = isolated, 39 if isolated else 400
    reader = BatchReader(config, tokenizer)
    assert reader.config is config and reader.history.isolated is isolated
    assert reader.isolation == ""


@pytest.mark.parametrize("isolated", [True, False])
def test_a_resumed_run_keeps_what_it_began_with(config, tokenizer, isolated):
    """Also where a new run would decide otherwise."""
    config.model.seq_length = 39 if isolated else 400
    begun = replace(config, data=replace(config.data, reset_attention=isolated))
    state = BatchReader(begun, tokenizer).state()
    reader = BatchReader(config, tokenizer, state, 3)
    assert reader.config.data.reset_attention is isolated and reader.isolation == ""
    assert (reader.batch([7]).cu_seqlens is not None) is isolated
    other = replace(config, data=replace(config.data, reset_attention=not isolated))
    with pytest.raises(ConfigErrors, match=f"reset_attention: the run began with {isolated}, but"):
        BatchReader(other, tokenizer, state, 3)


def test_sources_count_by_their_share_of_the_tokens(config, tokenizer, tmp_path):
    """Those of stage 2 do not count."""
    config.data.stage1.append(SourceConfig(str(tmp_path / "long"), weight=3.0))
    reader = BatchReader(config, tokenizer)
    assert documents_per_sequence(config, reader.sources) == pytest.approx(
        40 * (0.25 / 10 + 0.75 / 400)
    )
    assert reader.config.data.reset_attention is False
    config.data.stage2 = [config.data.stage1.pop()]
    assert BatchReader(config, tokenizer).config.data.reset_attention is True


def test_what_cannot_be_isolated_is_not_and_pairs_always_are(config, tokenizer):
    sources = BatchReader(config, tokenizer).sources
    config.parallel.context_parallel_size = 2
    assert settle_isolation(config, sources, None)[0].data.reset_attention is False  # torch's fp32
    config.training.dtype = "bf16"
    assert settle_isolation(config, sources, None)[0].data.reset_attention is True
    config.model.seq_length, config.training.objective = 10, "dpo"
    assert settle_isolation(config, sources, None)[0].data.reset_attention is True


def test_a_recorded_config_without_the_key_was_not_isolated(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {num_layers: 2}\n")
    assert load_recorded_config(file).data.reset_attention is False
    assert load_config(file).data.reset_attention is None
    file.write_text("data: {reset_attention: true}\n")
    assert load_recorded_config(file).data.reset_attention is True


@pytest.mark.parametrize("preset", ["chameleon_7b", "chameleon_34b"])
def test_the_paper_s_presets_do_not_isolate(preset: str) -> None:
    assert load_config(Path(find_config(preset))).data.reset_attention is False
