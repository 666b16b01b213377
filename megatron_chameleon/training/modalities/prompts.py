"""What a model is asked: prompts of held-out conversations, whose answers say what to expect.

    prompts = held_out_prompts(corpora, tokenizer, context_tokens=4096, most=16)

Where no held-out answer is a text, or none is an image, a few built-in prompts stand in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.mixture.corpus import Corpus
from megatron_chameleon.inference.answers.answer import content_of
from megatron_chameleon.inference.answers.stream import AnswerStream
from megatron_chameleon.runs.answers.modalities import ASKED_FOR, Modality, modality_of
from megatron_chameleon.tokenizer.folder import Tokenizer

LOOKED_AT = 40
"""So many documents of a source are read, at most, for each prompt that is wanted of a kind."""
BUILT_IN = {
    Modality.TEXT: (
        "What is two plus two?",
        "Name three animals that live in the sea.",
        "Why is the sky blue?",
        "What is the capital of France?",
    ),
    Modality.IMAGE: (
        "Draw a picture of a cat.",
        "Show me an image of a mountain lake.",
        "Please draw a red circle.",
        "Can you paint a house with a garden?",
    ),
}


@dataclass(frozen=True)
class AskedPrompt:
    """A conversation up to the answer that the model should give."""

    expected: Modality
    token_ids: tuple[int, ...]
    """From ``<s>`` to the separator that the answer follows."""
    answer_tokens: int
    """Of the held-out answer, with its ``</s>``; 0 for a built-in prompt."""
    is_built_in: bool = False


def held_out_prompts(
    corpora: Sequence[Corpus], tokenizer: Tokenizer, context_tokens: int, most: int
) -> list[AskedPrompt]:
    """Choose prompts of held-out conversations, always the same ones.

    Each kind of answer is looked for in all sources in turn, in documents from all over their
    files. A prompt that leaves no room for an image is not used, because the model could then not
    answer in the wrong modality.

    Args:
        corpora: The held-out documents; those that are not conversations are passed over.
        tokenizer: The model's tokenizer, with its image tokenizer.
        context_tokens: The largest number of tokens of a prompt and its answer.
        most: How many prompts of each kind of answer.

    Returns:
        By the kind of answer.

    Raises:
        DataError: A token file is damaged.
    """
    found: dict[Modality, dict[tuple[int, ...], AskedPrompt]] = {kind: {} for kind in ASKED_FOR}
    candidates = [_candidates(corpus, tokenizer, most) for corpus in corpora]
    room = context_tokens - _image_tokens(tokenizer) - 1
    while candidates and any(len(found[kind]) < most for kind in (Modality.TEXT, Modality.IMAGE)):
        for source in list(candidates):
            prompts = next(source, None)
            if prompts is None:
                candidates.remove(source)
                continue
            for prompt in _one_of_each_kind(prompts):
                chosen = found.get(prompt.expected, {})
                if len(chosen) < most and len(prompt.token_ids) <= room:
                    chosen.setdefault(prompt.token_ids, prompt)
    return [prompt for chosen in found.values() for prompt in chosen.values()]


def built_in_prompts(
    tokenizer: Tokenizer, context_tokens: int, asked: Sequence[AskedPrompt]
) -> list[AskedPrompt]:
    """Prompts for the kinds of answers, text and one image, that no other prompt asks for.

    A model whose images cannot be decoded is asked for none.

    Args:
        tokenizer: The model's tokenizer.
        context_tokens: As for ``held_out_prompts``.
        asked: The prompts that there are.
    """
    kinds = [Modality.TEXT, *([Modality.IMAGE] if tokenizer.drawn_codes else [])]
    missing = [kind for kind in kinds if kind not in {prompt.expected for prompt in asked}]
    vocabulary, prompts = tokenizer.vocabulary, []
    for kind in missing:
        for text in BUILT_IN[kind]:
            ids = (vocabulary.bos, *tokenizer.text.encode(text), vocabulary.separator)
            if len(ids) + _image_tokens(tokenizer) < context_tokens:
                prompts.append(AskedPrompt(kind, ids, 0, is_built_in=True))
    return prompts


def answer_limit(prompts: Sequence[AskedPrompt], tokenizer: Tokenizer) -> int:
    """After how many tokens an answer is cut off: twice what the longest held-out answer or an
    image has, and at least 64."""
    longest = max((prompt.answer_tokens for prompt in prompts), default=0)
    return max(2 * longest, 2 * _image_tokens(tokenizer), 64)


def describe_prompt(prompt: AskedPrompt, tokenizer: Tokenizer) -> str:
    """The prompt in words, with ``[image]`` for an image, and earlier turns in order."""
    vocabulary = tokenizer.vocabulary
    words, texts = [""], list[int]()
    is_inside = False

    def flush() -> None:
        words[-1] += tokenizer.text.decode(texts)
        texts.clear()

    for token_id in prompt.token_ids[1:-1]:
        if is_inside:
            is_inside = token_id != vocabulary.end_image
        elif token_id == vocabulary.begin_image:
            flush()
            words[-1] += "[image] "
            is_inside = True
        elif token_id in (vocabulary.separator, vocabulary.eos):
            flush()
            words.append("")
        else:
            texts.append(token_id)
    flush()
    speakers = ("User: ", "Model: ") if len(words) > 1 else ("",)
    return "\n".join(
        speakers[number % len(speakers)] + turn.strip() for number, turn in enumerate(words)
    )


def modality_of_content(content: Sequence[object]) -> Modality:
    """The modality of an answer whose texts are strings and whose images are anything else."""
    has_text = any(isinstance(part, str) and part.strip() for part in content)
    return modality_of(has_text, sum(not isinstance(part, str) for part in content))


def _candidates(corpus: Corpus, tokenizer: Tokenizer, most: int) -> Iterator[list[AskedPrompt]]:
    """The prompts of one conversation after the other."""
    total = corpus.documents
    count = min(total, LOOKED_AT * most)
    # Files are often sorted by kind, so the documents are taken in a shuffled order.
    for place in np.random.default_rng(0).permutation(count).tolist():
        document = place * total // count
        if not len(spans := corpus.answers(document)):
            continue
        (length,) = np.diff(corpus.starts(document, document + 1)).tolist()
        token_ids = corpus.read(document, 0, length).tolist()
        # A pair is two conversations, of which the second has the answer that was rejected.
        bos = tokenizer.vocabulary.bos
        first = token_ids.index(bos, 1) if bos in token_ids[1:] else length
        yield [
            AskedPrompt(
                _kind_of(token_ids[start : start + tokens], tokenizer),
                tuple(token_ids[:start]),
                tokens,
            )
            for start, tokens in spans.tolist()
            if start < first
        ]


def _kind_of(token_ids: list[int], tokenizer: Tokenizer) -> Modality:
    stream = AnswerStream(tokenizer)
    events = stream.feed(token_ids)
    return modality_of_content(content_of([*events, *stream.finish()]))


def _one_of_each_kind(prompts: Sequence[AskedPrompt]) -> list[AskedPrompt]:
    """The first prompt of a conversation for each kind of answer, so that all do not come from a
    few long conversations."""
    return list({prompt.expected: prompt for prompt in reversed(prompts)}.values())


def _image_tokens(tokenizer: Tokenizer) -> int:
    return tokenizer.image_form.longest if tokenizer.drawn_codes else 0
