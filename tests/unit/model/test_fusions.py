"""Which fusions are chosen and which are refused; and compiled ones do not change the results."""

import dataclasses
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.model import fusions
from megatron_chameleon.model.backend import machine_problems
from megatron_chameleon.model.chameleon import transformer_config
from megatron_chameleon.model.fusions import KNOWN_TO_PAY, NAMES, select_fusions
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.training.engines.megatron import MegatronEngine

Edit = Callable[[Config], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that seems to have everything that the choice looks at."""
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(platform, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(fusions.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})


def chosen(edit: Edit = lambda config: None) -> set[str]:
    config = Config()
    edit(config)
    return {name for name, on in dataclasses.asdict(select_fusions(config)).items() if on}


def edits(**values: Any) -> Edit:
    """Sets ``section__key``."""

    def edit(config: Config) -> None:
        for key, value in values.items():
            section, name = key.split("__")
            setattr(getattr(config, section), name, value)

    return edit


def test_by_default_a_cpu_fuses_nothing() -> None:
    assert chosen() == set()
    assert machine_problems(Config()) == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("edit", "without", "also"),
    [
        (edits(), set(), set()),
        (edits(fusion__bias_dropout_fusion=False), {"bias_dropout_fusion"}, set()),
        (edits(fusion__loss_fusion=True), set(), {"loss_fusion"}),
        (
            edits(fusion__qk_norm_rope_fusion=True),
            {"apply_rope_fusion"},
            {"qk_norm_rope_fusion"},
        ),
        (edits(engine__name="deepspeed"), {"gradient_accumulation_fusion"}, set()),
        (
            edits(fp8__format="hybrid", fp8__emulate=True),
            {"gradient_accumulation_fusion"},
            set(),
        ),
        (edits(fp8__format="hybrid"), set(), set()),
        (edits(model__qk_norm_groups=0), set(), set()),
    ],
)
def test_a_gpu_fuses_what_is_known_to_pay(edit: Edit, without: set[str], also: set[str]) -> None:
    assert chosen(edit) == set(KNOWN_TO_PAY) - without | also


def test_short_names_for_people() -> None:
    config = Config()
    assert fusions.fusion_names(config) == []
    config.fusion.loss_fusion = config.fusion.bias_dropout_fusion = True
    assert fusions.fusion_names(config) == ["bias_dropout", "loss"]


def test_a_demand_that_the_machine_cannot_meet_is_refused() -> None:
    config = Config()
    for name in NAMES:
        setattr(config.fusion, name, True)
    found = [str(problem) for problem in machine_problems(config)]
    what = "true needs a GPU, and this machine has none. Set it to null to use it only where it can"
    assert len(found) == len(NAMES)
    for name, line in zip(NAMES, found, strict=True):
        assert line.startswith(f"fusion.{name}: {what} run, or to false"), line


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("lacking", "name", "message"),
    [
        ("te", "apply_rope_fusion", "needs Transformer Engine, and it cannot be imported here"),
        ("te", "gradient_accumulation_fusion", "needs Transformer Engine, and it cannot be"),
        ("triton", "loss_fusion", "needs the package triton, which is not installed"),
        ("compiler", "bias_dropout_fusion", "needs a C compiler for triton, but there is no gcc"),
        ("headers", "bias_activation_fusion", "needs Python's headers for triton, but /nowhere"),
        ("compiler", "qk_norm_rope_fusion", "needs a C compiler for triton"),
    ],
)
def test_what_a_machine_with_a_gpu_can_lack(
    monkeypatch: pytest.MonkeyPatch, lacking: str, name: str, message: str
) -> None:
    if lacking == "te":
        monkeypatch.setattr(platform, "has_transformer_engine", lambda: False)
    elif lacking == "triton":
        monkeypatch.setattr(fusions.importlib.util, "find_spec", lambda name: None)
    elif lacking == "compiler":
        monkeypatch.delenv("CC")
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})
        monkeypatch.setenv("CPATH", "/neither")
    assert name not in chosen()
    config = Config()
    setattr(config.fusion, name, True)
    (problem,) = machine_problems(config)
    assert str(problem).startswith(f"fusion.{name}: true {message}")


@pytest.mark.usefixtures("gpu")
def test_headers_in_folders_of_the_environment_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})
    monkeypatch.setenv("C_INCLUDE_PATH", f"/neither:{tmp_path}")
    assert "bias_dropout_fusion" in chosen()


def test_megatron_core_gets_the_choice() -> None:
    config = Config()
    names = ("bias_dropout_fusion", "bias_activation_fusion")
    for name in names:
        setattr(config.fusion, name, True)
    config.fusion.gradient_accumulation_fusion = True
    found = transformer_config(config)
    assert all(getattr(found, name) is True for name in names)
    assert found.apply_rope_fusion is False
    # it would affect megatron-core's own output layer, which needs apex's extension for it
    assert found.gradient_accumulation_fusion is False


def make_engine(
    topology: Topology, fused: bool, dropout: float, recompute: str | None = None
) -> MegatronEngine:
    config = Config(model=ModelConfig(2, 32, 48, 4, seq_length=16, hidden_dropout=dropout))
    config.parallel.recompute_granularity = recompute
    config.fusion.bias_dropout_fusion = config.fusion.bias_activation_fusion = fused
    config.optimizer.lr = 0.0
    return MegatronEngine(config, 96, topology)


def gradient_norms(engine: MegatronEngine, step: int) -> dict[str, float]:
    """The losses, their number of tokens, and the groups' gradient norms of a step."""
    ids = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(step))
    positions = torch.arange(16).expand(1, -1)
    batches = [
        Batch(part[:, :-1], part[:, 1:], torch.ones(1, 16), part[:, 1:] < 24, positions)
        for part in ids.split(1)
    ]
    metrics = engine.train_step(step, batches)
    return {name: x for name, x in metrics.items() if name.startswith(("loss", "grad_norm"))}


@pytest.mark.slow
def test_compiled_kernels_change_nothing_and_masks_follow_from_the_seed(
    topology: Topology,
) -> None:
    plain, fused = (make_engine(topology, on, 0.0) for on in (False, True))
    expected = gradient_norms(plain, 1)
    assert len(expected) == 4 + 7
    assert gradient_norms(fused, 1) == pytest.approx(expected, rel=1e-5)

    engine = make_engine(topology, True, 0.2)
    first, second = (gradient_norms(engine, step) for step in (1, 2))
    assert first != pytest.approx(expected, rel=1e-3)  # dropout is on
    # earlier draws do not matter: a resumed run draws the same masks
    assert gradient_norms(make_engine(topology, True, 0.2), 2) == second
    # nor does recomputation, whose first pass is compiled without a backward pass
    assert gradient_norms(make_engine(topology, True, 0.2, "full"), 1) == first
