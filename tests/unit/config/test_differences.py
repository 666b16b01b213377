"""Differences between the config of a run and the one that resumes it."""

from copy import deepcopy

from megatron_chameleon.config.differences import ABSENT, find_differences
from megatron_chameleon.config.schema import Config, SourceConfig


def test_values_and_entries_of_lists() -> None:
    old = Config()
    old.data.stage1 = [SourceConfig(prefix="a", weight=1.0)]
    new = deepcopy(old)
    assert find_differences(old, new) == {}
    new.optimizer.lr = 5e-5
    new.data.stage1[0].weight = 2.0
    new.data.stage1.append(SourceConfig(prefix="b", weight=3.0))
    found = find_differences(old, new)
    assert found["optimizer.lr"] == (1e-4, 5e-5)
    assert found["data.stage1[0].weight"] == (1.0, 2.0)
    assert found["data.stage1[1].prefix"] == (ABSENT, "b")
    assert next(iter(found)).startswith("data."), "in the order of the schema"
    new.training.skip_steps = [3, 4]
    new.logging.on_event_kinds = ["stop"]
    old.logging.on_event, new.logging.on_event = "https://host/***", "https://host/secret"
    found = find_differences(old, new)
    assert found["training.skip_steps"] == (ABSENT, [3, 4])
    assert found["logging.on_event_kinds"] == (old.logging.on_event_kinds, ["stop"])
    assert "logging.on_event" not in found
    assert find_differences(new, old)["data.stage1[1].prefix"] == ("b", ABSENT)
