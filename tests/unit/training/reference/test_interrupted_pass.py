"""A pass over the reference's pairs that is stopped, killed or interrupted by a full disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_chameleon.errors import ChameleonError, TrainingError
from megatron_chameleon.training.reference.measure import Pass, StoppedMeasuring
from megatron_chameleon.training.reference.tables import (
    PARTIAL_FILE,
    read_partial,
    read_tables,
    write_partial,
    write_tables,
)

FILES = {"a": "digest-a", "b": "digest-b"}
DOCUMENTS = {"a": 4, "b": 2}
SOURCES: Any = [
    SimpleNamespace(corpus=SimpleNamespace(prefix=prefix, documents=count))
    for prefix, count in DOCUMENTS.items()
]
TOPOLOGY: Any = SimpleNamespace(
    data_rank=0, data_size=1, pipeline_rank=0, pipeline_size=1, tensor_rank=0
)
TABLES = {"a": np.arange(8.0).reshape(4, 2), "b": np.arange(4.0).reshape(2, 2) + 0.5}


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Reader:
    """Three chunks: two of the file ``a``, and one of ``b``."""

    @contextmanager
    def read_ahead(self, *_: int) -> Iterator[Iterator[list[tuple[int, Any]]]]:
        chunks = ((0, [2, 0]), (0, [1, 3]), (1, [1, 0]))
        yield iter([[(number, batch_of(documents))] for number, documents in chunks])


def batch_of(documents: list[int]) -> Any:
    return SimpleNamespace(pairs=SimpleNamespace(documents=np.array(documents), count=2))


class Engine:
    """Gives each pair what ``TABLES`` has for it, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def evaluate(self, batches: list[Any], measurement: Any) -> torch.Tensor:
        documents = batches[0].pairs.documents.tolist()
        table = TABLES["b" if documents == [1, 0] else "a"]
        self.asked.append(documents)
        return torch.from_numpy(table[documents].reshape(1, -1))


def compute(folder: Path, stops_before: int = 99) -> tuple[dict[str, np.ndarray], Engine]:
    calls = iter(range(99))

    def stop(failure: ChameleonError | None) -> str | None:
        assert failure is None
        return "SIGTERM" if next(calls) == stops_before else None

    engine: Any = Engine()
    reader: Any = Reader()
    return Pass(SOURCES, TOPOLOGY, folder, FILES, "start").compute(reader, engine, stop), engine


def test_a_stopped_pass_goes_on_where_it_was(tmp_path: Path, one_process: None) -> None:
    folder = tmp_path / "reference"
    with pytest.raises(StoppedMeasuring) as stopped:
        compute(folder, stops_before=1)
    assert str(stopped.value) == (
        "SIGTERM: stopped before the first step, with the reference log-probabilities of 2 of 6 "
        f"pairs; they are kept in {folder}, and the same command goes on with the others"
    )
    found, engine = compute(folder)
    assert engine.asked == [[1, 3], [1, 0]]
    for prefix, table in TABLES.items():
        assert (found[prefix] == table).all()


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, one_process: None) -> None:
    folder = tmp_path / "reference"
    folder.mkdir()
    (folder / PARTIAL_FILE).mkdir()  # root may write everywhere, but not over a folder
    with pytest.raises(TrainingError, match=r"reference/partial\.npz: cannot be written"):
        compute(folder)


@pytest.mark.parametrize("damage", ["", "cut", "text", "shape", "start", "tokens"])
def test_a_partial_file_counts_only_if_it_is_of_this_work(tmp_path: Path, damage: str) -> None:
    known = {"a": TABLES["a"], "b": np.full((2, 2), np.nan)}
    write_partial(tmp_path, known, FILES, "other" if damage == "start" else "start")
    file = tmp_path / PARTIAL_FILE
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    if damage == "text":
        file.write_text("not a file of numpy")
    documents = {"a": 5, "b": 2} if damage == "shape" else DOCUMENTS
    files = {"a": "another digest", "b": "digest-b"} if damage == "tokens" else FILES
    found = read_partial(tmp_path, documents, files, "start")
    assert {prefix: len(table) for prefix, table in found.items()} == documents
    assert np.isnan(found["b"]).all()
    assert np.isnan(found["a"]).all() if damage else (found["a"] == TABLES["a"]).all()


def test_whole_tables_are_found_where_the_token_files_were_moved(tmp_path: Path) -> None:
    write_partial(tmp_path, TABLES, FILES, "start")
    digest = write_tables(tmp_path, TABLES, FILES, "start")
    assert not (tmp_path / PARTIAL_FILE).exists()
    moved = {f"elsewhere/{prefix}": tokens for prefix, tokens in FILES.items()}
    found = read_tables(tmp_path, moved)
    assert found is not None and found[1:] == (digest, "start")
    assert (found[0]["elsewhere/b"] == TABLES["b"]).all()
    assert read_tables(tmp_path, {**moved, "new": "another digest"}) is None
