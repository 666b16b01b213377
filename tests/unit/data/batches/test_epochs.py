"""``training.epochs``: how often each document is read, and the steps that follow from it."""

import json
from collections import Counter

import numpy as np
import pytest

from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.load import load_config, replace_values, save_config
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.data.views.audit import audit_step, format_audit
from megatron_chameleon.data.views.borders import find_borders
from megatron_chameleon.data.views.mixture import mixture_summary
from megatron_chameleon.data.views.source_shares import tokens_seen
from megatron_chameleon.errors import ConfigError, ConfigErrors

SEQ_LENGTH = 64


@pytest.fixture
def sources(tmp_path, tokenizer):
    """Conversations, pairs and texts of random lengths: 150, 70 and 40 documents."""
    v, draw = tokenizer.vocabulary, np.random.default_rng(5)
    first_text = v.image_placeholder + 1

    def text(length):
        return draw.integers(first_text, v.size, length).tolist()

    with TokenFileWriter(tmp_path / "talks", tokenizer) as writer:
        for length in [*draw.integers(8, 50, 149).tolist(), 90]:  # the last one is left out
            answer = length // 3
            ids = [v.bos, *text(length - answer - 2), v.separator, *text(answer - 1), v.eos]
            writer.add(np.array(ids), 0, answers=[(length - answer, answer)])
        writer.commit()
    with TokenFileWriter(tmp_path / "pairs", tokenizer) as writer:
        for length in draw.integers(1, 30, 70).tolist():
            image = [v.begin_image, *v.code_token_ids[:9], v.end_image]
            writer.add(np.array([v.bos, *image, *text(length), v.eos]), 1)
        writer.commit()
    with TokenFileWriter(tmp_path / "texts", tokenizer) as writer:
        for length in draw.integers(3, 200, 40).tolist():
            writer.add(np.array([v.bos, *text(length), v.eos]), 0)
        writer.commit()
    return lambda name, **values: SourceConfig(str(tmp_path / name), **values)


def epochs_config(epochs, *sources, batch=8, ramp=(), isolated=True):
    config = Config()
    config.model.seq_length, config.data.reset_attention = SEQ_LENGTH, isolated
    config.data.stage1 = list(sources)
    config.training.steps, config.training.epochs = 0, epochs
    config.training.global_batch_size = batch
    config.training.rampup_batch_size = list(ramp)
    return config


def tokens_read(reader):
    """How often each token of each document is in the batches of all steps, by source."""
    found = {source.key: {} for source in reader.sources}
    for step in range(1, reader.config.training.steps + 1):
        for batch in reader.indices_for(step, 0, 1):
            for sample in map(reader.sample, batch):
                parts = sample.packed.parts
                for i, number in enumerate(sample.packed.source.tolist()):
                    counts = found[sample.source_names[number]].setdefault(
                        int(parts.document[i]), np.zeros(int(parts.length[i]), dtype=int)
                    )
                    counts[int(parts.start[i]) : int(parts.stop[i])] += 1
    return found


def times_of(counts):
    """How often each document was read; it must be the same for all of its tokens."""
    assert all(len(set(each.tolist())) == 1 for each in counts.values())
    return Counter(int(each[0]) for each in counts.values())


def last_name(key):
    return key.rpartition("/")[2]


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("ramp", [(), (2, 2, 30)])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_document_is_read_that_often(sources, tokenizer, epochs, ramp, isolated):
    names = ("talks", "pairs", "texts")
    config = epochs_config(epochs, *map(sources, names), ramp=ramp, isolated=isolated)
    reader = BatchReader(config, tokenizer)
    found = {last_name(key): times_of(counts) for key, counts in tokens_read(reader).items()}
    documents = {"talks": 149, "pairs": 70, "texts": 40}
    assert found == {name: {epochs: count} for name, count in documents.items()}
    steps = reader.config.training.steps
    filled = reader.history.first_sample(steps - 1) < reader.samples
    assert filled and reader.samples <= reader.history.first_sample(steps)


def test_the_last_step_is_filled_up_with_padding_that_is_in_no_loss(sources, tokenizer):
    reader = BatchReader(epochs_config(1, sources("talks"), batch=7), tokenizer)
    steps = reader.config.training.steps
    end, size = reader.epochs_end, reader.history.batch_size(steps - 1)
    assert 0 < end.last_size < size
    batch = reader.batch([i for group in reader.indices_for(steps, 0, 1) for i in group])
    padding = batch.tokens[end.last_size :]
    assert (padding == tokenizer.vocabulary.pad).all()
    assert not batch.loss_mask[end.last_size :].any()
    assert batch.loss_mask[: end.last_size].any(dim=1).all()
    assert f"of {size} sequences; the last step has {end.last_size} of its {size}" in (
        end.description
    )
    trained = 0
    for step in range(1, steps + 1):
        trained += sum(int(b.loss_mask.sum()) for b in reader.batches_for(step, 0, 1))
    info = reader.sources[0].corpus.token_file.info
    assert trained == info.total("answer_tokens") - 90 // 3


def test_the_start_says_what_an_epoch_is(sources, tokenizer):
    reader = BatchReader(epochs_config(2, sources("talks")), tokenizer)
    steps = reader.config.training.steps
    words = f"2 epochs of 149 conversations (1 too long ones are left out) = {steps} steps of 8 "
    assert reader.epochs_end.description.startswith(words + "sequences")
    assert mixture_summary(reader).startswith(f"{reader.epochs_end.description}\n{steps} steps, ")


def test_half_an_epoch_reads_half_of_the_tokens(sources, tokenizer):
    reader = BatchReader(epochs_config(0.5, sources("texts"), isolated=False), tokenizer)
    counts = np.concatenate(list(*[each.values() for each in tokens_read(reader).values()]))
    total = reader.sources[0].corpus.tokens
    assert counts.sum() == round(total / 2) and counts.max() == 1


def test_repeat_is_the_limit_of_a_source(sources, tokenizer):
    config = epochs_config(3, sources("talks"), sources("pairs", repeat=2))
    config.data.stage1[0].repeat = 5
    reader = BatchReader(config, tokenizer)
    found = {last_name(key): times_of(counts) for key, counts in tokens_read(reader).items()}
    assert found == {"talks": {3: 149}, "pairs": {2: 70}}
    assert "times that each source is read: " in reader.epochs_end.description


def test_with_weights_the_largest_source_for_its_weight_is_read_that_often(sources, tokenizer):
    config = epochs_config(2, sources("talks", weight=0.5), sources("pairs", weight=0.5))
    reader = BatchReader(config, tokenizer)
    found = {last_name(key): counts for key, counts in tokens_read(reader).items()}
    assert times_of(found["talks"]) == {2: 149}
    tokens = {name: sum(each.sum() for each in counts.values()) for name, counts in found.items()}
    talks, pairs = reader.sources[0].corpus, reader.sources[1].corpus
    assert tokens["talks"] == 2 * (talks.tokens - 90)
    # shares are exact to a document, and positions count the conversation that is left out
    assert abs(tokens["pairs"] - 2 * talks.tokens) <= 2 * 42
    assert reader.sources[1].epochs == pytest.approx(2 * talks.tokens / pairs.tokens)


def resumed(reader, config, tokenizer, step):
    return BatchReader(config, tokenizer, json.loads(json.dumps(reader.state())), step)


def test_a_resumed_run_reads_the_same_and_ends_at_the_same_step(sources, tokenizer):
    config = epochs_config(3, sources("talks"), sources("pairs"))
    whole = BatchReader(config, tokenizer)
    reader = resumed(whole, whole.config, tokenizer, 11)
    assert reader.config == whole.config and reader.epochs_end == whole.epochs_end
    rows = [[r.sample(i).tokens.tolist() for i in range(88, 120)] for r in (whole, reader)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("done", [5, None])
def test_a_run_gets_more_epochs(sources, tokenizer, done):
    """Also after its last step, which was filled up."""
    config = epochs_config(2, sources("talks"), sources("pairs"), batch=7)
    reader = BatchReader(config, tokenizer)
    steps = reader.config.training.steps
    longer = resumed(
        reader, epochs_config(4, *config.data.stage1, batch=7), tokenizer, done or steps
    )
    assert longer.config.training.steps > steps
    found = {last_name(key): times_of(counts) for key, counts in tokens_read(longer).items()}
    assert found == {"talks": {4: 149}, "pairs": {4: 70}}
    assert " epochs" in mixture_summary(longer) and find_borders(longer).borders


def test_another_batch_size_in_mid_run_changes_the_steps_only(sources, tokenizer):
    config = epochs_config(2, sources("talks"), sources("pairs"))
    reader = BatchReader(config, tokenizer)
    larger = epochs_config(2, *config.data.stage1, batch=16)
    found = resumed(reader, larger, tokenizer, 5)
    assert found.samples == reader.samples
    assert found.config.training.steps == 5 + -(-(reader.samples - 40) // 16)
    assert {last_name(k): times_of(c) for k, c in tokens_read(found).items()} == {
        "talks": {2: 149},
        "pairs": {2: 70},
    }


def test_views_of_the_last_step(sources, tokenizer):
    reader = BatchReader(epochs_config(1, sources("talks"), sources("texts"), batch=7), tokenizer)
    steps = reader.config.training.steps
    assert "padding" in format_audit(audit_step(reader, steps), reader.vocabulary, 5)
    assert find_borders(reader).padding[steps] > 0.2
    seen = tokens_seen(reader, steps)
    assert [epochs for _, epochs in seen.values()] == pytest.approx([1.0, 1.0])


def test_steps_that_do_not_follow_are_refused(sources, tokenizer):
    config = epochs_config(3, sources("talks"))
    config.training.steps = 7
    with pytest.raises(ConfigError) as error:
        BatchReader(config, tokenizer)
    assert "training.steps: 7, but training.epochs 3 of these sources is " in str(error.value)
    assert "Remove one of the two" in str(error.value)
    config.training.steps, config.training.epochs = 0, 1e-5
    with pytest.raises(ConfigError, match="of the documents of stage 1 is not a single one"):
        BatchReader(config, tokenizer)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"epochs": None}, "training.steps: 0, and training.epochs does not say how long"),
        ({"epochs": 0.0}, "training.epochs: 0.0 is not above 0"),
        ({"epochs": float("nan")}, "training.epochs: nan is not above 0"),
        ({"epochs": -1.0}, "training.epochs: -1.0 is not above 0"),
    ],
)
def test_lengths_that_cannot_be(edit, message):
    config = epochs_config(1, SourceConfig("a"))
    config.tokenizer.path = "t"
    for name, value in edit.items():
        setattr(config.training, name, value)
    with pytest.raises(ConfigErrors) as error:
        check_config(config, 1)
    assert message in str(error.value)


def test_combinations_that_cannot_be():
    config = epochs_config(1, SourceConfig("a"))
    config.tokenizer.path = "t"
    config.data.stage2 = [SourceConfig("c")]
    with pytest.raises(ConfigErrors) as error:
        check_config(config, 1)
    assert "training.epochs: 1 passes over stage 1 leave no place" in str(error.value)


def length_of(path, *words):
    config = load_config(path, words)
    return config.training.steps, config.training.epochs


def test_what_is_set_last_says_how_long_the_run_is(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("preset: chameleon_7b\ntraining: {epochs: 3}\n")
    assert length_of(path) == (0, 3)
    assert length_of(path, "training.steps=10") == (10, None)
    assert length_of(path, "training.steps=10", "training.epochs=2") == (10, 2)
    path.write_text("training: {steps: 50}\n")
    assert length_of(path) == (50, None)
    assert length_of(path, "training.epochs=0.5") == (0, 0.5)
    assert length_of(path, "training={epochs: 2}") == (0, 2)
    path.write_text("training: {epochs: 2, steps: 50}\n")  # as a run folder has it
    assert length_of(path) == (50, 2)
    assert length_of(path, "training.epochs=3") == (0, 3)
    config = replace_values(load_config(path), ["training.epochs=1"])
    assert (config.training.steps, config.training.epochs) == (0, 1)
    save_config(load_config(path), tmp_path / "b.yaml")
    assert length_of(tmp_path / "b.yaml") == (50, 2)
    path.write_text("training: {seed: 4}\n")
    assert length_of(path) == (100, None)
