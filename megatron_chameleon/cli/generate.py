"""``chameleon generate CHECKPOINT``: write text and images from a checkpoint or an exported folder.

chameleon generate runs/digits --image three.png
chameleon generate exported/digits --prompt "a handwritten three" --force image --output drawn
chameleon generate tuned --chat --image three.png --prompt "Which digit is this?"
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_chameleon.data.documents.schema import Document, ImagePart, TextPart
    from megatron_chameleon.inference.options import GenerationOptions
    from megatron_chameleon.inference.session import Answer

ANSWERS_FILE = "documents.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "checkpoint", help="a checkpoint, run folder or exported Hugging Face folder"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="text of the prompt, after the images")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="repeatable")
    parser.add_argument(
        "--document",
        metavar="FILE",
        help="documents to answer, one a line (.jsonl); of messages, the last is answered",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="prompts are questions to a fine-tuned model, as conversations were in its training",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="for images (default: generated) and answers"
    )
    parser.add_argument("--count", type=int, default=1, help="answers to each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest (default: 0.7)")
    parser.add_argument("--top-p", type=float, help="default: 0.9")
    parser.add_argument("--guidance", type=float, help="of images, 1 is off (default: 1)")
    parser.add_argument(
        "--guidance-image",
        type=float,
        help="of a prompt's images; --guidance is then its text's. Meta's code has 1.2 and 3",
    )
    parser.add_argument("--batch-size", type=int, help="prompts answered together (default: 64)")
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: the context's rest)")
    parser.add_argument("--force", choices=("image", "text"), help="one image, or text only")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: as in the checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers first: takes a minute or two, pays for long answers on a GPU",
    )


def run(args: argparse.Namespace) -> None:
    """Answer every prompt ``--count`` times; print the texts, save the images."""
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.inference.chat import chat_prompt
    from megatron_chameleon.inference.options import Execution
    from megatron_chameleon.inference.session import Session

    if args.count < 1:
        raise ConfigError("--count", f"{args.count} is below 1", "Ask for at least one answer")
    options = _options(args)
    options.check()
    _check_device(args)
    prompts = [prompt for prompt in _prompts(args) for _ in range(args.count)]
    session = Session.load(args.checkpoint, args.device, args.tokenizer)
    session.execution = Execution.on(args.device, "inductor" if args.compile else None)
    asked = [
        chat_prompt(prompt, session.tokenizer)
        if args.chat or prompt.roles
        else list(prompt.content)
        for prompt in prompts
    ]
    started = time.monotonic()
    answers = session.generate(asked, options, lambda done, total: _report(done, total, started))
    print(f"{args.device}: {session.execution.summary()}", file=sys.stderr)
    folder = Path(args.output or "generated")
    has_images = any(not isinstance(part, str) for answer in answers for part in answer.content)
    lines = [
        _show(number, prompt.content, answer, folder)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    if args.output or has_images:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{ANSWERS_FILE}.{os.getpid()}"
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        partial.replace(folder / ANSWERS_FILE)
        print(f"{len(answers)} answers: {folder / ANSWERS_FILE}", file=sys.stderr)


def _options(args: argparse.Namespace) -> "GenerationOptions":
    from megatron_chameleon.inference.modality import Force
    from megatron_chameleon.inference.options import GenerationOptions

    names = ("temperature", "top_p", "guidance", "guidance_image", "max_tokens", "batch_size")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    force = Force(args.force) if args.force else None
    return GenerationOptions(seed=args.seed, force=force, **given)


def _check_device(args: argparse.Namespace) -> None:
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.parallel import platform

    if args.device == "cuda" and not platform.has_gpu():
        raise ConfigError("--device", "cuda has no usable GPU here", "Use --device cpu")
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if args.compile and not any(map(shutil.which, compilers)):
        raise ConfigError(
            "--compile", f"none of {', '.join(compilers)} is there", "Install g++, or leave it out"
        )


def _prompts(args: argparse.Namespace) -> list["Document"]:
    """The documents of ``--document``, or the one prompt of ``--image`` and ``--prompt``."""
    from megatron_chameleon.data.documents.parse import read_documents
    from megatron_chameleon.data.documents.schema import Document, ImagePart, TextPart
    from megatron_chameleon.errors import ConfigError

    if args.document:
        if args.prompt is not None or args.image:
            raise ConfigError(
                "--document",
                "--prompt or --image is given beside it",
                "Put everything into the document, or leave it out",
            )
        return list(read_documents([args.document]))
    prompt: list[TextPart | ImagePart] = [ImagePart(image) for image in args.image]
    if args.prompt is not None:
        prompt.append(TextPart(args.prompt))
    return [Document("", "", tuple(prompt), "--prompt")]


def _report(done: int, total: int, started: float) -> None:
    seconds = time.monotonic() - started
    left_seconds = seconds / done * (total - done)
    print(
        f"{done}/{total} answers · {done / max(seconds, 1e-9):.1f}/s · {left_seconds:.0f} s left",
        file=sys.stderr,
        flush=True,
    )


def _show(
    number: int, prompt: Sequence["TextPart | ImagePart"], answer: "Answer", folder: Path
) -> str:
    """Print an answer, save its images; returns its line for ``documents.jsonl``."""
    parts: list[dict[str, str]] = []
    for index, part in enumerate(answer.content):
        if isinstance(part, str):
            print(part)
            parts.append({"type": "text", "text": part})
            continue
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number:04d}-{index}.png"
        part.save(file)
        print(f"[image: {file}]")
        parts.append({"type": "image", "image": file.name})
    line: dict[str, Any] = {
        "id": f"{number:04d}",
        "source": "chameleon generate",
        "prompt": [_describe(part, folder) for part in prompt],
        "content": parts,
        "token_ids": answer.token_ids,
    }
    return json.dumps(line, ensure_ascii=False)


def _describe(part: "TextPart | ImagePart", folder: Path) -> dict[str, str]:
    from megatron_chameleon.data.documents.schema import TextPart

    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part.image, bytes):
        return {"type": "image", "image": "data:"}
    return {"type": "image", "image": os.path.relpath(part.image, folder)}
