"""Chooses which documents are worth training on: ``chameleon data filter``.

``measures/`` has the filters' options and measures each document, in worker processes. ``judge.py``
decides from the measured values, in one process, because duplicates and "the nearest N" concern all
documents together. ``write.py`` reads the inputs again and writes the documents that are kept.
``run.py`` is the whole way, and ``page.py`` shows what was dropped.
"""
