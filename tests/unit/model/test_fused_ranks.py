"""Fused kernels in the whole model and on two tensor-parallel ranks."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.nn import functional

from megatron_chameleon.config.schema import Config, ModelConfig
from megatron_chameleon.model.chameleon import build_model
from megatron_chameleon.model.fused_qk_norm import NormRopeSelfAttention
from megatron_chameleon.model.isolation import IsolatedDocuments
from megatron_chameleon.model.loss import fused_vocab_parallel_cross_entropy
from megatron_chameleon.parallel.launch import leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import create_topology
from stand_ins.transformer_engine_attention import packed_documents

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
VOCAB = 62


@dataclass(frozen=True)
class RankResults:
    """What one of two ranks computed."""

    loss: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]
    """By ``step_of_a_rank``, with the torch loss."""
    fused: dict[str, torch.Tensor]


def run_rank(rank: int, size: int, folder: Path) -> None:
    """Everything that needs two ranks, so that the processes start only once."""
    torch.set_num_threads(1)
    with process_group(rank, size, folder / "meeting") as group:
        results = RankResults(
            loss_of_a_rank(rank, size, group),
            step_of_a_rank(size, False, "fp32"),
            step_of_a_rank(size, True, "fp32"),
        )
    torch.save(results, folder / f"{rank}.pt")


@contextmanager
def process_group(rank: int, size: int, meeting: Path) -> Iterator[dist.ProcessGroup]:
    prepare_megatron()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    leave_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[RankResults]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=run_rank, args=(rank, 2, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def loss_of_a_rank(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    logits, labels = draw()
    leaf = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    cross_entropy, log_z, max_logit = fused_vocab_parallel_cross_entropy(leaf * 1.0, labels, group)
    (grad,) = torch.autograd.grad((cross_entropy + 0.1 * log_z.square()).sum(), leaf)
    return {"cross_entropy": cross_entropy.detach(), "max_logit": max_logit, "grad": grad}


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(4, 3, VOCAB, generator=generator)
    logits[1, 0, : VOCAB // 2] = float("-inf")  # nothing finite on rank 0
    labels = torch.randint(VOCAB, (4, 3), generator=generator)
    labels[0] = torch.tensor(
        [0, VOCAB // 2 - 1, VOCAB // 2]
    )  # the last two adjoin the ranks' boundary
    labels[1, 0] = VOCAB - 1
    return logits, labels


def test_the_loss_on_two_ranks(ranks: list[RankResults]) -> None:
    found = [rank.loss for rank in ranks]
    logits, labels = draw()
    exact = logits.double().requires_grad_()
    cross_entropy = functional.cross_entropy(
        exact.flatten(0, 1), labels.flatten(), reduction="none"
    )
    log_z = exact.logsumexp(-1)
    (grad,) = torch.autograd.grad(cross_entropy.sum() + 0.1 * log_z.square().sum(), exact)
    for rank in found:
        expected = cross_entropy.detach().view(4, 3).float()
        torch.testing.assert_close(rank["cross_entropy"], expected, rtol=2e-6, atol=1e-6)
        assert torch.equal(rank["max_logit"], logits.amax(-1))
    whole = torch.cat([rank["grad"] for rank in found], dim=-1).double()
    assert (whole - grad).abs().max() / grad.abs().max() <= 3e-6


def spread_qk_norms(attention: NormRopeSelfAttention) -> None:
    """Move the parameters away from 1 and 0, differently for each group, alike on all ranks."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for norm in (attention.q_layernorm, attention.k_layernorm):
            for parameter in (norm.weight, norm.bias):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def isolate(positions: torch.Tensor, packed: bool) -> IsolatedDocuments:
    """Documents of 3, 5, 1 and 7 tokens in two sequences of 8."""
    borders = torch.tensor([0, 3, 8, 9, 16], dtype=torch.int32)
    own = torch.cat([torch.arange(length) for length in borders.diff().tolist()])
    own = own.view_as(positions)
    if packed:
        return IsolatedDocuments.packed(borders, 7, own, in_parts=False)
    return IsolatedDocuments.grouped(borders, own)


def step_of_a_rank(
    size: int, fused: bool, dtype: str, isolated: str | None = None
) -> dict[str, torch.Tensor]:
    """The parts of a tiny model's loss and all its gradients, which do not depend on the layout.

    Args:
        size: Number of tensor-parallel ranks.
        fused: Whether to use the fused kernels.
        dtype: Of the model.
        isolated: "grouped" or "packed", for isolated documents.
    """
    config = Config(
        model=ModelConfig(
            num_layers=1,
            hidden_size=32,
            ffn_hidden_size=24,
            num_attention_heads=4,
            num_query_groups=2,
            seq_length=8,
            qk_norm_groups=4,
        )
    )
    config.training.dtype = dtype
    config.parallel.tensor_model_parallel_size = size
    config.fusion.loss_fusion = config.fusion.qk_norm_rope_fusion = fused
    (model,) = build_model(config, VOCAB, create_topology(config.parallel))
    attention = model.decoder.layers[0].self_attention
    assert isinstance(attention, NormRopeSelfAttention) == fused
    spread_qk_norms(attention)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (2, 9), generator=generator)
    positions = torch.arange(8).expand(2, 8)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    documents = isolated and isolate(positions, isolated == "packed")
    if isolated == "packed":
        inputs, labels = inputs.reshape(1, -1), labels.reshape(1, -1)
    parts = model(inputs, positions, None, labels=labels, packed_seq_params=documents)
    (parts[0] + 1e-2 * parts[1].square()).mean().backward()
    values = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(values) > 5
    parallel_state.destroy_model_parallel()  # the next model creates its own groups
    cross_entropy, log_z, _ = (part.detach().reshape(2, 8) for part in parts)
    return {"cross_entropy": cross_entropy, "log_z": log_z, **values}


def assert_equal_steps(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, (name, error)


# fp32: both sum the same numbers in a different order. bf16: each product is rounded to 2^-8, and
# the fused gradient of the logits towards 0 in the interpreter. fp64: the kernels do not support
# it, so torch computes both.
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp64", 0.0)])
def test_a_model_with_fused_kernels(tmp_path: Path, dtype: str, tolerance: float) -> None:
    with process_group(0, 1, tmp_path / "meeting"):
        steps = [step_of_a_rank(1, fused, dtype) for fused in (True, False)]
    assert_equal_steps(*steps, tolerance)


def test_a_model_with_fused_kernels_on_two_ranks(ranks: list[RankResults]) -> None:
    for rank in ranks:
        assert_equal_steps(rank.fused, rank.plain, 1e-5)


def test_fused_kernels_and_isolated_documents(tmp_path: Path) -> None:
    """Packed, the angles begin again at each document; otherwise they run on over the sequence."""
    with process_group(0, 1, tmp_path / "meeting"):
        expected = step_of_a_rank(1, False, "fp32", "grouped")
        assert_equal_steps(step_of_a_rank(1, True, "fp32", "grouped"), expected, 1e-5)
        with packed_documents():
            for fused in (False, True):
                assert_equal_steps(step_of_a_rank(1, fused, "fp32", "packed"), expected, 1e-5)
        other = step_of_a_rank(1, False, "fp32")
    with pytest.raises(AssertionError, match="cross_entropy"):
        assert_equal_steps(other, expected, 1e-5)
