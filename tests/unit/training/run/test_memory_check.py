"""A run that cannot fit is refused with the numbers, before anything is allocated."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chameleon import machine
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import PRESETS
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.machine import machine_memory, too_large
from megatron_chameleon.parallel import platform
from megatron_chameleon.training.run import memory_check
from megatron_chameleon.training.run.memory_check import batch_bytes, memory_problem

GIB = 1 << 30


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "machine_memory", lambda: 24 * GIB)
    monkeypatch.setattr(platform, "gpu_memory_bytes", lambda: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def problem(config: Config, world_size: int = 1) -> str:
    return str(memory_problem(config, 65_536, world_size) or "")


def preset(*overrides: str) -> Config:
    return load_config(PRESETS / "chameleon_7b.yaml", overrides)


def test_the_7b_does_not_fit_and_a_tiny_model_does() -> None:
    line = problem(preset())
    assert line.startswith("model.hidden_size: needs about 1")
    assert line.endswith(
        " GiB of memory, and this machine has 24.0 GiB. Use a smaller model, or split it over more "
        "processes."
    )
    assert problem(Config()) == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 2**20}, "model.hidden_size: needs about 258.1 TiB of memory"),
        ({"seq_length": 2**24}, "model.seq_length: needs about "),
        ({"micro_batch_size": 2**16}, "model.seq_length: needs about "),
    ],
)
def test_what_is_too_large_is_named(values: dict[str, Any], message: str) -> None:
    config = Config()
    for key, value in values.items():
        section = config.model if hasattr(config.model, key) else config.training
        setattr(section, key, value)
    if "micro_batch_size" in values:
        config.training.global_batch_size = 2**16
    assert problem(config).startswith(message)


def test_processes_of_this_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.model.hidden_size, config.model.ffn_hidden_size = 4096, 8192
    config.training.global_batch_size = 8
    assert problem(config, 8) == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "this machine has 24.0 GiB" in problem(config, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9" * 30)
    assert problem(config, 8) == ""


def test_a_gpu_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "gpu_memory_bytes", lambda: 40 * GIB)
    assert "a GPU of this machine has 40.0 GiB" in problem(preset())
    monkeypatch.setattr(platform, "gpu_memory_bytes", lambda: 200 * GIB)
    assert problem(preset()) == ""


def test_a_step_of_many_sequences_does_not_fit_into_main_memory() -> None:
    config = Config()
    config.model.seq_length, config.training.global_batch_size = 4096, 2**20
    line = problem(config)
    assert line.startswith("training.global_batch_size: needs about 232.0 GiB of memory, and this")
    assert problem(config, 64) == ""
    config.data.reset_attention = True
    assert problem(config) == line  # the lengths of documents take hardly any memory


def test_the_bytes_of_a_batch_are_those_of_a_real_one() -> None:
    rows = torch.zeros(2, 8, dtype=torch.int64)
    batch = Batch(rows, rows, rows.float(), rows.bool(), rows)
    size = sum(t.nbytes for t in vars(batch).values() if isinstance(t, torch.Tensor))
    config = Config()
    config.model.seq_length, config.training.global_batch_size = 8, 2
    assert batch_bytes(config, 1) == 2 * size


def test_deepspeed_splits_more_so_only_its_weights_count() -> None:
    config = preset("engine.name=deepspeed", "engine.zero_stage=3", "training.dtype=bf16")
    assert problem(config) == ""
    config.model.hidden_size, config.model.ffn_hidden_size = 2**16, 2**18
    assert "GiB" in problem(config) or "TiB" in problem(config)


def test_only_what_surely_does_not_fit_is_refused() -> None:
    assert too_large("key", 1.2 * GIB, GIB, "Change it") is None
    error = too_large("key", 1.3 * GIB, GIB, "Change it")
    assert str(error) == (
        "key: needs about 1.3 GiB of memory, and this machine has 1.0 GiB. Change it."
    )


def test_the_limits_of_a_container_and_of_a_shell_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = machine_memory()
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{GIB}\n")
    limits = (tmp_path / "max", tmp_path / "gone")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", limits)
    assert machine_memory() >= min(whole, GIB)
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (*limits, tmp_path / "limit"))
    assert machine_memory() == GIB
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GIB // 2, GIB))
    assert machine_memory() == GIB // 2
