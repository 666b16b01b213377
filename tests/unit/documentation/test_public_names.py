"""``from megatron_chameleon import Session``: documented, and imported when it is used."""

import inspect
import subprocess
import sys

import pytest

import megatron_chameleon
from megatron_chameleon import ConfigError


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, megatron_chameleon as m; m.ConfigError; m.load_config; dir(m); "
        "print(sorted({'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


@pytest.mark.parametrize("name", megatron_chameleon.__all__)
def test_a_public_name_is_documented(name: str) -> None:
    found = getattr(megatron_chameleon, name)
    assert found.__name__ == name and name in dir(megatron_chameleon)
    assert len(inspect.getdoc(found) or "") > 20
    if inspect.isfunction(found):
        text = inspect.getdoc(found) or ""
        for parameter in inspect.signature(found).parameters:
            assert f"{parameter}:" in text, parameter
        assert "Raises:" in text


def test_another_name_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        megatron_chameleon.trian  # noqa: B018


def test_train_says_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError) as caught:
        megatron_chameleon.train("chameleon_7b", resume="never", start_from="weights")
    assert str(caught.value) == (
        "start_from: it does not go with resume='never'. Give one of the two."
    )
    with pytest.raises(ConfigError, match="no such config file"):
        megatron_chameleon.train("nowhere.yaml")
