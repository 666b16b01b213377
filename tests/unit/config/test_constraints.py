"""Constraints at the fields: which values break one, and what is said about it."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf

from megatron_chameleon.config import schema
from megatron_chameleon.config.constraints import (
    Above,
    Below,
    Between,
    OneOf,
    PositiveInt,
    Repeats,
    Share,
    Text,
    ZeroOr,
    field_constraints,
    find_violations,
)


@dataclass
class Part:
    weight: Annotated[float, Above(0, at_most=10)] = 1.0
    share: Share | None = None


@dataclass
class Whole:
    parts: list[Part] = field(default_factory=list)
    count: PositiveInt = 1
    order: Annotated[str, OneOf("pre", "swin")] = "pre"
    kind: Annotated[str, OneOf("a", "b")] | None = None
    free: int = -1


def test_the_defaults_of_the_schema_break_nothing() -> None:
    assert list(find_violations(schema.Config())) == []


def test_every_violation_is_found_in_the_order_of_the_fields() -> None:
    whole = Whole([Part(), Part(0.0, 1.5)], count=0, order="post", kind="c")
    assert [str(violation) for violation in find_violations(whole)] == [
        "parts[1].weight: 0.0 is not above 0 and at most 10. Use a number in that range.",
        "parts[1].share: 1.5 is not between 0 and 1. Use a number in that range, or null.",
        "count: 0 is not between 1 and 1,000,000,000. Use a number in that range.",
        "order: 'post' is not one of pre, swin. Choose one of them.",
        "kind: 'c' is not one of a, b. Choose one of them, or null.",
    ]


@pytest.mark.parametrize(
    ("constraint", "allowed", "refused"),
    [
        (Between(1, 3), (1, 3), (0, 4, math.nan, math.inf, 10**400)),
        (Above(0, at_most=2), (1e-300, 2), (0, 2.1, math.nan, -math.inf)),
        (Below(0, 1), (0, 0.999), (1, -1e-9, math.nan, math.inf)),
        (ZeroOr(0.1, 9), (0, 0.0, 0.1, 9), (1e-300, 9.1, -1, math.nan, math.inf)),
        (Repeats(5), (True, False, 1, 5), (0, 6, -1)),
        (Text(3), ("", "abc", "äöü", "a b"), ("abcd", "a\n", "\x1b", "\x7f", "\x85", "\udc80")),
        (Text(3, lines=True), ("a\nb", "\t"), ("a\x00", "\x9b")),
    ],
    ids=str,
)
def test_what_a_constraint_allows(constraint: Any, allowed: Any, refused: Any) -> None:
    assert [value for value in allowed if not constraint.allows(value)] == []
    assert [value for value in refused if constraint.allows(value)] == []


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1])
def test_what_is_not_a_share(value: float) -> None:
    assert len(list(find_violations(Part(share=value)))) == 1


def test_null_is_refused_where_the_type_has_none() -> None:
    whole = Whole(order=None)  # type: ignore[arg-type]
    assert [violation.where for violation in find_violations(whole)] == ["order"]


def test_constraints_can_be_read_from_the_fields() -> None:
    found = {
        name: (str(constraint), nullable)
        for name, (constraint, nullable) in field_constraints(schema.ParallelConfig).items()
    }
    assert found["tensor_model_parallel_size"] == ("between 1 and 65,536", False)
    assert found["recompute_granularity"] == ("one of selective, full", True)
    assert "sequence_parallel" not in found


def test_omegaconf_still_reads_the_schema() -> None:
    config = OmegaConf.merge(OmegaConf.structured(schema.Config), {"model": {"num_layers": 7}})
    assert OmegaConf.to_object(config).model == schema.ModelConfig(num_layers=7)
