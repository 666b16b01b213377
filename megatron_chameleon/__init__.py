"""Train, convert, serve and evaluate mixed-modal early-fusion models (arXiv 2405.09818).

Importing the package imports none of the heavy libraries; each module imports what it needs.
"""

__version__ = "0.1.0"
