"""Training speed on one CPU core: this project's engine against transformers' Chameleon.

    python -W ignore -m benchmarks.training.train_step          # 10.5M parameters, minutes
    python -W ignore -m benchmarks.training.train_step --dtypes bf16 --profile ours
    python -W ignore -m benchmarks.training.train_step --quick  # tiny sizes, as a check
    python -W ignore -m benchmarks.training.train_step --isolated  # what isolated documents cost

Both start from the same weights, see the same batches, compute the same loss (with z-loss), clip to
the same norm and update with torch's AdamW. Their losses over the first steps are compared before
anything is timed. Then blocks of steps alternate, and the medians over the blocks are printed.
transformers runs its text model and its output layer; its image tokenizer is never called.

In bf16 our engine keeps fp32 main weights. transformers runs under autocast over fp32 weights
(``bf16``, as its Trainer does), and with weights and AdamW in bf16 (``bf16-weights``), which trains
worse.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.training import isolated
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.parameters import count_parameters, qk_norm_groups, query_groups
from megatron_chameleon.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import Topology, create_topology
from megatron_chameleon.training.engines.megatron import MegatronEngine

COMPARED_STEPS = 3
# largest relative difference of the losses over these steps: rounding, in bf16 to 8 bits
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3}

Step = Callable[[int], float]


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    vocab_size: int
    samples: int
    """Number of sequences per step."""


FULL = Size(ModelConfig(8, 256, 688, 4, seq_length=256), 8192, 4)
QUICK = Size(ModelConfig(2, 32, 64, 2, seq_length=32), 128, 2)


def make_config(size: Size, dtype: str) -> Config:
    config = Config(
        model=size.model,
        tokenizer=TokenizerConfig("none"),
        data=DataConfig([SourceConfig("none")]),
        optimizer=OptimizerConfig(lr=3e-4, lr_decay_style="constant"),
        training=TrainingConfig(steps=10**6, micro_batch_size=size.samples, dtype=dtype),
    )
    config.training.global_batch_size = size.samples
    check_config(config, 1)
    return config


def draw_batches(size: Size, count: int) -> list[Batch]:
    """A batch of random ids, because it does not matter here what the model learns."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, size.samples, size.model.seq_length + 1)
    ids = torch.randint(size.vocab_size, shape, generator=generator)
    positions = torch.arange(size.model.seq_length).expand(size.samples, -1)
    return [
        Batch(
            tokens=window[:, :-1].contiguous(),
            labels=window[:, 1:].contiguous(),
            loss_mask=torch.ones(positions.shape),
            image_mask=window[:, 1:] % 2 == 0,
            position_ids=positions,
        )
        for window in ids
    ]


def make_ours(
    size: Size, config: Config, batches: Sequence[Batch], topology: Topology
) -> tuple[Step, nn.Module]:
    engine = MegatronEngine(config, size.vocab_size, topology)

    def step(number: int) -> float:
        loss = engine.train_step(number + 1, [batches[number % len(batches)]])["loss"]
        assert loss is not None
        return loss

    return step, engine.parts[0]


def transformers_config(model: ModelConfig, vocab_size: int) -> Any:
    """transformers' config for one of our models. Its image tokenizer is tiny and is not called."""
    from transformers import ChameleonConfig

    vqgan = {"resolution": 16, "base_channels": 32, "num_embeddings": 8, "embed_dim": 8}
    return ChameleonConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=query_groups(model),
        max_position_embeddings=model.seq_length,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        swin_norm=model.norm_order == "swin",
        pad_token_id=None,  # otherwise its embedding would get no gradient
        vocabulary_map={"<image>": 0},
        vq_config={**vqgan, "latent_channels": 8, "channel_multiplier": [1, 1]},
        attn_implementation="sdpa",
    )


def make_transformers(size: Size, source: nn.Module) -> nn.Module:
    """Build transformers' model in fp32 with the weights of our model."""
    from transformers import ChameleonForConditionalGeneration

    model = size.model
    result = ChameleonForConditionalGeneration(transformers_config(model, size.vocab_size))
    own = {
        name: tensor.float() for name, tensor in source.state_dict().items() if tensor is not None
    }
    groups = (qk_norm_groups(model), min(qk_norm_groups(model), query_groups(model)))
    tensors = {}
    for row in tensor_rows(Dimensions.of(model, size.vocab_size, *groups)):
        layer = "" if row.layer is None else f"layers.{row.layer}."
        tensors |= row.to_hf(own[row.megatron_name.replace("layers.", layer)])
    missing, unexpected = result.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.startswith("model.vqmodel.") for name in missing)
    result.model.vqmodel.requires_grad_(False)
    return result.train()


def transformers_step(
    model: nn.Module, config: Config, batches: Sequence[Batch], autocast: bool
) -> Step:
    """A step of a plain training loop over transformers' model."""
    values, z_loss = config.optimizer, config.training.z_loss
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if "norm" not in n]
    others = [p for n, p in named if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=values.lr,
        betas=(values.adam_beta1, values.adam_beta2),
        eps=values.adam_eps,
        weight_decay=values.weight_decay,
    )

    def step(number: int) -> float:
        batch = batches[number % len(batches)]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        logits = logits.float()
        log_z = logits.logsumexp(
            -1
        )  # once for both terms, which is cheaper than torch's cross_entropy
        losses = log_z - logits.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
        (losses + z_loss * log_z.square()).mean().backward()
        nn.utils.clip_grad_norm_([p for _, p in named], values.clip_grad)
        optimizer.step()
        return losses.detach().mean().item()

    return step


def make_steps(
    size: Size, dtype: str, batches: Sequence[Batch], topology: Topology
) -> dict[str, Step]:
    """Make the step functions of one comparison from the same weights, and check their losses."""
    config = make_config(size, dtype)
    ours, model = make_ours(size, config, batches, topology)
    reference = make_transformers(size, model)
    count = sum(p.numel() for n, p in reference.named_parameters() if "vqmodel" not in n)
    assert count == count_parameters(size.model, size.vocab_size)
    steps = {"ours": ours}
    steps[dtype] = transformers_step(reference, config, batches, autocast=dtype == "bf16")
    if dtype == "bf16":
        low = make_transformers(size, model).bfloat16()
        steps["bf16-weights"] = transformers_step(low, config, batches, autocast=False)
    losses = {name: [step(n) for n in range(COMPARED_STEPS)] for name, step in steps.items()}
    for name, values in losses.items():
        worst = max(abs(a / b - 1) for a, b in zip(values, losses["ours"], strict=True))
        if worst > TOLERANCES[dtype]:
            raise SystemExit(f"{dtype}: the losses of {name} differ from ours: {losses}")
    print(f"{dtype}: losses of {COMPARED_STEPS} steps agree, ours {losses['ours'][-1]:.6f}")
    return steps


def measure(
    steps: dict[str, Step], blocks: int, block_steps: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds per step over alternating blocks, without the first block of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    number = COMPARED_STEPS
    for block in range(blocks + 1):
        for name, step in steps.items():
            start = clock()
            for offset in range(block_steps):
                step(number + offset)
            if block:
                seconds[name].append((clock() - start) / block_steps)
        number += block_steps
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare_isolation(
    topology: Topology, blocks: int, clock: Callable[[], float], quick: bool
) -> None:
    """Print what isolated documents cost, in a step and in core attention alone."""
    for wanted in isolated.QUICK if quick else isolated.FULL:
        size = Size(wanted.model, wanted.vocab_size, wanted.samples)
        config = make_config(size, "fp32")

        def make_step(batches: Sequence[Batch], size: Size = size, config: Config = config) -> Step:
            return make_ours(size, config, batches, topology)[0]

        steps = isolated.make_steps(make_step, draw_batches(size, 2), wanted.documents)
        print(f"{size.samples} x {size.model.seq_length} tokens, {wanted.documents} documents each")
        isolated.print_ratios(measure(steps, blocks, 1, clock), isolated.PLAIN)
    shape = isolated.QUICK_ATTENTION if quick else isolated.ATTENTION
    tokens, heads, head_size = shape
    print(f"core attention, {tokens:,} tokens of 16 documents, {heads} heads of {head_size}")
    seconds = isolated.measure_attention(shape, 16, blocks, clock)
    isolated.print_ratios(seconds, "document by document")


def profile(step: Step) -> None:
    """Print where one implementation spends its time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(4):
            step(COMPARED_STEPS + number)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="use tiny sizes")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--block-steps", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=list(TOLERANCES))
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, for a machine that others also use"
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="implementation to profile: ours, or another name in the table",
    )
    parser.add_argument(
        "--isolated", action="store_true", help="compare isolated documents with packed ones"
    )
    args = parser.parse_args()
    size, blocks = (QUICK, 1) if args.quick else (FULL, args.blocks)
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    prepare_megatron()
    join_process_group(Launch("alone", 0, 1, 0))
    try:
        topology = create_topology(ParallelConfig())
        if args.isolated:
            compare_isolation(topology, blocks, clock, args.quick)
            return
        batches = draw_batches(size, 8)
        tokens = size.samples * size.model.seq_length
        count = count_parameters(size.model, size.vocab_size)
        print(f"{count:,} parameters, {tokens:,} tokens per step, one thread")
        for dtype in args.dtypes:
            steps = make_steps(size, dtype, batches, topology)
            if args.profile:
                profile(steps[args.profile])
                continue
            seconds = measure(steps, blocks, args.block_steps, clock)
            for name, value in seconds.items():
                words = "ours" if name == "ours" else f"transformers {name}"
                ratio = value / seconds["ours"]
                speed = f"{tokens / value:8.0f} tokens/s"
                print(f"  {words:26} {speed}   ours is {ratio:.3f} times as fast")
    finally:
        leave_process_group()


if __name__ == "__main__":
    main()
