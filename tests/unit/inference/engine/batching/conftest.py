"""The tiny model for the tests of this folder."""

from pathlib import Path

import pytest

from megatron_chameleon.inference.session import Session
from tiny_decoder import Tiny


@pytest.fixture(scope="package")
def tiny(tiny_checkpoint: Path) -> Tiny:
    return Tiny(Session.load(tiny_checkpoint))
