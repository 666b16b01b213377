"""Check what FP8 needs of a config.

The rules are the same for emulated FP8, so that a config that works on a CPU also runs on a GPU.
"""

from collections.abc import Iterator

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError

FP8_MARGIN = 16


def check_fp8(config: Config) -> Iterator[ConfigError]:
    """Everything in the section ``fp8`` that cannot work with the rest of the config."""
    fp8, parallel = config.fp8, config.parallel
    if fp8.format is None:
        if fp8.emulate:
            what = "true changes nothing while fp8.format is null"
            yield ConfigError("fp8.emulate", what, "Set fp8.format to hybrid or e4m3")
        return
    if fp8.margin > FP8_MARGIN:
        what = f"{fp8.margin} is above {FP8_MARGIN}: E4M3 spans 2^18, and nothing would be left"
        yield ConfigError("fp8.margin", what, "Use 0, Transformer Engine's default, or 1")
    stage_layers = config.model.num_layers // parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        layers = getattr(fp8, name)
        if layers and fp8.recipe == "delayed":
            what = f"{layers}, but delayed scaling runs all layers in FP8"
            yield ConfigError(f"fp8.{name}", what, "Set it to 0, or fp8.recipe=tensorwise")
        elif layers > stage_layers:
            what = f"{layers} is above the {stage_layers} layers of a pipeline stage"
            yield ConfigError(f"fp8.{name}", what, f"Use at most {stage_layers}")
    yield from _check_fp8_shapes(config)


def _check_fp8_shapes(config: Config) -> Iterator[ConfigError]:
    """Sizes that FP8 matrix products cannot have.

    Every size of each rank's products must be a multiple of 16; the tokens of a rank's part of a
    split sequence, a multiple of 8.

    Source: ``assert_dim_for_fp8_exec`` in Transformer Engine's transformer_engine/pytorch/utils.py,
    and the leading dimensions in transformer_engine/common/gemm/cublaslt_gemm.cu: weight gradients
    sum over the tokens.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    if (
        model.num_attention_heads % tp
        or model.ffn_hidden_size % tp
        or model.hidden_size % model.num_attention_heads
    ):
        return  # already reported
    split = parallel.sequence_parallel and tp > 1
    unit, parts = 8 if split else 16, max(1, parallel.context_parallel_size) * (tp if split else 1)
    tokens, micro = model.seq_length // parts, config.training.micro_batch_size
    if model.seq_length % parts == 0 and tokens * micro % unit:
        each = f"{model.seq_length} / {parts}" if parts > 1 else f"{model.seq_length}"
        count = f"{each} x micro_batch_size {micro} = {tokens * micro} tokens"
        what = f"{count} are not a multiple of {unit}"
        near = _near_multiple(model.seq_length, unit * parts)
        remedy = f"Use {near}, because FP8 needs a multiple on each rank"
        yield ConfigError("model.seq_length", what, remedy)
    head_size = model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    qkv = (model.num_attention_heads + 2 * groups) * head_size
    for key, size, words in (
        ("hidden_size", model.hidden_size, f"{model.hidden_size}"),
        ("ffn_hidden_size", model.ffn_hidden_size, f"{model.ffn_hidden_size}"),
        ("num_query_groups", qkv, f"{groups} gives {qkv} rows of queries, keys and values, which"),
    ):
        if size % (16 * tp):
            ranks = f" on each of {tp} tensor-parallel ranks" if tp > 1 else ""
            what = f"{words} is not a multiple of 16{ranks}"
            remedy = (
                f"Use a multiple of {16 * tp} with FP8, such as {_near_multiple(size, 16 * tp)}"
            )
            yield ConfigError(f"model.{key}", what, remedy)


def _near_multiple(number: int, divisor: int) -> int:
    return max(1, round(number / divisor)) * divisor
