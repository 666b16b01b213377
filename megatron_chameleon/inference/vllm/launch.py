"""Start vLLM's engine in processes of its own, and say in one line why it does not start.

vLLM is imported only within functions: it is an extra.
"""

import os
import signal
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import ChameleonError, ConfigError, first_line
from megatron_chameleon.inference.engine.interface import EngineError
from megatron_chameleon.inference.vllm.arguments import engine_arguments
from megatron_chameleon.inference.vllm.installed import check_installed
from megatron_chameleon.inference.vllm.log import VllmLog
from megatron_chameleon.inference.vllm.plugins.registration import SERVER_VARIABLE
from megatron_chameleon.inference.vllm.plugins.row_request import RowRequest

PLUGIN = "chameleon"
"""The name of our entry points of vLLM."""


class Launched:
    """vLLM's ``AsyncLLM`` as the engine sees it.

    Args:
        llm: The ``AsyncLLM``.
        log: Its log.
        load: One number: how much of the cache is in use, from 0 to 1. vLLM's stat logger sets it.

    Attributes:
        context_tokens: The largest number of tokens of a prompt and its answer.
        places: The largest number of requests in a step.
        cache_tokens: Tokens whose keys and values fit.
        cache_tokens_used: Tokens whose keys and values are held, after the last step.
    """

    def __init__(self, llm: Any, log: VllmLog, load: list[float]) -> None:
        config = llm.vllm_config
        self._llm, self._log, self._load = llm, log, load
        self._ids: set[str] = set()
        self.context_tokens: int = config.model_config.max_model_len
        self.places: int = config.scheduler_config.max_num_seqs
        self.cache_tokens: int = config.cache_config.num_gpu_blocks * config.cache_config.block_size

    @property
    def cache_tokens_used(self) -> int:
        return round(self._load[0] * self.cache_tokens)

    @property
    def idle(self) -> bool:
        """Whether vLLM has nothing to do."""
        return not self._ids

    async def run(
        self, prompt: list[int], row: RowRequest, room: int, stops: list[int]
    ) -> AsyncGenerator[list[int]]:
        """The tokens of one request as they come.

        Args:
            prompt: Token ids.
            row: What the rules need to know.
            room: The largest number of tokens.
            stops: Tokens that end it; they are given out too.

        Raises:
            EngineError: It was aborted.
        """
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=0,  # the rules leave one token
            max_tokens=room,
            stop_token_ids=stops,
            ignore_eos=True,  # it is one of the stops
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
            extra_args=row.extra_args(),
        )
        name = uuid.uuid4().hex
        self._ids.add(name)
        try:
            async with aclosing(self._llm.generate(tokens_input(prompt), params, name)) as outputs:
                async for output in outputs:
                    answer = output.outputs[0]
                    if answer.token_ids:
                        yield list(answer.token_ids)
                    if answer.finish_reason not in (None, "stop", "length"):
                        what = f"vLLM ended an answer with {answer.finish_reason!r}"
                        raise EngineError("engine", what, "Send the request again")
        finally:
            self._ids.discard(name)

    @property
    def dead(self) -> bool:
        """Whether vLLM's processes have ended."""
        return bool(self._llm.errored)

    @property
    def log_place(self) -> str:
        """Where its log is."""
        return "the server's log" if self._log.file is None else str(self._log.file)

    async def abort(self) -> None:
        """End all requests."""
        await self._llm.abort(list(self._ids))

    def shutdown(self, seconds: float) -> None:
        """End vLLM's processes; those that do not end within some seconds are killed."""
        healthy = not self.dead
        self._llm.shutdown(timeout=seconds)
        self._llm = None
        if healthy:
            self._log.remove()


def launch(folder: Path, options: dict[str, Any]) -> Launched:
    """Start vLLM with the model of an exported folder. It takes from 20 seconds to minutes.

    Raises:
        ConfigError: vLLM is missing, has another version, or cannot run the model; with the cause.
    """
    check_installed()
    log = VllmLog()
    _prepare_environment()
    try:
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(folder, options)
        config = _config(arguments)
        load = [0.0]
        with _interrupts_blocked():
            llm = AsyncLLM.from_vllm_config(
                config, disable_log_stats=True, stat_loggers=[_load_recorder(load)]
            )
    except ChameleonError:
        log.remove()
        raise
    except Exception as error:
        raise _start_error(folder, error, log) from error
    return Launched(llm, log, load)


def _prepare_environment() -> None:
    """For vLLM in this process and in those that it starts."""
    os.environ[SERVER_VARIABLE] = str(os.getpid())
    # this process has threads, which a forked child would not have
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},{PLUGIN}".lstrip(",")


def _config(arguments: Any) -> Any:
    """vLLM's config for the model runner that it chooses."""
    from vllm.usage.usage_lib import UsageContext

    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    if config.use_v2_model_runner:
        return config
    # V1 does not tell the rules which prompts are read to their end, nor the newest tokens
    arguments = replace(arguments, enable_chunked_prefill=False, async_scheduling=False)
    return arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, because the server still needs them to finish.

    A terminal sends it to all of them. Processes inherit the blocked signals of the thread that
    starts them, and vLLM does not unblock any.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _load_recorder(load: list[float]) -> type:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class LoadRecorder(StatLoggerBase):
        """Keeps the share of the cache that is in use."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kw: Any) -> None:
            if scheduler_stats is not None:
                load[0] = scheduler_stats.kv_cache_usage

        def log_engine_initialized(self) -> None:
            pass

    return LoadRecorder


def _start_error(folder: Path, error: Exception, log: VllmLog) -> ConfigError:
    cause = log.cause() or _first_problem(error)
    remedy = "Change --engine-option" if log.file is None else f"See vLLM's log, {log.file}"
    if "memory" in cause.lower():
        remedy += (
            "; it takes less memory with --engine-option gpu_memory_utilization=0.8, or "
            "kv_cache_memory_bytes or max_model_len"
        )
    elif "head size" in cause.lower() or "head_size" in cause.lower():
        remedy = "Serve this model without --engine vllm, or on a GPU"
    return ConfigError(f"--engine vllm: {folder}", f"vLLM does not start: {cause}", remedy)


def _first_problem(error: Exception) -> str:
    """The line that says what is wrong; pydantic's first line only counts errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) < 2 or "validation error" not in lines[0]:
        return first_line(error)
    text = lines[1] if len(lines) == 2 or "[type=" in lines[1] else f"{lines[1]}: {lines[2]}"
    return text.split(" [type=")[0].removeprefix("Value error, ").rstrip(".")
