"""Questionnaires: HTML forms without the models' names, the key to them, and the judgements.

    FOLDER/form_1.html ...   one per annotator: open it in a browser, judge, save the JSON
    FOLDER/key.json          which answer is where; do not show it to the annotators

Each form has its own order of items, and its own sides for the two answers of a pair.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_chameleon.data.documents.image_part import ImagePart, image_part
from megatron_chameleon.data.documents.records import record_name
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.answer_cache import value_digest
from megatron_chameleon.evaluation.asking.record_files import read_json, read_records, require_keys
from megatron_chameleon.evaluation.human.form_page import form_page
from megatron_chameleon.evaluation.human.safety import looks_like_refusal
from megatron_chameleon.evaluation.human.scores import LABELS, Judgement
from megatron_chameleon.files import write_text
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.pixels import upright_rgb
from megatron_chameleon.images.png import data_url, png_bytes
from megatron_chameleon.images.references import ImageFolder
from megatron_chameleon.pages.page import Origin

KEY_FORMAT = "megatron_chameleon.questionnaire/1"
JUDGEMENTS_FORMAT = "megatron_chameleon.judgements/1"
KEY_FILE = "key.json"


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and a model's answer to it.

    Both are lists of parts of the form ``{"type": "text" | "image", ...}``.
    """

    id: str
    prompt: list[dict[str, str]]
    content: list[dict[str, str]]
    category: str
    modality: str
    images: ImageFolder
    """Where the images of both lie."""

    @property
    def text(self) -> str:
        """The answer without its images."""
        return "".join(part.get("text", "") for part in self.content)


def read_answered_prompts(
    path: str | Path, images: ImageOptions | None = None
) -> list[AnsweredPrompt]:
    """Read answers as ``chameleon annotate answer`` and ``chameleon generate`` write them.

    Args:
        path: The file.
        images: Where images may lie, and how they are read.

    Raises:
        DataError: The file cannot be read, or an id occurs twice in it.
    """
    path = Path(path)
    found: dict[str, AnsweredPrompt] = {}
    for number, record in enumerate(read_records(path), start=1):
        where = f"{path}:{number}"
        require_keys(record, ("id", "prompt", "content"), where)
        prompt = _parts(record["prompt"], where)
        content = _parts(record["content"], where)
        has_image = any(part["type"] == "image" for part in prompt)
        modality = str(record.get("modality") or ("mixed-modal" if has_image else "text only"))
        name = record_name(record["id"], "")
        if name in found:
            raise DataError(where, f"the id {name} occurs twice", "Give each answer its own id")
        found[name] = AnsweredPrompt(
            *(name, prompt, content, str(record.get("category") or ""), modality),
            images=ImageFolder.of(path, images),
        )
    return list(found.values())


def write_questionnaire(
    kind: str,
    models: Mapping[str, Sequence[AnsweredPrompt]],
    folder: Path,
    annotators: int = 3,
    seed: int = 1,
    *,
    date: datetime,
) -> Path:
    """Write the forms of a questionnaire and their key.

    Args:
        kind: ``absolute``, ``pairwise`` or ``safety``.
        models: The answers of one model by its name; for ``pairwise`` of two models, A first.
        folder: The folder to write to. It is created if it does not exist.
        annotators: The number of forms.
        seed: Seed of the orders and sides; the key keeps it, and no form has it.
        date: When the forms are written, with a time zone.

    Returns:
        The path of the key.

    Raises:
        DataError: The models did not answer the same prompts, or an image cannot be read.
    """
    names = list(models)
    answers = [{answer.id: answer for answer in found} for found in models.values()]
    _check_same(names, answers)
    identity = value_digest(
        [
            *(kind, seed),
            [[a.id, a.prompt, a.content, a.images.path] for f in answers for a in f.values()],
        ]
    )
    key = {**_key(kind, identity, names, answers), "seed": seed}
    origin = Origin(f"chameleon annotate prepare {kind}", date)  # without the names of files
    for annotator in range(1, annotators + 1):
        draw = random.Random(f"{seed}-{annotator}-{identity}")
        items, places = _form_items(identity, annotator, answers, draw)
        key["forms"][str(annotator)] = places
        page = form_page(kind, identity, str(annotator), items, origin)
        write_text(folder / f"form_{annotator}.html", page)
    write_text(folder / KEY_FILE, json.dumps(key, ensure_ascii=False, indent=1) + "\n")
    return folder / KEY_FILE


def _key(
    kind: str,
    identity: str,
    names: Sequence[str],
    answers: Sequence[Mapping[str, AnsweredPrompt]],
) -> dict[str, Any]:
    """The key without the places of the items in the forms, which are added form by form."""
    return {
        "format": KEY_FORMAT,
        "questionnaire": identity,
        "kind": kind,
        "models": dict(zip("AB", names, strict=False)),
        "items": {
            answer.id: {
                "category": answer.category,
                "modality": answer.modality,
                "refusals": [looks_like_refusal(found[answer.id].text) for found in answers],
            }
            for answer in answers[0].values()
        },
        "forms": {},
    }


def _form_items(
    identity: str,
    annotator: int,
    answers: Sequence[Mapping[str, AnsweredPrompt]],
    draw: random.Random,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The items of one form in a random order, and what each of them is, for the key."""
    order = list(answers[0])
    draw.shuffle(order)
    items, places = [], {}
    for name in order:
        sides = [found[name] for found in answers]
        swapped = len(sides) == 2 and draw.random() < 0.5
        item = value_digest([identity, annotator, name])
        places[item] = {"item": name, "swapped": swapped}
        shown = sides[::-1] if swapped else sides
        items.append(
            {
                "id": item,
                "prompt": _inline(sides[0].prompt, sides[0].images),
                "answers": [_inline(side.content, side.images) for side in shown],
            }
        )
    return items, places


def _check_same(names: Sequence[str], answers: Sequence[Mapping[str, AnsweredPrompt]]) -> None:
    if len(answers) == 1:
        return
    first, second = answers
    if odd := sorted(set(first) ^ set(second)):
        what = f"{len(odd)} prompts have an answer from one model only, the first is {odd[0]}"
        raise DataError(" and ".join(names), what, "Pass two models' answers to the same prompts")
    for name in first:
        texts = [
            [part.get("text") for part in side[name].prompt if part["type"] == "text"]
            for side in answers
        ]
        if texts[0] != texts[1]:
            what = f"the prompt {name} differs between the two files"
            raise DataError(" and ".join(names), what, "Pass answers to the same prompts")


def read_key(path: str | Path) -> dict[str, Any]:
    """Read the key of a questionnaire.

    Raises:
        DataError: The file is not such a key.
    """
    key = read_json(path)
    if not isinstance(key, dict) or key.get("format") != KEY_FORMAT or not _is_whole(key):
        remedy = "Pass the key.json that `chameleon annotate prepare` wrote"
        raise DataError(str(path), "is not the key of a questionnaire", remedy)
    return key


def _is_whole(key: Mapping[str, Any]) -> bool:
    """Whether a key has all that ``prepare`` writes, so that scoring can rely on it."""
    items, forms, models = key.get("items"), key.get("forms"), key.get("models")
    if not (isinstance(items, dict) and isinstance(forms, dict) and isinstance(models, dict)):
        return False
    abouts = all(
        isinstance(about, dict)
        and isinstance(about.get("category"), str)
        and isinstance(about.get("modality"), str)
        and isinstance(about.get("refusals"), list)
        and bool(about["refusals"])
        for about in items.values()
    )
    places = [place for form in forms.values() for place in _values(form)]
    return (
        abouts
        and bool(items)
        and key.get("kind") in tuple(LABELS)
        and isinstance(key.get("questionnaire"), str)
        and all(isinstance(name, str) for name in models.values())
        and all(isinstance(form, dict) for form in forms.values())
        and all(
            isinstance(place, dict)
            and isinstance(place.get("item"), str)
            and place["item"] in items
            and isinstance(place.get("swapped"), bool)
            for place in places
        )
    )


def _values(form: Any) -> list[Any]:
    return list(form.values()) if isinstance(form, dict) else []


def read_judgements(
    files: Sequence[str | Path], key: Mapping[str, Any] | None = None
) -> list[Judgement]:
    """Read judgements from saved forms or from tables.

    Saved forms (``.json``) need the key. Tables (``.csv``, ``.jsonl``, ``.parquet``) have the
    columns ``item``, ``annotator`` and ``label``, and may have ``category`` and ``modality``. In a
    pairwise table the labels are A, B and tie, not left and right.

    Args:
        files: Saved forms and tables.
        key: What ``read_key`` returns.

    Raises:
        DataError: A file cannot be read, belongs to another questionnaire, or needs a key.
    """
    found: list[Judgement] = []
    for file in map(Path, files):
        if file.suffix == ".json":
            found += _read_form(file, key)
        else:
            found += _read_rows(file, key)
    return found


def _read_form(file: Path, key: Mapping[str, Any] | None) -> Iterable[Judgement]:
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != JUDGEMENTS_FORMAT:
        raise DataError(str(file), "is not a file of judgements", "Pass a file that a form saved")
    if key is None:
        raise DataError(str(file), "only the key says what its items are", "Add --key key.json")
    if content.get("questionnaire") != key["questionnaire"]:
        ours, theirs = key["questionnaire"], content.get("questionnaire")
        what = f"belongs to the questionnaire {theirs}, not {ours}"
        raise DataError(str(file), what, "Pass the key that was written with the form")
    form = str(content.get("form"))
    places = key["forms"].get(form)
    judged = content.get("judgements")
    if not isinstance(judged, dict) or not all(isinstance(v, str) for v in judged.values()):
        what = "has no judgements, or some that are no words"
        raise DataError(str(file), what, "Ask for the file again")
    if places is None or not set(judged) <= set(places):
        raise DataError(
            str(file), "has items that the form does not have", "Ask for the file again"
        )
    sides = {"left": ("A", "B"), "right": ("B", "A")}
    for item, label in judged.items():
        place = places[item]
        if label in sides:
            label = sides[label][place["swapped"]]
        about = key["items"][place["item"]]
        yield Judgement(place["item"], form, label, about["category"], about["modality"])


def _read_rows(file: Path, key: Mapping[str, Any] | None) -> Iterable[Judgement]:
    items = key["items"] if key else {}
    for number, row in enumerate(read_records(file), start=1):
        require_keys(row, ("item", "annotator", "label"), f"{file}:{number}")
        about = items.get(str(row["item"]), {})
        yield Judgement(
            *(str(row["item"]), str(row["annotator"]), str(row["label"]).strip()),
            category=str(row.get("category") or about.get("category", "")),
            modality=str(row.get("modality") or about.get("modality", "")),
        )


def _parts(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise DataError(where, "`prompt` and `content` must be lists of parts", "Write lists")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image") or not isinstance(part.get(kind), str):
            raise DataError(
                where, "a part is neither a text nor an image", "Write parts as in documents"
            )
    return value


def _inline(parts: Sequence[Mapping[str, str]], images: ImageFolder) -> list[dict[str, str]]:
    """The same parts, with images as ``data:`` URIs."""
    shown = []
    for part in parts:
        if part["type"] == "image":
            image = image_part(part["image"], images).open()
            shown.append({"type": "image", "image": data_uri(image)})
        else:
            shown.append({"type": "text", "text": part["text"]})
    return shown


def data_uri(image: Any) -> str:
    """A ``data:`` URI with a PIL image as PNG, as a model sees it."""
    return data_url(png_bytes(upright_rgb(image)))


def part_json(part: TextPart | ImagePart) -> dict[str, str]:
    """A part of a prompt as it is written in documents."""
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": data_uri(part.open())}
