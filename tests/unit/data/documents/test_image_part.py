"""Images of documents: what opens, and what is said of one that does not."""

import pytest

from megatron_chameleon.data.documents.image_part import (
    ImageError,
    ImageFolder,
    ImagePart,
    image_part,
)


def test_image_opens(tmp_path, picture):
    assert ImagePart(str(tmp_path / picture("i.png"))).open().size == (20, 16)


@pytest.mark.parametrize(
    ("content", "reason", "what"),
    [
        (None, "missing image", "no such image file"),
        (b"", "empty image", "the image has 0 bytes"),
        (
            b"no picture",
            "corrupt image",
            "the image of 10 bytes cannot be decoded (unknown format)",
        ),
    ],
)
def test_unusable_image_says_why(tmp_path, content, reason, what):
    path = tmp_path / "i.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        ImagePart(str(path)).open()
    assert (caught.value.where, caught.value.reason) == (str(path), reason)
    assert caught.value.what.startswith(what)


def test_truncated_image_is_corrupt(tmp_path, picture):
    path = tmp_path / picture("i.jpg", size=(200, 200))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match="truncated"):
        ImagePart(str(path)).open()


def test_data_uri_of_broken_base64_is_a_corrupt_image():
    part = image_part("data:image/png;base64,abc", ImageFolder())
    with pytest.raises(ImageError, match="the base64 text of a data: URI cannot be decoded") as c:
        part.open()
    assert c.value.reason == "corrupt image"
