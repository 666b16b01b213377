"""Opens a model and its engine.

This is the one place that knows which engines there are: ``open_served`` gives an engine and the
tokenizer, and all else is the same for every engine.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.chat import PromptFormat, prompt_format
from megatron_chameleon.inference.engine.batching.service import DecoderEngine
from megatron_chameleon.inference.engine.interface import TokenEngine
from megatron_chameleon.inference.job import open_session
from megatron_chameleon.inference.vllm.opening import open_exported
from megatron_chameleon.parallel.launch import find_launch
from megatron_chameleon.tokenizer.folder import Tokenizer

DECODER, VLLM = "decoder", "vllm"


@dataclass(frozen=True)
class OpenOptions:
    """How a model is opened."""

    path: str
    engine: str = DECODER
    device: str = "cpu"
    tokenizer: str | None = None
    ema: bool = False
    engine_options: tuple[str, ...] = ()
    """``NAME=VALUE`` texts for vLLM."""
    cache_bytes: int | None = None
    """For keys and values on each device; None takes a share of what there is."""
    max_rows: int | None = None
    """Of a step; None takes the decoder's default."""


@dataclass(frozen=True)
class Opened:
    """A model that can be served; its engine is not started yet."""

    engine: TokenEngine
    tokenizer: Tokenizer
    name: str
    format: PromptFormat
    summary: str
    """Of the engine, for the user."""


def open_served(options: OpenOptions) -> Opened:
    """Open a model with its engine.

    Raises:
        ChameleonError: The model cannot be opened, or the engine cannot run here.
    """
    if options.engine == VLLM:
        return _open_vllm(options)
    if options.engine_options:
        what = "these options are vLLM's, and the engine is our own"
        raise ConfigError("--engine-option", what, "Add --engine vllm, or leave them out")
    session = open_session(options.path, options.device, options.tokenizer, ema=options.ema)
    decoder = session.decoder()
    if options.max_rows is not None:
        decoder.max_rows = options.max_rows
    if options.cache_bytes is not None:
        decoder.limit_cache(options.cache_bytes)
    engine = DecoderEngine(decoder)
    ranks = find_launch().world_size
    shared = f", {ranks} tensor-parallel ranks" if ranks > 1 else ""
    summary = f"decoder on {session.device}{shared}, {session.execution.summary()}"
    name = name_of(Path(options.path))
    return Opened(engine, session.tokenizer, name, session.prompt_format, summary)


def name_of(path: Path) -> str:
    """The name of a model: that of its run for folders that are called the same in every run.

    >>> name_of(Path("runs/digits/checkpoints/step_00000007")), name_of(Path("/models/mine"))
    ('digits', 'mine')
    """
    path = path.resolve()
    while path.name in ("exported", "checkpoints") or path.name.startswith("step_"):
        path = path.parent
    return path.name or "model"


def _open_vllm(options: OpenOptions) -> Opened:
    if (ranks := find_launch().world_size) > 1:
        what = f"vLLM starts its own processes, and this job has {ranks}"
        remedy = f"Start it alone, with --engine-option tensor_parallel_size={ranks}"
        raise ConfigError("--engine vllm", what, remedy)
    for limit, option, name in (
        (options.cache_bytes, "--cache-gib", "kv_cache_memory_bytes"),
        (options.max_rows, "--max-rows", "max_num_seqs"),
    ):
        if limit is not None:
            what = "it is an option of our own engine"
            raise ConfigError(option, what, f"Use --engine-option {name}=N with vLLM")
    for given, option in ((options.tokenizer, "--tokenizer"), (options.ema, "--ema")):
        if given:
            what = "vLLM serves an exported folder, whose weights and tokenizer are fixed"
            raise ConfigError(option, what, "Give it to `chameleon convert`, and serve the result")
    exported = open_exported(options.path, options.device, options.engine_options)
    name = name_of(exported.reader.folder)
    form = prompt_format(exported.reader)
    return Opened(exported.engine, exported.tokenizer, name, form, f"vLLM {exported.version}")
