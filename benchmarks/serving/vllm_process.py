"""vLLM with our model and rules, in a process with an interpreter of its own."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.contestants import Answers, Block
from benchmarks.serving.subjects import Subject
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE

REPOSITORY = Path(__file__).parents[2]


class VllmProcess:
    """Asks ``vllm_child.py``, which keeps its model from one question to the next.

    Args:
        python: An interpreter that has vLLM and this project's dependencies.
        subject: The model. One with random weights is written to a folder first.
        cpu_time: Whether to count CPU time, of all processes.
    """

    def __init__(self, python: Path, subject: Subject, cpu_time: bool) -> None:
        self._cpu_time, self._subject = cpu_time, subject
        self._scratch = tempfile.TemporaryDirectory()
        folder = subject.folder or Path(self._scratch.name)
        if subject.folder is None:
            subject.model.save_pretrained(folder)
            subject.vocabulary.save(folder)
            assert (folder / VOCABULARY_FILE).is_file()
        self._log = Path(self._scratch.name) / "vllm.log"
        child = [str(python), "-m", "benchmarks.serving.vllm_child"]
        self._process = subprocess.Popen(
            [*child, str(folder), str(subject.codes_per_image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            },
        )
        self._read()

    def timed(self, prompts: Sequence[Sequence[int]], block: Block) -> tuple[float, Answers]:
        """Answers at temperature 0, and the seconds that they took."""
        asked = {
            "prompts": prompts,
            "tokens": block.tokens(self._subject),
            "image": block.image,
            "cpu_time": self._cpu_time,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        found = self._read()
        return found["seconds"], found["answers"]

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._scratch.cleanup()

    def _read(self) -> Any:
        """The next line of JSON; vLLM prints others too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue
        raise SystemExit(f"vLLM has ended:\n{self._log.read_text()[-3000:]}")
