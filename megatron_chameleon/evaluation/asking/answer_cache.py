"""Stores a model's answers as they arrive, so that a killed evaluation can be resumed.

``answers.jsonl`` has a header that names the model, then one JSON object per answer, with a key and
a value. The key is the hash of what was asked. What follows the last line break was left by a
process that died while it wrote, and is removed. A damaged line is passed over.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import torch

from megatron_chameleon.errors import DataError, first_line
from megatron_chameleon.files import make_folder, open_to_append, read_bytes, try_lock, writing
from megatron_chameleon.wording import counted

if TYPE_CHECKING:
    from megatron_chameleon.inference.session import Session

logger = logging.getLogger(__name__)

ANSWERS_FILE = "answers.jsonl"
LARGEST_FILE_BYTES = 64 << 30
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
        self.path = make_folder(folder) / ANSWERS_FILE
        self._header = {"format": FORMAT, "model": model}
        self._values: dict[str, Any] = {}
        self._file: IO[bytes] = open_to_append(self.path)
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
        """Store answers. They are on disk when this returns.

        Raises:
            DataError: The disk refuses it. The answers before these are kept.
        """
        lines = [json.dumps({"key": k, "value": v}, ensure_ascii=False) for k, v in values.items()]
        self._write(lines)
        self._values.update(values)

    def _write(self, lines: list[str]) -> None:
        rest = "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
        descriptor = self._file.fileno()
        before = os.fstat(descriptor).st_size
        with writing(self.path):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise

    def _lock(self) -> None:
        with writing(self.path):
            is_ours = try_lock(self._file.fileno())
        if not is_ours:
            remedy = "Wait until it ends, or choose another --output"
            raise DataError(str(self.path), "another evaluation is writing to it", remedy)

    def _read(self) -> None:
        content = read_bytes(self.path, limit=LARGEST_FILE_BYTES)
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # a process died while it wrote, maybe inside a character
            with writing(self.path):
                os.ftruncate(self._file.fileno(), len(whole))
        if not whole:
            self._write([json.dumps(self._header)])
            return
        header, *lines = whole.split(b"\n")[:-1]
        self._check_header(header)
        damaged = 0
        for line in lines:
            try:
                record = json.loads(line.decode("utf-8", "surrogatepass"))
                self._values[record["key"]] = record["value"]
            except (ValueError, LookupError, TypeError, RecursionError):
                damaged += 1
        if damaged:
            what = f"{counted(damaged, 'damaged line')} will be asked again"
            logger.warning("%s: %s", self.path, what)

    def _check_header(self, line: bytes) -> None:
        try:
            header = json.loads(line)
            ours, model = header["format"] == FORMAT, header.get("model")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            what = f"not a valid file of answers ({first_line(error)[:100]})"
            remedy = "Remove the file, or choose another --output"
            raise DataError(str(self.path), what, remedy) from error
        if not ours or model != self._header["model"]:
            what = f"its answers are from model {str(model)[:40]}, not {self._header['model']}"
            raise DataError(str(self.path), what, "Choose another --output for this model")
