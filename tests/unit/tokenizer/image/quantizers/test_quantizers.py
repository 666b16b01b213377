"""The quantizers beside their formulas, written out in another way."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_chameleon.tokenizer.image.quantizers.choose import TEMPERATURE, make_quantizer
from megatron_chameleon.tokenizer.image.quantizers.codebook import Codebook
from megatron_chameleon.tokenizer.image.quantizers.ema import MovingAverages
from megatron_chameleon.tokenizer.image.quantizers.index_backpropagation import (
    IndexBackpropagation,
)
from megatron_chameleon.tokenizer.image.quantizers.lookup_free import LookupFree


def latents(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_moving_averages_are_those_of_the_paper() -> None:
    """Equations 6 to 8 with Laplace smoothing, in NumPy, for three batches."""
    codebook, decay = Codebook(5, 3), 0.9
    torch.nn.init.normal_(codebook.embedding.weight)
    averages = MovingAverages(codebook, decay)
    vectors = codebook.embedding.weight.double().numpy().copy()
    counts, sums = np.ones(5), vectors.copy()
    for seed in (0, 1, 1):
        rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
        codes = codebook.nearest(rows.T[None, :, :, None]).flatten()
        averages.update(rows, codes)
        for code in range(5):
            mine = rows.double().numpy()[codes.numpy() == code]
            counts[code] = decay * counts[code] + (1 - decay) * len(mine)
            sums[code] = decay * sums[code] + (1 - decay) * mine.sum(axis=0)
        smooth = (counts + 1e-5) / (counts.sum() + 5 * 1e-5) * counts.sum()
        # fp32 against float64
        np.testing.assert_allclose(
            codebook.embedding.weight, sums / smooth[:, None], rtol=1e-4, atol=1e-6
        )
    assert not codebook.embedding.weight.requires_grad


def test_averages_of_two_processes_are_those_of_the_whole_batch() -> None:
    codebooks = [Codebook(4, 2), Codebook(4, 2)]
    codebooks[1].load_state_dict(codebooks[0].state_dict())
    rows, codes = torch.randn(20, 2), torch.arange(20) % 4
    whole = MovingAverages(codebooks[0], 0.5)
    half = MovingAverages(codebooks[1], 0.5, lambda values: 2 * values)
    whole.update(torch.cat([rows, rows]), torch.cat([codes, codes]))
    half.update(rows, codes)  # the other process has the same
    torch.testing.assert_close(codebooks[1].embedding.weight, codebooks[0].embedding.weight)


def test_a_code_that_was_moved_starts_anew() -> None:
    codebook = Codebook(3, 2)
    averages = MovingAverages(codebook, 0.99)
    for _ in range(50):
        averages.update(torch.full((8, 2), 5.0), torch.zeros(8, dtype=torch.long))
    with torch.no_grad():
        codebook.embedding.weight[2] = torch.tensor([7.0, -7.0])
    averages.restart(torch.tensor([2]))
    averages.update(torch.full((8, 2), 5.0), torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(
        codebook.embedding.weight[2], torch.tensor([7.0, -7.0]), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("bits", [1, 5, 13, 20])
def test_signs_are_the_bits_of_a_code(bits: int) -> None:
    lfq = LookupFree(bits, TEMPERATURE)
    z = latents(2, bits, 3, 4)
    codes = lfq.nearest(z)
    for row, column in ((0, 0), (2, 3)):
        text = "".join("1" if value > 0 else "0" for value in z[1, :, row, column])
        assert codes[1, 4 * row + column] == int(text, 2)
    assert torch.equal(lfq.lookup(codes, (3, 4)), torch.where(z > 0, 1.0, -1.0))
    assert torch.equal(lfq.nearest(lfq.lookup(codes, (3, 4))), codes)


def test_the_entropies_are_those_of_a_softmax_over_all_corners() -> None:
    lfq = LookupFree(4, temperature=1.5)
    z = latents(50, 4)
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=4)))
    p = (-torch.cdist(z, corners).square() / 1.5).softmax(dim=1)
    each = -(p * p.log()).sum(dim=1).mean()
    mean = p.mean(dim=0)
    expected = each + (mean * mean.log()).sum()
    assert lfq.entropy_loss(z).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_entropy_loss_prefers_certain_latents_that_use_all_codes() -> None:
    lfq = LookupFree(12, TEMPERATURE)
    spread = torch.where(latents(4096, 12) > 0, 1.0, -1.0)
    collapsed = torch.ones(4096, 12)
    unsure = latents(4096, 12, scale=1e-3)
    losses = [lfq.entropy_loss(rows).item() for rows in (spread, collapsed, unsure)]
    # 10 and 2 bits; 4096 latents estimate the entropy of 1,024 codes within a few per cent
    assert losses[0] == pytest.approx(-12 * np.log(2), rel=0.03)
    assert losses[1] == pytest.approx(0, abs=1e-3) and losses[2] > losses[0]
    extreme = torch.full((4, 12), 1e4, requires_grad=True)
    lfq.entropy_loss(extreme).backward()
    assert extreme.grad is not None and bool(torch.isfinite(extreme.grad).all())


def test_index_backpropagation_is_as_published() -> None:
    """``IndexPropagationQuantize`` of Shi et al.'s code, in einsums over [B, K, h, w]."""
    ibq = IndexBackpropagation(7, 4, temperature=0.5)
    torch.nn.init.normal_(ibq.embedding.weight)
    z = latents(2, 4, 3, 5).requires_grad_()
    e = ibq.embedding.weight
    logits = torch.einsum("bdhw,nd->bnhw", z, e)
    soft = logits.softmax(dim=1)
    index = soft.argmax(dim=1, keepdim=True)
    hard = torch.zeros_like(logits).scatter_(1, index, 1.0)
    z_q = torch.einsum("bnhw,nd->bdhw", hard - soft.detach() + soft, e)
    z_q2 = torch.einsum("bnhw,nd->bdhw", hard, e)
    codebook = (z_q - z).square().mean() + (z_q2 - z.detach()).square().mean()
    commitment = (z_q2.detach() - z).square().mean()
    p = (logits / 0.5).softmax(dim=1).movedim(1, 3).reshape(-1, 7)
    mean = p.mean(dim=0)
    entropy = torch.special.entr(p).sum(dim=1).mean() - torch.special.entr(mean).sum()
    found = ibq.quantize(z)
    assert torch.equal(found.codes_BN, index.flatten(1)) and found.entropy_loss is not None
    assert torch.equal(ibq.nearest(z), found.codes_BN)
    torch.testing.assert_close(found.straight_BDhw, z_q)
    for ours, theirs in (
        (found.codebook_loss, codebook),
        (found.commitment_loss, commitment),
        (found.entropy_loss, entropy),
        (found.straight_BDhw.square().sum(), z_q.square().sum()),
    ):
        torch.testing.assert_close(ours, theirs)
        for mine, other in zip(
            torch.autograd.grad(ours, (z, e), retain_graph=True, allow_unused=True),
            torch.autograd.grad(theirs, (z, e), retain_graph=True, allow_unused=True),
            strict=True,
        ):
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["vq", "lfq", "ibq"])
def test_the_decoder_s_gradient_reaches_the_latents(kind: str) -> None:
    quantizer = make_quantizer(kind, 16, 4)
    z = latents(2, 4, 3, 3).requires_grad_()
    found = quantizer.quantize(z)
    vectors = quantizer.lookup(found.codes_BN, (3, 3))
    torch.testing.assert_close(found.straight_BDhw, vectors, atol=1e-5, rtol=1e-5)
    functional.mse_loss(found.straight_BDhw, torch.zeros_like(z)).backward()
    assert z.grad is not None and bool(z.grad.any())
