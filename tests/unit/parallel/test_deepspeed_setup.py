"""DeepSpeed that is missing or has another version is reported before anything imports it."""

import importlib.metadata

import pytest

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.parallel.deepspeed_setup import check_deepspeed


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "deepspeed needs the package deepspeed, which is not installed. Run pip install "),
        ("0.18.2", "deepspeed 0.18.2 is installed and 0.19.x is supported. Run pip install "),
    ],
)
def test_deepspeed_missing_or_of_another_version(
    found: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"engine\.name: ") as caught:
        check_deepspeed()
    assert message in str(caught.value)
