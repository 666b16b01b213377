"""Train a small model on random tokens under several layouts, one after another.

Usage: ``python run_layouts.py JOBS.json OUTPUT_DIR``. A job is {"name", "processes", "steps",
"set": {"section.key": value}} and may say how isolated documents attend: "attention", a key of
``ATTENTION``. For each job it writes NAME.json, the metrics of every step, and
NAME.pt, the initial weights and the gradients of the first step, assembled from all processes.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.mapping as mapping
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor
from torch.nn import functional

from forked_jobs import run_forked
from megatron_chameleon.config.checks.layouts import check_layout
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.model.backend import ScaledDotProductAttention
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.training.engines.megatron import MegatronEngine
from stand_ins.transformer_engine_attention import packed_documents

VOCAB_SIZE = 96


def make_config(values: dict[str, Any]) -> Config:
    """The base config, changed by a job's values."""
    config = Config()
    base = {
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 48,
        "model.num_attention_heads": 4,
        "model.seq_length": 32,
        # sqrt(0.4 / hidden_size). 0.02 suits the paper's sizes. In so small a Swin model, the norms
        # would then divide by their eps, and a step would turn differences of 1e-7 into 1e-5.
        "model.init_method_std": 0.11,
        "optimizer.lr": 1e-2,
        "optimizer.lr_warmup_steps": 2,
        "training.steps": 20,
        "training.micro_batch_size": 2,
        "training.global_batch_size": 8,
        "training.z_loss": 1e-2,
    }
    for key, value in {**base, **values}.items():
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return config


def make_batch(config: Config, first: int) -> Batch:
    """One micro-batch: half of the labels count, and low tokens are image codes.

    In one micro-batch of each step no label counts, as in a sequence that is only a prompt.

    Low tokens are frequent, which a model learns in a few steps. If all were equally frequent, the
    gradients would be noise, and AdamW would turn rounding errors into steps.
    """
    shape = config.training.micro_batch_size, config.model.seq_length
    windows, counts = [], []
    for index in range(first, first + shape[0]):
        generator = torch.Generator().manual_seed(1000 + index)
        uniform = torch.rand(shape[1] + 1, generator=generator)
        windows.append((VOCAB_SIZE * uniform**3).long())
        counts.append(torch.rand(shape[1], generator=generator) < 0.5)
        counts[-1] &= first % config.training.global_batch_size != shape[0]
    window = torch.stack(windows)
    batch = Batch(
        tokens=window[:, :-1],
        labels=window[:, 1:],
        loss_mask=torch.stack(counts).float(),
        image_mask=window[:, 1:] < VOCAB_SIZE // 16,
        position_ids=torch.arange(shape[1]).expand(shape),
    )
    return isolate(batch, first) if config.data.reset_attention else batch


def isolate(batch: Batch, first: int) -> Batch:
    """Documents of 1 to 12 tokens, and in each fourth sequence a single one."""
    samples, length = batch.tokens.shape
    ends = []
    for index in range(first, first + samples):
        generator = torch.Generator().manual_seed(2000 + index)
        lengths = torch.randint(1, 13, (length,), generator=generator)
        inner = lengths.cumsum(0)
        inner = inner[(inner < length) & (index % 4 > 0)]
        ends += [*(inner + (index - first) * length).tolist(), (index - first + 1) * length]
    borders = [0, *ends]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(borders)])
    return dataclasses.replace(
        batch,
        position_ids=positions.view(samples, length),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
    )


@contextlib.contextmanager
def dense_mask() -> Iterator[None]:
    """Isolate documents by a mask of all pairs of tokens, as a reference."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **named: Any
    ) -> Tensor:
        position_ids = named["packed_seq_params"].position_ids
        place = torch.arange(position_ids.size(1))
        first = (place - position_ids).unsqueeze(2)
        seen = (first <= place) & (place <= place.unsqueeze(1))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen.unsqueeze(1), enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    own = ScaledDotProductAttention.forward
    ScaledDotProductAttention.forward = forward  # type: ignore[assignment, method-assign]
    yield
    ScaledDotProductAttention.forward = own  # type: ignore[method-assign]


ATTENTION: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "own": contextlib.nullcontext,
    "dense": dense_mask,
    "packed": packed_documents,
}


def micro_batches(config: Config, step: int, rank: int, size: int) -> list[Batch]:
    """One data-parallel rank's share of a step's global batch."""
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    starts = range(rank * micro, batch, size * micro)
    return [make_batch(config, (step - 1) * batch + start) for start in starts]


def whole_tensors(engine: MegatronEngine, attribute: str | None) -> dict[str, Tensor]:
    """Every whole parameter, or its ``attribute``, on rank 0; an empty dict on other ranks.

    megatron-core's own sharded tensors say where each rank's part belongs. Replicas must be equal.
    """
    parts = []
    for sharded in _sharded(engine):
        value = sharded.data if attribute is None else getattr(sharded.data, attribute)
        if isinstance(sharded, mapping.ShardedTensorFactory):
            pieces = nested_values(sharded.build_fn(sharded.key, value, sharded.replica_id, None))
        else:
            pieces = [dataclasses.replace(sharded, data=value, dtype=value.dtype)]
        for piece in pieces:
            data = piece.data.detach().clone().reshape(piece.local_shape)
            parts.append((piece.key, piece.global_shape, piece.global_offset, data))
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, parts)
    whole: dict[str, Tensor] = {}
    if torch.distributed.get_rank() != 0:
        return whole
    for key, shape, offset, data in (part for rank in gathered for part in rank):
        place = whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
        # A stacked tensor has a first axis for the layers, which its parts do not have.
        data = data.reshape([1] * (len(shape) - data.dim()) + list(data.shape))
        region = tuple(
            slice(start, start + size) for start, size in zip(offset, data.shape, strict=True)
        )
        if not place[region].isnan().any():
            torch.testing.assert_close(place[region], data, rtol=1e-6, atol=1e-9, msg=key)
        place[region] = data
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def _sharded(engine: MegatronEngine) -> Iterator[Any]:
    for part in engine.parts:
        for value in nested_values(part.sharded_state_dict()):
            if isinstance(value, mapping.ShardedTensor | mapping.ShardedTensorFactory):
                yield value


def gather_gradient_shards(engine: MegatronEngine) -> None:
    """Gather gradients: with the distributed optimizer, a rank has only reduced its own shard."""
    for chunk in engine.chunks:
        for buffer in chunk.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def run_job(job: dict[str, Any], output: Path) -> None:
    with ATTENTION[job.get("attention", "own")]():
        run_layout(job, output)


def run_layout(job: dict[str, Any], output: Path) -> None:
    config = make_config(job["set"])
    problems = list(check_layout(config, job["processes"]))
    assert not problems, problems
    topology = create_topology(config.parallel)
    engine = MegatronEngine(config, VOCAB_SIZE, topology)
    if config.training.dtype == "fp64":
        engine.optimizer.config.clip_grad = 0.0  # megatron-core clips fp32 gradients only
    place = topology.data_rank, topology.data_size
    weights = whole_tensors(engine, None)
    engine.compute_gradients(1, micro_batches(config, 1, *place))
    if config.parallel.use_distributed_optimizer:
        gather_gradient_shards(engine)
    gradients = whole_tensors(engine, "main_grad")
    engine.monitor.finish_step(0.0)
    metrics = [
        engine.train_step(step, micro_batches(config, step, *place))
        for step in range(1, job["steps"] + 1)
    ]
    if topology.rank == 0:
        torch.save({"weights": weights, "gradients": gradients}, output / f"{job['name']}.pt")
        (output / f"{job['name']}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    run_forked(run_job)
