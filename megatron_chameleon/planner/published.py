"""Published training speeds, and how far the planner is from each.

    python -W ignore -m benchmarks.planner.plan

The efficiencies of ``gpus.py`` were set on the rows marked ``calibration``, one for each GPU and
precision; the other rows were only looked at afterwards. Feed-forward layers without a gate are
entered with the gated width of as many parameters.
"""

from dataclasses import dataclass, field
from statistics import median

from megatron_chameleon.config.schema import Config, Fp8Config, ModelConfig, ParallelConfig
from megatron_chameleon.planner.flops import training_flops_per_token
from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.planner.time import (
    Software,
    predict_step,
    tokens_per_second_per_gpu,
)

NEMO = Software(fused=True, tensor_overlap=0.5)
FUSED = Software(fused=True)


@dataclass(frozen=True)
class PublishedRun:
    """One published run."""

    name: str
    source: str
    gpu: str
    gpus: int
    model: ModelConfig
    vocab_size: int
    tokens_per_second_per_gpu: float
    global_batch_size: int
    micro_batch_size: int = 1
    layout: tuple[int, int, int | None] = (1, 1, None)
    """TP, PP, VPP."""
    context: int = 1
    fp8: bool = False
    recompute: str | None = None
    software: Software = field(default_factory=lambda: FUSED)
    calibration: bool = False
    note: str = ""

    def config(self) -> Config:
        """The run as a config of ours."""
        tp, pp, vpp = self.layout
        config = Config(model=self.model)
        config.parallel = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=self.context,
            sequence_parallel=tp > 1,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            recompute_granularity=self.recompute,
        )
        config.training.dtype = "bf16"
        config.training.global_batch_size = self.global_batch_size
        config.training.micro_batch_size = self.micro_batch_size
        config.fp8 = Fp8Config(format="hybrid" if self.fp8 else None)
        return config

    def predict(self) -> float:
        """Tokens a second on each GPU."""
        config = self.config()
        gpu = GPUS[self.gpu]
        step = predict_step(config, self.vocab_size, self.gpus, gpu, self.software)
        return tokens_per_second_per_gpu(config, self.gpus, step.total)

    def error(self) -> float:
        """Relative error of the prediction; above 0 is too fast."""
        return self.predict() / self.tokens_per_second_per_gpu - 1

    def mfu(self) -> float:
        """The published speed as MFU by our convention."""
        flops = training_flops_per_token(self.model, self.vocab_size)
        peak = GPUS[self.gpu].peak_flops("bf16", self.fp8)
        return flops * self.tokens_per_second_per_gpu / peak


def median_error(rows: list[PublishedRun]) -> float:
    """Median of the absolute errors."""
    return median(abs(row.error()) for row in rows)


def _gpt(layers: int, hidden: int, heads: int, seq_length: int) -> ModelConfig:
    """A GPT, whose feed-forward of 4 x hidden has two matrices: three of 8/3 x hidden."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=round(8 * hidden / 3),
        num_attention_heads=heads,
        seq_length=seq_length,
        qk_norm_groups=0,
    )


def _llama(
    layers: int, hidden: int, ffn: int, heads: int, groups: int | None, seq_length: int
) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        seq_length=seq_length,
        qk_norm_groups=0,
    )


_CHAMELEON_7B = ModelConfig(
    32, 4096, 11008, 32, seq_length=4096, qk_norm_groups=1, hidden_dropout=0.1
)
_CHAMELEON_34B = ModelConfig(
    48, 8192, 22016, 64, 8, seq_length=4096, norm_order="swin", qk_norm_groups=4
)
_LLAMA3_405B = _llama(126, 16384, 53248, 128, 8, 8192)
# published as MFU, whose convention for attention is not: 8% of the operations depend on it
_LLAMA3_405B_FLOPS = training_flops_per_token(_LLAMA3_405B, 128_256)
_PAPER = "arXiv 2405.09818, GPU-hours of table 2 over 9.2T tokens"
_NEMO = "NeMo 24.07, performance summary"
_FOUNDRY = "llm-foundry, scripts/train/benchmarking"
_KORTHIKANTI = "arXiv 2205.05198, table 5"
_LLAMA3 = "arXiv 2407.21783, table 4"


def _foundry(
    gpu: str,
    size: str,
    gpus: int,
    seq_length: int,
    speed: float,
    batch: int,
    micro: int,
    recompute: str | None,
    calibration: bool = False,
) -> PublishedRun:
    shapes = {"3b": (32, 2560, 20), "7b": (32, 4096, 32), "13b": (40, 5120, 40)}
    shapes |= {"30b": (48, 7168, 56), "70b": (80, 8192, 64)}
    return PublishedRun(
        f"MPT-{size}, {seq_length}",
        _FOUNDRY,
        gpu,
        gpus,
        _gpt(*shapes[size], seq_length),
        50_368,
        speed,
        batch,
        micro,
        recompute=recompute,
        calibration=calibration,
        note="fully sharded data parallelism",
    )


PUBLISHED = [
    PublishedRun(
        "Chameleon-7B",
        _PAPER,
        "a100",
        1024,
        _CHAMELEON_7B,
        65_536,
        2984,
        2048,
        2,
        (2, 1, None),
        software=Software(),
        note="layout not published: TP 2 assumed; all time lost is in it",
    ),
    PublishedRun(
        "Chameleon-34B",
        _PAPER,
        "a100",
        3072,
        _CHAMELEON_34B,
        65_536,
        597,
        3072,
        1,
        (8, 1, None),
        software=Software(),
        note="layout not published: TP 8 assumed; all time lost is in it",
    ),
    _foundry("a100", "7b", 8, 2048, 4641, 96, 6, None, calibration=True),
    _foundry("a100", "7b", 8, 4096, 3684, 256, 16, "full"),
    _foundry("a100", "13b", 8, 2048, 2262, 48, 2, None),
    _foundry("a100", "13b", 8, 4096, 2060, 240, 10, "full"),
    _foundry("a100", "30b", 8, 2048, 916, 504, 3, "full"),
    _foundry("a100", "70b", 64, 2048, 410, 2048, 8, "full"),
    PublishedRun(
        "GPT-3 175B",
        _KORTHIKANTI,
        "a100",
        64,
        _gpt(96, 12288, 96, 2048),
        51_200,
        64 * 2048 / 13.75 / 64,
        64,
        1,
        (8, 8, 3),
        recompute="selective",
    ),
    PublishedRun(
        "MT-NLG 530B",
        _KORTHIKANTI,
        "a100",
        280,
        _gpt(105, 20480, 128, 2048),
        51_200,
        280 * 2048 / 37.83 / 280,
        280,
        1,
        (8, 35, 3),
        recompute="selective",
    ),
    PublishedRun(
        "GPT 1T",
        _KORTHIKANTI,
        "a100",
        512,
        _gpt(128, 25600, 160, 2048),
        51_200,
        512 * 2048 / 71.49 / 512,
        512,
        1,
        (8, 64, None),
        recompute="selective",
    ),
    _foundry("h100", "7b", 8, 2048, 10643, 48, 6, None),
    _foundry("h100", "7b", 8, 4096, 8611, 256, 16, "full"),
    _foundry("h100", "13b", 8, 2048, 4792, 16, 2, None),
    _foundry("h100", "70b", 64, 2048, 1039, 2048, 8, "full"),
    PublishedRun(
        "Llama-3 405B",
        _LLAMA3,
        "h100",
        8192,
        _LLAMA3_405B,
        128_256,
        0.43 * 989.4e12 / _LLAMA3_405B_FLOPS,
        2048,
        1,
        (8, 16, 8),
        calibration=True,
        note="43% MFU; 41% on 16,384 GPUs",
    ),
    PublishedRun(
        "Llama-3 405B",
        _LLAMA3,
        "h100",
        16384,
        _LLAMA3_405B,
        128_256,
        0.41 * 989.4e12 / _LLAMA3_405B_FLOPS,
        2048,
        1,
        (8, 16, 8),
    ),
    PublishedRun(
        "Llama-2 7B",
        _NEMO,
        "h100",
        8,
        _llama(32, 4096, 11008, 32, None, 4096),
        32_000,
        16847,
        128,
        fp8=True,
        software=NEMO,
        calibration=True,
    ),
    PublishedRun(
        "Llama-2 13B",
        _NEMO,
        "h100",
        16,
        _llama(40, 5120, 13824, 40, None, 4096),
        32_000,
        8646,
        128,
        layout=(1, 4, 10),
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "Llama-2 70B",
        _NEMO,
        "h100",
        64,
        _llama(80, 8192, 28672, 64, 8, 4096),
        32_000,
        1707,
        128,
        layout=(4, 4, 20),
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "Llama-3 8B",
        _NEMO,
        "h100",
        8,
        _llama(32, 4096, 14336, 32, 8, 8192),
        128_256,
        12036,
        128,
        context=2,
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "Llama-3 70B",
        _NEMO,
        "h100",
        64,
        _llama(80, 8192, 28672, 64, 8, 8192),
        128_256,
        1533,
        128,
        layout=(4, 4, 5),
        context=2,
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "GPT-3 175B",
        _NEMO,
        "h100",
        128,
        _gpt(96, 12288, 96, 2048),
        51_200,
        726,
        256,
        layout=(4, 8, 6),
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "GPT-3 20B",
        _NEMO,
        "h100",
        64,
        _gpt(44, 6144, 48, 2048),
        51_200,
        5851,
        256,
        2,
        (2, 1, None),
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "GPT-3 5B",
        _NEMO,
        "h100",
        64,
        _gpt(24, 4096, 32, 2048),
        51_200,
        22521,
        2048,
        4,
        (1, 1, None),
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "GPT-3 175B",
        _NEMO,
        "h100",
        512,
        _gpt(96, 12288, 96, 2048),
        51_200,
        782,
        2048,
        2,
        (4, 8, 6),
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "Nemotron 8B",
        _NEMO,
        "h100",
        64,
        _gpt(32, 4096, 32, 4096),
        256_000,
        12701,
        256,
        4,
        (2, 1, None),
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "Nemotron 22B",
        _NEMO,
        "h100",
        64,
        _gpt(40, 6144, 48, 4096),
        256_000,
        4256,
        256,
        2,
        (2, 4, 10),
        fp8=True,
        software=NEMO,
    ),
    PublishedRun(
        "Nemotron 340B",
        _NEMO,
        "h100",
        128,
        _llama(96, 18432, 2 * 73728 // 3, 96, 8, 4096),
        256_000,
        322,
        32,
        1,
        (8, 8, 12),
        fp8=True,
        software=NEMO,
    ),
]
