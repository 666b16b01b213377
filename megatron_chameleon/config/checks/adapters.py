"""Check that the adapters of a config fit the rest of it."""

from collections.abc import Iterator

from megatron_chameleon.config.finetuning import AdapterConfig
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError

RANK_NEEDED = ("dropout", "dora", "quantize", "start_from", "base")


def check_adapter(config: Config) -> Iterator[ConfigError]:
    """Everything in the section ``adapter`` that cannot work with the rest of the config."""
    adapter, model = config.adapter, config.model
    if not adapter.rank:
        for key in RANK_NEEDED:
            if getattr(adapter, key) != getattr(AdapterConfig(), key):
                what = f"{getattr(adapter, key)} is set, but adapter.rank is 0: there is no adapter"
                yield ConfigError(f"adapter.{key}", what, "Set adapter.rank, or remove it")
        return
    smallest = min(model.hidden_size, model.ffn_hidden_size)
    if adapter.rank > smallest:
        what = f"{adapter.rank} exceeds the smaller side of the model's matrices, which is "
        what += f"{smallest}"
        yield ConfigError("adapter.rank", what, f"Use at most {smallest}; 8 to 64 are common")
    if not adapter.target_modules:
        remedy = "Name at least one, such as q_proj, or remove the key to adapt all of them"
        yield ConfigError(
            "adapter.target_modules", "names no layers, so nothing is trained", remedy
        )
    if doubles := sorted(
        {n for n in adapter.target_modules if adapter.target_modules.count(n) > 1}
    ):
        what = f"names {', '.join(doubles)} more than once"
        yield ConfigError("adapter.target_modules", what, "Name each layer once")
    yield from check_quantized(config)
    if model.train or model.freeze:
        key = "train" if model.train else "freeze"
        what = "names parameters of the model, which are all frozen beside an adapter"
        remedy = "Remove it, or set adapter.rank to 0"
        yield ConfigError(f"model.{key}", what, remedy)
    if config.optimizer.name == "muon":
        what = "muon updates the matrices of the model, which are frozen beside an adapter"
        yield ConfigError("optimizer.name", what, "Use adamw, or set adapter.rank to 0")


def check_quantized(config: Config) -> Iterator[ConfigError]:
    """Settings that take the frozen matrices in a format of their own."""
    quantize, engine = config.adapter.quantize, config.engine
    if quantize == "none":
        return
    if config.fp8.format:
        what = f"{quantize}, but fp8.format is {config.fp8.format}, and a matrix has one format"
        yield ConfigError("adapter.quantize", what, "Set it to none, or fp8.format to null")
    if (tp := config.parallel.tensor_model_parallel_size) > 1:
        what = (
            f"{tp}, but adapter.quantize is {quantize}: a scale is for 64 neighbours in a matrix, "
        )
        what += "so a split matrix would get other numbers"
        remedy = "Set it to 1 and use pipeline or data parallelism, or adapter.quantize=none"
        yield ConfigError("parallel.tensor_model_parallel_size", what, remedy)
    if engine.name == "deepspeed" and engine.zero_stage == 3:
        what = f"{quantize}, but engine.zero_stage 3 splits the weights, and packed ones cannot be"
        remedy = "Set engine.zero_stage to 2, or use engine.name=megatron"
        yield ConfigError("adapter.quantize", what, remedy)
