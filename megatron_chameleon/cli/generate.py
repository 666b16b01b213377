"""``chameleon generate CHECKPOINT``: generate text and images from a checkpoint of any format.

chameleon generate runs/digits --image three.png
chameleon generate exported/digits --prompt "a handwritten three" --force image --output drawn
chameleon generate tuned --chat --image three.png --prompt "Which digit is this?"
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chameleon.announce import announced
from megatron_chameleon.cli.asked import (
    add_device_option,
    add_prompt_options,
    check_device,
    prompt_parts,
)
from megatron_chameleon.cli.logs import progress, show, show_generated
from megatron_chameleon.cli.options import (
    ANSWERS,
    BATCH,
    GUIDANCE,
    add_checkpoint_argument,
    add_ema_option,
    add_image_options,
    add_sampling_options,
    add_tokenizer_option,
    generation_options,
    image_options,
)
from megatron_chameleon.cli.ranks import follows
from megatron_chameleon.wording import counted

if TYPE_CHECKING:
    from megatron_chameleon.data.documents.image_part import ImagePart
    from megatron_chameleon.data.documents.schema import Document, TextPart
    from megatron_chameleon.inference.answers.answer import Answer
    from megatron_chameleon.inference.engine.options import GenerationOptions
    from megatron_chameleon.inference.session import Session

ANSWERS_FILE = "documents.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    add_prompt_options(parser, "the prompt", are_many=True)
    parser.add_argument(
        "--document",
        metavar="FILE",
        help="file of prompts, one document per line (.jsonl); in a conversation, the last message "
        "of the user is answered, and an answer behind it is not shown to the model",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask a fine-tuned model: the prompt takes the form of conversations in its training",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder for images (default: generated) and answers"
    )
    parser.add_argument("--count", type=ANSWERS, default=1, help="answers per prompt (default: 1)")
    add_ema_option(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--guidance-image",
        type=GUIDANCE,
        help="separate guidance scale for the images of a prompt; --guidance then applies to its "
        "text. Meta's code uses 1.2 and 3",
    )
    add_image_options(parser)
    parser.add_argument("--batch-size", type=BATCH, help="prompts to answer together (default: 64)")
    add_tokenizer_option(parser)
    add_device_option(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers first, which takes a minute or two and pays off for long answers "
        "on a GPU",
    )


def run(args: argparse.Namespace) -> None:
    """Answer every prompt ``--count`` times, print the texts and save the images."""
    if follows(args):
        return
    from megatron_chameleon.inference.job import open_session
    from megatron_chameleon.outputs import save_anyhow

    options = generation_options(args)
    check_device(args)
    _check_compiler(args)
    folder = _check_output(args)
    prompts = [prompt for prompt in _prompts(args) for _ in range(args.count)]
    with closing(
        open_session(args.checkpoint, args.device, args.tokenizer, ema=args.ema)
    ) as session:
        answers = _answer(session, prompts, options, args)
    has_images = any(not isinstance(part, str) for answer in answers for part in answer.content)
    shown = None
    try:
        if args.output is not None or has_images:
            save_anyhow(lambda place: _save(place, prompts, answers), folder)
            shown = folder
    finally:
        for number, answer in enumerate(answers):
            _print(number, answer, shown)
    if shown is not None:
        progress(f"{counted(len(answers), 'answer')}: {folder / ANSWERS_FILE}")


def _answer(
    session: "Session",
    prompts: Sequence["Document"],
    options: "GenerationOptions",
    args: argparse.Namespace,
) -> "list[Answer]":
    from megatron_chameleon.inference.chat import parts_of
    from megatron_chameleon.inference.engine.options import Execution

    if session.model is not None:
        session.execution = Execution.on(args.device, "inductor" if args.compile else None)
    asked = [parts_of(prompt, session.tokenizer, is_chat=args.chat) for prompt in prompts]
    _say_grid(session, options)
    started = time.monotonic()
    compiling = ", after compiling the layers" if session.execution.compiler else ""
    with announced(f"generating {counted(len(asked), 'answer')}{compiling}"):
        answers = session.generate(
            asked, options, lambda done, total: _report(done, total, started)
        )
    progress(f"{session.device}: {session.execution.summary()}")
    return answers


def _say_grid(session: "Session", options: "GenerationOptions") -> None:
    """What ``--size`` has become, because only a few grids are there.

    Raises:
        ChameleonError: The model draws no such images.
    """
    grid = session.image_form.grid_of_size(options.size)
    if grid is not None and session.tokenizer.image is not None:
        width, height = session.tokenizer.image.size_of(grid)
        progress(f"images have {grid.rows} rows of {grid.columns} codes, {width} x {height} pixels")


def _check_output(args: argparse.Namespace) -> Path:
    """The folder for the answers, which must replace nothing that the command reads."""
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.outputs import check_output_folder, keep_inputs

    folder = check_output_folder("--output", "generated" if args.output is None else args.output)
    if folder.exists() and folder.resolve() == Path(args.checkpoint).resolve():
        raise ConfigError(f"--output {folder}", "is the checkpoint", "Give another --output")
    replaced = [folder / ANSWERS_FILE, *folder.glob("[0-9]*-[0-9]*.png")]
    keep_inputs("--output", replaced, [*args.image, *([args.document] if args.document else [])])
    return folder


def _check_compiler(args: argparse.Namespace) -> None:
    from megatron_chameleon.errors import ConfigError

    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if args.compile and not any(map(shutil.which, compilers)):
        raise ConfigError(
            "--compile",
            f"none of {', '.join(compilers)} is installed",
            "Install g++, or leave it out",
        )


def _prompts(args: argparse.Namespace) -> list["Document"]:
    """The documents of ``--document``, or those of ``--image`` and each ``--prompt``."""
    from megatron_chameleon.data.documents.parse import read_prompts
    from megatron_chameleon.data.documents.schema import Document
    from megatron_chameleon.errors import ConfigError

    images = image_options(args)
    if args.document:
        if args.prompt is not None or args.image:
            raise ConfigError(
                "--document",
                "cannot be combined with --prompt or --image",
                "Put everything into the document, or leave it out",
            )
        return read_prompts([args.document], images)
    return [
        Document("", "", tuple(prompt_parts(args, images, prompt)), "--prompt")
        for prompt in args.prompt or [None]
    ]


def _report(done: int, total: int, started: float) -> None:
    seconds = time.monotonic() - started
    left_seconds = seconds / done * (total - done)
    progress(
        f"{done}/{total} answers · {done / max(seconds, 1e-9):.1f}/s · {left_seconds:.0f} s left"
    )


def _save(folder: Path, prompts: Sequence["Document"], answers: Sequence["Answer"]) -> None:
    """Write the images, then ``documents.jsonl`` with a line for each answer: all or none."""
    from megatron_chameleon.files import write_together
    from megatron_chameleon.inference.answers.files import parts_and_images

    lines: list[str] = []
    images: dict[Path, bytes] = {}
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        parts, files = parts_and_images(number, answer)
        images.update({folder / name: content for name, content in files.items()})
        line: dict[str, Any] = {
            "id": f"{number:04d}",
            "source": "chameleon generate",
            "prompt": [_describe(part, folder) for part in prompt.content],
            "content": parts,
            "token_ids": answer.token_ids,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    text = "".join(lines).encode("utf-8", "surrogatepass")
    write_together({folder / ANSWERS_FILE: text, **images})


def _print(number: int, answer: "Answer", folder: Path | None) -> None:
    """Print an answer; its images are left out if they could not be saved."""
    from megatron_chameleon.inference.answers.files import image_name

    for index, part in enumerate(answer.content):
        if isinstance(part, str):
            show_generated(part)
        elif folder is not None:
            show(f"[image: {folder / image_name(number, index)}]")


def _describe(part: "TextPart | ImagePart", folder: Path) -> dict[str, str]:
    from megatron_chameleon.data.documents.schema import TextPart

    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part.image, bytes):
        return {"type": "image", "image": "data:"}
    return {"type": "image", "image": os.path.relpath(part.image, folder)}
