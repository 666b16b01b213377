"""The loss compared with torch's own cross-entropy, logsumexp and autograd in float64."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_chameleon.model.loss import vocab_parallel_cross_entropy


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    meeting: Path = tmp_path_factory.mktemp("gloo") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 4, 50, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 50, (3, 4), generator=generator)
    weights = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    return logits.to(dtype), labels, weights


def reference(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.double().clone().requires_grad_()
    cross_entropy = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    z_term = logits.logsumexp(-1).flatten().square()
    loss = ((cross_entropy + z_loss * z_term) * weights.flatten()).sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


# fp64: only rounding. fp32: 50 exponentials of magnitude up to e^15 give errors of 1e-6. bf16: at
# the end the gradient is rounded to 8 bits of mantissa, 2^-9 relative to its largest entry.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2**-8)],
)
@pytest.mark.parametrize("z_loss", [0.0, 1e-5, 1e-1])
def test_loss_and_gradient(
    group: dist.ProcessGroup, dtype: torch.dtype, tolerance: float, z_loss: float
) -> None:
    logits, labels, weights = draw(dtype)
    expected_loss, expected_grad = reference(logits, labels, weights, z_loss)
    leaf = logits.clone().requires_grad_()
    # The loss overwrites its input, which may be a linear layer's output, but not a leaf.
    parts = vocab_parallel_cross_entropy(leaf * 1.0, labels, group)
    loss = ((parts[0] + z_loss * parts[1].square()) * weights).sum()
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    scale = expected_grad.abs().max()
    assert (loss.double() - expected_loss).abs() / expected_loss <= tolerance
    assert (leaf.grad.double() - expected_grad).abs().max() / scale <= tolerance


def test_the_largest_logit_and_log_z(group: dist.ProcessGroup) -> None:
    logits, labels, _ = draw(torch.float64)
    _, log_z, max_logit = vocab_parallel_cross_entropy(logits.clone(), labels, group)
    assert torch.equal(max_logit, logits.amax(-1))
    torch.testing.assert_close(log_z, logits.logsumexp(-1), rtol=1e-14, atol=0)


def test_huge_logits_do_not_overflow(group: dist.ProcessGroup) -> None:
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    cross_entropy, log_z, _ = vocab_parallel_cross_entropy(logits, torch.tensor([1]), group)
    # ln(1 + e) = 1.3133; the third logit is 2e4 below and adds nothing
    torch.testing.assert_close(cross_entropy, torch.tensor([1.31326]), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_z, torch.tensor([1e4 + 0.31326]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("z_loss", [1e-5, 1e-1])
def test_the_gradient_on_two_ranks(z_loss: float) -> None:
    """Each thread is a rank with half of the vocabulary, in fp64 so that only rounding differs."""
    logits, labels, weights = draw(torch.float64)
    expected_loss, expected_grad = reference(logits, labels, weights, z_loss)
    store = dist.HashStore()

    def run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        leaf = logits.chunk(2, dim=-1)[rank].clone().requires_grad_()
        parts = vocab_parallel_cross_entropy(leaf * 1.0, labels, group)
        loss = ((parts[0] + z_loss * parts[1].square()) * weights).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    found = torch.cat([grad for _, grad in results], dim=-1)
    for loss, _ in results:
        assert (loss - expected_loss).abs() / expected_loss <= 1e-12
    assert (found - expected_grad).abs().max() / expected_grad.abs().max() <= 1e-12


def test_the_gradient_of_the_z_loss_alone(group: dist.ProcessGroup) -> None:
    """Tested alone, so that the cross-entropy cannot hide an error in it."""
    logits, labels, _ = draw(torch.float64)
    leaf = logits.clone().requires_grad_()
    _, log_z, _ = vocab_parallel_cross_entropy(leaf * 1.0, labels, group)
    (found,) = torch.autograd.grad(log_z.square().sum(), leaf)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(leaf.logsumexp(-1).square().sum(), leaf)
    assert (found - expected).abs().max() / expected.abs().max() <= 1e-12
