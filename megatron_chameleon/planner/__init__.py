"""``chameleon plan``: estimates memory and time of layouts, and compares with published runs."""
