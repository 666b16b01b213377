"""Detectors, which find the faces of a picture.

A detector is a function of the pixels, uint8 [height, width, 3]. It returns boxes, each (left, top,
width, height) in pixels. ``training.face_detector`` names one:

    skimage                    the frontal faces of scikit-image's cascade (extra [faces])
    my_package.faces:find      a function of yours
    NAME                       one that a package offers as an entry point of the group
                               ``megatron_chameleon.face_detectors``
"""

import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from megatron_chameleon.errors import ConfigError, first_line
from megatron_chameleon.values import printable

GROUP = "megatron_chameleon.face_detectors"
PACKAGED = "skimage"
KEY = "training.face_detector"
SMALLEST_FACE = 1 / 12
"""Faces are looked for down to this share of the shorter side."""

Box = tuple[int, int, int, int]
FaceDetector = Callable[[np.ndarray], Sequence[Box]]


def load_detector(name: str) -> FaceDetector:
    """The detector of a name.

    Raises:
        ConfigError: There is none, it cannot be imported, or its package is missing.
    """
    if name == PACKAGED:
        return _skimage_detector()
    points = {point.name: point for point in entry_points(group=GROUP)}
    module, _, function = name.partition(":")
    try:
        if name in points:
            found = points[name].load()
        elif module and function:
            found = getattr(importlib.import_module(module), function)
        else:
            known = ", ".join(printable(known) for known in [PACKAGED, *sorted(points)])
            what = f"there is no detector {printable(name)}"
            raise ConfigError(KEY, what, f"Use {known} or MODULE:FUNCTION")
    except ConfigError:
        raise
    except Exception as error:  # a user's module may raise anything
        what = f"{printable(name)} cannot be imported ({first_line(error)[:200]})"
        raise ConfigError(KEY, what, "Check the name, and PYTHONPATH") from error
    if not callable(found):
        raise ConfigError(KEY, f"{printable(name)} is not a function", "Name a function")
    return found


def boxes_of(found: Any, name: str) -> list[Box]:
    """What a detector returned, checked.

    Raises:
        ConfigError: It is no list of boxes.
    """
    try:
        array = np.asarray(found if found is not None else [], dtype=np.float64)
        array = array.reshape(0, 4) if array.size == 0 else array
        if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
            raise ValueError
    except (TypeError, ValueError):
        what = f"{printable(name)} returned {printable(repr(found)[:80])}, not boxes"
        remedy = "It must return a list of (left, top, width, height)"
        raise ConfigError(KEY, what, remedy) from None
    return [(int(left), int(top), int(width), int(height)) for left, top, width, height in array]


def _skimage_detector() -> FaceDetector:
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade
    except ImportError as error:
        remedy = "Install it with `pip install megatron-chameleon[faces]`, or name another detector"
        raise ConfigError(KEY, "needs scikit-image, which is not installed", remedy) from error
    cascade = Cascade(lbp_frontal_face_cascade_filename())

    def detect(pixels_HWC: np.ndarray) -> list[Box]:
        side = min(pixels_HWC.shape[:2])
        smallest = max(24, round(side * SMALLEST_FACE))
        if side < smallest:
            return []
        found = cascade.detect_multi_scale(
            img=pixels_HWC,
            scale_factor=1.2,
            step_ratio=1,
            min_size=(smallest, smallest),
            max_size=(side, side),
        )
        return [(face["c"], face["r"], face["width"], face["height"]) for face in found]

    return detect
