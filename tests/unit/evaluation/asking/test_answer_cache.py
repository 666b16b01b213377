"""Stored answers: a killed evaluation is resumed, and never from another model's answers."""

import resource
import signal
from pathlib import Path

import pytest

from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.answer_cache import AnswerCache, model_fingerprint
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session


def test_half_a_last_line_is_cut_off(tmp_path: Path) -> None:
    with AnswerCache(tmp_path, "m") as answers:
        answers.add({"a": "eins\u2028zwei", "b": [1.5, True]})
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "c", "val')
    with AnswerCache(tmp_path, "m") as answers:
        assert len(answers) == 2 and "c" not in answers
        answers.add({"d": 1})
    with AnswerCache(tmp_path, "m") as answers:
        assert (answers["a"], answers["b"], answers["d"]) == ("eins\u2028zwei", [1.5, True], 1)


@pytest.mark.parametrize("tail", ['{"key": "c", "value": "\u00e9', "{", "\u20ac", "\0" * 9])
def test_a_file_that_ends_anywhere_blocks_no_rerun(tmp_path: Path, tail: str) -> None:
    with AnswerCache(tmp_path, "m") as answers:
        answers.add({"a": "\u00e9"})
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail.encode()[:-1])  # inside the last character, if it has two bytes
    with AnswerCache(tmp_path, "m") as answers:
        assert len(answers) == 1 and answers["a"] == "\u00e9"
    assert path.read_bytes() == whole
    path.write_bytes(whole[:9])  # inside the header
    with AnswerCache(tmp_path, "m") as answers:
        assert len(answers) == 0


def test_a_damaged_line_loses_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with AnswerCache(tmp_path, "m") as answers:
        answers.add({"a": 1})
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b"\xff\n[]\n" + b"[" * 99999 + b"\n" + b'{"key": "b", "value": 2}\n')
    with AnswerCache(tmp_path, "m") as answers:
        assert (answers["a"], answers["b"]) == (1, 2)
    assert "answers.jsonl: 3 damaged lines will be asked again" in caplog.text


def test_a_write_that_fails_leaves_no_half_line(tmp_path: Path) -> None:
    with AnswerCache(tmp_path, "m") as answers:
        answers.add({"a": 1})
        before = answers.path.read_bytes()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limit[1]))
        try:
            with pytest.raises(DataError, match=r"answers\.jsonl: cannot be written \(File too la"):
                answers.add({"b": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, handler)
        assert answers.path.read_bytes() == before
        answers.add({"b": 2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"format": "megatron_chameleon.answers/1", "model": "other"}\n',
            "its answers are from model other, not m",
        ),
        ("not json\n", "not a valid file of answers"),
        ('{"format": "x"}\n', "its answers are from model None, not m"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        AnswerCache(tmp_path, "m")
    assert (tmp_path / "answers.jsonl").read_text() == content


def test_two_evaluations_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        AnswerCache(tmp_path, "m"),
        pytest.raises(DataError, match="another evaluation is writing to it"),
    ):
        AnswerCache(tmp_path, "m")


def test_the_fingerprint_tells_models_apart(session: Session) -> None:
    before = model_fingerprint(session)
    assert model_fingerprint(session) == before
    weight = session.model.lm_head.weight
    value = float(weight[0, 0])
    weight[0, 0] = value + 1
    try:
        assert model_fingerprint(session) != before
    finally:
        weight[0, 0] = value


def drawn(**more: object) -> GenerationOptions:
    options = {"max_tokens": 6, "force": Force.TEXT, "batch_size": 2, **more}
    return GenerationOptions(**options)  # type: ignore[arg-type]


def test_a_resumed_evaluation_draws_what_it_would_have_drawn(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [["a three"], ["a three"], ["a four"], ["a five"]]
    with AnswerCache(tmp_path / "whole", "m") as answers:
        whole = Asker(session, answers).write(prompts, drawn())
    assert whole[0] != whole[1], "a prompt that is asked twice gets two answers"
    lines = (tmp_path / "whole/answers.jsonl").read_text().split("\n")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/answers.jsonl").write_text("\n".join(lines[:4]) + '\n{"key"')  # 3 of 4
    asked = []
    generate = session.generate_each

    def count(prompts: list, options: list, **more: object) -> list:
        asked.append(len(prompts))
        return generate(prompts, options, **more)

    monkeypatch.setattr(session, "generate_each", count)
    with AnswerCache(tmp_path / "killed", "m") as answers:
        assert Asker(session, answers).write(prompts, drawn(batch_size=3)) == whole
    assert asked == [1], "what has an answer is not asked again"


def test_answers_are_stored_while_others_grow(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in the middle loses no answer that has ended."""
    decoder, steps = session.decoder(), []
    step = decoder.step

    def failing() -> list:
        steps.append(1)
        if len(steps) == 9:
            raise MemoryError
        return step()

    monkeypatch.setattr(decoder, "step", failing)
    with AnswerCache(tmp_path, "m") as answers:
        asker = Asker(session, answers)
        with pytest.raises(MemoryError):
            asker.write([[f"a {n}"] for n in range(6)], drawn())
    stored = (tmp_path / "answers.jsonl").read_text().splitlines()[1:]
    assert 2 <= len(stored) < 6


def test_scores_are_not_asked_twice(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    first = asker.score([(["a hand"], "written"), ([], "digit")])
    monkeypatch.setattr(asker.session.model.model, "forward", lambda **_: 1 / 0)
    assert asker.score([([], "digit"), (["a hand"], "written")]) == first[::-1]


def test_a_candidate_joins_the_prompt_as_one_text(asker: Asker) -> None:
    whole = asker.session.tokenizer.text.encode("a handwritten three")
    ((context, continuation),) = asker._encode_pairs([(["a handwritten"], " three")])
    assert context[1:] + continuation == whole


def test_long_texts_lose_their_beginning(asker: Asker) -> None:
    (answer,) = asker.write([["digit number " * 300]], drawn(temperature=0))
    assert isinstance(answer, str)
