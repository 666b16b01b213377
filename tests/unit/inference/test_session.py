"""Sessions on checkpoints and exported folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import CheckpointError, ConfigError, DataError
from megatron_chameleon.inference.answers.answer import content_of
from megatron_chameleon.inference.answers.stream import AnswerEnd
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session
from tiny_model import write_tokenizer

RED = Image.new("RGB", (9, 12), "red")
NOISE = Image.fromarray(np.random.default_rng(1).integers(256, size=(8, 8, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> Session:
    return Session.load(tiny_checkpoint.parents[1])


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny_checkpoint, tmp_path_factory.mktemp("session") / "hf", "hf").destination


def test_checkpoint_and_export_give_the_same_answers(session: Session, exported: Path) -> None:
    other = Session.load(exported)
    prompts = [["a handwritten"], [NOISE, "is"], []]
    options = GenerationOptions(seed=5)
    first, second = (s.generate(prompts, options) for s in (session, other))
    assert [a.token_ids for a in first] == [a.token_ids for a in second]
    assert session.step == other.step == 7


def test_prompts_are_documents_without_their_end(session: Session) -> None:
    vocabulary, tokenizer = session.tokenizer.vocabulary, session.tokenizer
    assert tokenizer.image is not None
    (token_ids,) = session.encode([["one", NOISE, TextPart("two")]])
    codes = vocabulary.codes_to_token_ids(tokenizer.image.encode([NOISE])[0]).tolist()
    assert token_ids == [
        vocabulary.bos,
        *tokenizer.text.encode("one"),
        vocabulary.begin_image,
        *codes,
        vocabulary.end_image,
        *tokenizer.text.encode("two"),
    ]


def test_image_parts_are_opened(session: Session, tmp_path: Path) -> None:
    NOISE.save(tmp_path / "noise.png")
    assert session.encode([[ImagePart(str(tmp_path / "noise.png"))]]) == session.encode([[NOISE]])


def test_an_answer_fills_the_context_and_no_more(session: Session) -> None:
    for answer, prompt in zip(
        session.generate([["a"], [NOISE]], GenerationOptions(seed=3)), (["a"], [NOISE]), strict=True
    ):
        used = len(session.encode([prompt])[0]) + len(answer.token_ids)
        ended = answer.token_ids[-1] == session.tokenizer.vocabulary.eos
        assert used == 64 or (ended and used < 64)


def test_content_is_what_the_tokens_say(session: Session) -> None:
    """Texts and images in order; an image is decoded from the codes between its sentinels."""
    vocabulary, image = session.tokenizer.vocabulary, session.tokenizer.image
    assert image is not None
    answers = session.generate([["a"]] * 40, GenerationOptions(seed=1, temperature=1.0, top_p=1.0))
    assert any(len(answer.content) == 3 for answer in answers)
    for answer in answers:
        images = [part for part in answer.content if isinstance(part, Image.Image)]
        starts = [i for i, t in enumerate(answer.token_ids) if t == vocabulary.begin_image]
        assert len(images) == len(starts)
        for part, start in zip(images, starts, strict=True):
            ids = np.array(answer.token_ids[start + 1 : start + 17])
            assert answer.token_ids[start + 17] == vocabulary.end_image
            expected = image.decode(vocabulary.token_ids_to_codes(ids)[None])[0]
            assert part.tobytes() == expected.tobytes()
        texts = "".join(part for part in answer.content if isinstance(part, str))
        if not images:
            assert texts == session.tokenizer.text.decode(answer.token_ids)


def test_captions_are_greedy_text(session: Session) -> None:
    captions = session.caption([RED, NOISE])
    assert len(captions) == 2
    assert captions == session.caption([RED, NOISE])
    assert captions[1:] == session.caption([NOISE])
    assert session.caption([RED], "digit") != captions[:1]


def test_drawings_are_one_image_each(session: Session) -> None:
    images = session.draw(["one", "a handwritten two", ""])
    assert [image.size for image in images] == [(8, 8)] * 3


def test_the_seed_decides_what_is_drawn(session: Session) -> None:
    options = [GenerationOptions(seed=seed) for seed in (1, 1, 2)]
    first, same, other = (session.generate([["a"]], o)[0].token_ids for o in options)
    assert first == same != other


def test_torchs_own_generator_is_left_alone(session: Session) -> None:
    before = torch.get_rng_state()
    session.generate([["a"]])
    assert torch.equal(before, torch.get_rng_state())


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(session: Session) -> None:
    with pytest.raises(DataError, match=r"its 64 tokens leave too little room .* 64 for an answer"):
        session.generate([["\x01" * 63]])
    message = (
        r"its 47 tokens .* 64 for an image, which needs 18 more\. Shorten it to at most 46 tokens"
    )
    with pytest.raises(DataError, match=message):
        session.generate([["\x01" * 46]], GenerationOptions(force=Force.IMAGE))
    assert session.generate([["\x01" * 45]], GenerationOptions(force=Force.IMAGE))


def test_too_few_tokens_for_an_image_are_refused(session: Session) -> None:
    options = GenerationOptions(force=Force.IMAGE, max_tokens=17)
    with pytest.raises(DataError, match="17 is too few for an image, which has 18 tokens"):
        session.generate([["a"]], options)


def test_another_tokenizer_is_refused(
    tiny_checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    other = write_tokenizer(tmp_path / "other", seed=2)
    for source in (tiny_checkpoint, exported):
        with pytest.raises(CheckpointError, match="its fingerprint is"):
            Session.load(source, tokenizer_folder=other)


def test_an_export_that_lost_a_tensor_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "hf"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the tensor model\.norm\.weight is missing"):
        Session.load(folder)


def test_a_folder_that_is_not_our_export_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "hf"))
    (folder / "chameleon.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(CheckpointError, match=r"format is 'x', this version reads"):
        Session.load(folder)
    (folder / "chameleon.json").unlink()
    (folder / "text.model").unlink()
    with pytest.raises(CheckpointError, match=r"has no text\.model: .*Give a tokenizer folder"):
        Session.load(folder)


def test_an_export_of_transformers_opens_with_a_tokenizer(
    exported: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "hf"))
    for name in ("chameleon.json", "text.model", "vocabulary.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "image_tokenizer")
    session = Session.load(folder, tokenizer_folder=tiny_tokenizer)
    weights = session.model.state_dict()
    for name, tensor in Session.load(exported).model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    other = write_tokenizer(tmp_path / "other", seed=2)
    with pytest.raises(CheckpointError, match=r"other: its image encoder is not that of .*/hf: "):
        Session.load(folder, tokenizer_folder=other)


def test_bad_options_are_refused_before_anything_is_drawn(session: Session) -> None:
    with pytest.raises(ConfigError, match="top_p: 2"):
        session.generate([["a"]], GenerationOptions(top_p=2))


@pytest.mark.parametrize("to", ["meta", "megatron"])
def test_converted_checkpoints_open_too(tiny_checkpoint: Path, tmp_path: Path, to: str) -> None:
    convert(tiny_checkpoint, tmp_path / to, to, verify=False)
    expected = Session.load(tiny_checkpoint)
    session = Session.load(tmp_path / to)
    assert session.step == expected.step == 7
    assert session.tokenizer.fingerprint == expected.tokenizer.fingerprint
    weights = session.model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_a_stream_is_the_answer_in_parts(session: Session) -> None:
    """Also beside stop strings and limits; and whoever stops listening leaves nothing behind."""
    for options in (
        GenerationOptions(seed=3, temperature=1.2, max_tokens=40),
        GenerationOptions(seed=4, temperature=1.2, max_tokens=9, stop=("a", "e", " ")),
        GenerationOptions(seed=5, force=Force.IMAGE),
    ):
        (answer,) = session.generate([["a"]], options)
        events = list(session.stream(["a"], options))
        parts = content_of(events)
        texts = [part for part in answer.content if isinstance(part, str)]
        assert [part for part in parts if isinstance(part, str)] == texts
        assert len(parts) == len(answer.content) and isinstance(events[-1], AnswerEnd)
        ended_itself = answer.token_ids[-1] in (
            session.tokenizer.vocabulary.eos,
            *([session.tokenizer.vocabulary.end_image] if options.force else []),
        )
        assert events[-1].is_complete is ended_itself
    stream = session.stream(["a"], GenerationOptions(max_tokens=40, images=False))
    next(stream)
    assert session.decoder().usage().running == 1
    stream.close()  # type: ignore[attr-defined]
    assert session.decoder().usage().running == 0
    with pytest.raises(DataError, match=r"its 64 tokens leave too little room"):
        next(session.stream(["\x01" * 63]))
