"""Pairs of drawings that a judge reads: which requests are made, and which answers are chosen."""

import random
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megatron_chameleon.inference.answers.answer import Answer
from places import REPOSITORY


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(REPOSITORY / "examples" / name) for name in ("dpo", "sft", "digits")]
    monkeypatch.setattr(sys, "path", [*folders, *sys.path])
    for name in ("measure", "make_pairs", "compare"):  # other examples have such files too
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_requests_differ_and_none_of_them_is_measured() -> None:
    import chat_figures
    from chats import fill
    from make_pairs import make_requests

    found = make_requests(3000, random.Random(1))
    measured = {fill(form, digit).lower() for form in chat_figures.DRAW for digit in range(10)}
    assert len({words for words, _ in found}) == 3000
    assert {digit for _, digit in found} == set(range(10))
    assert not measured & {words.lower() for words, _ in found}
    assert found == make_requests(3000, random.Random(1))


def test_a_wrong_answer_is_rejected_for_a_right_one(tmp_path: Path) -> None:
    from make_documents import render
    from make_pairs import judge_answers, make_pairs

    digits = load_digits()
    pictures: dict[int, Image.Image] = {
        int(label): render(pixels, 16)
        for pixels, label in zip(digits.images, digits.target, strict=True)
    }
    requests = [("a two", 2), ("a two", 2), ("two!", 2), ("a five", 5), ("a five", 5)]
    contents = (
        [pictures[2]],  # right
        ["Here is your two.", pictures[7]],  # another digit
        [pictures[2], pictures[2]],  # two pictures, and no right answer to this request
        ["I can only draw."],  # no picture, and no right answer to any request for a five
        [],  # nothing at all
    )
    answers = [Answer(content, []) for content in contents]
    judged = judge_answers(answers, requests, tmp_path)
    assert [answer.is_right for answer in judged] == [True, False, False, False]
    pairs = make_pairs(judged, random.Random(1))
    right = [{"type": "image", "image": "drawings/00000-0.png"}]
    assert [pair["prompt"] for pair in pairs] == ["a two", "two!"]
    assert all(pair["chosen"] == right for pair in pairs)
    assert pairs[0]["rejected"] == [
        {"type": "text", "text": "Here is your two."},
        {"type": "image", "image": "drawings/00001-1.png"},
    ]
    assert all((tmp_path / f"drawings/0000{n}-0.png").is_file() for n in (0, 2))


@pytest.mark.parametrize("script", ["make_pairs", "compare"])
def test_the_scripts_parse(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = __import__(script)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert "--seed" in capsys.readouterr().out
