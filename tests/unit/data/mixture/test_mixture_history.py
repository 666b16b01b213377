"""Resuming: the same order on any cluster, mixtures edited during a run, and what is refused."""

import hashlib
import json
import shutil
from collections import defaultdict

import numpy as np
import pytest

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.mixture.mixture_history import count_stage2_steps
from megatron_chameleon.data.token_files.format import REQUIRED_SUFFIXES
from megatron_chameleon.errors import ConfigError, ConfigErrors, DataError

SEQ_LENGTH = 32


@pytest.fixture
def config(tmp_path, token_file, numbered, tokenizer):
    v = tokenizer.vocabulary
    draw = np.random.default_rng(0)
    pairs = [
        np.array([v.bos, 300, v.begin_image, *v.code_token_ids[:8], v.end_image, v.eos])
        for _ in range(60)
    ]
    token_file(numbered(draw.integers(3, 50, 90).tolist()), "text")
    token_file(pairs, "pairs")
    token_file(numbered(draw.integers(3, 20, 70).tolist()), "new")
    config = Config()
    config.model.seq_length = SEQ_LENGTH
    config.data.stage1 = [source(tmp_path, "text", 2.0), source(tmp_path, "pairs", 1.0)]
    config.data.stage2 = [source(tmp_path, "new", 1.0)]
    config.data.stage1_tokens = 300 * SEQ_LENGTH
    config.training.steps, config.training.global_batch_size = 40, 24
    return config


def source(folder, name, weight=1.0, **values):
    return SourceConfig(str(folder / name), weight=weight, **values)


def resumed(reader, config, tokenizer, step):
    """A reader as from the checkpoint of a run after ``step`` updates."""
    return BatchReader(config, tokenizer, json.loads(json.dumps(reader.state())), step)


def row(sample):
    return sample.tokens.tolist(), sample.labels.tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_same_order_on_every_cluster(config, tokenizer, size):
    config.training.micro_batch_size = 3 if size != 3 else 4
    reader = BatchReader(config, tokenizer)
    reference = [row(reader.sample(i)) for i in range(40 * 24)]
    for step in (1, 13, 40):
        dealt = [reader.batches_for(step, rank, size) for rank in range(size)]
        rows = [
            (batch.tokens[i].tolist(), batch.labels[i].tolist())
            for batches in zip(*dealt, strict=True)
            for batch in batches
            for i in range(config.training.micro_batch_size)
        ]
        assert rows == reference[24 * (step - 1) : 24 * step]


def test_the_same_order_across_resumes_with_another_cluster_and_batch_size(config, tokenizer):
    whole = BatchReader(config, tokenizer)
    reference = [row(whole.sample(i)) for i in range(40 * 24)]
    reader, step, found = whole, 0, []
    for ranks, micro, size, steps in ((1, 2, 24, 5), (4, 1, 8, 11), (3, 4, 12, 9), (8, 2, 48, 8)):
        config.training.micro_batch_size, config.training.global_batch_size = micro, size
        config.training.steps = step + steps + 1
        reader = resumed(reader, config, tokenizer, step)
        for last in range(step + 1, step + steps + 1):
            dealt = [reader.indices_for(last, rank, ranks) for rank in range(ranks)]
            for batches in zip(*dealt, strict=True):
                found += [row(reader.sample(i)) for batch in batches for i in batch]
        step += steps
        assert reader.history.first_sample(step) == len(found)
    assert found == reference[: len(found)]
    assert len(found) == 5 * 24 + 11 * 8 + 9 * 12 + 8 * 48 > 300  # into stage 2


class Seen:
    """What a run has read of each source, epoch by epoch."""

    def __init__(self):
        self.parts = defaultdict(list)

    def add(self, reader, first, last):
        for index in range(first, last):
            sample = reader.sample(index)
            parts = sample.packed.parts
            for i, number in enumerate(sample.packed.source):
                part = (int(parts.document[i]), int(parts.start[i]), int(parts.stop[i]))
                self.parts[sample.source_names[number], int(parts.epoch[i])].append(part)

    def check_complete(self, reader, step):
        """Check that all sources are complete, together with the rest of their epochs."""
        sample = reader.history.first_sample(step)
        cursors = reader.mixture(sample - 1).cursors_at(sample)
        for key, cursor in cursors.items():
            corpus = cursor.stream.corpus
            epochs = max([cursor.base // corpus.tokens, *(e for k, e in self.parts if k == key)])
            rest = cursor.parts(0, cursor.tokens_left(epochs + 1))
            for epoch, *part in zip(
                *(column.tolist() for column in (rest.epoch, rest.document, rest.start, rest.stop)),
                strict=True,
            ):
                self.parts[key, epoch].append(tuple(part))
        for (key, _), parts in self.parts.items():
            lengths = np.diff(cursors[key].stream.corpus.starts(0, corpus_size(cursors[key])))
            ends = [0] * len(lengths)
            for number, start, stop in sorted(parts):
                assert start == ends[number]
                ends[number] = stop
            assert ends == lengths.tolist()


def corpus_size(cursor):
    return cursor.stream.corpus.documents


def test_an_edited_mixture_repeats_and_skips_nothing(config, tokenizer, tmp_path):
    seen = Seen()
    reader = BatchReader(config, tokenizer)
    seen.add(reader, 0, 7 * 24)
    before = [row(reader.sample(i)) for i in range(7 * 24)]

    # Other weights, another order of the list, and the third source from now on.
    config.data.stage1 = [
        source(tmp_path, "new", 1.0),
        source(tmp_path, "pairs", 3.0, image_first=1.0),
        source(tmp_path, "text", 1.0),
    ]
    config.data.stage2 = []
    reader = resumed(reader, config, tokenizer, 7)
    assert len(reader.history.entries) == 2
    seen.add(reader, 7 * 24, 20 * 24)
    assert [row(reader.sample(i)) for i in range(7 * 24)] == before

    # A source is left out for some steps, and then continues where it was.
    config.data.stage1 = config.data.stage1[:2]
    reader = resumed(reader, config, tokenizer, 20)
    seen.add(reader, 20 * 24, 23 * 24)
    names = {n for i in range(20 * 24, 23 * 24) for n in names_in(reader, i)}
    assert names == {str(tmp_path / "new"), str(tmp_path / "pairs")}
    config.data.stage1 += [source(tmp_path, "text", 5.0)]
    reader = resumed(reader, config, tokenizer, 23)
    seen.add(reader, 23 * 24, 40 * 24)
    assert [row(reader.sample(i)) for i in range(7 * 24)] == before
    seen.check_complete(reader, 40)


def names_in(reader, index):
    sample = reader.sample(index)
    return {sample.source_names[number] for number in sample.packed.source}


def test_an_edit_holds_from_its_first_sample_on(config, tokenizer, tmp_path):
    reader = BatchReader(config, tokenizer)
    config.data.stage1 = [source(tmp_path, "new")]
    config.data.stage2 = []
    reader = resumed(reader, config, tokenizer, 3)
    assert names_in(reader, 3 * 24) == {str(tmp_path / "new")}
    assert names_in(reader, 3 * 24 - 1) <= {str(tmp_path / "text"), str(tmp_path / "pairs")}


def test_what_does_not_change_the_order_makes_no_new_mixture(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    reference = [row(reader.sample(i)) for i in range(290)]
    config.training.steps, config.data.stage1_tokens = 50, 290 * SEQ_LENGTH
    reader = resumed(reader, config, tokenizer, 10)
    assert len(reader.history.entries) == 1
    assert [row(reader.sample(i)) for i in range(290)] == reference
    assert reader.mixture(290).locate(290).phase.stage == 2
    # A stage 2 that has begun stays where it began.
    config.data.stage1_tokens = 400 * SEQ_LENGTH
    reader = resumed(reader, config, tokenizer, 13)
    assert reader.mixture(290).locate(290).phase.stage == 2


def test_a_border_in_the_past_is_one_at_the_resume(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    reference = [row(reader.sample(i)) for i in range(240)]
    config.data.stage1_tokens = 100 * SEQ_LENGTH
    reader = resumed(reader, config, tokenizer, 10)
    assert [row(reader.sample(i)) for i in range(240)] == reference
    assert reader.mixture(240).locate(239).phase.stage == 1
    assert reader.mixture(240).locate(240).phase.stage == 2


@pytest.mark.parametrize(
    ("steps_done", "begin", "longer"),
    [(6, 32, 40), (18, 16, 40), (18, 16, 19), (20, 16, 60)],
    ids=["before stage 2", "in stage 2", "shorter", "at the end"],
)
def test_stage_2_stays_where_it_began(config, tokenizer, steps_done, begin, longer):
    config.training.steps, config.data.stage1_fraction, config.data.stage1_tokens = 20, 0.8, None
    config.training.global_batch_size = 8
    reader = BatchReader(config, tokenizer)
    assert count_stage2_steps(reader.history, 20) == 4
    config.training.steps = longer
    reader = resumed(reader, config, tokenizer, steps_done)
    assert count_stage2_steps(reader.history, longer) == longer - begin
    assert stages(reader).count(2) == longer - begin
    config.training.global_batch_size = 12  # the border may lie within a step
    again = resumed(reader, config, tokenizer, steps_done)
    config.data.stage1[0].weight = 3.0  # a second mixture, in which stage 2 begins again
    for reader in (again, resumed(again, config, tokenizer, steps_done + 1)):
        assert count_stage2_steps(reader.history, longer) == stages(reader).count(2)


def test_a_batch_size_warm_up_changes_no_sample_and_no_step_twice(config, tokenizer):
    constant = BatchReader(config, tokenizer)
    config.training.rampup_batch_size = [4, 4, 120]
    config.training.micro_batch_size = 2
    config.data.stage1_tokens, config.data.stage1_fraction = None, 0.5
    reader, found, sizes = BatchReader(config, tokenizer), [], []
    for step in range(1, 41):
        if step in (1, 4, 9, 20):  # before, in the middle of two sizes, after it
            reader = resumed(reader, config, tokenizer, step - 1)
        size = reader.history.batch_size(step - 1)
        sizes.append(size)
        for ranks in (1, 2):
            dealt = [reader.indices_for(step, rank, ranks) for rank in range(ranks)]
            deals = [micro for deal in zip(*dealt, strict=True) for micro in deal]
            indices = [index for micro in deals for index in micro]
            assert indices == list(range(len(found), len(found) + size))
        found += [row(reader.sample(i)) for i in indices]
        assert reader.history.first_sample(step) == len(found)
    assert sizes == sorted(sizes)
    assert set(sizes) == {4, 8, 12, 16, 20, 24}
    assert len(reader.history.entries) == 1, "a resume made a new mixture of the same sources"
    # Half of the steps, which are fewer than half of the samples.
    border = reader.history.entries[0].weights.stage1_samples
    assert border == reader.history.first_sample(20) < len(found) / 2
    assert count_stage2_steps(reader.history, 40) == 20
    assert stages(reader) == [1] * 20 + [2] * 20
    assert found[:border] == [row(constant.sample(i)) for i in range(border)]


def test_a_changed_warm_up_holds_from_the_resume_on(config, tokenizer):
    config.training.rampup_batch_size = [4, 4, 120]
    reader = BatchReader(config, tokenizer)
    before = [reader.history.first_sample(step) for step in range(6)]
    config.training.rampup_batch_size = []
    reader = resumed(reader, config, tokenizer, 5)
    assert [reader.history.first_sample(step) for step in range(6)] == before
    assert [reader.history.batch_size(step) for step in (4, 5, 39)] == [4, 24, 24]


def test_a_source_that_ends_within_a_warm_up_names_the_last_whole_step(config, tokenizer):
    config.training.rampup_batch_size = [4, 4, 120]
    for source in config.data.stage1:
        source.repeat = False
    config.data.stage2 = []
    with pytest.raises(ConfigErrors) as caught:
        BatchReader(config, tokenizer)
    (line,) = caught.value.lines()
    steps = int(line.split("at most ")[1].rstrip("."))
    assert f"all sources are exhausted after step {steps} of 40" in line
    config.training.steps = steps
    BatchReader(config, tokenizer)
    config.training.steps = steps + 1
    with pytest.raises(ConfigErrors):
        BatchReader(config, tokenizer)


def stages(reader):
    """The stage of each step, as the audit finds it in the data."""
    first = [reader.history.first_sample(step) for step in range(reader.config.training.steps)]
    return [reader.mixture(sample).locate(sample).phase.stage for sample in first]


def refused(reader, config, tokenizer, step=10):
    with pytest.raises(ConfigErrors) as caught:
        resumed(reader, config, tokenizer, step)
    return caught.value.lines()


def move(prefix, new_prefix):
    for suffix in (*REQUIRED_SUFFIXES, ".json"):
        shutil.move(f"{prefix}{suffix}", f"{new_prefix}{suffix}")


def test_moved_files_want_their_name(config, tokenizer, tmp_path):
    reader = BatchReader(config, tokenizer)
    reference = row(reader.sample(250))
    move(tmp_path / "pairs", tmp_path / "moved")
    config.data.stage1[1].prefix = str(tmp_path / "moved")
    assert refused(reader, config, tokenizer) == [
        f"data.stage1[1].prefix: {tmp_path}/moved is new to the run, but holds the same 60 "
        f"documents of 780 tokens as {tmp_path}/pairs, which is no longer listed. Add "
        f"`name: {tmp_path}/pairs` to continue with it, or a new name to read it from the start."
    ]
    config.data.stage1[1].name = str(tmp_path / "pairs")
    reader = resumed(reader, config, tokenizer, 10)
    assert len(reader.history.entries) == 1
    assert row(reader.sample(250)) == reference
    config.data.stage1[1].name = "renamed"
    reader = resumed(reader, config, tokenizer, 10)
    assert reader.mixture(240).cursors["renamed"].base == 0


def test_changed_files_are_refused(config, tokenizer, token_file, numbered):
    reader = BatchReader(config, tokenizer)
    token_file(numbered([9, 9]), "text")
    (line,) = refused(reader, config, tokenizer)
    assert "text holds 2 documents of 18 tokens, but held 90 of " in line
    assert line.endswith("or give the source a new name to read it from the start.")


def test_files_of_the_old_mixture_are_needed_once_more(config, tokenizer, tmp_path):
    reader = BatchReader(config, tokenizer)
    (tmp_path / "text.json").unlink()
    del config.data.stage1[0]
    with pytest.raises(ConfigError) as caught:
        resumed(reader, config, tokenizer, 10)
    assert str(caught.value).startswith(
        f"data: the run has read {tmp_path}/text, which the config no longer lists: the token file "
        "is incomplete"
    )


def test_isolation_cannot_change(config, tokenizer):
    reader = BatchReader(config, tokenizer)
    config.data.reset_attention = True
    config.model.seq_length = 64
    assert refused(reader, config, tokenizer) == [
        "model.seq_length: the run began with 32, but the config now says 64. Put the old value "
        "back, or start a new run.",
        "data.reset_attention: the run began with False, but the config now says True. Put the old "
        "value back, or start a new run.",
    ]


@pytest.mark.parametrize("broken", [{}, {"format": "other"}, {"format": None, "entries": 3}])
def test_a_state_that_cannot_be_read(config, tokenizer, broken):
    with pytest.raises(DataError, match="its order of the data cannot be read"):
        BatchReader(config, tokenizer, broken, 10)


def values_in(record, path=()):
    """The path of each value of a JSON object, containers too."""
    entries = record.items() if isinstance(record, dict) else enumerate(record)
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from values_in(value, (*path, key))


def changed(record, path, value):
    copy = json.loads(json.dumps(record))
    owner = copy
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return copy


def test_a_history_of_which_any_value_is_malformed_is_refused_or_read(config, tokenizer):
    """No value that a file may hold instead ends in another exception."""
    state = json.loads(json.dumps(BatchReader(config, tokenizer).state()))
    refused = 0
    for path in values_in(state):
        for value in (None, -1, 1 << 70, 0.5, float("nan"), "x", True, [], [[]], {}, {"x": 1}):
            try:
                BatchReader(config, tokenizer, changed(state, path, value), 5)
            except (DataError, ConfigError, ConfigErrors):
                refused += 1
    assert refused > 200


def before_version_2(state):
    """The state as a checkpoint of an earlier version keeps it, which names no version."""
    old = json.loads(json.dumps(state))
    for entry in old["entries"]:
        del entry["order_version"]
    return old


def test_a_run_that_began_with_version_1_keeps_its_order_and_says_so(config, tokenizer):
    config.data.reset_attention = True
    two = BatchReader(config, tokenizer)
    one = BatchReader(config, tokenizer, before_version_2(two.state()), 5)
    assert two.warnings() == []
    assert one.warnings() == [
        "the run began with version 1 of the order of the samples and keeps it: the last sequences "
        "of each 996 may be nearly empty. A new run, or one that is resumed with another mixture, "
        "reads even steps"
    ]
    reference = [row(one.sample(i)) for i in range(1400)]  # beyond stage 1 and a whole block
    assert reference[:24] != [row(two.sample(i)) for i in range(24)]
    # Computed with the last version that knew no other order.
    digest = hashlib.sha256(repr(reference).encode()).hexdigest()
    assert digest == "0fd6b70c2715378a6a620149cbfbcb41bbd7b0ff5179100497f4ba9b52c0e19c"
    again = resumed(one, config, tokenizer, 9)
    assert [row(again.sample(i)) for i in range(1400)] == reference
    assert again.warnings() == one.warnings()


def test_an_edited_mixture_continues_version_1_with_version_2(config, tokenizer, tmp_path):
    """Nothing is repeated or skipped, and the steps before the edit stay as they were."""
    seen = Seen()
    reader = BatchReader(config, tokenizer)
    reader = BatchReader(config, tokenizer, before_version_2(reader.state()), 3)
    before = [row(reader.sample(i)) for i in range(7 * 24)]
    seen.add(reader, 0, 7 * 24)
    config.data.stage1[0].weight = 1.0
    reader = resumed(reader, config, tokenizer, 7)
    assert [entry.order_version for entry in reader.history.entries] == [1, 2]
    assert reader.warnings() == []
    assert [row(reader.sample(i)) for i in range(7 * 24)] == before
    seen.add(reader, 7 * 24, 40 * 24)
    seen.check_complete(reader, 40)


@pytest.mark.parametrize("version", [0, 3, "2", True, None, 2.0])
def test_an_order_of_a_version_that_is_not_known(config, tokenizer, version):
    state = json.loads(json.dumps(BatchReader(config, tokenizer).state()))
    state["entries"][0]["order_version"] = version
    with pytest.raises(DataError, match=r"its order of the data cannot be read \(.*version"):
        BatchReader(config, tokenizer, state, 5)
