"""What the verbs that answer have in common: the prompt on the command line, and the device."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_chameleon.data.documents.image_part import ImagePart
    from megatron_chameleon.data.documents.schema import TextPart
    from megatron_chameleon.images.options import ImageOptions


def add_prompt_options(
    parser: argparse.ArgumentParser, what: str, *, are_many: bool = False
) -> None:
    """Add ``--prompt`` and ``--image``.

    Args:
        parser: The parser of a verb.
        what: What they make up, such as "the prompt".
        are_many: Whether there may be many prompts, each of them with all images.
    """
    text = f"text of {what}, after the images"
    if are_many:
        text += "; can be repeated: each is answered by itself, with all images, in this order"
    action = "append" if are_many else "store"
    parser.add_argument("--prompt", metavar="TEXT", action=action, help=text)
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help=f"image of {what}; can be repeated",
    )


def prompt_parts(
    args: argparse.Namespace, images: "ImageOptions", prompt: str | None
) -> "list[TextPart | ImagePart]":
    """What ``add_prompt_options`` parsed.

    Args:
        args: The verb's.
        images: Which images may be opened.
        prompt: The text, or one of the texts, of ``--prompt``.

    Raises:
        DataError: An image does not exist; that is found before a model is loaded.
    """
    from megatron_chameleon.data.documents.image_part import ImagePart
    from megatron_chameleon.data.documents.schema import TextPart
    from megatron_chameleon.errors import DataError
    from megatron_chameleon.images.image_error import ImageError
    from megatron_chameleon.images.local_files import check_named
    from megatron_chameleon.images.remote_files import is_url

    for image in args.image:
        try:
            if not is_url(image):
                check_named(image)
        except ImageError as fault:
            raise DataError(image, fault.what, "Check the path that --image names") from fault
    parts: list[TextPart | ImagePart] = [ImagePart(image, images) for image in args.image]
    return parts if prompt is None else [*parts, TextPart(prompt)]


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, which ``check_device`` checks."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cpu (default) or cuda"
    )


def check_device(args: argparse.Namespace) -> None:
    """Refuse a GPU that is not there.

    Raises:
        ConfigError: There is none.
    """
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.parallel import platform

    if args.device != "cpu" and not platform.has_gpu():
        what = "no usable GPU was found"
        raise ConfigError(f"--device {args.device}", what, "Use --device cpu")
