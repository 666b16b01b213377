"""The config: one dataclass per section, each field explained below its declaration.

Fields that go straight to megatron-core keep its names. Defaults are small and safe; the presets in
``presets/`` hold the paper's values. ``load.py`` reads YAML into these classes. What a single value
must be is part of its type (``constraints.py``); ``checks/`` finds combinations that cannot work.
"""

from dataclasses import dataclass, field
from typing import Annotated

from megatron_chameleon.config.constraints import (
    Above,
    Below,
    Between,
    NonNegativeInt,
    OneOf,
    PathText,
    PositiveInt,
    Repeats,
    Seed,
    Share,
    Text,
    ZeroOr,
)
from megatron_chameleon.config.finetuning import AdapterConfig, DpoConfig

WEIGHTS = Between(1e-9, 1e15, remedy="Use a number in that range, or remove the source")
LayerCount = Annotated[int, Between(1, 2000)]
Width = Annotated[int, Between(1, 2**20)]
HeadCount = Annotated[int, Between(1, 2**14)]
RankCount = Annotated[int, Between(1, 2**16)]
SequenceLength = Annotated[int, Between(1, 2**24)]
Name = Annotated[str, Text(200)]
EventKind = Annotated[
    str,
    OneOf(
        *("start", "restart", "resume", "resume_change", "alarm", "straggler", "validation_rises"),
        *("modalities", "skip", "rollback", "save", "stop", "finish", "error", "hang"),
    ),
]


@dataclass
class ModelConfig:
    """The transformer. Source: paper, section 2.3."""

    num_layers: LayerCount = 4
    """Transformer layers."""
    hidden_size: Width = 128
    """Width of a token's vector."""
    ffn_hidden_size: Width = 344
    """Width of each of the two halves of the SwiGLU feed-forward layer."""
    num_attention_heads: HeadCount = 4
    """Query heads; ``hidden_size`` must be divisible by their number."""
    num_query_groups: HeadCount | None = None
    """Key/value heads (GQA); null: as many as attention heads."""
    seq_length: SequenceLength = 256
    """Tokens per training sequence, and the longest context in generation."""
    norm_order: Annotated[str, OneOf("pre", "swin")] = "pre"
    """pre: ``x + f(norm(x))`` (7B); swin: ``x + norm(f(x))`` (34B)."""
    qk_norm_groups: Annotated[int, Between(0, 2**14)] | None = None
    """Groups of heads that share one QK-norm weight and bias; null: one group per head; 0: no
    QK-norm."""
    hidden_dropout: Annotated[float, Below(0, 1)] = 0.0
    """Dropout rate after attention and after the feed-forward layer."""
    layernorm_epsilon: Annotated[float, Between(1e-12, 0.1)] = 1e-5
    """Added to the variance in every norm."""
    rotary_base: Annotated[int, Between(2, 10**12)] = 10000
    """Base of the rotary embedding; larger ones suit longer sequences."""
    init_method_std: Annotated[float, Between(1e-6, 10)] = 0.02
    """Standard deviation of the first weights."""
    train: list[Name] = field(default_factory=list)
    """Globs on the names of the exported Hugging Face model's tensors and modules: what is trained.
    Empty: everything. ``lm_head[image]`` means the rows of the image codes, ``[text]`` the others,
    and ``[A:B]`` the rows from A up to B."""
    freeze: list[Name] = field(default_factory=list)
    """Globs like those of ``train``: what is not trained, even if ``train`` names it."""


@dataclass
class TokenizerConfig:
    path: PathText = ""
    """Folder written by ``chameleon tokenizer``."""


@dataclass
class SourceConfig:
    """One .bin/.idx pair of files and its share of the mixture."""

    prefix: PathText = ""
    """Path of the two files without .bin and .idx."""
    weight: Annotated[float, WEIGHTS] = 1.0
    """Share among the sources of its stage, of what ``data.weights_by`` names; the weights need not
    sum to 1. With ``training.epochs`` and all weights at 1, each source is read equally often."""
    image_first: Share | None = None
    """Share of the text-image pairs that start with the image; null keeps each pair as written."""
    repeat: Annotated[bool | int, Repeats(10**6)] = True
    """How often its documents may be seen. true: as often as needed, in a new order each time;
    false: once; a number: at most that many times. When a source is used up, the other sources
    take its share."""
    name: Name = ""
    """By which a resumed run recognizes the source and finds its place in it; empty: the prefix.
    With a name, the files may be moved."""


@dataclass
class ValidationSourceConfig:
    """One .bin/.idx pair of files that the model is measured on and not trained on."""

    prefix: PathText = ""
    """Path of the two files without .bin and .idx."""
    image_first: Share | None = None
    """Share of the text-image pairs that are read with the image first; the same pairs each time.
    null keeps each pair as written. Give it the value that training uses."""
    name: Name = ""
    """The source's name in the metrics, ``validation/NAME/loss``; empty: the last part of the
    prefix."""


@dataclass
class ValidationConfig:
    """Held-out loss: the loss on documents that the model is not trained on."""

    sources: list[ValidationSourceConfig] = field(default_factory=list)
    """All documents of these sources are measured, each of them once. Empty: no held-out loss."""
    every_steps: NonNegativeInt = 0
    """Steps between two measurements; the last one is always after the last step. 0: only that
    one."""
    max_tokens: Annotated[int, Between(1, 10**15)] | None = None
    """Measure about this many tokens of each source: the same documents each time, evenly spread
    over its files. null: all of them."""
    modality_prompts: Annotated[int, Between(0, 1000)] = 16
    """After the last step, let the model answer so many prompts of held-out conversations whose
    answer is a text, and as many whose answer is one image, and count which it gives; 0: none."""


@dataclass
class DataConfig:
    """The two-stage mixture. Source: paper, section 2.2."""

    stage1: list[SourceConfig] = field(default_factory=list)
    """Sources that are used from the first step on."""
    stage2: list[SourceConfig] = field(default_factory=list)
    """Sources that join for the last part of training."""
    weights_by: Annotated[str, OneOf("tokens", "samples", "trained_tokens")] = "tokens"
    """What the weights and ``stage2_share`` are shares of. tokens: all tokens; samples: documents,
    such as conversations; trained_tokens: tokens that the loss is computed on."""
    reset_attention: bool | None = None
    """Isolate documents: each document that is packed into a sequence attends only to itself, and a
    text is cut only if it is longer than a sequence. null: a new run decides by its data, and
    isolates short documents, of which four or more share a sequence on average. A run that resumes
    keeps what it began with; its ``config.yaml`` has true or false."""
    loss_on: Annotated[str, OneOf("auto", "answers", "all")] = "auto"
    """Tokens that the loss is computed on. auto: the answers of conversations, and all tokens of
    other documents; answers: the same, but a source that holds anything except conversations is
    refused; all: every token, prompts included."""
    packing_reserve: Annotated[float, Between(0, 0.5)] = 0.002
    """Share of the tokens of each block of 2,048 sequences that is left free, so that images fit
    even where they are unevenly spread."""
    stage1_fraction: Share = 0.8
    """Share of the steps that belong to stage 1."""
    stage1_tokens: Annotated[int, Between(1, 10**18)] | None = None
    """Number of consumed tokens, padding included, at which stage 2 begins. Replaces
    ``stage1_fraction``."""
    stage2_share: Share = 0.5
    """Share of stage 2 that its own sources get. Those of stage 1 divide the rest in proportion."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass
class ParallelConfig:
    """The layout over the processes. Data parallelism takes what is left of the world size."""

    tensor_model_parallel_size: RankCount = 1
    """Ranks that each layer is split over (TP)."""
    pipeline_model_parallel_size: RankCount = 1
    """Ranks that the stack of layers is split over (PP)."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence dimension over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Split the optimizer state over the data-parallel ranks (ZeRO-1)."""
    virtual_pipeline_model_parallel_size: LayerCount | None = None
    """Parts of the model that each pipeline stage holds (interleaved schedule); null: one part."""
    context_parallel_size: RankCount = 1
    """Number of ranks that each sequence is split over; needs Transformer Engine."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass is still running; needs GPUs."""
    overlap_param_gather: bool = False
    """Gather the distributed optimizer's weights during the forward pass; needs GPUs."""
    recompute_granularity: Annotated[str, OneOf("selective", "full")] | None = None
    """Activations to recompute. null: none; selective: attention only; full: each layer."""
    recompute_num_layers: LayerCount = 1
    """Layers per recomputed block, with full recompute."""


@dataclass
class OptimizerConfig:
    """AdamW (source: paper, section 2.3), or Muon with AdamW for what is not a matrix of a layer.

    The fields of Muon have megatron-core's names.
    """

    name: Annotated[str, OneOf("adamw", "muon")] = "adamw"
    """adamw, or muon: the matrices of the layers by Muon; norms, embedding and output layer by
    AdamW. docs/optimizers.md says what it does."""
    lr: Annotated[float, Above(0, at_most=1e6)] = 1e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Between(0, 1e6)] = 0.0
    """What the decay would reach in the step after the last one."""
    lr_warmup_steps: NonNegativeInt = 0
    """The learning rate rises linearly over this many steps. The first has 1/N of the peak, the
    last all of it."""
    lr_decay_style: Annotated[str, OneOf("exponential", "cosine", "constant", "wsd")] = (
        "exponential"
    )
    """exponential (pretraining), cosine (fine-tuning), constant, or wsd, which is constant until a
    decay over the last part of the run. docs/schedules.md has the formulas."""
    lr_wsd_decay_style: Annotated[str, OneOf("linear", "cosine", "minus_sqrt", "exponential")] = (
        "linear"
    )
    """Shape of the decay of wsd. minus_sqrt: 1 - sqrt(progress)."""
    lr_wsd_decay_steps: Annotated[int, Between(2, 10**9)] | None = None
    """wsd: the decay takes this many last steps. It needs one of these three keys."""
    lr_wsd_decay_tokens: Annotated[int, Between(1, 10**18)] | None = None
    """wsd: the decay begins when this many tokens of the run, padding included, are left."""
    lr_wsd_decay_on: Annotated[str, OneOf("stage2")] | None = None
    """wsd, stage2: the decay begins with the first step of stage 2."""
    weight_decay: Annotated[float, Between(0, 1000)] = 0.1
    """Decoupled from the gradient (AdamW). Norms are not decayed."""
    adam_beta1: Annotated[float, Below(0, 1)] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[float, Below(0, 1)] = 0.95
    """Decay of AdamW's mean of squared gradients."""
    adam_eps: Annotated[float, Between(1e-30, 1)] = 1e-5
    """Added to AdamW's denominator."""
    muon_momentum: Annotated[float, Below(0, 1)] = 0.95
    """Decay of Muon's momentum."""
    muon_use_nesterov: bool = True
    """Orthogonalize the gradient and the momentum together (Nesterov), or the momentum alone."""
    muon_num_ns_steps: Annotated[int, Between(1, 100)] = 5
    """Newton-Schulz steps. 5 bring the singular values of an update near 1."""
    muon_scale_mode: Annotated[str, OneOf("spectral", "unit_rms_norm", "shape_scaling")] = (
        "spectral"
    )
    """Factor of the update of a matrix [out, in]. spectral: sqrt(max(out, in)); unit_rms_norm:
    sqrt(out / in); shape_scaling: sqrt(max(1, out / in))."""
    muon_extra_scale_factor: Annotated[float, Above(0, at_most=1e6)] = 0.2
    """A further factor of the update. With spectral, 0.2 gives it the size of AdamW's, so that
    AdamW's ``lr`` and ``weight_decay`` suit Muon too."""
    muon_fp32_matmul_prec: Annotated[str, OneOf("highest", "high", "medium")] = "highest"
    """Precision of the Newton-Schulz steps. highest: fp32; high: TF32 where a GPU has it; medium:
    bf16."""
    clip_grad: Annotated[float, Between(0, 1e6)] = 1.0
    """Largest global norm of the gradient; 0: no clipping."""


@dataclass
class TrainingConfig:
    objective: Annotated[str, OneOf("next_token", "dpo")] = "next_token"
    """next_token: cross-entropy of the next token; dpo: preference tuning on pairs of answers, with
    the section ``dpo``."""
    steps: NonNegativeInt = 100
    """Optimizer updates in the whole run; 0: they follow from ``epochs``."""
    epochs: Annotated[float, Above(0, at_most=10**6)] | None = None
    """How often the run reads all documents of stage 1, such as 3 or 0.5, in place of ``steps``.
    The one that is set last counts: that of the command line, of the file, of the preset. A
    resolved config has both. null: ``steps`` alone says how long the run is."""
    seed: Seed = 1
    """Of the first weights, the order of the data, dropout and samples."""
    micro_batch_size: Annotated[int, Between(1, 2**16)] = 1
    """Sequences per forward and backward pass on one data-parallel rank."""
    global_batch_size: Annotated[int, Between(1, 2**20)] = 1
    """Sequences per optimizer update over the whole job."""
    rampup_batch_size: list[Annotated[int, Between(1, 10**12)]] = field(default_factory=list)
    """Batch-size warm-up as [start, increment, samples]: the global batch grows from ``start`` by
    ``increment`` up to ``global_batch_size``, in equal parts of the first ``samples`` samples of
    the run. Empty: no warm-up."""
    dtype: Annotated[str, OneOf("fp32", "bf16")] = "fp32"
    """fp32, or bf16 with fp32 main weights."""
    z_loss: Annotated[float, Between(0, 1000)] = 1e-5
    """Weight of ``log(Z)^2``, where Z is the normaliser of the output softmax."""
    ema_decay: Annotated[float, Below(0, 1)] | None = None
    """Keep an exponential moving average of the weights in fp32, which ``--ema`` evaluates and
    exports. This is its decay per update, such as 0.999; after n updates it is at most
    (1 + n) / (10 + n). null: no average."""
    nonfinite: Annotated[str, OneOf("stop", "skip", "rollback")] = "stop"
    """What to do about a loss or gradient that is not finite, which is detected before the update.
    stop: end the run; skip: leave out this update and continue; rollback: load the newest
    checkpoint, replay the steps since, and leave out the update when that step comes again."""
    nonfinite_limit: NonNegativeInt = 3
    """How many updates of the whole run may be left out for this reason before the run stops."""
    skip_steps: list[PositiveInt] = field(default_factory=list)
    """Steps, counted from 1, whose update is always left out."""
    hang_seconds: Annotated[float, ZeroOr(0.1, 10**7)] = 480.0
    """If a step or the wait for its data takes longer, the job ends and prints the stacks of all
    ranks. Loading, saving and sampling, and a step after one of them, may take four times as long.
    0: no limit. The default is shorter than NCCL's own limit of ten minutes."""
    profile_steps: list[PositiveInt] = field(default_factory=list)
    """First and last step to trace with torch's profiler, such as [10, 12]. The traces go into the
    run folder's ``profile/``. Empty: no trace."""
    profile_all_ranks: bool = False
    """Trace every rank instead of only the first."""


@dataclass
class FusionConfig:
    """Fused kernels. They change speed and memory, and results only by rounding.

    null: used where this machine can run the kernel and a gain is known (``model/fusions.py``);
    true: used, and the run refuses to start where it cannot be; false: never used. The first four
    are megatron-core's own and keep its names.
    """

    apply_rope_fusion: bool | None = None
    """Apply the rotary embedding with Transformer Engine's kernel."""
    bias_dropout_fusion: bool | None = None
    """Compile dropout and the addition of the residual into one kernel. Its dropout masks differ
    from the unfused ones; they are as random, and equally determined by the seed."""
    bias_activation_fusion: bool | None = None
    """Compile SwiGLU into one kernel."""
    gradient_accumulation_fusion: bool | None = None
    """Let the matrix product itself add the weight gradients of Transformer Engine's layers to the
    fp32 gradients."""
    loss_fusion: bool | None = None
    """Compute cross-entropy and log(Z) with Triton kernels that overwrite the logits with their
    gradient."""
    qk_norm_rope_fusion: bool | None = None
    """Compute QK-norm and rotary embedding in one Triton kernel."""


@dataclass
class Fp8Config:
    """FP8 matrix products. The fields are megatron-core's without their prefix ``fp8_``.

    Source: Transformer Engine's recipes. These are their defaults; megatron-core's differ.
    """

    format: Annotated[str, OneOf("hybrid", "e4m3")] | None = None
    """null: no FP8; hybrid: E4M3 in the forward pass, E5M2 for gradients; e4m3: E4M3 for both."""
    recipe: Annotated[str, OneOf("delayed", "tensorwise")] = "delayed"
    """Where scales come from. delayed: from the largest values of earlier steps; tensorwise: from
    the tensor itself (current scaling)."""
    margin: Annotated[int, Between(0, 1000)] = 0
    """Scales are divided by 2^margin (delayed scaling)."""
    amax_history_len: Annotated[int, Between(1, 2**16)] = 1024
    """How many steps delayed scaling looks back."""
    amax_compute_algo: Annotated[str, OneOf("max", "most_recent")] = "max"
    """max: the largest value of the whole history; most_recent: that of the last step."""
    num_layers_at_start_in_bf16: Annotated[int, Between(0, 2000)] = 0
    """How many of the first layers stay in bf16 (tensorwise only)."""
    num_layers_at_end_in_bf16: Annotated[int, Between(0, 2000)] = 0
    """How many of the last layers stay in bf16 (tensorwise only)."""
    emulate: bool = False
    """Quantise and dequantise in the same places on a machine without FP8, to see the effect of a
    recipe on the loss. This is slower than training without FP8."""


@dataclass
class CheckpointConfig:
    every_steps: NonNegativeInt = 1000
    """Steps between two checkpoints; 0: save only at the end."""
    keep_last: PositiveInt = 2
    """How many checkpoints to keep. Older ones are deleted once a newer one is complete."""
    keep_every: NonNegativeInt = 0
    """Checkpoints whose step is a multiple of this are never deleted; 0: none."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest held-out loss until a better one is saved. Only steps
    after which the loss is measured and a checkpoint is saved count."""
    async_save: bool = False
    """Continue training while a checkpoint is written. The host's memory then holds a second copy
    of what each rank saves."""


@dataclass
class SamplePromptConfig:
    """One prompt that the model answers for the samples of a run."""

    text: Annotated[str, Text(100_000, lines=True)] = ""
    """The prompt."""
    image: PathText | None = None
    """An image file that is placed before the text."""
    force: Annotated[str, OneOf("image", "text")] | None = None
    """image: answer with one image; text: with text only; null: the model chooses."""


def _told_events() -> list[EventKind]:
    return ["restart", "alarm", "rollback", "stop", "finish", "error", "hang"]


@dataclass
class LoggingConfig:
    run_dir: PathText = "runs/default"
    """The run folder, with everything that the run writes."""
    every_steps: PositiveInt = 10
    """Steps between two progress lines. ``metrics.jsonl`` has every step."""
    tensorboard: bool = False
    """Write event files into the run folder's ``tensorboard/``."""
    wandb_project: Name | None = None
    """Project of Weights & Biases, offline where no API key is set; null: not used."""
    sample_every_steps: NonNegativeInt = 0
    """Let the model answer ``sample_prompts`` every so many steps, into ``samples/``; 0: never."""
    sample_prompts: list[SamplePromptConfig] = field(default_factory=list)
    """What the model is asked for samples."""
    sample_max_tokens: SequenceLength | None = None
    """Most tokens per sample; null: until the context is full."""
    on_event: Annotated[str, Text(4096)] | None = None
    """Who is told of events: a command, which gets the event as JSON on its standard input and in
    variables (``CHAMELEON_EVENT`` and others), or an ``https://`` address, which gets it as a POST;
    null: nobody. No shell reads the command. A failure is a warning and never harms the run."""
    on_event_kinds: list[EventKind] = field(default_factory=_told_events)
    """The events of ``events.jsonl`` that ``on_event`` is told of."""


@dataclass
class EngineConfig:
    name: Annotated[str, OneOf("megatron", "deepspeed")] = "megatron"
    """megatron or deepspeed."""
    zero_stage: Annotated[int, OneOf(0, 1, 2, 3)] = 1
    """DeepSpeed: what is split over the data-parallel ranks. 0: nothing; 1: the optimizer state; 2:
    gradients too; 3: weights too."""
    offload_optimizer: bool = False
    """DeepSpeed: keep the optimizer state in CPU memory and update the weights there."""
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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
