"""slurm/serve.sbatch serves a model, says how to reach it, and drains when it is told to."""

import json
import re
import stat
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from places import REPOSITORY
from slurm_cluster import Cluster
from tiny_model import (
    PADDED_VOCAB_SIZE,
    model_config,
    random_tensors,
    write_checkpoint,
    write_tokenizer,
)

SMALL = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=2000")
SECONDS = 240
QUESTION = {"messages": [{"role": "user", "content": "a handwritten"}], "temperature": 0}


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def ask(url: str, key: str | None, body: dict[str, object] | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    return urllib.request.urlopen(request, timeout=60)


def test_a_job_serves_with_a_key_of_its_own_and_drains(
    slurm: Cluster, venv: str, tmp_path: Path
) -> None:
    tensors = random_tensors(model_config(), PADDED_VOCAB_SIZE)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    model = write_checkpoint(tmp_path / "model", model_config(), tensors, tokenizer)
    log = tmp_path / "serve.log"
    variables = {"VENV": venv, "LOGS": str(tmp_path / "logs")}
    words = (*SMALL, f"--output={log}", "slurm/serve.sbatch", model, "--device", "cpu")
    job = slurm.submit(REPOSITORY, *words, **variables)
    slurm.wait_for(lambda: re.search("^page: |ended with", read(log), re.M), SECONDS)
    assert "\npage: " in read(log), read(log)

    said = re.search(r"^address: (http://(node\d):(\d+)/)  \(key: (\S+)\)$", log.read_text(), re.M)
    assert said, log.read_text()
    _, node, port, key_file = said.groups()
    assert f"tunnel:  ssh -N -L 8000:{node}:{port} " in log.read_text()
    assert stat.S_IMODE(Path(key_file).stat().st_mode) == 0o600
    url, key = f"http://127.0.0.1:{port}", Path(key_file).read_text()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(f"{url}/v1/models", None)
    whole = json.load(ask(f"{url}/v1/chat/completions", key, {**QUESTION, "max_tokens": 20}))

    stream = ask(f"{url}/v1/chat/completions", key, {**QUESTION, "max_tokens": 20, "stream": True})
    slurm.run("scancel", "--signal=TERM", job)  # --signal=TERM@120 does this before the time limit
    lines = stream.read().decode().split("\n")
    assert "data: [DONE]" in lines
    chunks = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
    texts = (chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert "".join(texts) == whole["choices"][0]["message"]["content"]

    assert slurm.wait_until_ended(job, SECONDS) == "COMPLETED", log.read_text()
    assert "ended with exit code 0" in log.read_text()
    assert not Path(key_file).exists()


def test_a_mistake_ends_the_job_and_leaves_no_key(
    slurm: Cluster, venv: str, tmp_path: Path
) -> None:
    log = tmp_path / "serve.log"
    variables = {"VENV": venv, "LOGS": str(tmp_path / "logs")}
    words = (
        *SMALL,
        f"--output={log}",
        "slurm/serve.sbatch",
        tmp_path / "nothing",
        "--device",
        "cpu",
    )
    job = slurm.submit(REPOSITORY, *words, "--device", "cpu", **variables)
    assert slurm.wait_until_ended(job, SECONDS) == "FAILED"
    text = log.read_text()
    assert "error: " in text and "ended with exit code 2" in text
    assert not list((tmp_path / "logs").glob("*.key"))
