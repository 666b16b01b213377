"""``chameleon serve CHECKPOINT``: answer OpenAI's clients and browsers over HTTP.

chameleon serve runs/digits
chameleon serve exported/digits --port 8080 --host 0.0.0.0 --api-key-file key.txt
curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d
    '{"messages": [{"role": "user", "content": "a handwritten three"}], "force": "image"}'
"""

import argparse
import importlib.util
import os
import re
from typing import TYPE_CHECKING

from megatron_chameleon.cli.asked import check_device
from megatron_chameleon.cli.logs import show
from megatron_chameleon.cli.options import (
    ANSWERS,
    COUNT,
    MIB,
    PIXELS,
    TIMEOUT,
    TOKENS,
    NumberOption,
    add_ema_option,
    add_tokenizer_option,
    device,
)
from megatron_chameleon.cli.ranks import follows
from megatron_chameleon.config.constraints import Above, Between
from megatron_chameleon.wording import counted, shown

if TYPE_CHECKING:
    from megatron_chameleon.inference.serving.app import Service
    from megatron_chameleon.inference.serving.network.guard import Access
    from megatron_chameleon.inference.serving.requests.limits import Limits

PORT = NumberOption(int, Between(0, 65535))
CACHE_GIB = NumberOption(float, Above(0, at_most=2**20))
KEY_VARIABLE = "CHAMELEON_API_KEY"
SHORTEST_KEY, LONGEST_KEY = 8, 1024
KEY = re.compile(r"[!-~]+")
SITE = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?", re.IGNORECASE)

LIMITS = (
    # option, field of Limits, type, bytes of one, help
    ("--max-body-mib", "body_bytes", MIB, 1 << 20, "MiB of one request's JSON, with its images"),
    ("--max-bodies-mib", "bodies_bytes", MIB, 1 << 20, "MiB of all requests that arrive at a time"),
    ("--max-images", "images", COUNT, 1, "images in one request"),
    ("--max-image-mib", "image_bytes", MIB, 1 << 20, "MiB of one image's file"),
    ("--max-image-pixels", "image_pixels", PIXELS, 1, "pixels of one image"),
    ("--max-messages", "messages", COUNT, 1, "messages of one request"),
    ("--max-prompt-tokens", "prompt_tokens", TOKENS, 1, "tokens of a prompt"),
    ("--max-tokens", "max_tokens", TOKENS, 1, "tokens of an answer"),
    ("--max-answers", "answers", ANSWERS, 1, "answers of one request: prompts times n"),
    ("--max-queue", "queue", COUNT, 1, "answers that wait for their first token"),
    (
        "--queue-seconds",
        "queue_seconds",
        TIMEOUT,
        1,
        "wait of an answer for its first token",
    ),
    ("--request-seconds", "request_seconds", TIMEOUT, 1, "from a request to the end of its answer"),
    ("--max-connections", "connections", COUNT, 1, "open connections"),
    ("--header-seconds", "header_seconds", TIMEOUT, 1, "until a request's headers have arrived"),
    ("--body-seconds", "body_seconds", TIMEOUT, 1, "until a request's body has arrived"),
    ("--stalled-seconds", "stalled_seconds", TIMEOUT, 1, "how long a client may read nothing"),
    ("--grace-seconds", "grace_seconds", TIMEOUT, 1, "for running answers after SIGTERM"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_chameleon.inference.serving.requests.limits import Limits

    parser.add_argument("checkpoint", help="a run folder, a checkpoint or an exported folder")
    parser.add_argument("--name", help="name of the model (default: that of the folder)")
    _add_engine(parser.add_argument_group("engine"))
    parser.add_argument(
        "--format",
        choices=("chat", "document"),
        help="form of prompts: chat as in fine-tuning, or document, which the model continues "
        "(default: by the checkpoint)",
    )
    add_tokenizer_option(parser)
    add_ema_option(parser)
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--example",
        metavar="TEXT",
        action="append",
        default=[],
        help="message that the page suggests; up to six are shown, so the option can be repeated",
    )
    _add_address(parser.add_argument_group("address and access"))
    limits = parser.add_argument_group("limits")
    defaults = Limits()
    for option, field, kind, unit, summary in LIMITS:
        value = getattr(defaults, field)
        default = "as fit in the context" if value is None else f"{value // unit:,.10g}"
        limits.add_argument(
            option,
            dest=field,
            type=kind,
            metavar="N",
            help=f"{summary} (default: {default})",
        )


def _add_engine(engine: "argparse._ArgumentGroup") -> None:
    engine.add_argument(
        "--engine",
        choices=("decoder", "vllm"),
        default="decoder",
        help="decoder, our own (default), or vllm, which is an extra and takes exported folders",
    )
    engine.add_argument(
        "--engine-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an engine argument of vLLM, such as max_num_seqs=64; can be repeated",
    )
    engine.add_argument(
        "--cache-gib",
        type=CACHE_GIB,
        metavar="N",
        help="GiB for keys and values on each device (default: 80%% of a GPU's free memory, or a "
        "quarter of the machine's); answers beyond it wait",
    )
    engine.add_argument(
        "--max-rows",
        type=COUNT,
        metavar="N",
        help="rows that are computed together (default: 64); an answer has one, or two or three "
        "with guidance",
    )


def _add_address(address: "argparse._ArgumentGroup") -> None:
    address.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1); one that other machines reach needs a key",
    )
    address.add_argument(
        "--port", type=PORT, default=8000, help="port (default: 8000); 0 takes a free one"
    )
    address.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the key that clients must send; without it, the variable "
        f"{KEY_VARIABLE} is taken if it is set",
    )
    address.add_argument(
        "--allow-origin",
        metavar="SITE",
        action="append",
        default=[],
        help="site whose pages may use the server, such as https://chat.example.org; can be "
        "repeated",
    )
    address.add_argument(
        "--allow-remote-images",
        action="store_true",
        help="fetch images that requests name by http and https addresses of the public internet",
    )


def run(args: argparse.Namespace) -> None:
    """Listen, load the model, say where the page is, and serve until a signal comes."""
    if args.engine == "decoder" and follows(args):
        return
    _check_packages()
    limits, access = _limits(args), _access(args)
    from megatron_chameleon.inference.chat import PromptFormat
    from megatron_chameleon.inference.serving.app import Service
    from megatron_chameleon.inference.serving.engines import OpenOptions, open_served
    from megatron_chameleon.inference.serving.model import ServedModel
    from megatron_chameleon.inference.serving.network.sockets import bind, url_of
    from megatron_chameleon.inference.serving.server import serve

    check_device(args)
    with bind(args.host, args.port) as sock:
        opened = open_served(
            OpenOptions(
                args.checkpoint,
                args.engine,
                args.device,
                args.tokenizer,
                args.ema,
                tuple(args.engine_option),
                None if args.cache_gib is None else int(args.cache_gib * 2**30),
                args.max_rows,
            )
        )
        model = ServedModel(
            args.name or opened.name,
            opened.tokenizer,
            PromptFormat(args.format or opened.format),
            opened.engine.context_tokens,
            examples=tuple(args.example),
        )
        service = Service(opened.engine, model, limits, access, args.allow_remote_images)

        def ready() -> None:  # the engine has started, and knows how much fits
            show("\n".join((*_lines(service, opened.summary), f"page: {url_of(sock)}")))

        serve(service, sock, ready)


def _limits(args: argparse.Namespace) -> "Limits":
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.inference.serving.requests.limits import Limits

    given = {
        field: getattr(args, field) * unit
        for _, field, _, unit, _ in LIMITS
        if getattr(args, field) is not None
    }
    limits = Limits(**given)
    if limits.bodies_bytes < limits.body_bytes:
        whole, one = limits.bodies_bytes >> 20, limits.body_bytes >> 20
        what = f"{whole:,} MiB is less than one body may have ({one:,} MiB)"
        raise ConfigError("--max-bodies-mib", what, "Raise it, or lower --max-body-mib")
    return limits


def _access(args: argparse.Namespace) -> "Access":
    """Who may use the server; other machines need a key."""
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.inference.serving.network.guard import LOOPBACK, Access
    from megatron_chameleon.inference.serving.network.sockets import is_loopback

    key = _key(args.api_key_file)
    if key is None and not is_loopback(args.host):
        what = "other machines could use the server, and there is no key"
        remedy = f"Give --api-key-file FILE or the variable {KEY_VARIABLE}, or leave --host out"
        raise ConfigError(f"--host {args.host}", what, remedy)
    for site in args.allow_origin:
        if site not in ("*", "null") and not SITE.fullmatch(site):
            what = f"{shown(site)} is not the address of a site"
            remedy = "Give scheme, host and port alone, such as https://chat.example.org"
            raise ConfigError("--allow-origin", what, remedy)
        if site in ("*", "null") and key is None:
            what = f"{site} lets every page of the web use the server, and there is no key"
            raise ConfigError("--allow-origin", what, "Name sites, or give a key")
    own = args.host.lower() if ":" not in args.host else f"[{args.host.strip('[]').lower()}]"
    origins = tuple(site.lower() for site in args.allow_origin)
    return Access(key, tuple(dict.fromkeys((*LOOPBACK, own))), origins)


def _key(path: str | None) -> str | None:
    """The key of the file, or of the environment; None if there is none."""
    from megatron_chameleon.errors import ConfigError
    from megatron_chameleon.files import read_text

    if path is not None:
        where, key = f"--api-key-file {path}", read_text(path).strip()
    elif (key := os.environ.get(KEY_VARIABLE, "").strip()) or KEY_VARIABLE in os.environ:
        where = f"{KEY_VARIABLE} (the environment)"  # a colon behind it would hide the rest
    else:
        return None
    if not SHORTEST_KEY <= len(key) <= LONGEST_KEY or not KEY.fullmatch(key):
        what = f"the key has {len(key):,} characters, or some that a header cannot have"
        remedy = f"Use {SHORTEST_KEY} to {LONGEST_KEY:,} letters, digits and signs, on one line"
        raise ConfigError(where, what, f"{remedy}, such as `openssl rand -hex 24` prints")
    return key


def _check_packages() -> None:
    from megatron_chameleon.errors import ConfigError

    missing = [
        name
        for name in ("starlette", "uvicorn", "prometheus_client")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        what = f"{', '.join(missing)} is not installed"
        raise ConfigError("serve", what, "Run `pip install 'megatron-chameleon[serve]'`")


def _lines(service: "Service", engine: str) -> list[str]:
    """What is served, and within which limits."""
    limits, model, access = service.limits, service.model, service.access
    images = "reads and draws images" if model.draws else "text alone"
    if model.tokenizer.image and not model.draws:
        images = "reads images and draws none"
    usage = service.engine.usage()
    key = "required (Authorization: Bearer KEY)" if access.key else "not required"
    return [
        f"model: {model.name}, {images}, prompts as {model.format}s, "
        f"context of {model.context_tokens:,} tokens",
        f"engine: {engine}, keys and values of {usage.cache_tokens_total:,} tokens",
        f"limits: {limits.body_bytes >> 20:,} MiB and {counted(limits.images, 'image')} a request, "
        f"{counted(limits.queue, 'answer')} waiting, {limits.request_seconds:g} s per request, "
        f"{counted(limits.connections, 'connection')}",
        f"key: {key}; images from the web: {'on' if service.remote_images else 'off'}",
    ]
