"""``chameleon plan``: memory and time of the layouts by arithmetic, and the published runs behind
it."""
