"""Asks a model many things and stores every answer. All tasks are built on this.

    with AnswerCache(folder, model_fingerprint(session)) as answers:
        asker = Asker(session, answers)
        asker.score([("two plus two is", " four")])
        asker.write([[image, "What is it?"]], options)

Anything that already has an answer is not asked again.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.answer_cache import AnswerCache, value_digest
from megatron_chameleon.evaluation.asking.likelihood import ContinuationScore, score_continuations
from megatron_chameleon.inference.chat import ControlToken

if TYPE_CHECKING:
    from megatron_chameleon.inference.engine.options import GenerationOptions
    from megatron_chameleon.inference.prompts import PromptPart
from megatron_chameleon.inference.session import Answer, Session

Progress = Callable[[str], None]
ROUNDS = 16
"""So many times ``batch_size`` prompts are encoded at once. The next one grows as soon as an answer
ends, and only the last ones of them wait for each other."""
REPORT_SECONDS = 2.0
"""Time between two progress lines; the last line is always reported."""


class Asker:
    """A model and its stored answers.

    Args:
        session: The model.
        answers: Where the answers are stored.
        progress: Called with a line of text after each batch.
    """

    def __init__(
        self, session: "Session", answers: AnswerCache, progress: Progress = lambda line: None
    ) -> None:
        self.session = session
        self._answers = answers
        self._progress = progress
        self._reported = -REPORT_SECONDS

    def score(self, pairs: Sequence[tuple[Sequence["PromptPart"], str]]) -> list[ContinuationScore]:
        """Score texts that follow prompts.

        Args:
            pairs: A prompt, which may be empty, and the text that follows it. A space between the
                two belongs to the text.

        Raises:
            DataError: A text has no tokens, or an image cannot be read.
        """
        encoded = self._encode_pairs(pairs)
        return self.score_ids(encoded)

    def score_ids(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[ContinuationScore]:
        """Like ``score``, for token ids. Each context begins with ``<s>``."""
        keys = [value_digest(["score", *pair]) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._answers}
        names, asked = list(new), list(new.values())
        done, started = 0, time.monotonic()

        def keep(scores: dict[int, ContinuationScore]) -> None:
            nonlocal done
            done += len(scores)
            self._answers.add(
                {names[i]: [s.log_likelihood, s.is_greedy] for i, s in scores.items()}
            )
            self._report(done, len(asked), "candidates scored", started)

        score_continuations(self.session, asked, report=keep)
        return [ContinuationScore(*self._answers[key]) for key in keys]

    def write(
        self, prompts: Sequence[Sequence["PromptPart"]], options: "GenerationOptions"
    ) -> list[str]:
        """Answer prompts in text. A prompt that is asked twice gets two independent answers.

        Each answer is drawn with a seed of its own. A killed evaluation therefore continues with
        the same random draws as if it had not been killed.

        Args:
            prompts: Texts and images in order.
            options: How to generate; up to ``batch_size`` answers grow at the same time.

        Raises:
            DataError: A prompt does not fit the context, or an image cannot be read.
        """
        return [
            "".join(part for part in answer if isinstance(part, str))
            for answer in self._write(prompts, options, lambda answer: list(answer.content))
        ]

    def answer(
        self,
        prompts: Sequence[Sequence["PromptPart"]],
        options: "GenerationOptions",
        keep: Callable[["Answer"], list[Any]],
    ) -> list[list[Any]]:
        """Like ``write``, in text and images; ``keep`` turns an answer into the JSON to store."""
        return self._write(prompts, options, keep)

    def _write(
        self,
        prompts: Sequence[Sequence["PromptPart"]],
        options: "GenerationOptions",
        keep: Callable[["Answer"], list[Any]],
    ) -> list[list[Any]]:
        settings = {k: v for k, v in asdict(options).items() if k != "batch_size"}
        if not options.stop:
            del settings["stop"]  # as in the keys of answers that earlier versions stored
        seen: Counter[str] = Counter()
        keys = []
        for prompt in prompts:
            asked = value_digest(["write", prompt_as_json(prompt), settings])
            keys.append(f"{asked}-{seen[asked]}" if seen[asked] else asked)
            seen[asked] += 1
        left = [place for place, key in enumerate(keys) if key not in self._answers]
        started, before = time.monotonic(), len(keys) - len(left)
        done, together = before, ROUNDS * options.batch_size

        def store(ended: dict[str, list[Any]]) -> None:
            nonlocal done
            self._answers.add(ended)
            done += len(ended)
            self._report(done, len(keys), "answers", started, done - before)

        for start in range(0, len(left), together):
            asked_now = {keys[place]: prompts[place] for place in left[start : start + together]}
            self._answer_together(asked_now, options, keep, store)
        return [self._answers[key] for key in keys]

    def _answer_together(
        self,
        prompts: Mapping[str, Sequence["PromptPart"]],
        options: "GenerationOptions",
        keep: Callable[["Answer"], list[Any]],
        store: Callable[[dict[str, list[Any]]], None],
    ) -> None:
        """Answer prompts, and store the answers while they end, ``batch_size`` at a time."""
        keys = list(prompts)
        fitted = [self._fit(prompt, options) for prompt in prompts.values()]
        seeds = [int(value_digest([options.seed, key])[:12], 16) for key in keys]
        ended: dict[str, list[Any]] = {}

        def answered(place: int, answer: "Answer") -> None:
            ended[keys[place]] = keep(answer)
            if len(ended) >= options.batch_size:
                store(ended)
                ended.clear()

        try:
            each = [replace(options, seed=seed) for seed in seeds]
            self.session.generate_each(fitted, each, answered=answered)
        finally:
            if ended:
                store(ended)

    def _fit(
        self, prompt: Sequence["PromptPart"], options: "GenerationOptions"
    ) -> list["PromptPart"]:
        """The prompt; a text that is too long loses its beginning, to leave room for the answer."""
        parts = list(prompt)
        room = self.session.context_tokens - (options.max_tokens or 1)
        if room < 2 or any(not isinstance(part, str | TextPart) for part in parts):
            return parts
        text = "".join(_text(part) for part in parts)
        token_ids = self.session.encode([[text]])[0][1:]
        keep = room - 1
        while len(token_ids) >= room and keep > 0:
            text = self.session.tokenizer.text.decode(token_ids[-keep:])
            token_ids = self.session.encode([[text]])[0][1:]
            keep -= 1
        return [text]

    def _encode_pairs(
        self, pairs: Sequence[tuple[Sequence["PromptPart"], str]]
    ) -> list[tuple[list[int], list[int]]]:
        contexts = self.session.encode([prompt for prompt, _ in pairs])
        encoded = []
        for (prompt, text), context in zip(pairs, contexts, strict=True):
            last = prompt[-1] if prompt else None
            before = last.text if isinstance(last, TextPart) else last
            if isinstance(before, str):  # encoded together: a token may span the boundary
                tail = self.session.tokenizer.text.encode(before)
                whole = self.session.tokenizer.text.encode(before + text)
                continuation = whole[len(tail) :]
            else:
                continuation = self.session.tokenizer.text.encode(text)
            if not continuation:
                raise DataError(
                    "candidate", f"{text!r} has no tokens", "Give each candidate some text"
                )
            encoded.append((context, continuation))
        return encoded

    def _report(
        self, done: int, total: int, what: str, started: float, new: int | None = None
    ) -> None:
        now = time.monotonic()
        if done < total and now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        rate = (done if new is None else new) / max(now - started, 1e-9)
        self._progress(f"{done}/{total} {what} · {rate:.1f}/s · {(total - done) / rate:.0f} s left")


def _text(part: "PromptPart") -> str:
    assert isinstance(part, str | TextPart)
    return part if isinstance(part, str) else part.text


def prompt_as_json(prompt: Sequence["PromptPart"]) -> list[Any]:
    """A prompt as JSON. An image becomes its path, or a hash of its bytes or pixels."""
    described: list[Any] = []
    for part in prompt:
        if isinstance(part, str):
            described.append(part)
        elif isinstance(part, TextPart):
            described.append(part.text)
        elif isinstance(part, ControlToken):
            described.append({"token": part.token_id})
        elif isinstance(part, ImagePart):
            data = part.image
            name = data if isinstance(data, str) else hashlib.sha256(data).hexdigest()
            described.append({"image": name})
        else:
            assert isinstance(part, Image.Image)
            pixels = hashlib.sha256(part.convert("RGB").tobytes()).hexdigest()
            described.append({"image": pixels, "size": part.size})
    return described
