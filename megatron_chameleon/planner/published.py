"""Published training speeds, and how far the planner is from each.

    python -W ignore -m benchmarks.planner.plan

The runs themselves are data: ``published_runs.yaml``, beside this file. It also says which runs the
efficiencies of ``gpus.py`` were set on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from megatron_chameleon.config.load import load_dataclass
from megatron_chameleon.config.schema import Config, Fp8Config, ModelConfig, ParallelConfig
from megatron_chameleon.errors import ConfigError, ConfigErrors
from megatron_chameleon.planner.flops import training_flops_per_token
from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.planner.time import (
    Software,
    predict_step,
    tokens_per_second_per_gpu,
)

PUBLISHED_RUNS = Path(__file__).with_name("published_runs.yaml")
SPEED_KEYS = ("tokens_per_second_per_gpu", "step_seconds", "mfu")
RUN_KEYS = ("name", "source", "seq_length", "gpus", "global_batch_size")
MODEL_KEYS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
"""Keys that every run, and every model, must set."""


@dataclass(frozen=True)
class PublishedModel:
    """The shape of a published model; the fields are those of ``ModelConfig``."""

    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0
    num_attention_heads: int = 0
    vocab_size: int = 0
    num_query_groups: int | None = None
    gated: bool = True
    """Whether the feed-forward has a gate: three matrices, not two."""
    norm_order: str = "pre"
    qk_norm_groups: int = 0
    hidden_dropout: float = 0.0

    def model_config(self, seq_length: int) -> ModelConfig:
        """The model as a config of ours.

        A feed-forward without a gate becomes one with a gate and as many parameters: its two
        matrices become three that are 2/3 as wide.
        """
        width = self.ffn_hidden_size
        return ModelConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=width if self.gated else round(2 * width / 3),
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            seq_length=seq_length,
            norm_order=self.norm_order,
            qk_norm_groups=self.qk_norm_groups,
            hidden_dropout=self.hidden_dropout,
        )


@dataclass(frozen=True)
class PublishedRun:
    """One published run. Exactly one of the fields in ``SPEED_KEYS`` is set."""

    name: str = ""
    source: str = ""
    model: PublishedModel = field(default_factory=PublishedModel)
    seq_length: int = 0
    gpu: str = ""
    """A key of ``GPUS``."""
    gpus: int = 0
    global_batch_size: int = 0
    tokens_per_second_per_gpu: float | None = None
    step_seconds: float | None = None
    """Seconds per optimizer update."""
    mfu: float | None = None
    """Share of the bf16 peak, in [0, 1]."""
    micro_batch_size: int = 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    recompute_granularity: str | None = None
    fp8: bool = False
    software: Software = field(default_factory=lambda: Software(fused=True))
    calibration: bool = False
    """Whether an efficiency of ``gpus.py`` was set on this run."""
    note: str = ""

    def config(self) -> Config:
        """The run as a config of ours."""
        config = Config(model=self.model.model_config(self.seq_length))
        config.parallel = ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.virtual_pipeline_model_parallel_size,
            context_parallel_size=self.context_parallel_size,
            sequence_parallel=self.tensor_model_parallel_size > 1,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            recompute_granularity=self.recompute_granularity,
        )
        config.training.dtype = "bf16"
        config.training.global_batch_size = self.global_batch_size
        config.training.micro_batch_size = self.micro_batch_size
        config.fp8 = Fp8Config(format="hybrid" if self.fp8 else None)
        return config

    @property
    def published_speed(self) -> float:
        """Published tokens per second on each GPU."""
        if self.tokens_per_second_per_gpu is not None:
            return self.tokens_per_second_per_gpu
        if self.step_seconds is not None:
            tokens = self.global_batch_size * self.seq_length
            return tokens / self.step_seconds / self.gpus
        assert self.mfu is not None
        return self.mfu * GPUS[self.gpu].peak_flops("bf16", False) / self._flops_per_token()

    def predicted_speed(self) -> float:
        """Tokens per second on each GPU, as the planner predicts them."""
        config = self.config()
        gpu = GPUS[self.gpu]
        step = predict_step(config, self.model.vocab_size, self.gpus, gpu, self.software)
        return tokens_per_second_per_gpu(config, self.gpus, step.total)

    def error(self) -> float:
        """Relative error of the prediction; above 0 means that it is too fast."""
        return self.predicted_speed() / self.published_speed - 1

    def published_mfu(self) -> float:
        """The published speed as MFU by the convention of ``flops.py``."""
        peak = GPUS[self.gpu].peak_flops("bf16", self.fp8)
        return self._flops_per_token() * self.published_speed / peak

    def _flops_per_token(self) -> int:
        model = self.model.model_config(self.seq_length)
        return training_flops_per_token(model, self.model.vocab_size)


@dataclass(frozen=True)
class _PublishedRuns:
    """The content of ``published_runs.yaml``."""

    runs: list[PublishedRun] = field(default_factory=list)


def read_published_runs(path: Path = PUBLISHED_RUNS) -> list[PublishedRun]:
    """The published runs, in the order of the file.

    Raises:
        ConfigError: The file cannot be read.
        ConfigErrors: Keys are unknown or missing, or values cannot be right.
    """
    runs = load_dataclass(_PublishedRuns, path, []).runs
    problems = [
        problem
        for index, run in enumerate(runs)
        for problem in _problems(run, f"{path}: runs[{index}]")
    ]
    if problems:
        raise ConfigErrors(problems)
    return runs


def _problems(run: PublishedRun, where: str) -> list[ConfigError]:
    where = f"{where} ({run.name})" if run.name else where
    missing = [key for key in RUN_KEYS if not getattr(run, key)]
    missing += [f"model.{key}" for key in MODEL_KEYS if not getattr(run.model, key)]
    problems = []
    if missing:
        what = f"the run lacks {', '.join(missing)}"
        problems.append(ConfigError(where, what, "Add what the source says"))
    if run.gpu not in GPUS:
        what = f"the planner does not know the GPU {run.gpu!r}"
        problems.append(ConfigError(where, what, f"Use one of: {', '.join(GPUS)}"))
    given = [key for key in SPEED_KEYS if getattr(run, key) is not None]
    if len(given) != 1:
        what = f"the speed must be given exactly once (got {', '.join(given) or 'none'})"
        problems.append(ConfigError(where, what, f"Set one of {', '.join(SPEED_KEYS)}"))
    return problems


def median_error(runs: Sequence[PublishedRun]) -> float:
    """Median of the absolute relative errors."""
    return median(abs(run.error()) for run in runs)
