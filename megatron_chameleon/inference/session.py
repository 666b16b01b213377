"""Open a trained model and ask it for text and images.

    session = Session.load("runs/digits")
    session.caption([image])                    # ["a handwritten three"]
    session.draw(["a handwritten three"])       # [<PIL.Image.Image>]

It opens exported folders of any format and training checkpoints alike. Their tensors are renamed in
memory.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_chameleon.announce import announced
from megatron_chameleon.checkpoint.formats.adapted import AdaptedReader
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.checkpoint.loading.transformers_model import read_transformers
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.inference.answers.answer import Answer, GrowingAnswer
from megatron_chameleon.inference.answers.stream import AnswerEvent
from megatron_chameleon.inference.chat import PromptFormat, prompt_format
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.batching.lockstep import AnyDecoder, LockstepDecoder
from megatron_chameleon.inference.engine.guidance import Guidance
from megatron_chameleon.inference.engine.interface import FinishReason, TokenRequest
from megatron_chameleon.inference.engine.modality import Force, TokenClasses
from megatron_chameleon.inference.engine.options import Execution, GenerationOptions, seed_of
from megatron_chameleon.inference.models.transformers_layers import TransformersLayers
from megatron_chameleon.inference.prompts import (
    PromptPart,
    answer_room,
    check_draws,
    encode_prompts,
)
from megatron_chameleon.tokenizer.common.image_form import ImageForm
from megatron_chameleon.tokenizer.folder import Tokenizer

CAPTION_OPTIONS = GenerationOptions(temperature=0, repetition_penalty=1.0)


class Session:
    """A model and its tokenizer.

    Args:
        model: transformers' ``ChameleonForConditionalGeneration``; None if a decoder is given.
        tokenizer: The model's tokenizer, including the image tokenizer.
        step: Number of optimizer updates that the model has had, or its adapter.
        prompt_format: What the model takes a prompt for.
        decoder: What decodes in place of ``model``, such as one of several tensor-parallel ranks.
        has_adapter: Whether ``step`` counts the updates of an adapter, not those of all weights.

    Attributes:
        execution: How the steps of an answer run. Change it only before the first answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        step: int,
        prompt_format: PromptFormat = PromptFormat.DOCUMENT,
        *,
        decoder: AnyDecoder | None = None,
        has_adapter: bool = False,
    ) -> None:
        self._decoder = decoder
        self.tokenizer = tokenizer
        self.step, self.has_adapter = step, has_adapter
        self.prompt_format = prompt_format
        if decoder is None:
            self.model = model.eval().requires_grad_(False)
            self.device: torch.device = model.lm_head.weight.device
            self.context_tokens: int = model.config.max_position_embeddings
            self.execution = Execution.on(self.device.type)
        else:
            self.model, self.device = None, decoder.device
            self.context_tokens, self.execution = decoder.context_tokens, decoder.execution
        self._classes = TokenClasses(tokenizer.vocabulary, self.device)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        tokenizer_folder: str | Path | None = None,
        *,
        ema: bool = False,
    ) -> "Session":
        """Open a model.

        Args:
            path: A folder written by ``chameleon convert``, a checkpoint, or a run folder, of which
                the newest checkpoint is opened.
            device: The device of the model and the image tokenizer.
            tokenizer_folder: None takes the exported folder's own tokenizer, or the path in the
                checkpoint's config.
            ema: Whether to take the moving average of a training checkpoint's weights, in fp32.

        Raises:
            CheckpointError: There is no complete model or no moving average, or the tokenizer is
                not the model's.
            DataError: The tokenizer cannot be used.
        """
        path = Path(path)
        with announced(f"loading the model from {path}"):
            reader = open_checkpoint(path, ema=ema)
            with tempfile.TemporaryDirectory() as scratch:
                tokenizer = open_tokenizer(reader, tokenizer_folder, Path(scratch), device)
            model = read_transformers(reader, tokenizer).to(device)
            return cls(
                *(model, tokenizer, reader.step, prompt_format(reader)),
                has_adapter=isinstance(reader, AdaptedReader),
            )

    @property
    def codes_per_image(self) -> int:
        """Codes of a square image that it can draw; 0 for a model that draws none."""
        return self.tokenizer.drawn_codes

    @property
    def image_form(self) -> ImageForm:
        """The form of the images that it draws."""
        return self.tokenizer.image_form

    def encode(self, prompts: Sequence[Sequence[PromptPart]]) -> list[list[int]]:
        """Token ids of prompts: ``<s>`` and the parts in order as in a document, without ``</s>``.

        Raises:
            DataError: An image cannot be read.
        """
        return encode_prompts(prompts, self.tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[PromptPart]],
        options: GenerationOptions | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Answer]:
        """Answer prompts.

        Args:
            prompts: Lists of texts and images in order. For an empty list, the model writes a
                document from its start.
            options: How to draw; None takes the reference's defaults. The first prompt is answered
                with the seed of the options, and each other one with ``seed_of`` it and its place.
            progress: Called with the number of answers so far and the total number.

        Raises:
            ConfigError: An option is out of range.
            DataError: A prompt does not fit the context, or an image cannot be read.
            CheckpointError: The model's logits are not finite.
        """
        options = options or GenerationOptions()
        seeds = [seed_of(options.seed, place) for place in range(len(prompts))]
        return self.generate_each(prompts, [replace(options, seed=s) for s in seeds], progress)

    def generate_each(
        self,
        prompts: Sequence[Sequence[PromptPart]],
        options: Sequence[GenerationOptions],
        progress: Callable[[int, int], None] = lambda done, total: None,
        answered: Callable[[int, Answer], None] = lambda place, answer: None,
    ) -> list[Answer]:
        """Answer prompts, each with options and a seed of its own; see ``generate``.

        They grow side by side, as many as the smallest ``batch_size`` allows. ``answered`` gets
        each answer as soon as it ends, with the place of its prompt.
        """
        for one in options:
            one.check()
        return self.generate_ids(self.encode(prompts), options, progress, answered)

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[GenerationOptions],
        progress: Callable[[int, int], None] = lambda done, total: None,
        answered: Callable[[int, Answer], None] = lambda place, answer: None,
    ) -> list[Answer]:
        """Like ``generate_each``, for prompts that are token ids already, such as those of a token
        file. Each of them begins with ``<s>``."""
        for one in options:
            one.check()
        requests = [
            TokenRequest(tuple(token_ids), self._max_new_tokens(len(token_ids), one), one)
            for token_ids, one in zip(prompts, options, strict=True)
        ]
        answers: dict[int, Answer] = {}
        for place, growing, _ in self._draw(requests):
            if growing.is_ended:
                answers[place] = growing.answer()
                answered(place, answers[place])
                progress(len(answers), len(requests))
        return [answers[place] for place in range(len(requests))]

    def stream(
        self, prompt: Sequence[PromptPart], options: GenerationOptions | None = None
    ) -> Iterator[AnswerEvent]:
        """Answer one prompt, in parts as they are drawn. Closing the iterator ends the answer.

        Raises:
            ConfigError, DataError, CheckpointError: As ``generate`` does.
        """
        options = options or GenerationOptions()
        options.check()
        (token_ids,) = self.encode([prompt])
        room = self._max_new_tokens(len(token_ids), options)
        request = TokenRequest(tuple(token_ids), room, options)
        for _, _, events in self._draw([request]):
            yield from events

    def _draw(
        self, requests: Sequence[TokenRequest]
    ) -> Iterator[tuple[int, GrowingAnswer, list[AnswerEvent]]]:
        """The place of an answer, the answer, and what has come of it, as the tokens are drawn."""
        decoder, asked = self.decoder(), [request.options for request in requests]
        if asked:
            rows = max(len(Guidance.of(options).passes) for options in asked)
            decoder.max_rows = rows * min(options.batch_size for options in asked)
        place_of = {decoder.add(request): place for place, request in enumerate(requests)}
        answers = {
            number: GrowingAnswer(self.tokenizer, asked[place].stop)
            for number, place in place_of.items()
        }
        try:
            while answers:
                for number, chunk in decoder.step():
                    if isinstance(chunk, ChameleonError):
                        raise chunk
                    answer, finish = answers[number], chunk.finish
                    events = answer.feed(
                        chunk.token_ids,
                        is_last=finish is not None,
                        is_complete=finish is FinishReason.STOP,
                    )
                    if answer.is_ended:
                        if finish is None:
                            decoder.cancel(number)
                        del answers[number]
                    yield place_of[number], answer, events
        except (ChameleonError, GeneratorExit):
            raise
        except BaseException:
            self._decoder = None  # it may have been interrupted anywhere
            raise
        finally:
            for number in answers:
                decoder.cancel(number)

    def caption(
        self,
        images: Sequence[Image.Image],
        prompt_text: str = "",
        options: GenerationOptions = CAPTION_OPTIONS,
    ) -> list[str]:
        """Caption images: the prompt is the image and ``prompt_text``, the answer is text."""
        prompts: list[list[PromptPart]] = [
            [image, prompt_text] if prompt_text else [image] for image in images
        ]
        answers = self.generate(prompts, replace(options, force=Force.TEXT))
        return ["".join(part for part in a.content if isinstance(part, str)) for a in answers]

    def draw(
        self,
        texts: Sequence[str],
        options: GenerationOptions | None = None,
        *,
        size: str | None = None,
    ) -> list[Image.Image]:
        """Draw one image for each text: the prompt is the text, the answer one image.

        Args:
            texts: The prompts.
            options: How to draw.
            size: The shape of the images, as ``GenerationOptions.size``; None leaves it to the
                options.
        """
        options = replace(options or GenerationOptions(), force=Force.IMAGE)
        options = options if size is None else replace(options, size=size)
        answers = self.generate([[text] for text in texts], options)
        content = (part for answer in answers for part in answer.content)
        return [part for part in content if isinstance(part, Image.Image)]

    def decoder(self) -> AnyDecoder:
        """What decodes; it keeps its buffers and graphs from one call to the next."""
        if self._decoder is None:
            codes, execution = self._classes.code_token_ids, self.execution
            layers = TransformersLayers(self.model, codes, execution.compiler)
            self._decoder = ContinuousDecoder(layers, self._classes, self.image_form, execution)
        return self._decoder

    def close(self) -> None:
        """End a decoder that was given, and with it the other ranks of the job."""
        if isinstance(self._decoder, LockstepDecoder):
            self._decoder.close()

    def _max_new_tokens(self, prompt_tokens: int, options: GenerationOptions) -> int:
        if options.force is Force.IMAGE:
            check_draws(self.tokenizer)
        return answer_room(
            prompt_tokens,
            self.context_tokens,
            self.image_form.tokens_needed(options.size),
            options.force,
            options.max_tokens,
        )
