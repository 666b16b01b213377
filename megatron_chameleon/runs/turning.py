"""When a held-out loss counts as risen: the rule of the warning in a run, and of its report."""

RISE = 0.01
"""The held-out loss must be this share above its lowest value."""
LASTING = 2
"""For so many measurements in a row it must have been above its lowest value."""


def has_risen(lowest: float, last: float, measurements_since: int) -> bool:
    """Whether a held-out loss lies clearly above its lowest value, and has for some time.

    Args:
        lowest: The lowest one.
        last: That of the last measurement.
        measurements_since: Number of measurements after the lowest one.
    """
    return measurements_since >= LASTING and last - lowest >= RISE * abs(lowest)
