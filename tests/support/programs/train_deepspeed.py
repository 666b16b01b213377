"""Train a Chameleon under plain DeepSpeed, as someone without this project would.

    python train_deepspeed.py JOBS.json OUTPUT_DIR

Each job has these keys:

    name        its name, NAME below
    processes   number of processes
    stage       ZeRO stage
    dtype       bf16 or fp32
    steps       number of steps
    model       a Hugging Face folder, or null for our model under its own names
    load        a folder with a universal checkpoint, or null
    optimizer   whether the moments of that checkpoint are loaded too
    own_steps   whether each parameter group then gets a step tensor of its own

After its second step a job saves a checkpoint into OUTPUT_DIR/NAME, and the values that DeepSpeed
itself reports for every parameter into NAME.pt. NAME.json has the losses. Finally, DeepSpeed's own
tool makes a universal checkpoint, NAME-universal, from each checkpoint of a transformers model.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from forked_jobs import run_forked
from megatron_chameleon.parallel.deepspeed_setup import prepare_deepspeed

STATES = ("exp_avg", "exp_avg_sq")
SAVED_STEP = 2
OWN_MODEL = {"model.num_query_groups": 2, "model.qk_norm_groups": 2}
FIRST_TEXT_ID, VOCABULARY = 280, 320  # transformers masks the logits of image codes


def deepspeed_settings(job: dict[str, Any]) -> dict[str, Any]:
    """The settings that a user of DeepSpeed would have in a JSON file."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": job["stage"], "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": job["dtype"] == "bf16"},
        "checkpoint": {"load_universal": job["load"] is not None},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def build_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with the usual two groups, with and without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def build_model(job: dict[str, Any]) -> torch.nn.Module:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["dtype"]]
    if job["model"] is None:
        from megatron_chameleon.model.chameleon import build_model as build_ours
        from megatron_chameleon.parallel.topology import create_topology
        from run_layouts import make_config

        config = make_config(OWN_MODEL)
        (ours,) = build_ours(config, VOCABULARY, create_topology(config.parallel))
        return ours.to(dtype)
    from transformers import ChameleonForConditionalGeneration

    model = ChameleonForConditionalGeneration.from_pretrained(job["model"], dtype=dtype)
    model.model.vqmodel.requires_grad_(job["dtype"] == "fp32")  # frozen in half of the jobs
    return model.train()


def loss_of(engine: Any, tokens: torch.Tensor) -> torch.Tensor:
    if hasattr(engine.module, "model"):
        return engine(input_ids=tokens, labels=tokens).loss
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    losses, _, _ = engine(tokens, places, None, labels=tokens)
    return losses.mean()


def batch(step: int, rank: int) -> torch.Tensor:
    """[2, 24] ids of text."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(FIRST_TEXT_ID, VOCABULARY, (2, 24), generator=generator)


def whole_state(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The fp32 weight and moments of every trained parameter, as DeepSpeed reports them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from megatron_chameleon.checkpoint.state.deepspeed_state import _link_state

    _link_state(engine.optimizer)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[name] = {"fp32_param": safe_get_full_fp32_param(parameter).clone()}
            for state in STATES:
                found[name][state] = safe_get_full_optimizer_state(parameter, state).clone()
    return found


def run_job(job: dict[str, Any], output: Path) -> None:
    rank = torch.distributed.get_rank()
    prepare_deepspeed(rank)
    import deepspeed

    model = build_model(job)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model), config=deepspeed_settings(job)
    )
    first = 0
    if job["load"]:
        path, _ = engine.load_checkpoint(
            job["load"],
            load_optimizer_states=job["optimizer"],
            load_lr_scheduler_states=False,
        )
        assert path is not None
        first = engine.global_steps
        if job.get("own_steps"):
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
    losses = []
    for step in range(first, job["steps"]):
        loss = loss_of(engine, batch(step, rank))
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / torch.distributed.get_world_size())
        if step + 1 == SAVED_STEP:
            state = whole_state(engine)
            engine.save_checkpoint(str(output / job["name"]))
            if rank == 0:
                torch.save(state, output / f"{job['name']}.pt")
    if rank == 0:
        (output / f"{job['name']}.json").write_text(json.dumps(losses))


def make_universal(step_folder: Path, destination: Path) -> None:
    """Convert a step's folder with DeepSpeed's own tool."""
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    folders = {"input_folder": str(step_folder), "output_folder": str(destination)}
    ds_to_universal.main(Namespace(**folders, **options, strict=True, inject_missing_state=True))


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401 (imported once for all jobs, before they are forked)

    run_forked(run_job)
    output = Path(sys.argv[2])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job["model"] and not job["load"]:  # the tool fails on our model's extra states
            step = f"global_step{SAVED_STEP}"
            make_universal(output / job["name"] / step, output / f"{job['name']}-universal" / step)
