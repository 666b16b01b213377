"""Fixtures of the tests of what is trained."""

from tiny_model import tiny_tokenizer  # noqa: F401
