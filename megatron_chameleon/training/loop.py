"""The training loop, from a config to a trained checkpoint.

Try it: ``torchrun --nproc-per-node 2 -m megatron_chameleon train examples/digits/train.yaml``
"""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_chameleon.checkpoint import store
from megatron_chameleon.config.check import check_config
from megatron_chameleon.config.layouts import check_vocabulary
from megatron_chameleon.config.load import format_config
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches import BatchReader, read_ahead
from megatron_chameleon.data.history import stage1_steps
from megatron_chameleon.errors import TrainingError
from megatron_chameleon.model.backend import check_machine, machine_problems
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.launch import Launch, join, leave
from megatron_chameleon.parallel.topology import Topology, create_topology
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.training.engine import TrainingEngine, build_engine, check_installed
from megatron_chameleon.training.failure import check_loaded_weights, name_broken_weights
from megatron_chameleon.training.interruption import Interruption
from megatron_chameleon.training.reading import open_reader
from megatron_chameleon.training.reporting import Reporter
from megatron_chameleon.training.run_folder import check_run_folder, checkpoints_folder
from megatron_chameleon.training.run_lock import lock_run
from megatron_chameleon.training.samples import Sampler, check_samples
from megatron_chameleon.training.trackers import check_trackers


@dataclass(frozen=True)
class Job:
    """A config whose every part was found to be there and to fit."""

    config: Config
    tokenizer: Tokenizer
    reader: BatchReader
    resume_from: Path | None
    resume: str = "auto"

    def checkpoint_extra(self, step: int) -> dict[str, object]:
        """What a checkpoint says of the tokenizer, so that it is never used with another one, and
        of the data that was read in ``step`` updates."""
        return {
            "vocab_size": self.tokenizer.vocabulary.size,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            **self.consumed(step),
            "data": self.reader.state(),
        }

    def consumed(self, step: int) -> dict[str, int]:
        """How much the run has read in ``step`` updates."""
        samples = self.reader.history.first_sample(step)
        tokens = samples * self.config.model.seq_length
        return {"step": step, "consumed_samples": samples, "consumed_tokens": tokens}


def prepare(config: Config, world_size: int, resume: str) -> Job:
    """Check the config, the tokenizer, the data and the checkpoint before anything is started.

    Args:
        config: As loaded.
        world_size: Processes of the job.
        resume: ``auto``, ``never`` or the path of a checkpoint.

    Raises:
        ChameleonError: Whatever is missing or does not fit.
    """
    check_config(config, world_size)
    check_installed(config)
    check_trackers(config)
    check_run_folder(Path(config.logging.run_dir))
    tokenizer = load_tokenizer(config.tokenizer.path, images=False)
    for problem in check_vocabulary(tokenizer.vocabulary.size, config):
        raise problem
    check_samples(config)
    checkpoint = store.find_resume(checkpoints_folder(config), resume)
    if checkpoint is not None:
        store.check_fits(checkpoint, config, tokenizer.fingerprint)
    reader = open_reader(config, tokenizer, checkpoint)
    return Job(config, tokenizer, reader, checkpoint, resume)


def train(job: Job, launch: Launch) -> bool:
    """Train to the last step of the config; every process of the job calls it.

    Returns:
        Whether the last step is done; False if a signal asked to save and stop before.

    Raises:
        ConfigErrors: The machine lacks what the config needs.
        ConfigError: Another run is writing the run folder.
    """
    check_machine(job.config)
    with Interruption() as interruption:
        platform.prepare()
        join(launch)
        try:
            with lock_run(Path(job.config.logging.run_dir)):
                return train_joined(_as_it_is_now(job, launch), interruption)
        finally:
            leave()


def _as_it_is_now(job: Job, launch: Launch) -> Job:
    """The job, prepared again if a run that was just ending has saved since."""
    if store.find_resume(checkpoints_folder(job.config), job.resume) == job.resume_from:
        return job
    return prepare(job.config, launch.world_size, job.resume)


def train_joined(job: Job, interruption: Interruption) -> bool:
    """``train`` in a process that has joined its job and stays in it."""
    config = job.config
    topology = create_topology(config.parallel)
    engine = build_engine(config, job.tokenizer.vocabulary.size, topology)
    step = store.load(job.resume_from, engine) if job.resume_from else 0
    if job.resume_from:
        check_loaded_weights(engine.named_parameters(), job.resume_from)
    reporter = Reporter(config, job.tokenizer.vocabulary.size, topology, step)
    try:
        reporter.say(f"{topology}; {describe(job)}; starts at step {step}")
        return _run_steps(job, engine, topology, reporter, interruption, step)
    finally:
        reporter.close()


def _run_steps(
    job: Job,
    engine: TrainingEngine,
    topology: Topology,
    reporter: Reporter,
    interruption: Interruption,
    step: int,
) -> bool:
    """From ``step`` updates done to the config's last step, unless interrupted."""
    config = job.config
    sampler = Sampler(config, topology)
    with read_ahead(job.reader, step, topology.data_rank, topology.data_size) as batches:
        for micro_batches in batches:
            reporter.begin_step(step + 1)
            metrics = engine.train_step(step, micro_batches)
            step += 1
            metrics = reporter.complete({**metrics, **job.consumed(step)})
            _check_finite(step, metrics, engine, saves=_is_save_step(config, step))
            reporter.end_step(step, metrics)
            stop = interruption.agreed()
            if stop or _is_save_step(config, step):
                extra = job.checkpoint_extra(step)
                reporter.say(f"saved {store.save(checkpoints_folder(config), step, engine, extra)}")
            if stop and step < config.training.steps:
                reporter.say(f"{stop}: stopped after step {step}; the same command goes on")
                return False
            if sampler.is_due(step) and (words := sampler.sample(step, engine.named_parameters())):
                reporter.say(words)
    return True


def describe(job: Job) -> str:
    """Parameters, tokens a step and steps a stage, in a line."""
    config = job.config
    parameters = count_parameters(config.model, job.tokenizer.vocabulary.size)
    tokens = config.training.global_batch_size * config.model.seq_length
    stage2 = config.training.steps - stage1_steps(config)
    stages = f", of which stage 2 has {stage2:,}" if config.data.stage2 else " in one stage"
    return (
        f"{parameters:,} parameters; {tokens:,} tokens a step; {config.training.steps:,} steps"
        f"{stages}"
    )


def dry_run_text(job: Job, launch: Launch) -> str:
    """What ``--dry-run`` prints: the resolved config and what the run would do."""
    start = f"resumes from {job.resume_from}" if job.resume_from else "starts from step 0"
    text = f"{format_config(job.config)}\n{describe(job)}; {start}; {launch.launcher}: all is there"
    for problem in machine_problems(job.config):  # maybe a login node: no mistake in the config
        text += f"\nbut not on this machine: {problem.where}: {problem.what}"
    return text


def _is_save_step(config: Config, step: int) -> bool:
    every = config.checkpoint.every_steps
    return step == config.training.steps or (every > 0 and step % every == 0)


def _check_finite(step: int, metrics: dict, engine: TrainingEngine, *, saves: bool) -> None:
    """All ranks find the same, so all of them stop here together, before the step is saved."""
    values = {name: metrics[name] for name in ("loss", "grad_norm")}
    bad = [name for name, value in values.items() if value is None or not math.isfinite(value)]
    problems = [f"{name} is {values[name]}" for name in bad[:1]]
    # after an update with a bad gradient every weight is broken, and there is nothing to find
    if "loss" in bad or (saves and not bad):
        broken = name_broken_weights(engine.named_parameters())
        problems += [f"not finite: {broken}"] if broken else []
    if problems:
        raise TrainingError(
            f"step {step}",
            ", ".join(problems),
            "Resume from the last checkpoint with a lower optimizer.lr, and look at "
            "output_norm and max_logit in metrics.jsonl before this step",
        )
