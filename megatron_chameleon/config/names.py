"""Find a config by what a user calls it; every verb that takes a config asks here."""

import difflib
from pathlib import Path

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.wording import cut

PRESETS = Path(__file__).parent / "presets"
SUFFIXES = (".yaml", ".yml")
_IN_FOLDERS = ("config.yaml", "train.yaml")
"""Names that stand for their folder: the config of a run or a checkpoint, and of an example."""
_LISTED = 8


def find_config(name: str | Path, presets: Path = PRESETS) -> Path:
    """The path of a config.

    Args:
        name: A YAML file; the name of a preset, with or without ``.yaml``; or a folder that holds a
            ``config.yaml``, as runs and checkpoints do, or a ``train.yaml``. A file of that name
            comes before a preset, and a preset before a folder.
        presets: The folder of the presets.

    Raises:
        ConfigError: It is none of them. The error names the presets and similar files.
    """
    text = str(name)
    path = Path(text)
    try:
        if path.is_file():
            return path
        inside = [path / file for file in _IN_FOLDERS if text and (path / file).is_file()]
        is_folder = bool(text) and path.is_dir()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        inside, is_folder = [], False
    preset = next((p for p in sorted(presets.glob("*.yaml")) if text in (p.stem, p.name)), None)
    if preset is not None:
        return preset
    if inside:
        return inside[0]
    raise _not_found(text, is_folder, presets)


def preset_names(presets: Path = PRESETS) -> list[str]:
    """The names of the presets in a folder."""
    return sorted(path.stem for path in presets.glob("*.yaml"))


def _not_found(text: str, is_folder: bool, presets: Path) -> ConfigError:
    path, names = Path(text), preset_names(presets)
    what = "no such config file"
    remedy = f"Give the path of a YAML file, or a preset: {', '.join(names)}"
    folder = path if is_folder else path.parent
    if is_folder:
        what = f"is a folder without {' or '.join(_IN_FOLDERS)}"
    elif len(text) > 255 or not text.isprintable():
        return ConfigError(cut(text), what, remedy)
    try:
        files = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    except (OSError, ValueError):
        files = []
    if is_folder:
        near = files[:_LISTED]
    else:
        stems = {Path(file).stem: file for file in files}
        close = difflib.get_close_matches(path.stem, [*stems, *names], n=3, cutoff=0.6)
        near = [stems.get(stem, stem) for stem in close]
    if near:
        place = f"{folder}/" if str(folder) != "." else ""
        found = [name if name in names else f"{place}{name}" for name in near]
        remedy = f"Did you mean {' or '.join(found)}? {remedy}"
    return ConfigError(cut(text) or "CONFIG", what, remedy)
