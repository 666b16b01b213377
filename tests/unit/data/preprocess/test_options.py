"""Options and inputs that ``preprocess`` refuses; tests/integration runs the whole command."""

import json
import logging
import time
from types import SimpleNamespace

import pytest

from megatron_chameleon.cli.preprocess import parse_shard
from megatron_chameleon.data.inputs.records import Limits
from megatron_chameleon.data.preprocess import progress, run
from megatron_chameleon.data.preprocess.options import EncodeOptions, PreprocessOptions
from megatron_chameleon.data.preprocess.progress import ProgressReport
from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.data.token_files.writer_state import WriterState
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.images.options import ImageOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, r"--workers: 0 is less than 1\. Give the number"),
        ({"shard": (2, 2)}, r"--shard: 2/2 is not within 0/2 to 1/2\. Count shards from 0"),
        ({"shard": (0, 0)}, r"--shard: 0/0 is not within"),
        ({"max_bad": 1.5}, r"--max-bad: 1\.5 is not between 0 and 1\. Give a share"),
        (
            {"encoding": EncodeOptions(limits=Limits(1 << 20))},
            r"--largest-document: 1 MiB is not between 2 and 16384\. Give a number of MiB",
        ),
        (
            {"encoding": EncodeOptions(limits=Limits(text_bytes=2 << 30))},
            r"--largest-text: 2048 MiB is not between 1 and 1024\. Give",
        ),
        ({"encoding": EncodeOptions(corpus_name="")}, r"--source: the name is empty"),
        (
            {"encoding": EncodeOptions(image_fit="stretch")},
            r"--image-fit: 'stretch' is not one of role, crop, pad",
        ),
    ],
)
def test_options_that_cannot_work(tmp_path, tokenizer_folder, write_lines, options, message):
    path = write_lines("d.jsonl", {"text": "x"})
    with pytest.raises(ConfigError, match=message):
        preprocess([path], tokenizer_folder, tmp_path / "t", PreprocessOptions(**options))


def test_output_that_would_overwrite_an_input(tmp_path, tokenizer_folder, write_lines):
    path = write_lines("d.json", {"text": "x"})
    with pytest.raises(ConfigError, match=r"--output: .*d would overwrite the input .*d\.json"):
        preprocess([path], tokenizer_folder, tmp_path / "d")
    assert json.loads(path.read_text()) == {"text": "x"}


def test_output_without_a_name(tokenizer_folder, write_lines):
    with pytest.raises(ConfigError, match=r"--output: '/' does not name a file"):
        preprocess([write_lines("d.jsonl", {"text": "x"})], tokenizer_folder, "/")


def test_no_documents(tmp_path, tokenizer_folder, write_lines):
    with pytest.raises(DataError, match=r"d\.jsonl: no documents found\. Check"):
        preprocess([write_lines("d.jsonl")], tokenizer_folder, tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def test_no_dropped_documents_no_list_of_them(tmp_path, tokenizer_folder, write_lines, caplog):
    caplog.set_level(logging.INFO)
    bad = write_lines("bad.jsonl", {"text": "x"}, {"content": [{"type": "image", "image": "no"}]})
    good = write_lines("good.jsonl", {"text": "x"})
    assert preprocess([bad], tokenizer_folder, tmp_path / "t").dropped == {"missing image": 1}
    assert (tmp_path / "t.dropped.jsonl").is_file()
    assert preprocess([good], tokenizer_folder, tmp_path / "t").dropped == {}
    assert not (tmp_path / "t.dropped.jsonl").exists()  # of the run before
    assert "1 dropped" in caplog.messages[0] and "0 dropped" in caplog.messages[1]


def test_text_needs_no_image_tokenizer(tmp_path, tokenizer_folder, write_lines):
    folder = tmp_path / "text_only"
    folder.mkdir()
    for name in ("text.model", "vocabulary.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    path = write_lines("d.jsonl", {"text": "x"})
    assert preprocess([path], folder, tmp_path / "t").documents == 1
    path = write_lines("d.jsonl", {"content": [{"type": "image", "image": "i.png"}]})
    with pytest.raises(DataError, match=r"d\.jsonl:1: the document has 1 image, .* no image tok"):
        preprocess([path], folder, tmp_path / "t")


def test_progress_line(caplog):
    caplog.set_level(logging.INFO)
    state = WriterState(documents=400, tokens=6000, images=20, dropped={"empty image": 3})
    report = ProgressReport(4_000_000, WriterState())
    report.update(state, 1_000_000)
    report.show_if_due()
    assert caplog.messages == []  # too early
    report.started, report._due = report.started - 20, report._due - 20
    report.show_if_due()
    (line,) = caplog.messages
    assert caplog.records[0].stderr  # the command line shows it there
    assert line.startswith("preprocess: 400 documents, 3 bad, 25% of input, 20 documents/s, 300 to")
    assert line.endswith(", 1.0 images/s, 0.05 MB/s, ETA 1m00s")


def test_a_line_comes_although_no_block_is_done(caplog, monkeypatch):
    """The first block may take minutes."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    with ProgressReport(4_000_000, WriterState()):
        deadline = time.monotonic() + 5
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.02)
    (line,) = caplog.messages
    assert line.startswith("preprocess: 0 documents, 0 bad, 0% of input, 0 documents/s")
    assert line.endswith("0.00 MB/s, ETA unknown")


def test_rates_of_a_resumed_run_are_its_own(caplog):
    caplog.set_level(logging.INFO)
    before = WriterState(documents=300, tokens=5000, images=20)
    report = ProgressReport(4_000_000, before, start_bytes=500_000)
    report.started, report._due = report.started - 10, report._due - 20
    report.update(WriterState(documents=400, tokens=6000, images=20), 1_000_000)
    report.show_if_due()
    (line,) = caplog.messages
    assert ", 10 documents/s, 100 tokens/s, 0.0 images/s, 0.05 MB/s, ETA 1m00s" in line


def test_shard_option():
    assert parse_shard("3/16") == (3, 16)
    with pytest.raises(Exception, match="'3' is not of the form I/N, such as 0/8"):
        parse_shard("3")


def test_a_finished_output_of_an_earlier_version_is_kept_and_other_pixels_are_told_apart():
    """Digests of earlier versions say nothing of images; only a finished output may have one."""
    tokenizer = SimpleNamespace(fingerprint="f")

    def digest(with_images: bool = True, **options: object) -> str:
        encoding = EncodeOptions(images=ImageOptions(**options))
        return run._job_digest([], tokenizer, encoding, with_images)

    assert digest() != digest(with_images=False)
    others = [digest(profiles="ignore"), digest(max_pixels=9), digest(roots=("/x",))]
    assert len({digest(), *others}) == 4
    assert digest(profiles="ignore", with_images=False) == digest(profiles="ignore")
