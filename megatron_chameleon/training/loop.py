"""The training loop, from a config to a trained checkpoint.

Try it: ``torchrun --nproc-per-node 2 -m megatron_chameleon train examples/digits/train.yaml``
"""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_chameleon.checkpoint.state.resume import (
    changed_settings,
    check_fits,
    find_resume,
    find_sound,
    load,
)
from megatron_chameleon.checkpoint.state.save import Saver
from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.checks.layouts import check_vocabulary
from megatron_chameleon.config.load import format_config
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import BatchReader, read_ahead
from megatron_chameleon.data.mixture.mixture_history import stage1_steps
from megatron_chameleon.model.backend import check_machine, machine_problems
from megatron_chameleon.model.fusions import fusion_names
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import Topology, create_topology
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.training.engines.base import TrainingEngine, build_engine, check_installed
from megatron_chameleon.training.faults.hang import HangWatch
from megatron_chameleon.training.faults.nonfinite import NonFiniteGuard, Rollback
from megatron_chameleon.training.faults.signals import Interruption
from megatron_chameleon.training.faults.weights import check_loaded_weights
from megatron_chameleon.training.run.folder import check_run_folder, checkpoints_folder
from megatron_chameleon.training.run.lock import lock_run
from megatron_chameleon.training.run.open_data import open_reader
from megatron_chameleon.training.run.reporter import Reporter
from megatron_chameleon.training.run.skipped_steps import SkippedSteps, open_skips
from megatron_chameleon.training.run.trackers import check_trackers
from megatron_chameleon.training.samples.sampler import Sampler, check_samples


@dataclass(frozen=True)
class Job:
    """A config whose every part was found to be there and to fit."""

    config: Config
    tokenizer: Tokenizer
    reader: BatchReader
    resume_from: Path | None
    skips: SkippedSteps
    resume: str
    """auto, never or a path, as it was asked for."""

    def checkpoint_extra(self, step: int) -> dict[str, object]:
        """What a checkpoint says of the tokenizer, so that it is never used with another one, and
        of the data that was read in ``step`` updates."""
        return {
            "vocab_size": self.tokenizer.vocabulary.size,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            **self.consumed(step),
            "data": self.reader.state(),
            "skipped_steps": self.skips.to_save(),
        }

    def back_at(self, step: int) -> "Job":
        """The job after ``step`` steps; the old reader may still be reading ahead."""
        self.skips.rewind(step)
        reader = BatchReader(self.config, self.tokenizer, self.reader.state(), step)
        return replace(self, reader=reader)

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
    checkpoint = find_resume(checkpoints_folder(config), resume)
    if checkpoint is not None:
        check_fits(checkpoint, config, tokenizer.fingerprint)
    reader = open_reader(config, tokenizer, checkpoint)
    return Job(config, tokenizer, reader, checkpoint, open_skips(config, checkpoint), resume)


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
        prepare_megatron()
        join_process_group(launch)
        try:
            with lock_run(Path(job.config.logging.run_dir)):
                return train_joined(_as_it_is_now(job, launch), interruption)
        finally:
            leave_process_group()


def _as_it_is_now(job: Job, launch: Launch) -> Job:
    """The job, prepared again if a run that was just ending has saved since, or if the files of the
    newest checkpoint are damaged."""
    folder = checkpoints_folder(job.config)
    checkpoint = find_resume(folder, job.resume)
    if checkpoint is not None:
        checkpoint = find_sound(folder, checkpoint, job.resume)
    if checkpoint == job.resume_from:
        return job
    return prepare(job.config, launch.world_size, str(checkpoint or job.resume))


def train_joined(job: Job, interruption: Interruption) -> bool:
    """``train`` in a process that has joined its job and stays in it."""
    config = job.config
    topology = create_topology(config.parallel)
    with HangWatch(config, topology.rank, topology.world_size) as watch:
        watch.begin("building the model", 0, is_long=True)
        engine = build_engine(config, job.tokenizer.vocabulary.size, topology)
        watch.clock = engine.clock
        step = _load(job.resume_from, engine, watch) if job.resume_from else 0
        changes = changed_settings(job.resume_from, config)
        while True:
            reporter = Reporter(config, job.tokenizer.vocabulary.size, topology, step)
            try:
                reporter.say(f"{topology}; {describe(job)}; starts at step {step}")
                if fused := fusion_names(config):
                    reporter.say(f"fused kernels: {', '.join(fused)}")
                if changes:
                    reporter.say(f"changed since {job.resume_from}: {changes}")
                    changes = ""  # a rollback changes nothing
                return _run_steps(job, engine, topology, reporter, interruption, watch, step)
            except Rollback as rollback:
                reporter.say(str(rollback))
                step = _load(rollback.checkpoint, engine, watch)
                job = job.back_at(step)
            finally:
                reporter.close()


def _run_steps(
    job: Job,
    engine: TrainingEngine,
    topology: Topology,
    reporter: Reporter,
    interruption: Interruption,
    watch: HangWatch,
    steps_done: int,
) -> bool:
    """From ``steps_done`` steps to the config's last step, unless interrupted."""
    config = job.config
    sampler = Sampler(config, topology)
    with (
        read_ahead(job.reader, steps_done, topology.data_rank, topology.data_size) as batches,
        Saver(checkpoints_folder(config), engine, reporter.say) as saver,
    ):
        guard = NonFiniteGuard(
            config, job.tokenizer, job.reader, topology, job.skips, job.resume_from, saver.wait
        )
        for step, micro_batches in watch.steps(batches, steps_done):
            reporter.begin_step(step)
            update = not job.skips.is_due(step)
            metrics = engine.train_step(step, micro_batches, update=update)
            metrics = reporter.complete({**metrics, **job.consumed(step)}, engine.clock)
            saves = _is_save_step(config, step)
            if words := guard.check(step, metrics, engine, micro_batches, saves=saves):
                reporter.say(words)
            reporter.end_step(step, metrics)
            saver.poll()
            stop = interruption.agreed()
            if (stop or saves) and job.skips.count_updates(step):  # else there are no moments yet
                watch.begin("saving", step, is_long=True)
                saver.save(step, job.checkpoint_extra(step))
            if stop and step < config.training.steps:
                saver.wait()
                reporter.say(f"{stop}: stopped after step {step}; the same command goes on")
                return False
            if sampler.is_due(step):
                watch.begin("sampling", step, is_long=True)
                if words := sampler.sample(step, engine.named_parameters()):
                    reporter.say(words)
    return True


def _load(checkpoint: Path, engine: TrainingEngine, watch: HangWatch) -> int:
    """Fill the engine; the steps that the checkpoint has behind it."""
    watch.begin("loading", 0, is_long=True)
    step = load(checkpoint, engine)
    check_loaded_weights(engine.named_parameters(), checkpoint)
    return step


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
