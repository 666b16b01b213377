"""A service with a stand-in engine, and the tiny tokenizer."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from megatron_chameleon.inference.chat import PromptFormat
from megatron_chameleon.inference.serving.app import ChameleonApp, Service
from megatron_chameleon.inference.serving.model import ServedModel
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from stand_in_engine import StandInEngine


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> StandInEngine:
    return StandInEngine(tokenizer)


@pytest.fixture
def make_app(tokenizer: Tokenizer, engine: StandInEngine):
    """Makes an application; words are fields of ``Service``."""
    made = []

    def make(model: ServedModel | None = None, **fields) -> ChameleonApp:
        model = model or ServedModel("tiny", tokenizer, PromptFormat.CHAT, engine.context_tokens)
        made.append(ChameleonApp(Service(engine, model, **fields)))
        return made[-1]

    yield make
    for app in made:
        app.close()


@pytest.fixture
def app(make_app) -> ChameleonApp:
    return make_app()


def url_of(image: Image.Image, kind: str = "png") -> str:
    content = io.BytesIO()
    image.save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


@pytest.fixture(scope="session")
def picture() -> str:
    """A data: URL of a small picture."""
    return url_of(Image.new("RGB", (12, 8), "teal"))
