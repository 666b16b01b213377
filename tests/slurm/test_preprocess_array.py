"""The preprocessing array: its tasks are killed, and its files equal those of an unbroken run."""

import re
from pathlib import Path

from megatron_chameleon.data.token_files.writer_state import read_writer_state
from mixed_corpus import write_corpus, write_pairs, write_tokenizer
from places import REPOSITORY
from run_command import run_chameleon
from slurm_cluster import Cluster

SHARDS = 3
DOCUMENTS = 800  # per file: one or two seconds of work for each task
SECONDS = 120


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.parent.glob(f"{output.name}.*")}


def kill_in_mid_run(slurm: Cluster, job: str, output: Path, task: int, restart: int) -> int:
    """Kill a start of the task after it has saved more; returns the number of documents saved."""
    prefix = f"{output}.shard-{task}-of-{SHARDS}"
    log = output.parent.parent / f"{job}-{task}.log"
    slurm.wait_for(lambda: log.exists() and f"restart {restart}, on" in log.read_text(), SECONDS)

    def saved() -> int:
        state = read_writer_state(prefix)
        return state.documents if state else 0

    before = saved()
    slurm.wait_for(lambda: saved() > before, SECONDS)
    slurm.kill_array_task(job, task)
    assert not Path(f"{prefix}.json").exists(), "the task had finished before it was killed"
    return saved()


def test_killed_tasks_continue_and_merge_to_the_files_of_an_unbroken_run(
    slurm: Cluster, venv: str, tmp_path: Path
) -> None:
    write_corpus(tmp_path, 1)  # for its images
    for number in range(SHARDS):
        write_pairs(tmp_path / f"web-{number}.jsonl", DOCUMENTS)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    inputs = (tmp_path / "web-*.jsonl", "--tokenizer", tokenizer, "--save-every", 0)
    output = tmp_path / "array" / "web"
    output.parent.mkdir()
    words = ("--cpus-per-task=2", "--mem=2000", f"--output={tmp_path}/%A-%a.log")
    words += ("slurm/preprocess_array.sbatch", *inputs, "--output", output)
    variables = {"VENV": venv, "LOGS": str(tmp_path / "logs"), "MAX_RESTARTS": "1"}
    job = slurm.submit(REPOSITORY, f"--array=0-{SHARDS - 1}", *words, **variables)

    # Task 1 is requeued by itself; task 2 is killed once more than MAX_RESTARTS allows.
    first = kill_in_mid_run(slurm, job, output, task=1, restart=0)
    saved = kill_in_mid_run(slurm, job, output, task=2, restart=0)
    status = run_chameleon("preprocess", "--output", output, "--status").stdout
    kill_in_mid_run(slurm, job, output, task=2, restart=1)
    run_chameleon("preprocess", *inputs, "--output", tmp_path / "whole" / "web", "--workers", 2)
    slurm.wait_until_ended(job, SECONDS)
    assert slurm.state(f"{job}_1") == "COMPLETED"
    assert slurm.state(f"{job}_2") == "FAILED"
    assert first > 0 and saved > 0
    # The others were not affected, although task 2 has the number of the whole array.
    logs = [(tmp_path / f"{job}-{task}.log").read_text() for task in range(SHARDS)]
    assert [text.count("command: srun") for text in logs] == [1, 2, 2]
    assert re.search(r"shard 2/3 +unfinished", status), status
    refused = run_chameleon("preprocess", "--output", output, "--merge", succeeds=False)
    assert (
        refused.returncode == 2
        and "web.shard-2-of-3: the token file is unfinished" in refused.stderr
    ), refused.stderr

    again = slurm.submit(REPOSITORY, "--array=2", *words, SHARDS=str(SHARDS), **variables)
    assert slurm.wait_until_ended(again, SECONDS) == "COMPLETED"
    status = run_chameleon("preprocess", "--output", output, "--status").stdout
    run_chameleon("preprocess", "--output", output, "--merge")
    assert re.search(r"all shards +3/3 done", status), status
    assert contents(output) == contents(tmp_path / "whole" / "web")
