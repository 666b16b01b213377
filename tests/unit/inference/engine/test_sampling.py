"""Draws compared with a reference in numpy that handles one row at a time, in fp64."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_chameleon.inference.engine import sampling
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.engine.row_settings import RowSettings
from megatron_chameleon.inference.engine.sampling import (
    draw,
    forbid,
    penalise_repetition,
    uniforms,
)
from recorded_ops import RecordedOps

ROUNDING = 1e-5
"""Of a cumulative probability. Probabilities are computed in fp32, with an error that grows with
the exponent: 3e-6 for the widest logits here."""
ALL = GenerationOptions(temperature=1.0, top_p=1.0)
LARGEST = torch.finfo(torch.float32).max


def cumulative(logits: np.ndarray, options: GenerationOptions) -> tuple[np.ndarray, np.ndarray]:
    """The tokens in the order in which they are added up, and the probability up to each."""
    order = np.arange(len(logits))
    scaled = logits.astype(np.float64) / options.temperature
    filtered = options.top_k > 0 or options.top_p < 1
    if filtered:
        order = np.array(sorted(order, key=lambda token: (-scaled[token], token)))
    weights = np.exp(scaled[order] - scaled.max())
    if options.top_k:
        weights[options.top_k :] = 0
    ends = np.cumsum(weights) / weights.sum()
    if options.top_p < 1:
        weights[1 + int((ends < options.top_p - 1e-12).sum()) :] = 0
        ends = np.cumsum(weights) / weights.sum()
    return order, ends


def check_row(token: int, logits: np.ndarray, options: GenerationOptions, uniform: float) -> bool:
    """Require the token whose share of [0, 1) has the number, to rounding.

    Returns:
        Whether it is so without rounding.
    """
    if options.temperature == 0:
        assert token == logits.argmax()
        return True
    order, ends = cumulative(logits, options)
    place = int(np.flatnonzero(order == token)[0])
    begin = ends[place - 1] if place else 0.0
    assert begin - ROUNDING <= uniform < ends[place] + ROUNDING, (options, token)
    assert logits[token] > -np.inf
    return bool(begin <= uniform < ends[place])


def random_rows(
    seed: int, width: int, rows: int
) -> tuple[torch.Tensor, list[GenerationOptions], torch.Tensor]:
    """Flat and peaked rows, with forbidden tokens and many equal logits, and any options."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(rows, width)).astype(np.float32))
    logits *= torch.from_numpy(rng.choice([0.01, 0.7, 3.0, 12.0], (rows, 1)).astype(np.float32))
    if seed % 3 == 1:
        logits = logits.bfloat16().float()  # a model in bf16 has many equal logits
    if seed % 3 == 2:
        logits = logits.round()
    forbidden = torch.from_numpy(rng.random((rows, width)) < rng.choice([0.0, 0.5, 0.99]))
    forbidden[torch.arange(rows), torch.from_numpy(rng.integers(width, size=rows))] = False
    options = [
        GenerationOptions(
            temperature=float(rng.choice([0.0, 0.3, 0.7, 1.0, 2.5])),
            top_p=float(rng.choice([1.0, 0.999, 0.9, 0.5, 1e-6])),
            top_k=int(rng.choice([0, 0, 1, 3, 50, 200, 3000, 10**9])),
        )
        for _ in range(rows)
    ]
    uniform = torch.from_numpy(rng.random(rows) if seed % 4 else np.full(rows, 1 - 2**-53))
    uniform[0] = 0
    return logits.masked_fill(forbidden, -torch.inf), options, uniform


@pytest.fixture(params=["host reads", "device path"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "device path":
        monkeypatch.setattr(sampling, "reading_is_free", lambda device: False)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("width", [1, 7, 256, 320, 4099, 9000])
def test_every_row_gets_the_token_of_the_reference(width: int) -> None:
    exact = total = 0
    for seed in range(6):
        logits, options, uniform = random_rows(seed, width, 12)
        tokens = draw(logits.clone(), RowSettings.of(options), uniform)
        assert tokens.dtype == torch.int64 and tokens.shape == (12,)
        for row, token in enumerate(tokens.tolist()):
            is_exact = check_row(token, logits[row].numpy(), options[row], float(uniform[row]))
            if seed % 4:  # a number next to 1 hits the last token, whose share may be rounded off
                exact, total = exact + is_exact, total + 1
    assert exact >= total - 1 > 40


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("width", [5, 300, 9000])
def test_the_rows_beside_it_do_not_change_a_draw(width: int) -> None:
    for seed in range(4):
        logits, options, uniform = random_rows(seed + 10, width, 8)
        settings = RowSettings.of(options)
        together = draw(logits.clone(), settings, uniform).tolist()
        for row in range(8):
            alone = RowSettings.of(options[row : row + 1])
            one = slice(row, row + 1)
            assert draw(logits[one].clone(), alone, uniform[one]).tolist() == [together[row]]
        order = torch.tensor([3, 3, 0, 7, 1])
        again = draw(logits[order], RowSettings.of([options[i] for i in order]), uniform[order])
        assert again.tolist() == [together[i] for i in order]


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(
    ("options", "width"),
    [
        (ALL, 12),
        (ALL, 5000),
        (replace(ALL, temperature=0.5), 12),
        (replace(ALL, top_k=5), 5000),
        (replace(ALL, top_p=0.8), 12),
        (replace(ALL, top_p=0.95, top_k=9, temperature=1.7), 5000),
    ],
)
def test_the_frequencies_are_the_probabilities(options: GenerationOptions, width: int) -> None:
    """By chi-square: a wrong share of 10% in one of ten tokens would exceed the bound."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(width, generator=generator)
    logits[13:] -= 9.0  # a long tail that has little weight
    draws, batches = (4000, 3) if width < 100 else (400, 10)
    counts = np.zeros(width)
    settings = RowSettings.of([options] * draws)
    seeds = torch.arange(draws)
    for batch in range(batches):
        uniform = uniforms(seeds, torch.full_like(seeds, batch))
        tokens = draw(logits.expand(draws, -1).clone(), settings, uniform)
        counts += np.bincount(tokens.numpy(), minlength=width)
    order, ends = cumulative(logits.numpy(), options)
    probabilities = np.zeros(width)
    probabilities[order] = np.diff(ends, prepend=0.0)
    assert not counts[probabilities == 0].any()
    many = probabilities * counts.sum() > 5
    expected = np.append(probabilities[many], probabilities[~many].sum()) * counts.sum()
    found = np.append(counts[many], counts[~many].sum())
    expected, found = expected[expected > 0], found[expected > 0]
    freedom = len(found) - 1
    assert ((found - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5 + 6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (GenerationOptions(temperature=0), {0}),
        (ALL, {0, 1, 2, 3}),
        (replace(ALL, top_p=0.79), {0, 1}),
        (replace(ALL, top_p=0.81), {0, 1, 2}),
        (replace(ALL, top_p=0.01), {0}),
        (replace(ALL, top_k=3), {0, 1, 2}),
        (replace(ALL, temperature=0.01), {0}),
        (replace(ALL, temperature=1e-300), {0}),
        (replace(ALL, temperature=1e-42), {0}),
        (replace(ALL, temperature=1e300, top_p=0.99), {0, 1, 2, 3}),
    ],
)
def test_what_can_be_drawn(options: GenerationOptions, expected: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(300, -1).clone()
    uniform = torch.arange(300, dtype=torch.float64) / 300
    assert set(draw(logits, RowSettings.of([options] * 300), uniform).tolist()) == expected


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("options", [ALL, replace(ALL, top_p=0.9), replace(ALL, top_k=40)])
def test_a_draw_among_the_codes_is_that_over_the_vocabulary(options: GenerationOptions) -> None:
    logits, _, uniform = random_rows(0, 9000, 16)
    codes = torch.randperm(9000, generator=torch.Generator().manual_seed(1))[:6000].sort().values
    logits = logits.nan_to_num(neginf=-1.0)
    among = torch.full_like(logits, -torch.inf)
    among[:, codes] = logits[:, codes]
    settings = RowSettings.of([options] * 16)
    whole = draw(among, settings, uniform)
    assert codes[draw(logits[:, codes], settings, uniform)].tolist() == whole.tolist()


def test_a_draw_does_not_wait_and_can_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a CUDA graph, while rows of the same kind change their settings."""
    monkeypatch.setattr(sampling, "reading_is_free", lambda device: False)
    logits, _, uniform = random_rows(4, 5000, 4)
    seen, kinds = logits > 0, torch.tensor([0, 1, 1, 0])
    limits = torch.full((2, 5000), LARGEST)
    limits[1, ::3] = -torch.inf
    options = [ALL, GenerationOptions(), GenerationOptions(temperature=0), replace(ALL, top_k=30)]
    settings = RowSettings.of(options)
    found: list[list[int]] = []
    tokens = torch.zeros(4, dtype=torch.int64)

    def step() -> None:
        penalised = penalise_repetition(logits.clone(), seen, settings.penalty_B)
        forbidden = forbid(penalised, limits, kinds)
        numbers = uniforms(torch.arange(4), torch.full((4,), 3))
        tokens.copy_(draw(forbidden, settings, (numbers + uniform) % 1))

    recorded = RecordedOps(step)
    for number in range(6):
        kind = settings.kind
        settings.set(1, replace(options[1], temperature=0.5 + number, top_p=0.4 + 0.1 * number))
        settings.set(3, replace(options[3], top_k=20 + number))
        assert settings.kind == kind
        recorded()
        found.append(tokens.tolist())
        step()
        assert tokens.tolist() == found[-1]
    assert recorded.replays == 4
    assert len({tuple(row) for row in found}) > 1


def test_the_kind_says_what_rows_need() -> None:
    settings = RowSettings(3)
    assert settings.kind == (True, False, False, False, 1, False)
    assert draw(torch.eye(3), settings, torch.zeros(3)).tolist() == [0, 1, 2]
    settings.set(0, replace(ALL, top_k=50, repetition_penalty=1.0))
    assert settings.kind == (True, False, True, False, 64, False)
    settings.set(1, GenerationOptions())
    settings.set(2, ALL)
    assert settings.kind == (False, True, True, True, sampling.NO_LIMIT, True)
    for row in range(3):
        settings.set(row, None)
    assert settings.kind == RowSettings(3).kind


@pytest.mark.usefixtures("_path")
def test_forbidden_tokens_are_never_drawn_whatever_a_broken_model_computes() -> None:
    limits = torch.full((2, 300), LARGEST)
    limits[0, 40:] = -torch.inf
    limits[1, :40] = -torch.inf
    uniform = torch.rand(8, generator=torch.Generator().manual_seed(1))
    options = [ALL, GenerationOptions(temperature=0), GenerationOptions(), replace(ALL, top_k=2)]
    settings = RowSettings.of(options * 2)
    for value in (torch.nan, torch.inf, -torch.inf, LARGEST, -LARGEST):
        for kinds in ([0] * 8, [0, 1] * 4, [1] * 8):
            logits = torch.full((8, 300), value)
            forbid(logits, limits, torch.tensor(kinds))
            for kind, token in zip(kinds, draw(logits, settings, uniform).tolist(), strict=True):
                assert limits[kind, token] > 0, value
    logits, *_ = random_rows(0, 300, 4)
    kinds = torch.tensor([0, 1, 1, 0])
    expected = logits.masked_fill(limits[kinds] < 0, -torch.inf)
    expected = expected.where(limits[kinds] < 0, expected.clamp(min=-LARGEST))
    assert torch.equal(forbid(logits.clone(), limits, kinds), expected)


@pytest.mark.usefixtures("_path")
def test_a_number_of_nan_stays_within_the_vocabulary() -> None:
    options = [ALL, replace(ALL, top_p=0.9), GenerationOptions(temperature=0)]
    for width in (1, 300, 9000):
        logits = torch.full((3, width), torch.nan)
        tokens = draw(logits, RowSettings.of(options), torch.full((3,), 0.5))
        assert all(0 <= token < width for token in tokens.tolist())


@pytest.mark.usefixtures("_path")
def test_repetition_makes_seen_tokens_less_likely_at_either_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0], [3.0, -3.0, 0.0, -torch.inf]])
    seen = torch.tensor([[True, True, False, False], [True, True, True, True]])
    rows: Sequence[tuple[float | torch.Tensor, list[list[float]]]] = (
        (2.0, [[1.0, -4.0, 2.0, -2.0], [1.5, -6.0, 0.0, -torch.inf]]),
        (1.0, logits.tolist()),
        (torch.tensor([1.0, 2.0]), [[2.0, -2.0, 2.0, -2.0], [1.5, -6.0, 0.0, -torch.inf]]),
    )
    for penalty, expected in rows:
        assert penalise_repetition(logits.clone(), seen, penalty).tolist() == expected


def split_mix(state: int) -> int:
    """SplitMix64 in Python's integers. Source: Vigna's splitmix64.c."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_the_numbers_of_an_answer_are_those_of_its_seed() -> None:
    # the first outputs for the seed 1234567, as published with other implementations
    assert split_mix(1234567) == 6457827717110365317
    assert split_mix(1234567 + 0x9E3779B97F4A7C15) == 3203168211198807973
    seeds = [0, 1, 2, 1234567, 2**63 - 1, -(2**63), -1]
    for count in (0, 1, 77, 10**9):
        found = uniforms(torch.tensor(seeds), torch.full((len(seeds),), count)).tolist()
        starts = [split_mix(seed % 2**64) for seed in seeds]
        expected = [split_mix((s + count * 0x9E3779B97F4A7C15) % 2**64) for s in starts]
        assert found == [(number >> 11) * 2.0**-53 for number in expected]
        assert all(0 <= number < 1 for number in found) and len(set(found)) == len(found)
