"""``data.weights_by``: the shares that come out of the batches are those that were asked for."""

import numpy as np
import pytest

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.data.views.audit import count_kinds, count_trained
from megatron_chameleon.data.views.mixture import mixture_summary
from megatron_chameleon.errors import ConfigErrors

SEQ_LENGTH = 256
ASKED = {"short": 0.5, "long": 0.2, "pictures": 0.2, "plain": 0.1}
TOLERANCE = 0.015
"""Of the whole. Lengths vary within a source, and the steps end within an epoch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Sources whose documents differ by 20 in length and by 100 in trained tokens."""
    place, v = tmp_path_factory.mktemp("shares"), tokenizer.vocabulary
    draw = np.random.default_rng(3)

    def conversation(prompt, answer):
        ids = [300] * (prompt + answer - 3)
        return np.array([v.bos, *ids[: prompt - 2], v.separator, *ids[prompt - 2 :], v.eos])

    with TokenFileWriter(place / "short", tokenizer) as writer:  # answers of a word
        for _ in range(300):
            prompt, answer = int(draw.integers(6, 14)), int(draw.integers(2, 4))
            writer.add(conversation(prompt, answer), 0, answers=[(prompt, answer)])
        writer.commit()
    with TokenFileWriter(place / "long", tokenizer) as writer:  # a fifth is left out
        for _ in range(200):
            prompt = 20
            answer = int(draw.choice([150, 200, 190, 120, 300]))
            writer.add(conversation(prompt, answer), 0, answers=[(prompt, answer)])
        writer.commit()
    with TokenFileWriter(place / "pictures", tokenizer) as writer:
        for _ in range(150):
            image = [v.begin_image, *v.code_token_ids[:16], v.end_image]
            ids = np.array([v.bos, *[300] * 5, v.separator, *image, v.eos])
            writer.add(ids, 1, answers=[(7, 19)])
        writer.commit()
    with TokenFileWriter(place / "plain", tokenizer) as writer:  # no conversations
        for length in draw.integers(10, 200, 100).tolist():
            writer.add(np.array([v.bos, *[300] * length, v.eos]), 0)
        writer.commit()
    return place


def shares_config(folder, weights_by, **data):
    config = Config()
    config.model.seq_length, config.data.reset_attention = SEQ_LENGTH, True
    config.data.weights_by = weights_by
    config.data.stage1 = [
        SourceConfig(str(folder / name), weight=weight, name=name) for name, weight in ASKED.items()
    ]
    for name, value in data.items():
        setattr(config.data, name, value)
    config.training.steps, config.training.global_batch_size = 40, 32
    return config


def shares_of(counts):
    total = sum(counts.values())
    return {name: counts[name] / total for name in counts}


def measured(reader, first, stop):
    """Shares of tokens, samples and trained tokens in the samples ``first`` to ``stop`` - 1."""
    samples = [reader.sample(index) for index in range(first, stop)]
    tokens = {name: int(row.sum()) for name, row in count_kinds(samples, reader.vocabulary).items()}
    tokens.pop("padding", None)
    documents = dict.fromkeys(tokens, 0)
    for sample in samples:
        begins = sample.packed.parts.start == 0
        for number in sample.packed.source[begins].tolist():
            documents[sample.source_names[number]] += 1
    return {
        "tokens": shares_of(tokens),
        "samples": shares_of(documents),
        "trained_tokens": shares_of(count_trained(samples)),
    }


@pytest.mark.parametrize("weights_by", ["tokens", "samples", "trained_tokens"])
def test_the_shares_are_those_that_were_asked_for(folder, tokenizer, weights_by):
    found = measured(BatchReader(shares_config(folder, weights_by), tokenizer), 0, 1280)
    # shares of tokens count what is left out of a source, which is more than a third of `long`
    tolerance = 0.1 if weights_by == "tokens" else 0.01  # of one stage
    for name, share in ASKED.items():
        assert found[weights_by][name] == pytest.approx(share, abs=tolerance), found
    others = set(found) - {weights_by}
    assert all(abs(found[other]["short"] - 0.5) > 0.1 for other in others), found


@pytest.mark.parametrize("weights_by", ["samples", "trained_tokens"])
def test_the_share_of_stage_2_counts_the_same(folder, tokenizer, weights_by):
    config = shares_config(folder, weights_by, stage1_fraction=0.0, stage2_share=0.4)
    config.data.stage1, config.data.stage2 = config.data.stage1[:2], config.data.stage1[2:]
    found = measured(BatchReader(config, tokenizer), 0, 1280)[weights_by]
    asked = {"short": 0.6 * 5 / 7, "long": 0.6 * 2 / 7, "pictures": 0.4 * 2 / 3, "plain": 0.4 / 3}
    assert found == pytest.approx(asked, abs=TOLERANCE)


def test_loss_on_all_counts_the_prompts(folder, tokenizer):
    config = shares_config(folder, "trained_tokens", loss_on="all")
    found = measured(BatchReader(config, tokenizer), 0, 1280)["trained_tokens"]
    assert found == pytest.approx(ASKED, abs=TOLERANCE)


def test_the_summary_shows_all_three_shares(folder, tokenizer):
    config = shares_config(folder, "samples")
    reader = BatchReader(config, tokenizer)
    lines = mixture_summary(reader).splitlines()
    row = next(line for line in lines if line.startswith("short") and "epochs" in line)
    found = measured(reader, 0, 1280)
    assert "50.00% of the samples" in row
    trained = float(row.split("% of the trained tokens")[0].split()[-1])
    assert trained / 100 == pytest.approx(found["trained_tokens"]["short"], abs=TOLERANCE)


def test_a_source_without_trained_tokens_is_refused(folder, tmp_path, token_file, tokenizer):
    v = tokenizer.vocabulary
    token_file([np.array([v.bos])] * 3, "nothing")
    config = shares_config(folder, "trained_tokens")
    config.data.stage1.append(SourceConfig(str(tmp_path / "nothing")))
    with pytest.raises(ConfigErrors, match=r"has no trained tokens, which data\.weights_by"):
        BatchReader(config, tokenizer)
