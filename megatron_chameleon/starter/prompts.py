"""What the model is asked during and after training: words and pictures of the user's own data."""

from collections.abc import Sequence

from megatron_chameleon.data.preprocess.holdout import is_held_out
from megatron_chameleon.starter.choose import Holdout
from megatron_chameleon.starter.looking.look import Looked
from megatron_chameleon.starter.looking.tally import SeenDocument
from megatron_chameleon.starter.writing.train_yaml import Prompt

DRAWN, CAPTIONED, CONTINUED = 4, 2, 2
LONGEST = 200


def sample_prompts(looked: Looked, held: Holdout) -> list[Prompt]:
    """Captions to draw, pictures to describe and texts to continue, held-out ones first."""
    seen = [entry for source in looked.sources for entry in source.tally.seen]
    share = held.share or 0.0
    seen.sort(key=lambda e: not (share and e.digest and is_held_out(e.digest, share)))
    has_conversations = any(source.tally.conversations for source in looked.sources)
    captions = [entry.caption for entry in seen if _is_usable(entry.caption)]
    found = [Prompt(text, force="image") for text in _distinct(captions, DRAWN)]
    pictures = [e.picture for e in seen if e.picture and e.caption and _is_usable(e.picture)]
    found += [Prompt(image=path, force="text") for path in _distinct(pictures, CAPTIONED)]
    if any(_is_only_text(entry) for entry in seen) and not has_conversations:
        texts = [entry.beginning for entry in seen if _is_only_text(entry)]
        found += [Prompt(text, force="text") for text in _distinct(texts, CONTINUED)]
    if not found and any(entry.pictures for entry in seen) and not has_conversations:
        found = [Prompt(force="image")]
    return found


def _is_only_text(entry: SeenDocument) -> bool:
    return not entry.pictures and _is_usable(entry.beginning)


def _is_usable(text: str) -> bool:
    """Whether it can stand in a config: there, ``${`` would begin a variable."""
    return 0 < len(text) <= LONGEST and "${" not in text and text.isprintable()


def _distinct(texts: Sequence[str], most: int) -> list[str]:
    return list(dict.fromkeys(texts))[:most]


def asked(prompts: Sequence[Prompt], looked: Looked) -> list[list[str]]:
    """The options of ``chameleon generate`` for the prompts."""
    found = []
    by_kind = {(bool(prompt.image), prompt.force): prompt for prompt in reversed(prompts)}
    for prompt in reversed(by_kind.values()):  # one of each: every command loads the libraries
        words = ["--prompt", prompt.text] if prompt.text else []
        words += ["--image", prompt.image] if prompt.image else []
        words += ["--force", prompt.force] if prompt.force else []
        found.append(words)
    chats = [
        entry.beginning
        for source in looked.sources
        if source.tally.conversations
        for entry in source.tally.seen
        if entry.beginning and not entry.pictures
    ]
    found += [["--chat", "--prompt", text] for text in _distinct(chats, 1)]
    return found
