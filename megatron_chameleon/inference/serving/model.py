"""The model that is served, as requests see it: prompts to token ids, codes to pictures."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.png import data_url, png_bytes
from megatron_chameleon.inference.answers.answer import decoded
from megatron_chameleon.inference.answers.stream import DrawnImage, ImageCodes
from megatron_chameleon.inference.chat import PaddedImage, PromptFormat, prompt_of
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.prompts import PromptPart, encode_prompts
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.messages import Piece
from megatron_chameleon.inference.serving.requests.pictures import Picture
from megatron_chameleon.inference.serving.requests.refusal import bad
from megatron_chameleon.inference.serving.requests.remote import fetch_image
from megatron_chameleon.tokenizer.folder import Tokenizer

T = TypeVar("T")


class Workers:
    """Threads for what would hold up the event loop: pictures, long texts, the web."""

    def __init__(self) -> None:
        self._compute = ThreadPoolExecutor(2, "images")
        self._network = ThreadPoolExecutor(4, "fetch")

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._compute, function, *args)

    async def wait(self, function: Callable[..., T], *args: Any) -> T:
        """Run what mostly waits for the network."""
        return await asyncio.get_running_loop().run_in_executor(self._network, function, *args)

    def close(self) -> None:
        for pool in (self._compute, self._network):
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class ServedModel:
    """What is served under one name."""

    name: str
    tokenizer: Tokenizer
    format: PromptFormat
    """How a conversation becomes a prompt unless a request says."""
    context_tokens: int
    defaults: GenerationOptions = field(default_factory=GenerationOptions)
    created: int = field(default_factory=lambda: int(time.time()))
    examples: tuple[str, ...] = ()
    """Messages that the page suggests."""

    @property
    def draws(self) -> bool:
        """Whether it draws images."""
        return self.tokenizer.image_form.draws

    def description(self, limits: Limits) -> dict[str, Any]:
        """The object of ``/v1/models``."""
        image = self.tokenizer.image
        has_images, edge = image is not None, image.resolution if image else 0
        hidden = ("max_tokens", "batch_size", "seed", "stop", "force")
        defaults = {k: v for k, v in asdict(self.defaults).items() if k not in hidden}
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "megatron_chameleon",
            "chameleon": {
                "format": self.format.value,
                "images_in": has_images,
                "images_out": self.draws and self.defaults.images,
                "context_tokens": self.context_tokens,
                "codes_per_image": image.codes_per_image if image else 0,
                "image_size": [edge, edge] if has_images else None,
                "image_shapes": bool(self.tokenizer.image_form.grids),
                "defaults": defaults,
                "examples": list(self.examples),
                "limits": {
                    "images": limits.images,
                    "image_bytes": limits.image_bytes,
                    "image_pixels": limits.image_pixels,
                    "body_bytes": limits.body_bytes,
                    "messages": limits.messages,
                    "answers": limits.answers,
                    "prompt_tokens": limits.prompt_tokens,
                    "max_tokens": limits.max_tokens,
                },
            },
        }


class PromptEncoder:
    """Turns what a client sent into token ids, off the event loop."""

    def __init__(self, model: ServedModel, limits: Limits, workers: Workers) -> None:
        self._model, self._limits, self._workers = model, limits, workers
        tokens = model.tokenizer.vocabulary.tokens
        self._most_characters = model.context_tokens * max(map(len, tokens))
        """A token has no more characters than its name."""

    async def of_pieces(self, pieces: Sequence[Piece], form: str) -> list[int]:
        """Token ids of a conversation.

        Raises:
            Refusal: An image cannot be fetched or decoded, or the model reads none.
        """
        if self._model.tokenizer.image is None:
            for piece in pieces:
                if isinstance(piece.content, Picture):
                    what = "this model has no image tokenizer, so it reads only text"
                    raise bad(piece.content.where, what, "Send text alone", "images_not_supported")
        self._check_length(piece.content for piece in pieces if isinstance(piece.content, str))
        files = [await self._fetched(piece) for piece in pieces]
        return await self._workers.run(self._encode, files, form)

    async def of_text(self, text: str) -> list[int]:
        """Token ids of the beginning of a document.

        Raises:
            Refusal: It is longer than the context by far.
        """
        self._check_length([text])
        return (await self._workers.run(encode_prompts, [[text]], self._model.tokenizer))[0]

    def _check_length(self, texts: Iterable[str]) -> None:
        """Refuse texts that cannot fit, before they are encoded."""
        count = sum(map(len, texts))
        if count > self._most_characters:
            context = self._model.context_tokens
            what = f"its {count:,} characters have more tokens than the context of {context:,}"
            raise bad("prompt", what, "Shorten it", "context_length_exceeded")

    async def _fetched(self, piece: Piece) -> Piece:
        content = piece.content
        if isinstance(content, str) or content.data is not None:
            return piece
        data = await self._workers.wait(fetch_image, content.address, content.where, self._limits)
        return Piece(piece.role, Picture(content.where, data))

    def _encode(self, pieces: Sequence[Piece], form: str) -> list[int]:
        limits, tokenizer = self._limits, self._model.tokenizer
        content = [
            TextPart(p.content) if isinstance(p.content, str) else p.content.part(limits)
            for p in pieces
        ]
        roles = tuple(piece.role for piece in pieces)
        document = Document("", "", tuple(content), "messages", roles)
        parts = prompt_of(document, tokenizer, PromptFormat(form))
        pictures = iter([p.content for p in pieces if isinstance(p.content, Picture)])
        small: list[PromptPart] = [
            self._opened(p, next(pictures)) if isinstance(p, ImagePart) else p for p in parts
        ]
        return encode_prompts([small], tokenizer)[0]

    def _opened(self, part: ImagePart, picture: Picture) -> Image.Image:
        """An image in the tokenizer's size; one large image at a time is in memory."""
        image_tokenizer = self._model.tokenizer.image
        assert image_tokenizer is not None
        try:
            image = part.open()
            if isinstance(part, PaddedImage):
                return image
            return Image.fromarray(image_tokenizer.prepare(image)[1])
        except (ImageError, DataError) as error:
            raise bad(picture.where, error.what, error.remedy, "invalid_image") from error


class PictureMaker:
    """Turns image codes into data URLs, off the event loop."""

    def __init__(self, model: ServedModel, workers: Workers) -> None:
        self._model, self._workers = model, workers

    async def whole(self, drawn: DrawnImage) -> str:
        """A PNG of one image, as a data: URL."""
        return await self._workers.run(self._whole, drawn)

    async def growing(self, grown: ImageCodes) -> str:
        """A PNG of the first codes of an image; what is missing is transparent."""
        return await self._workers.run(self._growing, grown)

    def _whole(self, drawn: DrawnImage) -> str:
        return data_url(png_bytes(decoded(drawn, self._model.tokenizer)))

    def _growing(self, grown: ImageCodes) -> str:
        codes, grid = grown.codes, grown.grid
        # The decoder needs a whole image: the last code goes on, where it is not seen.
        filled = np.concatenate([codes, np.full(grid.codes - len(codes), codes[-1])])
        image = decoded(DrawnImage(grid, filled), self._model.tokenizer)
        known = (np.arange(grid.codes) < len(codes)).reshape(grid)
        mask = Image.fromarray(known.astype(np.uint8) * 255)
        image.putalpha(mask.resize(image.size, Image.Resampling.NEAREST))
        return data_url(png_bytes(image))
