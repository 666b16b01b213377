"""The config: one dataclass a section, each field explained under its declaration.

Fields that go straight to megatron-core keep its name. Defaults are small and safe; the presets in
``presets/`` carry the paper's values. ``load.py`` reads YAML into these classes and ``check.py``
looks for combinations that cannot work.
"""

from dataclasses import dataclass, field
from typing import Annotated

from megatron_chameleon.config.constraints import (
    Between,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Share,
)


@dataclass
class ModelConfig:
    """The transformer. Source: paper, section 2.3."""

    num_layers: PositiveInt = 4
    hidden_size: PositiveInt = 128
    ffn_hidden_size: PositiveInt = 344
    """Width of the SwiGLU feed-forward (of each of its two halves)."""
    num_attention_heads: PositiveInt = 4
    num_query_groups: int | None = None
    """Key/value heads (GQA); null means as many as attention heads."""
    seq_length: PositiveInt = 256
    """Tokens of one training sequence, and the longest context of generation."""
    norm_order: Annotated[str, OneOf("pre", "swin")] = "pre"
    """pre: ``x + f(norm(x))`` (7B); swin: ``x + norm(f(x))`` (34B)."""
    qk_norm_groups: int | None = None
    """Groups of heads that share one QK-norm weight and bias; null: one a head; 0: no QK-norm."""
    hidden_dropout: Share = 0.0
    """Dropout after attention and after feed-forward."""
    layernorm_epsilon: PositiveFloat = 1e-5
    rotary_base: PositiveInt = 10000
    init_method_std: PositiveFloat = 0.02


@dataclass
class TokenizerConfig:
    path: str = ""
    """Folder written by ``chameleon tokenizer``."""


@dataclass
class SourceConfig:
    """One .bin/.idx pair of files and its share of the mixture."""

    prefix: str = ""
    """Path of the files without .bin and .idx."""
    weight: float = 1.0
    """Share of the tokens within its stage's list; the weights of a list need not sum to 1."""
    image_first: Share | None = None
    """Share of the text-image pairs with the image first; null leaves them as they were written."""
    repeat: bool | int = True
    """true: its documents come again, in another order, as often as they are needed; false: once; a
    number: at most so many times. The other sources then take its share."""
    name: str = ""
    """What a run knows the source by, to find its place in it when it is resumed; empty: its
    prefix. With a name, the files may be moved."""


@dataclass
class DataConfig:
    """Two-stage mixture. Source: paper, section 2.2."""

    stage1: list[SourceConfig] = field(default_factory=list)
    """Sources from the first step on."""
    stage2: list[SourceConfig] = field(default_factory=list)
    """Sources that join for the last part of training."""
    reset_attention: bool = False
    """Whether documents are isolated: those packed into one sequence attend to themselves only, and
    a text is not cut unless it is longer than a sequence."""
    loss_on: Annotated[str, OneOf("auto", "answers", "all")] = "auto"
    """auto: on the answers of conversations, and on all of other documents; answers: the same, and
    a source that holds anything but conversations is refused; all: on everything, prompts too."""
    packing_reserve: Annotated[float, Between(0, 0.5)] = 0.002
    """Share of the tokens of 2,048 sequences that is left free, so that unevenly spread images
    fit."""
    stage1_fraction: Share = 0.8
    """Share of the steps that belong to stage 1."""
    stage1_tokens: PositiveInt | None = None
    """Consumed tokens, padding included, at which stage 2 begins, in place of
    ``stage1_fraction``."""
    stage2_share: Share = 0.5
    """Share of stage 2 that its own sources get; those of stage 1 keep the rest, in proportion."""


@dataclass
class ParallelConfig:
    """The layout over the processes; data parallelism takes what is left of the world size."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Split the optimizer state over the data-parallel ranks (ZeRO-1)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Parts of the model that each pipeline stage holds (interleaved schedule); null: one."""
    context_parallel_size: PositiveInt = 1
    """Split each sequence over so many ranks; needs Transformer Engine."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs; needs GPUs."""
    overlap_param_gather: bool = False
    """Gather the distributed optimizer's weights while the forward pass runs; needs GPUs."""
    recompute_granularity: Annotated[str, OneOf("selective", "full")] | None = None
    """null, selective (attention only) or full (each layer)."""
    recompute_num_layers: PositiveInt = 1
    """Layers of one recomputed block, with full recompute."""


@dataclass
class OptimizerConfig:
    """AdamW. Source: paper, section 2.3."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    lr_warmup_steps: NonNegativeInt = 0
    lr_decay_style: Annotated[str, OneOf("exponential", "cosine", "constant")] = "exponential"
    """exponential (pretraining), cosine (fine-tuning) or constant."""
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: PositiveFloat = 1e-5
    clip_grad: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0 leaves it as it is."""


@dataclass
class TrainingConfig:
    steps: PositiveInt = 100
    """Optimizer updates of the whole run."""
    seed: NonNegativeInt = 1
    micro_batch_size: PositiveInt = 1
    """Sequences of one forward and backward pass on one data-parallel rank."""
    global_batch_size: PositiveInt = 1
    """Sequences of one optimizer update over the whole job."""
    dtype: Annotated[str, OneOf("fp32", "bf16")] = "fp32"
    """fp32 or bf16 (with fp32 main weights)."""
    z_loss: NonNegativeFloat = 1e-5
    """Weight of ``log(Z)^2``, Z the normaliser of the output softmax."""
    nonfinite: Annotated[str, OneOf("stop", "skip", "rollback")] = "stop"
    """What follows a loss or gradient that is not finite, which is found before the update: stop;
    skip: leave the update out and go on; rollback: load the newest checkpoint, replay, and leave
    the update out when that step comes again."""
    nonfinite_limit: NonNegativeInt = 3
    """How many steps of the whole run may be left out for that; the run then stops."""
    skip_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose update is left out in any case."""
    hang_seconds: NonNegativeFloat = 480.0
    """A step, or waiting for its data, that takes longer ends the job with the stacks of all ranks;
    loading, saving and sampling, and a step after one of them, may take four times as long. 0: no
    limit. The default comes before NCCL's own limit of ten minutes."""
    profile_steps: list[int] = field(default_factory=list)
    """First and last step to trace with torch's profiler, such as [10, 12], into the run folder's
    ``profile/``; empty: none."""
    profile_all_ranks: bool = False
    """Trace every rank, not only the first."""


@dataclass
class FusionConfig:
    """Fused kernels, which change speed and memory, and nothing else beyond rounding.

    null: where this machine can run it and a gain is known (``model/fusions.py``); true: or refuse
    to start; false: never. The first four are megatron-core's own and keep its names.
    """

    apply_rope_fusion: bool | None = None
    """Rotary embedding by Transformer Engine's kernel."""
    bias_dropout_fusion: bool | None = None
    """Dropout and the residual's addition compiled into one kernel. Its dropout masks are others
    than the unfused ones, as random, and as much a function of the seed."""
    bias_activation_fusion: bool | None = None
    """SwiGLU compiled into one kernel."""
    gradient_accumulation_fusion: bool | None = None
    """Weight gradients of Transformer Engine's layers are added to the fp32 gradients by the matrix
    product itself."""
    loss_fusion: bool | None = None
    """Cross-entropy and log(Z) by Triton kernels that overwrite the logits with their gradient."""
    qk_norm_rope_fusion: bool | None = None
    """QK-norm and rotary embedding in one Triton kernel."""


@dataclass
class Fp8Config:
    """FP8 matrix products. megatron-core's fields without their prefix ``fp8_``.

    Source: Transformer Engine's recipes, whose defaults these are; megatron-core's differ.
    """

    format: Annotated[str, OneOf("hybrid", "e4m3")] | None = None
    """null: no FP8; hybrid: E4M3 forward and E5M2 for gradients; e4m3: E4M3 for all."""
    recipe: Annotated[str, OneOf("delayed", "tensorwise")] = "delayed"
    """delayed: scales from the largest values of earlier steps; tensorwise: from the tensor itself
    (current scaling)."""
    margin: NonNegativeInt = 0
    """Scales are divided by 2^margin (delayed scaling)."""
    amax_history_len: PositiveInt = 1024
    """Steps that delayed scaling looks back."""
    amax_compute_algo: Annotated[str, OneOf("max", "most_recent")] = "max"
    """max: of the whole history; most_recent: the last step's."""
    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """First layers that stay in bf16 (tensorwise only)."""
    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """Last layers that stay in bf16 (tensorwise only)."""
    emulate: bool = False
    """Quantise and dequantise in the same places on a machine without FP8, to see a recipe's effect
    on the loss; slower than no FP8."""


@dataclass
class CheckpointConfig:
    every_steps: NonNegativeInt = 0
    """Save every so many steps; 0 saves at the end only."""
    keep_last: PositiveInt = 2
    """How many checkpoints stay; older ones are deleted after a newer one is whole."""
    keep_every: NonNegativeInt = 0
    """Checkpoints whose step is a multiple of this stay for good; 0: none."""
    async_save: bool = False
    """Train on while a checkpoint is written; the host's memory then holds a second copy of what
    each rank saves."""


@dataclass
class SamplePromptConfig:
    """What the model is asked for its samples."""

    text: str = ""
    image: str | None = None
    """An image file, before the text."""
    force: str | None = None
    """image: answer with one image; text: with text only; null: as the model likes."""


@dataclass
class LoggingConfig:
    run_dir: str = "runs/default"
    every_steps: PositiveInt = 10
    """Steps between two progress lines; ``metrics.jsonl`` has every step."""
    tensorboard: bool = False
    """Write event files into the run folder's ``tensorboard/``."""
    wandb_project: str | None = None
    """Weights & Biases' project; offline where no key is set. null: none."""
    sample_every_steps: NonNegativeInt = 0
    """Let the model answer ``sample_prompts`` every so many steps, into ``samples/``; 0: never."""
    sample_prompts: list[SamplePromptConfig] = field(default_factory=list)
    sample_max_tokens: PositiveInt | None = None
    """Tokens of a sample; null fills the context."""


@dataclass
class EngineConfig:
    name: Annotated[str, OneOf("megatron", "deepspeed")] = "megatron"
    """megatron or deepspeed."""
    zero_stage: Annotated[int, OneOf(0, 1, 2, 3)] = 1
    """DeepSpeed: split over the data-parallel ranks nothing (0), optimizer state (1), gradients too
    (2), weights too (3)."""
    offload_optimizer: bool = False
    """DeepSpeed: keep the optimizer state in CPU memory and update there."""
    offload_param: bool = False
    """DeepSpeed: keep the weights in CPU memory (ZeRO 3)."""


@dataclass
class Config:
    """The whole config of a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
