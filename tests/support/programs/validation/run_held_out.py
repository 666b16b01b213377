"""Train a small model under several layouts, with and without measuring a held-out loss.

Usage: ``python run_held_out.py JOBS.json OUTPUT_DIR``. A job is {"name", "processes", "tokenizer",
"prefixes", "measures", "set": {"section.key": value}}. For each job it writes NAME.json: the
metrics of two steps, the metrics of the measurement after each of them and of one more in the end
("again"), and hashes of the weights that rank 0 has, when it saves them ("saved") and in the end.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from forked_jobs import run_forked
from megatron_chameleon.config.schema import ValidationSourceConfig
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.training.engines.base import TrainingEngine, build_engine
from megatron_chameleon.training.validation.measure import measure
from run_layouts import make_config, micro_batches

STEPS = 2
TIMES = ("step_seconds",)


def hash_weights(engine: TrainingEngine) -> str:
    found = hashlib.sha256()
    for _, tensor in engine.named_parameters():
        found.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def run_job(job: dict[str, Any], output: Path) -> None:
    config = make_config(job["set"])
    config.data.validation.sources = [ValidationSourceConfig(path) for path in job["prefixes"]]
    tokenizer = load_tokenizer(job["tokenizer"], images=False)
    topology = create_topology(config.parallel)
    engine = build_engine(config, tokenizer.vocabulary.size, topology)
    reader = HeldOutReader(config, tokenizer)

    def losses() -> dict[str, Any]:
        found = measure(engine.evaluate, reader, topology, lambda failure: True)
        assert found is not None
        return {**found.metrics(), "tokens": [source.tokens for source in found.sources.values()]}

    steps, measured = [], []
    for step in range(1, STEPS + 1):
        batches = micro_batches(config, step, topology.data_rank, topology.data_size)
        metrics = engine.train_step(step, batches)
        steps.append({key: value for key, value in metrics.items() if key not in TIMES})
        if job["measures"]:
            measured.append(losses())
    engine.snapshot()
    saved = hash_weights(engine)
    again = losses()
    if topology.rank == 0:
        found = {"steps": steps, "measured": measured, "again": again}
        found |= {"saved": saved, "weights": hash_weights(engine)}
        (output / f"{job['name']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_forked(run_job)
