"""Load a checkpoint under several layouts and write the logits that each computes.

Usage: ``python run_logits.py JOBS.json OUTPUT_DIR``. A job is {"name", "processes",
"checkpoint", "token_ids", "parallel": {key: value}}. For each job it writes NAME.pt, the logits
[B, S, vocabulary].
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from forked_jobs import run_forked
from megatron_chameleon.checkpoint.state.folders import load_checkpoint_config, load_state
from megatron_chameleon.model.chameleon import build_model
from megatron_chameleon.parallel.topology import create_topology


def run_job(job: dict[str, Any], output: Path) -> None:
    checkpoint = Path(job["checkpoint"])
    config = load_checkpoint_config(checkpoint)
    config.parallel = dataclasses.replace(config.parallel, **job["parallel"])
    token_ids = torch.load(job["token_ids"])
    parts = build_model(
        config, load_state(checkpoint)["vocab_size"], create_topology(config.parallel)
    )
    for part in parts:
        state = part.sharded_state_dict()
        tensors = {key: value for key, value in state.items() if "_extra_state" not in key}
        part.load_state_dict(dist_checkpointing.load(tensors, str(checkpoint)), strict=False)
        part.eval()
    logits = forward(parts, token_ids)
    if logits is not None:
        torch.save(logits, output / f"{job['name']}.pt")


def forward(parts: list[Any], token_ids: Tensor) -> Tensor | None:
    """Logits [B, S, vocabulary] on the last stage's first tensor-parallel rank; None on others."""
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)

    def forward_step(batches: Iterator[Tensor], part: nn.Module) -> tuple[Tensor, Any]:
        output = part(next(batches), positions, attention_mask=None)
        return output, lambda logits, non_loss_data: logits

    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter([token_ids]) for _ in parts],
        model=parts,
        num_microbatches=1,
        seq_length=token_ids.shape[1],
        micro_batch_size=token_ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage():
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    pieces = [torch.empty_like(collected[0]) for _ in range(group.size())]
    torch.distributed.all_gather(pieces, collected[0].contiguous(), group=group)
    return torch.cat(pieces, dim=-1) if group.rank() == 0 else None


if __name__ == "__main__":
    run_forked(run_job)
