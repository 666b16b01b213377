"""A training run: ``prepare.py`` checks it, ``open_run.py`` opens it, ``loop.py`` trains."""
