"""Forms are blind, shuffled and self-contained; judgements return under the models' names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.evaluation.human.prompts import answer_prompts, read_prompts
from megatron_chameleon.evaluation.human.questionnaire import (
    read_answered_prompts,
    read_judgements,
    read_key,
    write_questionnaire,
)
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from page_origin import ORIGIN


def answers(folder: Path, model: str, count: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(folder / "red.png")
    lines = []
    for number in range(count):
        prompt: list[dict[str, str]] = [{"type": "text", "text": f"prompt {number} </script><b>"}]
        if number % 2:
            prompt.append({"type": "image", "image": "red.png"})
        content = [{"type": "text", "text": f"{model} says {number}"}]
        lines.append(
            {"id": str(number), "prompt": prompt, "content": content, "category": "Advice"}
        )
    file = folder / f"{model}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def payload(form: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*)</script>', form.read_text())
    assert match is not None
    return json.loads(match[1])


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    models = {name: read_answered_prompts(answers(tmp_path, name)) for name in ("ours", "theirs")}
    write_questionnaire("pairwise", models, tmp_path / "judged", date=ORIGIN.date)
    return tmp_path / "judged"


def test_forms_are_self_contained_and_name_no_model(pair: Path) -> None:
    pages = [pair / f"form_{number}.html" for number in (1, 2, 3)]
    contents = [payload(page) for page in pages]
    assert len({tuple(i["answers"][0][0]["text"] for i in c["items"]) for c in contents}) == 3
    for page, content in zip(pages, contents, strict=True):
        text = page.read_text()
        assert not [word for word in ("http:", "ours.jsonl", "Advice", "seed") if word in text]
        assert text.count("</script>") == 2, "no prompt ends the script"
        assert {len(item["answers"]) for item in content["items"]} == {2}
        pictures = [p["image"] for i in content["items"] for p in i["prompt"] if "image" in p]
        assert len(pictures) == 3 and all(p.startswith("data:image/png;base64,") for p in pictures)
    lefts = [item["answers"][0][0]["text"].split()[0] for c in contents for item in c["items"]]
    assert 3 < lefts.count("ours") < 15, "sides are random"


def test_the_same_seed_makes_the_same_forms(pair: Path, tmp_path: Path) -> None:
    models = {
        name: read_answered_prompts(tmp_path / f"{name}.jsonl") for name in ("ours", "theirs")
    }
    write_questionnaire("pairwise", models, tmp_path / "again", date=ORIGIN.date)
    for name in ("form_1.html", "form_2.html", "key.json"):
        assert (tmp_path / "again" / name).read_bytes() == (pair / name).read_bytes()
    write_questionnaire("pairwise", models, tmp_path / "other", seed=2, date=ORIGIN.date)
    assert (tmp_path / "other/form_1.html").read_bytes() != (pair / "form_1.html").read_bytes()


def fill(form: Path, choose: Any) -> Path:
    """What the page would save if an annotator chose like this."""
    content = payload(form)
    saved = {
        "format": "megatron_chameleon.judgements/1",
        "questionnaire": content["questionnaire"],
        "form": content["form"],
        "judgements": {item["id"]: choose(item) for item in content["items"]},
    }
    file = form.with_name(f"judgements_{content['form']}.json")
    file.write_text(json.dumps(saved))
    return file


def test_judgements_return_under_the_models_names(pair: Path) -> None:
    def prefers_ours(item: dict[str, Any]) -> str:
        return "left" if item["answers"][0][0]["text"].startswith("ours") else "right"

    files = [fill(pair / f"form_{number}.html", prefers_ours) for number in (1, 2, 3)]
    key = read_key(pair / "key.json")
    judgements = read_judgements(files, key)
    assert len(judgements) == 18 and {j.label for j in judgements} == {"A"}
    assert {j.annotator for j in judgements} == {"1", "2", "3"}
    assert {(j.category, j.modality) for j in judgements} == {
        ("Advice", "text only"),
        ("Advice", "mixed-modal"),
    }


def test_rows_need_no_key(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("item,annotator,label,category\n1,ann,A,Story\n1,bob,tie,\n")
    judgements = read_judgements([tmp_path / "rows.csv"])
    assert [(j.item, j.annotator, j.label) for j in judgements] == [
        ("1", "ann", "A"),
        ("1", "bob", "tie"),
    ]
    assert judgements[0].category == "Story"


def test_prompts_are_answered_for_a_form(asker: Asker, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    prompts = [
        {"id": "a", "category": "Story", "text": "a three"},
        {"id": "b", "content": [{"type": "image", "image": "red.png"}]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    options = GenerationOptions(force=Force.IMAGE, max_tokens=20)
    answered = read_answered_prompts(
        answer_prompts(asker, read_prompts(file), tmp_path / "out", options)
    )
    assert [(a.id, a.category, a.modality) for a in answered] == [
        ("a", "Story", "text only"),
        ("b", "", "mixed-modal"),
    ]
    assert answered[1].prompt[0]["image"].startswith("data:image/png")
    assert answered[0].content[0]["image"].startswith("data:image/png")
    key = write_questionnaire(
        "safety", {"ours": answered}, tmp_path / "judged", annotators=1, date=ORIGIN.date
    )
    assert read_key(key)["items"]["a"]["refusals"] == [False]


def test_mistakes(pair: Path, tmp_path: Path) -> None:
    ours, theirs = (
        read_answered_prompts(tmp_path / f"{name}.jsonl") for name in ("ours", "theirs")
    )
    with pytest.raises(
        DataError, match="1 prompts have an answer from one model only, the first is 5"
    ):
        write_questionnaire(
            "pairwise", {"a": ours, "b": theirs[:5]}, tmp_path / "x", date=ORIGIN.date
        )
    key = read_key(pair / "key.json")
    saved = fill(pair / "form_1.html", lambda item: "tie")
    with pytest.raises(DataError, match=r"only the key says what its items are\. Add --key"):
        read_judgements([saved])
    with pytest.raises(DataError, match=r"belongs to the questionnaire \w+, not x"):
        read_judgements([saved], {**key, "questionnaire": "x"})
    with pytest.raises(DataError, match="is not the key of a questionnaire"):
        read_key(saved)
    saved.write_text(saved.read_text().replace('"judgements": {', '"judgements": {"x": "tie", '))
    with pytest.raises(DataError, match="has items that the form does not have"):
        read_judgements([saved], key)
    (tmp_path / "twice.jsonl").write_text((tmp_path / "ours.jsonl").read_text() * 2)
    with pytest.raises(DataError, match="the id 0 occurs twice"):
        read_answered_prompts(tmp_path / "twice.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "prompt": "text", "content": []}\n')
    with pytest.raises(DataError, match="must be lists of parts"):
        read_answered_prompts(tmp_path / "bad.jsonl")


def test_a_longer_conversation_is_shown_with_its_speakers(asker: Asker, tmp_path: Path) -> None:
    turns = [("user", "a three"), ("assistant", "yes"), ("user", "a four"), ("assistant", "SECRET")]
    record = {"id": "a", "messages": [{"role": r, "content": text} for r, text in turns]}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    options = GenerationOptions(force=Force.TEXT, max_tokens=2)
    out = answer_prompts(asker, read_prompts(tmp_path / "p.jsonl"), tmp_path / "out", options)
    (answered,) = read_answered_prompts(out)
    text = "".join(part["text"] for part in answered.prompt)
    assert text == "User:\na three\n\nAssistant:\nyes\n\nUser:\na four"
    assert "SECRET" not in out.read_text()


@pytest.mark.parametrize("missing", ["kind", "items", "forms", "models", "questionnaire"])
def test_a_key_that_lost_something_is_refused(pair: Path, missing: str) -> None:
    content = json.loads((pair / "key.json").read_text())
    for value in (None, 5, [], {"1": 5}, {"1": {"a": 5}}):
        (pair / "key.json").write_text(json.dumps({**content, missing: value}))
        with pytest.raises(DataError, match=r"key\.json: is not the key of a questionnaire"):
            read_key(pair / "key.json")


@pytest.mark.parametrize(
    "part",
    [5, {}, {"type": ["text"]}, {"type": "video", "video": "a"}, {"type": "text", "text": 5}],
)
def test_parts_of_another_kind_are_refused(tmp_path: Path, part: Any) -> None:
    record = {"id": 1, "prompt": [part], "content": []}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: a part is neither a text nor an image"):
        read_answered_prompts(tmp_path / "a.jsonl")


def test_judgements_that_are_no_words_are_refused(pair: Path) -> None:
    form = fill(pair / "form_1.html", lambda item: ["left"])
    with pytest.raises(DataError, match="has no judgements, or some that are no words"):
        read_judgements([form], read_key(pair / "key.json"))
