"""What the user allows images to be: where they may lie, how large they are, how they are read."""

from dataclasses import dataclass
from pathlib import Path

from megatron_chameleon.errors import ConfigError

LARGEST_IMAGE_PIXELS = 1 << 26
"""67 million, more than the images of any camera have."""
MOST_IMAGE_PIXELS = 178_956_970
"""Pillow itself refuses larger images, whatever the option says."""
LARGEST_IMAGE_MIB = 128
APPLY, IGNORE = "apply", "ignore"
IMAGE_PROFILES = (APPLY, IGNORE)

LOCAL_PROTOCOLS = ("file", "local")
_DELEGATING = ("asynclocal", "async_wrapper", "asyncwrapper", "dir", "generic", "git", "reference")
"""Protocols of fsspec whose paths name other places or local folders, so that allowing one of them
would allow everything."""


@dataclass(frozen=True)
class ImageOptions:
    """The options that all verbs have which open images."""

    roots: tuple[str, ...] = ()
    """Folders or URLs below which images may lie, besides the folder of their documents."""
    protocols: tuple[str, ...] = ()
    """fsspec protocols that references may use, in lower case."""
    profiles: str = APPLY
    """apply: an embedded colour profile is applied; ignore: it is not."""
    max_pixels: int = LARGEST_IMAGE_PIXELS
    max_mib: int = LARGEST_IMAGE_MIB
    """Size of the file in MiB."""

    @property
    def max_bytes(self) -> int:
        return self.max_mib << 20

    def check(self) -> None:
        """Refuse options that cannot work.

        Raises:
            ConfigError: At the first of them.
        """
        for root in self.roots:
            if "::" in root or ("://" not in root and not (root and Path(root).is_dir())):
                what = f"{root!r} is not a folder"
                raise ConfigError("--image-root", what, "Give a folder, or the URL of one")
        for protocol in self.protocols:
            _check_protocol(protocol)
        if self.profiles not in IMAGE_PROFILES:
            what = f"{self.profiles!r} is not one of {', '.join(IMAGE_PROFILES)}"
            raise ConfigError("--image-profiles", what, "Choose one of them")
        bounds = (
            ("--max-image-pixels", self.max_pixels, MOST_IMAGE_PIXELS),
            ("--max-image-mib", self.max_mib, 1 << 20),
        )
        for option, value, most in bounds:
            if not 1 <= value <= most:
                raise ConfigError(option, f"{value} is not between 1 and {most}", "Change it")


def _check_protocol(protocol: str) -> None:
    import fsspec

    where = "--image-protocols"
    if protocol in LOCAL_PROTOCOLS:
        what = f"{protocol} needs no permission, but a folder"
        raise ConfigError(where, what, "Name the folder with --image-root")
    if protocol in _DELEGATING:
        what = f"{protocol} can open any other place, so it cannot be allowed"
        raise ConfigError(where, what, "Name the protocols that the images themselves use")
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        what = f"fsspec knows no protocol {protocol!r}"
        raise ConfigError(where, what, "Give names such as http,https,s3") from error
    except ImportError as error:
        what = f"{protocol} needs a package that is not installed"
        cause = " ".join(str(error).split())
        raise ConfigError(where, f"{what} ({cause})", "Install it, or leave it out") from error
