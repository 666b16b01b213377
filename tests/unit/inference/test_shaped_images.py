"""Sessions, streams and servers whose images have grids of their own."""

import base64
import io
import shutil
from pathlib import Path

import pytest
from PIL import Image

from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.answers.answer import content_of
from megatron_chameleon.inference.answers.stream import ImageCodes, ImageIncomplete
from megatron_chameleon.inference.chat import PromptFormat
from megatron_chameleon.inference.conversation import Conversation
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.prompts import encode_prompts
from megatron_chameleon.inference.serving.model import PictureMaker, ServedModel, Workers
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.refusal import Refusal
from megatron_chameleon.inference.serving.requests.token_ids import check_token_ids
from megatron_chameleon.inference.session import Session
from megatron_chameleon.tokenizer.common.grids import Grid, Shapes
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer
from random_model import ShapedModel

SHAPES = Shapes(12, 4)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("shaped") / "tokenizer"
    shutil.copytree(tiny_tokenizer, folder)
    codes = load_tokenizer(tiny_tokenizer).vocabulary.image_codes
    train_text_tokenizer(["a handwritten three and a seven"] * 30, folder, 320, codes, SHAPES)
    return load_tokenizer(folder)


@pytest.fixture
def session(tokenizer: Tokenizer) -> Session:
    model = ShapedModel(endless=True)
    model.classes, model.form = TokenClasses(tokenizer.vocabulary), tokenizer.image_form
    return Session(None, tokenizer, 0, decoder=model.decoder())


def test_images_have_the_pixels_of_the_grid_that_was_asked_for(session: Session) -> None:
    image = session.tokenizer.image
    for size, grid in (("3:1", (2, 6)), ("100x300", (6, 2)), ("640x640", (3, 3))):
        drawn = session.draw(["three"] * 3, size=size)
        assert [picture.size for picture in drawn] == [image.size_of(Grid(*grid))] * 3
    answers = session.generate([["a"]] * 12, GenerationOptions(force=Force.IMAGE))
    sizes = set()
    for answer in answers:
        grid, _ = session.tokenizer.vocabulary.read_image(answer.token_ids[1:-1])
        (picture,) = answer.content
        assert picture.size == image.size_of(grid)
        sizes.add(picture.size)
    assert len(sizes) > 2
    with pytest.raises(DataError, match=r"10 is too few for an image, which has 17 tokens"):
        session.draw(["a"], GenerationOptions(max_tokens=10), size="3:1")


def test_a_stream_tells_the_grid_as_soon_as_codes_come(session: Session) -> None:
    options = GenerationOptions(force=Force.IMAGE, size="3:1", seed=4)
    events = list(session.stream(["three"], options))
    grown = [event for event in events if isinstance(event, ImageCodes)]
    assert [len(event.codes) for event in grown] == sorted(len(event.codes) for event in grown)
    assert {event.grid for event in grown} == {(2, 6)} and len(grown) > 10
    (drawn,) = content_of(events)
    assert drawn.grid == (2, 6) and len(drawn.codes) == 12
    maker = PictureMaker(ServedModel("m", session.tokenizer, PromptFormat.DOCUMENT, 90), Workers())
    edge = session.tokenizer.image.size_of(Grid(1, 1))[0]
    url = maker._growing(next(event for event in grown if len(event.codes) == 8))
    growing = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert growing.size == (6 * edge, 2 * edge)
    # the first row is there, and two codes of the second one
    alpha = [[growing.getpixel((x * edge, y * edge))[3] for x in range(6)] for y in range(2)]
    assert alpha == [[255] * 6, [255] * 2 + [0] * 4]


def test_an_answer_that_ends_in_an_image_is_incomplete(session: Session) -> None:
    from megatron_chameleon.inference.answers.stream import AnswerStream

    v = session.tokenizer.vocabulary
    ids = [v.begin_image, v.grid_token(Grid(2, 6)), *v.code_token_ids[:3].tolist()]
    for cut in range(1, 6):
        stream = AnswerStream(session.tokenizer)
        stream.feed(ids[:cut])
        (last,) = stream.finish()
        assert isinstance(last, ImageIncomplete) and len(last.codes) == max(0, cut - 2)
    stream = AnswerStream(session.tokenizer)
    with pytest.raises(DataError, match=r"cannot come in an image that lacks its grid"):
        stream.feed([v.begin_image, v.end_row])


def test_images_of_a_conversation_keep_their_shape_and_codes(session: Session) -> None:
    tokenizer = session.tokenizer
    v = tokenizer.vocabulary
    (ids,) = encode_prompts([[Image.new("RGB", (30, 10), "red"), "a"]], tokenizer)
    grid, _ = v.read_image(ids[2 : ids.index(v.end_image)])
    assert grid == SHAPES.grid_of(30, 10) == (2, 6)
    chat = Conversation(tokenizer, PromptFormat.CHAT)
    chat.say([TextPart("a")])
    events = list(session.stream(chat.prompt(), GenerationOptions(force=Force.IMAGE, size="1:3")))
    (drawn,) = content_of(events)
    chat.answer([drawn], tokenizer.image.decode_shaped([drawn]))
    chat.say([TextPart("a")])
    (ids,) = encode_prompts([chat.prompt()], tokenizer)
    inside = ids[ids.index(v.begin_image) + 1 : ids.index(v.end_image)]
    assert inside == v.image_tokens(drawn.codes, drawn.grid).tolist() and drawn.grid == (6, 2)


def test_prompts_of_token_ids_have_whole_images_alone(tokenizer: Tokenizer) -> None:
    v, form = tokenizer.vocabulary, tokenizer.image_form
    codes = v.code_token_ids[:6].tolist()
    grid, row, begin, end = v.grid_token(Grid(2, 6)), v.end_row, v.begin_image, v.end_image
    whole = [v.bos, begin, grid, *codes, row, *codes, row, end]
    assert check_token_ids(whole, form, "prompt") == whole
    for ids, words in (
        (whole[:2], "its last image lacks its grid"),
        (whole[:-1], "its last image lacks its end"),
        (whole[:-2], "its last image lacks the end of its last row"),
        ([*whole[:8], row], "in an image that lacks 7 codes"),
        ([*whole[:9], codes[0]], "in an image that lacks 6 codes"),
        ([v.bos, begin, codes[0]], "in an image that lacks its grid"),
        ([v.bos, begin, grid, grid], "in an image that lacks 12 codes"),
        ([*whole, row], "cannot stand outside an image"),
        ([*whole, grid], "cannot stand outside an image"),
        ([v.bos, end], "cannot stand outside an image"),
    ):
        with pytest.raises(Refusal, match=words):
            check_token_ids(ids, form, "prompt")


def test_a_server_says_that_it_draws_other_shapes(tokenizer: Tokenizer) -> None:
    model = ServedModel("m", tokenizer, PromptFormat.DOCUMENT, 90)
    assert model.description(Limits())["chameleon"]["image_shapes"] is True
