"""Formatting of figures."""


def format_figure(value: float | int | str) -> str:
    """Format a number with three or four digits; text stays as it is."""
    if isinstance(value, str) or value == 0:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
