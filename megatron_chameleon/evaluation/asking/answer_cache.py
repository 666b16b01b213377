"""Stores a model's answers as they arrive, so that a killed evaluation can be resumed.

``answers.jsonl`` has a header that names the model, then one JSON object per answer, with a key and
a value. The key is the hash of what was asked. If the last line is incomplete because a process
died while it wrote, that line is removed.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import torch

from megatron_chameleon.errors import DataError

if TYPE_CHECKING:
    from megatron_chameleon.inference.session import Session

ANSWERS_FILE = "answers.jsonl"
FORMAT = "megatron_chameleon.answers/1"


def value_digest(value: Any) -> str:
    """A hash of a JSON value: 16 hexadecimal digits, the same in every process."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def model_fingerprint(session: "Session") -> str:
    """A hash of the tokenizer and of every tensor's name, shape and first 1,024 weights."""
    digest = hashlib.sha256(session.tokenizer.fingerprint.encode())
    for name, tensor in sorted(session.model.state_dict().items()):
        head = tensor.flatten()[:1024].detach().to("cpu", torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(head.numpy().tobytes())
    return digest.hexdigest()[:16]


class AnswerCache:
    """The answers in a folder. One process at a time may use it, in a ``with`` statement.

    Args:
        folder: Where ``answers.jsonl`` lies. It is created if it does not exist.
        model: The model's fingerprint, from ``model_fingerprint``.

    Raises:
        DataError: Another evaluation uses the folder, its answers belong to another model, or a
            file cannot be read or written.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.path = folder / ANSWERS_FILE
        self._header = {"format": FORMAT, "model": model}
        self._values: dict[str, Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = self.path.open("a+", encoding="utf-8", errors="surrogatepass")
        except OSError as error:
            remedy = "Choose a folder that you can write to"
            raise DataError(str(folder), f"cannot be used ({error.strerror})", remedy) from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, values: Mapping[str, Any]) -> None:
        """Store answers. They are on disk when this returns."""
        lines = [json.dumps({"key": k, "value": v}, ensure_ascii=False) for k, v in values.items()]
        self._write(lines)
        self._values.update(values)

    def _write(self, lines: list[str]) -> None:
        try:
            self._file.write("".join(line + "\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise DataError(
                str(self.path), what, "Free some space, then run the command again"
            ) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "Wait until it ends, or choose another --output"
            raise DataError(
                str(self.path), "another evaluation is writing to it", remedy
            ) from error

    def _read(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):
            self._file.truncate(len(whole.encode("utf-8", errors="surrogatepass")))
        if not whole:
            self._write([json.dumps(self._header)])
            return
        try:
            header, *records = [json.loads(line) for line in whole.split("\n")[:-1]]
            self._values = {record["key"]: record["value"] for record in records}
            ours = header["format"] == FORMAT
        except (ValueError, KeyError, TypeError) as error:
            what = f"not a valid file of answers ({error})"
            raise DataError(
                str(self.path), what, "Remove the file, or choose another --output"
            ) from error
        if not ours or header["model"] != self._header["model"]:
            what = f"its answers are from model {header.get('model')}, not {self._header['model']}"
            raise DataError(str(self.path), what, "Choose another --output for this model")
