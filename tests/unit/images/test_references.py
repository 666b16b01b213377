"""What a document may name: whatever it says, only allowed places are opened and nothing ends."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from image_folders import SECRET, fault, folder

from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.images import local_files
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.references import ImageFolder, decode_data_uri


def test_paths_are_relative_to_the_folder_of_the_documents(place: Path) -> None:
    images = folder(place)
    for value in ("i.png", "./i.png", "sub/../i.png", "sub//../i.png", "../docs/i.png"):
        assert images.read(value) == b"picture", value
    assert images.read(str(place / "docs/sub/j.png")) == b"deeper"
    assert images.read(f"file://{place}/docs/i.png") == b"picture"
    assert images.read(f"file://localhost{place}/docs/i.png") == b"picture"


def test_the_folder_may_be_a_link_or_relative(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "link").symlink_to("docs")
    assert ImageFolder.of(place / "link/a.jsonl").read("i.png") == b"picture"
    assert ImageFolder.of(place / "link/a.jsonl").read(f"{place}/docs/i.png") == b"picture"
    monkeypatch.chdir(place / "docs" / "sub")  # "." of each of the three is another folder
    assert ImageFolder.of("a.jsonl").read("j.png") == b"deeper"
    monkeypatch.chdir(place / "docs")
    assert ImageFolder.of("a.jsonl").read("sub/j.png") == b"deeper"
    monkeypatch.chdir(place)
    assert ImageFolder.of("a.jsonl").read("docs/i.png") == b"picture"


@pytest.mark.parametrize(
    "value",
    [
        "{place}/other/s.png",
        "../other/s.png",
        "sub/../../other/s.png",
        "../docs2/s.png",
        "file://{place}/other/s.png",
        "FILE://{place}/other/s.png",
        "local://{place}/other/s.png",
        "file://{place}/docs/../other/s.png",
        "file://{place}/docs/%2e%2e/other/s.png",
        "/proc/self/environ",
        "/{place}/other/s.png",
        "/proc/self/mem",
        "/proc/self/fd/0",
        "/dev/zero",
        "/dev/stdin",
        "..",
        ".",
        "/",
        "sub",
        "sub/",
        "sub/..",
    ],
)
def test_nothing_outside_is_read(place: Path, value: str) -> None:
    found = fault(folder(place), value.format(place=place))
    assert found.reason == "refused image"


def test_a_refusal_names_the_place_and_the_option(place: Path) -> None:
    found = fault(folder(place), "../other/s.png")
    assert (
        found.what == f"the image lies outside the folder of its documents, at {place}/other/s.png"
    )
    assert found.remedy == f"If you trust the documents, add --image-root {place}/other"
    assert "--image-root" not in fault(folder(place), "/proc/self/environ").remedy
    assert "--image-protocols s3" in fault(folder(place), "s3://bucket/x.png").remedy


@pytest.mark.parametrize(
    "value",
    [
        "none.png",
        "i.png/x",
        "i.png/",
        "none/../i.png",
        "a\0b.png",
        "x" * 300 + ".png",
        "x/" * 3000 + "i.png",
        "~/i.png",
        "i%2epng",
        "\udcff.png",
        "\ud800.png",
        "C:\\pictures\\i.png",
        "sub\\j.png",
        "data:,x",
        "*.png",
        "i.png\n",
        "\x1b]0;x\x07.png",
        "simplecache::i.png",
    ],
)
def test_names_of_all_kinds_are_missing_images(place: Path, value: str) -> None:
    assert fault(folder(place), value).reason == "missing image"


def test_windows_paths_say_what_to_write(place: Path) -> None:
    assert "Write / between folders" in fault(folder(place), "sub\\j.png").remedy


def test_links_are_judged_by_their_target(place: Path) -> None:
    docs = place / "docs"
    (docs / "inside.png").symlink_to("sub/j.png")
    (docs / "outside.png").symlink_to("../other/s.png")
    (docs / "pictures").symlink_to("../other")
    (docs / "loop.png").symlink_to("loop.png")
    (docs / "environ.png").symlink_to("/proc/self/environ")
    (docs / "nowhere.png").symlink_to("none.png")
    assert folder(place).read("inside.png") == b"deeper"
    for name in ("outside.png", "pictures/s.png"):
        found = fault(folder(place), name)
        assert found.reason == "refused image" and f"at {place}/other/s.png" in found.what
        assert folder(place, roots=(str(place / "other"),)).read(name) == SECRET
    assert "leads in a circle" in fault(folder(place), "loop.png").what
    assert fault(folder(place), "environ.png").reason == "refused image"
    assert fault(folder(place), "nowhere.png").reason == "missing image"


@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "device"])
def test_only_regular_files_are_opened(place: Path, kind: str) -> None:
    """A FIFO without a writer would block forever."""
    path = place / "docs/x.png"
    roots = (str(place),)
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            descriptor = os.open(path.parent, os.O_RDONLY)  # the path of a socket must be short
            server.bind(f"/proc/self/fd/{descriptor}/x.png")
            os.close(descriptor)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/null")
            roots = ("/dev",)
        found = fault(folder(place, roots=roots), "x.png")
    assert found.what == f"the image is a {kind}"


def test_processes_are_not_read_even_below_the_root_of_all(place: Path) -> None:
    images = folder(place, roots=("/",))
    assert images.read(str(place / "other/s.png")) == SECRET
    for value in ("/proc/self/mem", "/proc/self/environ", "/sys/kernel/notes"):
        assert fault(images, value).what == "the image is not a file on a disk"


def test_relative_paths_are_looked_up_below_the_roots(place: Path) -> None:
    (place / "other/i.png").write_bytes(b"another")
    images = folder(place, roots=(str(place / "docs2"), str(place / "other")))
    assert images.read("i.png") == b"picture"  # the documents' own folder comes first
    assert images.read("s.png") == SECRET
    assert images.read(f"{place}/other/i.png") == b"another"
    assert fault(images, "none.png").reason == "missing image"
    assert fault(images, "/etc/passwd").reason == "refused image"


def test_a_name_outside_is_not_even_looked_at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at a name below an automounter such as /net would connect to the host it names."""
    opened = os.open

    def only_inside(name: str, *args: int) -> int:
        assert not str(name).startswith("/net")
        return opened(name, *args)

    monkeypatch.setattr(os, "open", only_inside)
    for value in ("/net/host/x.png", "../" * 30 + "net/host/x.png", "file:///net/host/x.png"):
        assert fault(folder(place), value).reason == "refused image"


def test_what_is_read_is_what_was_judged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads elsewhere after the check does not matter: it is not used again."""
    path = place / "docs/i.png"
    judge = local_files._judge

    def exchange(*args: object) -> None:
        judge(*args)  # type: ignore[arg-type]
        path.unlink()
        path.symlink_to("../other/s.png")

    monkeypatch.setattr(local_files, "_judge", exchange)
    assert folder(place).read("i.png") == b"picture"


def test_a_name_exchanged_before_the_opening_is_judged(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = place / "docs/i.png", os.open

    def exchange(name: str, flags: int, *args: int) -> int:
        if name == str(path) and not path.is_symlink():
            path.unlink()
            path.symlink_to("../other/s.png")
        return opened(name, flags, *args)

    monkeypatch.setattr(os, "open", exchange)
    assert fault(folder(place), "i.png").reason == "refused image"


def test_no_descriptor_is_left_open(place: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for value in ("i.png", "none.png", "../other/s.png", "sub", "/etc/passwd"):
        for _ in range(5):
            with suppress(ImageError):
                folder(place).read(value)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_file_above_the_limit_is_not_read(place: Path) -> None:
    with (place / "docs/big.png").open("wb") as file:
        file.truncate((1 << 20) + 1)
    found = fault(folder(place, max_mib=1), "big.png")
    assert found.reason == "too large image" and "1.0 MiB, the limit is 1" in found.what
    assert "--max-image-mib" in found.remedy
    assert len(folder(place, max_mib=2).read("big.png")) == (1 << 20) + 1


@pytest.mark.parametrize("error", [5, 28, 116, 23])  # EIO, ENOSPC, ESTALE, ENFILE
def test_a_failing_disk_ends_the_job(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    opened = os.open

    def fail(name: str, *args: int) -> int:
        if str(name).endswith("i.png"):
            raise OSError(error, os.strerror(error))
        return opened(name, *args)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DataError, match=r"docs/i.png: cannot read the image") as caught:
        folder(place).read("i.png")
    assert not isinstance(caught.value, ImageError)


def test_a_disk_that_went_away_ends_the_job(place: Path) -> None:
    """An unmounted folder is empty; all documents would be dropped, one after the other."""
    images = folder(place)
    (place / "docs/i.png").unlink()
    (place / "docs/a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a.jsonl: no such file") as caught:
        images.read("i.png")
    assert not isinstance(caught.value, ImageError)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roots": ("none",)}, r"--image-root: 'none' is not a folder"),
        ({"roots": ("",)}, r"--image-root: '' is not a folder"),
        ({"roots": ("zip://x::y",)}, r"--image-root: 'zip://x::y' is not a folder"),
        ({"protocols": ("htp",)}, r"--image-protocols: fsspec knows no protocol 'htp'"),
        ({"protocols": ("file",)}, r"file needs no permission, but a folder. Name .* --image-root"),
        ({"protocols": ("generic",)}, r"generic can open any other place"),
        ({"protocols": ("wandb",)}, r"wandb needs a package that is not installed"),
        ({"max_pixels": 0}, r"--max-image-pixels: 0 is not between 1 and 178956970"),
        ({"max_mib": 1 << 40}, r"--max-image-mib: 1099511627776 is not between 1 and"),
        ({"profiles": "maybe"}, r"--image-profiles: 'maybe' is not one of apply, ignore"),
    ],
)
def test_options_that_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageOptions(**options).check()


def test_data_uris(place: Path) -> None:
    assert decode_data_uri("DATA:image/png;base64,eA==") == b"x"
    assert decode_data_uri("data:image/png;base64,e") is None
    assert decode_data_uri("i.png") is None
