"""FP8 formats and scales follow the rules of Transformer Engine's kernels bit for bit."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_chameleon.config.schema import Fp8Config
from megatron_chameleon.model.fp8 import (
    E4M3,
    E5M2,
    DelayedScaling,
    amax,
    current_scale,
    dequantised_product,
    gradient_dtype,
    kept_fp8_scales,
    quantise,
)

FP32_LARGEST = float(np.finfo(np.float32).max)
ONE = torch.ones(())


def fmax(a: np.float32, b: np.float32) -> np.float32:
    """C's fmaxf: a number wins over NaN."""
    return np.fmax(a, b)


class Kernel:
    """``kernel_bulk`` of delayed_scaling.cu for one tensor, line by line in scalars."""

    def __init__(self, length: int, algo: str, largest: float, margin: int) -> None:
        self.history = [np.float32(0)] * length
        self.scale = np.float32(1)
        self.algo, self.scaled_max = algo, np.float32(largest * 2.0**-margin)

    def step(self, seen: float) -> None:
        length, last, largest = len(self.history), np.float32(seen), np.float32(0)
        if last != 0:
            moved = []
            for i in range(length):
                a = self.history[i + 1] if i < length - 1 else last
                largest = fmax(largest, a)
                moved.append(a if i > 0 else np.float32(0))
            self.history = moved
        if self.algo == "most_recent":
            largest = last
        if np.isfinite(largest) and largest > 0:
            with np.errstate(over="ignore"):
                self.scale = self.scaled_max / largest
        if np.isinf(self.scale):
            self.scale = np.float32(FP32_LARGEST)


def observed(fp8: Fp8Config, dtype: torch.dtype, amaxes: list[float]) -> tuple[Tensor, Tensor]:
    """The scale after each micro-batch, and the history at the end."""
    scaling = DelayedScaling(fp8, dtype, 1)
    scales = []
    for value in amaxes:
        scaling.history[0, 0] = value
        scaling.update()
        scales.append(scaling.scale[0])
    return torch.stack(scales), scaling.history[:, 0]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=-1), b.nan_to_num(nan=-1)) and bool(
        (a.isnan() == b.isnan()).all()
    )


SEQUENCE = [3.0, 7.5, 0.1, 0.0, 1e-41, 0.0, math.inf, 2.0, math.nan, 448.0, 1e30, 0.3, 0.7]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 1024])
def test_updates_equal_the_kernels_bit_for_bit(
    length: int, algo: str, margin: int, dtype: torch.dtype
) -> None:
    random = np.random.default_rng(length).lognormal(0, 3, 40).astype(np.float32)
    amaxes = [*SEQUENCE, *random.tolist(), *SEQUENCE]
    kernel = Kernel(length, algo, torch.finfo(dtype).max, margin)
    expected = []
    for value in amaxes:
        kernel.step(value)
        expected.append(kernel.scale)
    fp8 = Fp8Config(margin=margin, amax_history_len=length, amax_compute_algo=algo)
    scales, history = observed(fp8, dtype, amaxes)
    assert same(scales, torch.tensor(np.array(expected)))
    assert same(history, torch.tensor(np.array(kernel.history)))


def test_a_history_of_two_by_hand() -> None:
    fp8 = Fp8Config(amax_history_len=2)
    # 448/4; 448/max(4, 2); 448/max(2, 1), as 4 is forgotten; amax 0 forgets nothing; 448/2
    scales, history = observed(fp8, E4M3, [4.0, 2.0, 1.0, 0.0, 2.0])
    assert scales.tolist() == [112.0, 112.0, 224.0, 224.0, 224.0]
    assert history.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("algo", "amaxes", "expected"),
    [
        ("max", [8.0, math.inf, 4.0], [56.0, 56.0, 56.0]),  # inf stays in the history
        ("most_recent", [8.0, math.inf, 4.0], [56.0, 56.0, 112.0]),
        ("most_recent", [8.0, math.nan, 4.0], [56.0, 56.0, 112.0]),
        ("max", [8.0, math.nan, 14.0], [56.0, 56.0, 32.0]),
        ("max", [1e-40], [FP32_LARGEST]),
        ("max", [0.0, 0.0], [1.0, 1.0]),
    ],
)
def test_without_a_usable_amax_the_scale_stays(
    algo: str, amaxes: list[float], expected: list[float]
) -> None:
    fp8 = Fp8Config(amax_history_len=16, amax_compute_algo=algo)
    assert observed(fp8, E4M3, amaxes)[0].tolist() == pytest.approx(expected, rel=1e-7)


def test_margin_halves_the_scale() -> None:
    assert observed(Fp8Config(margin=1), E5M2, [2.0])[0].tolist() == [57344 / 2 / 2]


def test_recording_keeps_the_largest_and_ignores_nan() -> None:
    scaling = DelayedScaling(Fp8Config(amax_history_len=2), E4M3, 2)
    scaling.record(1, torch.tensor([1.0, -5.0]))
    scaling.record(1, torch.tensor([math.nan, 3.0], dtype=torch.bfloat16))
    assert scaling.history[0].tolist() == [0.0, 5.0]
    assert amax(torch.tensor([math.nan, -math.inf, 1.0])) == math.inf


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(2.0, 224.0), (0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1e-40, FP32_LARGEST)],
)
def test_current_scale(largest: float, expected: float) -> None:
    assert current_scale(torch.tensor(largest), E4M3).item() == pytest.approx(expected, rel=1e-7)


def test_casts_saturate_and_keep_nan() -> None:
    x = torch.tensor([1000.0, -math.inf, math.nan, 300.0, 1e-9])
    assert same(quantise(x, ONE, E4M3).float(), torch.tensor([448.0, -448.0, math.nan, 288.0, 0.0]))
    big = torch.tensor([1e6, -1e6])
    assert quantise(big, ONE, E5M2).float().tolist() == [57344.0, -57344.0]


def test_the_formats_of_gradients() -> None:
    assert gradient_dtype(Fp8Config(format="hybrid")) is E5M2
    assert gradient_dtype(Fp8Config(format="e4m3")) is E4M3


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_errors_are_those_of_the_formats() -> None:
    # Rounding to nearest with 3 (2) mantissa bits gives errors that are uniform in half a step:
    # about 2.6% (5.3%) RMS for normally distributed values. A product has the errors of both
    # factors: 3.7% forward with E4M3 twice, 5.9% for gradients with E5M2 and E4M3. Other draws
    # differ in the third digit.
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(256, 512, generator=generator, dtype=torch.float64) for _ in "ab")
    parts = {}
    for name, x, dtype in (("a", a, E4M3), ("b", b, E4M3), ("gradient", a, E5M2)):
        scale = current_scale(amax(x), dtype)
        parts[name] = quantise(x.float(), scale, dtype), scale
        error = relative_error(parts[name][0].double() / scale.double(), x)
        assert error == pytest.approx(0.053 if dtype is E5M2 else 0.026, rel=0.04)
    for left, expected in (("a", 0.037), ("gradient", 0.059)):
        (q, scale), (other, other_scale) = parts[left], parts["b"]
        product = dequantised_product(q, other.t(), scale, other_scale)
        assert relative_error(product, a @ b.t()) == pytest.approx(expected, rel=0.04)


def test_a_pass_without_gradients_keeps_the_scales() -> None:
    """Its layers have ``fp8_meta``; the tensors must stay the same objects."""
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    forward = SimpleNamespace(scale=torch.ones(2), amax_history=torch.zeros(4, 2))
    current = SimpleNamespace(amax_history=None)  # current scaling has no history
    layer.fp8_meta = {"scaling_fwd": forward, "recipe": "delayed"}
    other.fp8_meta = {"scaling_fwd": current}
    before = forward.scale, forward.amax_history
    with pytest.raises(ValueError, match="stops"), kept_fp8_scales([torch.nn.Sequential(layer)]):
        forward.amax_history[0] = 7.0
        forward.scale.mul_(3)
        raise ValueError("stops")
    with kept_fp8_scales([layer, other]):
        forward.amax_history[0] = 5.0
    assert (forward.scale, forward.amax_history) == before
    assert same(forward.scale, torch.ones(2)) and not forward.amax_history.any()
