"""Where the tests find the repository's files."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
"""Helpers that tests and programs import."""
PROGRAMS = SUPPORT / "programs"
"""What tests start as processes of their own."""
