"""``chameleon init``: from a user's files to a folder with everything that a run needs."""
