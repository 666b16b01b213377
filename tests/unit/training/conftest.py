"""Fixtures of this folder."""

from tiny_model import tiny_checkpoint, tiny_tokenizer  # noqa: F401
