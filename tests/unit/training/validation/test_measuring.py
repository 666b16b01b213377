"""A measurement: sums over tokens, what ends it early, and what it is called in the metrics."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_chameleon.config.schema import Config, ValidationSourceConfig
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.training.engines.objective import modality_sums
from megatron_chameleon.training.run.console import held_out_line
from megatron_chameleon.training.validation.losses import HeldOutLosses, ModalityLosses
from megatron_chameleon.training.validation.measure import measure
from megatron_chameleon.training.validation.validator import Validator
from tiny_model import tiny_tokenizer  # noqa: F401


@pytest.fixture
def reader(tmp_path, tiny_tokenizer):  # noqa: F811
    """Two sources: 41 texts of 9 tokens, and 3 images with two words, in sequences of 32 tokens."""
    tokenizer = load_tokenizer(tiny_tokenizer, images=False)
    v = tokenizer.vocabulary
    word = v.image_placeholder + 1
    image = [v.begin_image, *v.code_token_ids[:16], v.end_image]
    sources = {
        "texts": [[v.bos, *[word] * 7, v.eos]] * 41,
        "pairs": [[v.bos, *image, word, v.eos]] * 3,
    }
    for name, documents in sources.items():
        with TokenFileWriter(tmp_path / name, tokenizer) as writer:
            for document in documents:
                writer.add(np.array(document), document.count(v.begin_image))
            writer.commit()
    config = Config()
    config.model.seq_length, config.training.micro_batch_size = 32, 2
    config.training.steps, config.data.validation.every_steps = 25, 10
    config.data.validation.sources = [ValidationSourceConfig(str(tmp_path / n)) for n in sources]
    return HeldOutReader(config, tokenizer)


class Engine:
    """Gives every token that is an image code the loss 3, and every other one the loss 1.5."""

    def __init__(self, config):
        self.config, self.chunks = config, 0
        self.average, self.uses_average = SimpleNamespace(updates=0), False

    @contextmanager
    def ema_weights(self):
        self.uses_average = True
        yield
        self.uses_average = False

    def evaluate(self, micro_batches):
        self.chunks += 1
        sums = []
        for batch in micro_batches:
            loss = torch.where(batch.image_mask, 3.0, 1.5) * (0.5 if self.uses_average else 1.0)
            sums.append(modality_sums(batch, (loss, loss, loss)))
        return torch.stack(sums)


class Signals:
    def __init__(self, *answers):
        self.answers = list(answers)

    def agreed(self, failure=None):
        if failure is not None:
            raise failure
        return self.answers.pop(0) if self.answers else None


class Watch:
    def __init__(self):
        self.seen = []

    def begin(self, doing, step, *, is_long=False):
        self.seen.append((doing, step, is_long))


def make_validator(reader, topology, signals):
    warnings, watch = [], Watch()
    engine = Engine(reader.config)
    return Validator(reader, engine, topology, watch, signals, warnings.append), warnings, watch


def test_means_over_tokens_and_their_names(reader, topology):
    losses = measure(Engine(reader.config).evaluate, reader, topology, lambda failure: True)
    assert losses == HeldOutLosses(
        {
            "texts": ModalityLosses(1.5 * 41 * 8, 41 * 8, 0.0, 0),
            "pairs": ModalityLosses(1.5 * 3 * 4, 3 * 4, 3.0 * 3 * 16, 3 * 16),
        }
    )
    metrics = losses.metrics()
    assert metrics["validation/loss"] == (1.5 * (328 + 12) + 3 * 48) / (328 + 12 + 48)
    assert (metrics["validation/loss_text"], metrics["validation/loss_image"]) == (1.5, 3.0)
    assert metrics["validation/perplexity"] == math.exp(metrics["validation/loss"])
    assert metrics["validation/pairs/loss"] == (1.5 * 12 + 3 * 48) / 60
    assert metrics["validation/pairs/perplexity_image"] == math.exp(3.0)
    assert metrics["validation/texts/loss_image"] is None
    assert metrics["validation/texts/perplexity_image"] is None
    assert len(metrics) == 3 * 6


def test_when_it_is_due(reader, topology):
    validator, _, _ = make_validator(reader, topology, Signals())
    assert [step for step in range(1, 26) if validator.is_due(step)] == [10, 20, 25]
    reader.config.data.validation.every_steps = 0
    assert [step for step in range(1, 26) if validator.is_due(step)] == [25]
    none = Validator(None, Engine(reader.config), topology, Watch(), Signals(), print)
    assert not none.is_due(25)


def test_every_chunk_is_progress_for_the_watch(reader, topology):
    validator, warnings, watch = make_validator(reader, topology, Signals())
    assert validator.measure(10)["validation/texts/loss"] == 1.5
    # 12 sequences of texts and 2 of images: 6 + 1 micro-batches in one chunk, and the end
    assert watch.seen == [("measuring the held-out loss", 10, True)] * 2
    assert warnings == []


def test_a_signal_ends_it(reader, topology):
    validator, warnings, _ = make_validator(reader, topology, Signals("SIGUSR1"))
    assert validator.measure(10) == {}
    assert warnings == [
        "step 10: the held-out loss was not measured: a signal asks the run to stop"
    ]


def test_damaged_documents_do_not_end_the_training(reader, topology, monkeypatch):
    def broken(*_):
        raise DataError("texts.bin", "document 3 has token ids up to 9999", "Copy it again")

    monkeypatch.setattr(reader.sources[0].stream.documents, "read", broken)
    validator, warnings, _ = make_validator(reader, topology, Signals())
    assert validator.measure(20) == {}
    (warning,) = warnings
    assert warning.startswith("step 20: the held-out loss was not measured: texts.bin: document 3")


def test_the_average_of_the_weights_is_measured_too(reader, topology):
    validator, _, watch = make_validator(reader, topology, Signals())
    without = validator.measure(10)
    validator._engine.average.updates = 3
    found = validator.measure(20)
    assert {key: found[key] for key in without} == without
    assert {key: found[key] for key in found if key not in without} == {
        "validation/ema_loss": without["validation/loss"] / 2,
        "validation/ema_loss_text": 0.75,
        "validation/ema_loss_image": 1.5,
    }
    assert len(watch.seen) == 2 + 4
    assert held_out_line(20, found).endswith(
        f"; of the EMA of the weights {without['validation/loss'] / 2:.4f}"
    )


def test_a_loss_beyond_the_largest_perplexity():
    values = dict(ModalityLosses(1000.0, 1, 0.0, 0).values())
    assert values["loss"] == 1000.0 and values["perplexity"] == math.inf
