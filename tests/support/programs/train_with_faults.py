"""Training runs with planted faults, all in one launch.

    python train_with_faults.py JOBS.json OUTPUT_DIR

A job is {"name", "processes", "config", "set": overrides, "resume", "fault"}. A fault is null, or
{"kind": gradient, loss or weight, "step" counted from 1, "rank", "once": whether it is absent when
the step is replayed, "signal": whether the run is also asked to stop at that step, "parameter"}.
NAME.json has the error that ended the run, if any, and rank 0's fingerprint of weights and
optimizer state before and after each step.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forked_jobs import Job, run_forked
from megatron_chameleon.cli.logs import shown_logs
from megatron_chameleon.config.load import load_config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.training import open_run
from megatron_chameleon.training.faults.signals import StopSignals
from megatron_chameleon.training.loop import train_joined
from megatron_chameleon.training.prepare import prepare_run
from megatron_chameleon.training.records.events import EventLog

PARAMETER = "decoder.layers.1.mlp.linear_fc2.weight"


class Faulty:
    """Wraps the ``train_step`` of an engine: plants the fault and takes fingerprints."""

    def __init__(self, engine: Any, module: Any, fault: dict[str, Any] | None) -> None:
        self.engine, self.fault = engine, fault
        self.prints: list[tuple[int, str, str]] = []
        self._train_step = engine.train_step
        self._summed_loss = module.summed_loss
        self._handle: Any = None
        self._is_on = False
        engine.train_step = self.train_step
        module.summed_loss = self.summed_loss

    def train_step(self, step: int, micro_batches: Sequence[Batch], **options: Any) -> Any:
        self._switch(False)
        if self.fault and self.fault["step"] == step:
            self._switch(self.fault["rank"] == torch.distributed.get_rank())
        before = fingerprint(self.engine)
        metrics = self._train_step(step, micro_batches, **options)
        self.prints.append((step, before, fingerprint(self.engine)))
        return metrics

    def _switch(self, on: bool) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._is_on = on
        if not on:
            return
        if self.fault.get("signal"):
            os.kill(os.getpid(), signal.SIGUSR1)
        kind = self.fault["kind"]
        parameter = kind != "loss" and self.engine.parts[0].get_parameter(self.fault["parameter"])
        if self.fault.get("once"):
            self.fault = None
        if kind == "gradient":
            self._handle = parameter.register_hook(lambda gradient: gradient * torch.nan)
        elif kind == "weight":
            with torch.no_grad():
                parameter[3, 5] = torch.nan
        if kind != "loss":
            self._is_on = False

    def summed_loss(self, batch: Batch, output: tuple[Tensor, ...], *rest: Any) -> Tensor:
        if self._is_on:
            output = (output[0] + torch.inf, *output[1:])
        return self._summed_loss(batch, output, *rest)


def fingerprint(engine: Any) -> str:
    """A hash of everything that an update changes on this rank."""
    digest = hashlib.sha256()
    for tensor in tensors(engine):
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors(engine: Any) -> Iterator[Tensor]:
    for part in engine.parts:
        for parameter in part.parameters():
            yield getattr(parameter, "ds_tensor", parameter).flatten()
    optimizer = engine.engine.optimizer if hasattr(engine, "engine") else engine.optimizer
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(member, "optimizer", member)
        for parameter, state in inner.state.items():
            yield parameter.flatten()
            for name in sorted(state):
                if isinstance(state[name], Tensor):
                    yield state[name].flatten()


def run_job(job: Job, output: Path) -> None:
    config = load_config(job["config"], [f"{key}={value}" for key, value in job["set"].items()])
    made: list[Faulty] = []
    build_engine = open_run.build_engine

    def build_faulty(*args: Any, **options: Any) -> Any:
        engine = build_engine(*args, **options)
        made.append(Faulty(engine, sys.modules[type(engine).__module__], job["fault"]))
        return engine

    open_run.build_engine = build_faulty
    result: dict[str, Any] = {"error": None}
    try:
        inputs = prepare_run(config, job["processes"], job.get("resume", "auto"))
        prepare_megatron()
        rank = torch.distributed.get_rank()
        with shown_logs(), StopSignals() as stop_signals, EventLog(config, rank) as events:
            result["finished"] = train_joined(inputs, stop_signals, events)
    except ChameleonError as error:
        result["error"] = str(error)
    if torch.distributed.get_rank() == 0:
        result["prints"] = made[0].prints if made else []
        (output / f"{job['name']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run_forked(run_job)
