"""A folder of documents with pictures, and others beside it that no document may reach."""

from pathlib import Path

import pytest

from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.references import ImageFolder

SECRET = b"secret"


def make_place(tmp_path: Path) -> Path:
    """docs/ with documents and a picture, and other/ and docs2/ beside it with secrets."""
    (tmp_path / "docs/sub").mkdir(parents=True)
    (tmp_path / "docs/a.jsonl").write_text("{}\n")
    (tmp_path / "docs/i.png").write_bytes(b"picture")
    (tmp_path / "docs/sub/j.png").write_bytes(b"deeper")
    for folder in ("other", "docs2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.png").write_bytes(SECRET)
    return tmp_path


def folder(place: Path, **options: object) -> ImageFolder:
    return ImageFolder.of(place / "docs/a.jsonl", ImageOptions(**options))  # type: ignore[arg-type]


def fault(images: ImageFolder, value: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        images.read(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value
