"""Conversion between checkpoint formats, streamed and verified."""
