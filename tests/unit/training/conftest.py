"""Fixtures of this folder."""

from tiny_model import tiny_tokenizer  # noqa: F401
