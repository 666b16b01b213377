"""The folders that the tests of references share."""

from pathlib import Path

import pytest
from image_folders import make_place


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """docs/ with documents and a picture, and other/ and docs2/ beside it with secrets."""
    return make_place(tmp_path)
