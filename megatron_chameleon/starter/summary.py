"""What ``chameleon init`` prints: what was found, what is odd, what was chosen, what it costs."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.starter.costs import costs
from megatron_chameleon.starter.looking.look import Source
from megatron_chameleon.starter.odd import languages, oddities
from megatron_chameleon.starter.project import Project
from megatron_chameleon.starter.settings import MANY_EPOCHS
from megatron_chameleon.wording import counted, format_bytes


def summary(project: Project, written: Sequence[Path]) -> str:
    """The lines for the terminal."""
    lines = ["What was found"]
    lines += [f"  {_of_source(source)}" for source in project.looked.sources]
    if spoken := languages(project.looked):
        lines.append(f"  languages: {spoken}")
    length = project.length
    lines.append(
        f"  expected tokens: about {length.tokens:,} ({length.text_tokens:,} of text, "
        f"{length.image_tokens:,} of pictures)"
    )
    per_token = project.vocabulary.characters_per_token
    resolution = project.image.resolution if project.image else 0
    odd = list(oddities(project.looked, per_token * length.seq_length, resolution))
    if odd:
        lines += ["", "Possible problems", *(f"  - {line}" for line in odd)]
    lines += ["", "What was chosen", *(f"  {line}" for line in _choices(project))]
    lines += ["", *costs(project)]
    lines += ["", f"Written: {', '.join(map(str, written))}"]
    script = shlex.quote(str(project.wanted.output / "run.sh"))
    page = project.wanted.output / "report/index.html"
    lines.append(f"Next: bash {script}    # ends with {page}")
    return "\n".join(lines)


def _of_source(source: Source) -> str:
    tally = source.tally
    about = "" if source.is_complete else "about "
    kinds = [f"{about}{counted(source.documents, 'document')}"]
    if tally.conversations:
        share = 100 * tally.conversations / tally.documents
        kinds[0] += f" ({share:.0f}% conversations)"
    if source.pictures:
        kinds.append(counted(source.pictures, "picture"))
    kinds.append(f"{source.characters:,} characters")
    text = f"{source.name}: {', '.join(kinds)} in {counted(source.files, 'file')}"
    text += f" of {format_bytes(source.size_bytes)}"
    if tally.sizes:
        widths, heights = zip(*tally.sizes, strict=True)
        low, high = f"{min(widths)} x {min(heights)}", f"{max(widths)} x {max(heights)}"
        text += f"; pictures of {low}" if low == high else f"; pictures from {low} to {high}"
    if not source.is_complete:
        text += (
            f"; estimated from {counted(tally.documents, 'document')} in "
            f"{format_bytes(source.looked_bytes)} of {counted(source.looked_files, 'file')}, with "
            f"{counted(len(tally.sizes), 'picture')} opened"
        )
    named = next((e for e in tally.seen if e.caption and e.picture), None)
    if source.is_loose and named is not None:
        text += f"; captions such as {named.picture.rsplit('/', 1)[-1]} -> {named.caption[:60]!r}"
    return text


def _choices(project: Project) -> list[str]:
    vocabulary, image, held = project.vocabulary, project.image, project.holdout
    lines = [f"size {project.size}: {_model(project)}"]
    filled = "" if vocabulary.is_filled else ", as many as the texts can fill"
    lines.append(
        f"vocabulary of {vocabulary.size:,} ids{filled}; a token has "
        f"{vocabulary.characters_per_token:.1f} characters"
    )
    if image is None:
        lines.append(
            "no picture, so no image tokenizer: the vocabulary has the one image code that it "
            "must have, and the model is exported in the project's format, because Hugging Face's "
            "cannot leave out the image tokenizer"
        )
    else:
        lines.append(
            f"pictures of {image.resolution} x {image.resolution} pixels, {image.codes} codes each "
            f"out of {image.codebook_size}"
        )
    if project.script.fallback_text:
        lines.append(
            "no text, so the text tokenizer learns from one line that init writes "
            f"({project.wanted.output / 'tokenizer_text.txt'})"
        )
    if held.share is None:
        lines.append("nothing is held out: there are too few documents")
    elif held.documents:
        count = counted(held.documents, "document")
        lines.append(f"{count} held out (--holdout {held.share:g}), which are never trained")
    else:
        lines.append(f"about {100 * held.share:g}% of the documents are held out")
    length = project.length
    lines.append(f"{length.steps:,} steps, about {length.epochs:,.1f} epochs")
    if length.epochs > MANY_EPOCHS and project.size != "tiny":
        lines.append(f"these are far too few documents for size {project.size}; try --size tiny")
    if project.size == "small" and project.machine.gpu is None:
        lines.append("there is no GPU here, and on CPUs this size takes days; try --size tiny")
    return lines


def _model(project: Project) -> str:
    if project.model is None:
        return f"the preset {project.train.preset}"
    count = count_parameters(project.model, project.vocabulary.size)
    model = project.model
    return (
        f"{count:,} parameters, {model.num_layers} layers of width {model.hidden_size}, sequences "
        f"of {model.seq_length} tokens"
    )
