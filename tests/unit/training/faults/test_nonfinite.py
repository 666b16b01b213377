"""How the guard judges the values of a step, on one process and without a model's passes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_chameleon.checkpoint.state.folders import STATE_FORMAT, step_of
from megatron_chameleon.checkpoint.state.integrity import write_sums
from megatron_chameleon.config.load import save_config
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import TrainingError
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.faults import nonfinite_origin
from megatron_chameleon.training.faults.nonfinite import (
    NonFiniteGuard,
    Rollback,
    list_rollback_checkpoints,
)
from megatron_chameleon.training.faults.nonfinite_origin import RankFindings, describe_findings
from megatron_chameleon.training.run import inputs as inputs_module
from megatron_chameleon.training.run.inputs import RunInputs
from megatron_chameleon.training.run.skipped_steps import SkippedSteps


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class StubReader:
    """Stands in for the data: sample i is document i."""

    references = None

    def __init__(self, *_: Any) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def indices_for(self, step: int, rank: int, size: int) -> list[list[int]]:
        return [[8 * step - 8, 8 * step - 7], [8 * step - 6, 8 * step - 5]]

    def sample(self, index: int) -> Any:
        tensor = torch.tensor
        parts = SimpleNamespace(document=tensor([index]), start=tensor([0]), stop=tensor([9]))
        return SimpleNamespace(
            packed=SimpleNamespace(parts=parts, source=tensor([0])), source_names=["web"]
        )


def check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weight: float = 0.0, **options: Any
) -> str:
    """``NonFiniteGuard.check`` at step 3; options: values, saves, policy, found and told."""
    monkeypatch.setattr(inputs_module, "BatchReader", StubReader)
    config = Config()
    config.logging.run_dir = str(folder)
    config.training.nonfinite = options.get("policy", "stop")
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    monkeypatch.setattr(nonfinite_origin, "named_global_parameters", nn.Module.named_parameters)
    engine = SimpleNamespace(
        parts=[model],
        named_parameters=model.named_parameters,
        monitor=SimpleNamespace(last_losses=[torch.tensor(1.0), torch.tensor(torch.nan)]),
        repeat_pass=lambda step, batches: model(torch.ones(1, 1)).sum().backward(),
    )
    values = {"loss": 1.0, "grad_norm": 1.0, "layer_output_norms": [1.0, math.nan]}
    skipped = SkippedSteps(frozenset(options.get("told", ())), set(options.get("found", ())))
    inputs = RunInputs(config, None, StubReader(), None, skipped, "auto")  # type: ignore
    lines: list[str] = []
    events: list[tuple[str, str, int]] = []
    topology = Topology(1, 0, 0, 1, 0, 1, 0, 1)
    guard = NonFiniteGuard(
        inputs,
        engine,  # type: ignore
        topology,
        finish_saves=lambda: None,
        say=lines.append,
        warn=lambda text: lines.append(f"warning: {text}"),
        record=lambda event, text, step: events.append((event, text, step)),
    )
    metrics = {**values, **options.get("values", {})}
    guard.check(3, metrics, [], before_save=options.get("saves", False))
    if options.get("stops"):
        guard.check_weights(3)
    assert skipped.done == ({3} if metrics.get("skipped") else set())
    assert len(lines) <= 1
    told = [("skip", line.removeprefix("warning: "), 3) for line in lines]
    assert events == told
    return "".join(lines)


BAD = {"loss": math.nan, "skipped": True}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ""),
        ({"values": {"loss": None, "grad_norm": 0.0}}, ""),  # no label counts
        ({"weight": math.nan}, ""),  # weights are checked only before a save
        (
            {"values": BAD, "told": [3]},
            "step 3: its update was left out, because training.skip_steps lists it",
        ),
        (
            {"values": BAD, "found": [3]},
            "step 3: its update was left out, because it was not finite before",
        ),
        (
            {"values": BAD, "policy": "skip", "found": [1]},
            "warning: step 3: loss is nan (first in the output of decoder.layers.1), loss not "
            "finite on rank 0, samples 18, 19 (documents in FOLDER/nonfinite.jsonl); its update "
            "was left out (2 of at most 3)",
        ),
    ],
)
def test_a_run_continues(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check(tmp_path, monkeypatch, **options).replace(str(tmp_path), "FOLDER")
    assert found.startswith(words)
    assert bool(found) == bool(words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"saves": True, "weight": math.nan}, "step 3: weights not finite: weight on rank 0. Res"),
        ({"stops": True, "weight": math.nan}, "step 3: weights not finite: weight on rank 0. Res"),
        ({"values": BAD}, "step 3: loss is nan (first in the output of decoder.layers.1)"),
        ({"values": {**BAD, "loss": math.inf}}, "step 3: loss is inf (first"),
        ({"values": {**BAD, "loss": 1.0, "grad_norm": math.nan}}, "step 3: grad_norm is nan "),
        (
            {"values": BAD, "policy": "skip", "weight": math.nan},
            "cannot repair the weights. Run the same",
        ),
        ({"values": BAD, "policy": "rollback"}, "no checkpoint to go back to. Start again with"),
        ({"values": BAD, "policy": "skip", "found": [1, 2, 9]}, "3 steps were left out before (1"),
    ],
)
def test_a_run_stops(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError) as caught:
        check(tmp_path, monkeypatch, **options)
    assert words in str(caught.value)


def test_the_file_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, monkeypatch, values=BAD, policy="skip")
    record = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    assert (record["step"], record["problem"], record["action"]) == (3, "loss is nan", "skip")
    assert record["first_bad_layer"] == "decoder.layers.1"
    assert [rank["losses"] for rank in record["ranks"]] == [[1]]
    documents = [{"source": "web", "document": 18, "tokens": [0, 9]}]
    assert record["samples"][0] == {"sample": 18, "documents": documents}


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nonfinite.jsonl").mkdir()
    words = check(tmp_path, monkeypatch, values=BAD, policy="skip")
    assert "nonfinite.jsonl cannot be written (Is a directory)" in words
    assert words.endswith("; its update was left out (1 of at most 3)")


def test_a_fault_that_does_not_appear_again() -> None:
    findings = [RankFindings(rank, 0, "node1", [], [], {}) for rank in range(2)]
    samples = [{"sample": index} for index in range(8)]
    words = describe_findings("grad_norm is nan", None, findings, samples, "documents in file")
    assert words == (
        "grad_norm is nan, not found again when the pass was repeated: suspect a machine, "
        "samples 0, 1, 2, 3 and 4 more (documents in file)"
    )


def test_the_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    config = Config()
    config.logging.run_dir = str(tmp_path)
    for step in (10, 20, 30, 40):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        state = {"format": STATE_FORMAT, "step": step, "vocab_size": 1}
        (folder / "state.json").write_text(json.dumps(state))
    converted = tmp_path / "weights"
    converted.mkdir()
    (converted / "state.json").write_text(json.dumps({**state, "optimizer": False}))

    def find(step: int, begun: Path | None) -> list[int]:
        inputs = RunInputs(config, None, StubReader(), begun, SkippedSteps(), "auto")  # type: ignore
        return [int(path.name[5:]) for path in list_rollback_checkpoints(step, inputs)]

    older = tmp_path / "checkpoints" / "step_00000020"
    assert find(35, None) == [30, 20, 10], "an older one is used if a newer one is damaged"
    assert find(30, None) == [20, 10], "the checkpoint of this step already contains it"
    assert find(25, older) == [20]
    assert find(35, older) == [30, 20]
    assert find(5, converted) == find(5, None) == []


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = (tmp_path / "checkpoints" / f"step_{step:08d}" for step in (1, 2))
    for folder in (older, newer):
        folder.mkdir(parents=True)
        state = {"format": STATE_FORMAT, "step": step_of(folder), "vocab_size": 1}
        (folder / "state.json").write_text(json.dumps(state))
        save_config(Config(), folder / "config.yaml")
        write_sums(folder, {})
    (newer / "config.yaml").write_text("model: {}\n")
    with pytest.raises(Rollback, match=r"goes back to .*step_00000001") as caught:
        check(tmp_path, monkeypatch, values=BAD, policy="rollback")
    assert caught.value.checkpoint == older
    assert newer.with_name("step_00000002.damaged").is_dir()
