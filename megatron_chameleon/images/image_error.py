"""The error of an image that cannot be used."""

from megatron_chameleon.errors import DataError


class ImageError(DataError):
    """An unusable image: the fault of its document, which is dropped; nothing else stops.

    ``reason`` is a few words that are the same for all images with this fault: missing, refused,
    empty, too large or corrupt image.
    """

    def __init__(self, where: str, what: str, remedy: str, reason: str = "corrupt image") -> None:
        super().__init__(where, what, remedy)
        self.reason = reason


def missing(where: str, what: str = "no such image file", remedy: str | None = None) -> ImageError:
    """The error for an image that is not there."""
    remedy = remedy or "Give the path relative to the file of documents"
    return ImageError(where, what, remedy, "missing image")


def refused(where: str, what: str, remedy: str) -> ImageError:
    """The error for an image in a place that no option allows."""
    return ImageError(where, what, remedy, "refused image")


def too_large(where: str, what: str, remedy: str) -> ImageError:
    """The error for an image above a limit."""
    return ImageError(where, f"the image is too large ({what})", remedy, "too large image")
