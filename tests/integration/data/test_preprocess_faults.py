"""Kills, MPI ranks and damaged inputs; programs in tests/support do more of each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz_inputs import fuzz
from kill_preprocess import contents, kill_and_compare
from megatron_chameleon.data.preprocess.options import PreprocessOptions
from megatron_chameleon.data.preprocess.run import preprocess
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.errors import DataError
from mixed_corpus import write_corpus, write_tokenizer
from run_command import TIMEOUT_SECONDS, environment, run_chameleon

KILLS = 4
DAMAGED_INPUTS = 160


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 40)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_killed_at_random_moments(tmp_path):
    assert kill_and_compare(tmp_path, KILLS, documents=60, seed=1) >= 1


class Killed(BaseException):
    """Stands for SIGKILL where the moment must be exact."""


@pytest.mark.parametrize("moment", range(24))
def test_killed_between_any_two_steps_of_the_end(
    tmp_path, corpus, tokenizer_folder, monkeypatch, moment
):
    """A kill before each change of a file's name or size, with an older output in place."""
    options = PreprocessOptions(save_seconds=0)
    inputs = corpus[1:2], tokenizer_folder
    preprocess(*inputs, tmp_path / "whole", options)
    preprocess(corpus[3:4], tokenizer_folder, tmp_path / "killed", options)
    steps = 0

    def counted(real):
        def step(*arguments, **keywords):
            nonlocal steps
            steps += 1
            if steps == moment + 1:
                raise Killed
            return real(*arguments, **keywords)

        return step

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    for name in ("truncate", "fdatasync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    try:
        preprocess(*inputs, tmp_path / "killed", options)
    except Killed:
        pass
    else:
        assert steps <= moment, "it was not killed"
    monkeypatch.undo()
    preprocess(*inputs, tmp_path / "killed", options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_two_writers_of_one_file(tmp_path, tokenizer_folder, corpus):
    from megatron_chameleon.tokenizer.folder import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder, images=False)
    with (
        TokenFileWriter(tmp_path / "t", tokenizer, "job"),
        pytest.raises(DataError, match=r"t: another process is writing this token file\. Wait"),
    ):
        preprocess(corpus[:1], tokenizer_folder, tmp_path / "t")


def test_ranks_of_mpi_write_shards_and_the_first_merges(tmp_path, corpus, tokenizer_folder):
    """At first one rank fails, because it cannot write its output; the same command resumes."""
    words = ("preprocess", *corpus, "--tokenizer", tokenizer_folder, "--output")
    run_chameleon(*words, tmp_path / "whole" / "t")
    output = tmp_path / "ranks" / "t"
    output.parent.mkdir()
    obstacle = Path(f"{output}.shard-1-of-2.partial")
    obstacle.write_text("")
    launcher = [Path(sys.executable).with_name("mpiexec"), "-n", "2", sys.executable]
    command = [*launcher, "-m", "megatron_chameleon", *words, output]

    def run():
        return subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env=environment(),
        )

    failed = run()
    assert failed.returncode != 0
    assert f"{obstacle}: is not a folder, and the program puts its own files there" in failed.stderr
    assert f"error: {output}: 1 of 2 ranks failed, the first is rank 1. See its" in failed.stderr
    assert "Traceback" not in failed.stderr
    obstacle.unlink()
    done = run()
    assert done.returncode == 0, done.stderr
    assert "an earlier run has written it" in done.stdout and "of 2 shards" in done.stdout
    assert not list(output.parent.glob("*.shard-*"))
    assert contents(output) == contents(tmp_path / "whole" / "t")


def test_processes_without_mpi_are_refused(tmp_path, corpus, tokenizer_folder):
    """As srun starts them without --mpi=pmi2: each process would believe that it is alone."""
    words = ("preprocess", corpus[1], "--tokenizer", tokenizer_folder, "--output", tmp_path / "t")
    variables = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    result = run_chameleon(*words, succeeds=False, **variables)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "error: srun: 2 processes, but mpi4py sees 1. Use mpiexec, or srun --mpi=pmi2. "
        "To run alone: env -u SLURM_NTASKS -u SLURM_STEP_ID chameleon "
    )


def test_damaged_inputs_are_refused_or_read():
    counts, wrong, most_mib = fuzz(DAMAGED_INPUTS, first_seed=1_000_000)
    assert wrong == [] and sum(counts.values()) == DAMAGED_INPUTS
    assert most_mib < 1024
    # the damage is real: most pictures can no longer be read
    assert counts["png", "refused"] > counts["png", "read"]
    assert counts[".idx", "refused"] and counts[".json", "refused"]
