"""Every key of every config with every value of the table: accepted and finite, or one clear line.

The keys are read from the dataclasses (``value_table``), so a new one is tested by itself.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from value_table import VALUES, config_keys, scalar_types

from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.constraints import Constraint, OneOf, field_constraints
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.schema import Config, SourceConfig, ValidationSourceConfig
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig, load_image_config

MORE_VALUES = (".inf", ".nan", "true", "null", "{}", "'5'", "010", "")
CONFIGS = (Config, ImageTokenizerConfig)
KEYS = [key for key, _ in config_keys(Config)]
IMAGE_KEYS = [key for key, _ in config_keys(ImageTokenizerConfig)]


def classes(cls: type) -> Iterator[type]:
    """A config's dataclass and those of its fields."""
    yield cls
    for value in vars(cls()).values():
        if dataclasses.is_dataclass(value):
            yield from classes(type(value))
    if cls is Config:
        yield from (SourceConfig, ValidationSourceConfig)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "train.yaml"
    prompts = "logging: {sample_prompts: [{text: a}]}"
    path.write_text(
        f"tokenizer: {{path: t}}\n{prompts}\n"
        "data: {stage1: [{prefix: p}], stage2: [{}], validation: {sources: [{}]}}\n"
    )
    return path


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_number_and_text_has_limits(cls: type) -> None:
    """A number without an end lets in NaN, infinity and 10^30; a text, control characters."""
    unlimited = []
    for part in classes(cls):
        constraints = field_constraints(part)
        for key, hint in config_keys(part):
            if scalar_types(hint) & {int, float, str} and "." not in key:
                constraint, _ = constraints.get(key, (None, True))
                if constraint is None or not _has_ends(constraint):
                    unlimited.append(f"{part.__name__}.{key}")
    assert unlimited == []


def _has_ends(constraint: Constraint) -> bool:
    if isinstance(constraint, OneOf):
        return True
    extremes: list[Any] = [math.inf, -math.inf, math.nan, 10**30, -(10**30)]
    with_texts = [*extremes, "\x1b[31m" * 50_000]
    for value in with_texts:
        try:
            if constraint.allows(value):
                return False
        except (TypeError, AttributeError):  # a text where a number is wanted, or the other way
            continue
    return True


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_a_run_is_accepted_or_refused_in_a_line(key: str, file: Path) -> None:
    for value in (*VALUES, *MORE_VALUES):
        word = f"{key}={value}"
        try:
            config = load_config(file, [word])
            check_config(config, 1)
        except ChameleonError as error:
            assert_clear(error, word)
        else:
            assert_finite(config, word)


@pytest.mark.parametrize("key", IMAGE_KEYS)
def test_a_value_of_an_image_tokenizer_is_accepted_or_refused_in_a_line(key: str) -> None:
    for value in (*VALUES, *MORE_VALUES):
        word = f"{key}={value}"
        try:
            config = load_image_config("digits", [word])
        except ChameleonError as error:
            assert_clear(error, word)
        else:
            assert_finite(config, word)


def assert_clear(error: ChameleonError, word: str) -> None:
    for line in error.lines():
        assert "\n" not in line, word
        assert len(line) < 600, word
        assert line.endswith((".", "?")), word


def assert_finite(config: Any, word: str) -> None:
    for value in vars(config).values():
        if dataclasses.is_dataclass(value):
            assert_finite(value, word)
        elif isinstance(value, float):
            assert math.isfinite(value), word
